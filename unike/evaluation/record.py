"""What is recorded of an edited case: one type, read from and written as a line of ``records.jsonl``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from unike.system.text import one_line
from unike.types import Expectation, UserError

T = TypeVar("T")
Status = Literal["ok", "failed"]
RecordKind = Literal["step", "final"]
# Numbers by probe; None stands for what was no number.
ByProbe = Mapping[str, float | None]
# A part that a record lacks: empty to its readers, and not written.
ABSENT: Mapping[str, Any] = MappingProxyType({})
# Names of a record's numbers.
MARGIN, KL = "margin", "kl"
# Beyond any that is measured, and low enough to be summed up.
_LARGEST = 1e100
# A mean of ones may come out a little above 1.
_ROUNDING = 1e-6


def _get_absent() -> Mapping[str, Any]:
    return ABSENT


@dataclass(frozen=True, slots=True)
class Score:
    """A probe's value in [0, 1] before and after the edit; None before where it was not measured."""

    before: float | None
    after: float


@dataclass(frozen=True, slots=True)
class Change:
    """A probe's number before and after the edit, of any size; None where there is none."""

    before: float | None
    after: float | None


@dataclass(frozen=True, slots=True)
class Answer:
    """A probe's prompt and target, and what the model answered before and after the edit.

    ``aliases`` are as right as the target. ``expect`` is the probe's own, where its name's metric says
    another. ``others`` are those of further probes of the name. Files of former versions have none of these.
    """

    prompt: str | None
    target: str | None
    before: str | None
    after: str | None
    aliases: tuple[str, ...] = ()
    expect: Expectation | None = None
    others: tuple[Answer, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The answer as a JSON object; what is not known or empty has no key."""
        known: dict[str, object] = {
            "aliases": list(self.aliases) or None,
            "expect": self.expect,
            "others": [other.to_json() for other in self.others] or None,
        }
        own = {"prompt": self.prompt, "target": self.target, "before": self.before, "after": self.after}
        return {**own, **{key: value for key, value in known.items() if value is not None}}


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a sequence a record stands, from position 1 on: a ``step`` follows the edit at its position,
    the ``final`` records come at the end. ``case`` is the id of the edited case, which may come again."""

    case: str | None
    sequence: int
    position: int
    kind: RecordKind


@dataclass(frozen=True)
class Record:
    """An edited case. What is None or ``ABSENT`` has no key in the file.

    ``info`` is what the method reports of making the edit, ``steps`` and the final ``loss`` among it; keys of
    a file that are unknown here are in it, too. The record's own keys (``OWN``) are never taken from it.
    ``seconds`` is the edit's time, ``bytes`` the size of what is applied.

    ``scores`` and ``base_right`` (whether the base model answers the locality probes right, and those of
    consistency as its old answer implies) are by evaluation
    mode, then by probe; ``presets`` and ``decisions`` by name, then by probe; ``retrieved`` by probe, then by
    item; ``groups`` are the case's. ``numbers`` are those of ``unike.evaluation.likelihoods``, in nats, by
    name, then by probe. A step's ``former`` are means after the edit, by metric, over the
    ``former_cases`` before it.
    """

    id: str
    task: str | None = None
    status: Status | None = None
    seconds: float | None = None
    info: Mapping[str, object] = field(default_factory=_get_absent)
    error: str | None = None
    bytes: float | None = None
    place: Place | None = None
    scores: Mapping[str, Mapping[str, Score]] = field(default_factory=_get_absent)
    former: Mapping[str, float] = field(default_factory=_get_absent)
    former_cases: float | None = None
    presets: Mapping[str, ByProbe] = field(default_factory=_get_absent)
    base_right: Mapping[str, ByProbe] = field(default_factory=_get_absent)
    numbers: Mapping[str, Mapping[str, Change]] = field(default_factory=_get_absent)
    decisions: Mapping[str, ByProbe] = field(default_factory=_get_absent)
    retrieved: Mapping[str, ByProbe] = field(default_factory=_get_absent)
    answers: Mapping[str, Answer] = field(default_factory=_get_absent)
    groups: Mapping[str, str] = field(default_factory=_get_absent)

    @property
    def ok(self) -> bool:
        """Whether the edit was made and its probes were evaluated."""
        return self.status != "failed"

    @property
    def is_step(self) -> bool:
        """Whether this is of the newest edit of a sequence that goes on."""
        return self.place is not None and self.place.kind == "step"

    @property
    def sequence(self) -> int | None:
        """The number of its sequence."""
        return None if self.place is None else self.place.sequence

    @property
    def case(self) -> str:
        """The id of the edited case."""
        return self.id if self.place is None or self.place.case is None else self.place.case

    @property
    def steps(self) -> float | None:
        """Optimisation steps, where the method reports them."""
        return _find_number(self.info, "steps")

    @property
    def loss(self) -> float | None:
        """The final loss, where the method reports one."""
        return _find_number(self.info, "loss")

    @property
    def reached(self) -> bool | None:
        """Whether training reached the target before ``max_steps``; None of a method that does not train its
        edits step by step (IKE, KE, MEND, SERAC), and of a file that does not say so."""
        found = self.info.get("reached")
        return found if isinstance(found, bool) else None

    def get_scores(self, mode: str) -> Mapping[str, Score]:
        """By probe, in one evaluation mode; empty where it was not measured."""
        return self.scores.get(mode, ABSENT)

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Record:
        """The record of a JSON object. UserError, in one line, where a part is not as a run writes it."""

        def read(key: str, part: Callable[[object], T], absent: T) -> T:
            try:
                return part(values[key]) if key in values else absent
            except (TypeError, ValueError, KeyError):
                raise _report(values["id"], key) from None

        placed = "sequence" in values
        read("steps", _read_number, None)
        record = cls(
            id=read("id", _read_text, None) or str(values["id"]),
            task=read("task", _read_text, None),
            status=read("status", _read_status, None),
            seconds=read("seconds", _read_number, None),
            info={k: v for k, v in values.items() if k not in OWN and not (placed and k in _PLACE)},
            error=read("error", _read_text, None),
            bytes=read("bytes", _read_number, None),
            place=_read_place(values) if placed else None,
            scores=read("scores", _read_each(_read_each(_read_score)), ABSENT),
            former=read("former", _read_each(_read_measured_share), ABSENT),
            former_cases=read("former_cases", _read_number, None),
            presets=read("presets", _read_each(_read_each(_read_share)), ABSENT),
            base_right=read("base_right", _read_each(_read_each(_read_share)), ABSENT),
            numbers=read("numbers", _read_each(_read_each(_read_change)), ABSENT),
            decisions=read("decisions", _read_each(_read_each(_read_number)), ABSENT),
            retrieved=read("retrieved", _read_each(_read_each(_read_number)), ABSENT),
            answers=read("answers", _read_each(_read_answer), ABSENT),
            groups=read("groups", _read_each(_read_group), ABSENT),
        )
        if record.place is not None and not _is_complete(record):
            raise _report(values["id"], _ITS_PLACE)
        return record

    def to_json(self) -> dict[str, object]:
        """The record as a JSON object with its keys in the order of the file."""
        scores = {mode: write_scores(by_probe) for mode, by_probe in self.scores.items()}
        numbers = {
            name: {probe: {"before": c.before, "after": c.after} for probe, c in by_probe.items()}
            for name, by_probe in self.numbers.items()
        }
        answers = {probe: answer.to_json() for probe, answer in self.answers.items()}
        parts = {
            "scores": scores if self.scores is not ABSENT else ABSENT,
            "former": self.former,
            "former_cases": self.former_cases,
            "presets": self.presets,
            "base_right": self.base_right,
            "numbers": numbers if self.numbers is not ABSENT else ABSENT,
            "decisions": self.decisions,
            "retrieved": self.retrieved,
            "answers": answers if self.answers is not ABSENT else ABSENT,
            "groups": self.groups,
        }
        # The error takes the place of an edit, or, where one was made, that of its scores.
        error, late = (self.error, None) if self.bytes is None else (None, self.error)
        place = {} if self.place is None else {name: getattr(self.place, name) for name in _PLACE}
        head = {"id": self.id, "task": self.task, "status": self.status, "seconds": self.seconds}
        return {
            **_leave_out_absent({**head, "error": error}),
            **{key: value for key, value in self.info.items() if key not in OWN},
            **_leave_out_absent({"bytes": self.bytes, **place, "error": late, **parts}),
        }


_PLACE = ("case", "sequence", "position", "kind")
OWN = frozenset({f.name for f in fields(Record)} - {"info", "place"} | {"sequence"})
_ITS_PLACE = "its place in a sequence"


def _leave_out_absent(parts: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in parts.items() if value is not None and value is not ABSENT}


# ---------------------------------------------------------------- reading


def require_place(record: Record) -> None:
    """UserError for a record without a place in a sequence, as all records of such a run have one."""
    if record.place is None:
        raise _report(record.id, _ITS_PLACE)


def _report(name: object, part: str) -> UserError:
    return UserError(f"record {one_line(name, 60)}: {part} is not as a run writes it")


def _read_each(read: Callable[[object], T]) -> Callable[[object], Mapping[str, T]]:
    """Reads an object's values."""

    def read_all(value: object) -> Mapping[str, T]:
        if not isinstance(value, dict):
            raise TypeError("expected an object")
        return {key: read(item) for key, item in value.items()}

    return read_all


def _read_number(value: object) -> float | None:
    """A number or null. Infinities and NaN, which Python reads and a browser does not, are no numbers."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < _LARGEST:
        raise TypeError("expected a number")
    return value


def _read_measured(value: object) -> float:
    number = _read_number(value)
    if number is None:
        raise TypeError("expected a number")
    return number


def _read_share(value: object) -> float | None:
    """A number in [0, 1], as scores are, or null."""
    number = _read_number(value)
    if number is not None and not 0 <= number <= 1 + _ROUNDING:
        raise ValueError("expected a number from 0 to 1")
    return number


def _read_measured_share(value: object) -> float:
    return _read_measured(_read_share(value))


def _find_number(values: Mapping[str, object], key: str) -> float | None:
    try:
        return _read_number(values[key])
    except (KeyError, TypeError):
        return None


def _read_text(value: object) -> str | None:
    """A text or null; a number, as somebody's ids may be, is taken as its digits."""
    if value is None or isinstance(value, str):
        return value
    return str(_read_measured(value))


def _read_written(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError("expected a text")
    return value


def _read_group(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("expected a text")
    return value


def _read_status(value: object) -> Status | None:
    if value not in (None, "ok", "failed"):
        raise ValueError("expected ok or failed")
    return value  # type: ignore[return-value]


def _read_score(value: object) -> Score:
    values = _read_each(_read_share)(value)
    return Score(values["before"], _read_measured(values["after"]))


def _read_change(value: object) -> Change:
    values = _read_each(_read_number)(value)
    return Change(values["before"], values["after"])


def _read_answer(value: object) -> Answer:
    """Keys that are unknown here are left out."""
    if not isinstance(value, dict):
        raise TypeError("expected an object")
    prompt, target, before, after = (
        _read_written(value[key]) for key in ("prompt", "target", "before", "after")
    )
    return Answer(
        prompt,
        target,
        before,
        after,
        aliases=tuple(_read_all(_read_group)(value.get("aliases", []))),
        expect=_read_expectation(value.get("expect")),
        others=tuple(_read_all(_read_answer)(value.get("others", []))),
    )


def _read_all(read: Callable[[object], T]) -> Callable[[object], list[T]]:
    """Reads a list's items."""

    def read_items(value: object) -> list[T]:
        if not isinstance(value, list):
            raise TypeError("expected a list")
        return [read(item) for item in value]

    return read_items


def _read_expectation(value: object) -> Expectation | None:
    if value not in (None, "target", "unchanged"):
        raise ValueError("expected target or unchanged")
    return value  # type: ignore[return-value]


def read_scores(value: object) -> Mapping[str, Score]:
    """Scores by probe from a JSON object. TypeError, ValueError or KeyError where it holds something else."""
    return _read_each(_read_score)(value)


def write_scores(scores: Mapping[str, Score]) -> dict[str, dict[str, float | None]]:
    """Scores by probe as a JSON object."""
    return {probe: {"before": s.before, "after": s.after} for probe, s in scores.items()}


def _read_place(values: Mapping[str, object]) -> Place:
    sequence, position, kind = (values.get(key) for key in _PLACE[1:])
    # A bool is an int, too.
    if type(sequence) is not int or type(position) is not int or kind not in ("step", "final"):
        raise _report(values["id"], _ITS_PLACE)
    try:
        case = _read_text(values["case"]) if "case" in values else None
    except TypeError:
        raise _report(values["id"], "case") from None
    return Place(case, sequence, position, kind)  # type: ignore[arg-type]


def _is_complete(record: Record) -> bool:
    """Whether a record of a sequence has a status, and a step its scores and those of the edits before it."""
    if record.is_step and record.status == "ok":
        return record.former is not ABSENT and "teacher_forced" in record.scores
    return record.status is not None
