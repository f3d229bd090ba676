"""All options by name, with the heading that each has in the documentation."""

from __future__ import annotations

from dataclasses import replace

from unike.config import sections
from unike.config.schema import Option, Section, list_own_options

# Options that came later than some runs, whose manifests lack them: what these runs did.
BEFORE_OPTIONS: dict[str, object] = {
    "answer_end": "none",
    "benchmark_version": 1,
    "ike_patches": False,
    "scope_overlap": None,
    "scope_overlap_tokens": 1,
}
# In the order of the documentation, with the heading of each.
SECTIONS: dict[type[Section], str] = {
    sections.BackboneOptions: "backbone",
    sections.MethodOptions: "method",
    sections.LayerOptions: "method",
    sections.UniKEOptions: "method",
    sections.ScopeGateOptions: "method",
    sections.OverlapGateOptions: "method",
    sections.ScopeClassifierOptions: "method",
    sections.ScopeTrainingOptions: "scope classifier training",
    sections.PatchOptions: "intrinsic",
    sections.EditTrainingOptions: "intrinsic",
    sections.AnswerOptions: "answers",
    sections.ClipOptions: "intrinsic",
    sections.PatchLossOptions: "intrinsic",
    sections.FineTuningOptions: "fine-tuning",
    sections.IKEOptions: "IKE",
    sections.EncoderOptions: "encoders",
    sections.KnowledgeOptions: "knowledge",
    sections.RetrievalOptions: "knowledge",
    sections.EditorOptions: "meta-learned editors",
    sections.EditorTrainingOptions: "meta-learned editors",
    sections.DataOptions: "data",
    sections.ProtocolOptions: "protocol",
    sections.EvaluationOptions: "protocol",
    sections.SeedOptions: "run",
    sections.OutputOptions: "run",
    sections.BatchOptions: "run",
    sections.EditBatchOptions: sections.SPEED,
    sections.PrefixOptions: sections.SPEED,
}
OPTIONS: dict[str, Option] = {
    name: replace(known, group=group)
    for section, group in SECTIONS.items()
    for name, known in list_own_options(section).items()
}
