"""The estimate of one edit's memory, against what torch keeps; the table of all models on its page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_published import LLAVA, check, room  # noqa: F401
from todays import save_folder
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from scripts import memory as script
from unike import MultimodalEditor
from unike.backbones.checking import count_parameters, count_published_parameters
from unike.backbones.published import PUBLISHED
from unike.config.hparams import HyperParams
from unike.knowledge.encoders import Disentangler
from unike.knowledge.memory import KnowledgeMemory
from unike.methods import ft, patching
from unike.methods.training import Learner, train
from unike.runs.memory import PHOTO_TOKENS, describe_edit_memory, estimate_edit_memory
from unike.types import UserError

ROOT = Path(__file__).parents[1]


def keep_count(learner: Learner, model: torch.nn.Module, seen: dict[str, int]) -> None:
    """Counts the bytes that the first forward pass keeps for its backward pass, and the numbers trained."""
    compute = learner.logits
    seen["trained"] = sum(p.numel() for p in learner.parameters())
    kept: dict[int, tuple[int, torch.Tensor]] = {}
    own = {p.untyped_storage().data_ptr() for p in (*learner.parameters(), *model.parameters())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    def measured() -> torch.Tensor:
        if kept:
            return compute()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = compute()
        seen["kept"] = sum(size for size, _ in kept.values())
        return out

    learner.logits = measured  # type: ignore[method-assign]


@pytest.fixture(params=["tiny-blip2-opt", "llava", "llava bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    name, _, dtype = request.param.partition(" ")
    path = ROOT / "hugging_cache" / name if name.startswith("tiny") else save_folder(tmp_path / name, name)
    return path, dtype or "float32"


@pytest.mark.parametrize("method", ["unike", "ft"])
def test_the_estimate_is_an_upper_bound_of_what_torch_keeps(
    folder: tuple[Path, str], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {} if method == "unike" else {"method": "ft", "layers": 1}
    editor = MultimodalEditor.from_model(folder[0], dtype=folder[1], progress=False, max_steps=2, **options)
    seen: dict[str, int] = {}

    def watch(learner: Learner, labels: torch.Tensor, limits: Any) -> Any:
        seen["tokens"] = labels.shape[1]
        keep_count(learner, editor.backbone.model, seen)
        return train(learner, labels, limits)

    monkeypatch.setattr(patching if method == "unike" else ft, "train", watch)
    editor.edit("what is it?", "two dogs", Image.new("RGB", (64, 64), "red"))
    monkeypatch.setattr("unike.runs.memory.TEXT_TOKENS", 0)
    monkeypatch.setattr("unike.runs.memory.read_model_size", lambda hparams: _Tokens(seen["tokens"]))
    # Of so short an answer the cache is smaller than what training keeps.
    found = estimate_edit_memory(editor.hparams.replace(max_new_tokens=1), 0)
    assert found is not None
    assert found.weights == 0
    # The rounded copy of fine-tuning in half precision is counted with what is trained.
    rounded = 2 if (method, folder[1]) == ("ft", "bfloat16") else 0
    kept = seen["kept"] - rounded * seen["trained"]
    assert kept <= found.working <= 3 * kept
    assert found.trained == pytest.approx((16 + rounded) * seen["trained"], rel=0.03 if method == "ft" else 0)


class _Tokens:
    """As much of a ``ModelSize`` as is read."""

    def __init__(self, count: int) -> None:
        self.image_tokens = count


def test_the_knowledge_is_counted_as_it_is_kept() -> None:
    hparams = HyperParams.from_hparams(ROOT / "hparams" / "llava.yaml").replace(
        layers=1, triplets=50, encoder_hidden=64
    )
    values = torch.randn(50, 4096).half().float()
    memory = KnowledgeMemory.compact(torch.randn(50, 4096), values)
    encoder = Disentangler(4096, 64).semantic
    tensors = {t.data_ptr(): t.nbytes for t in vars(memory).values() if isinstance(t, torch.Tensor)}
    kept = sum(tensors.values()) + sum(p.nbytes for p in encoder.parameters())
    found = estimate_edit_memory(hparams, 0)
    assert found is not None
    assert found.knowledge == pytest.approx(kept, rel=0.02)


def test_an_image_has_as_many_tokens_as_the_published_processors_give_it() -> None:
    high, wide = smart_resize(480, 640, factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280 * 10)
    assert PHOTO_TOKENS["qwen2_vl"] == PHOTO_TOKENS["qwen2_5_vl"] == (high // 28) * (wide // 28)

    class Processor(LlavaOnevisionProcessor):
        def __init__(self) -> None:
            side = range(384, 2305, 384)
            self.image_processor = type(
                "", (), {"image_grid_pinpoints": [[h, w] for h in side for w in side]}
            )()
            self.num_image_tokens, self.vision_aspect_ratio = 729, "anyres_max_9"

    assert PHOTO_TOKENS["llava_onevision"] == Processor()._get_number_of_features(480, 640, 384, 384)


@pytest.mark.parametrize(("family", "items", "hidden"), [("blip2", 2000, 512), ("minigpt4", 2000, 1024)])
def test_the_estimate_is_near_what_was_measured(family: str, items: int, hidden: int) -> None:
    """As ``benchmarks.full_size`` ran: bfloat16, so many items in memory, encoders of that width."""
    hparams = HyperParams.from_hparams(ROOT / "hparams" / f"{family}.yaml")
    hparams = hparams.replace(dtype="bfloat16", triplets=items, encoder_hidden=hidden)
    measured = script.read_measured(script.FIGURES.read_text(encoding="utf-8"))[family]
    assert script.estimate(hparams).peak / 1e9 == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(
    "change",
    [{"method": "ft", "ft_target": "projection"}, {"method": "ike"}, {"quantization": "int4"}],
    ids=str,
)
def test_what_is_not_known_is_not_estimated(change: dict[str, Any]) -> None:
    hparams = HyperParams.from_hparams(ROOT / "hparams" / "llava.yaml")
    assert estimate_edit_memory(hparams, 10**9) is not None
    assert estimate_edit_memory(hparams.replace(**change), 10**9) is None
    lost = hparams.replace(name="no/such-model")
    assert describe_edit_memory(lost) == []
    assert count_published_parameters(lost.backbone) is None


def test_the_check_says_the_peak(room: Any, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    room(100e9)
    assert check("--task", "vqa") == 2
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "one edit: " in line)
    hparams = HyperParams.from_hparams(ROOT / "hparams" / "llava.yaml")
    found = estimate_edit_memory(hparams, count_parameters(hparams.backbone))
    assert found is not None
    assert (
        f"at most {found.peak / 1e9:.1f} GB: the weights, {found.knowledge / 1e9:.1f} GB for the know" in line
    )


# ---------------------------------------------------------------- the table


def test_the_page_has_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--check"]) == 0
    capsys.readouterr()
    assert script.main([]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed in script.PAGE.read_text(encoding="utf-8")
    rows = printed.splitlines()[2:]
    assert len(rows) == 2 * len(script.FAMILIES)
    assert all(len(row.split("|")) == len(script.COLUMNS) + 3 for row in rows)
    # 32 bit take twice the weights of 16 bit; only two models were measured.
    sizes = [float(row.split("|")[3]) for row in rows]
    assert all(
        full == pytest.approx(2 * half, abs=0.11) for full, half in zip(sizes[::2], sizes[1::2], strict=True)
    )
    assert sum(not row.endswith("| - |") for row in rows) == len(script.MEASURED)
    assert script.main(["--short"]) == 0
    short = capsys.readouterr().out.strip().splitlines()[2:]
    assert short == [row.replace("| 16 bit ", "") for row in rows[1::2]]


def test_a_page_that_is_out_of_date_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n<!-- memory edit -->\n\nold\n\n<!-- end of memory edit -->\n\nmore\n")
    assert script.main(["--write", str(page), "--check"]) == 1
    assert script.main(["--write", str(page)]) == 0
    assert script.main(["--write", str(page), "--check"]) == 0
    text = page.read_text()
    assert text.startswith("# A\n")
    assert text.endswith("more\n")
    assert f"| LLaVA-1.5, {PUBLISHED[LLAVA].parameters / 1e9:.1f} B |" in text
    assert not re.search(r"^old$", text, re.M)
    assert script.main(["--write", str(tmp_path / "none.md")]) == 2
    with pytest.raises(UserError, match=r"has no peak resident of BLIP2-OPT-2\.7B"):
        script.read_measured("")
