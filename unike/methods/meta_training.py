"""One training loop for the meta-learned methods: KE, LiveEdit, MEND, SERAC.

Only the edited layers run: the activations below them are constants of the queries. A run that is
killed at any point and started again gives the same editor: random draws depend on the seed and the step
alone. With ``batch_invariant: true`` it is the same bit for bit, as lower-layer activations are computed one
query at a time. Several processes share the cases of each step and add up their gradients.
"""

from __future__ import annotations

import json
import math
import random
import time
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unike.backbones.base import Backbone
from unike.backbones.prefix import GB, PrefixCache, open_prefixes
from unike.config.combined import EditorPreparationOptions
from unike.config.sections import EditorTrainingOptions
from unike.edits import Edit
from unike.edits.shares import Shared
from unike.methods.base import EditMethod
from unike.methods.constants import Constants, name_case
from unike.system import processes
from unike.system.files import check_tensors, read_index, write_index
from unike.system.places import refuse_link
from unike.system.progress import Tick, ignore_progress
from unike.types import FIVE_METRICS, Case, Query, UserError

T = TypeVar("T")
Tensors = dict[str, torch.Tensor]
# As optimisers take it: ``params``, and options of their own.
ParameterGroup = dict[str, list[nn.Parameter] | float]
TRAINING = "training the editor"
CALIBRATION_CASES = 64
# Why a training ended: validation no longer improved, or ``editor_steps`` were taken.
PATIENCE, CAP = "patience", "cap"


class TrainableMethod(EditMethod):
    """A method whose ``network`` is trained on cases before it makes its first edit."""

    trainable = True
    # Whether a record's loss depends on the others of its step: ``losses`` then has them all at once.
    contrasts: ClassVar[bool] = False
    network: nn.Module | None = None
    # While it is trained: what the base model gives for each case.
    constants: Constants | None = None

    def get_shared_parts(self) -> Shared:
        return Shared(self.knowledge, self.network, self.scope)

    @abstractmethod
    def build(self, backbone: Backbone) -> nn.Module:
        """The untrained network."""

    @abstractmethod
    def loss(self, backbone: Backbone, case: Case, prefixes: PrefixCache) -> torch.Tensor:
        """The training loss of one case; a scalar."""

    def losses(
        self,
        backbone: Backbone,
        cases: Sequence[Case],
        own: Sequence[int],
        prefixes: PrefixCache,
        rng: random.Random,
    ) -> Iterator[torch.Tensor]:
        """The losses, one after the other, of those of a step's ``cases`` whose places are ``own``, where
        they depend on each other; all draws come from ``rng``."""
        return (self.loss(backbone, cases[place], prefixes) for place in own)

    def validation(self, backbone: Backbone, case: Case, prefixes: PrefixCache) -> torch.Tensor:
        """The loss of a held-out case: that of training, unless it changes its meaning in training."""
        return self.loss(backbone, case, prefixes)

    def parameters(self) -> list[ParameterGroup]:
        """Parameter groups as optimisers take them."""
        return [{"params": list(self.trained.parameters())}]

    def calibrate(self, backbone: Backbone, cases: Sequence[Case], prefixes: PrefixCache) -> None:
        """Sets the network's constants from a few train cases, once, before the first step."""
        return

    def settle(self) -> None:
        """Clamps parameters to their range; called after each step."""
        return

    def start(self, backbone: Backbone) -> None:
        """Puts an untrained network in, drawn from the run's seed."""
        with torch.random.fork_rng():
            torch.manual_seed(self.hparams.seed)
            self.network = self.build(backbone).to(backbone.device)

    def keep(self, what: str, name: Hashable, compute: Callable[[], T]) -> T:
        """``compute()``, which depends on the base model and ``name`` alone: in training it runs once."""
        return compute() if self.constants is None else self.constants.get((what, name), compute)

    @property
    def trained(self) -> nn.Module:
        """The network; UserError where there is none yet."""
        if self.network is None:
            at = f"{self.hparams.source}: method: {self.hparams.method}"
            raise UserError(f"{at} has no trained editor; scripts/prepare.py trains it")
        return self.network


# ---------------------------------------------------------------- losses


def split_by_scope(case: Case, probes: str = "five", end: str = "none") -> tuple[list[Query], list[Query]]:
    """The case's queries in and out of the edit's scope; those within it with the answer's ``end``.

    ``probes`` is the YAML's ``editor_probes``. With ``easyedit``, the five metrics' without M-Locality. In
    EasyEdit's loss for SERAC (``alg: SERAC_MULTI``) are the rephrased question on the image, the question on
    the rephrased image, and the text-only question; not the question on the unrelated image, which counts for
    its other methods, nor the edit's own question, which counts here.
    """
    used = [p for p in case.probes if _is_used(p.name, probes)]
    inside = [p.query for p in used if p.expect == "target"] or [case.request.query]
    return [replace(q, end=end) for q in inside], [p.query for p in used if p.expect == "unchanged"]


def draw_probes(case: Case, count: int | None, probes: str, rng: random.Random) -> Case:
    """The case with ``count`` of the probes that are trained on, half of them, rounded up, in the edit's
    scope; more of one side where the other has too few. All of them where ``count`` is None."""
    used = [p for p in case.probes if _is_used(p.name, probes)]
    if count is None or len(used) <= count:
        return case
    sides = [[p for p in used if (p.expect == "target") is inside] for inside in (True, False)]
    most = max((count + 1) // 2, count - len(sides[1]))
    drawn = rng.sample(sides[0], min(most, len(sides[0])))
    drawn += rng.sample(sides[1], count - len(drawn))
    chosen = {id(p) for p in drawn}
    return replace(case, probes=tuple(p for p in used if id(p) in chosen))


def _is_used(name: str, probes: str) -> bool:
    if probes in ("all", "recombined", "hard"):
        return True
    return name in FIVE_METRICS and not (probes == "easyedit" and name == "m_locality")


def compute_edit_losses(
    backbone: Backbone,
    edit: Edit,
    case: Case,
    prefixes: PrefixCache,
    probes: str = "five",
    end: str = "none",
    constants: Constants | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean answer loss of the probes that expect the target, and mean KL from the base model over the
    answers of those that expect no change. ``probes`` is the YAML's ``editor_probes``, ``end`` its
    ``answer_end``; ``constants`` keep the base model's part.
    """
    inside, outside = split_by_scope(case, probes, end)
    state = prefixes.state([*inside, *outside])

    @torch.no_grad()
    def predict() -> torch.Tensor:
        """The base model's ``(n, v)`` at the answers out of scope, as logarithms."""
        return backbone.answer_logits(prefixes.state(outside)).float().log_softmax(-1)

    before = None
    if outside:
        before = constants.get(("base", name_case(case)), predict) if constants else predict()
    with edit.applied(backbone):
        logits = backbone.answer_logits(state).float()
    at = state.answer_mask
    count = int(at[: len(inside)].sum())
    tokens, rows = state.labels[:, 1:][at][:count], at.nonzero()[:count, 0]
    nll = average_answers(nn.functional.cross_entropy(logits[:count], tokens, reduction="none"), rows)
    if before is None:
        return nll, nll.new_zeros(())
    after = logits[count:].log_softmax(-1)
    return nll, (before.exp() * (before - after)).sum(-1).mean()


def average_answers(losses: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The mean over queries of the mean over their answer tokens: ``losses (n)`` of tokens, which belong to
    the queries ``rows (n)``, each of which has one or more."""
    counts = rows.bincount()
    return (losses / counts[rows]).sum() / len(counts)


class Lessons:
    """Cases as an editor is trained on them.

    An edit to what the base model answers anyway teaches nothing: there the wrong answer becomes the
    target, as with the alternative answers on which KE and MEND were trained.
    """

    def __init__(self, backbone: Backbone, prefixes: PrefixCache) -> None:
        self.backbone, self.prefixes = backbone, prefixes
        self._kept: dict[tuple[str, str], Case] = {}

    def adapt(self, case: Case) -> Case:
        """The case, with its wrong answer as the target where the base model knows the right one."""
        key = (case.task, case.request.id)
        if key not in self._kept:
            wrong = case.request.wrong
            self._kept[key] = _replace_target(case, wrong) if wrong and self._is_known(case) else case
        return self._kept[key]

    @torch.no_grad()
    def _is_known(self, case: Case) -> bool:
        state = self.prefixes.state([case.request.query])
        predicted = self.backbone.suffix(state)[:, :-1].argmax(-1)
        return bool((predicted == state.labels[:, 1:])[state.answer_mask].all())


def _replace_target(case: Case, target: str) -> Case:
    probes = tuple(
        replace(p, query=replace(p.query, target=target)) if p.expect == "target" else p for p in case.probes
    )
    request = replace(case.request, query=replace(case.request.query, target=target), wrong=None)
    return replace(case, request=request, probes=probes)


# ---------------------------------------------------------------- the loop


@dataclass
class Progress:
    """State of a training: the validations' mean ``losses``, and how many came since the best.

    ``stopped`` says why it ended, ``PATIENCE`` or ``CAP``; None before. ``visits`` counts train records, each
    as often as it was seen. ``seconds`` lead up to the last validation; what a killed run did after its
    checkpoint is not in them.
    """

    step: int = 0
    best: float = math.inf
    best_step: int = 0
    waited: int = 0
    losses: list[float] = field(default_factory=list)
    stopped: str | None = None
    visits: int = 0
    seconds: float = field(default=0.0, compare=False)


def meta_train(
    method: TrainableMethod,
    backbone: Backbone,
    cases: Sequence[Case],
    val_cases: Sequence[Case],
    hparams: EditorPreparationOptions,
    folder: Path,
    tick: Tick = ignore_progress,
    facts: Mapping[str, object] | None = None,
) -> Progress:
    """Trains a method's network and leaves it with the weights of its best validation.

    It ends where ``editor_patience`` validations in a row, each on all of ``val_cases``, brought no
    improvement, and after ``editor_steps`` steps at the latest. A checkpoint is written to ``folder`` at
    every validation, and training goes on from it if ``facts`` and cases are still the same. ``tick`` is
    called for every train case (1) and held-out one (0). Raises FloatingPointError where a loss is no longer
    a number.
    """
    prefixes = open_prefixes(hparams, backbone, method.layers(backbone)[0])
    lessons = Lessons(backbone, prefixes)
    method.start(backbone)
    run = _EditorTraining(method, hparams, folder, {"facts": facts or {}, "cases": _identify(cases)})
    # As much again as of lower-layer activations.
    method.constants = Constants(int(hparams.prefix_memory_gb * GB))
    try:
        with torch.random.fork_rng():
            torch.manual_seed(hparams.seed)
            if not run.resume():
                method.calibrate(backbone, [lessons.adapt(c) for c in cases[:CALIBRATION_CASES]], prefixes)
                run.share_start()
            else:
                tick(TRAINING, run.progress.step * hparams.editor_batch)
            while not run.is_done:
                _take_step(run, lessons, cases, tick)
                if run.validation_is_due:
                    run.judge(_validate(method, lessons, val_cases, tick))
                    if processes.is_main():
                        run.save()
    finally:
        method.constants = None
    run.finish()
    return run.progress


def _take_step(run: _EditorTraining, lessons: Lessons, cases: Sequence[Case], tick: Tick) -> None:
    run.optimiser.zero_grad(set_to_none=True)
    batch, hparams = _draw_batch(cases, run.progress.step, run.hparams), run.hparams
    own = processes.share(range(len(batch)))
    for loss in _list_losses(run, lessons, batch, own):
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} after {run.progress.step} steps")
        # What several losses have in common is passed through once for each.
        (loss / hparams.editor_batch).backward(retain_graph=run.method.contrasts)
        tick(TRAINING, 1)
    if others := len(batch) - len(own):
        tick(TRAINING, others)
    run.step()


def _list_losses(
    run: _EditorTraining, lessons: Lessons, batch: Sequence[Case], own: Sequence[int]
) -> Iterator[torch.Tensor]:
    """The losses of this process's ``own`` cases, each computed when it is asked for."""
    hparams, method, start = run.hparams, run.method, f"{run.hparams.seed}/{run.progress.step}"

    def draw(case: Case) -> Case:
        rng = random.Random(f"{start}/{case.task}:{case.request.id}")
        return draw_probes(lessons.adapt(case), hparams.editor_queries, hparams.editor_probes, rng)

    if method.contrasts:
        drawn = [draw(case) for case in batch]
        yield from method.losses(lessons.backbone, drawn, own, lessons.prefixes, random.Random(start))
    else:
        for place in own:
            yield method.loss(lessons.backbone, draw(batch[place]), lessons.prefixes)


@torch.no_grad()
def _validate(method: TrainableMethod, lessons: Lessons, cases: Sequence[Case], tick: Tick) -> float:
    """The mean loss of the held-out cases, all of them each time: in groups of a step's size where they
    depend on each other, with the same draws each time."""
    size = method.hparams.editor_batch if method.contrasts else 1
    groups = [cases[start : start + size] for start in range(0, len(cases), size)]

    def judge(group: Sequence[Case]) -> list[float]:
        adapted = [lessons.adapt(case) for case in group]
        if not method.contrasts:
            return [method.validation(lessons.backbone, adapted[0], lessons.prefixes).item()]
        rng = random.Random(f"{method.hparams.seed}/{group[0].task}:{group[0].request.id}")
        found = method.losses(lessons.backbone, adapted, range(len(group)), lessons.prefixes, rng)
        return [loss.item() for loss in found]

    def notify(group: Sequence[Case]) -> None:
        for _ in group:
            tick(TRAINING, 0)

    losses = [loss for some in processes.spread(groups, judge, notify) for loss in some]
    return sum(losses) / max(1, len(losses))


def _identify(cases: Sequence[Case]) -> list[list[str | None]]:
    return [[c.task, c.request.id, c.request.query.prompt, c.request.query.target] for c in cases]


def _draw_batch(cases: Sequence[Case], step: int, hparams: EditorTrainingOptions) -> list[Case]:
    """The step's cases: the epochs' own shuffles, one after the other."""
    out, orders = [], {}
    for n in range(step * hparams.editor_batch, (step + 1) * hparams.editor_batch):
        epoch, place = divmod(n, len(cases))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(hparams.seed + epoch)
            orders[epoch] = torch.randperm(len(cases), generator=generator).tolist()
        out.append(cases[orders[epoch][place]])
    return out


class _EditorTraining:
    """Optimiser, progress and best weights of one training, and their checkpoint."""

    def __init__(
        self,
        method: TrainableMethod,
        hparams: EditorTrainingOptions,
        folder: Path,
        facts: Mapping[str, object],
    ) -> None:
        self.method, self.hparams, self.folder, self.facts = method, hparams, folder, facts
        self.progress = Progress()
        self.optimiser = torch.optim.Adam(method.parameters(), lr=hparams.editor_lr)
        self.best: Tensors = {}
        self._since = time.perf_counter()

    @property
    def is_done(self) -> bool:
        return self._find_end() is not None

    def _find_end(self) -> str | None:
        """Why training ends here; None where it goes on."""
        if self.progress.waited >= self.hparams.editor_patience:
            return PATIENCE
        return CAP if self.progress.step >= self.hparams.editor_steps else None

    @property
    def validation_is_due(self) -> bool:
        """Whether this step is followed by a validation and a checkpoint."""
        step = self.progress.step
        return step % self.hparams.editor_val_every == 0 or step >= self.hparams.editor_steps

    def share_start(self) -> None:
        """Gives every process the main one's network: devices may round differently."""
        if processes.has_joined():
            network = self.method.trained
            network.load_state_dict(processes.run_once(lambda: copy_tensors(network.state_dict())))

    def step(self) -> None:
        own = [p for group in self.optimiser.param_groups for p in group["params"]]
        processes.add_gradients(own)
        torch.nn.utils.clip_grad_norm_(own, self.hparams.clip_norm)
        self.optimiser.step()
        self.method.settle()
        self.progress.step += 1
        self.progress.visits += self.hparams.editor_batch

    def judge(self, loss: float) -> None:
        """Records a validation, and the weights where it is the best so far."""
        p = self.progress
        p.losses.append(loss)
        if loss < p.best:
            p.best, p.best_step, p.waited = loss, p.step, 0
            self.best = copy_tensors(self.method.trained.state_dict())
        else:
            p.waited += 1
        p.stopped = self._find_end()
        now = time.perf_counter()
        p.seconds, self._since = p.seconds + now - self._since, now

    def finish(self) -> None:
        """The best weights, ready to edit with."""
        self.progress.stopped = self._find_end()
        if self.best:
            self.method.trained.load_state_dict(self.best)
        self.method.trained.requires_grad_(False)
        self.optimiser.zero_grad(set_to_none=True)

    def save(self) -> None:
        """Tensors first, under a name of their own; the index that names them replaces the former
        one in one go, so that a kill at any moment leaves a whole checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"network.{k}": v for k, v in copy_tensors(self.method.trained.state_dict()).items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for number, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{k}": v for k, v in copy_tensors(state).items()}
        tensors["rng"] = torch.get_rng_state()
        name = f"checkpoint-{self.progress.step}.safetensors"
        refuse_link(self.folder / name)
        save_file(tensors, self.folder / name)
        index = {"tensors": name, "progress": asdict(self.progress), **self.facts}
        write_index(self.folder / "checkpoint.json", index, self.folder / name)
        for old in self.folder.glob("checkpoint-*.safetensors"):
            if old.name != name:
                old.unlink()

    def resume(self) -> bool:
        """Goes on from the folder's checkpoint; False where there is none of this very training."""
        kept = read_index(self.folder / "checkpoint.json")
        if any(kept.get(k) != json.loads(json.dumps(v)) for k, v in self.facts.items()):
            return False
        check_tensors(self.folder / "checkpoint.json", self.folder / kept["tensors"])
        tensors = load_file(self.folder / kept["tensors"])
        self.method.trained.load_state_dict(_take_prefixed(tensors, "network."))
        self.best = _take_prefixed(tensors, "best.")
        states: dict[int, Tensors] = {}
        for name, tensor in _take_prefixed(tensors, "adam.").items():
            number, _, key = name.partition(".")
            states.setdefault(int(number), {})[key] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": states, "param_groups": groups})
        torch.set_rng_state(tensors["rng"])
        self.progress = Progress(**kept["progress"])
        # Checkpoints from before it was counted have none.
        self.progress.visits = self.progress.step * self.hparams.editor_batch
        return True


def copy_tensors(tensors: Tensors) -> Tensors:
    """Tensors as safetensors takes them."""
    return {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}


def _take_prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
