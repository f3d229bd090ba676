"""The scope classifier: trained once per backbone on the train records, saved as files.

``<scope_dir>/<key>/`` holds ``scope.safetensors`` and ``scope.json``. It is trained on the queries of
``training_cases``, as the meta-learned editors are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from unike.backbones.base import Backbone
from unike.backbones.hooks import capture
from unike.backbones.prefix import PrefixCache, open_prefixes
from unike.config.combined import ScopePreparationOptions
from unike.config.sections import ScopeTrainingOptions
from unike.knowledge.scope import HELD_OUT, ScopeEncoder, ScopeReport, ScopeSamples, TrainedScope, fit_scope
from unike.methods.meta_training import copy_tensors
from unike.methods.preparation.folders import (
    Facts,
    choose_place,
    describe_scope,
    find_scope_classifier,
    hash_facts,
    require_own_files,
)
from unike.methods.preparation.training_cases import INSIDE, OUTSIDE, make_training_cases
from unike.system import processes
from unike.system.files import check_tensors, read_index, replace_atomically, write_index
from unike.system.progress import Tick, ignore_progress
from unike.types import Case, Query, UserError

SCOPE_READING, SCOPE_TRAINING = "encoding prompts for the scope classifier", "training the scope classifier"


def build_scope_queries(case: Case) -> list[Query]:
    """A record's queries that an edit should apply to (``INSIDE``), then others (``OUTSIDE``).

    UserError where the record lacks a probe.
    """
    (taught,) = make_training_cases([case])
    return [probe.query for probe in taught.probes]


@torch.no_grad()
def collect_scope_samples(
    backbone: Backbone,
    cases: Sequence[Case],
    first: int,
    batch: int = 32,
    tick: Tick = ignore_progress,
    prefixes: PrefixCache | None = None,
) -> ScopeSamples:
    """What enters layer ``first``'s attention at the tokens of each prompt, without its answer, in half
    precision; and which edits the base model answers wrong."""
    prefixes = prefixes or PrefixCache(backbone, first, max_bytes=0)
    attention = {"x": backbone.layout.attention(first).module}
    rows: list[torch.Tensor] = []
    wrong: list[bool] = []
    size = max(1, batch // (len(INSIDE) + len(OUTSIDE)))
    for start in range(0, len(cases), size):
        part = cases[start : start + size]
        state = prefixes.state([query for case in part for query in build_scope_queries(case)])
        with capture(attention) as seen:
            predicted = backbone.suffix(state)[:, :-1].argmax(-1)
        ends = state.question_end.tolist()
        failed = ((predicted != state.labels[:, 1:]) & state.answer_mask).any(1)
        wrong += failed[:: len(INSIDE + OUTSIDE)].tolist()
        rows += [x[: end + 1].half().cpu() for x, end in zip(seen["x"], ends, strict=True)]
        tick(SCOPE_READING, len(part))
    states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(states.shape[1]) < lengths[:, None]
    shape = (len(cases), -1, states.shape[1])
    states, mask = states.view(*shape, states.shape[-1]), mask.view(shape)
    return ScopeSamples(states, mask, len(INSIDE), torch.tensor(wrong))


def draw_scope_encoder(backbone: Backbone, hparams: ScopeTrainingOptions) -> ScopeEncoder:
    """An untrained classifier, its weights drawn from the run's seed."""
    width = backbone.layout.width
    with torch.random.fork_rng():
        torch.manual_seed(hparams.seed)
        return ScopeEncoder(
            width, hparams.scope_hidden or 2 * width, hparams.scope_dim, hparams.scope_heads
        ).to(backbone.device)


def ensure_scope(
    backbone: Backbone,
    hparams: ScopePreparationOptions,
    first: int,
    cases: Callable[[], Sequence[Case]],
    tick: Tick = ignore_progress,
) -> TrainedScope:
    """The trained classifier of prompts by what enters layer ``first``: loaded, or trained and saved.

    It is trained on the first ``scope_records`` of ``cases``. Every tenth of these is held out, and sets
    the thresholds. UserError where there are too few.
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
        prefixes = open_prefixes(hparams, backbone, first, memory=False)
        samples = collect_scope_samples(backbone, records, first, hparams.states_batch, tick, prefixes)
        encoder = draw_scope_encoder(backbone, hparams)
        report = fit_scope(
            samples,
            encoder,
            hparams.scope_steps,
            hparams.scope_batch,
            hparams.scope_lr,
            hparams.scope_tau,
            hparams.seed,
            tick=lambda: tick(SCOPE_TRAINING, 1),
        )
        save_scope(folder, encoder, report, facts | {"records": len(records)})
        return folder

    folder = processes.run_once(find_or_train)
    return load_scope(folder, draw_scope_encoder(backbone, hparams))


def save_scope(folder: Path, encoder: ScopeEncoder, report: ScopeReport, facts: Facts) -> None:
    """Writes the classifier in half precision, its index last."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half() for k, v in copy_tensors(encoder.state_dict()).items()}
    path = folder / "scope.safetensors"
    with replace_atomically(path) as temporary:
        save_file(tensors, temporary)
    names = INSIDE + OUTSIDE
    held_out = {
        size: dict(zip(names, (round(s, 4) for s in shares), strict=True))
        for size, shares in report.shares.items()
    }
    training = {"thresholds": report.thresholds, "held_out": held_out, "loss": report.losses[-1:]}
    write_index(folder / "scope.json", {**facts, **training}, path)


def load_scope(folder: Path, encoder: ScopeEncoder) -> TrainedScope:
    """Reads a classifier into ``encoder``. UserError where the file does not fit or is damaged."""
    path = folder / "scope.safetensors"
    check_tensors(folder / "scope.json", path)
    try:
        encoder.load_state_dict(load_file(path))
        kept = read_index(folder / "scope.json")["thresholds"]
        thresholds = {int(size): float(threshold) for size, threshold in kept.items()}
    except Exception as error:
        raise UserError(
            f"{path}: expected a scope classifier as scripts/prepare.py writes it: {error}"
        ) from error
    return TrainedScope(encoder.eval().requires_grad_(False), thresholds)
