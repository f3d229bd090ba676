"""Fuzzing: thousands of damaged inputs, each of which must load correctly or fail with a clear message.

    python -m benchmarks.fuzz --mutants 20000 --shell 40
    python -m benchmarks.fuzz --targets yaml edits --mutants 500

Every mutant goes through the functions that the command line calls, ``--shell`` of them through
``run_edit.py`` itself. A mutant fails in four cases: it raises anything but a UserError, or one with an empty
or a broken line; it takes more than 5 CPU seconds; it writes, deletes, starts or connects anything (seen in
Python's audit events); it loads and means something else. A failed mutant is named by its number, from which
``--seed`` makes it again, and stored in ``--keep``. Exit code 1 if one failed.
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

# Makes a mutant in the folder and returns the function that loads it, or refuses it with a UserError.
Target = Callable[[Path, random.Random], Callable[[], bool]]


class HangError(BaseException):
    """More than ``SECONDS`` of CPU time; no Exception, so that nothing swallows it."""


@dataclass
class Tally:
    """The results of one target's mutants."""

    loaded: int = 0
    refused: int = 0
    slowest: float = 0.0
    failed: list[str] = field(default_factory=list)


# ---------------------------------------------------------------- targets


def mutate_yaml(folder: Path, draw: random.Random) -> Callable[[], bool]:
    """A bundled YAML; if it loads, it must have the values that plain YAML reads."""
    plans = ("tables", "tuning")
    found = (ROOT / "hparams").glob("**/*.yaml")
    source = draw.choice(sorted(path for path in found if not path.name.startswith(plans)))
    path = folder / "mutant.yaml"
    path.write_bytes(mutants.damage_yaml(source.read_text("utf-8"), draw))

    def load() -> bool:
        hparams = HyperParams.from_hparams(path)
        known = {alias: o.name for o in OPTIONS.values() for alias in o.aliases}
        for key, value in yaml.safe_load(path.read_text("utf-8")).items():
            loaded = getattr(hparams, known.get(key, key))
            require(_is_same(loaded, value), f"{key}: {value!r} became {loaded!r}")
        again = HyperParams.from_dict(hparams.to_dict(), source=hparams.source)
        require(again == hparams, "its own values give other hyper-parameters")
        json.dumps(hparams.to_dict(), allow_nan=False)
        return True

    return load


def _is_same(loaded: Any, written: Any) -> bool:
    if isinstance(loaded, tuple):
        names = [written] if isinstance(written, str) else list(written)
        return sorted(map(_lower, loaded)) == sorted(map(_lower, names))
    if isinstance(loaded, float) and not isinstance(written, bool):
        return loaded == float(written)
    if isinstance(written, int) and isinstance(loaded, str):
        return loaded == f"cuda:{written}"
    return bool(_lower(loaded) == _lower(written))


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def mutate_annotations(folder: Path, draw: random.Random) -> Callable[[], bool]:
    """An annotation file of a YAML, with its images in a folder that has a link out of it."""
    images = folder / "pictures"
    if not images.exists():
        images.mkdir()
        for i in range(4):
            Image.new("RGB", (8, 8), (i, i, i)).save(images / f"{i}.png")
        (images / "outside.png").symlink_to(ORIGINALS / "dims.json")
    path = folder / "vqa.json"
    path.write_bytes(mutants.damage_annotations([_make_record(i) for i in range(3)], draw))
    hparams = HyperParams(
        model_name="blip2", name="x", image_root=str(images), data={"vqa": {"eval": str(path)}}
    )

    def load() -> bool:
        cases = open_datasets(hparams, "vqa")
        records = load_records(path)
        require(len(cases) == len(records), "records are missing")
        for case, record in zip(cases, records, strict=True):
            require(case.request.query.target == record["alt"].strip(), "alt differs")
            require(record["src"].strip() in case.request.query.prompt, "src differs")
            for query in (p.query for p in case.probes):
                require(query.image is None or not lies_outside(images, query.image), "leads outside")
        return True

    return load


def _make_record(i: int) -> dict[str, Any]:
    return {
        "src": f"what is {i}?", "rephrase": f"which is {i}?", "pred": "a dog", "alt": f"a fox {i}",
        "image": f"{i}.png", "image_rephrase": f"{i + 1}.png", "loc": "who?", "loc_ans": "a man",
        "m_loc": f"{i}.png", "m_loc_q": "what color?", "m_loc_a": "blue", "same_image_q": "how many?",
        "same_image_a": "2", "joint": True,
    }  # fmt: skip


def mutate_image(folder: Path, draw: random.Random) -> Callable[[], bool]:
    """A small image of some format, damaged, or with a header that claims too much."""
    kind, content = draw.choice(mutants.make_images(draw))
    huge = draw.random() < 0.05
    path = folder / f"mutant.{draw.choice((kind, 'png', 'jpg'))}"
    path.write_bytes(mutants.make_huge_image(draw) if huge else mutants.damage(content, draw))

    def load() -> bool:
        image = open_image(path)
        pixels = image.width * image.height
        require(image.mode == "RGB" and 0 < pixels <= (Image.MAX_IMAGE_PIXELS or pixels), "is no image")
        require(len(image.tobytes()) == 3 * pixels, "lacks pixels")
        return True

    return load


def mutate_checkpoint(folder: Path, draw: random.Random) -> Callable[[], bool]:
    """One of the small original files, or a safetensors file."""
    source = draw.choice([*sorted(ORIGINALS.glob("*.pth")), *sorted(ORIGINALS.glob("*/*.safetensors"))])
    path = folder / f"mutant{source.suffix}"
    path.write_bytes(mutants.damage_checkpoint(source.read_bytes(), draw))

    def load() -> bool:
        for name, tensor in load_state(path).items():
            require(tensor.layout is torch.strided, f"{name} is sparse")
            # Reads every number: a file that claims more than it holds would end here.
            require(tensor.nbytes <= path.stat().st_size, f"{name} is larger than its file")
            tensor.sum()
        return True

    return load


def mutate_knowledge(folder: Path, draw: random.Random) -> Callable[[], bool]:
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
        (own / file.name).write_bytes(mutants.damage(content, draw) if file.name == name else content)

    def load() -> bool:
        states, encoders = load_states(own, torch.device("cpu"))
        hparams = HyperParams(model_name="blip2", name="x")
        (known,) = make_knowledge(states, encoders, hparams).values()
        require(isinstance(known, LayerKnowledge), "is no knowledge")
        before, _ = load_states(sound, torch.device("cpu"))
        require(torch.equal(states[1].states.sem, before[1].states.sem), "numbers differ")
        return True

    return load


TARGETS: dict[str, Target] = {
    "yaml": mutate_yaml,
    "annotations": mutate_annotations,
    "pictures": mutate_image,
    "checkpoints": mutate_checkpoint,
    "knowledge": mutate_knowledge,
    "edits": edits.mutate_edit,
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
def watch_effects() -> Iterator[list[str]]:
    """Yields a list that collects what is written, deleted, started or connected inside the block."""
    global _watched
    _watched = []
    try:
        yield _watched
    finally:
        _watched = None


def _raise_hang(*_: Any) -> None:
    raise HangError


def judge(load: Callable[[], bool]) -> tuple[str, str]:
    """``loaded``, ``refused`` or ``failed``, and the reason."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with watch_effects() as seen:
            load()
        verdict, reason = "loaded", ""
    except UserError as error:
        verdict, reason = "refused", _describe_wrong_lines(error)
    except HangError:
        verdict, reason = "failed", f"more than {SECONDS} s"
    except Exception:
        verdict, reason = "failed", traceback.format_exc(limit=-3)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if seen:
        reason = f"touched {seen[:3]}"
    return ("failed" if reason else verdict), reason


def _describe_wrong_lines(error: UserError) -> str:
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
        load = make(folder, random.Random(f"{seed}/{target}/{number}"))
        began = time.process_time()
        verdict, reason = judge(load)
        tally.slowest = max(tally.slowest, time.process_time() - began)
        if verdict == "failed":
            tally.failed.append(f"{target} {number}: {reason}")
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                for path in folder.glob("[mv]*.*"):
                    (keep / f"{target}-{number}-{path.name}").write_bytes(path.read_bytes())
        elif verdict == "loaded":
            tally.loaded += 1
        else:
            tally.refused += 1
    return tally


def fuzz_shell(numbers: range, seed: int, folder: Path) -> Tally:
    """YAMLs through ``run_edit.py --check`` in a process of its own: exit code 0 or 2, no traceback."""
    tally = Tally()
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        mutate_yaml(folder, random.Random(f"{seed}/shell/{number}"))
        command = [sys.executable, str(ROOT / "run_edit.py"), "--hparams_dir", "mutant.yaml", "--check"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        lines = done.stderr.splitlines()
        stray = {p.name for p in folder.iterdir()} - {"mutant.yaml"}
        if done.returncode not in (0, 2) or "Traceback" in done.stderr or stray:
            tally.failed.append(f"shell {number}: {done.returncode} {lines[-1:]} {sorted(stray)}")
        elif done.returncode == 2:
            tally.refused += 1
        else:
            tally.loaded += 1
    return tally


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--targets", nargs="+", choices=[*TARGETS], default=[*TARGETS])
    add("--mutants", type=int, default=20_000, help="for all targets together")
    add("--shell", type=int, default=0, help="YAMLs that also go through run_edit.py")
    add("--seed", type=int, default=0)
    add("--keep", type=Path, metavar="DIR", help="where failed mutants are stored")
    args = parser.parse_args(argv)
    targets = {name: TARGETS[name] for name in args.targets}
    sys.addaudithook(_audit)
    signal.signal(signal.SIGPROF, _raise_hang)
    each, tallies = -(-args.mutants // len(targets)), {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, make in targets.items():
            tallies[name] = fuzz(name, make, range(each), args.seed, Path(scratch, name), args.keep)
        if args.shell:
            tallies["shell"] = fuzz_shell(range(args.shell), args.seed, Path(scratch, "shell"))
    print(
        "| target | mutants | loaded | refused | failed | slowest, s |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, t in tallies.items():
        total = t.loaded + t.refused + len(t.failed)
        print(f"| {name} | {total} | {t.loaded} | {t.refused} | {len(t.failed)} | {t.slowest:.2f} |")
    failed = [line for tally in tallies.values() for line in tally.failed]
    print(*failed[:20], sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
