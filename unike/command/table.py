"""The subcommands of ``unike``: another one is one more line of ``COMMANDS``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A subcommand: its name, what it does, an example's words, and the function that it starts.

    ``start`` is ``module:function``. The function takes a list of words and gives the exit code, or raises
    ``UserError``. ``first`` are words that come before the user's.
    """

    name: str
    help: str
    example: str
    start: str
    first: tuple[str, ...] = ()


_GATED = "--hparams scoped/tiny_blip2"
_RUN_A, _RUN_B = "results/demo/ft", "results/demo/gate"
# By group of the help.
COMMANDS = {
    "Start": (
        Command("demo", "compares three methods", "", "unike.command.demo:run"),
        Command("list", "lists the YAMLs inside", "", "unike.command.listing:run"),
        Command("edit", "edits, prints a table", f"{_GATED} --size 5", "unike.command.edit:main"),
    ),
    "Your model": (
        Command("check", "says what a run lacks", "--hparams llava", "unike.command.edit:main", ("--check",)),
        Command("prepare", "trains what is learned once", "--hparams scoped/llava", "scripts.prepare:main"),
        Command("page", "serves a page to try editing", _GATED, "unike.demo.__main__:main"),
    ),
    "Your data": (
        Command("doctor", "audits annotations", "data.json --images images/", "unike.datasets.doctor:main"),
        Command("derive", "makes hard probes", "data.json", "unike.datasets.derive:main"),
        Command("benchmark", "makes one of your images", "photos/ --into mine", "unike.own.benchmark:run"),
    ),
    "Downloads and sharing": (
        Command("fetch", "gets models and benchmarks", "llava", "unike.fetch:run"),
        Command("push", "shares trained parts", "me/parts hugging_cache/x", "unike.hub.push:run"),
        Command("pull", "gets shared parts", "me/parts", "unike.hub.pull:run"),
    ),
    "Finished runs": (
        Command("report", "writes an HTML report", _RUN_B, "unike.report.__main__:main"),
        Command("compare", "compares two runs", f"{_RUN_A} {_RUN_B}", "unike.tables:main", ("compare",)),
        Command("score", "scores answers in other ways", _RUN_B, "unike.command.score:run"),
        Command("tables", "fills the paper's tables", "--table 1 --size 5", "scripts.tables:main"),
    ),
    "Saved edits": (
        Command("ask", "asks an edited model", '--hparams llava --edits edits/ "Why?"', "unike.ask:run"),
        Command("edits", "lists, shows, applies edits", "list edits/", "unike.edits.__main__:main"),
    ),
}
# ``unike edit`` with one of these options edits without a YAML.
OWN_START = "unike.own:run"
OWN_EXAMPLE = "unike edit --model ID --image FILE --question Q --answer A"
OWN_OPTIONS = ("--model", "--image", "--question", "--answer", "--edits")
