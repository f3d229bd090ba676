"""Audits annotation files: ``python -m unike.datasets.doctor TRAIN [EVAL] [--images DIR] [--model DIR]``."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from rich.table import Table
from rich.text import Text

from unike.datasets.answers import NUMBER_WORDS, normalise_answer
from unike.datasets.audited import AuditedFile, open_audited
from unike.datasets.images import PathLike, image_path, lies_outside, open_image
from unike.datasets.lengths import LONG_TEXT, require_limit
from unike.datasets.mmedit import Annotation, has_nothing_to_edit
from unike.system.arguments import ArgumentParser
from unike.system.console import Console
from unike.system.launching import run_guarded
from unike.system.text import one_line
from unike.types import UserError

WH_WORDS = frozenset({"what", "which", "who", "whom", "whose", "where", "when", "why", "how"})
QUOTES = ('"', "'", "\u201c", "\u2018")
EXAMPLES = 3
SHOWN = 5

# Of the tokens that end or fill texts, as common tokenisers write them.
_SPECIAL_TEXT = re.compile(r"</?s>|<unk>|<pad>|<bos>|<eos>|<image>|<\|[a-z_]+\|>")
_LEADING_ARTICLE = re.compile(r"^(a|an|the)\s+")

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class AuditFinding:
    """One kind of dirt in one file: the records that have it (counted from 0), and words about them."""

    name: str
    meaning: str
    severity: Severity
    records: tuple[int, ...] = ()
    details: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """The number of records concerned."""
        return len(self.records)


@dataclass(frozen=True)
class AuditReport:
    """What was found in one file, or in an evaluation file against its training file."""

    title: str
    records: int
    findings: tuple[AuditFinding, ...] = field(default=())

    @property
    def errors(self) -> int:
        """The number of records with an error, summed over the kinds of error."""
        return sum(finding.count for finding in self.findings if finding.severity == "error")

    def __getitem__(self, name: str) -> AuditFinding:
        """The finding of that name; KeyError if the audit has none."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(name)

    def as_dict(self) -> dict[str, object]:
        """The report in JSON's types."""
        findings = [
            {
                "name": finding.name,
                "meaning": finding.meaning,
                "severity": finding.severity,
                "count": finding.count,
                "records": list(finding.records),
                "details": list(finding.details),
            }
            for finding in self.findings
        ]
        return {"title": self.title, "records": self.records, "findings": findings}


def starts_with_stray_quote(record: Annotation) -> bool:
    """Whether the rephrased prompt opens with a quotation mark."""
    return record["rephrase"].lstrip().startswith(QUOTES)


def rephrase_equals_src(record: Annotation) -> bool:
    """Whether the rephrased prompt is the prompt."""
    return record["rephrase"].strip() == record["src"].strip()


def yes_no_with_wh_rephrase(record: Annotation) -> bool:
    """Whether the target is yes or no and the rephrased prompt's first word asks what, where, how..."""
    first = re.search(r"[a-z]+", record["rephrase"].lower())
    return normalise_answer(record["alt"]) in ("yes", "no") and bool(first and first[0] in WH_WORDS)


def pred_equals_alt(record: Annotation) -> bool:
    """Whether both answers are equal in lower case, without a leading article, a lone number word a digit."""
    pred = (record.get("pred") or "").strip()
    return bool(pred) and _simplify(pred) == _simplify(record["alt"])


def _simplify(answer: str) -> str:
    bare = _LEADING_ARTICLE.sub("", answer.strip().lower())
    return NUMBER_WORDS.get(bare, bare)


def alt_with_edge_whitespace(record: Annotation) -> bool:
    """Whether the target begins or ends in whitespace or has a line break."""
    return record["alt"] != record["alt"].strip() or "\n" in record["alt"]


def alt_never_generated(record: Annotation) -> bool:
    """Whether no model could generate the target: it has a line break inside, or the text of an end token."""
    return "\n" in record["alt"].strip() or _SPECIAL_TEXT.search(record["alt"]) is not None


def rephrase_with_newline(record: Annotation) -> bool:
    """Whether the rephrased prompt has a line break."""
    return "\n" in record["rephrase"]


NEVER_GENERATED = "alt can never be generated: a line break in it, or an end token"
DIRT: dict[str, tuple[str, Callable[[Annotation], bool]]] = {
    "stray_quote": ("rephrase starts with a quotation mark", starts_with_stray_quote),
    "rephrase_equals_src": ("rephrase is src", rephrase_equals_src),
    "yes_no_wh": ("yes/no target, rephrase asks what, how...", yes_no_with_wh_rephrase),
    "pred_equals_alt": ("pred is alt but for article or number word", pred_equals_alt),
    "nothing_to_edit": ("pred is alt by VQA's rules (see clean)", has_nothing_to_edit),
    "alt_whitespace": ("alt has edge whitespace or a line break", alt_with_edge_whitespace),
    "rephrase_newline": ("rephrase has a line break", rephrase_with_newline),
}


def audit(path: PathLike, images: PathLike | None = None, model: PathLike | None = None) -> AuditReport:
    """Examines one annotation file; with ``images``, also every image that it names under that folder; with
    ``model``, a Hugging Face folder, whether its context takes every question with its answer.

    Errors are records that cannot become a case, targets that no model could generate, and images that cannot
    be opened. Duplicates, unknown fields and the kinds in ``DIRT`` are warnings. Records are counted from 0.
    Those with an error are not searched for warnings.

    Raises:
        UserError: one line, if the file or the folder is unusable.
    """
    file = open_audited(path)
    problems, sound = file.problems, file.sound
    broken = tuple(index for index in problems if index not in sound)
    findings = [
        AuditFinding(
            "fields",
            "a field is missing, empty or ill-typed",
            "error",
            broken,
            tuple(line for index in broken for line in problems[index]),
        )
    ]
    if images is not None:
        findings += _find_bad_images(file, images)
    never = tuple(i for i, record in sound.items() if alt_never_generated(record))
    findings += [
        AuditFinding("never_generated", NEVER_GENERATED, "error", never),
        _find_long_texts(file, model),
        _find_duplicates(file.records),
        _find_unknown_fields(file),
    ]
    for name, (meaning, test) in DIRT.items():
        findings.append(
            AuditFinding(name, meaning, "warning", tuple(i for i, record in sound.items() if test(record)))
        )
    return AuditReport(_name(path, file), len(file.records), tuple(findings))


def _name(path: PathLike, file: AuditedFile) -> str:
    return one_line(path) if file.title == "MMEdit" else f"{one_line(path)} ({file.title})"


def find_leakage(train: PathLike, evaluation: PathLike) -> AuditReport:
    """Which evaluation records use what the training file has too; broken records are passed over.

    Raises:
        UserError: one line, if a file is unusable.
    """
    seen, file = open_audited(train).sound.values(), open_audited(evaluation)
    kinds = {
        "leaked_image": ("image also in train", ("image",)),
        "leaked_m_loc_pair": ("m_loc and m_loc_q also in train", ("m_loc", "m_loc_q")),
        "leaked_m_loc": ("m_loc, m_loc_q and m_loc_a also in train", ("m_loc", "m_loc_q", "m_loc_a")),
    }
    findings = []
    for name, (meaning, fields) in kinds.items():
        # Some layouts have no unrelated images.
        known = {tuple(record.get(key) for key in fields) for record in seen if fields[0] in record}
        leaked = (i for i, r in file.sound.items() if tuple(r.get(key) for key in fields) in known)
        findings.append(AuditFinding(name, meaning, "warning", tuple(leaked)))
    title = f"{one_line(evaluation)} against {one_line(train)}"
    return AuditReport(title, len(file.records), tuple(findings))


def _find_long_texts(file: AuditedFile, model: PathLike | None) -> AuditFinding:
    limit = None if model is None else require_limit(model)
    found = {i: file.find_long(i, limit) for i in file.sound}
    found = {i: lines for i, lines in found.items() if lines}
    details = tuple(f"record {i}: {line}" for i, lines in found.items() for line in lines)
    if limit is None:
        meaning, severity = f"a text of more than {LONG_TEXT} characters", "warning"
    else:
        meaning, severity = f"a question is too long for {one_line(limit.folder, 60)}", "error"
    return AuditFinding("too_long", meaning, cast(Severity, severity), tuple(found), details)


def _find_duplicates(records: Sequence[object]) -> AuditFinding:
    first: dict[str, int] = {}
    repeated, details = [], []
    for index, record in enumerate(records):
        original = first.setdefault(json.dumps(record, sort_keys=True), index)
        if original != index:
            repeated.append(index)
            details.append(f"record {index}: same as record {original}")
    return AuditFinding(
        "duplicates", "identical to an earlier record", "warning", tuple(repeated), tuple(details)
    )


def _find_unknown_fields(file: AuditedFile) -> AuditFinding:
    found = {index: keys for index in range(len(file.records)) if (keys := file.list_unknown(index))}
    names = dict.fromkeys(key for keys in found.values() for key in keys)
    details = tuple(f"field {one_line(repr(key), 80)} is not read{_suggest(key, file)}" for key in names)
    return AuditFinding("unknown_fields", "has fields that are not read", "warning", tuple(found), details)


def _suggest(key: str, file: AuditedFile) -> str:
    close = difflib.get_close_matches(key, file.known, n=1, cutoff=0.7)
    return f"; is it meant to be {close[0]!r}?" if close else ""


def _find_bad_images(file: AuditedFile, images: PathLike) -> list[AuditFinding]:
    if not os.path.isdir(images):
        raise UserError(f"{one_line(images)}: is not a directory; expected the folder of the images")
    kinds = {
        "missing_pictures": "an image does not exist",
        "unreadable_pictures": "an image cannot be decoded",
        "outside_pictures": "an image lies outside of the folder",
    }
    checked: dict[str, tuple[str, str] | None] = {}
    concerned: dict[str, dict[int, None]] = {kind: {} for kind in kinds}
    for index in file.sound:
        for name in file.images(index):
            if name not in checked:
                checked[name] = _diagnose_image(images, name)
            problem = checked[name]
            if problem:
                concerned[problem[0]][index] = None
    findings = []
    for kind, meaning in kinds.items():
        details = tuple(problem[1] for problem in checked.values() if problem and problem[0] == kind)
        findings.append(AuditFinding(kind, meaning, "error", tuple(concerned[kind]), details))
    return findings


def _diagnose_image(images: PathLike, name: str) -> tuple[str, str] | None:
    if lies_outside(images, name):
        return "outside_pictures", f"{one_line(name)}: lies outside of {one_line(images)}"
    try:
        open_image(name, images)
    except UserError as error:
        exists = os.path.exists(image_path(images, name))
        return "unreadable_pictures" if exists else "missing_pictures", str(error)
    return None


def render(report: AuditReport) -> Table:
    """The report as a table: a row for each kind of finding, with the first records concerned."""
    table = Table()
    table.add_column("finding")
    table.add_column("records", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("first ones")
    for finding in report.findings:
        share = f"{100 * finding.count / report.records:.1f}%" if report.records else "-"
        first = ", ".join(str(index) for index in finding.records[:EXAMPLES])
        style = ("red" if finding.severity == "error" else "yellow") if finding.count else "dim"
        more = ", ..." if finding.count > EXAMPLES else ""
        table.add_row(Text(finding.meaning), f"{finding.count:,}", share, first + more, style=style)
    return table


def _print(console: Console, report: AuditReport) -> None:
    console.print(Text(f"{report.title}: {report.records:,} records", style="bold"), soft_wrap=True)
    console.print(render(report))
    for finding in report.findings:
        for line in finding.details[:SHOWN]:
            console.print(Text(f"{finding.severity}: {line}"), soft_wrap=True)
        if len(finding.details) > SHOWN:
            console.print(
                Text(f"{finding.severity}: ... and {len(finding.details) - SHOWN:,} more like these")
            )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0 without errors, 1 with some, 2 with one line for unusable input."""
    return run_guarded(lambda: run(argv))


def run(argv: Sequence[str] | None) -> int:
    """Audits what the command line names, and gives its exit code."""
    parser = ArgumentParser(
        prog="python -m unike.datasets.doctor",
        description="Audit annotation files in the layout of MMEdit, or of another benchmark, which is "
        "recognised by its fields. With two, the second is checked for what it shares "
        "with the first (training before evaluation).",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a JSON file of records")
    parser.add_argument("--images", metavar="DIR", help="also open every image, under this folder")
    parser.add_argument("--model", metavar="DIR", help="also count tokens, with the tokenizer in this folder")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    arguments = parser.parse_args(argv)
    reports = [audit(file, arguments.images, arguments.model) for file in arguments.files]
    if len(arguments.files) == 2:
        reports.append(find_leakage(*arguments.files))
    if arguments.json:
        print(json.dumps([report.as_dict() for report in reports], indent=2))
    else:
        console = Console()
        for report in reports:
            _print(console, report)
    return 1 if any(report.errors for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
