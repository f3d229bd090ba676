"""``backend: lavis``: BLIP2-OPT of ``salesforce-lavis`` itself, its modules and its image processor.

LAVIS runs with a ``transformers`` of its own time only: requirements-lavis.txt describes the environment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.models import load_model
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
from lavis.models.eva_vit import VisionTransformer, interpolate_pos_embed
from PIL import Image
from torch import nn

from unike.backbones.architecture import Architecture
from unike.backbones.base import Batch
from unike.backbones.checkpoint_files import explain_read_errors, get_dtype
from unike.backbones.dialogue import Dialogue
from unike.backbones.images import Parts
from unike.backbones.original import Shape, State, list_names, read_shape, read_states, require_whole
from unike.backbones.vision import FixedVision
from unike.backbones.vlm import VisionLanguageBackbone
from unike.types import BackboneSpec, UserError

MODEL, PROCESSOR = "blip2_opt", "blip_image_eval"
DIALOGUE = Dialogue()


class LavisVision(FixedVision):
    """LAVIS's vision tower and Q-Former, at the size that they were built for."""

    tower_path = "visual_encoder"
    projection_path = "opt_proj"

    def _processor(self, folder: str | None, size: int | None) -> Any:
        return registry.get_processor_class(PROCESSOR)(image_size=self.tower.patch_embed.img_size[0])

    @property
    def settings(self) -> str:
        return repr(self.processor.transform)

    def read(self, image: Image.Image) -> torch.Tensor:
        pixels: torch.Tensor = self.processor(image)
        return pixels

    @torch.no_grad()
    def see(self, shown: Sequence[Parts]) -> list[Parts]:
        """The Q-Former's output, in single precision."""
        model = self.model
        patches = model.ln_vision(self.tower(self.stack(shown))).float()
        queries = model.Qformer.bert(
            query_embeds=model.query_tokens.expand(len(patches), -1, -1),
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:-1], dtype=torch.long, device=patches.device),
        )
        return [{"features": state} for state in queries.last_hidden_state]


class LavisBackbone(VisionLanguageBackbone):
    """A frozen BLIP2-OPT of LAVIS."""

    @property
    def _settings(self) -> Mapping[str, Any]:
        return {
            "lavis": metadata.version("salesforce-lavis"),
            "heads": self.model.visual_encoder.blocks[0].attn.num_heads,
            "qformer": self.model.Qformer.config.to_dict(),
            "opt": self.decoder.config.to_dict(),
        }

    def _decoder_arguments(self, batch: Batch) -> dict[str, torch.Tensor]:
        # LAVIS's OPT counts positions by the mask, as ours are counted.
        return {"inputs_embeds": batch.inputs_embeds, "attention_mask": batch.attention_mask}

    def generation_arguments(self, batch: Batch) -> dict[str, torch.Tensor]:
        """All but each prompt's last token as ``query_embeds``: embeddings alone are not taken here."""
        last = [[self.tokens(prompt)[-1]] for prompt in batch.prompts]
        return {
            "input_ids": torch.tensor(last, device=self.device),
            "query_embeds": batch.inputs_embeds[:, :-1],
            "attention_mask": batch.attention_mask,
        }


def load_lavis(spec: BackboneSpec, device: torch.device, limit: int) -> LavisBackbone:
    """BLIP2-OPT by the name of a LAVIS model type, or from the original files; ``limit``: the most new
    tokens of an answer.

    Raises UserError where LAVIS cannot load it, or the files do not fit each other.
    """
    with explain_read_errors(f"{spec.source}: name: {spec.name} cannot be loaded by LAVIS"):
        model = _load_files(spec) if spec.original_files else load_model(MODEL, spec.name)
    # As in LAVIS, what lies between tower and decoder stays in single precision.
    for part in (model.visual_encoder, model.opt_model):
        part.to(get_dtype(spec.dtype))
    _pass_cache(model.opt_model)
    architecture = Architecture(type(model), LavisVision, decoder="opt_model", dialogue=DIALOGUE)
    return LavisBackbone(model.to(device), model.opt_tokenizer, architecture, DIALOGUE, max_new_tokens=limit)


def _pass_cache(decoder: Any) -> None:
    """LAVIS's OPT waits for its cache as ``past``, a name that transformers 4.26 has given up: without this
    each new token would read the whole row again."""
    prepare = decoder.prepare_inputs_for_generation

    # Transformers looks for a parameter of the name `kwargs`.
    def prepare_cached(input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return prepare(input_ids, past=past_key_values, **kwargs)

    decoder.prepare_inputs_for_generation = prepare_cached


def _load_files(spec: BackboneSpec) -> Any:
    """LAVIS's model in the shape of the files, and with their weights."""
    states = read_states(spec)
    shape = read_shape(spec, states)
    model = _build_class(spec, states["state_dict_file"], shape)(
        img_size=shape.image_size, vit_precision="fp32", num_query_token=shape.queries, opt_model=spec.name
    )
    _fill(spec, model, states["qformer_checkpoint"], besides=("opt_model.", "visual_encoder."))
    # LAVIS reads OPT in half precision, as it is published: a folder in another one would be rounded.
    if OPTConfig.from_pretrained(spec.name).torch_dtype != torch.float16:
        dtype = get_dtype(spec.dtype)
        model.opt_model, info = OPTForCausalLM.from_pretrained(
            spec.name, torch_dtype=dtype, output_loading_info=True
        )
        require_whole(spec, info)
    return model


def _build_class(spec: BackboneSpec, eva: State, shape: Shape) -> Any:
    """LAVIS's class, with what is at hand where it would ask for a download and knows one shape alone."""
    vision, qformer = shape.vision, shape.qformer

    class FromFiles(registry.get_model_class(MODEL)):  # type: ignore[misc]
        @classmethod
        def init_tokenizer(cls) -> None:
            """BERT's, which nobody asks here: the Q-Former reads no text."""

        @classmethod
        def init_vision_encoder(cls, *_: Any) -> tuple[nn.Module, nn.Module]:
            width = vision["hidden_size"]
            tower = VisionTransformer(
                img_size=shape.image_size,
                patch_size=vision["patch_size"],
                use_mean_pooling=False,
                embed_dim=width,
                depth=vision["num_hidden_layers"],
                num_heads=vision["num_attention_heads"],
                # Rounded down when it is multiplied with the width again.
                mlp_ratio=(vision["intermediate_size"] + 0.5) / width,
                qkv_bias=True,
                norm_layer=partial(nn.LayerNorm, eps=vision["layer_norm_eps"]),
            )
            resized = dict(eva)
            interpolate_pos_embed(tower, resized)
            _fill(spec, tower, resized)
            return tower, LayerNorm(width)

        @classmethod
        def init_Qformer(cls, queries: int, width: int) -> tuple[nn.Module, nn.Parameter]:  # noqa: N802
            names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            config = BertConfig(
                **{name: qformer[name] for name in names},
                layer_norm_eps=qformer["layer_norm_eps"],
                add_cross_attention=True,
                cross_attention_freq=qformer["cross_attention_frequency"],
                encoder_width=width,
                query_length=queries,
            )
            return BertLMHeadModel(config), nn.Parameter(torch.zeros(1, queries, config.hidden_size))

    return FromFiles


def _fill(spec: BackboneSpec, module: nn.Module, state: State, besides: tuple[str, ...] = ()) -> None:
    """Fills every parameter from ``state``, but those whose names begin as in ``besides``."""
    wanted = [name for name, _ in module.named_parameters() if not name.startswith(besides)]
    with explain_read_errors(f"{spec.source}: the original files do not fit"):
        module.load_state_dict({name: state[name] for name in wanted if name in state}, strict=False)
    if missing := [name for name in wanted if name not in state]:
        raise UserError(f"{spec.source}: the original files lack {list_names(missing)}")
