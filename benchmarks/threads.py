"""Threads on one editor: every answer must be the right one, and no edit may get lost.

    python -m benchmarks.threads --threads 8 --seconds 60
    python -m benchmarks.threads --seconds 10 --without_lock

Each thread draws what it does next: it asks the base model, asks in a block of its own, edits, attaches or
detaches. Every answer is compared with what one thread alone was given before, every edit with a clean one,
bit for bit. Answers under what is attached are compared afterwards, with the edits that ``ask`` reported.
With ``--without_lock`` no thread waits for another, which must fail. Exit code 1 if something was wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from PIL import Image

from unike.backbones.guard import Guard
from unike.editor import MultimodalEditor
from unike.edits import Edit
from unike.types import UserError

PROMPT = "Question: What is this? Short answer:"
TARGETS = ("kangaroo", "guitar", "fox", "banana", "castle", "boat", "piano", "robot")
COLORS = ("red", "green", "blue", "gray", "gold", "navy", "olive", "teal")


@dataclass
class Tally:
    """What was done, and what was wrong, a line each."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@dataclass
class Known:
    """What one thread alone was given: the base answer, the edit, and the answer under it."""

    image: Image.Image
    target: str
    base: str
    edit: Edit
    edited: str


def learn(editor: MultimodalEditor, image: Image.Image, target: str) -> Known:
    """One thread's answers, before there are others."""
    base = editor.generate(image, PROMPT)
    _, edited, _ = editor.edit(PROMPT, target, image)
    answer = edited.generate(image, PROMPT)
    (edit,) = edited.edits
    edited.remove()
    return Known(image, target, base, edit, answer)


class Crowd:
    """Threads that use one editor at random until the time is over."""

    def __init__(self, editor: MultimodalEditor, known: Sequence[Known], seed: int) -> None:
        self.editor, self.known, self.seed = editor, known, seed
        self.tally, self._mine = Tally(), threading.Lock()
        # Calls of ``edit``, which replace all that is attached: before and after each of them.
        self.replaced = 0
        self.asked: set[tuple[int, tuple[str, ...], str]] = set()

    def run(self, threads: int, seconds: float) -> Tally:
        end = time.monotonic() + seconds
        workers = [threading.Thread(target=self._work, args=(n, end), daemon=True) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(seconds + 300)
            if worker.is_alive():
                self._note("hang", f"{worker.name} has not come to an end")
        for edit in reversed(self.editor.edits):
            self.editor.detach(edit.id)
        self._check_attached()
        for own in self.known:
            self._compare("base afterwards", self.editor.generate(own.image, PROMPT), own.base)
        return self.tally

    def _work(self, number: int, end: float) -> None:
        torch.set_num_threads(1)
        chooser, own = random.Random(self.seed * 1000 + number), self.known[number % len(self.known)]
        acts = {"base": 6, "edited": 4, "ask": 3, "attach": 4, "edit": 1}
        while time.monotonic() < end:
            act = chooser.choices(list(acts), list(acts.values()))[0]
            try:
                getattr(self, f"_{act}")(own if act in ("attach", "edit") else chooser.choice(self.known))
                self._note(act)
            except Exception as error:
                self._note(act, f"{act}: {type(error).__name__}: {error}")

    def _base(self, own: Known) -> None:
        self._compare("base", self.editor.generate(own.image, PROMPT), own.base)

    def _edited(self, own: Known) -> None:
        with own.edit.applied(self.editor.backbone):
            # On top of what others have attached, which stays the same while the block lasts.
            first = self.editor.backbone.generate([own.image], [PROMPT])[0]
            self._compare("base in a block", self.editor.generate(own.image, PROMPT), own.base)
            self._compare("a block", self.editor.backbone.generate([own.image], [PROMPT])[0], first)

    def _ask(self, own: Known) -> None:
        found = self.editor.ask(own.image, PROMPT)
        self._compare("ask", found.before, own.base)
        with self._mine:
            self.asked.add((self.known.index(own), tuple(e.id for e in found.edits), found.after))

    def _attach(self, own: Known) -> None:
        before = self.replaced
        try:
            self.editor.attach(own.edit)
        except UserError as error:
            if "is attached already" not in str(error):
                raise
            return
        time.sleep(0.001)
        here = own.edit.id in [edit.id for edit in self.editor.edits]
        try:
            self.editor.detach(own.edit.id)
        except UserError:
            here = False
        if not here and self.replaced == before:
            raise LookupError(f"edit {own.edit.id} got lost")

    def _edit(self, own: Known) -> None:
        with self._mine:
            self.replaced += 1
        _, edited, _ = self.editor.edit(PROMPT, own.target, own.image)
        with self._mine:
            self.replaced += 1
        (edit,) = edited.edits
        mine, clean = edit.state_dict(), own.edit.state_dict()
        if mine.keys() != clean.keys() or not all(torch.equal(t, clean[n]) for n, t in mine.items()):
            self._note("edit", f"edit {edit.id} is not the clean one")
        self._compare("edited model", edited.generate(own.image, PROMPT), own.edited)

    def _check_attached(self) -> None:
        by_id = {own.edit.id: own.edit for own in self.known}
        for place, ids, after in sorted(self.asked):
            for name in ids:
                self.editor.attach(by_id[name])
            wanted = self.editor.generate(self.known[place].image, PROMPT, edited=True)
            self._compare(f"under {', '.join(ids) or 'nothing'}", after, wanted)
            for name in ids:
                self.editor.detach(name)

    def _compare(self, what: str, found: str, wanted: str) -> None:
        if found != wanted:
            self._note(what, f"{what}: {found!r}; expected {wanted!r}")

    def _note(self, what: str, wrong: str | None = None) -> None:
        with self._mine:
            if wrong is None:
                self.tally.done[what] += 1
            else:
                self.tally.wrong.append(wrong)


@contextmanager
def without_lock() -> Iterator[None]:
    """Inside the block no thread waits for another one."""
    nothing = mock.Mock(return_value=None)
    with mock.patch.object(Guard, "_acquire", nothing), mock.patch.object(Guard, "_release", nothing):
        yield


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hparams_dir", default="hparams/tiny_blip2.yaml")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without_lock", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    editor = MultimodalEditor.from_hparams(args.hparams_dir, progress=False)
    images = [Image.new("RGB", (64, 64), color) for color in COLORS]
    known = [learn(editor, image, target) for image, target in zip(images, TARGETS, strict=True)]
    crowd = Crowd(editor, known, args.seed)
    if args.without_lock:
        with without_lock():
            tally = crowd.run(args.threads, args.seconds)
    else:
        tally = crowd.run(args.threads, args.seconds)
    print(
        f"{args.threads} threads, {args.seconds:g} s: " + ", ".join(f"{n} {w}" for w, n in tally.done.items())
    )
    print(f"{len(crowd.asked)} different answers under what was attached, compared afterwards")
    print(f"{len(tally.wrong)} wrong")
    for line in tally.wrong[:20]:
        print(f"  {line}")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
