"""Log-probability margins of the target over the old answer, and KL divergence on locality probes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from unike.backbones.base import IGNORED, Backbone, Batch, PrefixState, encode_queries
from unike.backbones.prefix import PrefixCache
from unike.datasets.declarations import find_metric
from unike.edits import Edit
from unike.evaluation.by_name import average_by_name
from unike.evaluation.record import KL, MARGIN, Change
from unike.types import Case, Probe


@dataclass(frozen=True)
class _Scored:
    """Of each query log-probabilities ``(answer tokens, vocabulary)`` and the answer's ids."""

    log_probs: Sequence[torch.Tensor]
    ids: Sequence[torch.Tensor]

    def average(self, i: int) -> float:
        """Mean log-probability per token of an answer, in nats."""
        return float(self.log_probs[i].gather(1, self.ids[i][:, None]).mean())


def measure_likelihoods(
    backbone: Backbone, prefixes: PrefixCache, case: Case, edit: Edit
) -> dict[str, dict[str, Change]]:
    """By ``MARGIN`` and ``KL``, then by probe, in nats; several probes of a name are averaged.

    ``MARGIN``: mean log-probability per token of the target less that of the old answer, on the edit's own
    prompt and its rephrased ones, before and after; none where the old answer is not known, or empty.
    ``KL``: KL(base || edited) of next tokens, mean over the answer's positions, of every locality probe.

    The base is to be bare. Takes one forward pass over the case's queries on it and one under the edit, each
    apart from those that scores are of, which it leaves bit for bit as they are. Distributions are those of
    one case, and are dropped with it.
    """
    old = (case.request.wrong or "").strip()
    on_edit = [p for p in case.probes if old and _asks_the_edit(p, case)]
    kept = [p for p in case.probes if p.expect == "unchanged"]
    queries = [q for p in on_edit for q in (p.query, replace(p.query, target=old))]
    queries += [p.query for p in kept]
    if not queries:
        return {}
    whole = edit.changes_prefix(backbone, prefixes.first)
    rewritten = edit.rewrite_all(queries)
    before = _score(backbone, prefixes.state(queries))
    # Prefixes are the base model's, and filled before an edit is applied; what is encoded is not.
    state = None if whole else prefixes.state(rewritten)
    with edit.applied(backbone):
        after = _score(backbone, state or encode_queries(backbone, rewritten))
    margins, n = [], len(on_edit)
    for i, probe in enumerate(on_edit):
        one, other = (s.average(2 * i) - s.average(2 * i + 1) for s in (before, after))
        margins.append((probe.name, one, other))
    divergences = [(p.name, _diverge(before, after, 2 * n + i)) for i, p in enumerate(kept)]
    first, second = (average_by_name((name, pair[k]) for name, *pair in margins) for k in (0, 1))
    found = {
        MARGIN: {name: Change(round(first[name], 6), round(second[name], 6)) for name in first},
        KL: {name: Change(None, round(v, 6)) for name, v in average_by_name(divergences).items()},
    }
    return {name: values for name, values in found.items() if values}


def _asks_the_edit(probe: Probe, case: Case) -> bool:
    """Whether a probe asks for the edit's target in the edit's own words or other ones."""
    metric = find_metric(probe.name)
    known = metric is not None and metric.group in ("reliability", "generality")
    return known and probe.expect == "target" and probe.query.target == case.request.query.target


@torch.no_grad()
def _score(backbone: Backbone, given: Batch | PrefixState) -> _Scored:
    if isinstance(given, Batch):
        states = backbone(given).logits
    else:
        states = backbone.suffix_hidden(given)
    log_probs, ids = [], []
    # Metal has no float64.
    dtype = torch.float32 if backbone.device.type == "mps" else torch.float64
    for i, row in enumerate(given.labels):
        at = (row != IGNORED).nonzero()[:, 0]
        here = states[i, at - 1]
        if not isinstance(given, Batch):
            here = backbone.layout.head(here)
        log_probs.append(here.to(dtype).log_softmax(-1))
        ids.append(row[at].to(here.device))
    return _Scored(log_probs, ids)


def _diverge(before: _Scored, after: _Scored, i: int) -> float:
    base, edited = before.log_probs[i], after.log_probs[i].to(before.log_probs[i].device)
    return max(0.0, float((base.exp() * (base - edited)).sum(-1).mean()))
