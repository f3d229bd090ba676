"""The trained measure of scope: learnt once per backbone from the train records, kept as files.

``<scope_dir>/<key>/`` holds ``scope.safetensors`` and ``scope.json``. What it learns from are the
records' own probes and three queries made of them, so that any data in MMEdit's layout will do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from unike.backbones.base import Backbone
from unike.backbones.hooks import capture
from unike.backbones.prefix import PrefixCache, open_prefixes
from unike.config.hparams import OPTIONS, HyperParams
from unike.knowledge.scope import HELD_OUT, ScopeEncoder, ScopeMeasure, ScopeReport, ScopeSamples, fit_scope
from unike.methods.meta_training import Tick, copy_tensors, ignore_progress
from unike.system import processes
from unike.system.files import check_tensors, read_index, write_index
from unike.types import Case, Query, UserError

SCOPE_READING, SCOPE_TRAINING = "reading prompts for the scope", "training the scope"
INSIDE = ("edit", "rephrased", "re-drawn", "rephrased and re-drawn")
OUTSIDE = ("text only", "unrelated", "same question elsewhere", "other question here")


def scope_queries(case: Case) -> list[Query]:
    """A record asked in the ways of ``INSIDE``, then of ``OUTSIDE``. UserError where a probe is missing."""
    asked = {probe.name: probe.query for probe in case.probes}
    names = ("t_generality", "m_generality", "t_locality", "m_locality")
    if lost := [name for name in names if name not in asked]:
        raise UserError(f"record {case.request.id}: {', '.join(lost)}: missing; the scope is learnt from it")
    edit = case.request.query
    rephrased, redrawn, text, unrelated = (asked[name] for name in names)
    joint = replace(rephrased, image=redrawn.image)
    elsewhere, here = replace(edit, image=unrelated.image), replace(unrelated, image=edit.image)
    return [edit, rephrased, redrawn, joint, text, unrelated, elsewhere, here]


@torch.no_grad()
def scope_samples(
    backbone: Backbone,
    cases: Sequence[Case],
    first: int,
    batch: int = 32,
    tick: Tick = ignore_progress,
    prefixes: PrefixCache | None = None,
) -> ScopeSamples:
    """What enters layer ``first``'s attention from each prompt, its answer left out, in half precision;
    and which edits the base model answers wrong."""
    prefixes = prefixes or PrefixCache(backbone, first, max_bytes=0)
    door = {"x": backbone.layout.attention(first).module}
    rows: list[torch.Tensor] = []
    wrong: list[bool] = []
    some = max(1, batch // (len(INSIDE) + len(OUTSIDE)))
    for start in range(0, len(cases), some):
        part = cases[start : start + some]
        state = prefixes.state([query for case in part for query in scope_queries(case)])
        with capture(door) as seen:
            said = backbone.suffix(state)[:, :-1].argmax(-1)
        ends = state.question_end.tolist()
        missed = ((said != state.labels[:, 1:]) & state.answer_mask).any(1)
        wrong += missed[:: len(INSIDE + OUTSIDE)].tolist()
        rows += [x[: end + 1].half().cpu() for x, end in zip(seen["x"], ends, strict=True)]
        tick(SCOPE_READING, len(part))
    states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(states.shape[1]) < lengths[:, None]
    shape = (len(cases), -1, states.shape[1])
    states, mask = states.view(*shape, states.shape[-1]), mask.view(shape)
    return ScopeSamples(states, mask, len(INSIDE), torch.tensor(wrong))


def fresh_encoder(backbone: Backbone, hparams: HyperParams) -> ScopeEncoder:
    """An untrained encoder, drawn from the run's seed."""
    width = backbone.layout.width
    with torch.random.fork_rng():
        torch.manual_seed(hparams.seed)
        return ScopeEncoder(
            width, hparams.scope_hidden or 2 * width, hparams.scope_dim, hparams.scope_heads
        ).to(backbone.device)


def scope_facts(hparams: HyperParams, backbone: Backbone | None = None, first: int = 0) -> dict[str, Any]:
    """What a trained measure belongs to: options, and the weights and the layer where they are known."""
    facts: dict[str, Any] = {
        "options": {n: getattr(hparams, n) for n, o in OPTIONS.items() if o.group == "scope training"}
        | {"seed": hparams.seed}
    }
    if backbone is not None:
        facts |= {"backbone": backbone.fingerprint, "layer": first}
    return facts


def kept_scope(hparams: HyperParams, facts: dict[str, Any] | None = None) -> Path | None:
    """The folder of the YAML's measure, where it has been trained. UserError without ``scope_dir``."""
    if hparams.scope_dir is None:
        raise UserError(f"{hparams.source}: scope_dir: missing; expected a folder for the trained scope")
    wanted = scope_facts(hparams) if facts is None else facts
    for index in sorted(Path(hparams.scope_dir).glob("*/scope.json")):
        if all(read_index(index).get(k) == v for k, v in wanted.items()):
            return index.parent
    return None


def ensure_scope(
    backbone: Backbone,
    hparams: HyperParams,
    first: int,
    cases: Callable[[], Sequence[Case]],
    tick: Tick = ignore_progress,
) -> ScopeMeasure:
    """The trained measure for prompts at the door of layer ``first``: read, or learnt and kept.

    The first ``scope_records`` of ``cases`` teach it; every tenth of these is held out and sets the
    thresholds. UserError where there are too few.
    """
    facts = scope_facts(hparams, backbone, first)

    def found() -> Path:
        if (kept := kept_scope(hparams, facts)) is not None:
            return kept
        given = cases()[: hparams.scope_records]
        if len(given) < 2 * HELD_OUT:
            at = f"{hparams.source}: scope_measure"
            raise UserError(f"{at}: {len(given)} train records; expected {2 * HELD_OUT} or more")
        prefixes = open_prefixes(hparams, backbone, first, memory=False)
        samples = scope_samples(backbone, given, first, hparams.states_batch, tick, prefixes)
        encoder = fresh_encoder(backbone, hparams)
        report = fit_scope(
            samples, encoder, hparams.scope_steps, hparams.scope_batch, hparams.scope_lr, hparams.scope_tau,
            hparams.seed, tick=lambda: tick(SCOPE_TRAINING, 1),
        )  # fmt: skip
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        folder = Path(str(hparams.scope_dir), digest)
        save_scope(folder, encoder, report, facts | {"records": len(given)})
        return folder

    folder = processes.first(found)
    return load_scope(folder, fresh_encoder(backbone, hparams))


def save_scope(folder: Path, encoder: ScopeEncoder, report: ScopeReport, facts: dict[str, Any]) -> None:
    """Writes the measure in half precision, its index last."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half() for k, v in copy_tensors(encoder.state_dict()).items()}
    path = folder / "scope.safetensors"
    save_file(tensors, path)
    names = INSIDE + OUTSIDE
    held = {
        size: dict(zip(names, (round(s, 4) for s in shares), strict=True))
        for size, shares in report.shares.items()
    }
    learnt = {"thresholds": report.thresholds, "held_out": held, "loss": report.losses[-1:]}
    write_index(folder / "scope.json", {**facts, **learnt}, path)


def load_scope(folder: Path, encoder: ScopeEncoder) -> ScopeMeasure:
    """Reads a measure into ``encoder``. UserError where the file is not what it should be."""
    path = folder / "scope.safetensors"
    check_tensors(folder / "scope.json", path)
    try:
        encoder.load_state_dict(load_file(path))
        kept = read_index(folder / "scope.json")["thresholds"]
        thresholds = {int(size): float(threshold) for size, threshold in kept.items()}
    except Exception as error:
        raise UserError(f"{path}: expected a scope as scripts/prepare.py writes it: {error}") from error
    return ScopeMeasure(encoder.eval().requires_grad_(False), thresholds)
