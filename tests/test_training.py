"""The gradient loop: rows side by side, each clipped and stopped by itself, against one after the other."""

from __future__ import annotations

import pytest
import torch
from worlds import World, case

from unike.methods import training
from unike.methods.training import Limits, Trained, train

WORDS, LIMITS = 7, Limits(lr=0.1, max_steps=40, stop_loss=0.3, clip_norm=0.5)


class Rows:
    """Logits that are parameters themselves, ``(B, tokens, words)``, beside a penalty on their size."""

    def __init__(self, start: torch.Tensor, tokens: list[int], penalty: float) -> None:
        self.held, self.tokens, self.penalty = start.clone().requires_grad_(), tokens, penalty
        self.widths: list[int] = []

    def parameters(self) -> list[torch.Tensor]:
        return [self.held]

    def logits(self) -> torch.Tensor:
        self.widths.append(len(self.held))
        return torch.cat([row[:n] for row, n in zip(self.held, self.tokens, strict=True)])

    def extra_loss(self) -> torch.Tensor | None:
        return self.penalty * self.held.square().sum((1, 2)) if self.penalty else None

    def keep(self, rows: torch.Tensor) -> None:
        self.tokens = [self.tokens[i] for i in rows.tolist()]
        self.held = self.held.detach()[rows].requires_grad_()


def labels_of(tokens: list[int]) -> torch.Tensor:
    labels = torch.full((len(tokens), 1 + max(tokens)), -100)
    for row, count in enumerate(tokens):
        labels[row, 1 : 1 + count] = torch.arange(count)
    return labels


def naive(start: torch.Tensor, count: int, penalty: float) -> tuple[int, float, bool]:
    """One row, by torch's own clipping: its steps, last loss, and whether it arrived."""
    held = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([held], lr=LIMITS.lr)
    goal = torch.arange(count)
    for step in range(LIMITS.max_steps + 1):
        loss = -held[:count].log_softmax(-1)[goal, goal].mean()
        reached = bool((held[:count].argmax(-1) == goal).all()) and loss.item() <= LIMITS.stop_loss
        if reached or step == LIMITS.max_steps:
            break
        optimiser.zero_grad()
        (loss + penalty * held.square().sum()).backward()
        torch.nn.utils.clip_grad_norm_([held], LIMITS.clip_norm)
        optimiser.step()
    return step, loss.item(), reached


@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_rows_leave_as_they_arrive_and_the_others_go_on_as_if_alone(penalty: float) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = [1, 3, 2, 3, 2]
    sizes = torch.tensor([0.5, 2.0, 1.0, 4.0, 40.0])[:, None, None]
    start = (torch.randn(5, 3, WORDS, generator=generator) * sizes).double()
    learner = Rows(start, tokens, penalty)
    found = train(learner, labels_of(tokens), LIMITS)
    wanted = [naive(start[i], n, penalty) for i, n in enumerate(tokens)]
    assert [(t.steps, t.reached) for t in found if isinstance(t, Trained)] == [(s, r) for s, _, r in wanted]
    for trained, (_, loss, _) in zip(found, wanted, strict=True):
        assert isinstance(trained, Trained)
        assert trained.loss == pytest.approx(loss, rel=1e-5)
    # Rows that leave at different steps, and one that does not arrive: otherwise nothing is shown.
    assert len({s for s, _, _ in wanted}) >= 3
    assert not all(r for _, _, r in wanted)
    assert learner.widths == sorted(learner.widths, reverse=True)
    assert len(set(learner.widths)) >= 3


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("name", ["unike", "tpatcher", "ft"])
def test_a_row_that_arrives_early_is_left_as_it_was_and_the_others_go_on(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    changes = {
        "unike": {"k": 10},
        "tpatcher": {"activation_loss": 0.1, "memory_loss": 0.1},
        "ft": {"layers": 1},
    }
    method = world.method(name, {**changes[name], "stop_loss": 100.0, "max_steps": 8, "lr": 2e-3})
    short = world.method(name, {**changes[name], "max_steps": max(1, step), "lr": 2e-3})
    prefixes, judged, calls = world.prefixes(method), training._score_rows, []
    requests = [case(0).request, case(1, "two red dogs there").request, case(2, "two dogs").request]
    alone = [method.edit(world.backbone, r, prefixes) for r in requests]
    early = short.edit(world.backbone, requests[1], prefixes) if step else None

    def arrived(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses, right = judged(logits, labels)
        right[1] |= len(calls) == step
        calls.append(len(labels))
        return losses, right

    with monkeypatch.context() as patched:
        patched.setattr(training, "_score_rows", arrived)
        together = method.edit_many(world.backbone, requests, prefixes)
    assert [e.info["steps"] for e in together] == [8, step, 8]
    assert calls == [3] * (step + 1) + [2] * (8 - step)
    for one, other in ((alone[0], together[0]), (alone[2], together[2]), (early, together[1])):
        if one is not None:
            assert other.info["loss"] == pytest.approx(one.info["loss"], rel=1e-4)
            for key, tensor in one.state_dict().items():
                # Attention does not feel a key's bias: its gradient is rounding, which Adam makes steps of.
                if not key.endswith("k_proj.bias"):
                    torch.testing.assert_close(other.state_dict()[key], tensor, atol=2e-4, rtol=1e-4)
