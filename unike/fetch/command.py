"""``unike fetch``: downloads models and benchmarks to where the YAMLs look for them.

Without a name it lists what there is. Sizes and licences are shown first, and asked about. Interrupted, the
same command goes on where it was. Checksums are compared where the source states them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from unike.fetch.archives import format_size, require_room
from unike.fetch.catalogue import NOT_STATED, Item, find_item, read_catalogue
from unike.fetch.staging import Load, bring, plan
from unike.system.arguments import ArgumentParser
from unike.system.places import find_existing
from unike.system.progress import show_bytes
from unike.types import UserError

_RESERVE = 64 << 20


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser("unike fetch", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="what to fetch, or owner/name of a repository on the hub")
    add("--into", default=".", metavar="DIR", help="folder with data/ and hugging_cache/; default: this one")
    add("--yes", action="store_true", help="do not ask")
    add("--dry_run", action="store_true", help="only show sizes and licences")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Runs the command; the exit code. UserError where something can't be fetched."""
    args = parse_arguments(argv)
    if not args.names:
        print(*list_items(read_catalogue().values()), sep="\n")
        return 0
    items = [find_item(name) for name in dict.fromkeys(args.names)]
    loads = [plan(piece, Path(args.into)) for item in items for piece in item.pieces]
    for line in describe(loads):
        print(line)
    missing = [load for load in loads if not load.whole]
    if not missing:
        print("everything is there already")
        return 0
    if args.dry_run:
        return 0
    require_disks(missing)
    if not args.yes and not ask(count_left(missing)):
        print("nothing was fetched")
        return 0
    for load in missing:
        bring(load, show_bytes)
        print(f"{load.target}: is there")
    return 0


def list_items(items: Iterable[Item]) -> list[str]:
    """What can be fetched: a line for each name, and one for each source."""
    lines = []
    for item in items:
        lines.append(f"{item.name}: {item.title}")
        for piece in item.pieces:
            size = "size not stated" if piece.bytes is None else format_size(piece.bytes)
            lines.append(
                f"    {piece.title}; {size}; licence: {piece.licence or NOT_STATED}; into {piece.to}"
            )
    return lines


def describe(loads: Sequence[Load]) -> list[str]:
    """What would be fetched: a line with size, licence and place for each source."""
    lines = []
    for load in loads:
        if load.whole:
            lines.append(f"{load.piece.title}\n  is there: {load.target}")
            continue
        size = NOT_STATED if load.size is None else format_size(load.size)
        left = "" if load.left in (None, load.size) else f", {format_size(load.left or 0)} of it to fetch"
        checked = sum(bool(file.sums) for file in load.missing)
        lines.append(
            f"{load.piece.title}\n"
            f"  size: {size}{left}; files: {len(load.missing)}, of which {checked} with a known checksum\n"
            f"  licence: {load.licence or NOT_STATED}\n"
            f"  into: {load.target}"
        )
    return lines


def count_left(loads: Sequence[Load]) -> str:
    """Bytes to fetch, as text."""
    left = sum(load.left or 0 for load in loads)
    unknown = sum(load.left is None for load in loads)
    more = f" and {unknown} of unknown size" if unknown else ""
    return f"{format_size(left)}{more}"


def require_disks(loads: Sequence[Load]) -> None:
    """UserError where a disk has less room than all that goes onto it, before any of it is asked for."""
    needed: dict[int, tuple[int, Path]] = {}
    for load in loads:
        disk = find_existing(load.target).stat().st_dev
        former, place = needed.get(disk, (0, load.target.parent))
        needed[disk] = former + (load.left or 0), place
    for size, place in needed.values():
        require_room(place, size + _RESERVE, "fetch")


def ask(size: str) -> bool:
    """Whether the user agrees. UserError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise UserError("no terminal to confirm in: agree to sizes and licences with --yes")
    try:
        return input(f"Fetch {size}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
