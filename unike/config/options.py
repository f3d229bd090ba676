"""All options by name, with the heading that each has in the documentation."""

from __future__ import annotations

from dataclasses import replace

from unike.config import probe_sections, rivals, scope_sections, sections
from unike.config.live import ExpertOptions
from unike.config.patcher import NeuronOptions
from unike.config.schema import Option, Section, list_own_options

# Options that came later than some runs, whose manifests lack them: what these runs did.
BEFORE_OPTIONS: dict[str, object] = {
    "alpha_overlap": False,
    "answer_end": "none",
    "benchmark_version": 1,
    "consistency_probes": False,
    "likelihoods": False,
    "editor_queries": None,
    "gap": None,
    "ike_patches": False,
    "layout": "mmedit",
    "mend_scale_lr": None,
    "scope_layer": None,
    "scope_overlap": None,
    "scope_overlap_tokens": 1,
    "scope_patience": None,
    "scope_probes": "recombined",
    "scope_recall": None,
    "scope_recall_few": None,
    "scope_tokens": None,
    "scope_val_every": 50,
    "scope_width": None,
    "second_edit": False,
    "a_neg": "file",
    "live_heads": 8,
    "live_image_tokens": 32,
    "live_queries": 4,
    "live_rank": 4,
    "live_routing": 1.0,
    "live_scale": 5.0,
    "patcher_neurons": 5,
    "patcher_amplify": 10.0,
    "patcher_margin": 3.0,
    "patcher_top": 1000,
    "patcher_smoothing": 0.1,
    "patcher_weight_decay": 0.01,
    "patcher_min_steps": 100,
    "patcher_check_every": 25,
    "patcher_patience": 1,
    "lora_rank": 8,
    "lora_alpha": 32.0,
    "lora_target": "attention",
    "grace_eps": 1.0,
    "grace_radius": "fixed",
    "grace_balance": 0.2,
    "grace_rephrase": "Please answer this. {}",
    "grace_init": "cold",
    "wise_mask": 0.2,
    "wise_shard_edits": 500,
    "wise_density": 0.53,
    "wise_alpha": 5.0,
    "wise_beta": 20.0,
    "wise_gamma": 10.0,
    "wise_ratio": 0.88,
    "wise_clamp": 1.0,
    "wise_unrelated": 4,
}
# In the order of the documentation, with the heading of each.
SECTIONS: dict[type[Section], str] = {
    sections.BackboneOptions: "backbone",
    sections.MethodOptions: "method",
    sections.LayerOptions: "method",
    sections.UniKEOptions: "method",
    sections.ScopeGateOptions: "method",
    scope_sections.OverlapGateOptions: "method",
    scope_sections.ScopeClassifierOptions: "method",
    scope_sections.ScopeTrainingOptions: "scope classifier training",
    sections.PatchOptions: "intrinsic",
    sections.EditTrainingOptions: "intrinsic",
    sections.AnswerOptions: "answers",
    sections.ClipOptions: "intrinsic",
    sections.PatchLossOptions: "intrinsic",
    NeuronOptions: "T-Patcher as published",
    sections.FineTuningOptions: "fine-tuning",
    rivals.LoraOptions: "LoRA",
    rivals.CodebookOptions: "GRACE",
    rivals.SideMemoryOptions: "WISE",
    sections.IKEOptions: "IKE",
    sections.EncoderOptions: "encoders",
    sections.TripletOptions: "knowledge",
    sections.KnowledgeOptions: "knowledge",
    sections.RetrievalOptions: "knowledge",
    sections.EditorOptions: "meta-learned editors",
    sections.EditorTrainingOptions: "meta-learned editors",
    ExpertOptions: "LiveEdit",
    sections.DataOptions: "data",
    sections.ProtocolOptions: "protocol",
    sections.EvaluationOptions: "protocol",
    probe_sections.FurtherEvaluationOptions: "protocol",
    sections.SeedOptions: "run",
    sections.OutputOptions: "run",
    sections.BatchOptions: "run",
    sections.EditBatchOptions: sections.SPEED,
    scope_sections.ScopeStorageOptions: sections.SPEED,
    sections.PrefixOptions: sections.SPEED,
}
OPTIONS: dict[str, Option] = {
    name: replace(known, group=group)
    for section, group in SECTIONS.items()
    for name, known in list_own_options(section).items()
}
