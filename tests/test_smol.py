"""The backbone smol: its tower and projector against slow second implementations, its logits against the
language model's own; the real one, where its folder is there."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from todays import save_folder, todays_spec
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from scripts.real.folder import INDEX
from scripts.real.packages import LANGUAGE, find_part
from unike.backbones import load_backbone
from unike.backbones.base import IGNORED, encode_queries
from unike.backbones.efficientnet import EfficientNetLite, EfficientNetLiteConfig, SameConv2d, pool_cells
from unike.backbones.families import find_published
from unike.backbones.smol import NameProjector, SmolConfig, SmolForConditionalGeneration
from unike.types import Query, UserError

ROOT = Path(__file__).parents[1]
REAL = ROOT / "hugging_cache" / "smol"
# As published.
LANGUAGE_PARAMETERS = 134_515_008


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("smol"), "smol")


@pytest.fixture(scope="module")
def backbone(folder: Path):
    return load_backbone(todays_spec("smol", folder))


def picture(seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (40, 60, 3), generator=generator, dtype=torch.uint8).numpy())


# ---------------------------------------------------------------- the tower


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int, groups: int) -> np.ndarray:
    """TensorFlow's "same" convolution by loops: ``(c, h, w)`` to ``(o, ceil(h / s), ceil(w / s))``."""
    kernel, out = weight.shape[-1], weight.shape[0]
    sizes = [math.ceil(n / stride) for n in x.shape[1:]]
    before = [max((m - 1) * stride + kernel - n, 0) // 2 for m, n in zip(sizes, x.shape[1:], strict=True)]
    per_group_in, per_group_out = x.shape[0] // groups, out // groups
    y = np.zeros((out, *sizes))
    for o in range(out):
        first = (o // per_group_out) * per_group_in
        for i in range(sizes[0]):
            for j in range(sizes[1]):
                total = bias[o]
                for c in range(per_group_in):
                    for a in range(kernel):
                        for b in range(kernel):
                            row, column = i * stride + a - before[0], j * stride + b - before[1]
                            if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                                total += weight[o, c, a, b] * x[first + c, row, column]
                y[o, i, j] = total
    return y


def run_slowly(tower: EfficientNetLite, x: np.ndarray) -> np.ndarray:
    """The tower's map ``(c, h, w)`` for one image, by ``convolve`` alone."""

    def apply(module: SameConv2d, x: np.ndarray, clip: bool = True) -> np.ndarray:
        weight, bias = module.weight.detach().double().numpy(), module.bias.detach().double().numpy()
        y = convolve(x, weight, bias, module.stride[0], module.groups)
        return y.clip(0, 6) if clip else y

    x = apply(tower.stem, x)
    for block in tower.blocks:
        y = x if block.expand is None else apply(block.expand, x)
        y = apply(block.project, apply(block.depthwise, y), clip=False)
        x = x + y if x.shape == y.shape and block.depthwise.stride[0] == 1 else y
    return apply(tower.head, x)


@pytest.mark.parametrize("size", [(9, 12), (10, 7)])
def test_the_tower_computes_what_loops_compute(size: tuple[int, int]) -> None:
    """Sizes at which "same" padding is even and odd, at strides 1 and 2."""
    stages = [[3, 1, 1, 1, 3], [5, 2, 2, 2, 4], [3, 1, 2, 2, 4]]
    torch.manual_seed(1)
    tower = EfficientNetLite(EfficientNetLiteConfig(stem=3, stages=stages, hidden_size=5, grid=2))
    for parameter in tower.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    pixels = torch.randn(1, 3, *size)
    with torch.no_grad():
        found = tower.map(pixels)
        expected = torch.from_numpy(run_slowly(tower, pixels[0].double().numpy()))
        assert_close(found[0].double(), expected, atol=1e-5, rtol=1e-5)
        cells = tower(pixels)
    assert len(found.unique()) > 8
    assert cells.shape == (1, 5, 5)
    assert_close(cells[0, 0].double(), expected.mean((1, 2)), atol=1e-5, rtol=1e-5)
    # Padding on the other side, as torch's own convolutions would have it, gives another map.
    assert not torch.allclose(tower.map(pixels.flip(-1)).flip(-1), found, atol=1e-3)


def test_cells_are_the_means_of_the_maps_parts() -> None:
    features = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    cells = pool_cells(features, 2)
    assert torch.equal(cells[:, 0], features.mean((2, 3)))
    assert torch.equal(cells[:, 2], features[:, :, :2, 2:].mean((2, 3)))
    assert torch.equal(cells[:, 3], features[:, :, 2:, :2].mean((2, 3)))
    assert pool_cells(features, 0).shape == (2, 1, 3)


# ---------------------------------------------------------------- the projector


def test_the_projector_computes_what_loops_compute() -> None:
    torch.manual_seed(2)
    width, names, slots, out = 6, 5, 3, 4
    projector = NameProjector(width, names, slots, 7, out)
    features = torch.randn(4, width)
    found = projector(features).detach().numpy()
    assert found.shape == (slots + 3, out)
    state = {name: tensor.double().numpy() for name, tensor in projector.state_dict().items()}
    tokens = []
    for feature in features.double().numpy():
        scores = np.exp(state["scores.weight"] @ feature + state["scores.bias"])
        inner = state["inner.weight"] @ feature + state["inner.bias"]
        gelu = np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in inner])
        written = np.zeros((slots, out))
        for slot in range(slots):
            for at in range(out):
                row = slot * out + at
                named = sum(
                    s / scores.sum() * w for s, w in zip(scores, state["words.weight"][row], strict=True)
                )
                written[slot, at] = named + state["outer.weight"][row] @ gelu
        tokens.append(written)
    expected = [*tokens[0], *(cell.mean(0) for cell in tokens[1:])]
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-5)
    # Images side by side are projected each for itself.
    both = projector(torch.stack([features, features.flip(0)]))
    assert_close(both[0].detach().numpy(), found, atol=1e-6, rtol=0)
    assert not torch.allclose(both[0], both[1], atol=1e-3)


# ---------------------------------------------------------------- the whole


def test_logits_are_those_of_llama_on_the_same_embeddings(backbone, folder: Path) -> None:
    asked = Query(picture(), "what is it?", "a red fox")
    state = load_file(folder / "model.safetensors")
    own = {k.removeprefix("language_model."): v for k, v in state.items() if k.startswith("language_model.")}
    config = json.loads((folder / "config.json").read_text("utf-8"))["text_config"]
    llama = LlamaForCausalLM(LlamaConfig(**config)).eval()
    assert not any(llama.load_state_dict(own, strict=False))
    pixels = backbone.vision.pixels(asked.image)["pixel_values"][None]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [
        tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        for text in ("Picture: a", ".\n", "what is it? a red fox")
    ]
    model = SmolForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        before, after, words = (llama.get_input_embeddings()(i) for i in ids)
        shown = model.get_image_features(pixels)[0]
        embeds = torch.cat([before, shown, after, words])
        expected = llama(inputs_embeds=embeds[None]).logits[0]
        batch = encode_queries(backbone, [asked])
        assert_close(batch.inputs_embeds[0], embeds, atol=1e-6, rtol=0)
        assert_close(backbone(batch).logits[0], expected, atol=1e-5, rtol=0)
        other = backbone(encode_queries(backbone, [Query(picture(1), asked.prompt, asked.target)]))
    assert not torch.allclose(other.logits[0], expected, atol=1e-3)
    answer = tokenizer(" a red fox", add_special_tokens=False).input_ids
    assert batch.labels[0][batch.labels[0] != IGNORED].tolist() == answer


def test_without_an_image_only_the_question_is_read(backbone) -> None:
    (row,) = encode_queries(backbone, [Query(None, "where is it?", "there")]).inputs_embeds
    ids = torch.tensor(backbone.tokens("where is it? there"))
    assert torch.equal(row, backbone.decoder.get_input_embeddings()(ids))


def test_tower_and_projector_keep_their_precision(folder: Path) -> None:
    half = load_backbone(todays_spec("smol", folder, dtype="bfloat16"))
    assert half.dtype == torch.bfloat16
    assert {p.dtype for p in half.vision.tower.parameters()} == {torch.float32}
    assert {p.dtype for p in half.projection.parameters()} == {torch.float32}
    assert half.generate([picture()], ["what is it?"], max_new_tokens=3)


def test_the_family_is_found_in_the_folder(folder: Path) -> None:
    found = find_published(str(folder))
    assert (found.model_name, found.answer_end) == ("smol", "eos")


def test_a_folder_that_is_not_there_names_the_command_that_makes_it(tmp_path: Path, nothing_loads) -> None:
    with pytest.raises(
        UserError, match=r"expected the folder that `python -m scripts\.real` makes"
    ) as caught:
        load_backbone(todays_spec("smol", tmp_path / "smol"))
    assert "hub" not in str(caught.value)


def test_a_shard_that_is_missing_is_named(folder: Path, tmp_path: Path, nothing_loads) -> None:
    copied = tmp_path / "smol"
    shutil.copytree(folder, copied)
    state = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(state, "projector.safetensors")}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks projector\.safetensors"):
        load_backbone(todays_spec("smol", copied))


def test_the_published_shape() -> None:
    """The parts' numbers of parameters are those that their makers state."""
    with torch.device("meta"):
        tower = EfficientNetLite(EfficientNetLiteConfig())
        text = {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
            "tie_word_embeddings": True,
        }  # fmt: skip
        model = SmolForConditionalGeneration(SmolConfig(text_config=text, tie_word_embeddings=True))
    assert sum(p.numel() for p in model.language_model.parameters()) == LANGUAGE_PARAMETERS
    # EfficientNet-Lite2 has 6.1 M with its classifier; folded norms have one number a channel, not two.
    assert sum(p.numel() for p in tower.parameters()) == pytest.approx(4.79e6, rel=0.01)
    with torch.device("meta"):
        assert tower.to("meta").map(torch.zeros(1, 3, 260, 260)).shape == (1, 1280, 9, 9)


@pytest.mark.skipif(not (REAL / INDEX).is_file(), reason="needs python -m scripts.real")
def test_the_real_one_knows_a_fact_and_has_one_digit_a_token() -> None:
    backbone = load_backbone(todays_spec("smol", REAL))
    (said,) = backbone.generate([None], ["Question: What is the capital of France? Short answer:"])
    assert "Paris" in said
    assert len(backbone.tokens("1984")) == 4


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / INDEX).is_file(), reason="needs python -m scripts.real")
def test_the_real_language_model_is_the_one_that_transformers_reads_from_gguf() -> None:
    try:
        file = find_part(LANGUAGE)
    except UserError as error:
        pytest.skip(str(error))
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    state, own = theirs.state_dict(), load_file(REAL / "language.safetensors")
    assert len(own) > 200
    for name, tensor in own.items():
        assert torch.equal(tensor, state[name.removeprefix("language_model.")].half()), name
    read = AutoTokenizer.from_pretrained
    tokenizers = read(file.parent, gguf_file=file.name), read(REAL)
    text = "Question: what is 1984's colour?\n Short answer: it's 12,345.6<|im_end|>"
    one, other = (tokenizer(text).input_ids for tokenizer in tokenizers)
    assert one == other
