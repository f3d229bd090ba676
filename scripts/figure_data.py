"""From runs and knowledge states to the data that ``unike.report.paper.figures`` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scripts.plan import Run, load_records
from unike import runs
from unike.config.hparams import HyperParams
from unike.datasets.mmedit import VQA_TEMPLATE
from unike.datasets.triplets import Triplet, make_triplets
from unike.evaluation.metrics import bootstrap_interval
from unike.evaluation.record import Record
from unike.methods import resolve_needs
from unike.report.paper import published
from unike.report.paper.figures import (
    EditedAnswer,
    Interval,
    Point,
    ProbePanel,
    Space,
    Sweep,
    WorkedExample,
    require,
)
from unike.runs import checks, inputs
from unike.runs.drawing import wants_drawing
from unike.system import findings
from unike.types import Case, UserError

if TYPE_CHECKING:
    import torch

GENERALITY, LOCALITY = ("t_generality", "m_generality"), ("t_locality", "m_locality")
MEANS = {"generality": GENERALITY, "locality": LOCALITY}
LINES = {"reliability": ("reliability",), **MEANS}
SWEPT = {"k": "retrieved states k", "ike_demonstrations": "demonstrations", "alpha": "alpha"}
TASKS = {"vqa": "E-VQA", "caption": "E-IC"}
# The probes in a worked example, and their headings.
SHOWN = {
    "reliability": "edited",
    "t_generality": "rephrased",
    "m_generality": "image rephrased",
    "same_question": "another image",
    "m_locality": "unrelated",
}
NEIGHBOURS = 10
Panels = dict[str, dict[str, dict[str, Interval]]]


def name_backbone(hparams: HyperParams) -> str:
    """The backbone's title in a panel; the bundled toy models are marked as tiny."""
    return published.FAMILY_TITLES[hparams.model_name] + (" (tiny)" if hparams.generate_data else "")


# ---------------------------------------------------------------- records


def compute_interval(
    records: Sequence[Record], metrics: Sequence[str], seed: int, mode: str = "teacher_forced"
) -> Interval:
    """Mean over records of the mean of ``metrics`` after the edit, in percent, with its 95% bootstrap
    interval. Failed records are left out; UserError if no record is left."""
    done = [r.get_scores(mode) for r in records if r.ok]
    if not done:
        raise UserError("no record of the run succeeded: there is nothing to draw")
    values = [100.0 * float(np.mean([scores[m].after for m in metrics])) for scores in done]
    return Interval(*bootstrap_interval(values, seed))


def _measure(run: Run, metrics: Sequence[str]) -> Interval:
    try:
        return compute_interval(load_records(run), metrics, run.hparams.seed)
    except UserError as error:
        raise UserError(*(f"{run.name}: {problem}" for problem in error.problems)) from None


def _name_block(run: Run) -> tuple[str, str]:
    return name_backbone(run.hparams), TASKS[run.task]


def collect_trade_off(planned: Sequence[Run]) -> dict[str, list[Point]]:
    """Points by backbone and task, each with the paper's point if the paper has its row."""
    out: dict[str, list[Point]] = {}
    for run in planned:
        known = published.read_figures("table1_one_step", run.hparams.model_name, run.task)
        values = known.get(run.row.paper or "")
        pair = (_average(values, LOCALITY), _average(values, GENERALITY)) if values else None
        point = Point(run.row.name, _measure(run, LOCALITY), _measure(run, GENERALITY), pair)
        out.setdefault(", ".join(_name_block(run)), []).append(point)
    return out


def _average(values: Mapping[str, float], metrics: Sequence[str]) -> float:
    return sum(values[m] for m in metrics) / len(metrics)


def collect_sweeps(planned: Sequence[Run]) -> dict[tuple[str, str], Sweep]:
    """Panels by line of the plan and block, or by backbone and task if the rows name no line. Rows without
    an ``x`` are set apart, labelled with the value of the swept option."""
    panels: dict[tuple[str, str], list[Run]] = {}
    for run in planned:
        line, (backbone, task) = run.row.line, _name_block(run)
        panels.setdefault((line, f"{backbone},\n{task}") if line else (backbone, task), []).append(run)
    out = {}
    for key, some in panels.items():
        swept = next(name for name in SWEPT if name in {k for run in some for k in run.row.set})
        placed = sorted((r for r in some if r.row.x is not None), key=lambda r: r.row.x or 0.0)
        apart = [r for r in some if r.row.x is None]
        settings = [f"{r.row.x:g}" for r in placed] + [str(getattr(r.hparams, swept)) for r in apart]
        lines = {name: [_measure(r, metrics) for r in placed + apart] for name, metrics in LINES.items()}
        out[key] = Sweep(SWEPT[swept], settings, lines, len(apart))
    return out


def collect_zetas(planned: Sequence[Run]) -> tuple[Panels, dict[str, dict[str, dict[str, float]]]]:
    """Generality and locality by panel and zeta, ours and the paper's."""
    panels: Panels = {}
    paper: dict[str, dict[str, dict[str, float]]] = {}
    for run in planned:
        name = ", ".join(_name_block(run))
        known = published.read_figures(published.ZETA, run.hparams.model_name, run.task)
        for group, metrics in MEANS.items():
            value = _measure(run, metrics)
            panels.setdefault(name, {}).setdefault(group, {})[run.hparams.zeta] = value
            if values := known.get(run.row.paper or ""):
                paper.setdefault(name, {}).setdefault(group, {})[run.hparams.zeta] = values[group]
    return panels, paper


# ---------------------------------------------------------------- spaces


def use_held_out_data(hparams: HyperParams) -> HyperParams:
    """The YAML with data that the encoders were not trained on as ``eval``: the bundled benchmark's split
    ``val``; otherwise ``eval`` itself. UserError for a missing file."""
    if hparams.generate_data:
        root = Path(hparams.image_root or "")
        found = {task: str(root / f"{task}_val.json") for task in hparams.data}
    else:
        found = {task: inputs.find_annotations(hparams, task, "eval") for task in hparams.data}
    return replace(hparams, data={task: {"eval": path} for task, path in found.items()})


def read_held_out_triplets(hparams: HyperParams, size: int | None = None) -> list[Triplet]:
    """The first ``size`` triplets of ``use_held_out_data``, the tasks interleaved, all images in place."""
    found = use_held_out_data(hparams)
    task = "cross" if len(found.data) > 1 else next(iter(found.data), "vqa")
    return make_triplets(inputs.open_datasets(found, task, size))


def check_spaces(hparams: HyperParams, layer: int | None, size: int | None) -> None:
    """UserError with everything that ``compute_spaces`` lacks; draws the bundled benchmark if it is
    missing."""
    checks.require_backbone(hparams)
    if wants_drawing(hparams):
        from scripts.tiny import make_data

        make_data.ensure(hparams)
        make_data.ensure(hparams, ("val",))
    findings.require(
        lambda: read_held_out_triplets(hparams, size),
        lambda: inputs.wants_triplets(hparams, resolve_needs(hparams)) and inputs.read_triplets(hparams),
    )


def compute_spaces(
    hparams: HyperParams, layer: int | None, size: int | None
) -> tuple[dict[str, Space], int, int]:
    """The raw, semantic and truthfulness space of one edited layer (default: the last), the number of
    triplets in them, and the layer. UserError if ``layer`` is not an edited one."""
    # On first use, as below: bad input is said before the seconds that they take.
    import torch

    from unike.backbones import load_backbone
    from unike.methods import build
    from unike.methods.preparation.knowledge import extract_states, find_knowledge, load_states

    backbone = load_backbone(hparams)
    layers = build(hparams).layers(backbone)
    if layer is not None and layer not in layers:
        raise UserError(f"--layer: {layer}; {hparams.source} edits {', '.join(map(str, layers))}")
    at = layers[-1] if layer is None else layer
    runs.prepare(hparams, backbone, layers)
    wanted = inputs.wants_triplets(hparams, resolve_needs(hparams))
    triplets = inputs.read_triplets(hparams) if wanted else ()
    folder = find_knowledge(hparams, backbone, triplets)
    encoders = load_states(folder, backbone.device)[1][at]
    held_out = read_held_out_triplets(hparams, size)
    states = extract_states(backbone, held_out, [at], hparams.eval_batch, a_neg=hparams.a_neg)[at].states
    with torch.no_grad():
        pairs = {
            "raw states": (states.pos, states.neg),
            "semantic space": (encoders.semantic(states.pos), encoders.semantic(states.neg)),
            "truthfulness space": (encoders.truthful(states.pos), encoders.truthful(states.neg)),
        }
    found = {name: embed(right, wrong, hparams.seed) for name, (right, wrong) in pairs.items()}
    return found, len(states), at


def embed(right: torch.Tensor, wrong: torch.Tensor, seed: int) -> Space:
    """``right`` and ``wrong`` ``(n, d)`` in the plane by t-SNE over cosine distance. The note has figures of
    the space itself, before the embedding."""
    import torch
    import torch.nn.functional as F

    points = torch.cat([right, wrong]).double().cpu()
    sklearn = require("sklearn.manifold")
    perplexity = min(30.0, (len(points) - 1) / 3)
    tsne = sklearn.TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed)
    plane = tsne.fit_transform(F.normalize(points, dim=-1).numpy())
    twin, truth = count_neighbours(right, wrong)
    note = f"nearest: same question's {twin:.0f}%\nneighbours: same truth {truth:.0f}%"
    return Space(plane[: len(right)], plane[len(right) :], note)


def count_neighbours(right: torch.Tensor, wrong: torch.Tensor) -> tuple[float, float]:
    """Two shares of all states, by cosine, in percent: those whose nearest state is the same question's
    other answer; and, with that one excluded, the ``NEIGHBOURS`` nearest that have the same truth (50 by
    chance). Both arguments ``(n, d)``, at least two rows."""
    import torch
    import torch.nn.functional as F

    n = len(right)
    points = F.normalize(torch.cat([right, wrong]).double(), dim=-1)
    near = (points @ points.T).fill_diagonal_(-torch.inf)
    own, other = torch.arange(2 * n), torch.arange(2 * n).roll(n)
    twin = near.argmax(1).cpu() == other
    near[own, other] = -torch.inf
    # Without itself and the other answer to its question.
    nearest = near.topk(min(NEIGHBOURS, 2 * n - 2), dim=1).indices.cpu()
    same = (nearest < n) == (own < n)[:, None]
    return 100 * twin.double().mean().item(), 100 * same.double().mean().item()


# ---------------------------------------------------------------- worked examples


def choose_cases(cases: Sequence[Case], first: int, last: int) -> list[Case]:
    """The cases of the file from ``first``, counted from 0, to before ``last``: examples are not selected."""
    return list(cases[first:last])


def collect_examples(
    planned: Sequence[Run], variants: Mapping[str, str], first: int, last: int
) -> list[WorkedExample]:
    """The edits of ``choose_cases`` for each task of one backbone, by the rows that ``variants`` names."""
    out = []
    for task in dict.fromkeys(run.task for run in planned):
        own = {run.row.name: run for run in planned if run.task == task}
        found = {short: {r.id: r for r in load_records(own[name])} for name, short in variants.items()}
        run = own[next(iter(variants))]
        for case in choose_cases(inputs.open_datasets(run.hparams, task, run.size), first, last):
            out.append(make_example(case, {short: rows[case.request.id] for short, rows in found.items()}))
    return out


def make_example(case: Case, answered: Mapping[str, Record]) -> WorkedExample:
    """An edit with the model's generated answers before it, and after it by variant.

    Raises UserError if a variant's edit failed or its answers were not generated.
    """
    for name, record in answered.items():
        if not record.ok or "generated" not in record.scores:
            raise UserError(f"{name}: {case.request.id} failed or has no generated answers: no example of it")
    first = next(iter(answered.values()))
    panels = []
    for probe in case.probes:
        if probe.name not in SHOWN:
            continue
        after = {
            name: EditedAnswer(
                r.answers[probe.name].after or "", r.get_scores("generated")[probe.name].after == 1.0
            )
            for name, r in answered.items()
        }
        before = first.answers[probe.name].before or ""
        question = strip_template(probe.query.prompt)
        panels.append(ProbePanel(SHOWN[probe.name], probe.query.image, question, before, after))
    panels.sort(key=lambda panel: list(SHOWN.values()).index(panel.heading))
    target = str(case.request.query.target)
    return WorkedExample(
        f"{TASKS[case.task]}, {case.request.id}: {panels[0].before} \N{RIGHTWARDS ARROW} {target}", panels
    )


def strip_template(prompt: str) -> str:
    """The question inside the template."""
    before, after = VQA_TEMPLATE.split("{}")
    return prompt.removeprefix(before).removesuffix(after)
