"""``MultimodalEditor``: editing as EasyEdit's users write it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from unike import runs
from unike.backbones.base import Backbone
from unike.backbones.loading import load_backbone
from unike.config.hparams import HyperParams
from unike.datasets.triplets import Triplet, make_triplets
from unike.editor.requests import Requests, Texts
from unike.editor.templates import apply_template
from unike.edits import Edit, compose
from unike.edits.attached import EditedModel, Slot
from unike.edits.base import load_edit
from unike.edits.explain import Explanation, ask
from unike.edits.files import read_edit
from unike.edits.shares import Shared
from unike.evaluation.protocols import run_one_step
from unike.evaluation.record import Record
from unike.evaluation.summary import Summary, summarise
from unike.runs import checks, inputs
from unike.types import Case, ImageLike, UserError

METRIC_KEYS = {
    "reliability": "rewrite_acc",
    "t_generality": "rephrase_acc",
    "m_generality": "image_rephrase_acc",
    "t_locality": "locality_acc",
    "m_locality": "multimodal_locality_acc",
}
EditResult = tuple[list[dict[str, Any]], EditedModel, Summary]


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
        self, image: ImageLike | None, prompt: str, max_new_tokens: int | None = None, edited: bool = False
    ) -> str:
        """The greedy answer of the unedited model, or with ``edited=True`` under all that is attached.

        Unedited by default, so that a comparison with the base model does not depend on what is attached;
        ``ask`` gives both answers.
        """
        return self._slot.generate(self.edits if edited else (), image, prompt, max_new_tokens)

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

        ``keep_original_weight=True`` edits each request from the original model; ``edited_model``
        carries the last edit alone. ``False`` adds to what is attached, in order: each request is
        edited, and measured, on top of the former ones, and ``edited_model`` carries them all.

        Raises UserError, with all problems at once and nothing changed, for lists of different
        lengths, empty texts and missing images.
        """
        former = () if keep_original_weight else self.edits
        if former and self._slot.editor is not self:
            raise UserError(
                "keep_original_weight: the attached edits are another editor's; remove them first"
            )
        requests = Requests(prompts, targets, image, rephrase_prompts, rephrase_image, locality_inputs or {})
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
        cases = ds if template is None else apply_template(ds, template)
        self.prepare(train_ds)
        return self._edit_all(cases, (), accumulate=False, generated=generated)

    def _edit_all(
        self, cases: Sequence[Case], former: tuple[Edit, ...], accumulate: bool, generated: bool
    ) -> EditResult:
        parts = self.prepare()
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
    if record.error is not None:
        metric["error"] = record.error
    return metric
