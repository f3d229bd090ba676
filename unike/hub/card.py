"""The model card of a repository: data, seeds, options and scores, where they are known."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from unike.evaluation.titles import TITLES
from unike.hub.parts import TrainedPart
from unike.runs.records import MANIFEST, SUMMARY, read_manifest
from unike.system.text import one_line
from unike.types import UserError

NOT_STATED = "not stated"
LICENCE = "derived from the named model and from the train data: their licences hold for it"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Run:
    """What a run recorded of itself: its manifest and its summary."""

    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def hparams(self) -> Mapping[str, Any]:
        found = self.manifest.get("hparams")
        return found if isinstance(found, dict) else {}


def read_run(folder: Path, parts: Sequence[TrainedPart]) -> Run:
    """A finished run. UserError where it has no summary, and where it had other options than the parts."""
    manifest = read_manifest(folder)
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{one_line(path)}: cannot be read: expected the summary of a finished run"
        ) from error
    if not isinstance(summary, dict) or not isinstance(summary.get("metrics"), dict):
        raise UserError(f"{one_line(path)}: is no summary of a run")
    run = Run(manifest, summary)
    for part in parts:
        weights = (manifest.get("weights") or {}).get("backbone", part.index["backbone"])
        if weights != part.index["backbone"]:
            raise UserError(
                f"{one_line(folder / MANIFEST)}: the run edited the weights {one_line(weights, 40)}, and "
                f"{part.place} is for {part.index['backbone']}"
            )
        options = part.index["options"]
        other = [n for n, value in options.items() if n in run.hparams and run.hparams[n] != value]
        if other:
            raise UserError(
                f"{one_line(folder / MANIFEST)}: the run had other options than {part.place}: "
                f"{', '.join(other)}; name a run of these parts"
            )
    return run


def render_card(
    repository: str,
    parts: Sequence[TrainedPart],
    run: Run | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    others: Sequence[str] = (),
) -> str:
    """The README of a repository. ``others`` are places of parts that are there already."""
    model = base_model or (str(run.hparams.get("name")) if run and run.hparams.get("name") else None)
    about: dict[str, Any] = {"library_name": "unike", "license": licence or "other"}
    if licence is None:
        about["license_name"] = "derived"
    about["tags"] = [
        "knowledge-editing",
        "model-editing",
        "vision-language",
        *sorted({p.kind for p in parts}),
    ]
    if model is not None and _HUB_NAME.fullmatch(model) and not Path(model).exists():
        about["base_model"] = model
    shown = NOT_STATED if model is None else f"`{_cell(PurePath(model).name if _is_path(model) else model)}`"
    lines = [
        "---",
        yaml.safe_dump(about, sort_keys=False).strip(),
        "---",
        "",
        f"# {_cell(repository)}",
        "",
        f"Trained once for editing a vision-language model with `unike`. Model: {shown}.",
        "",
        *_list_parts(parts),
        *[
            f"Also here, from an earlier push: {', '.join(f'`{place}`' for place in others)}.\n"
            for _ in others[:1]
        ],
        *_list_loading(repository),
        *_list_data(parts, run),
        *_list_options(parts),
        *_list_training(parts),
        *_list_scores(run),
        "## Licence",
        "",
        f"{licence or LICENCE}.",
        "",
    ]
    return "\n".join(lines)


def _list_parts(parts: Sequence[TrainedPart]) -> list[str]:
    rows = [
        f"| {p.kind} | `{p.place}` | `{_cell(p.index['backbone'])}` | {', '.join(map(str, p.layers))} | "
        f"{_cell(p.index['options'].get('seed', NOT_STATED))} | {p.size / 1e6:.1f} |"
        for p in parts
    ]
    head = "| part | place | fingerprint of the model's weights | layers | seed | MB |"
    return [head, "| --- | --- | --- | --- | --- | --- |", *rows, ""]


def _list_loading(repository: str) -> list[str]:
    return ["```", f"unike pull {repository}", "```", "", "It prints the options that name the folders.", ""]


def _list_data(parts: Sequence[TrainedPart], run: Run | None) -> list[str]:
    lines = ["## Data", ""]
    for part in parts:
        options = part.index["options"]
        known = {
            "knowledge": f"up to {options.get('triplets', NOT_STATED)} triplets of train questions",
            "scope": f"{part.index.get('records', NOT_STATED)} train records",
            "editor": f"train records: {NOT_STATED}",
        }
        lines.append(f"- `{part.place}`: {_cell(known[part.kind])}")
    files = run.manifest.get("data") if run is not None else None
    if isinstance(files, dict) and files:
        lines += [
            f"- `{_cell(key)}` of the run below: sha256 `{_cell(value)}`" for key, value in files.items()
        ]
    else:
        lines.append(f"- annotation files: {NOT_STATED}")
    if any(path.name.endswith(".jsonl") for part in parts for path in part.files):
        lines.append("- `items.jsonl` holds texts of the train annotations.")
    return [*lines, ""]


def _list_options(parts: Sequence[TrainedPart]) -> list[str]:
    lines = ["## Options", ""]
    for part in parts:
        options = ", ".join(f"{name}: {value}" for name, value in part.index["options"].items())
        lines.append(f"- `{part.place}`: {_cell(options, 2000)}")
    return [*lines, ""]


def _list_training(parts: Sequence[TrainedPart]) -> list[str]:
    lines = ["## Training, on held-out records", ""]
    for part in parts:
        if part.kind == "knowledge":
            fits = {f"layer {layer}": values for layer, values in part.index["fit"].items()}
            text = "; ".join(f"{layer}: {_show_numbers(values)}" for layer, values in fits.items())
        elif part.kind == "editor":
            training = part.index["training"]
            text = _show_numbers({name: training.get(name) for name in ("best", "best_step", "step")})
        else:
            text = f"thresholds by number of edits: {_show_numbers(part.index['thresholds'])}"
            held = part.index.get("held_out")
            if isinstance(held, dict):
                more = [f"{size} edits: {_show_numbers(shares)}" for size, shares in held.items()]
                text += f"; shares right, {'; '.join(more)}"
        lines.append(f"- `{part.place}`: {_cell(text, 4000)}")
    return [*lines, ""]


def _list_scores(run: Run | None) -> list[str]:
    lines = ["## Scores", ""]
    if run is None:
        return [*lines, f"{NOT_STATED}.", ""]
    hparams, summary = run.hparams, run.summary
    about = {
        "method": hparams.get("method"),
        "task": hparams.get("task"),
        "seed": run.manifest.get("seed"),
        "records": summary.get("n"),
        "failed": summary.get("failed"),
    }
    lines += [
        f"Of one run: {_cell(', '.join(f'{k} {v}' for k, v in about.items() if v is not None), 400)}.",
        "",
    ]
    lines += ["In percent after the edit, with 95% intervals.", ""]
    modes = sorted({mode for values in summary["metrics"].values() for mode in values})
    lines += [f"| metric | {' | '.join(modes)} |", f"| --- |{' --- |' * len(modes)}"]
    for metric, values in summary["metrics"].items():
        cells = [_show_estimate(values.get(mode)) for mode in modes]
        lines.append(f"| {_cell(TITLES.get(metric, metric))} | {' | '.join(cells)} |")
    return [*lines, ""]


def _show_estimate(values: Any) -> str:
    after = values.get("after") if isinstance(values, dict) else None
    if not isinstance(after, dict) or not isinstance(after.get("mean"), (int, float)):
        return NOT_STATED
    low, high = after.get("low"), after.get("high")
    interval = (
        f" [{low:.1f}, {high:.1f}]"
        if isinstance(low, (int, float)) and isinstance(high, (int, float))
        else ""
    )
    return f"{after['mean']:.1f}{interval}, n {after.get('n', NOT_STATED)}"


def _show_numbers(values: Any) -> str:
    if not isinstance(values, dict):
        return NOT_STATED
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items() if v is not None}
    return ", ".join(f"{name} {value}" for name, value in shown.items()) or NOT_STATED


def _is_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or Path(model).exists() or not _HUB_NAME.fullmatch(model)


def _cell(value: object, limit: int = 300) -> str:
    return one_line(value, limit).replace("|", "\\|").replace("`", "'")
