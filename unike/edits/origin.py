"""What an edit was made from: it stays with the edit, in memory and in its file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from unike.types import EditRequest, UserError

if TYPE_CHECKING:
    from unike.backbones.base import Backbone


@dataclass(frozen=True)
class Origin:
    """One request, and who carried it out.

    ``image`` is the picture's path as it was given, None for one in memory; ``image_key`` a checksum of
    its pixels. ``hparams`` are those that decide, ``backbone`` the fingerprint of the model named
    ``model``; ``info`` is what the method reported.
    """

    id: str
    method: str
    prompt: str
    target: str
    image: str | None
    image_key: str | None
    hparams: Mapping[str, Any]
    backbone: str
    model: str
    info: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, request: EditRequest, hparams: Mapping[str, Any], backbone: Backbone, info: Mapping[str, Any]
    ) -> Origin:
        """``hparams`` name the method and the model."""
        # Imported late: whoever only reads an origin should not wait for torch.
        from unike.backbones.images import content_key

        image, key = request.query.image, None
        with suppress(UserError):
            key = None if image is None else content_key(image)
        path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
        asked = (request.query.prompt, str(request.query.target), path, key)
        model = (backbone.fingerprint, hparams["name"])
        return cls(request.id, hparams["method"], *asked, hparams, *model, dict(info))
