"""Compares outside links of README.md and the docs with a recorded list, or checks them over the network.

python -m scripts.links            # exit code 1 where a link is not recorded, or a recorded one not used
python -m scripts.links --write    # records new links as not checked, and drops unused ones
python -m scripts.links --fetch    # requests each recorded link; those that answer get today's date

The list is tests/fixtures/links.txt: a link and the date on which it last answered, a line each.
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from unike.system.arguments import ArgumentParser
from unike.system.files import write_text
from unike.system.launching import run_guarded
from unike.types import UserError

ROOT = Path(__file__).parents[1]
LIST = Path("tests", "fixtures", "links.txt")
UNCHECKED = "not checked"
HEAD = """\
# The outside links of README.md and the docs, and when each last answered: python -m scripts.links --fetch
"""
SECONDS = 20
_LINK = re.compile(r"https?://[^\s()<>\[\]{}\"'`|\\]+")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
# Names that stand for a user's own address.
_EXAMPLES = ("localhost", "127.0.0.1", "example.org", "example.com")
# A site that refuses HEAD may answer GET; one that wants a login, or fewer calls, is there all the same.
_REFUSES_HEAD, _IS_THERE = (403, 404, 405, 501), (401, 403, 429)

Links = dict[str, str]


def list_pages(root: Path) -> list[Path]:
    """The pages that people read: at the top, in docs, and each folder's README."""
    found = {*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("[!.]*/README.md")}
    return sorted(page for page in found if page.is_file())


def find_links(text: str) -> Iterator[str]:
    """The outside links of a page, in code too; addresses that only stand for others are left out."""
    for link in _LINK.findall(text):
        if urlsplit(link).hostname not in _EXAMPLES:
            yield link.rstrip(".,;:!?*")


def read_pages(root: Path) -> dict[str, list[str]]:
    """By link the pages that have it."""
    links: dict[str, list[str]] = {}
    for page in list_pages(root):
        for link in dict.fromkeys(find_links(page.read_text(encoding="utf-8"))):
            links.setdefault(link, []).append(page.relative_to(root).as_posix())
    return links


def read_list(path: Path) -> Links:
    """By link the date on which it last answered, or ``UNCHECKED``. UserError for a damaged list."""
    links: Links = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            continue
        link, _, date = line.partition(" ")
        if date != UNCHECKED and not _DATE.fullmatch(date):
            raise UserError(f"{path}:{number}: expected a link and a date, or a link and {UNCHECKED!r}")
        if link in links:
            raise UserError(f"{path}:{number}: {link}: is recorded twice")
        links[link] = date
    return links


def render_list(links: Mapping[str, str]) -> str:
    """The list's text, sorted by link."""
    return HEAD + "".join(f"{link} {links[link]}\n" for link in sorted(links))


def compare(found: Mapping[str, Sequence[str]], recorded: Mapping[str, str]) -> list[str]:
    """A line for each link that is not recorded, with its pages, and for each that no page has any more."""
    new = [
        f"{', '.join(pages)}: {link}: is not recorded; python -m scripts.links --write"
        for link, pages in sorted(found.items())
        if link not in recorded
    ]
    gone = sorted(link for link in recorded if link not in found)
    return new + [f"{LIST}: {link}: no page has it; python -m scripts.links --write" for link in gone]


def request(link: str, seconds: float = SECONDS) -> str | None:
    """Why a link does not answer; None where it does."""
    reason: str | None = None
    for method in ("HEAD", "GET"):
        wanted = Request(link, method=method, headers={"User-Agent": "Mozilla/5.0 (link check)"})
        try:
            with urlopen(wanted, timeout=seconds):
                return None
        except HTTPError as error:
            reason = f"HTTP {error.code}"
            if error.code in _IS_THERE and method == "GET":
                return None
            if error.code not in _REFUSES_HEAD:
                return None if error.code in _IS_THERE else reason
        except (URLError, OSError, http.client.HTTPException, ValueError) as error:
            return f"{getattr(error, 'reason', error)}"
    return reason


def check(links: Links, today: str, ask: Callable[[str], str | None] = request) -> tuple[Links, list[str]]:
    """The links with ``today`` for those that answer, and a line for each that does not. UserError where no
    server answered, as without a network."""
    reasons = {link: ask(link) for link in links}
    lost = {link: reason for link, reason in reasons.items() if reason is not None}
    if lost and len(lost) == len(links) and not any(reason.startswith("HTTP") for reason in lost.values()):
        link, reason = next(iter(lost.items()))
        raise UserError(f"no link answered, the first: {link}: {reason}; is there a network?")
    dated = {link: links[link] if link in lost else today for link in links}
    return dated, [f"{link}: {reason}; last answered: {links[link]}" for link, reason in lost.items()]


def main(argv: Sequence[str] | None = None) -> int:
    return run_guarded(lambda: run(argv))


def run(argv: Sequence[str] | None, root: Path = ROOT) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record new links, drop unused ones")
    parser.add_argument("--fetch", action="store_true", help="request each link over the network")
    args = parser.parse_args(argv)
    path, found = root / LIST, read_pages(root)
    recorded = read_list(path) if path.is_file() else {}
    if args.write:
        recorded = {link: recorded.get(link, UNCHECKED) for link in found}
        write_text(path, render_list(recorded))
    problems = compare(found, recorded)
    if args.fetch:
        recorded, lost = check(recorded, datetime.date.today().isoformat())
        write_text(path, render_list(recorded))
        problems += lost
    for line in problems:
        print(line)
    unchecked = sum(date == UNCHECKED for date in recorded.values())
    print(f"{len(found)} links, {len(recorded)} recorded, {unchecked} of them not checked yet")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
