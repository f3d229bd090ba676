"""Where a backbone's weights lie: one device, or several for a model larger than one; int8 and int4."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from unike.system import processes
from unike.types import BackboneSpec, UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

# Torch takes seconds to import: it is imported where a device is looked for.

DeviceMap = dict[str, int | str]
# The parts of a vision side, whatever the model.
VISION = ("vision_model", "qformer", "language_projection", "vision_tower", "multi_modal_projector", "visual")
# What stays in its own type under `quantization`: bitsandbytes is for language models.
UNQUANTIZED = (*VISION, "lm_head")
# What activations and the edits themselves need in addition to the weights.
_FREE_SHARE = 0.9


def check_device(wanted: str) -> None:
    """UserError where the wanted device is not there. ``auto`` and ``cpu`` always are."""
    if wanted not in ("auto", "cpu"):
        pick_device(wanted)


def pick_device(wanted: str) -> torch.device:
    """``auto`` takes this process's accelerator where there is one (CUDA, MPS, XPU, ...), as
    ``accelerate`` picks it; UserError where the wanted device is not there."""
    import torch

    if wanted == "auto":
        device: torch.device = processes.get_default_device()
        return device
    device = torch.device(wanted)
    found = _count_devices(device.type)
    if device.type != "cpu" and (device.index or 0) >= found:
        raise UserError(
            f"device: {wanted}; found {found} {device.type.upper()} devices, expected auto or cpu"
        )
    if processes.has_joined() and device.type == processes.get_default_device().type:
        return pick_device("auto")
    return device


def _count_devices(kind: str) -> int:
    """Devices of a kind; 0 of one that this torch does not know."""
    import torch

    try:
        return int(torch.get_device_module(kind).device_count())
    except RuntimeError:
        return 0


def check_placement(spec: BackboneSpec, process_count: int | None = None) -> None:
    """UserError, one line per problem, for what ``device_map`` and ``quantization`` can't do here.

    ``process_count`` is that of the run, None for that of the processes at work.
    """
    problems = []
    if spec.device_map is not None:
        if spec.device != "auto":
            problems.append(f"device_map: {spec.device_map}: expected device: auto, got {spec.device}")
        if (process_count or processes.count()) > 1:
            problems.append(f"device_map: {spec.device_map}: takes all devices; expected one process")
    if spec.quantization != "none":
        at = f"quantization: {spec.quantization}"
        if spec.device_map is not None:
            problems.append(f"{at}: expected device_map: null, got {spec.device_map}")
        if spec.device == "cpu" or not _has_cuda():
            problems.append(f"{at}: needs a CUDA device; expected quantization: none on this one")
        if find_spec("bitsandbytes") is None:
            problems.append(f"{at}: bitsandbytes is not installed; pip install 'unike[quantization]'")
    if problems:
        raise UserError(*(f"{spec.source}: {problem}" for problem in problems))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def build_quantization_config(spec: BackboneSpec, dtype: torch.dtype) -> Any:
    """``BitsAndBytesConfig`` of the spec, None for plain weights: LLM.int8(), or NF4 that computes in
    ``dtype``. Linear modules of the language model only, without its head."""
    if spec.quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(UNQUANTIZED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(UNQUANTIZED),
    )


# ---------------------------------------------------------------- several devices


def map_devices(
    model: Any, dtype: torch.dtype, last: int, limits: Mapping[int, int] | None = None
) -> DeviceMap:
    """Which device each part of a model goes to, for ``accelerate``; on a machine without
    accelerators ``{"": "cpu"}``.

    The ``last`` decoder layers stay with embeddings, final norm and head on the first device, so that
    edits, and all that they read, lie on one: a suffix never crosses devices. What lies below, and
    the vision side, fills the devices in forward order. ``limits`` are bytes by device; None: what is
    free now. UserError where the model does not fit; nothing is left to the CPU or the disk.
    """
    from accelerate.utils import compute_module_sizes, get_max_memory

    if limits is None:
        found = {k: v for k, v in get_max_memory().items() if isinstance(k, int) or k == "mps"}
        limits = {k: int(v * _FREE_SHARE) for k, v in found.items()}
    if not limits:
        return {"": "cpu"}
    sizes = compute_module_sizes(model, dtype=dtype)
    # BLIP-2 names its whole language model, which then names its own decoder.
    stack = model.get_decoder().get_decoder().layers
    decoder = next(f"{name}." for name, module in model.named_modules() if module is stack)

    def is_at_home(name: str) -> bool:
        if name.startswith(decoder):
            return int(name.removeprefix(decoder).split(".")[0]) >= len(stack) - last
        # A model's own parameters (query tokens) lie where accelerate's hook of the whole puts them.
        return not set(name.split(".")) & set(VISION)

    units = list(_list_units(model))
    home, left = next(iter(limits)), dict(limits)
    placed: DeviceMap = {name: home for name in units if is_at_home(name)}
    # Tied weights (OPT's head and embeddings) count twice here, which errs on the safe side.
    left[home] -= sum(sizes[name] for name in placed)
    devices = iter(limits)
    device: Any = next(devices)
    for name in (name for name in units if name not in placed):
        while device is not None and sizes[name] > left[device]:
            device = next(devices, None)
        if device is None:
            break
        placed[name], left[device] = device, left[device] - sizes[name]
    if left[home] < 0 or device is None:
        needed, there = sizes[""] / 1e9, sum(limits.values()) / 1e9
        raise UserError(
            f"device_map: auto: the weights take {needed:.1f} GB and do not fit the {len(limits)} devices' "
            f"{there:.1f} GB; expected more devices, dtype: bfloat16 or a smaller model"
        )
    return {name: placed[name] for name in units}


def _list_units(module: nn.Module, at: str = "") -> Iterator[str]:
    """What is not split, in forward order: items of module lists, the modules after and before these,
    and parameters that belong to no smaller module."""
    from torch import nn

    if not any(isinstance(m, nn.ModuleList) for m in module.modules()):
        yield at.removesuffix(".")
        return
    yield from (f"{at}{name}" for name, _ in module.named_parameters(recurse=False))
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from (f"{at}{name}.{i}" for i in range(len(child)))
        else:
            yield from _list_units(child, f"{at}{name}.")


def dispatch(model: Any, placed: DeviceMap, force_hooks: bool = False) -> Any:
    """A model that is loaded already, moved to its devices; with ``force_hooks``, accelerate's hooks are
    set where there is but one, too."""
    if placed == {"": "cpu"}:
        return model
    from accelerate import dispatch_model

    embeddings = next(name for name in placed if name.startswith("language_model."))
    with warnings.catch_warnings():
        # Parameters have no module of their own name; the hook of the whole places them.
        warnings.filterwarnings("ignore", message=".*do not match any submodules")
        return dispatch_model(
            model,
            placed,
            main_device=placed[embeddings],
            skip_keys=model._skip_keys_device_placement,
            force_hooks=force_hooks,
        )
