"""``unike pull``: knowledge, editors and scope classifiers from a repository of the Hugging Face hub.

Only safetensors and JSON are read. All of it is checked before anything is put in place. Interrupted, the
same command goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from unike.fetch.archives import format_size
from unike.fetch.catalogue import NOT_STATED, Piece
from unike.fetch.command import ask, count_left, require_disks
from unike.fetch.hub import list_repository
from unike.fetch.remote import Remote, find_difference
from unike.fetch.staging import Load, gather
from unike.hub.parts import TrainedPart, get_kind, group_files, read_part
from unike.methods.preparation.folders import choose_place
from unike.system.arguments import ArgumentParser
from unike.system.files import move_into_place
from unike.system.places import require_folder
from unike.system.progress import show_bytes
from unike.system.text import one_line
from unike.types import UserError


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser("unike pull", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("repository", metavar="OWNER/NAME", help="the repository, as `unike push` filled it")
    add("--into", metavar="DIR", help="folder for the parts; default: hugging_cache/NAME")
    add("--revision", metavar="NAME", help="branch, tag or commit; default: the newest")
    add("--yes", action="store_true", help="do not ask")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Runs the command; the exit code. UserError where something can't be pulled."""
    args = parse_arguments(argv)
    default = f"hugging_cache/{PurePosixPath(args.repository).name}"
    into = choose_place(args.into or default)
    require_folder(into.parent)
    found = list_repository(args.repository, revision=args.revision)
    places = group_files([file.name for file in found.files])
    if not places:
        raise UserError(f"{one_line(args.repository, 100)}: holds no knowledge, editors or scope classifiers")
    files = {file.name: file for file in found.files}
    missing = find_missing(into, places, files)
    load = Load(
        Piece("hub", str(into), (), repository=found.id),
        into,
        found.licence,
        tuple(files[name] for names in places.values() for name in names),
        tuple(files[name] for place in missing for name in places[place]),
    )
    left_out = len(files) - len(load.files)
    print(f"{found.id} at {found.revision[:12]}; licence: {found.licence or NOT_STATED}")
    print(f"  {', '.join(places)}; {format_size(load.size or 0)}; other files, not read: {left_out}")
    if missing:
        require_disks([load])
        if not args.yes and not ask(count_left([load])):
            print("nothing was pulled")
            return 0
        pull(load, missing)
    parts = [read_part(into / place, get_kind(place)) for place in places]
    for line in describe(parts, into):
        print(line)
    return 0


def find_missing(into: Path, places: Mapping[str, Sequence[str]], files: Mapping[str, Remote]) -> list[str]:
    """The places that are not there yet. UserError for one where something else is."""
    missing, other = [], []
    for place, names in places.items():
        if not (into / place).exists():
            missing.append(place)
        elif any(not (into / n).is_file() or find_difference(into / n, files[n]) for n in names):
            other.append(
                f"{into / place}: is there already, and is another one; move it away, or name --into"
            )
    if other:
        raise UserError(*other)
    return missing


def pull(load: Load, places: Sequence[str]) -> None:
    """Fetches parts, checks all of them, and puts them in place, each whole."""
    with gather(load, show_bytes) as files:
        try:
            for place in places:
                part = read_part(files / place, get_kind(place))
                if part.place != place:
                    raise UserError(f"{place}: its index is that of {part.place}")
        except UserError as error:
            shutil.rmtree(files, ignore_errors=True)
            raise UserError(*(_shorten(problem, files) for problem in error.problems)) from error
        for place in places:
            move_into_place(files / place, load.target / place)


def _shorten(problem: str, files: Path) -> str:
    """A problem with a file's name in the repository; nothing of it was put in place."""
    return f"{problem.replace(f'{files}/', '')}; nothing was put in place".replace(
        "; delete the folder, and it is made again", ""
    )


def describe(parts: Sequence[TrainedPart], into: Path) -> list[str]:
    """What is there now, and the options of a YAML that name it."""
    lines = []
    for part in parts:
        layers = ", ".join(map(str, part.layers))
        lines.append(f"{into / part.place}: for weights {part.index['backbone']}, layers {layers}")
    kinds = {part.kind for part in parts}
    options = [f"knowledge_dir={into / part.place}" for part in parts if part.kind == "knowledge"]
    options += [f"editor_dir={into / 'editors'}"] if "editor" in kinds else []
    options += [f"scope_dir={into / 'scope'}"] if "scope" in kinds else []
    return [*lines, f"to use them, add to the command: {' '.join(options)}"]
