"""What an edit was made from; it stays with the edit, in memory and in its file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from unike.types import EditRequest, UserError

if TYPE_CHECKING:
    from unike.backbones.base import Backbone


@dataclass(frozen=True)
class Origin:
    """One request, and what carried it out.

    ``image`` is the image's path as it was given, None for an image in memory; ``image_key`` is a checksum of
    its pixels. ``hparams`` are those that decide on the edit; ``backbone`` is the fingerprint of the model
    named ``model``; ``info`` is what the method reported.
    """

    id: str
    method: str
    prompt: str
    target: str
    image: str | None
    image_key: str | None
    hparams: Mapping[str, object]
    backbone: str
    model: str
    info: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def question(self) -> tuple[str, str | None]:
        """What is asked about which image: the prompt, however it is spaced and capitalised, and the image's
        checksum (its path, where it was not read)."""
        return " ".join(self.prompt.split()).casefold(), self.image_key or self.image

    def contradicts(self, other: Origin) -> bool:
        """Whether the same is asked about the same image, and another answer is wanted."""
        return self.question == other.question and self.target.split() != other.target.split()

    @classmethod
    def of(
        cls,
        request: EditRequest,
        hparams: Mapping[str, object],
        backbone: Backbone,
        info: Mapping[str, object],
    ) -> Origin:
        """The origin of a request; ``hparams`` name the method and the model."""
        # Imported late: whoever only reads an origin should not wait for torch.
        from unike.backbones.images import content_key

        image, key = request.query.image, None
        with suppress(UserError):
            key = None if image is None else content_key(image)
        path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
        query = (request.query.prompt, str(request.query.target), path, key)
        method, model = str(hparams["method"]), str(hparams["name"])
        return cls(request.id, method, *query, hparams, backbone.fingerprint, model, dict(info))
