"""Many edits of one model in a folder, in the order in which they were added.

``index.jsonl`` is only appended to: its first line names the model, each further line an edit and its
folder, or an edit that is removed. An edit's folder is complete before its line is written, so that a
process that is killed leaves at most a folder that no line names. Several processes may add at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from unike.config.options import OPTIONS
from unike.edits.conflicts import Contradiction
from unike.edits.files import SavedEdit, read_edit, render_files, write_folder
from unike.edits.origin import Origin
from unike.system.faults import explain_write_errors
from unike.system.files import to_json_types
from unike.system.paths import check_path
from unike.system.places import check_lock, lock, refuse_link
from unike.system.text import describe_value, one_line
from unike.types import UserError

if TYPE_CHECKING:
    from torch import nn

    from unike.backbones.base import Backbone
    from unike.edits.base import Edit
    from unike.edits.origin import Origin
    from unike.edits.shares import LayerKnowledge
    from unike.knowledge.scope import TrainedScope

logger = logging.getLogger("unike")

INDEX, LOCK, FORMAT = "index.jsonl", ".lock", 1
# Of an edit's options, those that say where something is: they do not decide on the edit.
_PLACES = {"name", "knowledge_dir", "scope_dir", "editor_dir", "data", "image_root", "rephrase_root"}
_FOLDER = re.compile(r"[\w-][\w.-]*", re.ASCII)


class EditStore:
    """The edits in a folder, which is made when the first one is added.

    Raises UserError for a folder that holds something else, for a damaged index, and for symbolic links in
    the place of the store's own files.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(check_path(folder, "store", "a folder"))
        self._index = self.folder / INDEX
        refuse_link(self._index)
        self._read = 0
        self._model: dict[str, str] = {}
        self._folders: dict[str, str] = {}
        # By id what each request asks, and its target.
        self._asks: dict[str, list[tuple[str, str]]] = {}
        # Not ``Path.exists``, which raises where a name is too long or a folder is locked.
        if os.path.exists(self.folder) and not os.path.isfile(self._index):
            # Folders whose names begin with a dot are being written by other processes.
            plain = self.folder.is_dir() and all(p.name[0] == "." for p in self.folder.iterdir())
            # Looked for again: another process may have begun the store in between.
            if not plain and not os.path.isfile(self._index):
                raise UserError(f"{self.folder}: holds no {INDEX}; expected a store of edits")
        self._look()

    def __len__(self) -> int:
        return len(self.ids())

    def __contains__(self, name: object) -> bool:
        return name in self.ids()

    def ids(self) -> list[str]:
        """All ids in the order of adding, including those that other processes have added since."""
        self._look()
        return list(self._folders)

    @property
    def backbone(self) -> str | None:
        """The fingerprint of the edits' model; None while there is no edit."""
        return self._model.get("backbone")

    def add(self, edit: Edit, replace: bool = False) -> None:
        """Stores an edit under its id. With ``replace`` it replaces one of the same id. Those
        that it contradicts are named in a warning.

        UserError where the id is taken, where the edit is of another model, or where nothing can be
        written; the store is then as before.
        """
        if not callable(getattr(type(edit), "as_unsaved", None)):
            raise UserError(f"{self.folder}: expected an edit, got {type(edit).__name__}")
        with explain_write_errors(self.folder, resumable=False):
            files, checksum = render_files(edit.as_unsaved())
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                self._take(edit, files, f"{_make_file_name(edit.id)}-{checksum[:12]}", replace)

    def _take(self, edit: Edit, files: Mapping[str, bytes], name: str, replace: bool) -> None:
        origin, former = edit.origins[0], self._folders.get(edit.id)
        if former is not None and not replace:
            raise UserError(
                f"{self.folder}: holds an edit {one_line(edit.id)} already, of {self._describe(edit.id)}; "
                "remove it first, or name another store"
            )
        if self.backbone not in (None, origin.backbone):
            raise UserError(
                f"{self.folder}: holds edits of another model, fingerprint {one_line(self.backbone, 40)}; "
                f"edit {one_line(edit.id)} is of {origin.backbone}"
            )
        # The name holds a checksum of the content: where it is known, this very edit is stored already,
        # unless somebody has deleted the folder.
        if former == name and (self.folder / name).is_dir():
            return
        if self.backbone is None:
            self._append({"format": FORMAT, "backbone": origin.backbone, "model": origin.model})
        # A folder that no line names was left by a process that was killed.
        shutil.rmtree(self.folder / name, ignore_errors=True)
        write_folder(self.folder / name, files)
        asks = [[_hash_question(o), o.target] for o in edit.origins]
        self._warn(edit)
        self._append({"id": edit.id, "folder": name, "asks": asks})
        if former not in (None, name):
            shutil.rmtree(self.folder / str(former), ignore_errors=True)

    def holds_same(self, edit: Edit) -> bool:
        """Whether an edit of this id is there that the same method made for the same request, with the same
        options: adding it again, with ``replace``, loses nothing."""
        if edit.id not in self:
            return False
        saved = self.read(edit.id)
        return [describe_origin(o) for o in saved.origins] == [describe_origin(o) for o in edit.origins]

    def _warn(self, edit: Edit) -> None:
        """Names the edits that this one contradicts, in the log."""
        wanted = {_hash_question(origin): origin for origin in edit.origins}
        for name in self._folders:
            if not self._asks[name]:
                self._asks[name] = self._read_asks(name)
            for question, target in self._asks[name]:
                new = wanted.get(question)
                if name != edit.id and new is not None and new.target.split() != target.split():
                    found = Contradiction(name, edit.id, new.prompt, target, new.target)
                    logger.warning("%s: %s", self.folder, found)

    def _read_asks(self, name: str) -> list[tuple[str, str]]:
        """What an edit is asked, of which an older index says nothing, and its answers."""
        try:
            origins = read_edit(self.folder / self._folders[name]).origins
        except UserError:
            origins = ()
        return [(_hash_question(origin), origin.target) for origin in origins]

    def remove(self, name: str) -> None:
        """Removes an edit; UserError where there is none of that id."""
        with explain_write_errors(self.folder, resumable=False), self._lock():
            folder = self._find_folder(name)
            self._append({"id": name, "removed": True})
            shutil.rmtree(folder, ignore_errors=True)

    def read(self, name: str) -> SavedEdit:
        """What the edit's folder says, without a model; UserError as ``read_edit``."""
        self._look()
        saved = read_edit(self._find_folder(name))
        if saved.id != name:
            raise UserError(
                f"{one_line(saved.folder)}: is edit {one_line(saved.id)}, another one than {INDEX} has"
            )
        return saved

    def load(
        self,
        name: str,
        backbone: Backbone,
        knowledge: Mapping[int, LayerKnowledge] | None = None,
        network: nn.Module | None = None,
        scope: TrainedScope | None = None,
    ) -> Edit:
        """The edit of that id, as ``Edit.load``."""
        # Imported late: whoever only lists edits should not wait for torch.
        from unike.edits.base import load_edit
        from unike.edits.shares import Shared

        return load_edit(self.read(name), backbone, Shared(knowledge or {}, network, scope))

    def require(self, *names: str) -> None:
        """UserError with a line for every id that is not in the store."""
        known = self.ids()
        lost = [one_line(name) for name in names if name not in known]
        if lost:
            few = ", ".join(map(one_line, known[:5])) + (", ..." if len(known) > 5 else "")
            raise UserError(*(f"{self.folder}: no edit {name}; there are {few or 'none'}" for name in lost))

    def check(self) -> None:
        """UserError where the store's lock cannot be taken: adding an edit would end there."""
        check_lock(self.folder / LOCK)

    def _describe(self, name: str) -> str:
        """Whose an edit is, for a message."""
        try:
            origin = self.read(name).origins[0]
        except (UserError, IndexError):
            return "an unknown method"
        return f"method {one_line(origin.method, 40)}"

    def _find_folder(self, name: str) -> Path:
        if not isinstance(name, str):
            raise UserError(f"{self.folder}: expected the id of an edit, got {describe_value(name)}")
        if name not in self._folders:
            self.require(name)
        return self.folder / self._folders[name]

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Inside the block no other process writes, and what others wrote is known."""
        with lock(self.folder / LOCK):
            refuse_link(self._index)
            self._look()
            yield

    def _look(self) -> None:
        """Reads complete lines that were written since; a killed process may leave an incomplete one."""
        try:
            with open(self._index, "rb") as file:
                file.seek(self._read)
                added = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self._index}: cannot be read: {error.strerror}") from error
        whole = added[: added.rfind(b"\n") + 1]
        for line in whole.splitlines():
            self._take_up(line)
        self._read += len(whole)

    def _take_up(self, line: bytes) -> None:
        try:
            entry = json.loads(line.decode("utf-8"))
            if not self._model:
                if entry["format"] != FORMAT:
                    raise ValueError(f"format {entry['format']}; expected {FORMAT}")
                self._model = {"backbone": str(entry["backbone"]), "model": str(entry["model"])}
            elif entry.get("removed"):
                del self._folders[entry["id"]]
            else:
                name, folder = entry["id"], entry["folder"]
                if not isinstance(name, str) or not _FOLDER.fullmatch(folder):
                    raise ValueError("expected an id and the name of a folder")
                self._folders[name] = folder
                self._asks[name] = [(str(q), str(t)) for q, t in entry.get("asks", ())]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise UserError(f"{one_line(self._index)}: is damaged: {one_line(error)}") from error

    def _append(self, entry: Mapping[str, object]) -> None:
        with open(self._index, "ab") as file:
            if file.tell() > self._read:
                # What a killed process left of its last line.
                file.truncate(self._read)
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._look()


def describe_origin(origin: Origin) -> dict[str, object]:
    """What decides on an edit, in JSON's types: request, method, options; without paths and reports."""
    # An older edit does not know the options that are new since; they had their defaults.
    hparams = {
        key: value
        for key, value in origin.hparams.items()
        if key not in _PLACES and not _is_default(key, value)
    }
    about = {
        "id": origin.id,
        "method": origin.method,
        "prompt": origin.prompt,
        "target": origin.target,
        "image": origin.image_key,
        "hparams": hparams,
    }
    values: dict[str, object] = to_json_types(about)
    return values


def _is_default(key: str, value: object) -> bool:
    known = OPTIONS.get(key)
    return known is not None and to_json_types(value) == to_json_types(known.default)


def _hash_question(origin: Origin) -> str:
    return hashlib.sha256(repr(origin.question).encode(errors="surrogatepass")).hexdigest()[:16]


def _make_file_name(name: str) -> str:
    """The beginning of an id as every file system takes it."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:60].strip(".-") or "edit"
