"""Hard probes for annotations in MMEdit's layout: ``python -m unike.datasets.derive FILE --train FILE``.

A record's question T1 and image I1 are combined with others':

- T2, I2: the most similar train question that has another answer, and its image;
- T3, I3: the record's own unrelated question and image (``m_loc_q``, ``m_loc``);
- I4: no image.

The seven cells ``t1_i3, t3_i1`` (related to the edit's question or image alone), ``t1_i4, t2_i4`` (no
image) and ``t1_i2, t2_i1, t2_i2`` (a confusable question or image) are those of De-VQA (arXiv 2511.13243),
which has them from MMEdit's files too. Three more are the hard probes of the bundled benchmark:
``same_question`` and ``same_image``, where another record of the file has the same question on another
image or the same image with another question, and ``joint``, the rephrased question on the rephrased image.

Two departures from De-VQA. Similarity is the cosine of TF-IDF vectors of words, which needs no model; theirs
is that of MiniLM's sentence embeddings. A question above ``most_alike`` counts as a rephrasing: asked about
I1 its right answer would be the edit's, so it is no T2.
"""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np

from unike.datasets.answers import normalise_answer
from unike.datasets.images import PathLike
from unike.datasets.mmedit import Annotation, list_record_problems, load_records
from unike.datasets.probe_files import (
    NO_PROBES,
    Form,
    FurtherProbe,
    RecordProbes,
    describe_probes,
    sign_file,
)
from unike.system.arguments import ArgumentParser
from unike.system.files import write_text
from unike.system.text import one_line
from unike.types import DERIVED_METRICS, HARD_METRICS, UserError

Task = Literal["vqa", "caption"]
MOST_ALIKE = 0.8
DERIVED_CELLS = (*HARD_METRICS, *DERIVED_METRICS)


# ---------------------------------------------------------------- similarity


class TextIndex:
    """Texts by words, to find which are most similar to another one.

    A text's vector has, for each word of its normal form, the word's count times
    ``log((n + 1) / (f + 1)) + 1``, where ``f`` of the ``n`` texts have the word; similarity is the cosine.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        words = [Counter(normalise_answer(text).split()) for text in texts]
        self._frequencies = Counter(word for row in words for word in row)
        self._count = len(texts)
        postings: dict[str, list[tuple[int, float]]] = {}
        for i, row in enumerate(words):
            for word, weight in self._weigh(row).items():
                postings.setdefault(word, []).append((i, weight))
        self._postings = {
            word: (np.array([i for i, _ in found]), np.array([weight for _, weight in found]))
            for word, found in postings.items()
        }

    def _weigh(self, words: Mapping[str, int]) -> dict[str, float]:
        weights = {
            word: count * (math.log((self._count + 1) / (self._frequencies[word] + 1)) + 1)
            for word, count in words.items()
        }
        norm = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
        return {word: weight / norm for word, weight in weights.items()}

    def measure(self, text: str) -> np.ndarray:
        """The cosine of ``text`` with each of the texts, ``(n,)``, in [0, 1]."""
        scores = np.zeros(self._count)
        for word, weight in self._weigh(Counter(normalise_answer(text).split())).items():
            if word in self._postings:
                rows, weights = self._postings[word]
                scores[rows] += weight * weights
        return scores


# ---------------------------------------------------------------- derivation


class _Candidates:
    """Records to take a confusable question, or image, from."""

    def __init__(self, records: Sequence[Annotation], task: Task, most_alike: float) -> None:
        self.records, self.task, self.most_alike = records, task, most_alike
        self._index = TextIndex([self._get_text(r) for r in records])
        self._answers = [normalise_answer(r["alt"]) for r in records]
        self._questions = [normalise_answer(r["src"]) for r in records]

    def _get_text(self, record: Annotation) -> str:
        # All captions have the same few prompts: what confuses two images is what they show.
        return record["src"] if self.task == "vqa" else record["alt"]

    def find_confusable(self, record: Annotation, chooser: random.Random) -> Annotation | None:
        """The most similar record with another answer, another image and, for questions, another question
        that is no rephrasing; ties are drawn."""
        scores = np.round(self._index.measure(self._get_text(record)), 9)
        own = (normalise_answer(record["src"]), normalise_answer(record["rephrase"]))
        answer, images = normalise_answer(record["alt"]), _list_own_images(record)
        allowed = scores < self.most_alike
        # Ranked once, walked from the top: nearly always one of the first few is allowed.
        best: list[int] = []
        for i in map(int, np.argsort(-scores, kind="stable")):
            if best and scores[i] < scores[best[0]]:
                break
            is_other = self._answers[i] != answer and self.records[i]["image"] not in images
            asks_other = self.task == "caption" or self._questions[i] not in own
            if allowed[i] and is_other and asks_other:
                best.append(i)
        return self.records[chooser.choice(best)] if best else None


def _list_own_images(record: Annotation) -> tuple[str, str]:
    return record["image"], record["image_rephrase"]


def derive_probes(
    records: Sequence[Annotation | None],
    others: Sequence[Annotation],
    task: Task = "vqa",
    seed: int = 0,
    most_alike: float = MOST_ALIKE,
) -> list[RecordProbes]:
    """Each record's probes by cell, none for a broken record (None). ``others`` are the train records that
    T2 and I2 are taken from.

    The answer that is forced in the seven cells is the edit's own: where an edit leaks, it shows there.
    """
    candidates = _Candidates(others, task, most_alike)
    neighbours = _Neighbours([r for r in records if r is not None], most_alike)
    out: list[RecordProbes] = []
    for position, record in enumerate(records):
        if record is None:
            out.append(NO_PROBES)
            continue
        chooser = random.Random(f"{seed}/{position}")
        probes: dict[str, FurtherProbe | None] = {}
        if task == "vqa":
            probes |= neighbours.derive_same_question(record, chooser)
            probes |= neighbours.derive_same_image(record, chooser)
        if "joint" not in record:
            probes["joint"] = None
        probes |= _derive_cells(record, candidates.find_confusable(record, chooser), task)
        out.append(RecordProbes(probes))
    return out


class _Neighbours:
    """Records of one file that share a question, or an image."""

    def __init__(self, records: Sequence[Annotation], most_alike: float) -> None:
        self.records, self.most_alike = records, most_alike
        self._wording = TextIndex([r["src"] for r in records])
        self._by_question: dict[str, list[int]] = {}
        self._by_image: dict[str, list[int]] = {}
        for i, record in enumerate(records):
            self._by_question.setdefault(normalise_answer(record["src"]), []).append(i)
            self._by_image.setdefault(record["image"], []).append(i)

    def derive_same_question(self, record: Annotation, chooser: random.Random) -> dict[str, FurtherProbe]:
        """The record's question on the image of another one that asks the same and has another answer."""
        answer, images = normalise_answer(record["alt"]), _list_own_images(record)
        same = (self.records[i] for i in self._by_question[normalise_answer(record["src"])])
        found = [r for r in same if normalise_answer(r["alt"]) != answer and r["image"] not in images]
        if "same_question_image" in record or not found:
            return {}
        other = chooser.choice(found)
        return {"same_question": _ask(record["src"], other["image"], other["alt"])}

    def derive_same_image(self, record: Annotation, chooser: random.Random) -> dict[str, FurtherProbe]:
        """The question of another record about the record's image, no rephrasing of its own."""
        if "same_image_q" in record:
            return {}
        alike = np.maximum(self._wording.measure(record["src"]), self._wording.measure(record["rephrase"]))
        found = [i for i in self._by_image[record["image"]] if alike[i] < self.most_alike]
        if not found:
            return {}
        other = self.records[chooser.choice(found)]
        return {"same_image": _ask(other["src"], record["image"], other["alt"])}


def _ask(text: str, image: str | None, answer: str, form: Form = "edit") -> FurtherProbe:
    return FurtherProbe(text.strip(), form, image, answer.strip())


def _derive_cells(record: Annotation, other: Annotation | None, task: Task) -> dict[str, FurtherProbe]:
    """The seven cells of De-VQA, without those that need another record where there is ``other`` none."""

    target = record["alt"]
    cells = {
        "t1_i3": _ask(record["src"], record["m_loc"], target),
        "t3_i1": _ask(record["m_loc_q"], record["image"], target, "question"),
        "t1_i4": _ask(record["src"], None, target),
    }
    if other is not None:
        cells["t1_i2"] = _ask(record["src"], other["image"], target)
        # Prompts for captions are all alike: another one about the edit's image asks for the same caption.
        if task == "vqa":
            cells["t2_i4"] = _ask(other["src"], None, target)
            cells["t2_i1"] = _ask(other["src"], record["image"], target)
            cells["t2_i2"] = _ask(other["src"], other["image"], target)
    return {cell: cells[cell] for cell in DERIVED_CELLS if cell in cells}


# ---------------------------------------------------------------- files


def derive_file(
    path: PathLike,
    train: PathLike | None = None,
    task: Task = "vqa",
    seed: int = 0,
    most_alike: float = MOST_ALIKE,
) -> list[RecordProbes]:
    """The probes of each record of a file. Without ``train``, T2 and I2 are taken from the file's own
    records. UserError as ``load_records``, and where no record is sound."""
    records = [_take_sound(r, i) for i, r in enumerate(load_records(path))]
    source = path if train is None else train
    others = [r for i, o in enumerate(load_records(source)) if (r := _take_sound(o, i)) is not None]
    for name, found in ((path, [r for r in records if r is not None]), (source, others)):
        if not found:
            raise UserError(f"{one_line(name)}: no record is sound; expected MMEdit's fields")
    return derive_probes(records, others, task, seed, most_alike)


def _take_sound(record: object, index: int) -> Annotation | None:
    return None if list_record_problems(record, index) else cast(Annotation, record)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 0, or 2 with one line for unusable input or an output that is there."""
    parser = ArgumentParser(
        prog="python -m unike.datasets.derive",
        description="Derive hard probes from annotations in MMEdit's layout, once. "
        "data.<task>.probes: FILE in a YAML asks them.",
    )
    parser.add_argument("file", metavar="FILE", help="annotations to ask the probes with")
    parser.add_argument("--train", metavar="FILE", help="annotations that confusable questions come from")
    parser.add_argument("--task", choices=("vqa", "caption"), default="vqa", help="kind of annotations")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn; default 0")
    parser.add_argument(
        "--most_alike",
        type=float,
        default=MOST_ALIKE,
        help=f"similarity from which a question is a rephrasing; default {MOST_ALIKE}",
    )
    parser.add_argument("--output", metavar="FILE", help="default: FILE's name with .probes.json")
    try:
        arguments = parser.parse_args(argv)
        output = Path(arguments.output or Path(arguments.file).with_suffix(".probes.json"))
        if not 0 < arguments.most_alike <= 1:
            raise UserError(f"--most_alike: expected a number above 0, at most 1, got {arguments.most_alike}")
        if output.exists():
            raise UserError(f"{one_line(output)}: is there already; expected a new file (--output)")
        if not output.absolute().parent.is_dir():
            raise UserError(
                f"{one_line(output.absolute().parent)}: no such folder; expected that of --output"
            )
        source = arguments.train or arguments.file
        how = (arguments.task, arguments.seed, arguments.most_alike)
        records = derive_file(arguments.file, source, *how)
        facts = {
            "train_sha256": sign_file(source),
            **dict(zip(("task", "seed", "most_alike"), how, strict=True)),
        }
        try:
            write_text(output, describe_probes(sign_file(arguments.file), records, **facts))
        except OSError as error:
            raise UserError(f"{one_line(output)}: cannot be written: {one_line(error.strerror)}") from error
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    counts = Counter(name for record in records for name in record.probes)
    for name in DERIVED_CELLS:
        print(f"{name:14} {counts[name]:6} of {len(records)} records")
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
