"""Draws the rooms of ``unike`` from the code's own imports, and lists what each one holds and imports.

python -m scripts.architecture                                # prints the table
python -m scripts.architecture --write docs/architecture.md   # the table into the page, and the figure
python -m scripts.architecture --check                        # exit code 1 where the page is out of date

An arrow leads from a room to one that it imports. An import that other arrows imply is left out of the
figure; the table has them all.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from unike.report.paper.tables import rewrite_blocks
from unike.system.launching import run_guarded
from unike.system.places import contains, require_own
from unike.types import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
FIGURE = Path("figures", "architecture.svg")
# By room, ground first: what it holds, and what to put there.
ROOMS: dict[str, tuple[str, str]] = {
    "types": (
        "`Query`, `EditRequest`, `Case`, `Probe`, `UserError`: plain frozen values, without torch",
        "a noun that several rooms share",
    ),
    "system": (
        "files, processes, faults of the machine, versions, progress bars, one-line texts",
        "what knows the machine and nothing of editing",
    ),
    "config": (
        "the YAML: every option with its meaning, choices and range; the authors' YAML read as ours",
        "an option, or a check of its value",
    ),
    "datasets": (
        "MMEdit's annotations as `Case`s, images from files, knowledge triplets, answers compared as VQA "
        "does, the data doctor",
        "a reader for another benchmark, or a check of annotations",
    ),
    "scoring": (
        "free answers scored by name: exact, contains, token F1, ROUGE-L; their form; aliases from a file",
        "a scorer: one entry of `scorers.py`",
    ),
    "knowledge": (
        "section 3 of the paper in tensors: patch, adapter, encoders, knowledge memory, scope classifier; "
        "FAISS and pairs on disk",
        "an equation",
    ),
    "backbones": (
        "`encode`, `prefix`, `suffix`, `generate`; tables of decoders and of model classes; cached "
        "lower-layer activations; the only hooks",
        "[another model](adding_a_backbone.md)",
    ),
    "edits": (
        "what an edit is: applied, removed, composed, saved, loaded, explained",
        "another kind of edit, or another file format",
    ),
    "methods": (
        "how edits are made: UniKE, FT, T-Patcher, IKE, LoRA, GRACE, WISE, KE, LiveEdit, MEND, SERAC; what "
        "each learns once, in `preparation/`",
        "[another method](adding_a_method.md)",
    ),
    "evaluation": (
        "protocols, the reader of predictions, metrics, sequences, summaries",
        "a metric, a protocol, or a definition of locality",
    ),
    "runs": (
        "one run: inputs checked, records written and resumed, work shared among processes, TensorBoard "
        "and W&B",
        "a check before a run, or a field of a record",
    ),
    "report": (
        "terminal tables, HTML reports, comparison of two runs; the paper's tables, figures and claims in "
        "`paper/`",
        "a chart, a column, or a published figure",
    ),
    "editor": ("`MultimodalEditor`", "a call for notebooks and programs"),
    "easyedit": ("[EasyEdit's names](easyedit.md)", "a name that its scripts import"),
    "ask": ("`run_edit.py ask`", "only this command"),
    "own": (
        "`python -m unike.own`: one's own model, images and answers",
        "a form of own data",
    ),
    "tables": ("`python -m unike.tables`", "only this command"),
    "fetch": (
        "`unike fetch`: the catalogue of models and benchmarks, downloads that go on, checksums",
        "a model or benchmark to fetch (in `catalogue.json`), or another kind of source",
    ),
    "hub": (
        "`unike push` and `unike pull`: knowledge, editors and scope classifiers on the Hugging Face hub",
        "another kind of trained part, or a line of the model card",
    ),
    "demo": ("the web page of `python -m unike.demo`", "only this page"),
    "command": (
        "the command `unike`: its table of subcommands, `unike edit` (which `run_edit.py` is), `unike list`, "
        "`unike demo`",
        "another subcommand: a line of `table.py`",
    ),
}
Arrows = dict[str, set[str]]

# ---------------------------------------------------------------- imports


def list_rooms(root: Path) -> list[str]:
    """The folders and loose modules of ``root/unike``, ground first; UserError where ``ROOMS`` differs."""
    folders = [p.parent.name for p in root.glob("unike/*/__init__.py")]
    found = {*folders, *(p.stem for p in root.glob("unike/*.py") if not p.stem.startswith("__"))}
    problems = [f"unike/{name}: ROOMS in scripts/architecture.py lacks it" for name in found - ROOMS.keys()]
    problems += [f"unike/{name}: ROOMS in scripts/architecture.py has it" for name in ROOMS.keys() - found]
    if problems:
        raise UserError(*sorted(problems))
    return list(ROOMS)


def read_arrows(root: Path) -> Arrows:
    """By room the rooms that it imports, imports inside functions included.

    Entry points (``__main__``) and the package's public names (``unike/__init__.py``) are left out: they may
    import every room, and no room imports them.
    """
    rooms = list_rooms(root)
    arrows: Arrows = {room: set() for room in rooms}
    for path in root.glob("unike/**/*.py"):
        room = path.relative_to(root / "unike").parts[0].removesuffix(".py")
        if room in rooms and path.name != "__main__.py":
            names = _list_imports(ast.parse(path.read_text(encoding="utf-8")))
            arrows[room] |= {name for name in names if name in rooms} - {room}
    return arrows


def _list_imports(tree: ast.Module) -> Iterator[str]:
    """The part after ``unike.`` of every imported name; the project has no relative imports."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("unike."))


def drop_implied(arrows: Arrows) -> Arrows:
    """The arrows that no path of other arrows implies."""

    def reach(room: str) -> set[str]:
        return {room}.union(*(reach(other) for other in arrows[room]))

    return {
        room: {o for o in others if not any(o in reach(via) for via in others - {o})}
        for room, others in arrows.items()
    }


# ---------------------------------------------------------------- figure

WIDTH, PITCH, BOX, GAP, MARGIN = 624, 62, (108, 34), 14, 14
STYLE = """
.page { fill: #ffffff } .box { fill: #e3f2fd; stroke: #1565c0 } .arrow { stroke: #546e7a; fill: none }
.head { fill: #546e7a } text { fill: #102027; font: 600 15px system-ui, Helvetica, Arial, sans-serif }
@media (prefers-color-scheme: dark) {
.page { fill: #1e2129 } .box { fill: #17344f; stroke: #90caf9 } .arrow { stroke: #b0bec5 }
.head { fill: #b0bec5 } text { fill: #eceff1 }
}
"""


@dataclass(frozen=True)
class Lane:
    """The place that the arrow from ``start`` to ``end`` keeps free on a floor between them."""

    start: str
    end: str
    floor: int


Place = str | Lane


def assign_floors(arrows: Arrows) -> dict[str, int]:
    """By room the longest path of imports below it: 0 for one that imports none."""
    floors: dict[str, int] = {}

    def find(room: str) -> int:
        if room not in floors:
            floors[room] = max((find(other) + 1 for other in arrows[room]), default=0)
        return floors[room]

    for room in arrows:
        find(room)
    return floors


def list_places(start: str, end: str, floors: Mapping[str, int]) -> list[Place]:
    """What an arrow passes from top to bottom: its first room, its lanes, its last room."""
    return [start, *(Lane(start, end, f) for f in range(floors[start] - 1, floors[end], -1)), end]


def arrange(arrows: Arrows, floors: Mapping[str, int]) -> list[list[Place]]:
    """The places of each floor from left to right, each as near as may be to what it is joined with."""
    rows: list[list[Place]] = [[] for _ in range(max(floors.values()) + 1)]
    joined: dict[Place, list[Place]] = {room: [] for room in floors}
    for room, floor in floors.items():
        rows[floor].append(room)
    for start, end in _list_pairs(arrows):
        chain = list_places(start, end, floors)
        for lane in chain:
            if isinstance(lane, Lane):
                rows[lane.floor].append(lane)
        for upper, lower in pairwise(chain):
            joined.setdefault(upper, []).append(lower)
            joined.setdefault(lower, []).append(upper)
    for _ in range(4):
        for row in (*rows, *reversed(rows)):
            where = {place: (i + 0.5) / len(line) for line in rows for i, place in enumerate(line)}
            row.sort(key=lambda p: sum(where[o] for o in joined[p]) / max(1, len(joined[p])))
    return rows


def _list_pairs(arrows: Arrows) -> list[tuple[str, str]]:
    return [(start, end) for start in arrows for end in sorted(arrows[start], key=list(arrows).index)]


def list_widths(row: Sequence[Place]) -> list[int]:
    """The widths of a floor's places in pixels."""
    return [BOX[0] if isinstance(place, str) else GAP for place in row]


def measure_width(rows: Sequence[Sequence[Place]]) -> int:
    """The figure's width in pixels: ``WIDTH``, or more where a floor needs it."""
    needed = (sum(list_widths(row)) + GAP * (len(row) - 1) + 2 * MARGIN for row in rows)
    return max(WIDTH, *needed)


def locate(rows: Sequence[Sequence[Place]]) -> dict[Place, tuple[float, float]]:
    """The centre of each place in pixels, the ground at the bottom."""
    out: dict[Place, tuple[float, float]] = {}
    whole = measure_width(rows)
    for floor, row in enumerate(rows):
        widths = list_widths(row)
        left = (whole - sum(widths) - GAP * (len(row) - 1)) / 2
        y = MARGIN + BOX[1] / 2 + (len(rows) - 1 - floor) * PITCH
        for place, width in zip(row, widths, strict=True):
            out[place] = (left + width / 2, y)
            left += width + GAP
    return out


def draw(arrows: Arrows) -> str:
    """The figure as SVG, readable in light and dark and at the width of a phone."""
    shown = drop_implied(arrows)
    floors = assign_floors(shown)
    rows = arrange(shown, floors)
    at, width = locate(rows), measure_width(rows)
    height = 2 * MARGIN + BOX[1] + max(floors.values()) * PITCH
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-labelledby="t">',
        f'<title id="t">{describe(shown)}</title>',
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto"><path class="head" d="M0 0 10 5 0 10z"/></marker></defs>',
        f'<rect class="page" width="{width}" height="{height}"/>',
    ]
    for start, end in _list_pairs(shown):
        parts.append(_draw_arrow([at[place] for place in list_places(start, end, floors)]))
    for room in arrows:
        (x, y), (wide, tall) = at[room], BOX
        box = f'x="{x - wide / 2:.1f}" y="{y - tall / 2:.1f}" width="{wide}" height="{tall}" rx="8"'
        parts.append(f'<rect class="box" {box} stroke-width="1.5"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 5:.1f}" text-anchor="middle">{room}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _draw_arrow(points: Sequence[tuple[float, float]]) -> str:
    """A curve from the lower edge of the first box through the lanes to the upper edge of the last."""
    half = BOX[1] / 2
    (x, y), *others = points
    path = f"M{x:.1f} {y + half:.1f}"
    y += half
    for i, (to_x, to_y) in enumerate(others):
        end = to_y - half
        middle = (y + end) / 2
        path += f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {end:.1f}"
        x, y = to_x, end
        if i < len(others) - 1:
            y = to_y + half
            path += f"V{y:.1f}"
    return f'<path class="arrow" d="{path}" stroke-width="1.5" marker-end="url(#head)"/>'


def describe(arrows: Arrows) -> str:
    """The figure in words."""
    lines = [f"{room} imports {' and '.join(sorted(arrows[room]))}" for room in arrows if arrows[room]]
    return f"Rooms of unike, ground at the bottom: {'; '.join(reversed(lines))}."


# ---------------------------------------------------------------- page


def make_block(arrows: Arrows) -> str:
    """Markdown between the page's markers: the figure, then a row for each room, ground last."""
    lines = [
        f"![{describe(drop_implied(arrows))}]({FIGURE.as_posix()})",
        "",
        "| room | holds | put there | imports |",
        "| --- | --- | --- | --- |",
    ]
    for room in reversed(arrows):
        holds, new = ROOMS[room]
        # Plain words: the site breaks code in the middle of a word where a column is narrow.
        imported = ", ".join(other for other in arrows if other in arrows[room])
        lines.append(f"| **{room}** | {holds} | {new} | {imported or 'no other room'} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    return run_guarded(lambda: run(argv))


def run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="the page whose marked place takes the table"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; say whether page and figure are up to date"
    )
    args = parser.parse_args(argv)
    arrows = read_arrows(ROOT)
    block = make_block(arrows)
    if args.write is None and not args.check:
        print(block)
        return 0
    page = args.write or PAGE
    try:
        text = rewrite_blocks(page.read_text(encoding="utf-8"), str(page), {"all": block}, "rooms")
    except OSError as error:
        raise UserError(f"{page}: cannot be read: {error.strerror}") from error
    wanted = {page: text, page.parent / FIGURE: draw(arrows)}
    if args.check:
        old = [p.name for p, t in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != t]
        print(f"out of date: {', '.join(old)}" if old else "up to date")
        return int(bool(old))
    # The page has our markers; a figure next to a page elsewhere may be somebody's own.
    require_own(page.parent / FIGURE, contains("<svg"))
    for path, content in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
