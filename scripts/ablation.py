"""Runs rows of switches over the same records and prints them as one table.

    python -m scripts.ablation --hparams_dir hparams/tiny_blip2.yaml --task vqa --size 200

Rows are read from ``hparams/ablation.yaml``. Each row's records lie in a folder of their own under
``--output``; what is there already is not run again. ``--markdown FILE`` writes the table to a file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from unike import runs, tables
from unike.backbones import load_backbone
from unike.hparams import HyperParams
from unike.reading import Reader
from unike.types import FIVE_METRICS, HARD_METRICS, UserError

PAPER_NAMES = dict(zip(FIVE_METRICS, ("rel", "t_gen", "m_gen", "t_loc", "m_loc"), strict=True))


def read_rows(path: Path, only: Sequence[str] | None) -> list[tuple[str, dict[str, Any]]]:
    try:
        rows = [(str(r["name"]), dict(r["set"])) for r in yaml.safe_load(path.read_text(encoding="utf-8"))]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"{path}: expected a list of rows with `name` and `set`: {error}") from error
    unknown = set(only or ()) - {n for n, _ in rows}
    if unknown:
        raise UserError(f"--rows: {sorted(unknown)} not in {path}; known: {[n for n, _ in rows]}")
    return [(n, s) for n, s in rows if only is None or n in only]


def run_rows(args: argparse.Namespace, base: HyperParams) -> list[tuple[str, dict[str, Any]]]:
    """The summary of each row; rows with the same first layer share what is known of the base model."""
    rows = [
        (n, HyperParams.from_dict({**base.to_dict(), **s}, source=f"{args.rows_file}: {n}"))
        for n, s in read_rows(args.rows_file, args.rows)
    ]
    cases = runs.preflight(base, args.task, args.size)
    backbone = load_backbone(base)
    readers: dict[int, Reader] = {}
    out = []
    for name, hparams in rows:
        parts = runs.assemble(hparams, backbone)
        folder = (
            args.output
            / f"{Path(base.source).stem}-{args.task}"
            / re.sub(r"\W+", "-", name).strip("-").lower()
        )
        reader = readers.setdefault(parts.prefixes.first, parts.reader(generated=True))
        print(name, file=sys.stderr)
        with runs.open_run(parts, args.task, folder, resume=folder.exists()) as writer:
            out.append((name, runs.run_cases(parts, cases, writer, reader=reader)))
    return out


def paper_row(name: str, task: str) -> Mapping[str, float] | None:
    """The paper's Table 4 figures (MiniGPT-4) for a row of ours, if it has one."""
    published = json.loads(files("unike").joinpath("paper/tables.json").read_text())
    return published["table4_ablation"]["minigpt4"].get(name, {}).get(task)


def _cell(summary: Mapping[str, Any], metric: str, mode: str, when: str = "after") -> str:
    entry = summary["metrics"].get(metric, {}).get(mode)
    if entry is None:
        return ""
    return _interval(entry[when], 1)


def _interval(value: Mapping[str, float], digits: int) -> str:
    mean, low, high = (f"{value[k]:.{digits}f}" for k in ("mean", "low", "high"))
    return mean if low == high else f"{mean} [{low}, {high}]"


def markdown(rows: list[tuple[str, dict[str, Any]]], task: str) -> str:
    """Both readings of each row with 95% intervals, the paper's figures beside the rows that it has."""
    metrics = [*FIVE_METRICS, *HARD_METRICS]
    titles = [tables.SHORT_TITLES[m] for m in metrics]
    lines = []
    for mode in ("teacher_forced", "generated"):
        lines += ["", f"{mode.replace('_', '-')}:", ""]
        lines += [
            "| row | " + " | ".join([*titles, "steps", "s/edit"]) + " |",
            "|" + " --- |" * (len(titles) + 3),
        ]
        first = rows[0][1]
        lines.append("| base | " + " | ".join(_cell(first, m, mode, "before") for m in metrics) + " | | |")
        for name, summary in rows:
            costs = summary["costs"]
            cost = [_interval(costs["steps"], 1), _interval(costs["seconds"], 3)]
            lines.append(
                f"| {name} | " + " | ".join([*(_cell(summary, m, mode) for m in metrics), *cost]) + " |"
            )
            published = paper_row(name, task) if mode == "teacher_forced" else None
            if published is not None:
                figures = [f"{published[PAPER_NAMES[m]]:.1f}" for m in FIVE_METRICS]
                lines.append(
                    "| *paper, MiniGPT-4* | " + " | ".join(figures) + " |" + " |" * (len(HARD_METRICS) + 2)
                )
    lines += [
        "",
        "What alpha was, mean over layers and records (with a fixed alpha and no `tau` it is that):",
        "",
    ]
    lines += ["| row | " + " | ".join(titles) + " |", "|" + " --- |" * (len(titles) + 1)]
    for name, summary in rows:
        alpha = summary["decisions"].get("alpha")
        if alpha:
            lines.append(
                f"| {name} | " + " | ".join(f"{alpha[m]:.2f}" if m in alpha else "" for m in metrics) + " |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hparams_dir", required=True, metavar="FILE")
    parser.add_argument("--task", choices=runs.TASKS, default="vqa")
    parser.add_argument("--size", type=int, metavar="N")
    parser.add_argument("--rows_file", type=Path, default=Path("hparams/ablation.yaml"))
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows")
    parser.add_argument("--output", type=Path, default=Path("results/ablation"))
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    try:
        base = HyperParams.from_hparams(args.hparams_dir, args.overrides)
        if base.generate_data:
            from scripts.tiny import make_data

            make_data.ensure(base)
        rows = run_rows(args, base)
    except UserError as error:
        print(*(f"error: {p}" for p in error.problems), sep="\n", file=sys.stderr)
        return 2
    for mode in ("teacher_forced", "generated"):
        print(tables.as_text(tables.compare_table(rows, mode, f"{args.task}, {mode}"), width=110))
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(markdown(rows, args.task), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
