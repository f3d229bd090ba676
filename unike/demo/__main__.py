"""A web page to try editing: choose or upload an image, ask, edit, ask again, undo.

python -m unike.demo --hparams_dir hparams/tiny_blip2.yaml
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from unike.config.hparams import HyperParams
from unike.system import launching
from unike.system.arguments import ArgumentParser
from unike.types import UserError

HOST, EXAMPLES = "127.0.0.1", 8


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m unike.demo", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    text = "YAML, or the name of a shipped one; default: %(default)s"
    add("--hparams_dir", "--hparams", default="hparams/tiny_blip2.yaml", metavar="FILE", help=text)
    add("--port", type=int, metavar="N", help="default: the first free one from 7860 on")
    add("--no_browser", action="store_true", help="only print the page's address")
    add("overrides", nargs="*", metavar="key=value", help="changes to the YAML")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    """Checks everything that can be checked without a model, then serves; the exit code."""
    if args.port is not None:
        _require_free(args.port)
    if find_spec("gradio") is None:
        raise UserError("gradio: not installed; the page needs it: make demo-page")
    hparams = HyperParams.from_hparams(args.hparams_dir, args.overrides)
    # Gradio reads it wherever it would send usage data.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # Imported late: torch and Gradio take seconds, and a typing error in the YAML should not.
    from unike.demo.desk import Desk
    from unike.demo.page import serve
    from unike.editor import MultimodalEditor
    from unike.runs import checks
    from unike.runs.request import RunRequest

    request = RunRequest(hparams, "vqa", EXAMPLES)
    checks.require(request, (*checks.MODEL_CHECKS, *checks.DATA_CHECKS))
    checks.draw_data(request)
    editor = MultimodalEditor.from_hparams(hparams)
    editor.prepare()
    serve(Desk(editor, request.cases), HOST, args.port, not args.no_browser)
    return 0


def _require_free(port: int) -> None:
    if not 0 < port < 65536:
        raise UserError(f"port: {port}; expected 1 to 65535")
    with socket.socket() as probe:
        # As servers do: a port that was released a moment ago is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port: {port}: cannot be used: {error.strerror}; name another --port") from error


def main(argv: Sequence[str] | None = None) -> int:
    return launching.run_guarded(lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
