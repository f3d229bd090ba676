"""The original files of a backbone: what each must hold, and reading them."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from unike.system.faults import out_of_memory
from unike.system.text import one_line, shorten
from unike.types import UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_LAVIS = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
_QFORMER_KEYS = (
    "query_tokens",
    "ln_vision.weight",
    "Qformer.bert.encoder.layer.0.attention.self.query.weight",
)
BROKEN = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    EOFError,
    AttributeError,
    TypeError,
    pickle.UnpicklingError,
    SafetensorError,
)


@dataclass(frozen=True)
class Finding:
    """One line of a check: ``ok`` with a ``remedy`` is a note, not ``ok`` stops the run."""

    ok: bool
    what: str
    remedy: str | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of original file: what it is, the keys that give it away, where it comes from."""

    title: str
    keys: tuple[str, ...]
    remedy: str


EVA = Kind(
    "EVA ViT-g of LAVIS (eva_vit_g.pth)",
    ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    f"get {_LAVIS}eva_vit_g.pth",
)
QFORMER_OPT = Kind(
    "BLIP-2's Q-Former for OPT (blip2_pretrained_opt2.7b.pth)",
    (*_QFORMER_KEYS, "opt_proj.weight"),
    f"get {_LAVIS}blip2_pretrained_opt2.7b.pth",
)
QFORMER_T5 = Kind(
    "BLIP-2's Q-Former for FlanT5-xxl (blip2_pretrained_flant5xxl.pth)",
    (*_QFORMER_KEYS, "t5_proj.weight"),
    f"get {_LAVIS}blip2_pretrained_flant5xxl.pth",
)
MINIGPT4 = Kind(
    "MiniGPT-4's projection (pretrained_minigpt4_7b.pth)",
    ("llama_proj.weight", "llama_proj.bias"),
    "get the `MiniGPT-4 (Vicuna 7B)` checkpoint linked in https://github.com/Vision-CAIR/MiniGPT-4",
)


# ---------------------------------------------------------------- reading files


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever a library makes of a damaged file inside the block becomes a UserError that says ``what``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tokenizers raises nothing but Exception itself
        if out_of_memory(error):
            raise
        raise UserError(f"{what}: {one_line(error) or type(error).__name__}") from error


def refuse_by_first_bytes(path: Path, expected: str) -> None:
    """Names the usual wrong files: torch's own messages for them say nothing."""
    if path.is_dir():
        raise UserError(f"{path}: is a directory; expected {expected}")
    if not path.is_file():
        raise UserError(f"{path}: does not exist; expected {expected}")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise UserError(f"{path}: is empty (an interrupted download?); expected {expected}")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer, not the file itself; expected {expected}")
    if path.suffix == ".safetensors":
        return
    if head.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: is truncated (an interrupted download?); expected {expected}")
        _refuse_bombs(path, expected)
    elif not head.startswith(b"\x80"):
        kind = "a web page" if head.lstrip()[:1] == b"<" else "not a checkpoint"
        raise UserError(f"{path}: is {kind}; expected {expected}")


def _refuse_bombs(path: Path, expected: str) -> None:
    """Torch stores what it writes as it is, so an archive that would unpack to more was made to harm."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: is damaged; expected {expected}") from error
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    claimed, there = sum(entry.file_size for entry in entries), path.stat().st_size
    if packed or claimed > there:
        reason = (
            f"claims {claimed} bytes in {there}" if claimed > there else "is compressed, as torch's never are"
        )
        raise UserError(f"{path}: {reason}; expected {expected}")


def _held(tensor: Tensor) -> bool:
    """Whether the file holds all numbers of a tensor: strides of 0 would claim any number of them."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def load_state(path: str | os.PathLike[str], expected: str = "a checkpoint of tensors") -> dict[str, Tensor]:
    """The tensors of a ``.pth``/``.pt``/``.bin``/``.safetensors`` file by name, memory-mapped if possible.

    Wrappers such as ``{"model": ...}`` are taken off. Code in a pickle is refused, never run.
    """
    path = Path(path)
    refuse_by_first_bytes(path, expected)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Files from before torch 1.6 are bare pickles, which cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        refused = "weights" in str(error).lower()
        reason = "holds code or objects other than tensors, and was not run" if refused else "is damaged"
        raise UserError(f"{path}: {reason}; expected {expected}") from error
    except BROKEN as error:
        raise UserError(f"{path}: is truncated or not a checkpoint; expected {expected}") from error
    for wrapper in ("model", "module", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    tensors = content.items() if isinstance(content, Mapping) else ()
    state = {str(key): value for key, value in tensors if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path}: holds no named tensors; expected {expected}")
    if lost := next((name for name, tensor in state.items() if not _held(tensor)), None):
        raise UserError(f"{path}: does not hold all numbers of `{shorten(lost)}`; expected {expected}")
    return state


def peek(path: Path, expected: str) -> set[str]:
    """A file's keys, without reading its tensors where the format allows it."""
    if path.suffix != ".safetensors":
        return set(load_state(path, expected))
    refuse_by_first_bytes(path, expected)
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except BROKEN as error:
        raise UserError(f"{path}: is truncated or not a checkpoint; expected {expected}") from error
