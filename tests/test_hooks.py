"""Hooks come and go: whatever happens inside, the model is left as it was found."""

import pytest
import torch
from reference import tiny_model
from torch import nn
from torch.testing import assert_close
from untouched import hook_count

from unike.backbones.hooks import capture, first_tensor, inputs_of, replace_first, transform
from unike.backbones.layout import DecoderLayout
from unike.knowledge.patch import KeyValuePatch, OpenEdits, PatchStack

X = torch.arange(12.0).reshape(2, 6) / 12


class Attention(nn.Module):
    """Called by keyword, returns a tuple: as in transformers."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, hidden_states, scale=1.0):
        return self.proj(hidden_states) * scale, "weights"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(6, 6), Attention(), nn.Linear(6, 6)
        self.calls = 0

    def forward(self, x):
        hidden, weights = self.attention(hidden_states=self.first(x), scale=2.0)
        assert weights == "weights", "the rest of a tuple output stays"
        self.calls += 1
        return self.last(hidden)


class BoomError(RuntimeError):
    pass


def boom(*_):
    raise BoomError


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().requires_grad_(False)


@pytest.fixture(scope="module")
def opt():
    return tiny_model("opt").requires_grad_(False)


TOKENS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])


# ---------------------------------------------------------------- capture


def test_capture_collects_inputs_by_position_and_by_keyword(model):
    base, before = model(X), hook_count(model)
    with capture({"a": model.attention, 7: model.last}) as seen:
        assert hook_count(model) == before + 2
        assert torch.equal(model(X), base)
    assert hook_count(model) == before
    assert set(seen) == {"a", 7}
    assert torch.equal(seen["a"], model.first(X))
    assert torch.equal(seen[7], first_tensor(model.attention(hidden_states=seen["a"], scale=2.0)))


def test_capture_keeps_the_last_call_and_ends_with_its_block(model):
    with capture({"in": model.first}) as seen:
        model(X)
        model(X + 1)
        assert torch.equal(seen["in"], X + 1)
    model(X + 2)
    assert torch.equal(seen["in"], X + 1)


def test_capture_leaves_foreign_hooks_alone(model):
    calls = []
    handle = model.last.register_forward_pre_hook(lambda *_: calls.append(1))
    with capture({"x": model.last}):
        model(X)
    model(X)
    assert hook_count(model) == 1
    assert len(calls) == 2
    handle.remove()


# ---------------------------------------------------------------- transform


def test_transform_changes_the_output_and_then_no_longer(model):
    base, before = model(X), hook_count(model)
    seen = []

    def double(state, output):
        seen.append((state, output))
        return 2 * output + state

    with transform([(model.first, model.last, double)]):
        changed = model(X)
    assert torch.equal(changed, 2 * base + X)
    assert not torch.equal(changed, base)
    assert torch.equal(seen[0][0], X)
    assert torch.equal(seen[0][1], base)
    assert torch.equal(model(X), base)
    assert hook_count(model) == before


def test_transform_that_returns_its_output_changes_no_bit(model):
    base = model(X)
    with transform([(model.attention, model.attention, lambda _, output: output)]):
        assert torch.equal(model(X), base)
    with transform([(model.attention, model.attention, lambda _, output: output + 1)]):
        assert not torch.equal(model(X), base)


def test_transform_reads_a_keyword_and_replaces_the_first_of_a_tuple(model):
    hidden = model.first(X)
    with transform([(model.attention, model.attention, lambda x, output: x - output)]):
        changed = model(X)
    assert torch.equal(changed, model.last(hidden - 2 * model.attention.proj(hidden)))


def test_transforms_stack_in_order_and_unstack(model):
    base = model(X)
    plus, times = (lambda _, o: o + 1), (lambda _, o: o * 3)
    with transform([(model.first, model.last, plus), (model.first, model.last, times)]):
        assert torch.equal(model(X), (base + 1) * 3)
    with transform([(model.first, model.last, times)]):
        with transform([(model.first, model.last, plus)]):
            assert torch.equal(model(X), base * 3 + 1)
        assert torch.equal(model(X), base * 3)
    assert torch.equal(model(X), base)


def test_transform_again_and_again(model):
    base = model(X)
    with transform([(model.first, model.last, lambda x, o: o + x)]):
        for step in range(3):
            assert torch.equal(model(X + step), Model.forward(model, X + step))
        assert torch.equal(model(X), base + X)


# ---------------------------------------------------------------- exceptions in the middle


@pytest.mark.parametrize("where", ["block", "after", "later"])
def test_an_exception_leaves_no_hook(model, where):
    base = model(X)
    after = boom if where == "after" else lambda _, output: output + 1
    later = model.last.register_forward_pre_hook(boom) if where == "later" else None
    before = hook_count(model)

    def interrupted():
        with capture({"a": model.attention}), transform([(model.first, model.attention, after)]):
            assert hook_count(model) == before + 3
            if where == "block":
                raise BoomError
            model(X)

    with pytest.raises(BoomError):
        interrupted()
    assert hook_count(model) == before
    if later:
        later.remove()
    assert torch.equal(model(X), base)


def test_a_transform_still_works_after_an_interrupted_pass(model):
    base = model(X)
    with transform([(model.first, model.last, lambda x, o: o + x)]):
        handle = model.attention.register_forward_pre_hook(boom)
        with pytest.raises(BoomError):
            model(X + 5)
        handle.remove()
        assert torch.equal(model(X), base + X)


@pytest.mark.parametrize("broken", ["capture", "reader", "writer"])
def test_a_module_that_cannot_be_hooked_leaves_no_hook_on_the_others(model, broken):
    blocks = {
        "capture": lambda: capture({"a": model.first, "b": None}),
        "reader": lambda: transform([(model.first, model.last, boom), (None, model.last, boom)]),
        "writer": lambda: transform([(model.first, model.last, boom), (model.first, None, boom)]),
    }
    with pytest.raises(AttributeError), blocks[broken]():
        pass
    assert hook_count(model) == 0


# ---------------------------------------------------------------- inputs_of


def test_inputs_of_stops_at_the_module(model):
    before = hook_count(model)
    args, kwargs = inputs_of(model.attention, lambda: model(X))
    assert args == ()
    assert set(kwargs) == {"hidden_states", "scale"}
    assert torch.equal(kwargs["hidden_states"], model.first(X))
    assert model.calls == 0, "the pass ended there"
    assert hook_count(model) == before
    args, kwargs = inputs_of(model.last, lambda: model(X))
    assert (len(args), kwargs) == (1, {})


def test_inputs_of_reports_a_module_that_is_never_reached(model):
    with pytest.raises(RuntimeError, match="never reached Linear"):
        inputs_of(nn.Linear(6, 6), lambda: model(X))
    with pytest.raises(RuntimeError, match="never reached"):
        inputs_of(model.last, lambda: model.first(X))
    assert hook_count(model) == 0


def test_inputs_of_passes_other_exceptions_on(model):
    with pytest.raises(BoomError):
        inputs_of(model.last, boom)
    assert hook_count(model) == 0


def test_first_tensor_and_its_replacement():
    assert first_tensor(X) is X
    assert first_tensor((X, 1)) is X
    assert replace_first(X, X + 1).equal(X + 1)
    replaced = replace_first((X, "rest", 3), X + 1)
    assert replaced[0].equal(X + 1)
    assert replaced[1:] == ("rest", 3)


# ---------------------------------------------------------------- a real decoder


def test_inputs_of_leaves_a_real_model_usable(opt):
    base, before = opt(TOKENS).logits, hook_count(opt)
    args, kwargs = inputs_of(DecoderLayout(opt).layer(1), lambda: opt(TOKENS))
    assert hook_count(opt) == before
    assert torch.equal(opt(TOKENS).logits, base)
    output = DecoderLayout(opt).layer(1)(*args, **kwargs)
    assert_close(DecoderLayout(opt).head(first_tensor(output)), base)


def test_opt_flattens_before_its_feed_forward_network(opt):
    site = DecoderLayout(opt).ffn(1)
    with capture({"ffn": site.keys[0], "attention": DecoderLayout(opt).attention(1).module}) as seen:
        opt(TOKENS)
    assert seen["ffn"].shape == (8, 16)
    assert seen["attention"].shape == (2, 4, 16)


def test_a_row_of_the_flattened_input_is_one_token(opt):
    """Row ``b * T + t`` belongs to token ``t`` of prompt ``b``, and to no other, in the last layer."""
    site, base = DecoderLayout(opt).ffn(1), opt(TOKENS).logits

    def one_row(_, output):
        bump = torch.zeros_like(output)
        bump[1 * 4 + 2] = 1 + torch.arange(16)
        return output + bump

    with transform([(site.keys[0], site.value, one_row)]):
        changed = opt(TOKENS).logits
    differs = (changed != base).any(-1)
    assert differs.nonzero().tolist() == [[1, 2]]


def test_patch_on_opt_changes_no_bit_until_it_has_learnt(opt):
    site, base, before = DecoderLayout(opt).ffn(1), opt(TOKENS).logits, hook_count(opt)
    weights = {name: p.clone() for name, p in opt.named_parameters()}
    patch = KeyValuePatch(16, 4, site.activation, generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.SGD(patch.parameters(), lr=0.1)
    with transform([(site.keys[0], site.value, lambda q, output: output + patch(q))]):
        logits = opt(TOKENS).logits
        assert torch.equal(logits, base)
        logits.logsumexp(-1).sum().backward()
        optimiser.step()
        assert not torch.equal(opt(TOKENS).logits, base)
    assert torch.equal(opt(TOKENS).logits, base)
    assert all(torch.equal(p, weights[name]) for name, p in opt.named_parameters())
    assert hook_count(opt) == before


# ---------------------------------------------------------------- many edits on one site


def drawn_patch(seed, gated=False, beta=0.5, n=3):
    generator = torch.Generator().manual_seed(seed)
    patch = KeyValuePatch(6, n, nn.SiLU(), gated, torch.randn(4, generator=generator), beta, generator)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.normal_(generator=generator)
    return patch


@pytest.mark.parametrize("gated", [False, True])
def test_a_stack_is_the_sum_of_its_open_patches(gated):
    patches = [drawn_patch(seed, gated, beta) for seed, beta in ((0, 0.5), (1, 0.0), (2, -2.0))]
    stack = PatchStack(patches)
    queries = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))
    each = [patch(queries).detach() for patch in patches]
    assert_close(stack(queries), each[0] + each[1] + each[2])
    assert not stack(queries).requires_grad
    gates = torch.tensor([[True, False, True], [False, True, False]])
    got = stack(queries, OpenEdits.of(gates))
    assert_close(got[0], (each[0] + each[2])[0])
    assert_close(got[1], each[1][1])
    assert not stack(queries, OpenEdits.of(torch.zeros(2, 3, dtype=torch.bool))).any()
    assert stack(queries.half(), OpenEdits.of(gates)).dtype == torch.float16


@pytest.mark.parametrize("gated", [False, True])
def test_a_stack_that_grew_is_the_stack_of_all_and_leaves_the_shorter_ones_alone(gated):
    patches = [drawn_patch(seed, gated) for seed in range(5)]
    queries = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))
    grown = [PatchStack(patches[:1])]
    for patch in patches[1:]:
        grown.append(grown[-1].extended([patch]))
    # A second stack behind the same beginning must not write over the first.
    branched = grown[1].extended([patches[4]])
    for count, stack in enumerate(grown, 1):
        assert len(stack) == count
        assert_close(stack(queries), PatchStack(patches[:count])(queries))
    assert_close(branched(queries), PatchStack([*patches[:2], patches[4]])(queries))
    assert not torch.allclose(grown[2](queries), branched(queries))


def test_patches_that_differ_in_kind_do_not_stack():
    for other in (drawn_patch(1, gated=True), drawn_patch(1, n=4)):
        with pytest.raises(ValueError, match="must agree"):
            PatchStack([drawn_patch(0), other])
