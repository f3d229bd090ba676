"""The original files of a backbone: what each must hold, and reading them."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from unike.system.faults import is_out_of_memory
from unike.system.text import one_line, shorten
from unike.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Torch takes seconds to import: it is imported where tensors are read, not where a file is missing.

# Bytes of a number, by the names that ``dtype`` in a YAML may have.
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

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
class OriginalFile:
    """A kind of original file: what it is, the keys that give it away, where it comes from, and how many of
    its numbers become part of a model."""

    title: str
    keys: tuple[str, ...]
    remedy: str
    parameters: int = 0


EVA = OriginalFile(
    "EVA ViT-g of LAVIS (eva_vit_g.pth)",
    ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    f"get {_LAVIS}eva_vit_g.pth",
    986_000_000,
)
QFORMER_OPT = OriginalFile(
    "BLIP-2's Q-Former for OPT (blip2_pretrained_opt2.7b.pth)",
    (*_QFORMER_KEYS, "opt_proj.weight"),
    f"get {_LAVIS}blip2_pretrained_opt2.7b.pth",
    107_000_000,
)
QFORMER_T5 = OriginalFile(
    "BLIP-2's Q-Former for FlanT5-xxl (blip2_pretrained_flant5xxl.pth)",
    (*_QFORMER_KEYS, "t5_proj.weight"),
    f"get {_LAVIS}blip2_pretrained_flant5xxl.pth",
    105_000_000,
)
MINIGPT4 = OriginalFile(
    "MiniGPT-4's projection (pretrained_minigpt4_7b.pth)",
    ("llama_proj.weight", "llama_proj.bias"),
    "get the `MiniGPT-4 (Vicuna 7B)` checkpoint linked in https://github.com/Vision-CAIR/MiniGPT-4",
    3_150_000,
)


def get_dtype(name: str) -> torch.dtype:
    """Torch's type of the ``name``, one of ``DTYPE_BYTES``."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


# ---------------------------------------------------------------- reading files


@contextmanager
def explain_read_errors(what: str) -> Iterator[None]:
    """Whatever a library makes of a damaged file inside the block becomes a UserError that says ``what``."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # tokenizers raises nothing but Exception itself
        if is_out_of_memory(error):
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


def _is_stored_whole(tensor: Tensor) -> bool:
    """Whether the file holds all numbers of a tensor: strides of 0 would claim any number of them."""
    import torch

    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def load_state(path: str | os.PathLike[str], expected: str = "a checkpoint of tensors") -> dict[str, Tensor]:
    """The tensors of a ``.pth``/``.pt``/``.bin``/``.safetensors`` file by name, memory-mapped if possible.

    Wrappers such as ``{"model": ...}`` are taken off. Code in a pickle is refused, never run.
    """
    path = Path(path)
    refuse_by_first_bytes(path, expected)
    import torch
    from safetensors.torch import load_file

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
    state = {str(key): value for key, value in tensors if isinstance(value, torch.Tensor)}
    if not state:
        raise UserError(f"{path}: holds no named tensors; expected {expected}")
    if lost := next((name for name, tensor in state.items() if not _is_stored_whole(tensor)), None):
        raise UserError(f"{path}: does not hold all numbers of `{shorten(lost)}`; expected {expected}")
    return state


def peek(path: Path, expected: str) -> set[str]:
    """A file's keys, without reading its tensors where the format allows it."""
    if path.suffix != ".safetensors":
        return set(load_state(path, expected))
    refuse_by_first_bytes(path, expected)
    try:
        # Keys are the same for every framework, and numpy is imported faster than torch.
        with safe_open(path, framework="numpy") as file:
            return set(file.keys())
    except BROKEN as error:
        raise UserError(f"{path}: is truncated or not a checkpoint; expected {expected}") from error
