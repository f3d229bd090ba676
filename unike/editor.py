"""``MultimodalEditor``: editing as EasyEdit's users write it."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from tqdm import tqdm

from unike import runs
from unike.backbones.base import Backbone
from unike.backbones.images import content_key
from unike.backbones.loading import load_backbone
from unike.backbones.store import row_key
from unike.config.hparams import HyperParams
from unike.datasets.mmedit import CapVQADataset
from unike.datasets.triplets import Triplet, make_triplets
from unike.edits import Edit, compose
from unike.edits.attached import EditedModel, Slot
from unike.edits.base import load_edit
from unike.edits.explain import Explanation, ask
from unike.edits.files import read_edit
from unike.edits.shares import Shared
from unike.evaluation.protocols import run_one_step
from unike.evaluation.record import Record
from unike.evaluation.summary import Summary, summarise
from unike.methods.base import require_reachable
from unike.runs import checks, inputs
from unike.types import Case, EditRequest, Expectation, ImageLike, Probe, Query, UserError

logger = logging.getLogger("unike")

METRIC_KEYS = {
    "reliability": "rewrite_acc",
    "t_generality": "rephrase_acc",
    "m_generality": "image_rephrase_acc",
    "t_locality": "locality_acc",
    "m_locality": "multimodal_locality_acc",
}
EditResult = tuple[list[dict[str, Any]], EditedModel, Summary]
Texts = str | Sequence[str]


class MultimodalEditor:
    """Edits a vision-language model with the method that the hyper-parameters name.

    Memory and encoders are read, or built, when the first edit needs them. Editors of one backbone
    share what is attached to it.
    """

    def __init__(self, hparams: HyperParams, backbone: Backbone, progress: bool = True) -> None:
        self.hparams, self.backbone, self.progress = hparams, backbone, progress
        self._parts: runs.Parts | None = None
        self._slot = Slot.of(backbone)

    @classmethod
    def from_hparams(
        cls, hparams: HyperParams | str | os.PathLike[str], progress: bool = True
    ) -> MultimodalEditor:
        """Loads the backbone; UserError with all problems of method, device and weights before that."""
        if not isinstance(hparams, HyperParams):
            hparams = HyperParams.from_hparams(hparams)
        checks.require_backbone(hparams)
        return cls(hparams, load_backbone(hparams), progress)

    def prepare(self, train_ds: Iterable[Case] | None = None, skip_broken: bool = False) -> runs.Parts:
        """Backbone and method with memory and encoders, from ``train_ds`` or the YAML's train data."""

        def triplets() -> list[Triplet]:
            if train_ds is not None:
                return make_triplets(train_ds, self.hparams.triplets)
            return inputs.read_triplets(self.hparams, skip_broken)

        def cases() -> Sequence[Case]:
            return inputs.read_method_cases(self.hparams, skip_broken, train_ds)

        if self._parts is None or train_ds is not None:
            with self._slot.only(()):
                self._parts = runs.assemble(self.hparams, self.backbone, self.progress, triplets, cases)
        return self._parts

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What is attached to the backbone, in order."""
        return self._slot.edits

    def attach(self, edit: Edit) -> None:
        """Attaches an edit, of any method, on top of those that are attached; ``edit`` replaces them all by
        its own.

        Where several edits set the same weight, the last one counts. UserError, with nothing changed, where
        an edit of the same ``id`` is attached, or where this one was made on another model.
        """
        mine = not self.edits or self._slot.editor is self
        self._slot.attach(edit)
        self._slot.editor = self if mine else None

    def detach(self, id: str) -> Edit:
        """Takes one edit back and gives it; the others stay, in order, as if it had never been attached.

        An edit trained while this one was active (``keep_original_weight=False``) stays as trained.
        UserError where no edit of that ``id`` is attached.
        """
        return self._slot.detach(id)

    def generate(
        self,
        image: ImageLike | None,
        prompt: str,
        max_new_tokens: int | None = None,
        edited: bool = False,
        **decoding: object,
    ) -> Any:
        """The answer of the unedited model, or with ``edited=True`` under all that is attached.

        Unedited by default, so that a comparison with the base model does not depend on what is attached;
        ``ask`` gives both answers. Greedy by default; ``decoding`` takes ``num_beams``, ``do_sample``,
        ``temperature``, ``top_p``, ``num_return_sequences`` and ``seed``, see
        ``unike.backbones.decoding.Decoding``. A list of answers where ``num_return_sequences`` is above 1.
        Without ``max_new_tokens`` it is that of the YAML which loaded the backbone. UserError for values that
        do not fit.
        """
        return self._slot.generate(self.edits if edited else (), image, prompt, max_new_tokens, **decoding)

    def ask(self, image: ImageLike | None, prompt: str, top: int = 5) -> Explanation:
        """The answers before and after the attached edits, and what was active for this prompt.

        Of each layer's retrieved items the ``top`` most attended ones are listed. UserError for an image
        that cannot be read.
        """
        return ask(self._slot, image, prompt, top)

    def load(self, folder: str | os.PathLike[str]) -> Edit:
        """An edit from its folder, with this editor's memory, encoders or network, if it needs them.

        UserError as ``Edit.load``.
        """
        saved = read_edit(folder)
        saved.require(self.backbone)
        shared = self.prepare().method.get_shared_parts() if saved.needs else Shared()
        return load_edit(saved, self.backbone, shared)

    def edit(
        self,
        prompts: Texts,
        targets: Texts,
        image: ImageLike | Sequence[ImageLike],
        rephrase_prompts: Texts | None = None,
        rephrase_image: ImageLike | Sequence[ImageLike] | None = None,
        locality_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        keep_original_weight: bool = True,
        template: str | None = None,
    ) -> EditResult:
        """Edits one request or a list of them: ``(metrics, edited_model, summary)``.

        Images are paths, PIL images or normalised float tensors ``(3, H, W)``. ``locality_inputs``
        holds ``{"text": {"prompt", "ground_truth"}, "vision": {"prompt", "ground_truth", "image"}}``.
        Prompts about an image go into ``template``, whose ``{}`` they replace; without one they stay
        as given. Metrics are teacher-forced, in [0, 1], for the probes that are given.

        ``metrics[i]`` also has the training's ``steps``, final ``loss`` and whether it ``reached`` its target
        before ``max_steps``; the latter two are None for methods that do not train each edit (IKE, KE, MEND,
        SERAC). Where an edit failed, its ``error`` is the reason, ``pre`` and ``post`` are empty, a warning
        is logged, and ``edited_model.edits`` lacks it: it is ``()`` where all failed.

        ``keep_original_weight=True`` edits each request from the original model; ``edited_model``
        carries the last edit alone. ``False`` adds to what is attached, in order: each request is
        edited, and measured, on top of the former ones, and ``edited_model`` carries them all.

        Raises UserError, with all problems at once and nothing changed, for lists of different
        lengths, empty texts, missing images, and targets that could never be generated: with a line break or
        a special token in them.
        """
        former = () if keep_original_weight else self.edits
        if former and self._slot.editor is not self:
            raise UserError(
                "keep_original_weight: the attached edits are another editor's; remove them first"
            )
        requests = _Requests(prompts, targets, image, rephrase_prompts, rephrase_image, locality_inputs or {})
        cases = requests.make_cases(template, {edit.id for edit in former})
        return self._edit_all(cases, former, not keep_original_weight, generated=False)

    def edit_dataset(
        self,
        ds: Sequence[Case],
        train_ds: Iterable[Case] | None = None,
        template: str | None = None,
        generated: bool = True,
    ) -> EditResult:
        """Edits each case from the original model: ``(metrics, edited_model, summary)``.

        ``train_ds`` gives the knowledge triplets in place of the YAML's train data. ``template`` takes
        the place of the dataset's own. ``summary`` holds means with intervals in both evaluation modes;
        ``generated=False`` leaves out the second. ``edited_model`` carries the last edit.
        """
        cases = ds if template is None else _apply_template(ds, template)
        self.prepare(train_ds)
        return self._edit_all(cases, (), accumulate=False, generated=generated)

    def _edit_all(
        self, cases: Sequence[Case], former: tuple[Edit, ...], accumulate: bool, generated: bool
    ) -> EditResult:
        parts = self.prepare()
        require_reachable(self.backbone, [case.request for case in cases])
        reader = parts.make_reader(generated)
        edits, metrics, records = former, list[dict[str, Any]](), list[Record]()
        with self._slot.only(()):
            for number, case in enumerate(tqdm(cases, desc="edits", disable=not self.progress)):
                history = compose(edits) if accumulate else None
                outcome = run_one_step(self.backbone, parts.method, case, reader, history)
                if outcome.edit is not None:
                    _require_one_kind(history, outcome.edit)
                    edits = (*edits, outcome.edit) if accumulate else (outcome.edit,)
                records.append(outcome.record)
                metrics.append(_describe_metric(number, case, outcome.record))
        self._slot.put(edits)
        self._slot.editor = self
        if failed := [metric["error"] for metric in metrics if "error" in metric]:
            logger.warning("%d of %d edits failed, the first: %s", len(failed), len(metrics), failed[0])
        summary = summarise(records, self.hparams.seed, self.hparams.metric_presets)
        return metrics, EditedModel(self._slot, edits), summary


def _require_one_kind(history: Edit | None, edit: Edit) -> None:
    """UserError where an edit was made on top of unlike ones: the states that it was trained on are theirs
    in part only."""
    if history is not None and len((history | edit).parts) > 1:
        raise UserError(
            "keep_original_weight: other kinds of edits are attached; detach them, or edit from the original "
            "and attach the new edit on top"
        )


def _describe_metric(number: int, case: Case, record: Record) -> dict[str, Any]:
    """A case's record in EasyEdit's shape."""
    query = case.request.query
    rewrite = {"prompt": query.prompt, "target": query.target, "image": query.image}
    metric: dict[str, Any] = {"case_id": number, "requested_rewrite": rewrite, "time": record.seconds}
    scores = {
        METRIC_KEYS.get(m, f"{m}_acc"): value for m, value in record.get_scores("teacher_forced").items()
    }
    metric["pre"] = {key: value.before for key, value in scores.items()}
    metric["post"] = {key: value.after for key, value in scores.items()}
    metric |= {"steps": record.steps, "loss": record.loss, "reached": record.reached}
    if record.error is not None:
        metric["error"] = record.error
    return metric


def _make_wrapper(template: str | None) -> Callable[[str], str]:
    if template is None:
        return lambda text: text
    if template.count("{}") != 1:
        raise UserError(f"template {template!r}: expected exactly one {{}} where the question goes")
    start, end = template.split("{}")

    def wrap(text: str) -> str:
        # Datasets and users wrap their prompts too: once is enough.
        return text if text.startswith(start) and text.endswith(end) else start + text + end

    return wrap


def _apply_template(ds: Sequence[Case], template: str) -> Sequence[Case]:
    wrap = _make_wrapper(template)
    if isinstance(ds, CapVQADataset):
        raise UserError("template: give it to CapVQADataset itself; expected None here")
    if hasattr(ds, "template"):
        changed = copy.copy(ds)
        changed.template = template  # type: ignore[attr-defined]
        return changed

    def wrap_query(query: Query) -> Query:
        return query if query.image is None else replace(query, prompt=wrap(query.prompt))

    return [
        replace(
            case,
            request=replace(case.request, query=wrap_query(case.request.query)),
            probes=tuple(replace(p, query=wrap_query(p.query)) for p in case.probes),
        )
        for case in ds
    ]


class _Requests:
    """The arguments of ``edit`` as lists, checked together."""

    def __init__(
        self,
        prompts: Texts,
        targets: Texts,
        image: ImageLike,
        rephrase_prompts: Texts | None,
        rephrase_image: ImageLike,
        locality: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.columns = {"prompts": _as_list(prompts), "targets": _as_list(targets), "image": _as_list(image)}
        optional = {"rephrase_prompts": rephrase_prompts, "rephrase_image": rephrase_image}
        self.columns |= {name: _as_list(value) for name, value in optional.items() if value is not None}
        self.problems: list[str] = []
        known = {"text": ("prompt", "ground_truth"), "vision": ("prompt", "ground_truth", "image")}
        for part, values in locality.items():
            if part not in known:
                self.problems.append(f"locality_inputs: {part!r} is unknown; expected text or vision")
                continue
            at = f"locality_inputs[{part!r}]"
            if set(values) != set(known[part]):
                self.problems.append(
                    f"{at}: expected {', '.join(known[part])}, got {', '.join(values) or 'nothing'}"
                )
                continue
            self.columns |= {f"{at}[{name!r}]": _as_list(values[name]) for name in known[part]}
        self._check()

    def _check(self) -> None:
        count = len(self.columns["prompts"])
        if count == 0:
            self.problems.append("prompts: is empty; expected at least one")
        for name, values in self.columns.items():
            if len(values) != count:
                self.problems.append(f"{name}: expected as many as prompts, {count}, got {len(values)}")
            check = _find_image_problem if "image" in name.split("[")[-1] else _find_text_problem
            for i, value in enumerate(values):
                at = name if len(values) == 1 else f"{name}[{i}]"
                if problem := check(value):
                    self.problems.append(f"{at}: {problem}")
        if self.problems:
            raise UserError(*self.problems)

    def make_cases(self, template: str | None, taken: set[str]) -> list[Case]:
        """One case per request. Its id, ``edit-`` and a checksum, is the same for the same request, and
        is followed by a number where it is one of ``taken``."""
        wrap, names, taken = _make_wrapper(template), list[str](), set(taken)
        requests = zip(*(self.columns[name] for name in ("image", "prompts", "targets")), strict=True)
        for image, prompt, target in requests:
            stem = f"edit-{row_key((content_key(image), wrap(prompt), target.strip()))[:8]}"
            free = (name for n in count(1) if (name := stem if n == 1 else f"{stem}-{n}") not in taken)
            names.append(next(free))
            taken.add(names[-1])
        return [self._make_case(i, name, wrap) for i, name in enumerate(names)]

    def _make_case(self, i: int, name: str, wrap: Callable[[str], str]) -> Case:
        row = {column: values[i] for column, values in self.columns.items()}
        query = Query(row["image"], wrap(row["prompts"]), row["targets"].strip())
        probes: list[tuple[str, Query, Expectation]] = [("reliability", query, "target")]
        if "rephrase_prompts" in row:
            probes.append(("t_generality", replace(query, prompt=wrap(row["rephrase_prompts"])), "target"))
        if "rephrase_image" in row:
            probes.append(("m_generality", replace(query, image=row["rephrase_image"]), "target"))
        for part, metric in (("text", "t_locality"), ("vision", "m_locality")):
            at = f"locality_inputs[{part!r}]"
            if f"{at}['prompt']" not in row:
                continue
            prompt, answer = row[f"{at}['prompt']"], row[f"{at}['ground_truth']"].strip()
            image = row.get(f"{at}['image']")
            probes.append(
                (metric, Query(image, prompt if image is None else wrap(prompt), answer), "unchanged")
            )
        return Case(EditRequest(name, query), tuple(Probe(*probe) for probe in probes))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _find_text_problem(value: object) -> str | None:
    if not isinstance(value, str):
        return f"expected a text, got {type(value).__name__}"
    return None if value.strip() else "is empty; expected a text"


def _find_image_problem(value: object) -> str | None:
    if value is None:
        return "is missing; expected a path, a PIL image or a tensor"
    if isinstance(value, (str, os.PathLike)) and not os.path.isfile(value):
        return f"{os.fspath(value)}: no such image"
    return None
