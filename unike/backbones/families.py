"""Which family a model belongs to, and how it was published, from its ``config.json`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unike.backbones.checking import list_kinds
from unike.backbones.checkpoint_files import DTYPE_BYTES
from unike.backbones.published import PUBLISHED
from unike.system.hub import find_model_folder, read_model_config
from unike.system.text import one_line
from unike.types import UserError

# OPT's token of a line break: BLIP2-OPT's configurations have it as the end token.
_OPT_LINE_BREAK = 50118


@dataclass(frozen=True)
class Published:
    """A model as published: its family, the precision of its weights, and what ends its answers (one of
    ``unike.types.ANSWER_ENDS``)."""

    model_name: str
    dtype: str
    answer_end: str


def find_published(name: str, model_name: str | None = None) -> Published:
    """What the ``config.json`` of a folder, or of an id of the hub, says. ``model_name`` is the family, where
    it is known already.

    UserError, in one line, for a model that belongs to no family, and where there is no such file.
    """
    config = _read_config(name)
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    family = model_name or _find_family(name, config, text)
    is_opt = text.get("model_type") == "opt" and text.get("eos_token_id") == _OPT_LINE_BREAK
    return Published(family, _read_dtype(config, text), "line_break" if is_opt else "eos")


def _read_config(name: str) -> Mapping[str, Any]:
    known = PUBLISHED.get(name)
    if known is not None and not (find_model_folder(name) / "config.json").is_file():
        return {**known.config, "dtype": known.stored}
    return read_model_config(name)


def _find_family(name: str, config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    kind, decoder = config.get("model_type"), None if text is config else text.get("model_type")
    kinds = list_kinds()
    # BLIP-2's format is that of two families, which their decoders tell apart.
    fit = [f for f, (known, decoders) in kinds.items() if known == kind and decoder in (None, *decoders)]
    if len(fit) == 1:
        return fit[0]
    found = f"`{one_line(kind, 40)}`" + (f" with a `{one_line(decoder, 40)}` decoder" if decoder else "")
    known = "; ".join(f"{known} with {' or '.join(decoders)}" for known, decoders in kinds.values())
    raise UserError(f"model: {one_line(name, 200)}: holds a model of type {found}; expected {known}")


def _read_dtype(config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """The precision of the weights; float32 where the configuration does not tell."""
    named = (part.get(key) for part in (config, text) for key in ("dtype", "torch_dtype"))
    return next((str(found) for found in named if found in DTYPE_BYTES), "float32")
