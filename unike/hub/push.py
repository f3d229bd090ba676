"""``unike push``: knowledge, editors and scope classifiers to a repository of the Hugging Face hub.

Only safetensors and JSON are sent, after the same checks as on ``unike pull``, with a model card. The token
is that of ``hf auth login``. The repository is private unless ``--public`` is given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from unike.fetch.archives import format_size
from unike.fetch.hub import explain_hub_errors, find_endpoint, list_repository, open_api
from unike.hub.card import read_run, render_card
from unike.hub.parts import TrainedPart, find_parts, group_files
from unike.system.arguments import ArgumentParser
from unike.types import UserError


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser("unike push", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("repository", metavar="OWNER/NAME", help="the repository; it is made where it is not there")
    add("folders", nargs="+", metavar="DIR", help="folders of trained parts, or folders with such below them")
    add("--run", metavar="DIR", help="a finished run with these parts, whose data and scores the card states")
    add("--base_model", metavar="NAME", help="the model that they were trained for, as the hub names it")
    add("--license", metavar="NAME", help="licence of the parts, as the hub names it; default: derived")
    add("--public", action="store_true", help="a repository that all can read")
    add("--yes", action="store_true", help="do not ask")
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> int:
    """Runs the command; the exit code. UserError where something can't be pushed."""
    args = parse_arguments(argv)
    parts = find_parts([Path(folder) for folder in args.folders])
    finished = None if args.run is None else read_run(Path(args.run), parts)
    from huggingface_hub import get_token

    if get_token() is None:
        raise UserError("not logged in to the hub: run `hf auth login`, with a token that may write")
    others = list_others(args.repository, parts)
    card = render_card(args.repository, parts, finished, args.base_model, args.license, others)
    for part in parts:
        print(f"{part.place}: {format_size(part.size)}, from {part.folder}")
    readers = "for all to read" if args.public else "private"
    print(f"to {find_endpoint()}/{args.repository}; if it is new, {readers}")
    if not args.yes and not ask():
        print("nothing was pushed")
        return 0
    print(f"pushed: {push(args.repository, parts, card, args.public)}")
    return 0


def push(repository: str, parts: Sequence[TrainedPart], card: str, is_public: bool = False) -> str:
    """Commits the parts and the card, all or nothing; the commit's address. UserError if the hub refuses."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd("README.md", card.encode())]
    operations += [
        CommitOperationAdd(f"{part.place}/{path.name}", str(path)) for part in parts for path in part.files
    ]
    with explain_hub_errors(repository, "nothing was committed: run the same command again"):
        api = open_api()
        api.create_repo(repository, private=not is_public, exist_ok=True)
        made = api.create_commit(repository, operations, commit_message="Add parts trained with unike")
    return str(made.commit_url)


def list_others(repository: str, parts: Sequence[TrainedPart]) -> list[str]:
    """Places of parts that the repository has besides these; none where there is no repository yet."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = list_repository(repository).files
    except UserError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            return []
        raise
    there = group_files([file.name for file in files])
    return sorted(there.keys() - {part.place for part in parts})


def ask() -> bool:
    """Whether the user agrees. UserError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise UserError("no terminal to confirm in: agree with --yes")
    try:
        return input("Push this? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
