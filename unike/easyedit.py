"""EasyEdit's multimodal names: its scripts run with the import changed, ``from unike.easyedit import ...``.

Each name works, or fails when it is used, with one line that says what serves instead. ``docs/easyedit.md``
has the table of names, and what is otherwise here.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from unike.backbones.base import Backbone
from unike.config import easyedit
from unike.config.hparams import HyperParams
from unike.config.hparams import UniKEHyperParams as UniKEHyperParams
from unike.config.yaml_reader import read_yaml
from unike.datasets import mmedit
from unike.editor import EditResult
from unike.editor import MultimodalEditor as _Editor
from unike.editor.cases import read_cases
from unike.evaluation.summary import Summary
from unike.methods.preparation.folders import find_editor
from unike.system.text import one_line
from unike.types import Case, UserError

logger = logging.getLogger("unike")

_DEMONSTRATIONS = "IKE here compares the train records itself, at the first edit (ike_retriever)"
_METHODS = (
    "the methods here are unike, ft, tpatcher, tpatcher_published, ike, ke, liveedit, mend, serac, lora, "
    "grace and wise"
)
# Names of EasyEdit's that have no counterpart, with what serves instead.
REFUSED = {
    "BaseEditor": "MultimodalEditor edits text too: edit(prompts, targets)",
    "ConceptEditor": "MultimodalEditor edits one answer at a time",
    "PersonalityEditor": "MultimodalEditor edits one answer at a time",
    "SafetyEditor": "MultimodalEditor edits one answer at a time",
    "EditTrainer": "MultimodalTrainer trains MEND, SERAC and KE",
    "ComprehendEditDataset": "VQADataset reads MMEdit's layout; edit_dataset takes other rows as mappings",
    "ADSEditDataset": "edit_dataset takes rows with one image each as mappings",
    "LoRAMultimodalHyperParams": _METHODS,
    "WISEMultimodalHyperParams": _METHODS,
    "GraceHyperParams": _METHODS,
    "LoRAHyperParams": _METHODS,
    "WISEHyperParams": _METHODS,
    "ROMEHyperParams": _METHODS,
    "MEMITHyperParams": _METHODS,
    "MENDTrainingHparams": "MENDMultimodalTrainingHparams reads the YAML of a vision-language model",
    "SERACTrainingHparams": "SERACMultimodalTrainingHparams reads the YAML of a vision-language model",
    "SERACHparams": "SERACMultimodalHparams reads the YAML of a vision-language model",
    "encode_ike_facts_multimodal": _DEMONSTRATIONS,
    "encode_ike_facts": _DEMONSTRATIONS,
    "compute_multimodal_edit_results": "edit and edit_dataset give the metrics of each probe",
    "compute_multimodal_edit_results_demo": "edit gives the metrics, edited_model.generate the answers",
    "compute_multimodal_hf_edit_results": "edit and edit_dataset give the metrics of each probe",
    "compute_multimodal_edit_quality": "edit and edit_dataset give the metrics of each probe",
    "compute_multimodal_edit_quality_demo": "edit gives the metrics, edited_model.generate the answers",
    "compute_icl_multimodal_edit_quality": "edit and edit_dataset give the metrics of each probe",
    "apply_ike_to_multimodal_model": "MultimodalEditor.edit with method: ike",
    "apply_lora_to_multimodal_model": "MultimodalEditor.edit with method: ft",
    "apply_wise_to_multimodal_model": "MultimodalEditor.edit with method: unike",
    "apply_grace_to_multimodal_model": "MultimodalEditor.edit with method: unike",
    "MendMultimodalRewriteExecutor": "MultimodalEditor.edit with method: mend",
    "SeracMultimodalRewriteExecutor": "MultimodalEditor.edit with method: serac",
}


_EDITS = "MultimodalEditor.edit and edit_dataset give edits, and the metrics of each probe"
_DATA = "VQADataset and CaptionDataset read MMEdit's layout; edit_dataset takes other rows as mappings"
# Further names of EasyEdit's, by their ends and beginnings.
_ENDS = {
    ("HyperParams", "Hparams"): _METHODS,
    ("Dataset", "Dataset_Simple", "Dataset_X"): _DATA,
    ("Editor",): "MultimodalEditor edits one answer at a time",
    ("Trainer",): "MultimodalTrainer trains MEND, SERAC and KE",
    ("RewriteExecutor",): _EDITS,
}
_BEGINNINGS = ("compute_", "apply_", "execute_", "encode_", "summary_", "test_")


class Refused:
    """A name of EasyEdit's without a counterpart: it can be imported, and says so when it is used."""

    def __init__(self, name: str, instead: str) -> None:
        self.__name__ = name
        self._line = f"{name}: has no counterpart here; {instead}"

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise UserError(self._line)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise UserError(self._line)

    def __mro_entries__(self, bases: object) -> NoReturn:
        raise UserError(self._line)


def _find_instead(name: str) -> str | None:
    """What serves instead of a name of EasyEdit's; None for what is none of its names."""
    if name in REFUSED:
        return REFUSED[name]
    found = next((instead for ends, instead in _ENDS.items() if name.endswith(ends)), None)
    if found is None and name.startswith(_BEGINNINGS):
        found = _EDITS
    # Names of two methods may be nearer to each other than two of one method.
    near = difflib.get_close_matches(name, [own for own in __all__ if own[:3] == name[:3]], 1, 0.8)
    return found if found is None or not near else f"is {near[0]} meant?"


def __getattr__(name: str) -> Any:
    if (instead := _find_instead(name)) is not None:
        return Refused(name, instead)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; docs/easyedit.md lists its names")


# ---------------------------------------------------------------- hyper-parameters


class NoCounterpartError(UserError, AttributeError):
    """An attribute of EasyEdit's hyper-parameters that these do not have."""


class EasyEditHyperParams(HyperParams):
    """Hyper-parameters of one of EasyEdit's classes, read from its YAML or from one of ours.

    They cannot be changed; ``replace`` gives changed ones. ``task_name`` may be set, as its scripts do: the
    task follows from the data set here, so that nothing depends on it.
    """

    algorithm = ""

    def __setattr__(self, name: str, value: object) -> None:
        if name != "task_name":
            name = one_line(name, 60)
            raise UserError(f"hparams.{name}: cannot be set; hparams = hparams.replace({name}=...)")
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise NoCounterpartError(
            f"hparams.{one_line(name, 60)}: has no counterpart here; docs/easyedit.md has the table of YAMLs"
        )

    @property
    def coco_image(self) -> str | None:
        """The folder of the images."""
        return self.image_root

    @property
    def rephrase_image(self) -> str | None:
        """The folder of the rephrased images."""
        return self.image_root if self.rephrase_root is None else self.rephrase_root

    @property
    def archive(self) -> str | None:
        """The folder of trained editors."""
        return self.editor_dir

    @property
    def alg_name(self) -> str:
        """The algorithm by EasyEdit's name."""
        return self.algorithm

    @property
    def alg(self) -> str:
        """The algorithm by EasyEdit's name."""
        return self.algorithm

    @property
    def sentence_model_name(self) -> str | None:
        """The folder of IKE's sentence embedding model."""
        return self.ike_model

    @property
    def eval_only(self) -> bool:
        """Whether the file forbids training."""
        return bool(vars(self).get("_eval_only", False))

    def replace(self, **changes: object) -> HyperParams:
        """These values with some of them changed; UserError as ``HyperParams.replace``."""
        made = type(self).from_dict(self.to_dict() | changes, self.source)
        object.__setattr__(made, "_eval_only", self.eval_only)
        return made

    @classmethod
    def from_hparams(
        cls, path: str | os.PathLike[str], overrides: Sequence[str] = (), legacy: bool = False
    ) -> HyperParams:
        """As ``HyperParams.from_hparams``; UserError for a file of another method. As in EasyEdit ``.yaml``
        may be left out."""
        if isinstance(path, str) and not path.endswith((".yaml", ".yml")) and not os.path.isfile(path):
            path += ".yaml"
        made = super().from_hparams(path, overrides, legacy)
        method = easyedit.METHODS[cls.algorithm]
        if made.method != method:
            raise UserError(f"{made.source}: method: {made.method}; {cls.__name__} expects {method}")
        given, _, _ = read_yaml(made.source)
        object.__setattr__(made, "_eval_only", given.get("eval_only") is True)
        return made


class MENDMultimodalTrainingHparams(EasyEditHyperParams):
    """MEND, to be trained."""

    algorithm = "MEND"


class MENDMultimodalHparams(EasyEditHyperParams):
    """MEND."""

    algorithm = "MEND"


class SERACMultimodalTrainingHparams(EasyEditHyperParams):
    """SERAC, to be trained."""

    algorithm = "SERAC_MULTI"


class SERACMultimodalHparams(EasyEditHyperParams):
    """SERAC."""

    algorithm = "SERAC_MULTI"


class IKEMultimodalHyperParams(EasyEditHyperParams):
    """IKE."""

    algorithm = "IKE"


class FTMultimodalHyperParams(EasyEditHyperParams):
    """Fine-tuning."""

    algorithm = "FT"


# What EasyEdit calls them for language models, whose YAMLs are refused by their model.
MENDHyperParams, IKEHyperParams, FTHyperParams = (
    MENDMultimodalHparams,
    IKEMultimodalHyperParams,
    FTMultimodalHyperParams,
)


# ---------------------------------------------------------------- data sets


def _read_arguments(
    size: int | None, config: object, no_image: object, hop: object, others: Mapping[str, Any]
) -> dict[str, Any]:
    """Those of our data sets; UserError, one line each, for others."""
    if config is not None and not isinstance(config, HyperParams):
        raise UserError(f"config: expected hyper-parameters, got {type(config).__name__}")
    problems = []
    if no_image is not False:
        problems.append("no_image: has no counterpart here; edit_dataset takes rows without an image")
    if hop is not None:
        problems.append("hop: has no counterpart here; edit_dataset takes other rows as mappings")
    known = [name for name in signature(mmedit.VQADataset).parameters if name != "path"]
    for name in others:
        if name not in known:
            near = difflib.get_close_matches(name, ("data_dir", *known, "config"), 1, 0.0)
            problems.append(f"{one_line(name, 60)}: unknown argument; the nearest known one is {near[0]}")
    if problems:
        raise UserError(*problems)
    roots = ("image_root", "rephrase_root", "allow_outside") if config is not None else ()
    return {**{name: getattr(config, name) for name in roots}, "size": size, **others}


class VQADataset(mmedit.VQADataset):
    """E-VQA, by EasyEdit's arguments: ``path, size, config``. ``config`` gives the folders of the images.

    Other arguments, errors and what it holds are those of ``unike.datasets.mmedit.VQADataset``.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        size: int | None = None,
        config: HyperParams | None = None,
        no_image: bool = False,
        hop: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__(data_dir, **_read_arguments(size, config, no_image, hop, others))


class CaptionDataset(mmedit.CaptionDataset):
    """E-IC, by EasyEdit's arguments: ``path, size, config``; as ``VQADataset``."""

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        size: int | None = None,
        config: HyperParams | None = None,
        no_image: bool = False,
        hop: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__(data_dir, **_read_arguments(size, config, no_image, hop, others))


# ---------------------------------------------------------------- editor, trainer


class MultimodalEditor(_Editor):
    """The editor, with EasyEdit's definitions of locality in its metrics.

    ``keep_original_weight=False`` alone is refused: EasyEdit edits each request from the original all the
    same, and here edits add up. ``sequential_edit`` says which is meant.
    """

    easyedit = True

    def __init__(self, hparams: HyperParams, backbone: Backbone, progress: bool = True) -> None:
        super().__init__(hparams, backbone, progress)
        self.metric_preset = "easyedit_icl" if hparams.method == "ike" else "easyedit"
        presets = hparams.metric_presets
        if self.metric_preset not in presets:
            self.hparams = hparams.replace(metric_presets=(*presets, self.metric_preset))

    def edit_dataset(self, *arguments: Any, **named: Any) -> EditResult:
        """As ``unike.MultimodalEditor.edit_dataset``."""
        ds = arguments[0] if arguments else named.get("ds")
        if isinstance(ds, mmedit.VQADataset) and named.get("template") is None:
            logger.warning(
                "edit_dataset: questions are put into %r; EasyEdit uses bare ones without template=; "
                "template='{}' does so here",
                ds.template,
            )
        return super().edit_dataset(*arguments, **named)

    def edit_demo(self, *_: Any, **__: Any) -> Any:
        """Has no counterpart; UserError."""
        raise UserError(
            "edit_demo: has no counterpart here; edit gives metrics, edited_model.generate answers"
        )


class MultimodalTrainer:
    """Trains MEND, SERAC or KE on ``train_set``, then edits and measures each case of ``val_set``.

    The editor is kept below ``config.editor_dir``, by task and train records, where ``archive`` finds it
    again; it is not trained a second time. ``val_set`` takes no part in training: every tenth train record is
    held out for that. With ``eval_only: true`` nothing is trained.

    Raises UserError for a method that learns nothing, and for what is no data set.
    """

    def __init__(self, config: HyperParams, train_set: Any, val_set: Any) -> None:
        if not isinstance(config, HyperParams):
            raise UserError(f"config: expected hyper-parameters, got {type(config).__name__}")
        if config.method not in ("mend", "serac", "ke"):
            raise UserError(
                f"MultimodalTrainer: {config.method} learns nothing; MultimodalEditor.from_hparams(config)"
            )
        self.config = config
        self.train_set = read_cases(train_set, config, None, "train_set")
        self.val_set = read_cases(val_set, config, None, "val_set")
        self.eval_only = getattr(config, "eval_only", False)

    def run(self) -> Summary:
        """Trains, edits each case of ``val_set``, and gives the summary of ``edit_dataset``.

        UserError with ``eval_only: true`` where no editor of these options is there.
        """
        hparams = self.config if self.eval_only else self._choose_folder()
        if self.eval_only and find_editor(hparams) is None:
            raise UserError(
                f"{hparams.source}: eval_only: true, but {hparams.editor_dir} holds no editor of these "
                "options; train one with the file's training options and name its folder as archive"
            )
        editor = MultimodalEditor.from_hparams(hparams)
        editor.prepare(None if self.eval_only else self.train_set)
        logger.warning("trained editor: archive: %s", hparams.editor_dir)
        return _Editor.edit_dataset(editor, self.val_set)[2]

    def _choose_folder(self) -> HyperParams:
        """The options with a folder of these train records: an editor trained on others is another one."""
        digest = hashlib.sha256()
        for case in self.train_set:
            query = case.request.query
            digest.update(f"{case.task} {query.prompt} {query.target} {_name_image(query.image)}\n".encode())
        task = self.train_set[0].task
        folder = Path(str(self.config.editor_dir or os.path.join(self.config.results_dir, "models")))
        return HyperParams.from_dict(
            self.config.to_dict() | {"editor_dir": str(folder / f"{task}-{digest.hexdigest()[:8]}")},
            self.config.source,
        )


def _name_image(image: object) -> str:
    return os.path.basename(image) if isinstance(image, (str, os.PathLike)) else type(image).__name__


__all__ = [
    "CaptionDataset",
    "Case",
    "EasyEditHyperParams",
    "FTHyperParams",
    "FTMultimodalHyperParams",
    "IKEHyperParams",
    "IKEMultimodalHyperParams",
    "MENDHyperParams",
    "MENDMultimodalHparams",
    "MENDMultimodalTrainingHparams",
    "MultimodalEditor",
    "MultimodalTrainer",
    "SERACMultimodalHparams",
    "SERACMultimodalTrainingHparams",
    "VQADataset",
]
