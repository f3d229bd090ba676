"""The edits that a backbone carries: they are attached and detached one by one."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import or_
from typing import Any, NoReturn

from unike.backbones.base import Backbone
from unike.backbones.guard import Application, Guard
from unike.backbones.images import take_image
from unike.edits import Edit, compose
from unike.edits.conflicts import find_contradicted, list_contradictions
from unike.edits.questions import Locate, answer_each
from unike.system.text import one_line
from unike.types import ImageLike, Query, UserError

logger = logging.getLogger("unike")

Edits = tuple[Edit, ...]


def _are_same(one: Edits, other: Edits) -> bool:
    # By identity: comparing edits by value would compare their tensors.
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


class Slot:
    """The edits that a backbone carries now, ``whole``, all of them as one, and the ``editor`` that attached
    the last of them.

    All editors of a backbone share one slot: otherwise one editor's edit would be another's base model.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.guard = backbone, Guard.of(backbone)
        self.edits: Edits = ()
        self.whole: Edit | None = None
        self.editor: object = None
        self._application: Application | None = None
        # Of which epoch, and how many edits, those of other weights were named last.
        self._flagged: tuple[int, int] | None = None

    @classmethod
    def of(cls, backbone: Backbone) -> Slot:
        """The backbone's slot."""
        # Kept on the backbone itself, so that both are freed together.
        slot: Slot = vars(backbone).get("_slot") or vars(backbone).setdefault("_slot", cls(backbone))
        return slot

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UserError(
            "an editor, and what it has edited, cannot be pickled; save the edits (edit.save) and load a new "
            "editor, or copy this one (copy.deepcopy)"
        )

    def __deepcopy__(self, memo: dict[int, object]) -> Slot:
        """The slot of a copied backbone, with the same edits attached."""
        with self.guard.hold():
            new = memo[id(self)] = Slot.of(copy.deepcopy(self.backbone, memo))
            new.put(copy.deepcopy(self.edits, memo))
            new.editor = copy.deepcopy(self.editor, memo)
        return new

    @property
    def fingerprint(self) -> str:
        """The base model's."""
        return self.backbone.fingerprint

    def put(self, edits: Edits) -> None:
        """Attaches ``edits`` in place of those that are attached. Where they begin with these, only the
        others are composed, and edits that they contradict are named in a warning."""
        with self.guard.hold():
            known = len(self.edits)
            added = _are_same(edits[:known], self.edits)
            later = [origin for edit in edits[known:] for origin in edit.origins]
            whole = self.whole
            if whole is not None and added and not find_contradicted(whole.origins, later):
                whole = reduce(or_, edits[known:], whole)
            else:
                whole = compose(edits)
            self._swap(edits, whole)
            for place in range(known, len(edits)) if added else ():
                for contradiction in list_contradictions(edits[:place], edits[place]):
                    logger.warning("%s", contradiction)

    def attach(self, edit: Edit) -> None:
        """Attaches one more edit. UserError, with nothing changed, where its id is taken, and where it was
        made on another model. Edits that it contradicts are named in a warning."""
        with self.guard.hold():
            if any(edit.id == other.id for other in self.edits):
                raise UserError(f"edit {edit.id}: is attached already; expected an edit with another id")
            if any(origin.backbone != self.fingerprint for origin in edit.origins):
                raise UserError(
                    f"edit {edit.id}: was made on another backbone, or with other weights, than this one, "
                    f"{self.fingerprint}"
                )
            self.put((*self.edits, edit))

    def detach(self, name: str) -> Edit:
        """Detaches one edit, and returns it. UserError where none of that id is attached."""
        with self.guard.hold():
            ids = [edit.id for edit in self.edits]
            if name not in ids:
                near = difflib.get_close_matches(name, ids, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"{len(ids)} others are"
                raise UserError(f"edit {name}: is not attached; {hint}")
            place = ids.index(name)
            edit = self.edits[place]
            self.put(self.edits[:place] + self.edits[place + 1 :])
            return edit

    @contextmanager
    def only(self, edits: Edits) -> Iterator[Edit | None]:
        """Inside the block the backbone carries just these edits; the block gets them as one. What else is
        applied, by ``with edit.applied(backbone)`` too, is applied again after it."""
        with self.guard.hold():
            self._flag_former(edits)
            alone = self.guard.carries(self._application)
            if _are_same(self.edits, edits) and alone:
                yield self.whole
                return
            whole = self.whole if _are_same(self.edits, edits) else compose(edits)
            with self.guard.bare():
                if whole is None:
                    yield None
                    return
                with whole.applied(self.backbone):
                    yield whole

    def _flag_former(self, edits: Edits) -> None:
        """Names, once, the edits that were made before the weights were changed."""
        if not self.guard.epoch or self._flagged == (self.guard.epoch, len(edits)):
            return
        own = self.fingerprint
        lost = [edit.id for edit in edits if any(origin.backbone != own for origin in edit.origins)]
        if lost:
            self._flagged = self.guard.epoch, len(edits)
            logger.warning(
                "edit %s: was made with other weights than the model has now", ", ".join(map(one_line, lost))
            )

    def generate(
        self,
        edits: Edits,
        image: ImageLike | None,
        prompt: str,
        max_new_tokens: int | None = None,
        **decoding: object,
    ) -> Any:
        """The answer under ``edits``, whatever is attached; a list where ``num_return_sequences`` is above 1.
        ``decoding`` is that of the backbone's ``generate``."""
        with self.only(edits) as whole:
            query = Query(image, prompt)
            query = query if whole is None else whole.rewrite(query)
            found = self.backbone.generate([query.image], [query.prompt], max_new_tokens, **decoding)
        return found if len(found) > 1 else found[0]

    def _swap(self, edits: Edits, whole: Edit | None) -> None:
        new = None if whole is None else whole.applied(self.backbone)
        assert new is None or isinstance(new, Application)
        self.guard.exchange(self._application, new)
        self._application, self.edits, self.whole = new, edits, whole


class EditedModel:
    """A backbone with edits, as ``MultimodalEditor.edit`` returns it.

    While the edits are attached, the backbone itself answers edited. A later ``edit`` attaches its own edits
    instead. ``generate`` always answers with this object's edits, whatever is attached.
    """

    def __init__(self, slot: Slot, edits: Edits, locate: Locate = take_image) -> None:
        self._slot, self._edits, self._locate = slot, edits, locate

    @property
    def edits(self) -> Edits:
        """The edits in order; empty after ``remove``."""
        return self._edits

    @property
    def attached(self) -> bool:
        """Whether the backbone carries these edits now, and no others."""
        return bool(self._edits) and _are_same(self._slot.edits, self._edits)

    def generate(
        self,
        image: ImageLike | Sequence[ImageLike | None] | None,
        prompt: str | Sequence[str],
        max_new_tokens: int | None = None,
        **decoding: object,
    ) -> Any:
        """The edited model's answer, greedy by default; a list of answers for lists of images or prompts, and
        for each question where ``num_return_sequences`` is above 1.

        ``decoding`` takes ``num_beams``, ``do_sample``, ``temperature``, ``top_p``, ``num_return_sequences``
        and ``seed``, see ``unike.backbones.decoding.Decoding``; UserError for values that do not fit.
        """

        def answer(image: ImageLike | None, prompt: str) -> Any:
            return self._slot.generate(self._edits, image, prompt, max_new_tokens, **decoding)

        return answer_each(answer, image, prompt, self._locate)

    def remove(self) -> None:
        """Detaches these edits: the base model is as before, bit for bit. Other edits stay attached. A second
        call does nothing."""
        with self._slot.guard.hold():
            own = {id(edit) for edit in self._edits}
            left = tuple(edit for edit in self._slot.edits if id(edit) not in own)
            if len(left) < len(self._slot.edits):
                self._slot.put(left)
            self._edits = ()
