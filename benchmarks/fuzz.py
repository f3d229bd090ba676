"""Fuzzing: damaged inputs by the thousand, each taken with the right meaning or refused in plain lines.

    python -m benchmarks.fuzz --mutants 20000 --shell 40
    python -m benchmarks.fuzz --targets yaml edits --mutants 500

Every mutant goes through the functions that the command line calls; ``--shell`` of them through
``run_edit.py`` itself. A mutant fails that raises anything but a UserError, or one with an empty or a broken
line; that takes more than 5 seconds of the processor; that writes, deletes, starts or connects anything (told
by Python's audit events); or that is taken and means something else. A failed mutant is named by its number,
from which ``--seed`` makes it again, and kept in ``--keep``. Ends with 1 where one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from benchmarks import mutant_edits as edits
from benchmarks import mutants
from benchmarks.mutants import require
from unike.backbones.checkpoint_files import load_state
from unike.config.hparams import OPTIONS, HyperParams
from unike.datasets.images import lies_outside, open_image
from unike.datasets.mmedit import load_records
from unike.edits import LayerKnowledge
from unike.knowledge.encoders import Disentangler, KnowledgeStates
from unike.methods.preparation.knowledge import LayerStates, load_states, make_knowledge, save_knowledge
from unike.runs.inputs import open_datasets
from unike.types import UserError

ROOT = Path(__file__).resolve().parents[1]
ORIGINALS = ROOT / "tests" / "fixtures" / "original_checkpoints"
SECONDS = 5
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_EVENTS = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate")
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")

# Makes a mutant in the folder, and then takes or refuses it: true where it was taken.
Target = Callable[[Path, random.Random], Callable[[], bool]]


class HangError(BaseException):
    """More than ``SECONDS`` of the processor; no Exception, so that nothing swallows it."""


@dataclass
class Tally:
    """What became of one target's mutants."""

    taken: int = 0
    refused: int = 0
    slowest: float = 0.0
    failed: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- targets


def yaml_target(folder: Path, draw: random.Random) -> Callable[[], bool]:
    """A shipped YAML; what is taken must hold the values that plain YAML reads."""
    source = draw.choice(sorted(p for p in (ROOT / "hparams").glob("**/*.yaml") if p.name != "tables.yaml"))
    path = folder / "mutant.yaml"
    path.write_bytes(mutants.yaml_text(source.read_text("utf-8"), draw))

    def take() -> bool:
        hparams = HyperParams.from_hparams(path)
        known = {alias: o.name for o in OPTIONS.values() for alias in o.aliases}
        for key, value in yaml.safe_load(path.read_text("utf-8")).items():
            held = getattr(hparams, known.get(key, key))
            require(_same(held, value), f"{key}: {value!r} became {held!r}")
        again = HyperParams.from_dict(hparams.to_dict(), source=hparams.source)
        require(again == hparams, "its own values make another")
        json.dumps(hparams.to_dict(), allow_nan=False)
        return True

    return take


def _same(held: Any, given: Any) -> bool:
    if isinstance(held, tuple):
        names = [given] if isinstance(given, str) else list(given)
        return sorted(map(_lower, held)) == sorted(map(_lower, names))
    if isinstance(held, float) and not isinstance(given, bool):
        return held == float(given)
    if isinstance(given, int) and isinstance(held, str):
        return held == f"cuda:{given}"
    return bool(_lower(held) == _lower(given))


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def annotation_target(folder: Path, draw: random.Random) -> Callable[[], bool]:
    """An annotation file behind a YAML, its pictures in a folder with a way out of it."""
    pictures = folder / "pictures"
    if not pictures.exists():
        pictures.mkdir()
        for i in range(4):
            Image.new("RGB", (8, 8), (i, i, i)).save(pictures / f"{i}.png")
        (pictures / "outside.png").symlink_to(ORIGINALS / "dims.json")
    path = folder / "vqa.json"
    path.write_bytes(mutants.annotations([_record(i) for i in range(3)], draw))
    hparams = HyperParams(
        model_name="blip2", name="x", image_root=str(pictures), data={"vqa": {"eval": str(path)}}
    )

    def take() -> bool:
        cases = open_datasets(hparams, "vqa")
        records = load_records(path)
        require(len(cases) == len(records), "records are gone")
        for case, record in zip(cases, records, strict=True):
            require(case.request.query.target == record["alt"].strip(), "alt is another")
            require(record["src"].strip() in case.request.query.prompt, "src is another")
            for query in (p.query for p in case.probes):
                require(query.image is None or not lies_outside(pictures, query.image), "leads outside")
        return True

    return take


def _record(i: int) -> dict[str, Any]:
    return {
        "src": f"what is {i}?", "rephrase": f"which is {i}?", "pred": "a dog", "alt": f"a fox {i}",
        "image": f"{i}.png", "image_rephrase": f"{i + 1}.png", "loc": "who?", "loc_ans": "a man",
        "m_loc": f"{i}.png", "m_loc_q": "what color?", "m_loc_a": "blue", "same_image_q": "how many?",
        "same_image_a": "2", "joint": True,
    }  # fmt: skip


def picture_target(folder: Path, draw: random.Random) -> Callable[[], bool]:
    """A small picture of some format, damaged, or with a header that claims too much."""
    kind, content = draw.choice(mutants.pictures(draw))
    huge = draw.random() < 0.05
    path = folder / f"mutant.{draw.choice((kind, 'png', 'jpg'))}"
    path.write_bytes(mutants.huge_picture(draw) if huge else mutants.damaged(content, draw))

    def take() -> bool:
        image = open_image(path)
        pixels = image.width * image.height
        require(image.mode == "RGB" and 0 < pixels <= (Image.MAX_IMAGE_PIXELS or pixels), "is no picture")
        require(len(image.tobytes()) == 3 * pixels, "lacks pixels")
        return True

    return take


def checkpoint_target(folder: Path, draw: random.Random) -> Callable[[], bool]:
    """One of the small original files, or a safetensors file."""
    source = draw.choice([*sorted(ORIGINALS.glob("*.pth")), *sorted(ORIGINALS.glob("*/*.safetensors"))])
    path = folder / f"mutant{source.suffix}"
    path.write_bytes(mutants.checkpoint(source.read_bytes(), draw))

    def take() -> bool:
        for name, tensor in load_state(path).items():
            require(tensor.layout is torch.strided, f"{name} is sparse")
            # Reads every number: what a file claims without holding it would end here.
            require(tensor.nbytes <= path.stat().st_size, f"{name} is larger than its file")
            tensor.sum()
        return True

    return take


def knowledge_target(folder: Path, draw: random.Random) -> Callable[[], bool]:
    """A folder of memory and encoders, one of its two files damaged."""
    sound = folder / "sound"
    if not sound.exists():
        generator = torch.Generator().manual_seed(1)
        states = KnowledgeStates(*(torch.randn(6, 8, generator=generator) for _ in range(3)))
        ffn = torch.randn(6, 8, generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            encoders = {1: Disentangler(8, 16, 8)}
        save_knowledge(sound, {1: LayerStates(states, ffn)}, encoders, {}, {"layers": [1]})
    name = draw.choice(("knowledge.json", "knowledge.safetensors"))
    own = folder / "knowledge"
    own.mkdir(exist_ok=True)
    for file in sound.iterdir():
        content = file.read_bytes()
        (own / file.name).write_bytes(mutants.damaged(content, draw) if file.name == name else content)

    def take() -> bool:
        states, encoders = load_states(own, torch.device("cpu"))
        hparams = HyperParams(model_name="blip2", name="x")
        (known,) = make_knowledge(states, encoders, hparams).values()
        require(isinstance(known, LayerKnowledge), "is no knowledge")
        before, _ = load_states(sound, torch.device("cpu"))
        require(torch.equal(states[1].states.sem, before[1].states.sem), "numbers are others")
        return True

    return take


TARGETS: dict[str, Target] = {
    "yaml": yaml_target,
    "annotations": annotation_target,
    "pictures": picture_target,
    "checkpoints": checkpoint_target,
    "knowledge": knowledge_target,
    "edits": edits.target,
}


# ---------------------------------------------------------------- watching one mutant


_watched: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    wrote = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
    if (wrote and arguments[0] != os.devnull) or event in _EVENTS or event in _STARTS:
        _watched.append(f"{event} {arguments[0]!r}")


@contextmanager
def watched() -> Iterator[list[str]]:
    """What is written, deleted, started or connected inside the block."""
    global _watched
    _watched = []
    try:
        yield _watched
    finally:
        _watched = None


def _hang(*_: Any) -> None:
    raise HangError


def judged(take: Callable[[], bool]) -> tuple[str, str]:
    """``taken``, ``refused`` or ``failed``, and why."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with watched() as seen:
            take()
        verdict, reason = "taken", ""
    except UserError as error:
        verdict, reason = "refused", _wrong_lines(error)
    except HangError:
        verdict, reason = "failed", f"more than {SECONDS} s"
    except Exception:
        verdict, reason = "failed", traceback.format_exc(limit=-3)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if seen:
        reason = f"touched {seen[:3]}"
    return ("failed" if reason else verdict), reason


def _wrong_lines(error: UserError) -> str:
    bad = [line for line in error.problems if not line.strip() or "\n" in line or len(line) > 2000]
    with suppress(UnicodeEncodeError):
        "".join(error.problems).encode()
        if bad or not error.problems:
            return f"{len(bad)} bad lines, the first: {bad[0][:200] if bad else None!r}"
        return ""
    return "a line is no UTF-8"


def fuzz(target: str, make: Target, numbers: range, seed: int, folder: Path, keep: Path | None) -> Tally:
    """Makes and judges the mutants of these numbers."""
    tally = Tally()
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        take = make(folder, random.Random(f"{seed}/{target}/{number}"))
        began = time.process_time()
        verdict, reason = judged(take)
        tally.slowest = max(tally.slowest, time.process_time() - began)
        if verdict == "failed":
            tally.failed.append(f"{target} {number}: {reason}")
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                for path in folder.glob("[mv]*.*"):
                    (keep / f"{target}-{number}-{path.name}").write_bytes(path.read_bytes())
        elif verdict == "taken":
            tally.taken += 1
        else:
            tally.refused += 1
    return tally


def shell(numbers: range, seed: int, folder: Path) -> Tally:
    """YAMLs through ``run_edit.py --check`` in a process of its own: exit code 0 or 2, no traceback."""
    tally = Tally()
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        yaml_target(folder, random.Random(f"{seed}/shell/{number}"))
        command = [sys.executable, str(ROOT / "run_edit.py"), "--hparams_dir", "mutant.yaml", "--check"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        lines = done.stderr.splitlines()
        stray = {p.name for p in folder.iterdir()} - {"mutant.yaml"}
        if done.returncode not in (0, 2) or "Traceback" in done.stderr or stray:
            tally.failed.append(f"shell {number}: {done.returncode} {lines[-1:]} {sorted(stray)}")
        elif done.returncode == 2:
            tally.refused += 1
        else:
            tally.taken += 1
    return tally


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--targets", nargs="+", choices=[*TARGETS], default=[*TARGETS])
    add("--mutants", type=int, default=20_000, help="of all targets together")
    add("--shell", type=int, default=0, help="YAMLs that go through run_edit.py as well")
    add("--seed", type=int, default=0)
    add("--keep", type=Path, metavar="DIR", help="where failed mutants are kept")
    args = parser.parse_args(argv)
    targets = {name: TARGETS[name] for name in args.targets}
    sys.addaudithook(_audit)
    signal.signal(signal.SIGPROF, _hang)
    each, tallies = -(-args.mutants // len(targets)), {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in targets.items():
            tallies[name] = fuzz(name, make, range(each), args.seed, Path(scratch, name), args.keep)
        if args.shell:
            tallies["shell"] = shell(range(args.shell), args.seed, Path(scratch, "shell"))
    print(
        "| target | mutants | taken | refused | failed | slowest, s |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, t in tallies.items():
        total = t.taken + t.refused + len(t.failed)
        print(f"| {name} | {total} | {t.taken} | {t.refused} | {len(t.failed)} | {t.slowest:.2f} |")
    failed = [line for tally in tallies.values() for line in tally.failed]
    print(*failed[:20], sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
