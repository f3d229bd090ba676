"""What LAVIS's and MiniGPT-4's original files tell about the model that is built from them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unike.backbones.checking import get_original_files
from unike.backbones.checkpoint_files import load_state
from unike.types import BackboneSpec, UserError

State = Mapping[str, Tensor]

DEFAULT_IMAGE_SIZE = 364


def read_states(spec: BackboneSpec) -> dict[str, dict[str, Tensor]]:
    """The original files by YAML key."""
    kinds = get_original_files(spec)
    states = {key: load_state(getattr(spec, key), kind.title) for key, kind in kinds.items()}
    # A fine-tuned BLIP-2 file carries its own visual encoder; as in LAVIS, it wins over EVA's file.
    prefix = "visual_encoder."
    tuned = {k[len(prefix) :]: v for k, v in states["qformer_checkpoint"].items() if k.startswith(prefix)}
    states["state_dict_file"] |= tuned
    return states


@dataclass(frozen=True)
class Shape:
    """Widths, depths and the like by their names in ``transformers``' configurations of BLIP-2;
    ``queries`` is how many query tokens there are."""

    vision: dict[str, Any]
    qformer: dict[str, Any]
    queries: int
    image_size: int


def read_shape(
    spec: BackboneSpec, states: Mapping[str, State], known: Mapping[str, Iterable[str]] | None = None
) -> Shape:
    """The shape of the files (``states``, by YAML key).

    Widths, depths and patch sizes come from the tensors. Head counts and the spacing of the Q-Former's
    cross-attention can't be read there; they are the originals' unless the spec overrides them. It may
    override what is ``known``, by YAML key; None: what is in the shape.
    """
    eva, qformer = states["state_dict_file"], states["qformer_checkpoint"]
    first = "Qformer.bert.encoder.layer.0."
    width, _, patch, _ = eva["patch_embed.proj.weight"].shape
    blocks = _count(eva, r"blocks\.(\d+)\.")
    vision = _apply_overrides(
        spec,
        "vision_config",
        known,
        read={
            "hidden_size": width,
            "intermediate_size": eva["blocks.0.mlp.fc1.weight"].shape[0],
            "patch_size": patch,
        },
        default={
            # The published ViT-g has 40 blocks, of which LAVIS builds 39.
            "num_hidden_layers": 39 if (blocks, width) == (40, 1408) else blocks,
            "num_attention_heads": 16,
            "layer_norm_eps": 1e-6,
        },
    )
    queries = _apply_overrides(
        spec,
        "qformer_config",
        known,
        read={
            "hidden_size": qformer["query_tokens"].shape[-1],
            "intermediate_size": qformer[f"{first}intermediate_query.dense.weight"].shape[0],
            "num_hidden_layers": _count(qformer, r"Qformer\.bert\.encoder\.layer\.(\d+)\."),
            "encoder_hidden_size": qformer[f"{first}crossattention.self.key.weight"].shape[1],
        },
        default={"num_attention_heads": 12, "cross_attention_frequency": 2, "layer_norm_eps": 1e-12},
    )
    image_size, problems = spec.image_size or DEFAULT_IMAGE_SIZE, []
    if image_size % patch:
        problems.append(f"{spec.source}: image_size {image_size} is not a multiple of the patch size {patch}")
    if queries["encoder_hidden_size"] != width:
        problems.append(
            f"{spec.qformer_checkpoint}: reads a vision width of {queries['encoder_hidden_size']}, "
            f"but {spec.state_dict_file} has {width}"
        )
    if problems:
        raise UserError(*problems)
    return Shape(vision, queries, qformer["query_tokens"].shape[1], image_size)


def _apply_overrides(
    spec: BackboneSpec,
    key: str,
    known: Mapping[str, Iterable[str]] | None,
    read: dict[str, Any],
    default: dict[str, Any],
) -> dict[str, Any]:
    """What was ``read`` from the tensors and the ``default`` rest, under the spec's own values."""
    given = dict(getattr(spec, key))
    names = [name for name in (read | default if known is None else known[key]) if name != "image_size"]
    for name, value in given.items():
        if name == "image_size":
            raise UserError(
                f"{spec.source}: {key}.image_size: `image_size` is a key of its own beside `name`"
            )
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"expected one of {', '.join(names)}"
            raise UserError(f"{spec.source}: {key}: unknown key `{name}`; {hint}")
        if name in read and value != read[name]:
            raise UserError(f"{spec.source}: {key}.{name} is {value}, but the original file has {read[name]}")
    merged = read | default | given
    heads = merged["num_attention_heads"]
    if isinstance(heads, int) and (heads < 1 or merged["hidden_size"] % heads):
        raise UserError(
            f"{spec.source}: {key}.num_attention_heads {heads} does not divide "
            f"the width {merged['hidden_size']}"
        )
    return merged


def _count(state: State, pattern: str) -> int:
    """How many layers a state has: one more than the highest number that ``pattern`` finds."""
    return 1 + max((int(m[1]) for key in state if (m := re.match(pattern, key))), default=-1)


def list_names(keys: Iterable[str], most: int = 4) -> str:
    """The first of them in alphabetical order, and how many more there are."""
    keys = sorted(keys)
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def require_whole(spec: BackboneSpec, info: Mapping[str, Any]) -> None:
    """UserError where a folder lacks weights: transformers only warns of it, and draws them at random."""
    if info["missing_keys"]:
        raise UserError(
            f"{spec.source}: name: {spec.name}: lacks the weights {list_names(info['missing_keys'])}"
        )
