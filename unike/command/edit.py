"""``unike edit`` and ``run_edit.py``: edits every record of a task and prints one table.

Exit code 0, 1 where no record succeeded or a process died, 2 for problems to fix in the input (one line
each), 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from unike.config.hparams import HyperParams
from unike.system import launching, processes
from unike.system.arguments import ArgumentParser

DESCRIPTION = (
    "Edits every record of a task and prints one table. `unike ask --help` says how to ask an edited model."
)
EPILOG = (
    "An image of your own, without a data set: unike edit --model ID --image FILE --question Q --answer A"
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add(
        "--hparams_dir",
        "--hparams",
        required=True,
        metavar="FILE",
        help="YAML of hyper-parameters, or the name of a shipped one",
    )
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
    hparams = HyperParams.from_hparams(args.hparams_dir, [*args.overrides, *args.named])
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
    from unike.backbones import load_backbone
    from unike.editor import MultimodalEditor

    editor = MultimodalEditor(hparams, processes.run_everywhere(lambda: load_backbone(hparams)))
    parts = editor.prepare(skip_broken=args.skip_broken)
    with runs.open_run(parts, request.task, directory, args.resume, args.generated) as writer:
        summary = runs.run_cases(parts, request.cases, writer, args.generated, args.skip_broken, store=store)
    if processes.is_main():
        report.show(summary, directory, args.report)
    return 130 if summary["interrupted"] else launching.choose_run_code(summary.get("n"))


def main(argv: Sequence[str]) -> int:
    """``run_edit.py`` without ``ask``; the exit code."""
    return launching.run_guarded(lambda: run(parse_arguments(argv), argv))
