"""Caches under random interleavings: every answer must be that of a fresh model without any cache.

    python -m benchmarks.interleavings --steps 2000
    python -m benchmarks.interleavings --steps 200 --blind

One editor, one after another: edits, attached and detached edits, blocks ``with edit.applied`` that are
entered and left in any order, answers, explanations, weights changed in place and back, states in memory
and on disk, editors that come and go. What a step gives is compared with what a second model gives that was
loaded for the purpose, has the same weights, and keeps nothing: answers by their texts, edits bit for bit.
``--blind`` lets the editor overlook changed weights and what is applied, which must fail. Exit code 1 if
something was wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image

from unike.backbones import load_backbone
from unike.backbones.guard import Guard
from unike.backbones.weights import WeightWatch
from unike.config.hparams import HyperParams
from unike.editor import MultimodalEditor
from unike.edits import Edit, compose
from unike.types import Query, UserError

COLORS = ("red", "green", "blue", "gray", "gold", "navy")
ASKED = ("Question: what is it? Short answer:", "Question: which thing is this? Short answer:")
TARGETS = ("a red fox", "two dogs", "the sea", "green")
METHODS: tuple[dict[str, Any], ...] = (
    {"method": "tpatcher", "activation_loss": 0.1, "memory_loss": 0.0},
    {"method": "ft", "layers": 1},
    {"method": "ft", "ft_target": "projection"},
    {"method": "ike", "ike_demonstrations": 0},
)
QUICK: dict[str, Any] = {"max_steps": 6, "batch_invariant": True}


@dataclass
class Tally:
    """What was done and compared, and what was wrong, a line each."""

    done: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass
class Made:
    """An edit, and the weights it is of: the number of their state."""

    edit: Edit
    weights: int


class Walk:
    """Random steps on one model, each compared with another one that keeps nothing."""

    def __init__(self, hparams: HyperParams, folder: Path, seed: int) -> None:
        self.hparams, self.folder, self.draw = hparams, folder, random.Random(seed)
        self.backbone = load_backbone(hparams)
        self.images = [Image.new("RGB", (64, 64), color) for color in COLORS]
        self.tally = Tally()
        # States of the weights by number, as what to add to which tensor; 0 is how they were loaded.
        self.states: list[dict[str, torch.Tensor]] = [{}]
        self.weights, self.made = 0, list[Made]()
        self.blocks: list[tuple[Edit, AbstractContextManager[None]]] = []
        self.attached: list[Edit] = []
        self.editor = self._open_editor()
        self._fresh: MultimodalEditor | None = None

    def run(self, steps: int) -> Tally:
        acts: dict[Callable[[], None], int] = {
            self._generate: 6, self._ask: 4, self._make: 5, self._attach: 4, self._detach: 3,
            self._enter: 4, self._leave: 3, self._read: 4, self._change: 1, self._restore: 1,
            self._reopen: 2,
        }  # fmt: skip
        for _ in range(steps):
            act = self.draw.choices(list(acts), list(acts.values()))[0]
            self.tally.done[act.__name__.strip("_")] += 1
            act()
        while self.blocks:
            self._leave()
        while self.attached:
            self._detach()
        self._generate()
        return self.tally

    # ---------------------------------------------------------------- the reference

    def _make_fresh(self) -> MultimodalEditor:
        """A model of its own with the weights of now, loaded anew when they change; without caches."""
        if self._fresh is None:
            backbone = load_backbone(self.hparams)
            parameters = dict(backbone.model.named_parameters())
            for name, tensor in self.states[self.weights].items():
                parameters[name].copy_(tensor)
            self._fresh = MultimodalEditor(self._draw_options({}), backbone, progress=False)
        self._fresh.backbone.cache.forget()
        return self._fresh

    def _answer_fresh(self, edits: Sequence[Edit], image: Image.Image, prompt: str) -> str:
        backbone, whole = self._make_fresh().backbone, compose(edits)
        query = Query(image, prompt)
        if whole is None:
            return backbone.generate([image], [prompt])[0]
        query = whole.rewrite(query)
        with whole.applied(backbone):
            return backbone.generate([query.image], [query.prompt])[0]

    # ---------------------------------------------------------------- steps

    def _draw_options(self, method: dict[str, Any]) -> HyperParams:
        return HyperParams.from_dict(self.hparams.to_dict() | QUICK | method, self.hparams.source)

    def _open_editor(self) -> MultimodalEditor:
        method = dict(self.draw.choice(METHODS))
        if self.draw.random() < 0.6:
            method["prefix_dir"] = str(self.folder)
        return MultimodalEditor(self._draw_options(method), self.backbone, progress=False)

    def _reopen(self) -> None:
        self.editor = self._open_editor()

    def _generate(self) -> None:
        image, prompt = self.draw.choice(self.images), self.draw.choice(ASKED)
        edited = self.draw.random() < 0.5
        found = self.editor.generate(image, prompt, edited=edited)
        wanted = self._answer_fresh(self.attached if edited else (), image, prompt)
        self._compare(f"generate, edited={edited}", found, wanted)

    def _ask(self) -> None:
        image, prompt = self.draw.choice(self.images), self.draw.choice(ASKED)
        found = self.editor.ask(image, prompt)
        self._compare("ask, before", found.before, self._answer_fresh((), image, prompt))
        self._compare("ask, after", found.after, self._answer_fresh(self.attached, image, prompt))

    def _read(self) -> None:
        """The backbone itself answers under what is attached and what blocks have applied."""
        image, prompt = self.draw.choice(self.images), self.draw.choice(ASKED)
        with torch.no_grad():
            found = self.backbone(self.backbone.encode([image], [prompt])).logits
            fresh = self._make_fresh().backbone
            with ExitStack() as stack:
                if (whole := compose(self.attached)) is not None:
                    stack.enter_context(whole.applied(fresh))
                for edit, _ in self.blocks:
                    stack.enter_context(edit.applied(fresh))
                wanted = fresh(fresh.encode([image], [prompt])).logits
        self._compare("logits", torch.equal(found, wanted), True)

    def _make(self) -> None:
        """An edit is that of a fresh model; it is kept for later, and what was attached is attached again."""
        image, prompt = self.draw.choice(self.images), self.draw.choice(ASKED)
        target = self.draw.choice(TARGETS)
        _, edited, _ = self.editor.edit(prompt, target, image)
        (edit,) = edited.edits
        edited.remove()
        for former in self.attached:
            self._attach_former(former)
        own = self.editor.hparams
        changes = {"prefix_dir": None, "method": own.method, "layers": own.layers, "ft_target": own.ft_target}
        fresh = MultimodalEditor(
            HyperParams.from_dict(own.to_dict() | changes, own.source), self._make_fresh().backbone, False
        )
        _, other, _ = fresh.edit(prompt, target, image)
        (clean,) = other.edits
        other.remove()
        mine, theirs = edit.state_dict(), clean.state_dict()
        equal = mine.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in mine.items())
        self._compare("edit", equal, True)
        if all(made.edit.id != edit.id or made.weights != self.weights for made in self.made):
            edit.id = f"{edit.id}-{len(self.made)}"
            self.made.append(Made(edit, self.weights))

    def _attach_former(self, edit: Edit) -> None:
        # Those of former weights were attached before these were changed.
        with mock.patch.object(type(self.editor._slot), "fingerprint", edit.origins[0].backbone):
            self.editor.attach(edit)

    def _attach(self) -> None:
        left = [m for m in self.made if all(m.edit is not a for a in self.attached)]
        if not left or len(self.attached) > 3:
            return
        made = self.draw.choice(left)
        try:
            self.editor.attach(made.edit)
        except UserError:
            self._compare("an edit of these weights is refused", made.weights == self.weights, False)
        else:
            self._compare("an edit of other weights is attached", made.weights == self.weights, True)
            self.attached.append(made.edit)

    def _detach(self) -> None:
        if self.attached:
            edit = self.attached.pop(self.draw.randrange(len(self.attached)))
            self._compare("detach", self.editor.detach(edit.id) is edit, True)

    def _enter(self) -> None:
        left = [m.edit for m in self.made if m.weights == self.weights]
        if left and len(self.blocks) < 3:
            edit = self.draw.choice(left)
            block = edit.applied(self.backbone)
            block.__enter__()
            self.blocks.append((edit, block))

    def _leave(self) -> None:
        if self.blocks:
            _, block = self.blocks.pop(self.draw.randrange(len(self.blocks)))
            block.__exit__(None, None, None)

    def _change(self) -> None:
        """Weights are changed in place while nothing is on the model; edits of the former ones are off."""
        while self.blocks:
            self._leave()
        while self.attached:
            self._detach()
        state = dict(self.states[self.weights])
        name, parameter = self.draw.choice(list(self.backbone.model.named_parameters()))
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(self.states)))
        self._write(name, parameter.detach() + 0.05 * noise)
        state[name] = parameter.detach().clone()
        self.states.append(state)
        self.weights, self._fresh = len(self.states) - 1, None

    def _restore(self) -> None:
        """The weights are those of an earlier state again."""
        while self.blocks:
            self._leave()
        while self.attached:
            self._detach()
        number = self.draw.randrange(len(self.states))
        base = dict(load_backbone(self.hparams).model.named_parameters())
        for name in {*self.states[self.weights], *self.states[number]}:
            self._write(name, self.states[number].get(name, base[name].detach()))
        self.weights, self._fresh = number, None

    def _write(self, name: str, value: torch.Tensor) -> None:
        parameter = self.backbone.model.get_parameter(name)
        how = self.draw.randrange(4)
        if how == 0:
            with torch.no_grad():
                parameter.copy_(value)
        elif how == 1:
            parameter.data.copy_(value)
        elif how == 2:
            parameter.data = value.clone()
        else:
            self.backbone.model.load_state_dict(self.backbone.model.state_dict() | {name: value})

    def _compare(self, what: str, found: object, wanted: object) -> None:
        self.tally.compared += 1
        if found != wanted:
            on = f"{len(self.attached)} attached, {len(self.blocks)} blocks, weights {self.weights}"
            self.tally.wrong.append(f"{what}: {found!r}; expected {wanted!r} ({on})")


@contextmanager
def blind() -> Iterator[None]:
    """Inside the block nobody sees that weights were changed, or that an edit is applied."""

    @contextmanager
    def keep(self: Guard) -> Iterator[None]:
        yield

    with (
        mock.patch.object(WeightWatch, "seems_changed", return_value=False),
        mock.patch.object(WeightWatch, "are_plain", return_value=True),
        mock.patch.object(Guard, "_suspended", keep),
    ):
        yield


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--hparams_dir", default="hparams/ft/tiny_blip2.yaml")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if args.blind:
            stack.enter_context(blind())
        tally = Walk(HyperParams.from_hparams(args.hparams_dir), Path(folder), args.seed).run(args.steps)
    done = ", ".join(f"{count} {act}" for act, count in sorted(tally.done.items()))
    print(f"{args.steps} steps: {done}")
    print(f"{tally.compared} compared, {len(tally.wrong)} wrong")
    for line in tally.wrong[:20]:
        print(f"  {line}")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
