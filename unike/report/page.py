"""What a page shows, as plain values, and the page itself: one HTML file that holds its images.

Values may be text from anywhere: the templates escape all of it, and the page's policy lets a browser run
the page's own script alone and load nothing.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from unike.report.charts import Chart
from unike.system.faults import explain_write_errors
from unike.system.files import write_text
from unike.system.places import contains, require_folder, require_own
from unike.types import UserError

# How the template marks a page.
_GENERATOR = '<meta name="generator" content="unike">'
TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class AnswerView:
    """An answer: whose, and whether the probe passes with it; None where that is not judged."""

    who: str
    text: str
    passes: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class ProbeView:
    """A question with its answers. ``image`` is its place in the page's images, None without one;
    ``name`` is that of its file, empty for a question without an image."""

    title: str
    expected: str
    prompt: str
    target: str
    answers: tuple[AnswerView, ...]
    image: int | None = None
    name: str = ""
    figures: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class DotsView:
    """A case's probes as dots: a title for each, and whether it passes, None where it was not evaluated.
    ``description`` says the same in words; ``who`` is whose answers they are, empty where that is clear.
    The dots after the first ``standard`` ones stand apart."""

    dots: tuple[tuple[str, bool | None], ...]
    description: str
    who: str = ""
    standard: int = 8


@dataclass(frozen=True)
class CaseView:
    """A case: a line to scan, which opens to its probes. ``good`` marks the ``outcome``, ``keys`` are what
    the case is sorted by, ``tags`` what it is filtered by. ``label`` names the probe that ``image`` is of,
    ``fails`` the probes that fail."""

    id: str
    title: str
    outcome: str
    good: bool | None
    keys: Mapping[str, float]
    tags: tuple[str, ...]
    probes: tuple[ProbeView, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    image: int | None = None
    error: str = ""
    label: str = ""
    fails: tuple[str, ...] = ()
    dots: tuple[DotsView, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A text and, smaller, ``notes`` to it. ``share`` draws a bar of so many percent below; ``look`` colours
    both, and says nothing that they do not: ``good``, ``fair``, ``bad``, ``a`` or ``b``."""

    text: str
    notes: tuple[str, ...] = ()
    share: float | None = None
    look: str = ""


@dataclass(frozen=True)
class TableView:
    """A table; the first cell of a row names it. The ``rest`` of the rows is folded below ``rest_title``;
    ``key`` explains the colours, ``empty`` stands in place of ``rows`` where there are none."""

    caption: str
    header: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    rest: tuple[tuple[Cell, ...], ...] = ()
    rest_title: str = ""
    key: str = ""
    empty: str = ""


@dataclass(frozen=True)
class HtmlPage:
    """``sorts`` and ``filters`` are titles by the cases' keys and tags, in the order they are offered.
    ``verdict`` is what the page comes to, ``constants`` what would be charts of one bar, in sentences,
    ``probes`` the titles of the cases' dots, in their order."""

    title: str
    lead: str
    tables: tuple[TableView, ...]
    cases: Sequence[CaseView]
    sorts: Mapping[str, str]
    filters: Mapping[str, str]
    images: Sequence[str] = ()
    charts: tuple[Chart, ...] = ()
    notes: tuple[str, ...] = ()
    about: tuple[tuple[str, str], ...] = ()
    verdict: str = ""
    constants: tuple[str, ...] = ()
    probes: tuple[str, ...] = ()


def render(page: HtmlPage) -> str:
    """The page's HTML."""
    script, style = (_read_asset(name) for name in ("page.js", "page.css"))
    only_script, only_style = _hash_for_policy(script), _hash_for_policy(style)
    policy = (
        f"default-src 'none'; img-src data:; style-src {only_style}; script-src {only_script}; "
        "base-uri 'none'; form-action 'none'"
    )
    template = _make_environment().get_template("page.html")
    return template.render(page=page, policy=policy, script=Markup(script), style=Markup(style))


def check_page(path: str | os.PathLike[str]) -> None:
    """UserError where a page cannot be written to ``path``: no folder for it is there, or another file is."""
    require_own(path, contains(_GENERATOR))
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        reason = os.strerror(errno.ENOTDIR if folder.exists() else errno.ENOENT)
        raise UserError(f"{path}: cannot be written: {reason}")
    require_folder(folder)


def write_page(page: HtmlPage, path: str | os.PathLike[str]) -> Path:
    """Writes the page to ``path`` and gives it. UserError where it cannot be written, and where another file
    than such a page is there."""
    check_page(path)
    out, text = Path(path), render(page)
    with explain_write_errors(out, resumable=False):
        write_text(out, text)
    return out


def _hash_for_policy(text: str) -> str:
    """As a policy names the one text that it allows."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@lru_cache
def _read_asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


@lru_cache
def _make_environment() -> Environment:
    return Environment(
        loader=PackageLoader("unike.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
