"""Edits every record of a task and prints one table; ``run_edit.py ask --help`` asks an edited model.

    python run_edit.py --hparams_dir hparams/tiny_blip2.yaml --task vqa --size 20 k=10 alpha=0.5

Exit code 0, 1 where no record succeeded or a process died, 2 for problems to fix in the input (one line
each), 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from importlib import import_module

import unike
from unike.system import launching, processes
from unike.system.arguments import ArgumentParser


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--hparams_dir", required=True, metavar="FILE", help="YAML of hyper-parameters")
    add("--task", choices=("vqa", "caption", "cross"), help="E-VQA, E-IC, or both, interleaved")
    add("--size", type=int, metavar="N", help="edit the first N records")
    # --k, the former name of --sequence_length, is hidden: k=X is the number of retrieved items.
    keys = {f"--{key}": key for key in ("seed", "protocol", "sequence_length", "sequences")}
    for flag, key in {**keys, "--k": "sequence_length"}.items():
        value, text = f"{key}={{}}".format, f"the same as {key}=X" if flag in keys else argparse.SUPPRESS
        add(flag, dest="named", action="append", default=[], type=value, metavar="X", help=text)
    add("--output", metavar="DIR", help="folder of the run; default: results/<yaml>-<task>, numbered")
    add("--resume", action="store_true", help="continue the run in that folder")
    add("--skip_broken", action="store_true", help="leave out broken records and images, and count them")
    add("--check", action="store_true", help="only check whether everything that the run needs is there")
    add("--num_processes", type=int, metavar="N", help="processes that share the records")
    add("--save_edits", metavar="DIR", help="keep every edit in a store: python -m unike.edits list DIR")
    add("--no_generated", dest="generated", action="store_false", help="teacher-forced evaluation only")
    add("--report", action="store_true", help="also write an HTML report, report.html, into the folder")
    add("overrides", nargs="*", metavar="key=value", help="changes to the YAML, e.g. k=10: items retrieved")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    hparams = unike.HyperParams.from_hparams(args.hparams_dir, [*args.overrides, *args.named])
    # Imported late: a typing error in the YAML should not wait for it, nor a missing file for torch.
    from unike import report, runs
    from unike.runs import check, checks

    request = runs.RunRequest.from_arguments(hparams, args)
    if args.check:
        return check.report(request, argv)
    processes.join(hparams.device)
    checks.require_aloud(request)
    if launching.wants_launch(args.num_processes):
        return launching.launch(args.num_processes, main, argv)
    directory = processes.run_once(request.choose_directory)
    store = runs.open_edit_store(hparams, args.save_edits)
    checks.draw_data(request)
    editor = unike.MultimodalEditor(hparams, processes.run_everywhere(lambda: unike.load_backbone(hparams)))
    parts = editor.prepare(skip_broken=args.skip_broken)
    with runs.open_run(parts, request.task, directory, args.resume, args.generated) as writer:
        summary = runs.run_cases(parts, request.cases, writer, args.generated, args.skip_broken, store=store)
    if processes.is_main():
        report.show(summary, directory, args.report)
    return 130 if summary["interrupted"] else launching.choose_run_code(summary.get("n"))


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["ask"]:
        return launching.run_guarded(lambda: import_module("unike.ask").run(argv[1:]))
    return launching.run_guarded(lambda: run(arguments(argv), argv))


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
