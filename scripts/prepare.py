"""Prepares a YAML's method before the first edit and prints its held-out scores: memory, encoders and
scope classifier for UniKE, the meta-learned editor for KE, LiveEdit, MEND and SERAC. A killed training of
an editor continues.

python -m scripts.prepare --hparams_dir hparams/blip2.yaml
python -m scripts.prepare --hparams_dir hparams/scoped/llava.yaml --check    # what it will take
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from unike import runs
from unike.config.hparams import HyperParams
from unike.methods import MethodNeeds, resolve_needs
from unike.methods.preparation.folders import find_editor, find_scope_classifier, wants_cases
from unike.methods.registry import resolve_needs_if_valid
from unike.report.terminal import as_text
from unike.runs import checks, inputs
from unike.runs.check import format_findings
from unike.runs.costs import describe_costs
from unike.runs.drawing import check_drawing, get_drawing_folder, list_missing_splits, wants_drawing
from unike.system import launching, processes
from unike.system.arguments import ArgumentParser
from unike.system.findings import Finding, collect_problems, require
from unike.types import UserError

if TYPE_CHECKING:
    from unike.backbones import Backbone


def make_fit_table(fits: Mapping[str, Mapping[str, float]], title: str) -> Table:
    """A table of the encoders' held-out losses and accuracies, one row per layer."""
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("layer", "L1 held out", "L2 held out", "top-1, %", "truth, %"):
        table.add_column(column, justify="right")
    for layer, fit in sorted(fits.items(), key=lambda item: int(item[0])):
        losses = (f"{fit['held_truthful']:.3f}", f"{fit['held_semantic']:.3f}")
        table.add_row(layer, *losses, f"{100 * fit['top1']:.1f}", f"{100 * fit['truth_accuracy']:.1f}")
    return table


def require_inputs(hparams: HyperParams) -> None:
    """UserError with all that is wrong with method, device, weights and folders, and with what would be
    drawn, before a model is loaded."""
    found: list[Callable[[], object]] = [lambda: checks.require_backbone(hparams)]
    needs = resolve_needs_if_valid(hparams)
    if wants_drawing(hparams):
        undrawn = list_missing_splits(get_drawing_folder(hparams), ("train",))
        found.append(lambda: check_drawing(hparams, undrawn))
    else:

        def check_train_files() -> None:
            if needs.knowledge or wants_cases(hparams, needs):
                inputs.find_train_annotations(hparams)

        found.append(check_train_files)
    require(*found)


def report_check(hparams: HyperParams) -> int:
    """Prints whether all that preparation needs is there, and what it will take: bytes of states, parameters,
    forward passes, seconds. The exit code: 0, or 2 where it would end before it starts."""
    found = checks.find_all(checks.RunRequest(hparams), checks.MODEL_CHECKS)
    known = {line for finding in found if not finding.ok for line in (finding.what, finding.line)}
    problems = collect_problems(lambda: require_inputs(hparams))
    found += [Finding(False, problem) for problem in problems if problem not in known]
    found += describe_costs(hparams, resolve_needs_if_valid(hparams))
    print(*format_findings(found), sep="\n")
    return 2 if any(not finding.ok for finding in found) else 0


def load(hparams: HyperParams) -> Backbone:
    """Loads the backbone in every process, and draws its train data in one of them."""
    # On first use, as below: bad input is said before the seconds that they take.
    from unike.backbones import load_backbone

    backbone = processes.run_everywhere(lambda: load_backbone(hparams))
    if wants_drawing(hparams):
        from scripts.tiny import make_data

        processes.run_once(lambda: make_data.ensure(hparams, ("train",), backbone))
    return backbone


def train_editor(hparams: HyperParams, needs: MethodNeeds, skip_broken: bool) -> int:
    """Loads the editor or trains it."""
    if not processes.run_once(lambda: wants_cases(hparams, needs)):
        if processes.is_main():
            print(f"editor: {find_editor(hparams)}")
        return 0
    backbone = load(hparams)
    cases = processes.run_in_turn(lambda: inputs.read_train_cases(hparams, skip_broken))
    runs.assemble(hparams, backbone, cases=lambda: cases)
    if not processes.is_main():
        return 0
    if needs.scope:
        report_scope(hparams)
    folder = find_editor(hparams)
    report = json.loads((Path(str(folder)) / "editor.json").read_text(encoding="utf-8"))["training"]
    print(f"{len(cases)} records, {describe_training(report)}\neditor: {folder}")
    return 0


def describe_training(report: Mapping[str, Any]) -> str:
    """The ``training`` of an ``editor.json`` in one line: how long, how good, and what ended it."""
    cost = f"{report['step']} steps, {report['visits']} record visits, {report['seconds']:.0f} s"
    best = f"best validation {report['best']:.4f} after {report['best_step']} steps"
    return f"{cost}; {best}; stopped: {report['stopped']}"


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    hparams = HyperParams.from_hparams(args.hparams_dir, args.overrides)
    if args.check:
        return report_check(hparams)
    if launching.wants_launch(args.num_processes):
        return launching.launch(args.num_processes, main, argv)
    processes.join(hparams.device)
    processes.run_in_turn(lambda: require_inputs(hparams))
    needs = resolve_needs(hparams)
    if needs.training:
        return train_editor(hparams, needs, args.skip_broken)
    from unike.methods import build
    from unike.methods.preparation.knowledge import find_knowledge
    from unike.methods.preparation.wrong_answers import describe_sources

    if not needs.knowledge and not needs.scope:
        raise UserError(f"{hparams.source}: method: {hparams.method} with these options needs no knowledge")
    backbone = load(hparams)
    if needs.gate_scope:
        # Read where the classifier of these weights is still to be trained.
        runs.assemble(hparams, backbone, cases=lambda: inputs.read_train_cases(hparams, args.skip_broken))
        if processes.is_main():
            report_scope(hparams)
        return 0
    triplets = processes.run_in_turn(lambda: inputs.read_triplets(hparams, skip_broken=args.skip_broken))
    layers = build(hparams).layers(backbone)
    runs.prepare(hparams, backbone, layers, triplets=lambda: triplets)
    if not processes.is_main():
        return 0
    folder = find_knowledge(hparams, backbone, triplets)
    index: dict[str, Any] = json.loads((folder / "knowledge.json").read_text(encoding="utf-8"))
    print(as_text(make_fit_table(index["fit"], f"{len(triplets)} triplets")))
    print(describe_sources(index.get("a_neg"), hparams.a_neg))
    print(f"memory and encoders: {folder}")
    if needs.scope:
        report_scope(hparams)
    return 0


def report_scope(hparams: HyperParams) -> None:
    """Prints the scope classifier's thresholds, and how well it was trained."""
    kept = Path(str(find_scope_classifier(hparams)))
    trained = json.loads((kept / "scope.json").read_text(encoding="utf-8"))
    for size, shares in trained["held_out"].items():
        right = ", ".join(f"{name} {100 * share:.1f}" for name, share in shares.items())
        print(f"scope among {size} edits, threshold {trained['thresholds'][size]:.2f}, accuracy: {right}, %")
    if course := trained.get("training"):
        spent = f"{course['steps']} steps, {course['record_visits']} record visits, {course['seconds']} s"
        print(f"stopped by {course['stopped']} after {spent}; kept: step {course['best_step']}")
    print(f"scope: {kept}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--hparams_dir", "--hparams", required=True, metavar="FILE", help="YAML, or its name")
    parser.add_argument("--skip_broken", action="store_true")
    parser.add_argument("--check", action="store_true", help="check the inputs and estimate what it takes")
    parser.add_argument("--num_processes", type=int, metavar="N", help="processes that share the work")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    argv = sys.argv[1:] if argv is None else argv
    return launching.run_guarded(lambda: run(parser.parse_intermixed_args(argv), argv))


if __name__ == "__main__":
    sys.exit(main())
