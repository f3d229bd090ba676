"""The scope classifier: trained once per backbone on the train records, saved as files.

``<scope_dir>/<key>/`` holds ``scope.safetensors`` and ``scope.json``. It is trained on the queries of
``training_cases``, as the meta-learned editors are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from unike.backbones.base import Backbone
from unike.backbones.hooks import capture
from unike.backbones.prefix import AnswerCache, PrefixCache
from unike.config.combined import ScopePreparationOptions
from unike.config.scope_sections import ScopeTrainingOptions
from unike.knowledge.overlap import NextTokens
from unike.knowledge.scope import (
    HELD_OUT,
    EarlyStop,
    ScopeEncoder,
    ScopeReport,
    TrainedScope,
    fit_scope,
)
from unike.knowledge.scope_states import GB, ScopeStates, StateRows, pool_prompt
from unike.methods.meta_training import copy_tensors
from unike.methods.preparation.batches import group_by_length, open_preparation
from unike.methods.preparation.folders import (
    Facts,
    choose_inner_width,
    choose_place,
    describe_scope,
    find_scope_classifier,
    hash_facts,
    require_own_files,
)
from unike.methods.preparation.hard_cases import harden_cases
from unike.methods.preparation.training_cases import INSIDE, OUTSIDE, make_training_cases
from unike.system import processes
from unike.system.files import check_tensors, read_index, replace_atomically, write_index
from unike.system.progress import Tick, ignore_progress
from unike.types import Case, Query, UserError

SCOPE_READING, SCOPE_TRAINING = "encoding prompts for the scope classifier", "training the scope classifier"
# Records whose queries are sorted by length at once: the more, the fuller are the batches.
PART = 32


def make_scope_cases(
    cases: Sequence[Case],
    backbone: Backbone,
    hparams: ScopeTrainingOptions,
    tick: Tick = ignore_progress,
    kept: AnswerCache | None = None,
) -> list[Case]:
    """The records as the classifier is trained on them, with as many probes each: those in scope first, the
    edit itself at their head. UserError where a record lacks a probe."""
    taught = make_training_cases(cases)
    # Whoever trains the classifier is one process already.
    if hparams.scope_probes != "hard":
        return taught
    return harden_cases(taught, backbone, hparams.seed, tick, kept=kept)


@torch.no_grad()
def collect_scope_samples(
    backbone: Backbone,
    cases: Sequence[Case],
    first: int,
    batch: int = 32,
    tick: Tick = ignore_progress,
    prefixes: PrefixCache | None = None,
    rows: StateRows | None = None,
    tokens: int | None = None,
) -> ScopeStates:
    """What enters layer ``first``'s attention at the tokens of each prompt, without its answer, in half
    precision; and which edits the base model answers wrong. ``cases`` are as ``make_scope_cases`` makes them.

    With ``tokens`` each prompt is pooled to so many states. They are added to ``rows``, empty and in memory
    unless given. UserError where those cannot hold them, once the first records show how long prompts are.
    """
    prefixes = prefixes or PrefixCache(backbone, first, max_bytes=0)
    rows = StateRows() if rows is None else rows
    wrong, few = list[bool](), list[bool]()
    count, inside = len(cases[0].probes), sum(probe.expect == "target" for probe in cases[0].probes)
    for start in range(0, len(cases), PART):
        part = cases[start : start + PART]
        queries = [probe.query for case in part for probe in case.probes]
        found = _read_prompts(backbone, prefixes, queries, first, batch, tokens)
        try:
            for read in found:
                rows.append(read.states)
            rows.require_room(len(cases) * count)
        except OverflowError as error:
            raise UserError(f"scope states: {error}; set scope_tokens, or raise scope_disk_gb") from error
        wrong += [read.is_wrong for read in found[::count]]
        few += [read.are_few for read in found[::count]]
        tick(SCOPE_READING, len(part))
    return ScopeStates(rows, count, inside, torch.tensor(wrong), torch.tensor(few))


@dataclass(frozen=True)
class _Read:
    """A query's states ``(t, d)`` at its prompt, in half precision, whether the base model answers it wrong,
    and whether it finds few answers possible."""

    states: torch.Tensor
    is_wrong: bool
    are_few: bool


def _read_prompts(
    backbone: Backbone,
    prefixes: PrefixCache,
    queries: Sequence[Query],
    first: int,
    batch: int,
    tokens: int | None,
) -> list[_Read]:
    attention = {"x": backbone.layout.attention(first).module}
    found: dict[int, _Read] = {}
    for numbers in group_by_length(backbone, queries, batch):
        state = prefixes.state([queries[i] for i in numbers])
        # Logits of the answer alone: those of a long prompt, for all words, take more than its states.
        with capture(attention) as seen:
            logits = backbone.answer_logits(state)
        missed = torch.zeros_like(state.answer_mask)
        missed[state.answer_mask] = logits.argmax(-1) != state.labels[:, 1:][state.answer_mask]
        failed, counts = missed.any(1).tolist(), state.answer_mask.sum(1)
        starts = (counts.cumsum(0) - counts).tolist()
        for row, (i, end) in enumerate(zip(numbers, state.question_end.tolist(), strict=True)):
            states = pool_prompt(seen["x"][row, : end + 1], tokens).half().cpu()
            own = logits[starts[row] : starts[row] + int(counts[row])]
            few = NextTokens(*reversed(own.float().softmax(-1).topk(2, -1))).are_few
            found[i] = _Read(states, failed[row], few)
    return [found[i] for i in range(len(queries))]


def draw_scope_encoder(backbone: Backbone, hparams: ScopeTrainingOptions) -> ScopeEncoder:
    """An untrained classifier, its weights drawn from the run's seed. UserError where ``scope_heads`` does
    not divide the width of its attention."""
    with torch.random.fork_rng():
        torch.manual_seed(hparams.seed)
        return make_scope_encoder(backbone.layout.width, hparams).to(backbone.device)


def make_scope_encoder(width: int, hparams: ScopeTrainingOptions) -> ScopeEncoder:
    """A classifier for a decoder of this width, its weights drawn from the global generator. UserError as
    ``draw_scope_encoder``."""
    inner = choose_inner_width(hparams, width)
    hidden = hparams.scope_hidden or 2 * (inner or width)
    try:
        return ScopeEncoder(
            width, hidden, hparams.scope_dim, hparams.scope_heads, inner=inner, tokens=hparams.scope_tokens
        )
    except ValueError as error:
        raise UserError(f"{hparams.source}: scope_heads: {error}") from error


def ensure_scope(
    backbone: Backbone,
    hparams: ScopePreparationOptions,
    first: int,
    cases: Callable[[], Sequence[Case]],
    tick: Tick = ignore_progress,
) -> TrainedScope:
    """The trained classifier of prompts by what enters layer ``first``: loaded, or trained and saved.

    It is trained on the first ``scope_records`` of ``cases``. Every tenth of these is held out: it sets the
    thresholds, and with ``scope_patience`` ends the training. UserError where there are too few.
    """
    facts = describe_scope(hparams, backbone, first)

    def find_or_train() -> Path:
        if (kept := find_scope_classifier(hparams, facts)) is not None:
            return kept
        folder = choose_place(str(hparams.scope_dir)) / hash_facts(facts)
        require_own_files(folder, "scope.safetensors", "scope.json")
        records = cases()[: hparams.scope_records]
        if len(records) < 2 * HELD_OUT:
            at = f"{hparams.source}: scope_measure"
            raise UserError(f"{at}: {len(records)} train records; expected {2 * HELD_OUT} or more")
        encoder, report = train_scope(backbone, hparams, first, records, tick)
        save_scope(folder, encoder, report, facts | {"records": len(records)})
        return folder

    folder = processes.run_once(find_or_train)
    return load_scope(folder, draw_scope_encoder(backbone, hparams))


def train_scope(
    backbone: Backbone,
    hparams: ScopePreparationOptions,
    first: int,
    records: Sequence[Case],
    tick: Tick = ignore_progress,
) -> tuple[ScopeEncoder, ScopeReport]:
    """A classifier trained on these records, and a report of its training."""
    # Options that don't go together are found before an hour of forward passes.
    encoder = draw_scope_encoder(backbone, hparams)
    rows = StateRows(
        choose_place(str(hparams.scope_dir)),
        int(hparams.scope_memory_gb * GB),
        int(hparams.scope_disk_gb * GB),
    )
    with open_preparation(hparams, backbone, first) as prefixes:
        size, tokens = hparams.states_batch, hparams.scope_tokens
        taught = make_scope_cases(records, backbone, hparams, tick, AnswerCache.open(hparams, backbone))
        samples = collect_scope_samples(backbone, taught, first, size, tick, prefixes, rows, tokens)
    stop = None
    if hparams.scope_patience is not None:
        stop = EarlyStop(hparams.scope_val_every, hparams.scope_patience)
    report = fit_scope(
        samples,
        encoder,
        hparams.scope_steps,
        hparams.scope_batch,
        hparams.scope_lr,
        hparams.scope_tau,
        hparams.seed,
        tick=lambda: tick(SCOPE_TRAINING, 1),
        stop=stop,
    )
    report.queries = [probe.name for probe in taught[0].probes]
    return encoder, report


def save_scope(folder: Path, encoder: ScopeEncoder, report: ScopeReport, facts: Facts) -> None:
    """Writes the classifier in half precision, its index last."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half() for k, v in copy_tensors(encoder.state_dict()).items()}
    path = folder / "scope.safetensors"
    with replace_atomically(path) as temporary:
        save_file(tensors, temporary)
    names = report.queries or [*INSIDE, *OUTSIDE]
    held_out = {
        size: dict(zip(names, (round(s, 4) for s in shares), strict=True))
        for size, shares in report.shares.items()
    }
    training = {"thresholds": report.thresholds, "held_out": held_out, "loss": report.losses[-1:]}
    if report.passing:
        training["passing"] = {name: [round(m, 4) for m in marks] for name, marks in report.passing.items()}
    course = {
        "stopped": report.stopped,
        "steps": len(report.losses),
        "best_step": report.best_step,
        "record_visits": report.visits,
        "seconds": round(report.seconds, 1),
        "held_losses": {step: round(loss, 4) for step, loss in report.held_losses.items()},
    }
    write_index(folder / "scope.json", {**facts, **training, "training": course}, path)


def load_scope(folder: Path, encoder: ScopeEncoder) -> TrainedScope:
    """Reads a classifier into ``encoder``. UserError where the file does not fit or is damaged."""
    path = folder / "scope.safetensors"
    check_tensors(folder / "scope.json", path)
    try:
        encoder.load_state_dict(load_file(path))
        kept = read_index(folder / "scope.json")
        thresholds = {int(size): float(threshold) for size, threshold in kept["thresholds"].items()}
        passing = {str(name): _read_marks(marks) for name, marks in kept.get("passing", {}).items()}
    except Exception as error:
        raise UserError(
            f"{path}: expected a scope classifier as scripts/prepare.py writes it: {error}"
        ) from error
    return TrainedScope(encoder.eval().requires_grad_(False), thresholds, passing)


def _read_marks(values: Sequence[float]) -> tuple[float, ...]:
    marks = tuple(float(value) for value in values)
    if len(marks) < 2:
        raise ValueError("passing: expected two similarities or more")
    return marks
