"""The pages of the results: one for each table, and the first page with each table in short.

``python -m scripts.tables --table all --write docs/results`` rewrites ``docs/results/table1.md`` and so on,
in ``docs/results.md`` what stands between ``<!-- short 1 -->`` and ``<!-- end of short 1 -->``, and of table
1 in ``README.md`` what stands between ``<!-- home 1 -->`` and ``<!-- end of home 1 -->``. A file in place of
the folder has all tables between its markers, and none in short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from unike.report.paper.tables import rewrite_blocks
from unike.types import UserError


def find_page(path: Path, table: str) -> Path:
    """The file with a table's markers."""
    if path.suffix:
        return path
    return path / (f"table{table}.md" if table.isdigit() else f"{table}.md")


def find_first_page(path: Path) -> Path | None:
    """The page next to the folder, with the tables in short; None for a file."""
    first = path.with_name(f"{path.name}.md")
    return first if not path.suffix and first.is_file() else None


def find_readme(path: Path) -> Path | None:
    """The README of the project whose folder of docs has the pages; None for a file."""
    readme = path.absolute().parents[1] / "README.md"
    return readme if not path.suffix and readme.is_file() else None


def rewrite_pages(
    path: Path,
    sections: Mapping[str, str],
    shorts: Mapping[str, str],
    homes: Mapping[str, str] | None = None,
) -> dict[Path, str]:
    """The new text of each page, by its file. UserError with every page that cannot be read or lacks a
    marker. Tables that have nothing in short leave the first page as it is, and those with nothing for the
    README leave that."""
    texts: dict[Path, str] = {}
    problems: list[str] = []
    wanted = [(find_page(path, name), name, text, "table") for name, text in sections.items()]
    if (first := find_first_page(path)) is not None:
        wanted += [(first, name, text, "short") for name, text in shorts.items() if text]
    if (readme := find_readme(path)) is not None:
        wanted += [(readme, name, text, "home") for name, text in (homes or {}).items() if text]
    for page, name, text, kind in wanted:
        try:
            before = texts[page] if page in texts else page.read_text(encoding="utf-8")
            texts[page] = rewrite_blocks(before, str(page), {name: text}, kind)
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"--write: {page}: cannot be read: {error}")
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return texts


def check_pages(path: Path, tables: Sequence[str]) -> None:
    """UserError if the tables could not be written, before hours of work."""
    rewrite_pages(path, dict.fromkeys(tables, ""), {})
