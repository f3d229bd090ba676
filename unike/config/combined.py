"""Several sections of options at once, for functions that read several."""

from __future__ import annotations

from dataclasses import dataclass

from unike.config.patcher import NeuronOptions
from unike.config.rivals import LoraOptions, SideMemoryOptions
from unike.config.scope_sections import ScopeClassifierOptions, ScopeStorageOptions
from unike.config.sections import (
    BackboneOptions,
    DataOptions,
    EditorOptions,
    EditTrainingOptions,
    EncoderOptions,
    KnowledgeOptions,
    LayerOptions,
    MethodOptions,
    OutputOptions,
    PatchLossOptions,
    PatchOptions,
    PrefixOptions,
    ProtocolOptions,
    RetrievalOptions,
    ScopeGateOptions,
    SeedOptions,
    TripletOptions,
    UniKEOptions,
)


@dataclass(frozen=True, kw_only=True)
class LoadingOptions(BackboneOptions, LayerOptions):
    """A backbone, and which of its layers must lie on one device."""


@dataclass(frozen=True, kw_only=True)
class RoutingOptions(UniKEOptions, ScopeGateOptions):
    """How an edit is applied to a prompt."""


@dataclass(frozen=True, kw_only=True)
class KnowledgeUseOptions(RoutingOptions, PatchLossOptions):
    """What decides whether UniKE reads the knowledge memory or its encoders."""


@dataclass(frozen=True, kw_only=True)
class FreshPatchOptions(UniKEOptions, PatchOptions, SeedOptions):
    """Extra pairs before training."""


@dataclass(frozen=True, kw_only=True)
class PatchTrainingOptions(EditTrainingOptions, PatchLossOptions):
    """Training of extra pairs."""


@dataclass(frozen=True, kw_only=True)
class NeuronTrainingOptions(PatchTrainingOptions, NeuronOptions):
    """Training of T-Patcher's neurons as published."""


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(LoraOptions, SeedOptions):
    """LoRA's factors before training."""


@dataclass(frozen=True, kw_only=True)
class SideMemoryTrainingOptions(EditTrainingOptions, SideMemoryOptions):
    """Training of WISE's side memory."""


@dataclass(frozen=True, kw_only=True)
class KnowledgeKeyOptions(LayerOptions, EncoderOptions, KnowledgeOptions):
    """All options that a folder of knowledge depends on, and where it is."""


@dataclass(frozen=True, kw_only=True)
class KnowledgeTrainingOptions(EncoderOptions, TripletOptions, PrefixOptions):
    """Reading of knowledge states, and training of encoders on them."""


@dataclass(frozen=True, kw_only=True)
class KnowledgeLoadingOptions(UniKEOptions, PatchLossOptions, RetrievalOptions, SeedOptions):
    """What becomes of a folder of knowledge in memory."""


@dataclass(frozen=True, kw_only=True)
class KnowledgePreparationOptions(KnowledgeLoadingOptions, KnowledgeKeyOptions, KnowledgeTrainingOptions):
    """Knowledge read where it is kept, and built where it is not."""


@dataclass(frozen=True, kw_only=True)
class ScopePreparationOptions(ScopeClassifierOptions, ScopeStorageOptions, PrefixOptions):
    """A scope classifier read where it is kept, and trained where it is not."""


@dataclass(frozen=True, kw_only=True)
class EditorPreparationOptions(EditorOptions, PrefixOptions):
    """A meta-learned editor read where it is kept, and trained where it is not."""


@dataclass(frozen=True, kw_only=True)
class TrainedPartsOptions(EditorOptions, ScopeClassifierOptions):
    """What is trained on train records: an editor, a scope classifier."""


@dataclass(frozen=True, kw_only=True)
class TrainSplitOptions(DataOptions, KnowledgeOptions):
    """Annotations and images, and how many triplets are taken from the train split."""


@dataclass(frozen=True, kw_only=True)
class RunFolderOptions(MethodOptions, ProtocolOptions, OutputOptions):
    """What names the folder of a run."""
