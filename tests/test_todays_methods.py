"""Edits of today's backbones, their folders, whole runs on them, and the sites of the published sizes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Project, make_project, record
from safetensors.torch import load_file, save_file
from todays import CHATS, OWN, TODAY, save_folder, todays_spec
from torch import nn
from transformers import AutoConfig
from untouched import assert_untouched
from worlds import World, case, query, snapshot, world_of

from scripts.plan import read_plan
from unike.backbones import load_backbone
from unike.backbones.base import encode_queries
from unike.backbones.checking import check_spec
from unike.backbones.huggingface import ARCHITECTURES
from unike.backbones.layout import DecoderLayout
from unike.backbones.placement import map_devices
from unike.config.hparams import HyperParams
from unike.runs.records import read_lines
from unike.system.hub import is_hub_id
from unike.types import BACKBONES, Query, UserError

ROOT = Path(__file__).parents[1]
PROMPTED = ("ike", {"ike_retriever": "states", "ike_demonstrations": 2})


@pytest.fixture(params=(*TODAY, *OWN))
def world(request: pytest.FixtureRequest, worlds: dict[str, World], monkeypatch) -> World:
    return world_of(request.param, worlds, monkeypatch)


def test_every_backbone_that_is_known_is_tried() -> None:
    assert {"blip2", "minigpt4", *TODAY, *OWN} == set(BACKBONES) == set(ARCHITECTURES)


# ---------------------------------------------------------------- edits


@pytest.mark.parametrize(
    "row", [("unike", {}), ("ft", {"ft_target": "projection"}), ("ft", {"layers": 1})], ids=str
)
def test_an_edit_makes_the_target_and_leaves_the_base_bit_for_bit(world: World, row) -> None:
    backbone = world.backbone
    before, hooks = snapshot(backbone)
    asked = [query(0), Query(None, "where is it?", "there")]
    base_logits = world.logits(asked)
    edit = world.edit((row[0], {**row[1], "max_steps": 60, "lr": 3e-2}))
    with edit.applied(backbone):
        inside = world.logits(asked)
    assert not torch.equal(inside, base_logits)
    if "ft_target" not in row[1]:  # A random decoder need not follow what it sees as far as the target.
        goal = encode_queries(backbone, asked).labels[0, 1:]
        assert edit.info["reached"]
        assert torch.equal(inside[0, :-1].argmax(-1)[goal != -100], goal[goal != -100])
    assert torch.equal(world.logits(asked), base_logits)
    assert_untouched(backbone, before, hooks)


def test_facts_leave_room_for_the_picture(world: World, monkeypatch) -> None:
    """A picture of many tokens takes them from the demonstrations."""
    plain = world.edit(PROMPTED)
    tokens = world.backbone.vision.tokens
    monkeypatch.setattr(
        world.backbone.vision, "tokens", lambda seen, prompt: tokens(seen, prompt)[:1].expand(200, -1)
    )
    monkeypatch.setattr(world.backbone.vision, "positions", lambda *_: None)
    wide = world.method(*PROMPTED).edit(
        world.backbone, case(0).request, world.prefixes(world.method(*PROMPTED))
    )
    assert 150 < plain.room - wide.room < 280


# ---------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save_folder(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder


@pytest.mark.parametrize("family", TODAY)
def test_all_that_a_folder_lacks_is_said_before_it_is_loaded(family: str, tmp_path, nothing_loads) -> None:
    assert not check_spec(todays_spec(family, tmp_path / "none"))[-1].ok
    kind = "qwen2_vl" if family == "llava" else "llava"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    spec = todays_spec(family, tmp_path, image_size=28, state_dict_file="eva.pth")
    found = check_spec(spec)
    assert not any(finding.ok for finding in found)
    said = " ".join(finding.what for finding in found)
    own = "chat template" if family in CHATS else "Q-Former's tokenizer"
    for problem in (
        "image_size:",
        "state_dict_file:",
        f"`{kind}`",
        "no tokenizer",
        "no image processor",
        own,
    ):
        assert problem in said
    with pytest.raises(UserError) as caught:
        load_backbone(spec)
    assert len(caught.value.problems) == len(found)


@pytest.mark.parametrize("family", [*TODAY, *OWN])
def test_a_whole_folder_has_nothing_to_mend(family: str, folders) -> None:
    assert [finding.ok for finding in check_spec(todays_spec(family, folders(family)))] == [True]


def test_a_decoder_that_does_not_fit_is_named(tmp_path, folders) -> None:
    config = json.loads((folders("instructblip") / "config.json").read_text())
    for change, reason in (
        ({"model_type": "t5"}, "`t5` language model, which does not fit instructblip"),
        ({"use_sliding_window": True}, "sliding window"),
        (None, "has a config.json without text_config"),
    ):
        changed = config | {"text_config": change and config["text_config"] | change}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert any(reason in f.what for f in check_spec(todays_spec("instructblip", tmp_path)))


def test_absent_weights_never_become_random_ones(tmp_path) -> None:
    folder = save_folder(tmp_path, "llava")
    state = load_file(folder / "model.safetensors")
    name = next(key for key in state if key.endswith("layers.2.mlp.up_proj.weight"))
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the weights .*layers\.2\.mlp\.up_proj\.weight"):
        load_backbone(todays_spec("llava", folder))


def test_a_vision_tower_without_end_is_not_built(tmp_path, folders, nothing_loads) -> None:
    shutil.copytree(folders("qwen2_vl"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["vision_config"]["depth"] = 10**9
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json has depth 1000000000; expected at most"):
        load_backbone(todays_spec("qwen2_vl", tmp_path / "model"))


@pytest.mark.parametrize(
    ("template", "image", "reason"),
    [
        ("{{ broken", "<image>", "its chat template does not work: unexpected end of template"),
        ("{{ raise_exception('no such role') }}", "<image>", "its chat template does not work: no such role"),
        (
            "{{ messages[0].content[-1].text }}",
            "<image>",
            "its chat template writes 0 <image> for 1 images",
        ),
        (CHATS["llava"] + "<image>", "<image>", "its chat template writes 1 <image> for 0 images"),
        (CHATS["llava"], "<picture>", "its tokenizer has no token <image>"),
    ],
)
def test_a_chat_that_cannot_be_held_is_said_on_loading(
    tmp_path, folders, template: str, image: str, reason: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders("llava"), folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace("<image>", image))
    with pytest.raises(UserError) as caught:
        load_backbone(todays_spec("llava", folder))
    (line,) = caught.value.problems
    assert line.startswith(f"small.yaml: name: {folder}: {reason}")


@pytest.mark.parametrize(
    ("family", "name", "change"),
    [
        ("llava", "preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3]}),
        ("llava", "chat_template.json", {"chat_template": CHATS["llava"] + " "}),
        ("instructblip", "qformer_tokenizer/tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
    ],
)
def test_states_are_kept_apart_by_all_that_is_read_beside_the_weights(
    tmp_path, folders, family: str, name: str, change: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders(family), folder)
    same = load_backbone(todays_spec(family, folder)).identity
    assert same == load_backbone(todays_spec(family, folders(family))).identity
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(values | change))
    assert load_backbone(todays_spec(family, folder)).identity != same


@pytest.mark.parametrize("family", TODAY)
def test_an_hparams_file_names_its_id_on_the_hub(family: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {HyperParams.from_hparams(path).name for path in ROOT.glob(f"hparams/**/{family}.yaml")}
    (name,) = names
    hparams = HyperParams.from_hparams(ROOT / "hparams" / f"{family}.yaml")
    assert hparams.model_name == family
    assert is_hub_id(name)
    row = f"| `hparams/{family}.yaml` | `{name}` | {hparams.dtype} |"
    assert row in (ROOT / "hugging_cache/README.md").read_text("utf-8")


@pytest.mark.parametrize("family", TODAY)
def test_a_downloaded_folder_is_taken_in_place_of_the_id(family: str, tmp_path, monkeypatch) -> None:
    (tmp_path / "hparams").mkdir()
    path = shutil.copy(ROOT / "hparams" / f"{family}.yaml", tmp_path / "hparams")
    name = HyperParams.from_hparams(path).name
    folder = tmp_path / "hugging_cache" / name.partition("/")[2]
    folder.mkdir(parents=True)
    # A folder that holds no model is none.
    assert HyperParams.from_hparams(path).name == name
    (folder / "config.json").write_text("{}")
    (tmp_path / "run_edit.py").touch()
    assert HyperParams.from_hparams(path).name == str(folder)
    monkeypatch.chdir(tmp_path)
    assert HyperParams.from_hparams(path).name == f"./hugging_cache/{folder.name}"
    # What the command line names stays as it is.
    assert HyperParams.from_hparams(path, [f"name={name}"]).name == name


@pytest.mark.parametrize("family", [*TODAY, *OWN])
def test_every_row_of_the_tables_has_its_yaml(family: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    rows, tiny = (read_plan(tables=["all"], backbones=[name]) for name in (family, "tiny_blip2"))
    assert {row.hparams.model_name for row in rows} == {family}
    # The toy's benchmark is drawn with several seeds.
    names = [
        list(dict.fromkeys((r.table, r.row.name, r.hparams.method) for r in some)) for some in (rows, tiny)
    ]
    assert names[0] == names[1]


# ---------------------------------------------------------------- the published sizes

_QWEN = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1e6, "tie_word_embeddings": False,
    "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 28, "image_token_id": 151655,
    "video_token_id": 151656, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip
_VICUNA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32,
}  # fmt: skip
# config.json of the hub's folders, as far as shapes go; Qwen's is flat.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llava": {
        "model_type": "llava", "image_token_index": 32000,
        "text_config": {**_VICUNA, "max_position_embeddings": 4096, "vocab_size": 32064},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        },
    },
    "llava_onevision": {
        "model_type": "llava_onevision", "image_token_index": 151646,
        "text_config": {
            "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152000,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
            "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
            "vision_use_head": False,
        },
    },
    "qwen2_vl": {
        **_QWEN, "model_type": "qwen2_vl", "max_position_embeddings": 32768,
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 3584,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    },
    "qwen2_5_vl": {
        **_QWEN, "model_type": "qwen2_5_vl", "max_position_embeddings": 128000,
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "out_hidden_size": 3584, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "instructblip": {
        "model_type": "instructblip", "num_query_tokens": 32, "image_token_index": 32000,
        "text_config": {**_VICUNA, "max_position_embeddings": 2048, "vocab_size": 32001},
        "vision_config": {
            "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39,
            "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
        },
        "qformer_config": {"vocab_size": 30523, "encoder_hidden_size": 1408},
    },
}  # fmt: skip
# Decoder width, hidden width of its feed-forward networks, key heads' width, and what the projection reads.
SITES = {
    "llava": (4096, 11008, 4096, 1024), "llava_onevision": (3584, 18944, 512, 1152),
    "qwen2_vl": (3584, 18944, 512, 5120), "qwen2_5_vl": (3584, 18944, 512, 5120),
    "instructblip": (4096, 11008, 4096, 768),
}  # fmt: skip
# Thousand millions of parameters, as the hub counts them.
SIZE = {"llava": 7.06, "llava_onevision": 8.03, "qwen2_vl": 8.29, "qwen2_5_vl": 8.29, "instructblip": 7.91}


@pytest.mark.parametrize("family", TODAY)
def test_the_sites_of_the_published_size(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[family]))
    config, architecture = AutoConfig.from_pretrained(tmp_path), ARCHITECTURES[family]
    with torch.device("meta"):
        model = architecture.model(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(SIZE[family], abs=0.006)
    width, inner, kv, seen = SITES[family]
    layout = DecoderLayout(architecture.find_decoder(model))
    assert (layout.width, layout.head_dim, len(layout)) == (width, 128, 32 if width == 4096 else 28)
    for index in layout.last(4):
        ffn, attention = layout.ffn(index), layout.attention(index)
        assert [tuple(k.weight.shape) for k in ffn.keys] == [(inner, width)] * 2
        assert tuple(ffn.value.weight.shape) == (width, inner)
        assert [m.out_features for m in (attention.q, attention.k, attention.v)] == [width, kv, kv]
        # Qwen's queries, keys and values have biases, its output has none; LLaMA has none at all.
        assert (attention.q.bias is not None, attention.o.bias is not None) == (width == 3584, False)
    assert (
        layout.head(torch.empty(1, 1, width, device="meta")).shape[-1]
        == model.get_output_embeddings().out_features
    )
    # A vision side without files beside it: what it does to pixels is not looked at here.
    vision: Any = object.__new__(architecture.vision)
    vision.model = model
    reads = next(m for m in vision.projection.modules() if isinstance(m, nn.Linear))
    assert reads.in_features == seen


@pytest.mark.parametrize("family", TODAY)
def test_edited_layers_lie_with_embeddings_and_head(family: str, folders) -> None:
    model: Any = load_backbone(todays_spec(family, folders(family))).model
    whole = sum(p.nbytes for p in model.parameters())
    placed = map_devices(model, torch.float32, 2, dict.fromkeys(range(4), int(0.6 * whole)))
    for name, _ in model.named_parameters():
        owners = [unit for unit in placed if name == unit or name.startswith(f"{unit}.")]
        assert len(owners) == 1, (name, owners)
    assert len(set(placed.values())) > 1
    home = [name for name in placed if any(f"layers.{i}" in name and "language" in name for i in (4, 5))]
    home += [name for name in placed if "embed_tokens" in name or "lm_head" in name or "newline" in name]
    assert len(home) >= 4
    assert {placed[name] for name in home} == {0}


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[pytest.mark.slow] if f != "qwen2_5_vl" else []) for f in TODAY]
)
def test_a_run_from_knowledge_to_records(family: str, tmp_path: Path, capsys) -> None:
    """Knowledge, encoders, an edit and its probes, from the command line, with states kept on disk."""
    import run_edit

    project = make_project(tmp_path, family)
    project.write_yaml(prefix_dir=str(tmp_path / "states"))
    command = ["--hparams_dir", str(project.yaml), "--task", "vqa", "--output", str(tmp_path / "out")]
    assert run_edit.main([*command, "--check"]) == 0
    assert run_edit.main([*command, "--size", "2"]) == 0, capsys.readouterr().err
    (first, second) = read_lines(tmp_path / "out")
    assert {first["status"], second["status"]} == {"ok"}
    assert set(first["answers"]) >= {"reliability", "t_locality", "m_locality"}


@pytest.mark.slow
def test_a_run_from_the_shell(tmp_path: Path) -> None:
    project: Project = make_project(tmp_path, "instructblip")
    project.write_records([record(5)])
    command = [
        sys.executable,
        str(ROOT / "run_edit.py"),
        "--hparams_dir",
        str(project.yaml),
        "--output",
        "out",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--task", "vqa"], cwd=project.root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "reliability" in done.stdout.lower()
