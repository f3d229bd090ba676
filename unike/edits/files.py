"""Edits as folders: the edit, where it comes from, and a card that describes it.

``edit.safetensors`` holds the tensors, ``edit.json`` all else, with checksums of both; ``README.md`` is
the card, as a model hub shows it. A folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from unike.edits.content import Content
from unike.edits.origin import Origin
from unike.system.faults import explain_write_errors
from unike.system.files import replace_atomically
from unike.system.paths import check_path
from unike.system.text import one_line
from unike.system.versions import collect_versions
from unike.types import UserError

if TYPE_CHECKING:
    import torch

    from unike.backbones.base import Backbone

FORMAT = 1
INDEX, TENSORS, CARD = "edit.json", "edit.safetensors", "README.md"
LICENCE = "derived from the named model and from the request: their licences hold for it"
# By what an edit needs: where its method found it.
PLACES = {"knowledge": "knowledge_dir", "scope": "scope_dir", "gate": "scope_dir", "network": "editor_dir"}
_LARGEST_INDEX = 64 << 20


@dataclass(frozen=True)
class UnsavedEdit:
    """All that the folder of an edit will hold, as plain values and tensors."""

    id: str
    kind: str
    content: Content
    origins: tuple[Origin, ...]
    needs: Mapping[str, str]
    info: Mapping[str, Any]


@dataclass(frozen=True)
class SavedEdit:
    """An edit's folder with a valid ``edit.json``; the tensors are only read by ``tensors``.

    ``needs`` holds checksums of what the edit shares with others, ``places`` where its method found it.
    """

    folder: Path
    id: str
    kind: str
    backbone: str
    model: str
    origins: tuple[Origin, ...]
    needs: Mapping[str, str]
    places: Mapping[str, str | None]
    values: Mapping[str, Any]
    info: Mapping[str, Any]
    versions: Mapping[str, Any]
    licence: str
    bytes: int
    sha256: str
    checksum: str

    def require(self, backbone: Backbone) -> None:
        """UserError where the edit was made on another model."""
        if not hasattr(type(backbone), "fingerprint"):
            raise UserError(f"backbone: expected a backbone, got {type(backbone).__name__}")
        if self.backbone != backbone.fingerprint:
            raise UserError(
                f"{one_line(self.folder)}: is an edit of another model: {one_line(self.model)}, "
                f"fingerprint {one_line(self.backbone, 40)}; this one's is {backbone.fingerprint}"
            )

    def read_tensors(self) -> Any:
        """The file of the tensors."""
        return _read_file(self.folder / TENSORS, self.bytes)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, in memory of their own. UserError where they are not those that were saved."""
        path = self.folder / TENSORS
        data = self.read_tensors()
        if len(data) != self.bytes or hashlib.sha256(data).hexdigest() != self.sha256:
            raise UserError(f"{one_line(path)}: is damaged: its checksum is another one than {INDEX} has")
        from safetensors import torch as safetensors

        try:
            return {name: tensor.clone() for name, tensor in safetensors.load(data).items()}
        except Exception as error:  # the library's errors have no common type
            raise UserError(f"{one_line(path)}: is damaged: {one_line(error)}") from error


# ---------------------------------------------------------------- writing


def save(edit: UnsavedEdit, folder: str | os.PathLike[str]) -> None:
    """Writes the folder of an edit; see ``Edit.save``."""
    folder = Path(check_path(folder, "edit", "a folder"))
    with explain_write_errors(folder, resumable=False):
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(f"{folder}: is not empty; expected a new folder for the edit")
        files, _ = render_files(edit)
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_folder(folder, files)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder of files, by name, atomically; the folder must be absent or empty."""
    with replace_atomically(folder, is_folder=True) as temporary:
        for name, content in files.items():
            (temporary / name).write_bytes(content)


def render_files(edit: UnsavedEdit) -> tuple[dict[str, bytes], str]:
    """The files of an edit's folder by name, and the checksum that ``edit.json`` has of them.
    UserError for an edit that no registered method has made: its model would be unknown."""
    content, origins = edit.content, edit.origins
    if not origins or len({origin.backbone for origin in origins}) > 1:
        raise UserError(f"edit {edit.id or 'without origins'}: expected the origins of one backbone's edits")
    from safetensors import torch as safetensors

    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in content.tensors.items()}
    data = safetensors.save(tensors)
    needs, last = edit.needs, origins[-1].hparams
    index = {
        "format": FORMAT,
        "id": edit.id,
        "kind": edit.kind,
        "backbone": origins[0].backbone,
        "model": origins[0].model,
        "origins": [asdict(origin) for origin in origins],
        "needs": needs,
        "places": {name: last.get(PLACES[name]) for name in needs},
        "values": content.values,
        "info": edit.info,
        "versions": collect_versions(),
        "licence": LICENCE,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    try:
        index = sign(json.loads(json.dumps(index, allow_nan=False, default=str)))
    except (ValueError, TypeError) as error:
        raise UserError(f"edit {one_line(edit.id)}: cannot be written as JSON: {one_line(error)}") from error
    texts = {INDEX: json.dumps(index, indent=1) + "\n", CARD: render_card(edit)}
    return {TENSORS: data} | {name: text.encode() for name, text in texts.items()}, str(index["checksum"])


def render_card(edit: UnsavedEdit) -> str:
    """The folder's README: front matter for model hubs, the requests, how to load the edit."""
    methods = sorted({origin.method for origin in edit.origins})
    model = edit.origins[0].model
    about: dict[str, Any] = {
        "library_name": "unike",
        "license": "other",
        "license_name": "derived",
        "tags": ["model-editing", "knowledge-editing", "vision-language", *methods],
    }
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists():
        about["base_model"] = model
    rows = [
        f"| {_escape_cell(o.prompt)} | {_escape_cell(o.target)} | {o.method} |" for o in edit.origins[:20]
    ]
    more = [f"\n... and {len(edit.origins) - 20} more"] if len(edit.origins) > 20 else []
    needs = "".join(
        f" It needs the {name} that its method had: pass it on, or load it by its editor."
        for name in edit.needs
    )
    return "\n".join(
        [
            "---",
            yaml.safe_dump(about, sort_keys=False).strip(),
            "---",
            "",
            f"# Edit {_escape_cell(edit.id)}",
            "",
            f"An edit of `{_escape_cell(model)}` (fingerprint `{edit.origins[0].backbone}`).{needs}",
            "",
            "| question | answer | method |",
            "| --- | --- | --- |",
            *rows,
            *more,
            "",
            "```python",
            "from unike import MultimodalEditor",
            "",
            'editor = MultimodalEditor.from_hparams("the YAML that it was made with")',
            'edit = editor.load("this folder")',
            "with edit.applied(editor.backbone):",
            "    ...",
            "```",
            "",
            f"Licence: {LICENCE}.",
            "",
        ]
    )


def _escape_cell(text: str) -> str:
    return one_line(text).replace("|", "\\|").replace("`", "'")


# ---------------------------------------------------------------- reading


def read_edit(folder: str | os.PathLike[str]) -> SavedEdit:
    """What a folder says of its edit, without a model. UserError where it holds no edit, or is damaged."""
    folder = Path(check_path(folder, "edit", "the folder of a saved edit"))
    path = folder / INDEX
    at = one_line(path)
    if not os.path.isdir(folder):
        raise UserError(f"{one_line(folder)}: no such folder; expected a saved edit")
    return SavedEdit(folder=folder, **read_index(_read_file(path, _LARGEST_INDEX), at))


def read_index(data: bytes, at: str) -> dict[str, Any]:
    """What ``edit.json`` holds, by the fields of ``SavedEdit``; UserError where it is damaged."""
    try:
        index = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{at}: is damaged: {one_line(error)}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT or isinstance(index["format"], bool):
        given = one_line(index.get("format")) if isinstance(index, dict) else "none"
        raise UserError(f"{at}: format {given}; expected {FORMAT}")
    try:
        if sign(index) != index:
            raise UserError(f"{at}: is damaged: its checksum is another one")
        return _parse_index(index)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"{at}: is no edit's: {one_line(error)}") from error


def _parse_index(index: dict[str, Any]) -> dict[str, Any]:
    kinds = {
        "id": str,
        "kind": str,
        "backbone": str,
        "model": str,
        "origins": list,
        "needs": dict,
        "places": dict,
        "values": dict,
        "info": dict,
        "versions": dict,
        "licence": str,
        "bytes": int,
        "sha256": str,
        "checksum": str,
    }
    content = Content({name: index[name] for name in kinds}, {})
    given: dict[str, Any] = {name: content.take_value(name, kind) for name, kind in kinds.items()}
    needs, places = given["needs"], given["places"]
    if not all(isinstance(c, str) for c in needs.values()) or not _are_texts(places) or not given["id"]:
        raise ValueError("id, needs, places: expected texts")
    given["origins"] = tuple(_parse_origin(values) for values in given["origins"])
    if {origin.backbone for origin in given["origins"]} != {given["backbone"]}:
        raise ValueError("origins: expected one or more, of the backbone")
    return given


def _parse_origin(values: Any) -> Origin:
    content = Content(dict(values), {})
    names = {field.name for field in fields(Origin)}
    if content.values.keys() != names:
        raise ValueError(f"origins: expected {', '.join(sorted(names))}")
    optional, maps = {"image", "image_key"}, {"hparams", "info"}
    for name in names - optional - maps:
        content.take_value(name, str)
    for name in maps:
        content.take_value(name, dict)
    if not _are_texts({name: content.values[name] for name in optional}):
        raise ValueError("origins: image: expected texts")
    given: dict[str, Any] = content.values
    return Origin(**given)


def _are_texts(values: Mapping[str, Any]) -> bool:
    return all(value is None or isinstance(value, str) for value in values.values())


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _read_file(path: Path, most: int) -> bytes:
    """A regular file of at most ``most`` bytes."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{one_line(path)}: is no file")
        if (size := path.stat().st_size) > most:
            raise UserError(f"{one_line(path)}: {size} bytes; expected {most} or fewer")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = one_line(getattr(error, "strerror", None) or error)
        raise UserError(f"{one_line(path)}: cannot be read: {reason}") from error


def sign(index: Mapping[str, Any]) -> dict[str, Any]:
    """The index with the checksum of all else in it. ValueError for what UTF-8 or JSON lack."""
    rest = {name: value for name, value in index.items() if name != "checksum"}
    plain = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return {**rest, "checksum": hashlib.sha256(plain.encode("utf-8")).hexdigest()}
