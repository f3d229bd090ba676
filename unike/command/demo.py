"""``unike demo``: one question edited by three methods, then up to 20, in about a minute.

It reads records and images that come with the package, so that nothing is drawn or downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from unike.config.hparams import HyperParams
from unike.datasets.mmedit import VQA_TEMPLATE
from unike.system.arguments import ArgumentParser
from unike.system.places import check_name
from unike.system.shipped import EXAMPLE, find_shipped
from unike.types import UserError

if TYPE_CHECKING:
    from unike.backbones import Backbone
    from unike.evaluation.record import Record
    from unike.evaluation.summary import Summary
    from unike.runs.request import RunRequest

MOST = 20
# By folder of the run: what it is called, and its YAML. The last one is shown in full.
METHODS = {
    "ft": ("fine-tuning (FT)", "ft/tiny_blip2"),
    "paper_preset": ("UniKE, paper preset", "tiny_blip2"),
    "gate": ("UniKE + scope gate", "scoped/tiny_blip2"),
}
# Columns of the comparison: how they are called, and the metric or the mean of several.
COLUMNS = {
    "edit succeeds": "reliability",
    "rephrased": "generality",
    "unrelated kept": "locality",
    "same question kept": "same_question",
    "same image kept": "same_image",
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser("unike demo", description="Compares three methods on a toy model, in a minute.")
    add = parser.add_argument
    add("--size", type=int, default=MOST, metavar="N", help=f"questions edited, one at a time: 1 to {MOST}")
    add("--output", metavar="DIR", help="folder of the three runs; default: results/demo, numbered")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Edits with each method, prints an example and the comparison; the exit code."""
    args = parse_arguments(argv)
    if not 1 <= args.size <= MOST:
        raise UserError(f"--size: {args.size}; expected 1 to {MOST}")
    folder = _choose_folder(args.output)
    # Imported late: bad arguments should not wait for torch.
    from unike.runs import checks
    from unike.runs.request import RunRequest

    requests = {
        name: RunRequest(_read_hparams(yaml), "vqa", args.size, output=str(folder / name))
        for name, (_, yaml) in METHODS.items()
    }
    for request in requests.values():
        checks.require(request)
    from unike.backbones.loading import load_backbone

    backbone = load_backbone(next(iter(requests.values())).hparams)
    summaries, records = {}, list["Record"]()
    for name, request in requests.items():
        print(f"{METHODS[name][0]}: edits {len(request.cases)} questions", flush=True)
        summaries[name], records = _edit(request, backbone)
        if summaries[name]["interrupted"]:
            return 130
    print(f"\n{describe_example(records[0])}\n\n{format_comparison(summaries)}\n\n{format_next(folder)}")
    return 0


def _choose_folder(output: str | None) -> Path:
    if output is None:
        names = ("demo" if n == 1 else f"demo-{n}" for n in count(1))
        return next(path for name in names if not (path := Path("results", name)).exists())
    if not output.strip():
        raise UserError("--output: is empty; expected a folder")
    check_name(output)
    return Path(output)


def _read_hparams(yaml: str) -> HyperParams:
    """A shipped YAML whose data are the example's records."""
    example = Path(find_shipped(EXAMPLE))
    if not example.is_dir():
        raise UserError(f"{EXAMPLE}: not installed with this package; expected a wheel or a clone")
    data = {"vqa": {"eval": str(example / "vqa_eval.json")}}
    return HyperParams.from_hparams(yaml).replace(data=data, image_root=str(example), generate_data=False)


def _edit(request: RunRequest, backbone: Backbone) -> tuple[Summary, list[Record]]:
    """One method's run: its summary and records."""
    from unike import runs
    from unike.editor import MultimodalEditor
    from unike.runs.records import read_records

    directory = request.choose_directory()
    parts = MultimodalEditor(request.hparams, backbone).prepare()
    with runs.open_run(parts, request.task, directory, resume=False) as writer:
        summary = runs.run_cases(parts, request.cases, writer)
    return summary, read_records(directory)


# ---------------------------------------------------------------- what is printed


def describe_example(record: Record) -> str:
    """An edit in three lines: the question before and after, its rephrasing, and the same question about
    another image."""
    lines = []
    for probe, what in (
        ("reliability", "the edited question"),
        ("joint", "rephrased, image rephrased"),
        ("same_question", "the same question, another image"),
    ):
        answer = record.answers.get(probe)
        if answer is not None:
            lines.append(f"  {what:<33} {answer.before} -> {answer.after}")
    asked = record.answers["reliability"]
    start, end = VQA_TEMPLATE.split("{}")
    question = str(asked.prompt).removeprefix(start).removesuffix(end)
    head = f"The first edit, by UniKE + scope gate: {question!r}, new answer {asked.target!r}"
    return "\n".join([head, *lines])


def format_comparison(summaries: dict[str, Summary]) -> str:
    """A line per method: the shares of the generated answers that are as after a good edit, in percent."""
    width = max(len(title) for title, _ in METHODS.values())
    lines = [" " * width + "".join(f"  {column}" for column in COLUMNS)]
    for name, summary in summaries.items():
        values = (_read_mean(summary, metric) for metric in COLUMNS.values())
        cells = (f"  {value:>{len(column)}.0f}" for column, value in zip(COLUMNS, values, strict=True))
        lines.append(f"{METHODS[name][0]:<{width}}" + "".join(cells))
    return "\n".join(["Passed probes, %:", *lines])


def _read_mean(summary: Summary, metric: str) -> float:
    means = summary["means"]["generated"]
    parts = means[metric] if metric in means else summary["metrics"][metric]["generated"]
    after = parts["after"]
    assert after is not None
    return after["mean"]


def format_next(folder: Path) -> str:
    """The commands that lead on."""
    return (
        f"Next:\n  unike compare {folder / 'ft'} {folder / 'gate'} --html compared.html"
        f"\n  unike report {folder / 'gate'}\n  unike --help"
    )
