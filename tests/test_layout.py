"""The sites of real (tiny, random) decoders compute what the decoders themselves compute."""

import pytest
import reference as naive
import torch
from reference import TINY, tiny_model
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedConfig

from unike.backbones.hooks import capture, transform
from unike.backbones.layout import FAMILIES, DecoderLayout
from unike.knowledge.adapter import knowledge_attention

# The models' own softmax and norms run in float32.
SINGLE = {"rtol": 1e-5, "atol": 1e-5}
TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])


@pytest.fixture(scope="module", params=TINY)
def model(request):
    model = tiny_model(request.param).requires_grad_(False)
    model.kind = request.param
    return model


@pytest.fixture(scope="module")
def layout(model):
    return DecoderLayout(model)


def watched(model, tokens, reader, writer):
    """What ``reader`` received and ``writer`` gave while the model ran, and its logits."""
    seen = []
    with transform([(reader, writer, lambda x, output: seen.append((x, output)) or output)]):
        logits = model(tokens).logits
    return *seen[0], logits


def bias_of(layer):
    return naive.rows(layer.bias) if layer.bias is not None else [0.0] * layer.out_features


def test_every_family_is_tried():
    # Qwen2-VL's decoders are part of a whole model: test_todays_methods.py.
    assert {kind.split()[0] for kind in TINY} | {"qwen2_vl_text", "qwen2_5_vl_text"} == set(FAMILIES)


def test_sizes(layout, model):
    assert len(layout) == 2
    assert layout.width == 16
    assert layout.head_dim == (6 if model.kind == "mistral" else 4)
    assert layout.last(1) == [1]
    assert layout.last(2) == [0, 1]
    for count in (0, 3, -1):
        with pytest.raises(ValueError, match="layers"):
            layout.last(count)


# ---------------------------------------------------------------- Eq. 1


@pytest.mark.parametrize("index", [0, 1])
def test_ffn_site_is_a_key_value_memory(model, layout, index):
    """Loops over the site's explicit keys and values give what the running model's network gave."""
    site = layout.ffn(index)
    assert site.gated == (not model.kind.startswith("opt"))
    x, output, _ = watched(model, TOKENS, site.keys[0], site.value)
    act = naive.relu if model.kind.startswith("opt") else naive.silu
    expected = naive.memory_network(
        x.reshape(-1, 16),
        naive.rows(site.keys[0].weight),
        bias_of(site.keys[0]),
        naive.rows(site.value.weight.T),
        act,
        up_columns=naive.rows(site.keys[1].weight) if site.gated else None,
        value_bias=bias_of(site.value),
    )
    assert_close(output.reshape(-1, 16), expected, **SINGLE)
    fired = site.activation(site.keys[0](x)) * (site.keys[1](x) if site.gated else 1)
    assert_close(site.value(fired), output)
    if site.gated:
        swapped = site.activation(site.keys[1](x)) * site.keys[0](x)
        assert not torch.allclose(site.value(swapped), output), "gate and up are not the same"


def test_ffn_sites_of_two_layers_differ(layout):
    assert layout.ffn(0).value is not layout.ffn(1).value
    assert layout.ffn(0).value is layout.ffn(0).value


# ---------------------------------------------------------------- attention


def without_positions(model, x):
    """The attention module's own forward, every token seeing every other, with idle rotary embeddings."""
    module = DecoderLayout(model).attention(1).module
    if model.kind.startswith("opt"):
        return module(hidden_states=x)[0]
    head_dim = DecoderLayout(model).head_dim
    idle = torch.ones(1, x.shape[1], head_dim).double(), torch.zeros(1, x.shape[1], head_dim).double()
    return module(hidden_states=x, position_embeddings=idle, attention_mask=None)[0]


@pytest.mark.parametrize("tokens", [1, 5])
def test_attention_site_is_the_module_without_positions(model, layout, tokens):
    x = torch.randn(3, tokens, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    site = layout.attention(1)
    assert_close(knowledge_attention(site, x, x), without_positions(model, x), **SINGLE)
    other = knowledge_attention(layout.attention(0), x, x)
    assert not torch.allclose(other, knowledge_attention(site, x, x), atol=1e-3)


def test_attention_site_against_explicit_matrices(model, layout):
    generator = torch.Generator().manual_seed(2)
    x, states = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (3, 5))
    site = layout.attention(0)
    expected = naive.attention(x, states, site.q, site.k, site.v, site.o, layout.head_dim)
    assert_close(knowledge_attention(site, x[None], states[None])[0], expected, **SINGLE)


def test_single_tokens_in_the_running_model(model, layout):
    site = layout.attention(1)
    x, output, _ = watched(model, TOKENS[:, :1], site.module, site.module)
    assert x.shape == (2, 1, 16)
    assert_close(knowledge_attention(site, x, x), output, **SINGLE)


def test_running_attention_where_no_positions_enter(model, layout):
    """OPT adds its positions to the embeddings, so its causal attention is Eq. 2's as it stands."""
    site = layout.attention(1)
    x, output, _ = watched(model, TOKENS, site.module, site.module)
    weights = (site.q, site.k, site.v, site.o, layout.head_dim)
    for b in range(2):
        causal = naive.attention(x[b], x[b], *weights, visible=lambda t: list(range(t + 1)))
        same = torch.allclose(output[b], causal, **SINGLE)
        assert same == model.kind.startswith("opt"), "rotary positions are left out on purpose"


def test_grouped_heads_are_shared_in_order(model, layout):
    site, x = layout.attention(0), torch.randn(2, 3, 16, dtype=torch.float64)
    heads, kv_heads = 4, 2 if model.kind in ("mistral", "qwen2") else 4
    keys, values, queries = site.keys(x), site.values(x), site.queries(x)
    assert keys.shape == values.shape == queries.shape == (2, heads, 3, layout.head_dim)
    for head in range(heads):
        own = head // (heads // kv_heads) * layout.head_dim
        part = slice(own, own + layout.head_dim)
        assert_close(keys[:, head], site.k(x)[..., part])
        assert_close(values[:, head], site.v(x)[..., part])


def test_keys_take_states_without_a_batch(layout):
    states = torch.randn(5, 16, dtype=torch.float64)
    site = layout.attention(0)
    assert_close(site.keys(states), site.keys(states[None])[0])
    assert_close(site.values(states), site.values(states[None])[0])


# ---------------------------------------------------------------- the head, and what has no row


def test_head_gives_the_logits(model, layout):
    last = layout.layer(1)
    _, hidden, logits = watched(model, TOKENS, last, last)
    assert_close(layout.head(hidden), logits)
    assert layout.head(hidden[:, -1:]).shape == (2, 1, 23)
    assert not torch.allclose(layout.head(hidden.roll(1, 1)), logits)


def test_layers_are_the_models_own(model, layout):
    with capture({i: layout.layer(i) for i in range(2)}) as seen:
        model(TOKENS)
    assert set(seen) == {0, 1}
    assert not torch.allclose(seen[0], seen[1])


def test_unknown_family_is_refused():
    stranger = nn.Linear(2, 2)
    stranger.config = PreTrainedConfig()
    stranger.config.model_type = "stranger"
    with pytest.raises(ValueError, match="stranger") as error:
        DecoderLayout(stranger)
    assert all(family in str(error.value) for family in FAMILIES)
