"""WISE (Wang et al. 2024): edits in a side memory beside one feed-forward matrix, which an activation opens.

Edits of a sequence are put into shards: each shard trains the entries of the matrix under a random mask of
its own, and shards are merged by TIES. A margin loss makes the activation ``||A(x) (W' - W)||`` large at the
edit's prompt and small at others, which the training split has.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from unike.backbones.base import Backbone, PromptRows
from unike.backbones.hooks import capture, transform
from unike.backbones.prefix import PrefixCache
from unike.config.combined import SideMemoryTrainingOptions
from unike.config.hparams import HyperParams
from unike.edits import Edit, SideMemoryEdit, SideRecord
from unike.edits.side_memory import mark_prompts, measure_activations, sum_shards
from unike.methods.base import CaseSource, EditMethod, Knowledge
from unike.types import EditRequest, Query, UserError


class WISE(EditMethod):
    """Trains the side memory on each edit, from where the edits of its shard have left it."""

    def __init__(self, hparams: HyperParams, knowledge: Knowledge, cases: CaseSource) -> None:
        super().__init__(hparams, knowledge)
        self.cases = cases
        self._unrelated: Sequence[Query] | None = None

    def _edit(
        self, backbone: Backbone, request: EditRequest, prefixes: PrefixCache, history: Edit | None
    ) -> SideMemoryEdit:
        """What this edit adds to its shard. Other kinds of edits in ``history`` are applied meanwhile."""
        (layer,), hp = self.layers(backbone), self.hparams
        module = backbone.layout.ffn(layer).value
        assert isinstance(module.weight, torch.Tensor)
        shape = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
        former = find_records(history, layer)
        shard = len(former) // hp.wise_shard_edits
        start = sum_shards([r for r in former if r.shard == shard], shape).get(shard)
        mask = draw_mask(shape, hp.wise_mask, hp.seed, shard).to(backbone.device)
        lesson = _Lesson(self, backbone, layer, request, prefixes, history)
        memory = torch.zeros(shape, device=backbone.device) if start is None else start
        change, info = train_memory(lesson, memory, mask, hp)
        places = mask.flatten().nonzero()[:, 0]
        values = (change - memory).flatten()[places]
        activation = lesson.measure(change)[0].item()
        record = SideRecord(request.id, shard, places.int(), values, activation)
        return SideMemoryEdit((record,), layer, shape, hp.wise_ratio, hp.wise_density, info)

    def draw_unrelated(self, request: EditRequest) -> list[Query]:
        """Questions of the training split that the edit must not reach, by the run's seed and its id."""
        if self._unrelated is None:
            kept = [p.query for c in self.cases() for p in c.probes if p.expect == "unchanged"]
            if not kept:
                raise UserError(
                    f"{self.hparams.source}: method: wise: no training record has unrelated questions"
                )
            self._unrelated = kept
        drawn = random.Random(self.hparams.seed + zlib.crc32(request.id.encode()))
        count = min(self.hparams.wise_unrelated, len(self._unrelated))
        return [replace(query, target=None) for query in drawn.sample(self._unrelated, count)]


def find_records(history: Edit | None, layer: int) -> list[SideRecord]:
    """The edits of ``history`` in the layer's side memory."""
    parts = () if history is None else history.parts
    return [r for p in parts if isinstance(p, SideMemoryEdit) and p.layer == layer for r in p.records]


def draw_mask(shape: tuple[int, int], ratio: float, seed: int, shard: int) -> torch.Tensor:
    """Which entries a shard trains, each with the probability ``ratio``."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(f"shard {shard}".encode()))
    return torch.rand(shape, generator=generator) < ratio


def margin_loss(
    edit: torch.Tensor, unrelated: torch.Tensor, alpha: float, beta: float, gamma: float
) -> torch.Tensor:
    """``max(0, u - alpha) + max(0, beta - e) + max(0, gamma - (e - u))`` for activations ``e`` of the edit
    and ``u (n)`` of unrelated prompts, the mean over these."""
    terms = (unrelated - alpha, beta - edit, gamma - (edit - unrelated))
    return torch.stack([term.clamp(min=0).mean() for term in terms]).sum()


def train_memory(
    lesson: _Lesson, start: torch.Tensor, mask: torch.Tensor, hparams: SideMemoryTrainingOptions
) -> tuple[torch.Tensor, dict[str, object]]:
    """The shard's change ``(out, in)`` after gradient steps on the masked entries, and what is reported of
    it. FloatingPointError where the loss is no longer a number."""
    change = start.clone().requires_grad_()
    for step in range(hparams.max_steps + 1):
        answer, right = lesson.ask(change)
        active = lesson.measure(change)
        margin = margin_loss(active[0], active[1:], hparams.wise_alpha, hparams.wise_beta, hparams.wise_gamma)
        loss = answer + margin
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} after {step} steps")
        reached = right and loss.item() <= hparams.stop_loss
        if reached or step == hparams.max_steps:
            break
        (gradient,) = torch.autograd.grad(loss, change)
        with torch.no_grad():
            change -= hparams.lr * gradient * mask
            change.clamp_(-hparams.wise_clamp, hparams.wise_clamp)
    info: dict[str, object] = {
        "steps": step,
        "loss": answer.item(),
        "reached": reached,
        "margin_loss": margin.item(),
    }
    return change.detach(), info


class _Lesson:
    """One edit's question and the unrelated ones, as they enter the matrix: ``inputs (1 + n, T, in)`` with
    their prompts' own tokens, ``asked (1 + n, T)``."""

    def __init__(
        self,
        method: WISE,
        backbone: Backbone,
        layer: int,
        request: EditRequest,
        prefixes: PrefixCache,
        history: Edit | None,
    ) -> None:
        self.backbone, self.module = backbone, backbone.layout.ffn(layer).value
        # The side memory of earlier edits is what is trained on; it is not applied beside itself.
        self.others = [
            part
            for part in (() if history is None else history.parts)
            if not (isinstance(part, SideMemoryEdit) and part.layer == layer)
        ]
        self.state = prefixes.state([method.write_lesson(request)])
        goal = self.state.labels[:, 1:]
        self.wanted = goal[self.state.answer_mask]
        own = replace(method.write_lesson(request), target=None)
        asked = prefixes.state([own, *method.draw_unrelated(request)])
        with torch.no_grad(), ExitStack() as stack:
            for part in self.others:
                stack.enter_context(part.applied(backbone))
            seen = stack.enter_context(capture({"value": self.module}))
            backbone.suffix_hidden(asked)
        self.inputs = seen["value"].reshape(*asked.labels.shape, -1).float().clone()
        rows = PromptRows(asked.question_end, asked.attention_mask, asked.prompts)
        self.asked = mark_prompts(rows, self.inputs.shape[1])

    def measure(self, change: torch.Tensor) -> torch.Tensor:
        """Activations, ``(1 + n)``: the edit's own, then the unrelated prompts'."""
        return measure_activations(self.inputs @ change.T, self.asked)

    def ask(self, change: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """The answer's loss with the change, and whether all of its tokens are predicted."""

        def add(x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            return (output.float() + x.float() @ change.T).to(output.dtype)

        with ExitStack() as stack:
            for part in self.others:
                stack.enter_context(part.applied(self.backbone))
            stack.enter_context(transform([(self.module, self.module, add)]))
            logits = self.backbone.answer_logits(self.state).float()
        right = bool((logits.argmax(-1) == self.wanted).all())
        return nn.functional.cross_entropy(logits, self.wanted), right
