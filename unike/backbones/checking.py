"""What the files of a backbone must be: all of it is looked at before any is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unike.backbones.checkpoint_files import (
    DTYPE_BYTES,
    EVA,
    MINIGPT4,
    QFORMER_OPT,
    QFORMER_T5,
    OriginalFile,
    explain_read_errors,
    load_state,
    peek,
)
from unike.backbones.downloads import describe_download
from unike.backbones.published import PUBLISHED
from unike.config.locating import describe_search
from unike.system.findings import Finding
from unike.system.hub import find_model_folder, is_hub_id
from unike.system.text import shorten
from unike.types import BackboneSpec, UserError

Parts = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Folder:
    """A Hugging Face folder of a whole model: the ``model_type`` and decoders that its config.json may name,
    where it comes from, and what must lie in it with weights and tokenizer.

    ``parts`` are file names, of which one is enough; ``name:key`` is a key in a JSON file. ``is_published``:
    whether the hub has it.
    """

    kind: str
    decoders: tuple[str, ...]
    origin: str
    parts: Parts
    is_published: bool = True


_FILES = {
    "blip2": {"state_dict_file": EVA, "qformer_checkpoint": QFORMER_OPT},
    "minigpt4": {"state_dict_file": EVA, "qformer_checkpoint": QFORMER_T5, "pretrained_ckpt": MINIGPT4},
}
_LANGUAGE = {
    "blip2": ("opt", "an OPT folder: `facebook/opt-2.7b` from the Hugging Face hub"),
    "minigpt4": (
        "llama",
        "a Vicuna-7B V0 folder (not v1.5): `Vision-CAIR/vicuna-7b` from the Hugging Face hub, "
        "or LLaMA-7B with `lmsys/vicuna-7b-delta-v0` applied",
    ),
}
_TOKENIZER: Parts = {"tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json")}
_IMAGES: Parts = {"image processor": ("preprocessor_config.json", "processor_config.json")}
_CHAT: Parts = {
    **_IMAGES,
    "chat template": ("chat_template.jinja", "chat_template.json", "tokenizer_config.json:chat_template"),
}
_WHOLE = {
    "blip2": Folder("blip-2", ("opt",), "a BLIP-2 folder: `Salesforce/blip2-opt-2.7b`", {}),
    "minigpt4": Folder("blip-2", ("llama",), "a folder in BLIP-2's format with a LLaMA inside", {}),
    "llava": Folder(
        "llava", ("llama", "mistral", "qwen2"), "a LLaVA-1.5 folder: `llava-hf/llava-1.5-7b-hf`", _CHAT
    ),
    "llava_onevision": Folder(
        "llava_onevision",
        ("qwen2",),
        "a LLaVA-OneVision folder: `llava-hf/llava-onevision-qwen2-7b-ov-hf`",
        _CHAT,
    ),
    "qwen2_vl": Folder(
        "qwen2_vl", ("qwen2_vl_text",), "a Qwen2-VL folder: `Qwen/Qwen2-VL-7B-Instruct`", _CHAT
    ),
    "qwen2_5_vl": Folder(
        "qwen2_5_vl", ("qwen2_5_vl_text",), "a Qwen2.5-VL folder: `Qwen/Qwen2.5-VL-7B-Instruct`", _CHAT
    ),
    "instructblip": Folder(
        "instructblip",
        ("llama",),
        "an InstructBLIP folder: `Salesforce/instructblip-vicuna-7b`",
        {**_IMAGES, "Q-Former's tokenizer": ("qformer_tokenizer",)},
    ),
    "smol": Folder(
        "unike_smol",
        ("llama",),
        "the folder that `python -m scripts.real` makes",
        _IMAGES,
        is_published=False,
    ),
}
# Far above any real model.
LAYERS = 1024
# Torch's names of number types, as a config.json has them: ``float8_e4m3fn`` takes 8 bits.
_STORED_TYPE = re.compile(r"(?:b?float|u?int)(8|16|32|64)(?:_\w+)?")
# Of LAVIS's `blip2_opt`; it looks for their files itself.
_LAVIS_TYPES = ("pretrain_opt2.7b", "pretrain_opt6.7b", "caption_coco_opt2.7b", "caption_coco_opt6.7b")
# The tokeniser that LAVIS asks for is not the fast one.
_LAVIS_TOKENIZER: Parts = {"vocabulary": ("vocab.json",), "merges": ("merges.txt",)}
_FOLDER_HAS = ("state_dict_file", "qformer_checkpoint", "pretrained_ckpt", "image_size")


def get_original_files(spec: BackboneSpec) -> Mapping[str, OriginalFile]:
    """The original files that this backbone needs, by YAML key; none where it only comes as a folder."""
    return _FILES.get(spec.model_name, {})


def list_decoders(spec: BackboneSpec) -> tuple[str, ...]:
    """The families of language models that the backbone may have."""
    return _WHOLE[spec.model_name].decoders


def list_kinds() -> dict[str, tuple[str, tuple[str, ...]]]:
    """The ``model_type`` and the decoders that the config.json of each family's folder may name."""
    return {family: (folder.kind, folder.decoders) for family, folder in _WHOLE.items()}


def _check_file(key: str, value: str | None, kind: OriginalFile) -> Finding:
    if value is None:
        return Finding(False, f"{key}: is not set; expected {kind.title}", kind.remedy)
    try:
        keys = peek(Path(value), kind.title)
    except UserError as error:
        return Finding(False, f"{key}: {error}", kind.remedy)
    if missing := [name for name in kind.keys if name not in keys]:
        others = (EVA, QFORMER_OPT, QFORMER_T5, MINIGPT4)
        found = next((other.title for other in others if keys.issuperset(other.keys)), None)
        reason = f"is {found}" if found else f"has no `{missing[0]}`"
        return Finding(False, f"{key}: {value}: {reason}; expected {kind.title}", kind.remedy)
    return Finding(True, f"{key}: {value}: {kind.title}")


def _list_weight_files(folder: Path) -> list[Path]:
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
    if not os.path.isfile(path):
        raise UserError(f"{path}: is missing or not JSON")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is missing or not JSON") from error
    return content if isinstance(content, dict) else {}


def _describe_mismatch(spec: BackboneSpec, config: Mapping[str, Any], whole: bool) -> str | None:
    """Why a folder's model isn't the one that the spec needs."""
    kind, wanted = config.get("model_type"), _WHOLE[spec.model_name]
    if whole:
        if kind != wanted.kind:
            hint = "with a language model alone, state_dict_file and qformer_checkpoint name the vision side"
            return f"holds a `{kind}` model" + (f"; {hint}" if get_original_files(spec) else "")
        text = config.get("text_config") or config
        # Transformers would build its default, of 7B parameters. Qwen2-VL's lies flat.
        if text is config and "hidden_size" not in config:
            return "has a config.json without text_config"
        if text is not config and text.get("model_type", wanted.decoders[0]) not in wanted.decoders:
            return f"has a `{text['model_type']}` language model, which does not fit {spec.model_name}"
        if text.get("use_sliding_window"):
            return "mixes layers with and without a sliding window, which edits cannot distinguish"
        return None
    if kind == "blip-2":
        return "holds a whole BLIP-2 model; leave out state_dict_file and qformer_checkpoint to use it"
    language = _LANGUAGE[spec.model_name][0]
    return None if kind == language else f"holds a `{kind}` model, not `{language}`"


def _require_buildable(folder: Path, config: Mapping[str, Any]) -> None:
    """Transformers would build as many layers as a configuration claims, for hours."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        # Qwen's vision towers have a depth.
        for name in ("num_hidden_layers", "depth"):
            layers = part.get(name, 0)
            if not isinstance(layers, int) or layers > LAYERS:
                raise UserError(
                    f"{folder}: config.json has {name} {shorten(layers)}; expected at most {LAYERS}"
                )


def _has_part(folder: Path, part: str) -> bool:
    """Whether a folder has a file, or in a JSON file (``name:key``) a key."""
    name, _, key = part.partition(":")
    try:
        return (folder / name).exists() and (not key or key in _read_json(folder / name))
    except UserError:
        return False


def _check_folder(spec: BackboneSpec, whole: bool) -> list[Finding]:
    """The Hugging Face folder: of the ``whole`` model, or of the language model alone."""
    folder, model = Path(spec.name), _WHOLE[spec.model_name]
    whose = f"{model.origin} from the Hugging Face hub" if model.is_published else model.origin
    origin = whose if whole else _LANGUAGE[spec.model_name][1]
    at, expected = f"name: {spec.name}", f"expected {origin}"
    if not folder.exists():
        if is_hub_id(spec.name):
            return _check_id(spec, whole, expected)
        absent = f"{at}: does not exist{describe_search(spec.name, spec.source)}"
        return [Finding(False, absent, expected)]
    if not folder.is_dir():
        return [Finding(False, f"{at}: is a file, not a folder", expected)]
    try:
        with explain_read_errors(f"{folder}: is damaged"):
            config = _read_json(folder / "config.json")
            if wrong := _describe_mismatch(spec, config, whole):
                raise UserError(f"{folder}: {wrong}")
            _require_buildable(folder, config)
            for file in _list_weight_files(folder):
                peek(file, "weights")
            text = (config.get("text_config") if whole else config) or {}
            context = int(text.get("max_position_embeddings", 0))
    except UserError as error:
        return [Finding(False, f"name: {error}", expected), *_list_missing_parts(spec, whole)]
    if lost := _list_missing_parts(spec, whole):
        return lost
    findings = [Finding(True, f"{at}: `{config['model_type']}`")]
    # Vicuna v1.5 comes from LLaMA-2 and shows it by its context; V0 and v1.1 have 2048 tokens.
    if spec.model_name == "minigpt4" and context > 2048:
        what = f"{at}: has a context of {context} tokens, like Vicuna v1.5"
        findings.append(Finding(True, what, f"pretrained_minigpt4_7b.pth belongs to {origin}"))
    return findings


def _check_id(spec: BackboneSpec, whole: bool, expected: str) -> list[Finding]:
    """A model named by its id on the hub: in the hub's cache, or still to be downloaded."""
    folder = find_model_folder(spec.name)
    try:
        if os.path.isdir(folder):
            if wrong := _describe_mismatch(spec, _read_json(folder / "config.json"), whole):
                return [Finding(False, f"name: {spec.name}: {wrong}", expected)]
            _list_weight_files(folder)
            return [Finding(True, f"name: {spec.name}: is in the Hugging Face hub's cache")]
    except UserError:
        # Its configuration alone is there.
        pass
    return [describe_download(spec.name)]


def _list_missing_parts(spec: BackboneSpec, whole: bool) -> list[Finding]:
    """What a folder lacks, its weights aside."""
    tokenizer = _LAVIS_TOKENIZER if spec.backend == "lavis" else _TOKENIZER
    parts = tokenizer | (_WHOLE[spec.model_name].parts if whole else {})
    return [
        Finding(False, f"name: {spec.name}: holds no {what}", f"expected one of {', '.join(names)}")
        for what, names in parts.items()
        if not any(_has_part(Path(spec.name), name) for name in names)
    ]


def _list_unfit_keys(spec: BackboneSpec) -> list[Finding]:
    """Keys of the YAML that a backbone which only comes as a folder has no use for."""
    given = {key: getattr(spec, key) for key in (*_FOLDER_HAS, "vision_config", "qformer_config")}
    what = f"{spec.model_name} comes as a Hugging Face folder, which has its own"
    return [Finding(False, f"{key}: {what}", f"leave {key} out") for key, value in given.items() if value]


def check_spec(spec: BackboneSpec) -> list[Finding]:
    """Whether the backend can be had here, and every weight file that the spec needs, looked at by its keys
    (only pre-1.6 pickles are read whole)."""
    return [*_check_backend(spec), *_check_weights(spec)]


def _check_weights(spec: BackboneSpec) -> list[Finding]:
    if spec.backend == "lavis" and not spec.original_files:
        return [_check_type(spec.name)]
    if not get_original_files(spec):
        return [*_list_unfit_keys(spec), *_check_folder(spec, whole=True)]
    original = spec.original_files or spec.pretrained_ckpt is not None
    findings = []
    if original:
        findings = [
            _check_file(key, getattr(spec, key), kind) for key, kind in get_original_files(spec).items()
        ]
    return findings + _check_folder(spec, whole=not original)


def _check_backend(spec: BackboneSpec) -> list[Finding]:
    """Whether this environment is the backend's, and what the YAML asks of LAVIS that it has not."""
    at = f"backend: {spec.backend}"
    if spec.backend != "lavis":
        found = metadata.version("transformers")
        what = f"{at}: finds transformers {found}, as LAVIS needs it"
        recent = int(found.partition(".")[0]) >= 5
        return [] if recent else [Finding(False, what, "pip install '.', in another environment")]
    lost = find_spec("lavis") is None
    remedy = "pip install -r requirements-lavis.txt, in an environment of its own"
    problems = [Finding(False, f"{at}: salesforce-lavis is not installed", remedy)] if lost else []
    if spec.model_name != "blip2":
        problems.append(Finding(False, f"{at}: has no {spec.model_name}", "expected model_name: blip2"))
    unfit: dict[str, Any] = {"device_map": spec.device_map, "pretrained_ckpt": spec.pretrained_ckpt}
    if spec.quantization != "none":
        unfit["quantization"] = spec.quantization
    if not spec.original_files:
        unfit |= {key: getattr(spec, key) for key in ("image_size", "vision_config", "qformer_config")}
    return problems + [
        Finding(False, f"{key}: {value}: not with {at}", f"leave {key} out")
        for key, value in unfit.items()
        if value
    ]


def _check_type(name: str) -> Finding:
    """A model that LAVIS knows by name."""
    if name in _LAVIS_TYPES:
        return Finding(True, f"name: {name}: a model type of LAVIS", "LAVIS downloads what it does not find")
    or_folder = "or an OPT folder with state_dict_file and qformer_checkpoint"
    expected = f"expected {', '.join(_LAVIS_TYPES)}, {or_folder}"
    return Finding(False, f"name: {name}: is no model type of LAVIS", expected)


def require_files(spec: BackboneSpec) -> None:
    """Raises one ``UserError`` with all that is wrong with the spec's files."""
    bad = [finding for finding in check_spec(spec) if not finding.ok]
    if bad:
        raise UserError(*(f"{spec.source}: {f.line}" for f in bad))


def _measure_free_memory() -> int | None:
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


def count_published_parameters(spec: BackboneSpec) -> int | None:
    """How many numbers the spec's model has as published, whatever files are here; None for another one."""
    originals = get_original_files(spec) if spec.original_files else {}
    if spec.name not in PUBLISHED or not all(kind.parameters for kind in originals.values()):
        return None
    return PUBLISHED[spec.name].parameters + sum(kind.parameters for kind in originals.values())


def count_parameters(spec: BackboneSpec) -> int:
    """How many numbers the spec's weight files hold; of a published model that is not here, as published.
    UserError for files that are missing or damaged."""
    originals = get_original_files(spec) if spec.original_files else {}
    count = sum(_count_original(getattr(spec, key), kind) for key, kind in originals.items())
    folder = find_model_folder(spec.name)
    if not os.path.isdir(folder) and spec.name in PUBLISHED:
        return count + PUBLISHED[spec.name].parameters
    config = _read_json(folder / "config.json")
    stored = _STORED_TYPE.fullmatch(str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    width = int(stored[1]) // 8 if stored else 4
    return count + sum(file.stat().st_size // width for file in _list_weight_files(folder))


def _count_original(path: str | None, kind: OriginalFile) -> int:
    """How many numbers an original file holds: as published, where it is not there."""
    if path is not None and not os.path.exists(path) and kind.parameters:
        return kind.parameters
    return sum(tensor.numel() for tensor in load_state(path or "", kind.title).values())


def format_size(count: int) -> str:
    """Bytes in GB or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def estimate_memory(spec: BackboneSpec) -> Finding:
    """Whether the weights, in ``spec.dtype``, fit into the memory that is free now."""
    if spec.dtype not in DTYPE_BYTES:
        return Finding(
            False, f"dtype: `{spec.dtype}` is unknown", f"expected one of {', '.join(DTYPE_BYTES)}"
        )
    try:
        needed = count_parameters(spec) * DTYPE_BYTES[spec.dtype]
    except UserError as error:
        return Finding(True, "memory: cannot be estimated before the files are there", error.problems[0])
    free, amount = _measure_free_memory(), f"memory: the weights take {format_size(needed)} in {spec.dtype}"
    if free is None:
        return Finding(True, f"{amount}; this system does not say how much is free")
    smaller = "free some memory" + ("" if spec.dtype != "float32" else ", or halve it with dtype: bfloat16")
    return Finding(
        needed <= free, f"{amount}, {format_size(free)} are free", smaller if needed > free else None
    )
