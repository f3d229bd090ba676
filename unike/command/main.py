"""``unike COMMAND ...``, also as ``python -m unike``: starts a subcommand.

Exit code: the subcommand's own, 0 for help, 2 for a command that there is not.
"""

from __future__ import annotations

import difflib
import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

from unike.command.table import COMMANDS, OWN_EXAMPLE, OWN_OPTIONS, OWN_START, Command
from unike.system.arguments import called_as
from unike.system.launching import require_checkout, run_guarded
from unike.system.text import shorten
from unike.system.versions import collect_versions
from unike.types import UserError

_NAME = "unike"


def main(argv: Sequence[str] | None = None) -> int:
    """The command with its words, those of the command line by default; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help"):
        return run_guarded(lambda: _print_text(format_help()))
    if words[0] in ("-V", "--version"):
        return run_guarded(lambda: _print_text(_describe_versions()))
    return run_guarded(lambda: start(words[0], words[1:]))


def start(name: str, words: Sequence[str]) -> int:
    """Runs a subcommand and gives its exit code. UserError for an unknown one."""
    command = _redirect(find_command(name), words)
    module, _, function = command.start.partition(":")
    if not module.startswith(f"{_NAME}."):
        require_checkout(module)
    elif find_spec(module) is None:
        raise UserError(f"{_NAME} {name}: needs the module {module}, which this version does not have")
    # A subcommand of a subcommand adds its own name.
    own = _NAME if command.first[:1] == (command.name,) else f"{_NAME} {command.name}"
    with called_as(own):
        return int(getattr(import_module(module), function)([*command.first, *words]))


def find_command(name: str) -> Command:
    """The subcommand of this name; UserError with the nearest one where there is none."""
    by_name = {command.name: command for commands in COMMANDS.values() for command in commands}
    if name in by_name:
        return by_name[name]
    if name.startswith("-"):
        raise UserError(f"{_NAME}: {shorten(name)}: unknown option; expected a command, see {_NAME} --help")
    near = difflib.get_close_matches(name, by_name, n=1, cutoff=0.0)[0]
    raise UserError(f"{_NAME}: {shorten(name)}: unknown command; the nearest one is {near} ({_NAME} --help)")


def _redirect(command: Command, words: Sequence[str]) -> Command:
    """The command, or the module that edits without a benchmark where the words are its own."""
    if command.name == "edit" and any(word.partition("=")[0] in OWN_OPTIONS for word in words):
        return replace(command, start=OWN_START)
    return command


def format_help() -> str:
    """All subcommands by group, one line each: an example, and what it does."""
    shown = {
        group: [f"{_NAME} {command.name} {command.example}".rstrip() for command in commands]
        for group, commands in COMMANDS.items()
    }
    width = max(len(text) for texts in shown.values() for text in texts)
    lines = [
        "usage: unike COMMAND ...",
        "",
        "Edits what a multimodal large language model knows. Each line is an example.",
    ]
    for group, commands in COMMANDS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {text:<{width}}  {c.help}" for text, c in zip(shown[group], commands, strict=True)]
    lines += ["", f"{OWN_EXAMPLE} needs no YAML."]
    lines += [f"{_NAME} COMMAND --help explains one command, {_NAME} --version names versions."]
    return "\n".join(lines)


def _describe_versions() -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(collect_versions().items()))


def _print_text(text: str) -> int:
    print(text)
    return 0
