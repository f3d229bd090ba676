"""Figures that others have published for the same tables, under the names of our metrics."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

from unike.types import FIVE_METRICS

FAMILIES = {"blip2": "blip2-opt", "minigpt4": "minigpt4"}
FAMILY_TITLES = {
    "blip2": "BLIP2-OPT",
    "minigpt4": "MiniGPT-4",
    "llava": "LLaVA-1.5",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "instructblip": "InstructBLIP",
    "smol": "smol (SmolLM2-135M)",
}
LIFELONG = "lifelong"
AVERAGES = "table5_averages"
ZETA = "figure4c_zeta_generality_locality"
Figures = dict[str, dict[str, float]]
_FILES = {LIFELONG: "lifelong.json"}


def list_tables() -> tuple[str, ...]:
    """The names of the published tables."""
    return (*(key for key in _load("tables.json") if key not in ("source", "metrics")), LIFELONG)


def read_source(key: str) -> str:
    """Whose figures they are, in full."""
    return str(_load(_FILES.get(key, "tables.json"))["source"])


def choose_label(key: str) -> str:
    """Whose figures they are, as a column's title."""
    return "Chen et al." if key == LIFELONG else "paper"


def read_figures(key: str, family: str, task: str, length: int = 1) -> Figures:
    """By row, then by metric, in percent: what table ``key`` has for a model family (``model_name``), a
    task and a number of edits. Empty where it has nothing.

    The means behind Figure 4c are those of ``generality`` and ``locality``. The paper does not say where
    they were taken; the full method's are those of Table 1 for MiniGPT-4 on E-VQA.
    """
    model = FAMILIES.get(family)
    if key == AVERAGES:
        return {}
    if key == ZETA:
        means = _load("tables.json")[key] if (family, task) == ("minigpt4", "vqa") else {}
        return {row: dict(zip(("generality", "locality"), pair, strict=True)) for row, pair in means.items()}
    if key == LIFELONG:
        return read_lifelong(family).get(length, {}) if task == "vqa" else {}
    table = _load("tables.json")[key].get(model, {})
    if key.startswith("table2"):
        return _rename_metrics(table.get(f"{task}_{length}", {}))
    if key.startswith("table3"):
        return _rename_metrics(table) if key.endswith(f"_{length}") else {}
    return _rename_metrics({row: by_task[task] for row, by_task in table.items() if task in by_task})


def read_averages() -> dict[str, Figures]:
    """The paper's Table 5: ``reliability``, ``generality`` and ``locality`` by row, for ``one_step`` and
    ``sequential``, means over all tasks, backbones and numbers of edits."""
    found: dict[str, Figures] = _load("tables.json")[AVERAGES]
    return found


def read_lifelong(family: str) -> dict[int, Figures]:
    """By the number of sequential edits, all rows of the lifelong table, as published."""
    table = _load(_FILES[LIFELONG]).get(FAMILIES.get(family, ""), {})
    return {int(length): _rename_metrics(rows) for length, rows in table.items()}


def _rename_metrics(rows: Figures) -> Figures:
    short = dict(zip(_load("tables.json")["metrics"], FIVE_METRICS, strict=True))
    return {row: {short.get(m, m): value for m, value in values.items()} for row, values in rows.items()}


@lru_cache
def _load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files("unike.report.paper").joinpath(name).read_text(encoding="utf-8"))
    return found
