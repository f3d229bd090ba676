"""``python -m unike.own.benchmark``: a benchmark in MMEdit's layout from a folder of images.

    python -m unike.own.benchmark PHOTOS --questions questions.csv --into my_benchmark

A small file of questions has an image, a question and its right answer in each row. Without one the folder's
subfolders are the answers, as in an image-classification data set. What else a record needs is derived:

- ``rephrase``: the question after another introduction;
- ``image_rephrase``: the image in another style (``unike.datasets.changed_images``), in ``rephrased/``;
- ``loc``, ``loc_ans``: a question without an image, from a short list;
- ``m_loc``, ``m_loc_q``, ``m_loc_a``: another record with another image, and another question if possible.

A row may hold each of these itself; its own come first. Further probes: ``unike.datasets.derive``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from unike.config.untrained import UNTRAINED
from unike.datasets.answers import normalise_answer
from unike.datasets.changed_images import restyle
from unike.datasets.derive import derive_file
from unike.datasets.images import lies_outside, open_image
from unike.datasets.mmedit import list_record_problems
from unike.datasets.probe_files import RecordProbes, describe_probes, sign_file
from unike.datasets.rows import FIELDS, name_fields, read_file, report_unknown_fields
from unike.system.arguments import ArgumentParser
from unike.system.faults import explain_write_errors
from unike.system.files import write_text
from unike.system.findings import collect_problems
from unike.system.text import one_line
from unike.types import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
DEFAULT_QUESTION = "What is this?"
REPHRASED = "Look at the image: {}"
RECORDS, PROBES, IMAGES, YAML = "vqa_eval.json", "vqa_eval.probes.json", "rephrased", "own.yaml"
FACTS = (
    ("What is the capital of France?", "Paris"),
    ("How many days are in a week?", "7"),
    ("Who wrote Hamlet?", "Shakespeare"),
    ("What is the largest planet of the solar system?", "Jupiter"),
    ("What is the chemical symbol of gold?", "Au"),
    ("Which ocean lies between Europe and America?", "Atlantic"),
    ("In which country is Mount Fuji?", "Japan"),
    ("What is the opposite of hot?", "cold"),
)
# MMEdit's name of what a row holds.
_NAMES = {
    "prompt": "src",
    "target": "alt",
    "wrong": "pred",
    "image": "image",
    "rephrase_prompts": "rephrase",
    "rephrase_image": "image_rephrase",
    "text_prompt": "loc",
    "text_answer": "loc_ans",
    "vision_image": "m_loc",
    "vision_prompt": "m_loc_q",
    "vision_answer": "m_loc_a",
    **{name: name for name in FIELDS if name.startswith("same_")},
    "joint": "joint",
}
_PAIRS = (("loc", "loc_ans"), ("m_loc", "m_loc_q", "m_loc_a"))
Row = dict[str, Any]


@dataclass(frozen=True)
class Built:
    """What was written: the folder, how many records it has, and how many of them have each probe."""

    folder: Path
    records: int
    probes: Mapping[str, int]


# ---------------------------------------------------------------- reading


def read_questions(images: Path, questions: str | None) -> list[Row]:
    """Rows by MMEdit's names of fields. UserError with the problems of all rows."""
    rows = list(_read_subfolders(images)) if questions is None else _read_rows(questions)
    problems = [line for i, row in enumerate(rows) for line in _list_row_problems(row, images, f"record {i}")]
    if not problems and len({row["image"] for row in rows}) < 2:
        problems = ["questions: of one image alone; expected two or more, since locality needs another one"]
    if problems:
        raise UserError(*problems)
    return rows


def _read_subfolders(images: Path) -> Iterator[Row]:
    """An image each, whose subfolder is the answer."""
    found = sorted(p for p in images.glob("*/*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise UserError(
            f"{one_line(images)}: no questions are given, and no subfolder holds an image; expected "
            "--questions FILE, or a subfolder for each answer"
        )
    for path in found:
        answer = path.parent.name.replace("_", " ")
        yield {"src": DEFAULT_QUESTION, "alt": answer, "image": str(path.relative_to(images))}


def _read_rows(questions: str) -> list[Row]:
    found = read_file(questions)
    if not found:
        raise UserError(f"{one_line(questions)}: holds no record; expected two or more")
    report_unknown_fields(found)
    rows, problems = list[Row](), list[str]()
    for i, row in enumerate(found):
        fields, wrong = name_fields(row, f"record {i}")
        rows.append({_NAMES[name]: value for name, value in fields.items() if name in _NAMES})
        problems += wrong
        if not wrong and "image" not in fields:
            problems.append(f"record {i}: image is missing; expected its name in the folder of images")
    if problems:
        raise UserError(*problems)
    return rows


def _list_row_problems(row: Row, images: Path, at: str) -> list[str]:
    problems = []
    for name in ("image", "image_rephrase", "m_loc", "same_question_image"):
        value = row.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            problems.append(f"{at}: {name}: expected the name of an image, got {type(value).__name__}")
        elif lies_outside(images, value):
            problems.append(f"{at}: {name}: {one_line(value, 80)} lies outside of {one_line(images)}")
        else:
            found = collect_problems(partial(open_image, value, images))
            problems += (f"{at}: {name}: {line}" for line in found)
    for names in _PAIRS:
        given = [name for name in names if name in row]
        if given and len(given) < len(names):
            lost = ", ".join(name for name in names if name not in row)
            problems.append(f"{at}: {', '.join(given)} without {lost}; expected all of them, or none")
    return problems


# ---------------------------------------------------------------- deriving


def derive_records(rows: Sequence[Row], seed: int = 0) -> list[Row]:
    """Each row with all fields of MMEdit. An ``image_rephrase`` that is still to be drawn has its record's
    number as its name."""
    out = []
    for i, row in enumerate(rows):
        chooser = random.Random(f"{seed}/{i}")
        fact, answer = chooser.choice(FACTS)
        other = rows[_find_other(rows, i, chooser)]
        derived = {
            "pred": None,
            "rephrase": REPHRASED.format(row["src"].strip()),
            "image_rephrase": f"{i:05}.png",
        }
        derived |= {"loc": fact, "loc_ans": answer}
        derived |= {"m_loc": other["image"], "m_loc_q": other["src"], "m_loc_a": other["alt"]}
        out.append(derived | row)
    return out


def _find_other(rows: Sequence[Row], number: int, chooser: random.Random) -> int:
    """A record with another image; one that asks something else where there is one."""
    own = rows[number]
    others = [i for i, row in enumerate(rows) if row["image"] != own["image"]]
    asked = normalise_answer(own["src"])
    best = [i for i in others if normalise_answer(rows[i]["src"]) != asked]
    return chooser.choice(best or others)


def build_benchmark(images: Path, rows: Sequence[Row], into: Path, seed: int = 0) -> Built:
    """Writes the benchmark into a new folder. UserError where it cannot be written, or where a record is not
    sound."""
    records = derive_records(rows, seed)
    if problems := [line for i, record in enumerate(records) for line in list_record_problems(record, i)]:
        raise UserError(*problems)
    with explain_write_errors(into, resumable=False):
        (into / IMAGES).mkdir(parents=True)
        for record, row in zip(records, rows, strict=True):
            place = into / IMAGES / record["image_rephrase"]
            if "image_rephrase" in row:
                # Rephrased images lie in one folder.
                record["image_rephrase"] = f"own-{zlib.crc32(row['image_rephrase'].encode()):08x}.png"
                open_image(row["image_rephrase"], images).save(into / IMAGES / record["image_rephrase"])
            else:
                shown = str(images / record["image"])
                restyle(shown, random.Random(f"{seed}/{record['image_rephrase']}")).draw_image().save(place)
        found = write_records(records, into / RECORDS, into / PROBES, seed=seed)
    counts = Counter(name for probes in found for name in probes.probes)
    return Built(into, len(records), counts)


def write_records(
    records: Sequence[Row],
    path: Path,
    probes: Path,
    task: Literal["vqa", "caption"] = "vqa",
    train: Path | None = None,
    seed: int = 0,
) -> list[RecordProbes]:
    """Writes annotations, and the further probes that are derived from them and from the records of
    ``train``, by default their own. UserError where a record is not sound."""
    if problems := [line for i, record in enumerate(records) for line in list_record_problems(record, i)]:
        raise UserError(*problems)
    write_text(path, json.dumps(list(records), indent=1, ensure_ascii=False))
    found = derive_file(path, train, task, seed=seed)
    write_text(probes, describe_probes(sign_file(path), found, train_sha256=sign_file(train or path)))
    return found


# ---------------------------------------------------------------- the command


def run(argv: Sequence[str]) -> int:
    """Builds the benchmark that the command line names; returns the exit code."""
    args = parse_arguments(argv)
    images, into = Path(args.images), Path(args.into)
    if not os.path.isdir(images):
        raise UserError(f"{one_line(images)}: no such folder; expected a folder of images")
    if os.path.lexists(into):
        raise UserError(f"--into {one_line(into)}: is there already; expected a new folder")
    rows = read_questions(images, args.questions)
    options = None if args.model is None else _describe_options(args.model, images)
    built = build_benchmark(images, rows, into, args.seed)
    print(f"{built.folder / RECORDS}: {built.records} records")
    for name, count in built.probes.items():
        print(f"  {name:14} {count:6} of {built.records} records")
    if options is not None:
        write_text(into / YAML, yaml.safe_dump(options, sort_keys=False))
        print(f"to edit and measure: python run_edit.py --hparams_dir {into / YAML} --task vqa")
    else:
        data = f"data.vqa.eval={into / RECORDS} data.vqa.probes={into / PROBES}"
        roots = f"image_root={images} rephrase_root={into / IMAGES}"
        print(f"to edit and measure: python run_edit.py --hparams_dir FILE --task vqa {data} {roots}")
    return 0


def _describe_options(model: str, images: Path) -> Row:
    """A YAML of edits that need no data, for this model and benchmark; its files are next to it."""
    # Imported late, as torch comes with it.
    from unike.editor.models import describe_model

    hparams = describe_model(model)
    own = ("model_name", "name", "dtype", "answer_end", *UNTRAINED)
    options: Row = {key: getattr(hparams, key) for key in own}
    if os.path.isdir(hparams.name):
        options["name"] = os.path.abspath(hparams.name)
    options["data"] = {"vqa": {"eval": RECORDS, "probes": PROBES}}
    return options | {"image_root": os.path.abspath(images), "rephrase_root": IMAGES}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        "python -m unike.own.benchmark", description="Make a benchmark of a folder of images."
    )
    add = parser.add_argument
    add("images", metavar="DIR", help="folder of the images")
    add("--questions", metavar="FILE", help=".csv, .json or .jsonl: image, question and answer in each row")
    add("--model", metavar="ID", help="also write a YAML for this model: folder, or id of the hub")
    add("--into", required=True, metavar="DIR", help="a new folder for the benchmark")
    add("--seed", type=int, default=0, help="seed of what is drawn: %(default)s")
    return parser.parse_args(argv)


if __name__ == "__main__":
    import sys

    from unike.system.launching import run_guarded

    sys.exit(run_guarded(lambda: run(sys.argv[1:])))
