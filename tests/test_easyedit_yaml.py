"""EasyEdit's YAMLs become ours, or are refused in one line: none becomes another method."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from easyedit_files import make_values, write

import run_edit
from unike.config.easyedit import RENAMED, UNUSED, find_algorithm, read_layers
from unike.config.hparams import OPTIONS, HyperParams
from unike.types import UserError

KINDS = [
    (method, model, training)
    for method in ("MEND", "SERAC", "IKE", "FT")
    for model in ("blip2", "minigpt4")
    for training in ((False, True) if method in ("MEND", "SERAC") else (False,))
]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("method", "model", "training"), KINDS)
def test_each_file_is_its_own_method(
    tmp_path: Path, method: str, model: str, training: bool, legacy: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.yaml", make_values(method, model, training))
    with caplog.at_level(logging.WARNING, logger="unike"):
        found = HyperParams.from_hparams(path, legacy=legacy)
    assert (found.method, found.model_name) == (method.lower(), model)
    assert found.name == {"blip2": "cache/opt", "minigpt4": "cache/vicuna"}[model]
    # Relative to the YAML's own folder, where they are there.
    roots = {Path(str(root)).resolve() for root in (found.image_root, found.rephrase_root)}
    assert roots == {tmp_path.parent.resolve()}
    assert found.device == "cuda:0"
    assert found.backbone.original_files
    assert found.pretrained_ckpt == (None if model == "blip2" else "cache/minigpt4.pth")
    assert "tokenizer_name" in found.ignored
    assert "no counterpart, ignored" in caplog.text


def test_a_trained_editors_options_are_taken_over(tmp_path: Path) -> None:
    found = HyperParams.from_hparams(write(tmp_path / "a.yaml", make_values("MEND", training=True)))
    assert (found.layers, found.editor_lr, found.edit_scale, found.editor_rank) == (
        (30, 31),
        1e-6,
        1e-4,
        1920,
    )
    assert (found.c_edit, found.c_loc, found.editor_steps, found.editor_batch) == (0.1, 1.0, 30000, 2)
    assert (found.editor_val_every, found.editor_patience, found.editor_val_cases) == (5000, 4, 500)
    assert (found.clip_norm, found.seed) == (100.0, 42)
    # In the place of what was found, which here is the folder above the YAML's.
    assert Path(str(found.editor_dir)).parts[-2:] == ("results", "models")
    assert not {"inner_params", "archive", "lr", "edit_lr", "rank", "cedit"} & set(found.ignored)
    serac = HyperParams.from_hparams(write(tmp_path / "b.yaml", make_values("SERAC", training=True)))
    assert (serac.serac_scope, serac.seed, serac.editor_lr, serac.edit_scale) == ("text", 0, 1e-6, 1e-2)
    assert {"edit_lr", "cls_name", "small_name"} <= set(serac.ignored)


def test_ikes_k_is_its_number_of_demonstrations(tmp_path: Path) -> None:
    found = HyperParams.from_hparams(write(tmp_path / "a.yaml", make_values("IKE", k=7)))
    assert (found.ike_demonstrations, found.ike_model, found.ike_retriever) == (
        7,
        "cache/sentences",
        "sentences",
    )
    assert found.k == OPTIONS["k"].default
    short = {"alg_name": "IKE", "model_name": "blip2", "name": "a", "k": 7}
    found = HyperParams.from_dict(short)
    assert (found.method, found.ike_demonstrations, found.k) == ("ike", 7, OPTIONS["k"].default)
    with pytest.raises(UserError, match="name: missing"):
        HyperParams.from_dict({**short, "sentence_model_name": "s", "name": "."})
    ours = HyperParams.from_dict({"model_name": "blip2", "name": "a", "method": "ike", "k": 7})
    assert (ours.k, ours.ike_demonstrations) == (7, 32), "in a file of ours k is UniKE's"


def test_fine_tunings_options_are_taken_over(tmp_path: Path) -> None:
    found = HyperParams.from_hparams(write(tmp_path / "a.yaml", make_values("FT")))
    assert (found.layers, found.max_steps, found.lr) == ((31,), 25, 5e-4)


@pytest.mark.parametrize("method", ["MEND", "SERAC"])
def test_an_archive_is_a_folder_of_editors_trained_here(tmp_path: Path, method: str) -> None:
    kept = tmp_path / "models"
    path = tmp_path / "a.yaml"
    with pytest.raises(UserError) as caught:
        HyperParams.from_hparams(write(path, make_values(method, archive=str(kept))))
    (line,) = caught.value.problems
    assert "archive: " in line
    assert "MultimodalTrainer" in line
    kept.mkdir()
    assert HyperParams.from_hparams(path).editor_dir == str(kept)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": (make_values("GRACE", tokenizer_name="a"), "alg_name: GRACE has no counterpart here"),
    "LoRA": (make_values("LoRA"), "alg_name: LORA has no counterpart here"),
    "a language model": (make_values("IKE", model_name="./cache/llama-7b"), "names no vision-language model"),
    "Qwen3-VL": (make_values("MEND", model_name="qwen3-vl"), "names no vision-language model"),
    "vision layers": (
        make_values("MEND", inner_params=["Qformer.bert.encoder.layer.10.output_query.dense.weight"]),
        "inner_params: Qformer.bert",
    ),
    "another optimiser": (make_values("MEND", opt="SGD"), "opt: str 'SGD' has no counterpart"),
    "FT-L": (make_values("FT", objective_optimization="prompt_last"), "expected target_new"),
    "a norm": (make_values("FT", norm_constraint=5e-4), "norm_constraint: float 0.0005 has no counterpart"),
    "a mistyped key": (make_values("MEND", max_itres=3), "max_itres: unknown key"),
    "a bad number": (make_values("MEND", max_iters="many"), "editor_steps: expected a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("legacy", [False, True])
def test_what_has_no_counterpart_is_one_line(
    tmp_path: Path, kind: str, legacy: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    values, expected = REFUSED[kind]
    path = write(tmp_path / "a.yaml", values)
    with pytest.raises(UserError) as caught:
        HyperParams.from_hparams(path, legacy=legacy)
    (line,) = caught.value.problems
    assert expected in line
    assert str(path) in line
    if not legacy:
        assert run_edit.main(["--hparams_dir", str(path)]) == 2
        assert capsys.readouterr().err.splitlines() == [f"error: {line}"]


def test_other_families_are_known_by_their_folder(tmp_path: Path) -> None:
    values = {"alg_name": "IKE", "model_name": "./cache/qwen2-vl-7b", "sentence_model_name": "s", "k": 0}
    found = HyperParams.from_hparams(write(tmp_path / "a.yaml", values))
    assert (found.model_name, found.name, found.ike_demonstrations) == ("qwen2_vl", "./cache/qwen2-vl-7b", 0)
    llava = make_values("MEND", model_name="llava-onevision", name="cache/llava", qformer_checkpoint=".",
                        qformer_name_or_path=".", state_dict_file=".", tokenizer_class=".")  # fmt: skip
    found = HyperParams.from_hparams(write(tmp_path / "b.yaml", llava))
    assert (found.model_name, found.name, found.state_dict_file) == ("llava_onevision", "cache/llava", None)


def test_a_file_of_ours_is_none_of_easyedits() -> None:
    for path in sorted(Path(__file__).parents[1].glob("hparams/**/*.yaml")):
        text = path.read_text(encoding="utf-8")
        assert "alg_name" not in text
    assert find_algorithm({"alg_name": "mend", "model_name": "blip2", "name": "a"}) is None
    assert find_algorithm({"alg_name": "unike", "alg": "unike"}) is None
    assert find_algorithm({1: 2, "alg": 3, "archive": None}) is None
    assert HyperParams.from_dict({"alg_name": "MEND", "model_name": "blip2", "name": "a"}).method == "mend"


def test_keys_are_renamed_to_options_that_are_there() -> None:
    for method, names in RENAMED.items():
        assert set(names.values()) <= set(OPTIONS), method
    assert not UNUSED & (set(OPTIONS) - {"lr", "k"})
    assert read_layers(["a.layers.3.b", "a.layers.12.c", "x"]) == [3, 12]


def test_the_advice_for_the_releases_file_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.yaml", {"model_name": "blip2", "name": "a", "edit_lr": 0.1})
    assert run_edit.main(["--hparams_dir", str(path)]) == 2
    assert "which Python reads: HyperParams.from_hparams(file, legacy=True)" in capsys.readouterr().err
    assert HyperParams.from_hparams(path, legacy=True).lr == 0.1


def test_replace_gives_checked_values(tmp_path: Path) -> None:
    found = HyperParams.from_hparams(write(tmp_path / "a.yaml", make_values("MEND", training=True)))
    assert found.replace(editor_steps=3).editor_steps == 3
    assert found.editor_steps == 30000
    with pytest.raises(UserError, match="nearest known key is editor_steps"):
        found.replace(editor_step=3)
    with pytest.raises(UserError, match="expected a whole number"):
        found.replace(editor_steps=None)
