"""``MultimodalEditor``: editing as EasyEdit's users write it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from unike import runs
from unike.backbones.base import Backbone
from unike.backbones.loading import load_backbone
from unike.config.hparams import HyperParams
from unike.datasets.consistency import ask_consistency
from unike.datasets.triplets import Triplet, make_triplets
from unike.editor.arguments import (
    NAMED,
    Arguments,
    check_file_types,
    read_arguments,
    read_dataset_arguments,
    read_switch,
)
from unike.editor.cases import read_cases
from unike.editor.metrics import METRIC_KEYS, describe_metric, merge_probes
from unike.editor.models import describe_model
from unike.editor.requests import Images, Texts, Values, locate_image, make_cases, read_columns
from unike.edits import Edit, compose
from unike.edits.attached import EditedModel, Slot
from unike.edits.base import load_edit
from unike.edits.explain import Explanation, ask
from unike.edits.files import read_edit
from unike.edits.pickled import PickledEdit
from unike.edits.questions import answer_each, check_question
from unike.edits.shares import Shared
from unike.evaluation.protocols import Outcome, run_one_step
from unike.evaluation.record import Record
from unike.evaluation.summary import Summary, summarise
from unike.methods.base import require_reachable
from unike.methods.isolation import train_apart
from unike.methods.registry import resolve_needs
from unike.runs import checks, inputs
from unike.runs.drawing import draw_train_data
from unike.system.text import describe_value, one_line, unwrap_number
from unike.types import Case, ImageLike, TooLongError, UserError

logger = logging.getLogger("unike")
__all__ = ["METRIC_KEYS", "EditResult", "MultimodalEditor"]

EditResult = tuple[list[dict[str, Any]], EditedModel, Summary]
"""``(metrics, edited_model, summary)``: one mapping per request, the model with the edits attached, and means
with 95% intervals over the requests, in percent.

``metrics[i]`` has ``case_id``, ``requested_rewrite`` (prompt, target, image), ``time`` in seconds, ``pre``
and ``post`` (scores in [0, 1], by EasyEdit's names), ``steps``, ``loss`` and ``reached``, and ``error`` where
the edit failed.
"""


class MultimodalEditor:
    """Edits a vision-language model with the method that the hyper-parameters name.

    ``backbone`` is the model of ``load_backbone(hparams)``; ``from_hparams`` and ``from_model`` load it. With
    ``progress=False`` no progress bars are shown. UserError for what is no ``HyperParams`` or no backbone.

    The knowledge memory and the encoders are read, or built, when the first edit needs them. Editors of one
    backbone share the attached edits. One thread at a time uses a backbone: others wait until a call is done,
    or until a block ``with edit.applied(backbone)`` ends. Calls of an editor ignore what such a block
    applies.
    """

    # Of EasyEdit's calls: whose definitions of locality the metrics have, and whether its meaning of
    # ``keep_original_weight=False`` is taken into account.
    metric_preset: str | None = None
    easyedit = False

    def __init__(self, hparams: HyperParams, backbone: Backbone, progress: bool = True) -> None:
        if not isinstance(hparams, HyperParams):
            raise UserError(f"hparams: expected hyper-parameters, got {type(hparams).__name__}")
        if not hasattr(type(backbone), "fingerprint"):
            raise UserError(
                f"backbone: expected one of unike.load_backbone(hparams), got {type(backbone).__name__}"
            )
        self.hparams, self.backbone, self.progress = hparams, backbone, progress
        self._parts: runs.Parts | None = None
        self._slot = Slot.of(backbone)
        self._epoch = self._slot.guard.epoch
        self._train_ds: Sequence[Case] | None = None

    @classmethod
    def from_hparams(
        cls, hparams: HyperParams | str | os.PathLike[str], progress: bool = True
    ) -> MultimodalEditor:
        """The editor of a YAML file, of a shipped one's name (``scoped/tiny_blip2``), or of hyper-parameters.

        Loads the backbone onto the YAML's device. UserError, with all problems of the YAML, the method, the
        device and the weight files, before anything is loaded.
        """
        if not isinstance(hparams, HyperParams):
            hparams = HyperParams.from_hparams(hparams)
        checks.require_backbone(hparams)
        return cls(hparams, load_backbone(hparams), progress)

    @classmethod
    def from_model(
        cls,
        name: str | os.PathLike[str],
        model_name: str | None = None,
        dtype: str | None = None,
        device: str = "auto",
        progress: bool = True,
        **options: object,
    ) -> MultimodalEditor:
        """Loads the model in a Hugging Face folder, or of an id of the hub; its edits need no data at all.

        There is no YAML, no train split and nothing trained beforehand. ``model_name`` is the family, one of
        ``unike.types.BACKBONES``; by default config.json decides. ``dtype`` is ``float32``, ``bfloat16`` or
        ``float16``; by default that of the weights. ``device`` is ``auto``, ``cpu``, ``cuda:0`` and so on.
        ``options`` change those of ``unike.config.untrained``. UserError, before anything is loaded, for a
        model of no known family and for values that do not fit.
        """
        return cls.from_hparams(describe_model(name, model_name, dtype, device, **options), progress)

    def __getstate__(self) -> dict[str, Any]:
        """Without memory, encoders and networks: a copy reads its own."""
        return {"_slot": self._slot, **vars(self), "_parts": None}

    def prepare(self, train_ds: Any = None, skip_broken: bool = False) -> runs.Parts:
        """Reads or trains what the method needs before its first edit: memory, encoders, scope classifier.

        Gives the backbone and the method with these parts. Train data are ``train_ds``, else the YAML's. What
        is trained already is read from its folder; a ``train_ds`` that is not needed is named in a warning.
        ``skip_broken`` leaves out broken train records. UserError for what is no data set, see
        ``edit_dataset``, and for folders of another model.
        """
        if train_ds is not None:
            # Needed again where the weights are changed.
            self._train_ds = _keep_cases(train_ds) or self._read_train_cases(train_ds)
        given, asked = self._train_ds, list[str]()

        def triplets() -> list[Triplet]:
            asked.append("triplets")
            if given is not None:
                return make_triplets(given, self.hparams.triplets)
            draw_train_data(self.hparams, self.backbone)
            return inputs.read_triplets(self.hparams, skip_broken)

        def cases() -> Sequence[Case]:
            asked.append("cases")
            if given is None:
                draw_train_data(self.hparams, self.backbone)
            return inputs.read_method_cases(self.hparams, skip_broken, given)

        with self._slot.only(()), train_apart(self.backbone):
            epoch = self._slot.guard.epoch
            # Memory, encoders and networks belong to the weights that they were made with.
            if self._parts is None or train_ds is not None or self._epoch != epoch:
                with _explain_changed_weights(self._parts is not None and self._epoch != epoch):
                    self._parts = runs.assemble(self.hparams, self.backbone, self.progress, triplets, cases)
                self._epoch = epoch
                if train_ds is not None and not asked:
                    _report_unread(self.hparams)
            return self._parts

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits that are attached to the backbone, in the order of attaching."""
        return self._slot.edits

    def attach(self, edit: Edit) -> None:
        """Attaches an edit, of any method, after those that are attached already. A later call of ``edit``
        replaces them all, unless its edits accumulate.

        Where several edits set the same weight, or answer one question about one image, the last one counts;
        edits that contradict each other are named in a warning. UserError, with nothing changed, where an
        edit of the same ``id`` is attached, or where this one was made on another model.
        """
        if not isinstance(edit, Edit):
            raise UserError(f"attach: expected an edit, got {type(edit).__name__}")
        with self._slot.guard.hold():
            if isinstance(edit, PickledEdit):
                shared = self._get_shared() if edit.needs() else Shared()
                edit = edit.restore(self.backbone, shared.knowledge, shared.network, shared.scope)
            mine = not self.edits or self._slot.editor is self
            self._slot.attach(edit)
            self._slot.editor = self if mine else None

    def detach(self, id: str) -> Edit:
        """Detaches the edit of this ``id`` and returns it. The others stay, as if it had never been attached.

        An edit trained while this one was active (``keep_original_weight=False``) stays as trained.
        UserError where no edit of that ``id`` is attached.
        """
        if not isinstance(id, str):
            raise UserError(f"detach: expected the id of an edit, got {type(id).__name__}")
        return self._slot.detach(id)

    def generate(
        self,
        image: Images,
        prompt: Texts,
        max_new_tokens: int | None = None,
        edited: bool = False,
        **decoding: object,
    ) -> Any:
        """The answer of the unedited model; with ``edited=True`` that of the model with all attached edits.

        The answer is a text. A list of prompts, of images or of both gives a list of texts. ``image=None``
        asks the language model alone. ``ask`` gives both answers. ``max_new_tokens`` is the most tokens of an
        answer; by default that of the YAML which loaded the backbone. Greedy by default; ``decoding`` takes
        ``num_beams``, ``do_sample``, ``temperature``, ``top_p``, ``num_return_sequences`` and ``seed``, see
        ``unike.backbones.decoding.Decoding``. Each question has a list of answers where
        ``num_return_sequences`` is above 1. UserError for what is no image or no text, and for values that do
        not fit.
        """
        edited = bool(read_switch(edited, "edited"))
        with self._slot.guard.hold():
            edits = self.edits if edited else ()

            def answer(image: ImageLike | None, prompt: str) -> Any:
                return self._slot.generate(edits, image, prompt, max_new_tokens, **decoding)

            return answer_each(answer, image, prompt, self._locate)

    def ask(self, image: ImageLike | None, prompt: str, top: int = 5) -> Explanation:
        """The answers without and with the attached edits, and which of them were active for this prompt.

        Of each layer's retrieved items the ``top`` most attended ones are listed. UserError for an image
        that cannot be read, and for a ``top`` below 0.
        """
        image, prompt = check_question(image, prompt, self._locate)
        number = unwrap_number(top)
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise UserError(f"top: expected a whole number from 0 on, got {describe_value(top)}")
        with torch.inference_mode(False):
            return ask(self._slot, image, prompt, number)

    def _locate(self, image: ImageLike | None) -> ImageLike | None:
        return locate_image(image, self.hparams.image_root)

    def load(self, folder: str | os.PathLike[str]) -> Edit:
        """The edit that ``edit.save(folder)`` wrote, with the memory, encoders or network of this editor.

        It is not attached yet. Its logits are those it gave when it was saved, bit for bit. UserError for an
        edit of another model or of another knowledge memory, and for a damaged folder.
        """
        if not isinstance(folder, (str, os.PathLike)):
            raise UserError(f"load: expected the folder of an edit, got {type(folder).__name__}")
        saved = read_edit(folder)
        with self._slot.guard.hold():
            saved.require(self.backbone)
            return load_edit(saved, self.backbone, self._get_shared() if saved.needs else Shared())

    def _get_shared(self) -> Shared:
        return self.prepare().method.get_shared_parts()

    def edit(
        self,
        prompts: Texts | None = None,
        targets: Texts | None = None,
        image: Images = None,
        *others: Any,
        file_type: Texts | None = None,
        rephrase_prompts: Texts | None = None,
        rephrase_image: Images = None,
        locality_inputs: Mapping[str, Mapping[str, Any] | None] | None = None,
        keep_original_weight: bool | None = None,
        template: str | None = None,
        sequential_edit: bool | None = None,
        verbose: bool | None = None,
        train_ds: Any = None,
        **unknown: Any,
    ) -> EditResult:
        """Edits one request or a list of them: ``(metrics, edited_model, summary)``.

        Images are paths, also relative to the YAML's ``image_root``, PIL images, arrays ``(H, W)`` or ``(H,
        W, 3)``, uint8 tensors ``(3, H, W)``, bytes or open files; a float tensor ``(3, H, W)`` is normalised
        already. Without an image the language model alone is edited. ``locality_inputs`` holds ``{"text":
        {"prompt", "ground_truth"}, "vision": {"prompt", "ground_truth", "image"}}``: a probe for each
        request, or with lists of lists several, whose mean is the score. Prompts about an image go into
        ``template``, whose ``{}`` they replace; without one they stay as given. Metrics are teacher-forced,
        in [0, 1], for the probes that are given. ``train_ds`` is as in ``edit_dataset``.

        ``metrics[i]`` also has the training's ``steps``, final ``loss`` and whether it ``reached`` its target
        before ``max_steps``; the latter two are None for methods that do not train each edit (IKE, KE, MEND,
        SERAC). Where an edit failed, its ``error`` is the reason, ``pre`` and ``post`` are empty, a warning
        is logged, and ``edited_model.edits`` lacks it: it is ``()`` where all failed.

        By default each request is edited from the original model, and ``edited_model`` carries the last edit
        alone. With ``sequential_edit=True``, or ``keep_original_weight=False``, edits add to what is
        attached, in order: each request is edited, and measured, on top of the former ones, and
        ``edited_model`` carries them all. ``verbose=False`` shows no progress, ``True`` logs each metric.

        What is given by position after ``image`` is ``rephrase_prompts, rephrase_image, locality_inputs,
        keep_original_weight, template``, or in EasyEdit's order ``file_type, rephrase_prompts, ...``.

        Raises UserError, with all problems at once and nothing changed, for lists of different
        lengths, empty texts, missing images, targets that could never be generated (with a line break or a
        special token in them), arguments that contradict each other, and a fourth argument by
        position of which it is not clear which one it is.
        """
        named = {name: value for name, value in locals().items() if name in NAMED}
        given = read_arguments(others, named, unknown, self.easyedit)
        columns = {"prompts": prompts, "targets": targets, "image": image, **given.values}
        with self._slot.guard.hold():
            return self._edit(given, columns)

    def _edit(self, given: Arguments, columns: Mapping[str, Any]) -> EditResult:
        accumulate, verbose = given.accumulate, read_switch(given.values["verbose"], "verbose")
        former = self.edits if accumulate else ()
        if former and self._slot.editor is not self:
            raise UserError(
                "keep_original_weight: the attached edits are another editor's; remove them first"
            )
        values = Values(self.hparams.image_root, self.hparams.rephrase_root)
        requests = read_columns(values, columns, given.values["locality_inputs"])
        check_file_types(given.values["file_type"], [request.image for request in requests])
        cases = make_cases(requests, given.values["template"], {edit.id for edit in former})
        self.prepare(self._read_train_cases(given.values["train_ds"]))
        return self._edit_all(cases, former, accumulate, generated=False, verbose=verbose)

    def edit_dataset(
        self,
        ds: Any = None,
        train_ds: Any = None,
        template: str | bool | None = None,
        generated: bool = True,
        keep_original_weight: bool | None = None,
        verbose: bool | None = None,
        **unknown: Any,
    ) -> EditResult:
        """Edits each record from the original model, and scores it: ``(metrics, edited_model, summary)``.

        ``ds`` is a data set, a list of cases or of mappings, a table, or the path of a JSON, JSONL or CSV
        file (``unike.datasets.rows``). ``train_ds``, of the same kinds, gives the knowledge triplets in place
        of the YAML's train data. ``template`` takes the place of the dataset's own. ``summary`` holds means
        with intervals in both evaluation modes; ``generated=False`` leaves out the second. ``edited_model``
        carries the last edit. By position EasyEdit's ``ds, keep_original_weight, verbose`` is known too.

        Raises UserError, with nothing changed, for what is no data set and for broken rows.
        """
        given = read_dataset_arguments(
            {
                "train_ds": train_ds,
                "template": template,
                "generated": generated,
                "keep_original_weight": keep_original_weight,
                "verbose": verbose,
            },
            unknown,
        )
        cases = read_cases(ds, self.hparams, given["template"])
        if self.hparams.consistency_probes:
            cases = ask_consistency(cases, self.hparams.source)
        with self._slot.guard.hold():
            self.prepare(self._read_train_cases(given["train_ds"]))
            return self._edit_all(
                cases, (), accumulate=False, generated=given["generated"], verbose=given["verbose"]
            )

    def _read_train_cases(self, train_ds: Any) -> Sequence[Case] | None:
        return None if train_ds is None else read_cases(train_ds, self.hparams, None, "train_ds")

    def _edit_all(
        self,
        cases: Sequence[Case],
        former: tuple[Edit, ...],
        accumulate: bool,
        generated: bool,
        verbose: bool | None = None,
    ) -> EditResult:
        parts = self.prepare()
        require_reachable(self.backbone, [case.request for case in cases])
        reader = parts.make_reader(generated)
        edits, metrics, records = former, list[dict[str, Any]](), list[Record]()
        # Whatever the caller has switched off: what is kept for later must carry gradients then.
        with self._slot.only(()), torch.inference_mode(False):
            for number, case in enumerate(
                tqdm(cases, desc="edits", disable=not (self.progress if verbose is None else verbose))
            ):
                history = compose(edits) if accumulate else None
                try:
                    outcome = run_one_step(self.backbone, parts.method, case, reader, history)
                except TooLongError as error:
                    reason = f"{_name_long_text(case)}: {str(error).removeprefix('prompt: ')}"
                    if len(cases) == 1:
                        raise TooLongError(reason) from error
                    outcome = Outcome(Record(case.request.id, case.task, "failed", error=reason))
                if outcome.edit is not None:
                    _require_one_kind(history, outcome.edit)
                    edits = (*edits, outcome.edit) if accumulate else (outcome.edit,)
                records.append(merge_probes(outcome.record))
                metrics.append(describe_metric(number, case, records[-1], self.metric_preset))
                if verbose:
                    logger.info("%s", metrics[-1])
        self._slot.put(edits)
        self._slot.editor = self
        if failed := [metric["error"] for metric in metrics if "error" in metric]:
            logger.warning("%d of %d edits failed, the first: %s", len(failed), len(metrics), failed[0])
        summary = summarise(records, self.hparams.seed, self.hparams.metric_presets)
        return metrics, EditedModel(self._slot, edits, self._locate), summary


def _name_long_text(case: Case) -> str:
    """The longest text of a case, by its edit and by what it is: a target, or the question of a probe."""
    asked = [("prompt", case.request.query), *((probe.name, probe.query) for probe in case.probes)]
    name, query = max(asked, key=lambda entry: len(entry[1].prompt) + len(entry[1].target or ""))
    longer = "prompt" if len(query.prompt) >= len(query.target or "") else "target"
    about = "" if name in ("prompt", "reliability") else f" of {name}"
    return f"edit {one_line(case.request.id, 60)}: {longer}{about}"


def _keep_cases(train_ds: Any) -> Sequence[Case] | None:
    """Train cases that are cases already, as they are; None for everything else."""
    known = isinstance(train_ds, (list, tuple)) and all(isinstance(case, Case) for case in train_ds)
    return train_ds if known else None


def _report_unread(hparams: HyperParams) -> None:
    """Says that train data were handed over for nothing; methods that read them at an edit will do so."""
    needs = resolve_needs(hparams)
    if needs.cases:
        return
    reason = f"{hparams.method} needs none with these options"
    if needs.knowledge or needs.training or needs.scope:
        reason = "what is learnt from train data is there already (knowledge_dir, scope_dir, editor_dir)"
    logger.warning("train_ds: is not read: %s", reason)


@contextmanager
def _explain_changed_weights(are_changed: bool) -> Iterator[None]:
    """Says, before the problems, why something is learnt once more."""
    try:
        yield
    except UserError as error:
        reason = "the model's weights were changed, and what was learnt from the former ones does not fit:"
        raise UserError(*((reason,) if are_changed else ()), *error.problems) from error


def _require_one_kind(history: Edit | None, edit: Edit) -> None:
    """UserError where an edit was made on top of unlike ones: the states that it was trained on are theirs
    in part only."""
    if history is not None and len((history | edit).parts) > 1:
        raise UserError(
            "keep_original_weight: other kinds of edits are attached; detach them, or edit from the original "
            "and attach the new edit on top"
        )
