"""What the weight files of a backbone must be: reading them, and checking all before loading any."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from unike.faults import out_of_memory
from unike.options import short
from unike.text import one_line
from unike.types import BackboneSpec, UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Far above any real model.
LAYERS = 1024

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


_EVA = Kind(
    "EVA ViT-g of LAVIS (eva_vit_g.pth)",
    ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    f"get {_LAVIS}eva_vit_g.pth",
)
_QFORMER_OPT = Kind(
    "BLIP-2's Q-Former for OPT (blip2_pretrained_opt2.7b.pth)",
    (*_QFORMER_KEYS, "opt_proj.weight"),
    f"get {_LAVIS}blip2_pretrained_opt2.7b.pth",
)
_QFORMER_T5 = Kind(
    "BLIP-2's Q-Former for FlanT5-xxl (blip2_pretrained_flant5xxl.pth)",
    (*_QFORMER_KEYS, "t5_proj.weight"),
    f"get {_LAVIS}blip2_pretrained_flant5xxl.pth",
)
_MINIGPT4 = Kind(
    "MiniGPT-4's projection (pretrained_minigpt4_7b.pth)",
    ("llama_proj.weight", "llama_proj.bias"),
    "get the `MiniGPT-4 (Vicuna 7B)` checkpoint linked in https://github.com/Vision-CAIR/MiniGPT-4",
)
_FILES = {
    "blip2": {"state_dict_file": _EVA, "qformer_checkpoint": _QFORMER_OPT},
    "minigpt4": {"state_dict_file": _EVA, "qformer_checkpoint": _QFORMER_T5, "pretrained_ckpt": _MINIGPT4},
}
_LANGUAGE = {
    "blip2": ("opt", "an OPT folder: `facebook/opt-2.7b` from the Hugging Face hub"),
    "minigpt4": (
        "llama",
        "a Vicuna-7B V0 folder (not v1.5): `Vision-CAIR/vicuna-7b` from the Hugging Face hub, "
        "or LLaMA-7B with `lmsys/vicuna-7b-delta-v0` applied",
    ),
}
_WHOLE = {
    "blip2": "a BLIP-2 folder: `Salesforce/blip2-opt-2.7b` from the Hugging Face hub",
    "minigpt4": "a folder in BLIP-2's format with a LLaMA inside, or the original files by their three keys",
}


def _family(spec: BackboneSpec) -> str:
    plain = re.sub(r"[^a-z0-9]", "", spec.model_name.lower())
    return "minigpt4" if plain.startswith("minigpt4") else "blip2"


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


def _refuse_by_first_bytes(path: Path, expected: str) -> None:
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
    _refuse_by_first_bytes(path, expected)
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
        raise UserError(f"{path}: does not hold all numbers of `{short(lost)}`; expected {expected}")
    return state


def _peek(path: Path, expected: str) -> set[str]:
    """A file's keys, without reading its tensors where the format allows it."""
    if path.suffix != ".safetensors":
        return set(load_state(path, expected))
    _refuse_by_first_bytes(path, expected)
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except BROKEN as error:
        raise UserError(f"{path}: is truncated or not a checkpoint; expected {expected}") from error


# ---------------------------------------------------------------- checking before loading


def original_kinds(spec: BackboneSpec) -> Mapping[str, Kind]:
    """The original files that this backbone needs, by YAML key."""
    return _FILES[_family(spec)]


def _check_file(key: str, value: str | None, kind: Kind) -> Finding:
    if value is None:
        return Finding(False, f"{key}: is not set; expected {kind.title}", kind.remedy)
    try:
        keys = _peek(Path(value), kind.title)
    except UserError as error:
        return Finding(False, f"{key}: {error}", kind.remedy)
    if missing := [name for name in kind.keys if name not in keys]:
        others = (_EVA, _QFORMER_OPT, _QFORMER_T5, _MINIGPT4)
        found = next((other.title for other in others if keys.issuperset(other.keys)), None)
        reason = f"is {found}" if found else f"has no `{missing[0]}`"
        return Finding(False, f"{key}: {value}: {reason}; expected {kind.title}", kind.remedy)
    return Finding(True, f"{key}: {value}: {kind.title}")


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read, in its order of preference; every shard must be there."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
            absent = [shard for shard in shards if not (folder / shard).is_file()]
            if absent or not shards:
                raise UserError(f"{folder}: lacks {', '.join(absent) or 'every shard'} of {index.name}")
            return [folder / shard for shard in shards]
    raise UserError(f"{folder}: holds no weights (model.safetensors or pytorch_model.bin)")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is missing or not JSON") from error
    return content if isinstance(content, dict) else {}


def _wrong_model(spec: BackboneSpec, config: Mapping[str, Any], whole: bool) -> str | None:
    """Why a folder's model isn't the one that the spec needs."""
    kind = config.get("model_type")
    if whole:
        if kind != "blip-2":
            return (
                f"holds a `{kind}` model; with a language model alone, state_dict_file and "
                "qformer_checkpoint name the vision side"
            )
        text = (config.get("text_config") or {}).get("model_type", "opt")
        return f"has a `{text}` language model, which is no decoder" if text == "t5" else None
    if kind == "blip-2":
        return "holds a whole BLIP-2 model; leave out state_dict_file and qformer_checkpoint to use it"
    wanted = _LANGUAGE[_family(spec)][0]
    return None if kind == wanted else f"holds a `{kind}` model, not `{wanted}`"


def _require_buildable(folder: Path, config: Mapping[str, Any]) -> None:
    """Transformers would build as many layers as a configuration claims, for hours."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        layers = part.get("num_hidden_layers", 0)
        if not isinstance(layers, int) or layers > LAYERS:
            raise UserError(
                f"{folder}: config.json has num_hidden_layers {short(layers)}; expected at most {LAYERS}"
            )


def _check_folder(spec: BackboneSpec, whole: bool) -> list[Finding]:
    """The Hugging Face folder: of the ``whole`` model, or of the language model alone."""
    folder, expected = Path(spec.name), _WHOLE[_family(spec)] if whole else _LANGUAGE[_family(spec)][1]
    at = f"name: {spec.name}"
    if not folder.exists():
        # Hub owners have no underscore, and a folder that is there makes `a/b` a path.
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*/[\w.-]+", spec.name) and not folder.parent.is_dir():
            what = f"{at}: is no local folder; the Hugging Face hub will be asked for it"
            return [Finding(True, what, "to stay offline, name the folder of a download")]
        return [Finding(False, f"{at}: does not exist", f"expected {expected}")]
    if not folder.is_dir():
        return [Finding(False, f"{at}: is a file, not a folder", f"expected {expected}")]
    try:
        with reading(f"{folder}: is damaged"):
            config = _read_json(folder / "config.json")
            if wrong := _wrong_model(spec, config, whole):
                raise UserError(f"{folder}: {wrong}")
            _require_buildable(folder, config)
            for file in _weight_files(folder):
                _peek(file, "weights")
            text = (config.get("text_config") if whole else config) or {}
            context = int(text.get("max_position_embeddings", 0))
    except UserError as error:
        return [Finding(False, f"name: {error}", f"expected {expected}")]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return [Finding(False, f"{at}: holds no tokenizer", f"expected {expected}")]
    findings = [Finding(True, f"{at}: `{config['model_type']}`")]
    # Vicuna v1.5 comes from LLaMA-2 and shows it by its context; V0 and v1.1 have 2048 tokens.
    if _family(spec) == "minigpt4" and context > 2048:
        what = f"{at}: has a context of {context} tokens, like Vicuna v1.5"
        findings.append(Finding(True, what, f"pretrained_minigpt4_7b.pth belongs to {expected}"))
    return findings


def check_spec(spec: BackboneSpec) -> list[Finding]:
    """Every weight file that the spec needs, looked at by its keys (only pre-1.6 pickles are read whole)."""
    original = spec.original_files or spec.pretrained_ckpt is not None
    findings = []
    if original:
        findings = [_check_file(key, getattr(spec, key), kind) for key, kind in original_kinds(spec).items()]
    return findings + _check_folder(spec, whole=not original)


def require_files(spec: BackboneSpec) -> None:
    """Raises one ``UserError`` with all that is wrong with the spec's files."""
    bad = [finding for finding in check_spec(spec) if not finding.ok]
    if bad:
        raise UserError(*(f"{spec.source}: {f.what}" + (f"; {f.remedy}" if f.remedy else "") for f in bad))


def _free_bytes() -> int | None:
    """Memory that can be had now: the kernel's estimate, or this container's limit if that is less."""
    limits = []
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        limits = [int(kib) * 1024 for kib in re.findall(r"^MemAvailable:\s+(\d+) kB", meminfo, re.M)]
        limits += [int(n) for n in re.findall(r"^\d+", Path("/sys/fs/cgroup/memory.max").read_text())]
    except OSError:
        pass
    if not limits:
        try:
            limits = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
        except (AttributeError, ValueError, OSError):
            return None
    return min(limits)


def _stored_numbers(spec: BackboneSpec) -> int:
    """How many numbers the spec's weight files hold."""
    originals = original_kinds(spec) if spec.original_files else {}
    states = (load_state(getattr(spec, key) or "", kind.title) for key, kind in originals.items())
    count = sum(tensor.numel() for state in states for tensor in state.values())
    folder = Path(spec.name)
    config = _read_json(folder / "config.json")
    stored = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), None)
    width = stored.itemsize if isinstance(stored, torch.dtype) else 4
    return count + sum(file.stat().st_size // width for file in _weight_files(folder))


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def memory_finding(spec: BackboneSpec) -> Finding:
    """Whether the weights, in ``spec.dtype``, fit into the memory that is free now."""
    if spec.dtype not in DTYPES:
        return Finding(False, f"dtype: `{spec.dtype}` is unknown", f"expected one of {', '.join(DTYPES)}")
    try:
        needed = _stored_numbers(spec) * DTYPES[spec.dtype].itemsize
    except UserError as error:
        return Finding(True, "memory: cannot be estimated before the files are there", error.problems[0])
    free, amount = _free_bytes(), f"memory: the weights take {_size(needed)} in {spec.dtype}"
    if free is None:
        return Finding(True, f"{amount}; this system does not say how much is free")
    smaller = "free some memory" + ("" if spec.dtype != "float32" else ", or halve it with dtype: bfloat16")
    return Finding(needed <= free, f"{amount}, {_size(free)} are free", smaller if needed > free else None)
