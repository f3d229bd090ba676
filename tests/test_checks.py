"""``--check`` and a run agree: both refuse a command line, with the same problems, or both go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import Project, record
from test_run_edit import BAD as BAD_INPUT
from test_run_edit import no_picture, no_weights, start, unknown_method

from unike.runs import checks, packages
from unike.runs.records import MANIFEST, RecordWriter
from unike.system.files import write_index

Change = Callable[[Project, pytest.MonkeyPatch], object]


class LoadingError(Exception):
    """The run would load a backbone now, or start processes that do."""


@dataclass(frozen=True)
class Command:
    """Arguments, after a change of the project. Each of ``problems`` is part of a line; a good command has
    none. ``{root}`` stands for the project's folder."""

    name: str
    arguments: str = ""
    change: Change = lambda project, monkeypatch: None
    problems: tuple[str, ...] = ()


# ---------------------------------------------------------------- changes


def set_options(**options: Any) -> Change:
    return lambda project, _: project.write_yaml(**options)


def remove(name: str) -> Change:
    return lambda project, _: (project.root / name).unlink()


def write(name: str, text: str = "something else") -> Change:
    def change(project: Project, _: pytest.MonkeyPatch) -> None:
        path = project.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return change


def ship_knowledge(**options: Any) -> Change:
    """``knowledge_dir`` is a folder of knowledge itself, made with these options."""

    def change(project: Project, _: pytest.MonkeyPatch) -> None:
        folder = project.root / "knowledge"
        folder.mkdir(exist_ok=True)
        (folder / "knowledge.safetensors").write_bytes(b"states")
        index = {"layers": [1], "options": options}
        write_index(folder / "knowledge.json", index, folder / "knowledge.safetensors")

    return change


def record_run(folder: str = "run", **changes: Any) -> Change:
    """A folder in which a run was recorded."""

    def change(project: Project, _: pytest.MonkeyPatch) -> None:
        from unike.config.hparams import HyperParams
        from unike.runs.folders import describe_run

        hparams = HyperParams.from_hparams(project.yaml, [f"{k}={v}" for k, v in changes.items()])
        with RecordWriter(project.root / folder, False, describe_run(hparams, "vqa", True)) as writer:
            writer.write({"id": "vqa-0", "task": "vqa", "status": "failed", "error": "it failed"})

    return change


def hide(*modules: str) -> Change:
    """These packages are not installed."""

    def change(_: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        from importlib import util

        find = util.find_spec

        def find_other(name: str, package: str | None = None) -> Any:
            return None if name in modules else find(name, package)

        monkeypatch.setattr(util, "find_spec", find_other)
        for module in ("backbones.placement", "runs.drawing", "methods.catalogue"):
            monkeypatch.setattr(f"unike.{module}.find_spec", find_other)

    return change


def in_order(*changes: Change) -> Change:
    def change(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        for one in changes:
            one(project, monkeypatch)

    return change


def draw_into(folder: str, **options: Any) -> Change:
    """The bundled benchmark is drawn into a folder, where nothing is yet."""

    def change(project: Project, _: pytest.MonkeyPatch) -> None:
        own = {
            t: {s: str(project.root / folder / f"{t}_{s}.json") for s in ("train", "eval")}
            for t in ("vqa", "caption")
        }
        image_root = str(project.root / folder)
        project.write_yaml(**{"generate_data": True, "image_root": image_root, "data": own, **options})

    return change


def make_old(package: str) -> Change:
    def change(_: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        find = packages.metadata.version
        monkeypatch.setattr(packages.metadata, "version", lambda n: "0.1" if n == package else find(n))

    return change


def lose_train_image(project: Project, _: pytest.MonkeyPatch) -> None:
    record_without_image = record(0) | {"image": "gone.png"}
    project.write_records([record_without_image], "vqa", "train")


# ---------------------------------------------------------------- the table

ONE_TRAIN_FILE = {"vqa": {"train": "{root}/data/vqa_train.json", "eval": "{root}/data/vqa_eval.json"}}
SCOPED = "scope_gate=nearest scope_measure=trained"
SEQUENCE = "--protocol sequential --sequences 1"
GOOD = [
    Command("a plain run"),
    Command("captions", "--task caption"),
    Command("both tasks", "--task cross"),
    Command("some records", "--size 2 --seed 3 --no_generated --report"),
    Command("a broken record left out", "--skip_broken", lambda p, _: no_picture(p)),
    Command(
        "train records without images left out",
        "--skip_broken method=mend editor_dir={root}/editors",
        lose_train_image,
    ),
    Command("a sequence", f"{SEQUENCE} --sequence_length 3"),
    Command("sequences of both tasks", "--protocol cross_task --sequence_length 4 --sequences 2"),
    Command("a new output", "--output {root}/new/run"),
    Command("resume of the last run", "--resume", record_run("results/small-vqa")),
    Command("resume of a run", "--output {root}/run --resume", record_run()),
    Command("edits kept", "--save_edits {root}/edits"),
    Command("edits of one sequence kept", f"{SEQUENCE} --sequence_length 2 --save_edits {{root}}/edits"),
    Command("two processes", "--num_processes 2"),
    Command("one process", "--num_processes 1"),
    Command("cached activations", "prefix_dir={root}/cache/prefixes"),
    Command("fine-tuning", "method=ft knowledge_dir=null"),
    Command("T-Patcher", "method=tpatcher activation_loss=0.1 memory_loss=0.1"),
    Command("IKE", "method=ike ike_retriever=states knowledge_dir=null"),
    Command(
        "IKE without demonstrations and train files",
        "method=ike ike_demonstrations=0",
        remove("data/vqa_train.json"),
    ),
    Command("KE", "method=ke editor_dir={root}/editors"),
    Command("MEND", "method=mend editor_dir={root}/editors"),
    Command("SERAC", "method=serac editor_dir={root}/editors"),
    Command("a scope gate", f"{SCOPED} scope_dir={{root}}/scope"),
    Command(
        "shipped knowledge without train files",
        "",
        in_order(ship_knowledge(seed=42), remove("data/vqa_train.json")),
    ),
    Command("shipped knowledge of other options, with train files", "", ship_knowledge(seed=1)),
    Command("the bundled benchmark, to be drawn", "", draw_into("drawn")),
    Command("the bundled benchmark, drawn before", "generate_data=true"),
    Command(
        "the bundled benchmark for IKE",
        "method=ike ike_retriever=states",
        in_order(draw_into("drawn"), ship_knowledge(seed=42)),
    ),
    Command(
        "more than the memory takes",
        "",
        lambda _, m: m.setattr("unike.backbones.checking._measure_free_memory", lambda: 1000),
    ),
]
BAD = [
    *(Command(f.__name__, "--task vqa", lambda p, _, f=f: f(p), (few[0],)) for f, few in BAD_INPUT),
    Command(
        "everything at once",
        "--task cross --size 0 method=unik --num_processes 0",
        in_order(lambda p, _: no_weights(p), *(remove(f"data/{t}_eval.json") for t in ("vqa", "caption"))),
        (
            "method: 'unik' is unknown",
            "holds no weights",
            "data.vqa.eval",
            "data.caption.eval",
            "num_processes: 0",
        ),
    ),
    Command(
        "no such device",
        "device=cuda:7",
        lambda _, m: m.setattr("unike.backbones.placement._count_devices", lambda kind: 0),
        ("device: cuda:7; found 0 CUDA devices",),
    ),
    Command(
        "no CUDA for quantization",
        "quantization=int8",
        in_order(hide("bitsandbytes"), lambda _, m: m.setattr("torch.cuda.is_available", lambda: False)),
        ("quantization: int8: needs a CUDA device", "bitsandbytes is not installed"),
    ),
    Command("a device map beside a device", "device_map=auto", problems=("expected device: auto, got cpu",)),
    Command(
        "a device map for two processes",
        "device=auto device_map=auto --num_processes 2",
        problems=("device_map: auto: takes all devices; expected one process",),
    ),
    Command(
        "a cache that is a file",
        "prefix_dir={root}/small.yaml/below",
        problems=("small.yaml is a file; expected a folder",),
    ),
    Command(
        "FAISS that is not installed", "retrieval=faiss", hide("faiss"), ("needs the package faiss-cpu",)
    ),
    Command(
        "trackers that are not installed",
        "log_to=[tensorboard,wandb]",
        hide("tensorboard", "wandb"),
        ("log_to: tensorboard is not installed", "log_to: wandb is not installed"),
    ),
    Command("an old package", "", make_old("safetensors"), ("safetensors 0.1: expected >=",)),
    Command("no records", "--size 0", problems=("size: expected a whole number above 0",)),
    Command("no processes", "--num_processes 0", problems=("num_processes: 0; expected 1 or more",)),
    Command(
        "a device for two",
        "--num_processes 2 device=cuda:0",
        lambda _, m: m.setattr("unike.backbones.placement._count_devices", lambda kind: 1),
        ("one device for 2 processes",),
    ),
    Command(
        "more processes than devices",
        "--num_processes 3 device=auto",
        in_order(
            lambda _, m: m.setattr("torch.accelerator.is_available", lambda: True),
            lambda _, m: m.setattr("torch.accelerator.device_count", lambda: 1),
        ),
        ("num_processes: 3; found 1 devices",),
    ),
    Command(
        "an output with files", "--output {root}/data", problems=("is not empty; continue with --resume",)
    ),
    Command("an output below a file", "--output {root}/small.yaml/run", problems=("cannot be written",)),
    Command(
        "resume of nothing",
        "--output {root}/new --resume",
        problems=("new: no such folder; expected a run to resume",),
    ),
    Command("resume of something else", "--output {root}/data --resume", problems=(f"no {MANIFEST}",)),
    Command(
        "resume of another run",
        "--output {root}/run --resume k=2",
        record_run(),
        ("k: 3 in the run to resume, 2 now",),
    ),
    Command(
        "resume of another evaluation",
        "--output {root}/run --resume --no_generated",
        record_run(),
        ("generated: True in the run to resume, False now",),
    ),
    Command(
        "edits beside something else", "--save_edits {root}/data", problems=("expected a store of edits",)
    ),
    Command(
        "edits of several sequences",
        "--save_edits {root}/edits --protocol sequential --sequence_length 2",
        problems=("expected sequences: 1",),
    ),
    Command(
        "too long sequences",
        f"{SEQUENCE} --sequence_length 100000",
        problems=("small.yaml: sequence_length: 100000; the data hold 4 records",),
    ),
    Command(
        "sequences longer than the size",
        f"{SEQUENCE} --sequence_length 3 --size 2",
        problems=("sequence_length: 3; the data hold 2 records",),
    ),
    Command(
        "odd sequences of both tasks",
        "--protocol cross_task --sequence_length 3",
        problems=("sequence_length: 3; expected an even number",),
    ),
    Command(
        "sequences of both tasks from one",
        "--protocol cross_task --sequence_length 2 --task vqa",
        problems=("needs 1 caption records, the data hold 0",),
    ),
    Command(
        "odd sequences, nothing drawn yet",
        "--protocol cross_task --sequence_length 3",
        draw_into("drawn"),
        ("sequence_length: 3; expected an even number",),
    ),
    Command(
        "sequences longer than the size, nothing drawn yet",
        f"{SEQUENCE} --sequence_length 9 --size 2",
        draw_into("drawn"),
        ("sequence_length: 9; the data hold at most 2 records",),
    ),
    Command(
        "an own method that is not there",
        "",
        lambda _, m: m.setenv("UNIKE_METHODS", "no_such.method"),
        ("UNIKE_METHODS: no_such.method cannot be imported",),
    ),
    Command(
        "a method that its options forbid", "method=tpatcher", problems=("activation_loss, memory_loss",)
    ),
    Command(
        "a gate without a threshold",
        "scope_gate=nearest scope_measure=cosine scope_threshold=null",
        problems=("scope_threshold: null; expected a number",),
    ),
    Command(
        "IKE without train files",
        "method=ike ike_retriever=states",
        remove("data/vqa_train.json"),
        ("data.vqa.train",),
    ),
    Command(
        "IKE of no demonstrations' records",
        "method=ike ike_retriever=states triplets=0",
        problems=("triplets: 0",),
    ),
    Command(
        "MEND without train files",
        "method=mend editor_dir={root}/editors",
        remove("data/caption_train.json"),
        ("data.caption.train",),
    ),
    Command(
        "MEND without a train image",
        "method=mend editor_dir={root}/editors",
        lose_train_image,
        ("vqa_train.json: 1 missing image: ", "gone.png"),
    ),
    Command("MEND without a folder", "method=mend", problems=("editor_dir: missing",)),
    Command("a scope gate without a folder", SCOPED, problems=("scope_dir: missing",)),
    Command(
        "a scope gate without train files",
        f"{SCOPED} scope_dir={{root}}/scope",
        remove("data/vqa_train.json"),
        ("data.vqa.train",),
    ),
    Command(
        "a damaged scope classifier",
        f"{SCOPED} scope_dir={{root}}/scope",
        write("scope/x/scope.json"),
        ("scope.json: is damaged",),
    ),
    Command(
        "a damaged editor",
        "method=ke editor_dir={root}/editors",
        write("editors/ke/x/editor.json"),
        ("editor.json: is damaged",),
    ),
    Command("damaged knowledge", "", write("knowledge/knowledge.json"), ("knowledge.json: is damaged",)),
    Command(
        "shipped knowledge of other options, without train files",
        "",
        in_order(ship_knowledge(seed=1), remove("data/vqa_train.json")),
        ("data.vqa.train",),
    ),
    Command("nowhere to draw", "", draw_into("drawn", image_root=None), ("image_root: missing",)),
    Command(
        "nothing to draw with",
        "",
        in_order(draw_into("drawn"), hide("resvg_py")),
        ("drawing the data needs resvg-py",),
    ),
    Command(
        "nobody who draws",
        "",
        in_order(
            draw_into("drawn"),
            lambda _, m: m.setattr("unike.runs.drawing.DRAWING_SCRIPT", "scripts.no_such_script"),
        ),
        ("drawn by scripts.no_such_script, which is not installed",),
    ),
    Command(
        "data that drawing does not make",
        "",
        draw_into(
            "drawn",
            data=ONE_TRAIN_FILE | {"vqa": {"train": "drawn/vqa_train.json", "eval": "elsewhere.json"}},
        ),
        ("data.vqa.eval: elsewhere.json: no such file",),
    ),
]


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises LoadingError in place of the first thing that takes a model."""

    def load(*_: Any, **__: Any) -> None:
        raise LoadingError

    for place in (
        "unike.backbones.load_backbone",
        "unike.editor.load_backbone",
        "unike.system.launching.launch",
    ):
        monkeypatch.setattr(place, load)


def list_files(root: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))}


def find_refusals(project: Project, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The problems of a run; none where it begins to load."""
    try:
        code = start(project, *arguments)
    except LoadingError:
        return []
    assert code == 2
    return [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines()]


@pytest.mark.usefixtures("loading")
@pytest.mark.parametrize("command", GOOD + BAD, ids=lambda command: command.name)
def test_a_check_and_a_run_agree(
    command: Command, copied: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied.root)
    command.change(copied, monkeypatch)
    arguments = command.arguments.format(root=copied.root).split()
    files = list_files(copied.root)
    code = start(copied, *arguments, "--check")
    shown = capsys.readouterr()
    assert list_files(copied.root) == files, "a check writes nothing"
    # What is wrong with the YAML itself is said before there is a list.
    found = [line[2:] for line in shown.out.splitlines() if line.startswith("\N{BALLOT X} ")]
    found += [line.removeprefix("error: ") for line in shown.err.splitlines() if line.startswith("error: ")]
    assert code == (2 if found else 0)
    assert find_refusals(copied, arguments, capsys) == found
    if not command.problems:
        assert found == []
        assert "ready to run" in shown.out.splitlines()
    for problem in command.problems:
        assert any(problem in line for line in found), found
    assert all("\n" not in line and line.isprintable() for line in found)


def test_the_number_of_problems_is_counted(copied: Project, capsys: pytest.CaptureFixture[str]) -> None:
    unknown_method(copied)
    assert start(copied, "--check") == 2
    assert "1 problem to fix before this run" in capsys.readouterr().out.splitlines()
    no_picture(copied)
    assert start(copied, "--check") == 2
    assert "2 problems to fix before this run" in capsys.readouterr().out.splitlines()


def test_memory_is_a_note(copied: Project, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("unike.backbones.checking._measure_free_memory", lambda: 1000)
    assert start(copied, "--check") == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "memory: " in line)
    assert line.startswith("\N{BULLET} memory: the weights take")
    assert "free some memory" in line


def test_checks_have_names_of_their_own() -> None:
    names = [check.name for check in checks.CHECKS]
    assert len(names) == len(set(names))
    assert {*checks.MODEL_CHECKS, *checks.DATA_CHECKS} < {*checks.CHECKS}
