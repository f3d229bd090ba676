"""Edits that come out of a pickle: as small as a saved one, and restored where they are attached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unike.backbones.base import Backbone
from unike.edits.base import Edit, load_edit, make_shared
from unike.edits.content import Content
from unike.edits.files import INDEX, TENSORS, SavedEdit, UnsavedEdit, read_index
from unike.edits.shares import LayerKnowledge, Shared
from unike.knowledge.scope import TrainedScope
from unike.types import UserError


@dataclass(frozen=True)
class _InMemory(SavedEdit):
    """A saved edit whose file of tensors is at hand."""

    data: Any = field(default=b"", repr=False)

    def read_tensors(self) -> Any:
        return self.data


class PickledEdit(Edit):
    """What a pickled edit becomes: all that its folder would hold.

    ``MultimodalEditor.attach`` restores it by itself. ``restore`` does so for a backbone, with what the edit
    shares with others. An edit that shares nothing may be applied as it is.
    """

    # No folder is of this kind: saved again, it is of the kind that it was.
    kind = ""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        if not isinstance(files, Mapping) or not {INDEX, TENSORS} <= set(files):
            raise UserError(f"pickled edit: expected {INDEX} and {TENSORS}")
        saved = read_index(files[INDEX], f"pickled edit: {INDEX}")
        self.saved: SavedEdit = _InMemory(folder=Path("pickled edit"), data=files[TENSORS], **saved)
        self.origins, self.info, self.id = self.saved.origins, dict(self.saved.info), self.saved.id

    def restore(
        self,
        backbone: Backbone,
        knowledge: Mapping[int, LayerKnowledge] | None = None,
        network: nn.Module | None = None,
        scope: TrainedScope | None = None,
    ) -> Edit:
        """The edit on a backbone; UserError as ``Edit.load``."""
        edit = load_edit(self.saved, backbone, make_shared(knowledge, network, scope))
        edit.id = self.id
        return edit

    @contextmanager
    def applied(self, backbone: Backbone) -> Iterator[None]:
        if self.saved.needs:
            raise UserError(
                f"edit {self.id}: was pickled without the {' and '.join(self.saved.needs)} that it needs; "
                "expected editor.attach(edit), or edit.restore(backbone, ...) with it"
            )
        with self.restore(backbone).applied(backbone):
            yield

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.saved.tensors()

    def join(self, other: Edit) -> Edit | None:
        return None

    def pack(self) -> Content:
        return Content(dict(self.saved.values), self.saved.tensors())

    @classmethod
    def unpack(cls, content: Content, backbone: Backbone, shared: Shared) -> Edit:
        raise ValueError("expected the kind of a saved edit")

    def as_unsaved(self) -> UnsavedEdit:
        return UnsavedEdit(self.id, self.saved.kind, self.pack(), self.origins, self.needs(), self.info)

    def needs(self) -> dict[str, str]:
        return dict(self.saved.needs)
