"""LiveEdit's equations against loops over plain floats."""

from __future__ import annotations

import math

import pytest
import torch
from reference import dot, linear, rows, softmax

from unike.edits.expert_network import (
    CrossAttention,
    ExpertNetwork,
    ExpertSizes,
    FactorWriter,
    compare_each,
    compare_features,
    compute_nce,
    keep_near,
    weigh_kept,
)

SIZES = ExpertSizes(width=6, inner=4, heads=2, rank=3, vectors=2, image_tokens=3, scale=5.0)


@pytest.fixture(scope="module")
def network() -> ExpertNetwork:
    torch.manual_seed(0)
    made = ExpertNetwork(SIZES)
    with torch.no_grad():
        # Norms that do something.
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made.requires_grad_(False)


def slow_norm(vector: list[float], norm: torch.nn.LayerNorm) -> list[float]:
    mean = sum(vector) / len(vector)
    spread = sum((x - mean) ** 2 for x in vector) / len(vector)
    scale, shift = norm.weight.tolist(), norm.bias.tolist()
    return [
        (x - mean) / math.sqrt(spread + norm.eps) * a + b
        for x, a, b in zip(vector, scale, shift, strict=True)
    ]


def slow_attention(layer: CrossAttention, vectors: list, states: list) -> list[list[float]]:
    """Equation 2, head by head."""
    keys, values = ([linear(s, part) for s in states] for part in (layer.key, layer.value))
    out = []
    for vector in vectors:
        asked, found = linear(vector, layer.query), []
        for head in range(layer.heads):
            own = slice(head * len(asked) // layer.heads, (head + 1) * len(asked) // layer.heads)
            scores = [dot(asked[own], k[own]) / math.sqrt(len(asked[own])) for k in keys]
            weights, width = softmax(scores), len(values[0]) // layer.heads
            for j in range(head * width, (head + 1) * width):
                found.append(sum(w * v[j] for w, v in zip(weights, values, strict=True)))
        out.append(found)
    return out


def slow_product(one: list, other: list) -> float:
    """Mean over the feature vectors of their products, by the root of their width."""
    return sum(dot(a, b) for a, b in zip(one, other, strict=True)) / len(one) / math.sqrt(len(one[0]))


def slow_image(extractor, question: list, image: list) -> list[list[float]]:
    norm = extractor.image_norm
    wanted = slow_attention(
        extractor.asks, rows(extractor.image_vectors[0]), [slow_norm(q, norm) for q in question]
    )
    return slow_attention(extractor.looks, wanted, [slow_norm(v, norm) for v in image])


def slow_question(extractor, question: list) -> list[list[float]]:
    states = [slow_norm(q, extractor.question_norm) for q in question]
    return slow_attention(extractor.reads, rows(extractor.question_vectors[0]), states)


def padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """States of rows of these lengths, what is filled up with large numbers, and a mask."""
    torch.manual_seed(sum(lengths))
    own = [torch.randn(n, SIZES.width) for n in lengths]
    states, mask = torch.full((len(own), max(lengths), SIZES.width), 1e3), []
    for i, row in enumerate(own):
        states[i, : len(row)] = row
        mask.append([j < len(row) for j in range(max(lengths))])
    return states, torch.tensor(mask), own


def test_features_are_those_of_the_equations_whatever_fills_the_rows(network: ExpertNetwork) -> None:
    questions, asked, own_questions = padded(3, 5)
    images, shown, own_images = padded(4, 2)
    for extractor in (network.edits, network.prompts):
        seen = extractor.read_image(questions, asked, images, shown)
        read = extractor.read_question(questions, asked)
        assert seen.shape == read.shape == (2, SIZES.vectors, SIZES.inner)
        for i in range(2):
            question, image = rows(own_questions[i]), rows(own_images[i])
            torch.testing.assert_close(
                seen[i], torch.tensor(slow_image(extractor, question, image)), atol=1e-5, rtol=1e-4
            )
            torch.testing.assert_close(
                read[i], torch.tensor(slow_question(extractor, question)), atol=1e-5, rtol=1e-4
            )
    learnt = network.prompts.read_sentinel(questions, asked)
    for i in range(2):
        expected = slow_image(network.prompts, rows(own_questions[i]), rows(network.prompts.sentinel[0]))
        torch.testing.assert_close(learnt[i], torch.tensor(expected), atol=1e-5, rtol=1e-4)


def slow_factor(writer: FactorWriter, states: list) -> list[list[float]]:
    """Equation 1, divided by the scale and the root of the rank."""
    normed = [slow_norm(s, writer.norm) for s in states]
    found = slow_attention(writer.attention, rows(writer.vectors[0]), normed)
    return [[x / SIZES.scale / math.sqrt(SIZES.rank) for x in row] for row in found]


def test_factors_are_those_of_the_equation(network: ExpertNetwork) -> None:
    states, mask, own = padded(7, 4)
    for writer in (network.left, network.right):
        found = writer(states, mask)
        assert found.shape == (2, SIZES.rank, SIZES.width)
        for i in range(2):
            expected = torch.tensor(slow_factor(writer, rows(own[i])))
            torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=1e-4)


def test_what_experts_add_is_the_sum_of_the_equation(network: ExpertNetwork) -> None:
    torch.manual_seed(1)
    states, weights = torch.randn(2, 3, SIZES.width), torch.rand(2, 4)
    left, right = torch.randn(2, 4, SIZES.rank, SIZES.width)
    found = network.apply_experts(states, left, right, weights)
    for b in range(2):
        for t in range(3):
            normed, total = slow_norm(rows(states[b, t]), network.norm), [0.0] * SIZES.width
            for e in range(4):
                for u, v in zip(rows(left[e]), rows(right[e]), strict=True):
                    fires = max(0.0, dot(normed, u))
                    total = [x + weights[b, e].item() * fires * y for x, y in zip(total, v, strict=True)]
            torch.testing.assert_close(found[b, t], torch.tensor(total), atol=1e-5, rtol=1e-4)


def test_routing_is_that_of_the_equations() -> None:
    torch.manual_seed(2)
    inputs, edits, learnt = torch.randn(3, 2, 4), torch.randn(5, 2, 4), torch.randn(3, 2, 4)
    similarity, limit = compare_features(inputs, edits), compare_each(inputs, learnt)
    for b in range(3):
        assert limit[b].item() == pytest.approx(slow_product(rows(inputs[b]), rows(learnt[b])), abs=1e-6)
        for e in range(5):
            expected = slow_product(rows(inputs[b]), rows(edits[e]))
            assert similarity[b, e].item() == pytest.approx(expected, abs=1e-6)
    kept = keep_near(similarity, limit)
    kept[2] = False
    weights = weigh_kept(similarity, kept)
    for b in range(3):
        some = [similarity[b, e].item() for e in range(5) if kept[b, e]]
        shares = iter(softmax(some)) if some else iter(())
        for e in range(5):
            x = similarity[b, e].item()
            assert kept[b, e].item() == (b < 2 and x > limit[b].item())
            expected = next(shares) / (1 + math.exp(-x)) if kept[b, e] else 0.0
            assert weights[b, e].item() == pytest.approx(expected, abs=1e-6)
    assert kept[:2].any()
    assert not kept[:2].all()
    # As near as the learnt image is not near enough.
    assert not keep_near(torch.tensor([[1.0]]), torch.tensor([1.0])).any()


def test_the_contrast_is_that_of_the_equation() -> None:
    similarity = torch.tensor([0.3, -1.2, 2.0])
    powers = [math.exp(x) for x in similarity.tolist()]
    for right in range(3):
        assert compute_nce(similarity, right).item() == pytest.approx(-math.log(powers[right] / sum(powers)))
