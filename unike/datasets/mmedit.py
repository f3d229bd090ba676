"""MMEdit's annotations (E-VQA, E-IC) as ``Case``s: a JSON list of flat records, checked on loading."""

from __future__ import annotations

import difflib
import json
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict, cast, overload

from unike.datasets import cckeb, vlkeb
from unike.datasets.answers import normalise_answer
from unike.datasets.declarations import get_expectation
from unike.datasets.images import PathLike, image_path, lies_outside
from unike.datasets.probe_files import NO_PROBES, FurtherProbe, RecordProbes, read_probes
from unike.system.paths import check_path
from unike.system.text import describe_value, is_unicode, one_line
from unike.types import Case, EditRequest, Probe, Query, UserError

VQA_TEMPLATE = "Question: {} Short answer:"

REQUIRED_FIELDS = (
    "src",
    "rephrase",
    "alt",
    "image",
    "image_rephrase",
    "loc",
    "loc_ans",
    "m_loc",
    "m_loc_q",
    "m_loc_a",
)
PAIRED_FIELDS = (("same_question_image", "same_question_a"), ("same_image_q", "same_image_a"))
KNOWN_FIELDS = (
    *REQUIRED_FIELDS,
    "pred",
    *chain.from_iterable(PAIRED_FIELDS),
    "joint",
    vlkeb.FIELD,
    cckeb.FIELD,
)
# Far above any real question, caption or file: longer ones are a mistake, or meant to take memory and time.
TEXT_LENGTH, FILE_BYTES = 20_000, 1 << 30
ImageField = Literal["image", "image_rephrase", "m_loc", "same_question_image"]
IMAGE_FIELDS: tuple[ImageField, ...] = ("image", "image_rephrase", "m_loc", "same_question_image")


class Annotation(TypedDict, total=False):
    """A sound record. Of the texts, all of ``REQUIRED_FIELDS`` are there, and of ``PAIRED_FIELDS`` both or
    none."""

    src: str
    rephrase: str
    alt: str
    image: str
    image_rephrase: str
    loc: str
    loc_ans: str
    m_loc: str
    m_loc_q: str
    m_loc_a: str
    same_question_image: str
    same_question_a: str
    same_image_q: str
    same_image_a: str
    pred: str | None
    joint: bool
    port_new: list[dict[str, Any]]
    textual_edit: dict[str, Any]


class _RepeatedField(dict[str, object]):
    """A JSON object that gives a field more than once: which of the values is meant, nobody knows."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        super().__init__(pairs)
        ((self.repeated, _),) = Counter(name for name, _ in pairs).most_common(1)


_JSON_NAMES = {
    dict: "an object",
    _RepeatedField: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    type(None): "null",
}


def load_records(path: PathLike) -> list[object]:
    """The JSON list in the file, its items unchecked (see ``list_record_problems``).

    Raises:
        UserError: one line naming the file, if it is missing, not a regular file, not UTF-8, not JSON
            (with line and column) or not a list.
    """
    path = check_path(path, "annotations", "a JSON file with a list of records")
    name = one_line(path)
    if os.path.isdir(path):
        raise UserError(f"{name}: is a directory; expected a JSON file with a list of records")
    if not os.path.exists(path):
        raise UserError(f"{name}: file does not exist; expected a JSON file with a list of records")
    if not os.path.isfile(path):
        raise UserError(f"{name}: is not a regular file; expected a JSON file with a list of records")
    try:
        if os.path.getsize(path) > FILE_BYTES:
            raise UserError(f"{name}: more than {FILE_BYTES} bytes; expected a list of records")
        records = json.loads(
            Path(path).read_text(encoding="utf-8-sig"),
            object_pairs_hook=_make_object,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{name}: broken JSON at {place}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{name}: cannot be read: {one_line(error)}") from error
    if not isinstance(records, list):
        raise UserError(f"{name}: expected a list of records, got {_describe(records)}")
    return records


def _make_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    return record if len(record) == len(pairs) else _RepeatedField(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def list_record_problems(record: object, index: int) -> list[str]:
    """What keeps a record from being a case, one line each; empty for a sound record.

    Each line names the record (counted from 0), the field and what was expected. Fields that are not
    known are no problem unless they are spelt like one that is missing.
    """
    where = f"record {index}"
    if not isinstance(record, dict) or isinstance(record, _RepeatedField):
        return [f"{where}: {find_shape_problem(record, 'MMEdit')}"]
    needed = list(REQUIRED_FIELDS)
    for pair in PAIRED_FIELDS:
        if any(field in record for field in pair):
            needed += pair
    problems = [diagnose_text(record, field) for field in needed]
    if record.get("pred") is not None and not isinstance(record["pred"], str):
        problems.append(f"field 'pred': expected a string or null, got {_describe(record['pred'])}")
    if not isinstance(record.get("joint", False), bool):
        problems.append(f"field 'joint': expected true or false, got {_describe(record['joint'])}")
    problems.append(vlkeb.find_portability_problem(record, TEXT_LENGTH, (cckeb.COMPOSED,)))
    problems.append(cckeb.find_textual_edit_problem(record, TEXT_LENGTH))
    return [f"{where}: {problem}" for problem in problems if problem]


def find_shape_problem(record: object, title: str) -> str | None:
    """What is wrong with a value that should be an object with each field once; None for one."""
    if not isinstance(record, dict):
        return f"expected an object with the fields of {title}, got {_describe(record)}"
    if isinstance(record, _RepeatedField):
        return f"field {one_line(repr(record.repeated), 80)} is given twice; expected it once"
    return None


def list_unknown_fields(record: dict[str, object], known: Sequence[str] = KNOWN_FIELDS) -> list[str]:
    """The record's keys which are no field of MMEdit or of the hard probes, or none of the ``known``."""
    return [key for key in record if key not in known]


def diagnose_text(record: dict[str, object], field: str, known: Sequence[str] = KNOWN_FIELDS) -> str | None:
    """What is wrong with a field that should be a text; None for a sound one."""
    if field not in record:
        close = difflib.get_close_matches(field, list_unknown_fields(record, known), n=1, cutoff=0.7)
        hint = f"; is {one_line(repr(close[0]), 80)} meant to be {field!r}?" if close else ""
        return f"field {field!r} is missing; expected a string{hint}"
    value = record[field]
    if not isinstance(value, str):
        return f"field {field!r}: expected a string, got {_describe(value)}"
    if len(value) > TEXT_LENGTH:
        return f"field {field!r}: {len(value)} characters; expected at most {TEXT_LENGTH}"
    if not is_unicode(value):
        return f"field {field!r}: half of a surrogate pair, which is no text; expected a string"
    return None if value.strip() else f"field {field!r} is empty; expected some text"


def _describe(value: object) -> str:
    return _JSON_NAMES.get(type(value), "a number")


def _find_second_edit(record: Annotation) -> vlkeb.SecondEdit | None:
    return cckeb.find_second_edit(record) or vlkeb.find_second_edit(record)


def has_nothing_to_edit(record: Annotation) -> bool:
    """Whether the model's own answer ``pred`` already is the right one under ``normalise_answer``."""
    pred = _strip_or_none(record.get("pred"))
    return pred is not None and normalise_answer(pred) == normalise_answer(record["alt"])


def _strip_or_none(value: str | None) -> str | None:
    return (value or "").strip() or None


def wrap_prompt(template: str, text: str) -> str:
    """The question in its template, whose ``{}`` it replaces; one that has the template already as it is."""
    start, end = template.split("{}")
    text = text.strip()
    wrapped = bool(start or end) and text.startswith(start.lstrip()) and text.endswith(end.rstrip())
    return text if wrapped and len(text) > len(template.strip()) - 2 else template.replace("{}", text)


class CaseSequence(Sequence[Case]):
    """What the datasets share: indexing over ``len`` and ``_make_case``, and which images are missing."""

    @abstractmethod
    def _make_case(self, position: int) -> Case: ...

    @overload
    def __getitem__(self, index: int) -> Case: ...
    @overload
    def __getitem__(self, index: slice) -> list[Case]: ...
    def __getitem__(self, index: int | slice) -> Case | list[Case]:
        """The case at a position (negative ones count from the end), or a list of them for a slice."""
        if isinstance(index, slice):
            return [self._make_case(position) for position in range(len(self))[index]]
        return self._make_case(range(len(self))[index])

    def list_missing_images(self) -> list[str]:
        """The image files that the cases name and that do not exist, each once, in order of use."""
        queries = (query for case in self for query in (case.request.query, *(p.query for p in case.probes)))
        names = dict.fromkeys(query.image for query in queries if query.image is not None)
        return [name for name in names if not os.path.isfile(name)]


class _MMEditDataset(CaseSequence):
    task: ClassVar[str]

    def __init__(
        self,
        path: PathLike,
        image_root: PathLike | None = None,
        rephrase_root: PathLike | None = None,
        size: int | None = None,
        clean: bool = False,
        skip_broken: bool = False,
        template: str = VQA_TEMPLATE,
        allow_outside: bool = False,
        probes: PathLike | None = None,
        second_edit: bool = False,
    ) -> None:
        _check_size(size)
        path = check_path(path, "annotations", "a JSON file with a list of records")
        for name, root in (("image_root", image_root), ("rephrase_root", rephrase_root)):
            if root is not None:
                check_path(root, name, "a folder of images")
        if not isinstance(template, str) or template.count("{}") != 1:
            raise UserError(
                f"template {one_line(template)!r}: expected exactly one {{}} where the question goes"
            )
        self.path = Path(path)
        self.image_root = image_root
        self.rephrase_root = image_root if rephrase_root is None else rephrase_root
        self.template = template
        self.second_edit = second_edit
        self.skipped: list[str] = []
        self.cleaned = 0
        self._further = [] if probes is None else read_probes(probes, path)
        self._records: list[tuple[int, Annotation]] = []
        for index, record in enumerate(self._read(path)):
            if size is not None and len(self._records) == size:
                break
            problems = self._list_problems(record, index)
            annotation = cast(Annotation, record)
            if not problems and not allow_outside:
                problems = self._list_outside_images(annotation, index)
            if problems:
                message = f"{one_line(path)}: {problems[0]}"
                if not skip_broken:
                    raise UserError(message)
                self.skipped.append(message)
            elif clean and self._has_nothing_to_edit(annotation):
                self.cleaned += 1
            else:
                self._records.append((index, annotation))

    def __len__(self) -> int:
        """The number of cases kept."""
        return len(self._records)

    # What another layout than MMEdit's does in its own way.
    def _read(self, path: PathLike) -> Sequence[object]:
        return load_records(path)

    def _list_problems(self, record: object, index: int) -> list[str]:
        return list_record_problems(record, index)

    def _has_nothing_to_edit(self, record: Annotation) -> bool:
        return has_nothing_to_edit(record)

    def _list_outside_images(self, record: Annotation, index: int) -> list[str]:
        """Images of a sound record that lie outside of their folder."""
        roots: dict[ImageField, PathLike | None] = dict.fromkeys(IMAGE_FIELDS, self.image_root)
        roots["image_rephrase"] = self.rephrase_root
        return [
            f"record {index}: field {field!r}: {one_line(record[field], 80)} lies outside of "
            f"{one_line(root)}; expected an image in that folder (allow_outside: true takes others)"
            for field, root in roots.items()
            if field in record and lies_outside(root, record[field])
        ] + [
            f"record {index}: probe {cell!r}: {one_line(probe.image, 80)} lies outside of "
            f"{one_line(self.image_root)}; expected an image in it (allow_outside: true takes others)"
            for cell, probe in self._get_further(index).probes.items()
            if probe is not None and probe.image is not None and lies_outside(self.image_root, probe.image)
        ]

    def _get_further(self, index: int) -> RecordProbes:
        return self._further[index] if index < len(self._further) else NO_PROBES

    @abstractmethod
    def _write_prompt(self, text: str) -> str:
        """The prompt of the edit itself, from ``src`` or ``rephrase``."""

    def _write_question(self, text: str) -> str:
        return wrap_prompt(self.template, text)

    def _locate_image(self, name: str) -> str:
        return str(image_path(self.image_root, name))

    def _make_case(self, position: int) -> Case:
        index, record = self._records[position]
        query = Query(
            self._locate_image(record["image"]), self._write_prompt(record["src"]), record["alt"].strip()
        )
        request = EditRequest(f"{self.task}-{index}", query, _strip_or_none(record.get("pred")))
        further = self._get_further(index)
        probes = (
            *self._make_five_probes(record, query),
            *self._make_hard_probes(record, query, joint="joint" in further.probes),
            *self._make_portability_probes(record, query),
            *(self._make_further_probe(cell, p) for cell, p in further.probes.items() if p is not None),
        )
        second = _find_second_edit(record) if self.second_edit else None
        if second is None:
            return Case(request, probes, self.task, further.groups)
        probes = (*probes, *(self._make_probe_after(after, query) for after in second.probes))
        asked = EditRequest(f"{request.id}-second", Query(None, *second.edit))
        return Case(request, probes, self.task, further.groups, asked)

    def _make_probe_after(self, after: vlkeb.AskedAfter, query: Query) -> Probe:
        """What is asked after both edits, on the first one's image or on none."""
        question, answer = after.asked
        asked = Query(query.image, self._write_question(question), answer)
        if not after.on_image:
            asked = Query(None, question, answer)
        return Probe(after.metric, asked, get_expectation(after.metric))

    def _make_five_probes(self, record: Annotation, query: Query) -> tuple[Probe, ...]:
        rephrased = str(image_path(self.rephrase_root, record["image_rephrase"]))
        text_only = Query(None, record["loc"].strip(), record["loc_ans"].strip())
        unrelated = Query(
            self._locate_image(record["m_loc"]),
            self._write_question(record["m_loc_q"]),
            record["m_loc_a"].strip(),
        )
        return (
            Probe("reliability", query, "target"),
            Probe(
                "t_generality",
                Query(query.image, self._write_prompt(record["rephrase"]), query.target),
                "target",
            ),
            Probe("m_generality", Query(rephrased, query.prompt, query.target), "target"),
            Probe("t_locality", text_only, "unchanged"),
            Probe("m_locality", unrelated, "unchanged"),
        )

    def _make_further_probe(self, cell: str, probe: FurtherProbe) -> Probe:
        write = self._write_prompt if probe.form == "edit" else self._write_question
        image = None if probe.image is None else self._locate_image(probe.image)
        return Probe(cell, Query(image, write(probe.text), probe.answer.strip()), get_expectation(cell))

    def _make_portability_probes(self, record: Annotation, query: Query) -> list[Probe]:
        """VLKEB's, on the edit's image."""
        return [
            Probe(name, Query(query.image, self._write_question(asked.question), asked.answer), "target")
            for name, asked in vlkeb.list_consequences(record).items()
        ]

    def _make_hard_probes(self, record: Annotation, query: Query, joint: bool = False) -> tuple[Probe, ...]:
        probes = []
        if "same_question_image" in record:
            image = self._locate_image(record["same_question_image"])
            other_image = Query(image, query.prompt, record["same_question_a"].strip())
            probes.append(Probe("same_question", other_image, "unchanged"))
        if "same_image_q" in record:
            prompt = self._write_question(record["same_image_q"])
            other_question = Query(query.image, prompt, record["same_image_a"].strip())
            probes.append(Probe("same_image", other_question, "unchanged"))
        if record.get("joint") or joint:
            image = str(image_path(self.rephrase_root, record["image_rephrase"]))
            both = Query(image, self._write_prompt(record["rephrase"]), query.target)
            probes.append(Probe("joint", both, "target"))
        return tuple(probes)


class VQADataset(_MMEditDataset):
    """E-VQA: the question goes into ``template``, whose ``{}`` it replaces.

    A sequence of ``Case``, whose ids count the records of the file from 0 whatever is left out.
    Relative image names lie under ``image_root``, those of ``image_rephrase`` under
    ``rephrase_root`` (default: ``image_root``). ``size`` keeps the first so many usable cases and
    reads no further. ``clean`` leaves out records with nothing to edit, counted in ``cleaned``.
    ``skip_broken`` leaves out broken records, with a message for each in ``skipped``. Images outside
    of a folder that is given, also by a symbolic link in it, need ``allow_outside``. ``probes`` is a
    file of further probes (``unike.datasets.probe_files``), which are asked, too. ``second_edit`` makes the
    second edit of records of VLKEB's edit-one-hop file and of CCKEB, and asks what needs both
    (``unike.datasets.vlkeb``, ``unike.datasets.cckeb``).

    Raises:
        UserError: one line, if the file is unusable (see ``load_records``) or, without
            ``skip_broken``, for the first record that lacks a field, has an ill-typed one, or names an
            image outside of the folder.
    """

    task: ClassVar[str] = "vqa"

    def _write_prompt(self, text: str) -> str:
        return self._write_question(text)


class CaptionDataset(_MMEditDataset):
    """E-IC: the record's own ``src`` is the prompt; ``template`` serves the questions of its probes.

    Arguments, attributes and errors are those of ``VQADataset``.
    """

    task: ClassVar[str] = "caption"

    def _write_prompt(self, text: str) -> str:
        return text.strip()


class CapVQADataset(CaseSequence):
    """E-VQA and E-IC mixed: interleaved, E-VQA first, then the rest of the longer one.

    The first ``alternating`` cases are the interleaved ones. ``size`` is that of the mixture; the other
    arguments go to both datasets, ``skipped`` and ``cleaned`` add theirs up.

    Raises:
        UserError: as ``VQADataset``.
    """

    def __init__(
        self,
        vqa_path: PathLike,
        caption_path: PathLike,
        image_root: PathLike | None = None,
        rephrase_root: PathLike | None = None,
        size: int | None = None,
        clean: bool = False,
        skip_broken: bool = False,
        template: str = VQA_TEMPLATE,
        allow_outside: bool = False,
        vqa_probes: PathLike | None = None,
        caption_probes: PathLike | None = None,
        second_edit: bool = False,
    ) -> None:
        common = (image_root, rephrase_root, size, clean, skip_broken, template, allow_outside)
        self.vqa = VQADataset(vqa_path, *common, vqa_probes, second_edit)
        self.caption = CaptionDataset(caption_path, *common, caption_probes, second_edit)
        self.skipped = self.vqa.skipped + self.caption.skipped
        self.cleaned = self.vqa.cleaned + self.caption.cleaned
        vqa = [(self.vqa, position) for position in range(len(self.vqa))]
        caption = [(self.caption, position) for position in range(len(self.caption))]
        turns = chain.from_iterable(zip_longest(vqa, caption))
        self._order: list[tuple[_MMEditDataset, int]] = [turn for turn in turns if turn is not None][:size]
        self.alternating = min(len(self._order), 2 * min(len(vqa), len(caption)))

    def __len__(self) -> int:
        """The number of cases of both tasks."""
        return len(self._order)

    def _make_case(self, position: int) -> Case:
        dataset, index = self._order[position]
        return dataset._make_case(index)


def _check_size(size: int | None) -> None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise UserError(
            f"size: expected a whole number above 0 (or none, for all records), got {describe_value(size)}"
        )
