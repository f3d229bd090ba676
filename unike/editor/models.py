"""Hyper-parameters of edits that need no data, for a model that is known by its folder or its id alone."""

from __future__ import annotations

import os

from unike.backbones.families import find_published
from unike.backbones.placement import pick_device
from unike.config.hparams import HyperParams
from unike.config.locating import find_download
from unike.config.untrained import make_untrained
from unike.system.shipped import find_shipped
from unike.types import BACKBONES, UserError


def describe_model(
    name: str | os.PathLike[str],
    model_name: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    **options: object,
) -> HyperParams:
    """The options of edits that need no data, for the model in a Hugging Face folder or of an id of the hub.

    Its ``config.json`` names the family, ``model_name``, and the precision of its weights, which is that of
    ``dtype`` by default; but float16 becomes float32 on a CPU, which computes it slowly. ``options`` change
    those of ``unike.config.untrained``.

    UserError, with all problems of the values, and for a model of no known family.
    """
    if not isinstance(name, (str, os.PathLike)) or not str(name).strip():
        raise UserError("model: expected the folder of a Hugging Face model, or its id on the hub")
    if model_name is not None and model_name not in BACKBONES:
        raise UserError(f"model_name: {model_name!r} is unknown; expected one of {', '.join(BACKBONES)}")
    place = find_shipped(str(find_download(os.fspath(name))))
    published = find_published(place, model_name)
    values: dict[str, object] = {
        "model_name": published.model_name,
        "name": place,
        "device": device,
        "dtype": dtype or published.dtype,
        "answer_end": published.answer_end,
    }
    hparams = make_untrained("model", **(values | options))
    if dtype is None and published.dtype == "float16" and pick_device(hparams.device).type == "cpu":
        return hparams.replace(dtype="float32")
    return hparams
