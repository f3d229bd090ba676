"""The nouns of editing: plain frozen records, without torch.

An image stays what the caller gave (a path, a PIL image, a normalised float tensor ``(3, H, W)``)
until ``Backbone.encode`` opens it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ImageLike = Any

FIVE_METRICS = ("reliability", "t_generality", "m_generality", "t_locality", "m_locality")
HARD_METRICS = ("same_question", "same_image", "joint")
METRICS = FIVE_METRICS + HARD_METRICS
# Cells of De-VQA: which question (1 the edit's, 2 a confusable one, 3 an unrelated one) is asked on which
# image (4: on none).
DERIVED_METRICS = ("t1_i3", "t3_i1", "t1_i4", "t2_i4", "t1_i2", "t2_i1", "t2_i2")
# Of the bundled benchmark's version 2: the edit's question on an image that differs in the object asked about
# alone, a question about the edited object, and the rephrased image in these styles.
IMAGE_STYLES = ("warm", "blur", "low_contrast", "half_gray", "dark")
STYLE_METRICS = tuple(f"m_generality_{style}" for style in IMAGE_STYLES)
FURTHER_METRICS = (*DERIVED_METRICS, "minimal_pair", "same_object", *STYLE_METRICS)
BACKENDS = ("transformers", "lavis")
METRIC_PRESETS = ("paper", "easyedit", "easyedit_icl", "release")
BACKBONES = (
    *("blip2", "minigpt4", "llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "instructblip"),
    "smol",
)
TRACKERS = ("tensorboard", "wandb")
ANSWER_ENDS = ("none", "eos", "line_break")
# Layouts of annotation files; mmedit is VLKEB's and CCKEB's, too.
LAYOUTS = ("mmedit", "mmke_bench", "mc_mke", "comprehend_edit", "fgvedit")
PROTOCOLS = ("one_step", "sequential", "cross_task")

Expectation = Literal["target", "unchanged"]
Match = Literal["equal", "contains"]


class UserError(Exception):
    """Something that the user can fix: shown as one line per problem, exit code 2."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class TooLongError(UserError):
    """A question that the model's context does not take: its record fails, others do not."""


def _require(condition: bool, field: str, expected: str, got: object) -> None:
    if not condition:
        raise UserError(f"{field}: expected {expected}, got {type(got).__name__}")


@dataclass(frozen=True)
class Query:
    """A question as the backbone sees it; ``image`` is None for the language model alone.

    White space around prompt and target is dropped: a prompt with a space at its end has other tokens, so
    that an edit made at the one is not found at the other. UserError where one of them is no text.

    ``end`` says what an edit is trained to write after the target, one of ``ANSWER_ENDS``. Probes have none:
    what is measured are the target's own tokens.
    """

    image: ImageLike | None
    prompt: str
    target: str | None = None
    end: str = "none"

    def __post_init__(self) -> None:
        _require(isinstance(self.prompt, str), "prompt", "a text", self.prompt)
        _require(self.target is None or isinstance(self.target, str), "target", "a text", self.target)
        object.__setattr__(self, "prompt", self.prompt.strip())
        if self.target is not None:
            object.__setattr__(self, "target", self.target.strip())


@dataclass(frozen=True)
class EditRequest:
    """One wrong answer to correct: ``query.target`` is the right one, ``wrong`` the model's own."""

    id: str
    query: Query
    wrong: str | None = None

    def __post_init__(self) -> None:
        _require(isinstance(self.id, str), "id", "a text", self.id)
        _require(isinstance(self.query, Query), f"edit {self.id}: query", "a Query", self.query)
        known = self.wrong is None or isinstance(self.wrong, str)
        _require(known, f"edit {self.id}: wrong", "a text or None", self.wrong)
        if not self.query.target or not self.query.target.strip():
            raise UserError(f"edit {self.id}: target is empty; expected the right answer")


@dataclass(frozen=True)
class KnowledgeItem:
    """What an item of a knowledge memory is of: a question with its right and a wrong answer, on an image
    of which the file's name is kept, if it has one."""

    prompt: str
    target: str
    wrong: str
    image: str | None = None


@dataclass(frozen=True)
class Probe:
    """A question asked before and after an edit.

    ``expect`` says what a good edit does to it: gives the ``target``, or leaves it ``unchanged``. Several
    probes of a case may have one name: their mean is the case's score. Where a target is expected, a
    generated answer passes that is equal to it or to one of the ``aliases``, or, with the ``match``
    ``contains``, that has one of them in it, whatever the case of its letters. ``implied`` is what a model
    answers that still holds the old answer, where that is known.
    """

    name: str
    query: Query
    expect: Expectation
    aliases: tuple[str, ...] = ()
    match: Match = "equal"
    implied: str | None = None

    def __post_init__(self) -> None:
        _require(isinstance(self.name, str), "probe: name", "a text", self.name)
        _require(isinstance(self.query, Query), f"probe {self.name}: query", "a Query", self.query)
        if not isinstance(self.expect, str) or self.expect not in ("target", "unchanged"):
            raise UserError(f"probe {self.name}: expect: expected 'target' or 'unchanged'")
        known = isinstance(self.aliases, (tuple, list)) and all(isinstance(a, str) for a in self.aliases)
        _require(known, f"probe {self.name}: aliases", "a tuple of texts", self.aliases)
        object.__setattr__(self, "aliases", tuple(self.aliases))
        if self.match not in ("equal", "contains"):
            raise UserError(f"probe {self.name}: match: expected 'equal' or 'contains'")
        known = self.implied is None or isinstance(self.implied, str)
        _require(known, f"probe {self.name}: implied", "a text or None", self.implied)


@dataclass(frozen=True)
class Case:
    """An edit with its probes, as one record of a benchmark. ``groups`` say what kind of record it is, by
    name: results are summed up for each value, too. A ``second`` edit is made on top of the first, before
    any probe is asked."""

    request: EditRequest
    probes: tuple[Probe, ...]
    task: str = "vqa"
    groups: Mapping[str, str] = field(default_factory=dict)
    second: EditRequest | None = None

    def __post_init__(self) -> None:
        _require(isinstance(self.request, EditRequest), "case: request", "an EditRequest", self.request)
        at = f"case {self.request.id}"
        known = self.second is None or isinstance(self.second, EditRequest)
        _require(known, f"{at}: second", "an EditRequest or None", self.second)
        _require(isinstance(self.probes, (tuple, list)), f"{at}: probes", "a tuple of Probe", self.probes)
        for probe in self.probes:
            _require(isinstance(probe, Probe), f"{at}: probes", "a Probe each", probe)
        _require(isinstance(self.task, str), f"{at}: task", "a text", self.task)
        object.__setattr__(self, "probes", tuple(self.probes))


@dataclass(frozen=True)
class BackboneSpec:
    """What it takes to load a backbone; the keys are those of the YAML.

    ``name`` is a Hugging Face folder or hub name: of the whole model, or of the language model
    alone where ``state_dict_file`` and ``qformer_checkpoint`` name the original files. With the
    ``backend`` LAVIS it may be one of its model types instead (``pretrain_opt2.7b``).
    """

    model_name: str
    name: str
    state_dict_file: str | None = None
    qformer_checkpoint: str | None = None
    pretrained_ckpt: str | None = None
    image_size: int | None = None
    dtype: str = "float32"
    device: str = "auto"
    device_map: str | None = None
    quantization: str = "none"
    backend: str = "transformers"
    vision_config: Mapping[str, Any] = field(default_factory=dict)
    qformer_config: Mapping[str, Any] = field(default_factory=dict)
    source: str = "hparams"

    @property
    def original_files(self) -> bool:
        """Whether the vision side comes from LAVIS's and MiniGPT-4's own files."""
        return self.state_dict_file is not None or self.qformer_checkpoint is not None
