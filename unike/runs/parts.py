"""From a YAML and a backbone to what edits are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from unike.backbones.base import Backbone
from unike.backbones.guard import Guard
from unike.backbones.prefix import open_prefixes
from unike.config.hparams import HyperParams
from unike.datasets.lengths import leave_out_long, list_queries
from unike.datasets.triplets import Triplet
from unike.evaluation.reader import Reader
from unike.methods import build, resolve_needs
from unike.methods.base import CaseSource, EditMethod, Knowledge, find_gate_layer
from unike.methods.meta_training import TRAINING, TrainableMethod
from unike.methods.preparation.editors import ensure_editor
from unike.methods.preparation.knowledge import ensure_knowledge
from unike.methods.preparation.scope import SCOPE_READING, SCOPE_TRAINING, ensure_scope
from unike.runs.inputs import read_method_cases, read_train_cases, read_triplets
from unike.system import processes
from unike.system.progress import show_progress
from unike.types import Case

TripletSource = Callable[[], Sequence[Triplet]]


@dataclass
class Parts:
    """What edits are made of: a backbone and a method, with the hyper-parameters of both."""

    hparams: HyperParams
    backbone: Backbone
    method: EditMethod

    def __post_init__(self) -> None:
        first = self.method.layers(self.backbone)[0]
        self.prefixes = open_prefixes(self.hparams, self.backbone, first)

    def make_reader(self, generated: bool = True) -> Reader:
        """Evaluates probes. Keeps the base model's predictions by case id: make a new one for other cases."""
        hp = self.hparams
        return Reader(self.backbone, self.prefixes, generated, hp.metric_presets, hp.likelihoods)


def prepare(
    hparams: HyperParams,
    backbone: Backbone,
    layers: Sequence[int],
    progress: bool = True,
    triplets: TripletSource | None = None,
    cases: CaseSource | None = None,
) -> Knowledge:
    """Memory, encoders and scope classifier, read or built; empty where the method needs none.

    ``triplets`` and ``cases`` take the place of the train annotations that the YAML names.
    """
    needs = resolve_needs(hparams)
    if not needs.knowledge:
        return {}
    read = triplets or (lambda: read_triplets(hparams))

    def source() -> Sequence[Triplet]:
        return leave_out_long(hparams.name, read(), lambda triplet: [triplet.query])

    steps = len(layers) * hparams.encoder_steps
    totals = {
        "extracting knowledge states": hparams.triplets,
        "training encoders": steps,
        SCOPE_READING: hparams.scope_records,
        SCOPE_TRAINING: hparams.scope_steps,
    }
    with show_progress(totals, progress and processes.is_main()) as tick:
        known = ensure_knowledge(backbone, hparams, layers, source, tick)
        if needs.scope and not needs.gate_scope:
            taught = cases or (lambda: read_train_cases(hparams))

            def teaching() -> Sequence[Case]:
                return leave_out_long(hparams.name, taught(), list_queries)

            measure = ensure_scope(backbone, hparams, layers[0], teaching, tick)
            known = {**known, layers[0]: replace(known[layers[0]], scope=measure)}
    return known


def assemble(
    hparams: HyperParams,
    backbone: Backbone,
    progress: bool = True,
    triplets: TripletSource | None = None,
    cases: CaseSource | None = None,
) -> Parts:
    """The YAML's method on a backbone, with its knowledge, and trained where it learns to edit.

    ``triplets`` and ``cases`` take the place of the train annotations that the YAML names.
    """
    given = cases or (lambda: read_method_cases(hparams))

    def fitting() -> Sequence[Case]:
        return leave_out_long(hparams.name, given(), list_queries)

    layers = build(hparams).layers(backbone)
    # What is learnt, is learnt from the base model.
    with Guard.of(backbone).bare():
        method = build(hparams, prepare(hparams, backbone, layers, progress, triplets, fitting), fitting)
        if resolve_needs(hparams).gate_scope:
            first = find_gate_layer(hparams, backbone, layers)
            totals = {SCOPE_READING: hparams.scope_records, SCOPE_TRAINING: hparams.scope_steps}
            with show_progress(totals, progress and processes.is_main()) as tick:
                method.scope = ensure_scope(backbone, hparams, first, fitting, tick)
        if isinstance(method, TrainableMethod):
            totals = {TRAINING: hparams.editor_steps * hparams.editor_batch}
            with show_progress(totals, progress and processes.is_main()) as tick:
                ensure_editor(method, backbone, fitting, tick)
        return Parts(hparams, backbone, method)
