"""What preparing knowledge and a scope classifier will take, from the YAML and the model's config alone:
parameters, bytes of states, and seconds by the speed of a matrix product on this machine."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unike.backbones.published import PUBLISHED
from unike.config.hparams import HyperParams
from unike.methods.preparation.folders import (
    choose_inner_width,
    choose_place,
    find_scope_classifier,
    find_shipped_knowledge,
    list_changed_options,
)
from unike.methods.registry import MethodNeeds
from unike.system.findings import Finding
from unike.system.hub import find_model_folder
from unike.types import UserError

GB = 10**9
# Tokens that a prompt is taken to have beside its image's.
TEXT_TOKENS = 60
# EVA-CLIP ViT-g and the Q-Former after it, of the backbones that come as original files.
EVA_PARAMETERS, EVA_PATCH, QUERY_TOKENS = 1_011_000_000, 14, 32
# Probes of a record: the five metrics', and the hard ones.
PROBES = 8
# Floating-point operations a second of a device that has no arithmetic of its own for a precision.
_SLOW = 20e9
# Images of a train record: its own, a rephrased and an unrelated one.
RECORD_IMAGES = 3


@dataclass(frozen=True)
class ModelSize:
    """What a forward pass takes: width, parameters of the decoder, tokens of an image, and the vision
    encoder's parameters and patches. 0 where the config does not tell."""

    width: int
    decoder: int
    image_tokens: int
    vision: int
    patches: int

    @property
    def prompt_flops(self) -> float:
        """Floating-point operations of a pass over one prompt; attention scores are left out."""
        return 2.0 * self.decoder * (self.image_tokens + TEXT_TOKENS)

    @property
    def image_flops(self) -> float:
        return 2.0 * self.vision * self.patches


def read_model_size(hparams: HyperParams) -> ModelSize | None:
    """From the config.json of the YAML's model, or as published; None where there is none, or no width."""
    try:
        config = read_model_config(hparams.name)
        text = config.get("text_config") or config
        width, vision = int(text["hidden_size"]), config.get("vision_config") or {}
        decoder = _count_decoder(text, width)
        if hparams.backbone.original_files or not vision:
            patches = ((hparams.image_size or 364) // EVA_PATCH) ** 2 + 1
            return ModelSize(width, decoder, QUERY_TOKENS, EVA_PARAMETERS, patches)
        return ModelSize(width, decoder, *_measure_vision(config, vision))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # The check of the weights says what is wrong with the folder.
        return None


def read_model_config(name: str) -> Mapping[str, Any]:
    """The config.json of a folder or of a hub's id, or what is known of a published one. OSError or
    ValueError where there is none."""
    path = find_model_folder(name) / "config.json"
    if not path.is_file() and name in PUBLISHED:
        return PUBLISHED[name].config
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _count_decoder(text: Mapping[str, Any], width: int) -> int:
    layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
    kept = int(text.get("num_key_value_heads") or heads) * width // heads
    # OPT's feed-forward networks have two matrices, LLaMA's and Qwen's three.
    ffn = 2 * text["ffn_dim"] if "ffn_dim" in text else 3 * text["intermediate_size"]
    return layers * width * (2 * width + 2 * kept + int(ffn)) + width * int(text["vocab_size"])


def _measure_vision(config: Mapping[str, Any], vision: Mapping[str, Any]) -> tuple[int, int, int]:
    """Tokens of an image, the vision encoder's parameters, and its patches."""
    wide = vision.get("hidden_size") or vision.get("embed_dim") or 0
    deep = vision.get("num_hidden_layers") or vision.get("depth") or 0
    inner = vision.get("intermediate_size") or 4 * wide
    size, patch = vision.get("image_size") or 0, vision.get("patch_size") or 1
    patches = (size // patch) ** 2
    tokens = config.get("num_query_tokens") or patches
    return int(tokens), int(deep * wide * (4 * wide + 2 * inner)), int(patches)


@dataclass(frozen=True)
class ScopeCost:
    """A scope classifier's training on ``records`` records of ``queries`` queries; of each at most
    ``tokens`` states of ``width`` are kept, in half precision. Of each record the base model first answers
    ``answered`` prompts, and ``images`` images are encoded."""

    records: int
    queries: int
    tokens: int
    width: int
    parameters: int
    memory_limit: int
    heads: int
    steps: int
    batch: int
    answered: int
    images: int

    @property
    def passes(self) -> int:
        """Forward passes, each over one prompt."""
        return self.records * (self.queries + self.answered)

    @property
    def states(self) -> int:
        """Bytes of all states."""
        return self.records * self.queries * self.tokens * self.width * 2

    @property
    def memory(self) -> int:
        """Bytes of states in memory."""
        return min(self.states, self.memory_limit)

    @property
    def disk(self) -> int:
        """Bytes of states on disk."""
        return self.states - self.memory

    @property
    def training_flops(self) -> float:
        """Of at most ``steps`` steps, an upper bound. Each head meets the parameters once a prompt, and each
        of the prompt's states twice, for its score and in the mixture: a multiplication and an addition, and
        twice as many backwards."""
        prompts = float(self.steps * self.batch * self.queries)
        return 6 * self.heads * prompts * (self.parameters + 2 * self.tokens * self.width)


def estimate_scope(hparams: HyperParams, size: ModelSize) -> ScopeCost:
    """What the YAML's scope classifier takes at most, for a model of this size."""
    # Imported late, as torch comes with it.
    from unike.methods.preparation.hard_cases import HARDER, MIXED, RESTYLED
    from unike.methods.preparation.training_cases import INSIDE, OUTSIDE

    tokens, is_hard = size.image_tokens + TEXT_TOKENS, hparams.scope_probes == "hard"
    return ScopeCost(
        hparams.scope_records,
        len(INSIDE) + len(OUTSIDE) + (HARDER if is_hard else 0),
        min(tokens, hparams.scope_tokens or tokens),
        size.width,
        count_parameters(hparams, size.width),
        int(hparams.scope_memory_gb * GB),
        hparams.scope_heads,
        hparams.scope_steps,
        hparams.scope_batch,
        # The edit's prompt, and the mixed images that may be about the same.
        1 + MIXED if is_hard else 0,
        # Look-alikes are other records' images.
        RECORD_IMAGES + (RESTYLED + MIXED if is_hard else 0),
    )


def count_parameters(hparams: HyperParams, width: int) -> int:
    """Of the YAML's scope classifier, for a decoder of this width."""
    inner = choose_inner_width(hparams, width)
    wide = inner or width
    hidden, out = hparams.scope_hidden or 2 * wide, hparams.scope_dim
    own = 2 * width + (0 if inner is None else width * inner)
    return own + 3 * (wide + 1) * wide + (2 * wide + 1) * hidden + (hidden + 1) * out


def measure_speed(hparams: HyperParams) -> float | None:
    """Floating-point operations a second of a product of two square matrices, in the model's precision and
    on its device: the best of some, as if nothing else used the machine. None where the device is not
    there."""
    import torch

    from unike.backbones.placement import pick_device

    try:
        device = pick_device(hparams.device)
        # On a CPU short enough to be seldom interrupted, elsewhere long enough to fill the device.
        side = 512 if device.type == "cpu" else 8 * 512
        one = torch.ones(side, side, dtype=getattr(torch, hparams.dtype), device=device)
        spent = []
        for _ in range(10):
            started = time.perf_counter()
            # Reading a number waits for the device.
            (one @ one)[0, 0].item()
            spent.append(time.perf_counter() - started)
    except Exception:  # the libraries' errors have no common type; the check of the device has them
        return None
    return 2 * side**3 / min(spent[1:])


def describe_costs(hparams: HyperParams, needs: MethodNeeds) -> list[Finding]:
    """Notes of bytes, parameters and seconds of what is still to be prepared: the scope classifier, and
    memory and encoders."""
    try:
        scope = needs.scope and find_scope_classifier(hparams) is None
        shipped = find_shipped_knowledge(hparams)
        knowledge = needs.knowledge and (shipped is None or bool(list_changed_options(shipped, hparams)))
        if not (scope or knowledge) or (size := read_model_size(hparams)) is None:
            return []
    except UserError:
        # The checks of the knowledge and of the scope classifier have it.
        return []
    speed = measure_speed(hparams)
    pace = "the device's speed is not known"
    if speed is not None:
        pace = f"at {speed / 1e9:.3g} GFLOP/s, a matrix product's here in {hparams.dtype}"
    pace = f"estimated from the config for {TEXT_TOKENS} tokens of text a prompt, {pace}"
    lines = _describe_knowledge(hparams, size, speed, pace) if knowledge else []
    return lines + (_describe_scope(hparams, size, speed, pace) if scope else [])


def describe_run_costs(hparams: HyperParams, edits: int | None) -> list[Finding]:
    """A note of the seconds of a run of so many edits, at most, or of one where their number is not known:
    each edit's training up to ``max_steps``, and all probes before and after, in both evaluation modes."""
    if (size := read_model_size(hparams)) is None:
        return []
    from unike.backbones.placement import pick_device

    step = 3 * size.prompt_flops * _count_trained_share(hparams)
    answers = 2 * size.decoder * hparams.max_new_tokens
    probe = 2 * (2 * size.prompt_flops + answers)
    flops = hparams.max_steps * step + PROBES * probe + RECORD_IMAGES * size.image_flops
    speed = measure_speed(hparams)
    pace = f"estimated for {PROBES} probes an edit"
    if speed is not None:
        # What `device: auto` is here.
        pace += f", at {speed / 1e9:.3g} GFLOP/s on {pick_device(hparams.device).type}"
        if hparams.dtype == "float16" and speed < _SLOW:
            pace += "; this device computes float16 slowly: try dtype=bfloat16"
    what = f"run: {edits} edits" if edits else "run: each edit"
    return [Finding(True, f"{what}, at most {_format_seconds((edits or 1) * flops, speed)}", pace)]


def _count_trained_share(hparams: HyperParams) -> float:
    """The share of the decoder that a training step runs through: the edited layers, and the head."""
    config = read_model_config(hparams.name)
    depth = int((config.get("text_config") or config)["num_hidden_layers"])
    layers = hparams.layers if isinstance(hparams.layers, int) else depth - min(hparams.layers)
    return min(1.0, (layers + 1) / depth)


def _describe_knowledge(
    hparams: HyperParams, size: ModelSize, speed: float | None, pace: str
) -> list[Finding]:
    flops = 2 * hparams.triplets * size.prompt_flops + hparams.triplets * size.image_flops
    needed = f"at most {2 * hparams.triplets} forward passes, {_format_seconds(flops, speed)}"
    return [Finding(True, f"memory and encoders: {needed}, where they are not kept yet", pace)]


def _describe_scope(hparams: HyperParams, size: ModelSize, speed: float | None, pace: str) -> list[Finding]:
    cost, place = estimate_scope(hparams, size), choose_place(str(hparams.scope_dir))
    shape = f"{cost.records} records x {cost.queries} queries x {cost.tokens} states x {cost.width}"
    kept = f"{cost.memory / GB:.2f} GB in memory, {cost.disk / GB:.2f} GB in a file in {place}"
    states = f"scope states: at most {shape} in half precision: {kept}"
    reading = cost.passes * size.prompt_flops + cost.records * cost.images * size.image_flops
    passes = f"{cost.passes} forward passes, {_format_seconds(reading, speed)}"
    steps = f"at most {cost.steps} steps, {_format_seconds(cost.training_flops, speed)}"
    what = f"scope classifier: {cost.parameters / 1e6:.1f} M parameters; {passes}; {steps}"
    return [Finding(True, states, _judge(cost, hparams, place)), Finding(True, what, pace)]


def _judge(cost: ScopeCost, hparams: HyperParams, place: Path) -> str | None:
    """What to do where the states do not fit."""
    if cost.disk > hparams.scope_disk_gb * GB:
        return f"more than scope_disk_gb: {hparams.scope_disk_gb:g}; set scope_tokens, or raise it"
    there = next(p for p in (place, *place.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    return f"only {free / GB:.2f} GB are free there; set scope_tokens" if cost.disk > free else None


def _format_seconds(flops: float, speed: float | None) -> str:
    if speed is None:
        return f"{flops:.2g} floating-point operations"
    seconds = flops / speed
    if seconds < 120:
        return f"about {seconds:.2g} s" if seconds < 10 else f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} minutes" if seconds < 7200 else f"about {seconds / 3600:.0f} hours"
