"""Figures of summaries and arrays: plain data in, a matplotlib ``Figure`` out, in percent throughout.

Colours are those of Okabe and Ito, which differ under every common colour blindness; a marker or a word
always repeats what a colour says. matplotlib is loaded on first use (``pip install 'unike[figures]'``).
"""

from __future__ import annotations

import functools
import importlib
import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from unike.system.places import contains, require_own
from unike.types import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#000000", "#D55E00")
MARKERS = "osD^vPX*<>hd"
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
DASHES = ("-", "--", "-.", ":")
BARS = ("#999999", "#E69F00", "#56B4E9", "#0072B2")
RIGHT, WRONG = "#0072B2", "#D55E00"
PASS_MARK, FAIL_MARK = "\N{CHECK MARK}", "\N{BALLOT X}"
WIDTH, DPI = 10.0, 150
# Of a worked example, in inches: an image's side and the height of a line of text.
IMAGE, LINE = 1.4, 0.19
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.labelsize": 11,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 150,
    "savefig.dpi": DPI,
    "svg.hashsalt": "unike",
    "text.parse_math": False,
}
# Beyond this a drawing is served better as pixels.
SVG_BYTES = 200_000


class Interval(NamedTuple):
    """A mean with the ends of its interval, in percent."""

    mean: float
    low: float
    high: float


class Point(NamedTuple):
    """A method's locality and generality; ``paper`` are the paper's two, in this order."""

    name: str
    locality: Interval
    generality: Interval
    paper: tuple[float, float] | None = None


@dataclass(frozen=True)
class Sweep:
    """Lines over ``settings``, each with a value per setting; the last ``apart`` settings are set off."""

    label: str
    settings: Sequence[str]
    lines: Mapping[str, Sequence[Interval]]
    apart: int = 0


@dataclass(frozen=True)
class Space:
    """States in the plane, ``right`` and ``wrong`` ``(n, 2)``, row by row of the same questions."""

    right: np.ndarray
    wrong: np.ndarray
    note: str = ""


@dataclass(frozen=True)
class EditedAnswer:
    """A model's answer under an edit, and whether the probe passes with it."""

    text: str
    good: bool


@dataclass(frozen=True)
class ProbePanel:
    """A probe of a worked example: the ``image`` (a path, or None for a question without one), the
    question, the answer before, and the answers after it by variant of the method."""

    heading: str
    image: str | None
    question: str
    before: str
    after: Mapping[str, EditedAnswer]


@dataclass(frozen=True)
class WorkedExample:
    """An edit as a row of panels."""

    name: str
    panels: Sequence[ProbePanel]


def require(package: str) -> Any:
    """The package; UserError naming the extra that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{package}: not installed; figures need pip install 'unike[figures]'") from error


def _style(draw: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(draw)
    def styled(*args: P.args, **options: P.kwargs) -> T:
        with require("matplotlib").rc_context(STYLE):
            return draw(*args, **options)

    return styled


def check_place(path: Path) -> None:
    """UserError where ``path``, as PNG or SVG, is a file that this program did not draw."""
    require_own(path.with_suffix(".svg"), contains("Matplotlib"), "name another folder")
    require_own(path.with_suffix(".png"), _is_figure, "name another folder")


def _is_figure(path: Path) -> bool:
    """Whether an image has the colours and the width of ours."""
    with require("PIL.Image").open(path) as image:
        return bool((image.format, image.mode, image.width) == ("PNG", "P", round(WIDTH * DPI)))


@_style
def save(figure: Figure, path: Path) -> list[Path]:
    """Writes ``path`` as PNG and, where that is small, as SVG; gives the files. The same data give the
    same bytes. UserError as ``check_place``."""
    check_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    pixels, drawn = io.BytesIO(), io.BytesIO()
    figure.savefig(pixels, format="png")
    # A palette takes a third of the bytes; without dithering, areas stay even.
    image = require("PIL.Image").open(pixels).convert("RGB")
    image.quantize(256, dither=0).save(png, optimize=True)
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    if len(drawn.getvalue()) > SVG_BYTES:
        svg.unlink(missing_ok=True)
        return [png]
    svg.write_bytes(drawn.getvalue())
    return [png, svg]


def _make_grid(rows: int, columns: int, height: float, **options: bool) -> tuple[Figure, np.ndarray]:
    """A figure of ``WIDTH`` and its axes ``(rows, columns)``; without pyplot, which keeps figures."""
    figure = require("matplotlib.figure").Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _add_legend(figure: Figure, axes: Axes, columns: int, title: str | None = None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, title=title)


def _find_reach(values: Sequence[Interval]) -> np.ndarray:
    """Lengths of the error bars ``(2, n)``."""
    found = np.array([[v.mean - v.low, v.high - v.mean] for v in values])
    return np.maximum(found, 0.0).T


# ---------------------------------------------------------------- generality against locality


def name_family(name: str) -> str:
    """What a method's variants share: its name up to a bracket or comma."""
    return re.split(r" \(|, ", name)[0]


def choose_looks(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker by name: a colour per family, a marker of its own for each."""
    families = list(dict.fromkeys(map(name_family, names)))
    colours = {f: COLOURS[i % len(COLOURS)] for i, f in enumerate(families)}
    return {
        n: (colours[name_family(n)], MARKERS[i % len(MARKERS)]) for i, n in enumerate(dict.fromkeys(names))
    }


def _spread(values: np.ndarray) -> np.ndarray:
    """Gives room to values near 100: minus the root of the distance to 100.5."""
    return -np.sqrt(np.maximum(100.5 - np.asarray(values, dtype=float), 0.0))


def _unspread(values: np.ndarray) -> np.ndarray:
    return 100.5 - np.asarray(values, dtype=float) ** 2


@_style
def draw_trade_off(panels: Mapping[str, Sequence[Point]]) -> Figure:
    """A panel per backbone and task: locality to the right, generality upwards, the paper's hollow."""
    points = [p for panel in panels.values() for p in panel]
    look = choose_looks([p.name for p in points])
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = _make_grid(rows, columns, 3.8 * rows + 1.2, sharex=True, sharey=True)
    shown: dict[str, Any] = {}
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        for i, p in enumerate(panel):
            colour, marker = look[p.name]
            # The later ones are smaller: where methods coincide, all are seen.
            size = 11 - 4.5 * i / max(len(panel) - 1, 1)
            if p.paper is not None:
                axes.plot(*p.paper, marker, mfc="none", mec=colour, ms=8.5, mew=1.7, zorder=2)
            shown[p.name] = axes.errorbar(
                p.locality.mean,
                p.generality.mean,
                _find_reach([p.generality]),
                _find_reach([p.locality]),
                fmt=marker,
                color=colour,
                ms=size,
                mec="white",
                mew=0.7,
                elinewidth=1.4,
                zorder=3,
            )
        axes.set_title(title)
    _scale_near_100(grid, points)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes in grid[-1]:
        axes.set_xlabel("locality, %")
    for axes in grid[:, 0]:
        axes.set_ylabel("generality, %")
    line = require("matplotlib.lines").Line2D
    hollow = line([], [], ls="", marker="o", mfc="none", mec="#555555", ms=8.5, mew=1.7)
    handles, labels = [*shown.values(), hollow], [*shown, "hollow: the paper"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _scale_near_100(grid: np.ndarray, points: Sequence[Point]) -> None:
    """Axes that reach down to all points, with the most room near 100."""
    drawn = [(p.locality.low, p.generality.low) for p in points] + [p.paper for p in points if p.paper]
    scale = require("matplotlib.scale").FuncScale
    for letter, values in zip("xy", zip(*drawn, strict=True), strict=True):
        low = min(90.0, max(0.0, min(values) - 3))
        ticks = [t for t in (0, 20, 40, 60, 80, 90, 95, 98, 100) if t >= low]
        for axes in grid.flat:
            axes.set(**{f"{letter}scale": scale(getattr(axes, f"{letter}axis"), (_spread, _unspread))})
            axes.set(**{f"{letter}lim": (low, 100.4), f"{letter}ticks": ticks})


# ---------------------------------------------------------------- sweeps and bars


@_style
def draw_sweeps(panels: Mapping[tuple[str, str], Sweep]) -> Figure:
    """Panels by ``(row, column)``: lines over the settings, which are evenly spaced."""
    rows, columns = (list(dict.fromkeys(key[i] for key in panels)) for i in (0, 1))
    figure, grid = _make_grid(len(rows), len(columns), 2.7 * len(rows) + 0.9, sharey=True)
    names = list(dict.fromkeys(name for sweep in panels.values() for name in sweep.lines))
    for (row, column), sweep in panels.items():
        axes = grid[rows.index(row), columns.index(column)]
        for i, name in enumerate(names):
            if name in sweep.lines:
                # Lines that coincide differ by a small shift and by their dashes.
                shift = 0.11 * (i - (len(names) - 1) / 2)
                _draw_line(axes, sweep, name, shift, (LINE_COLOURS[i % 4], MARKERS[i], DASHES[i % 4]))
        at = _place_settings(sweep)
        axes.set_xticks(at, sweep.settings)
        axes.set_xlim(-0.4, at[-1] + 0.4)
        axes.set_xlabel(sweep.label)
        if row == rows[0]:
            axes.set_title(column)
    for axes, row in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(f"{row}, %")
    _add_legend(figure, grid[0, 0], len(names))
    return figure


def _place_settings(sweep: Sweep) -> list[float]:
    cut = len(sweep.settings) - sweep.apart
    return [i + 0.4 * (i >= cut) for i in range(len(sweep.settings))]


def _draw_line(axes: Axes, sweep: Sweep, name: str, shift: float, look: tuple[str, str, str]) -> None:
    values, cut = sweep.lines[name], len(sweep.settings) - sweep.apart
    colour, marker, dashes = look
    for part, label in ((slice(0, cut), name), (slice(cut, None), None)):
        at = [x + shift for x in _place_settings(sweep)[part]]
        if at:
            axes.errorbar(
                at,
                [v.mean for v in values[part]],
                _find_reach(values[part]),
                color=colour,
                marker=marker,
                ls=dashes if label else "",
                ms=6,
                lw=1.8,
                elinewidth=1.2,
                capsize=2,
                label=label,
            )


@_style
def draw_grouped_bars(
    panels: Mapping[str, Mapping[str, Mapping[str, Interval]]],
    paper: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> Figure:
    """A panel per title, groups of bars in each by group and bar; ``paper`` alike, as diamonds.

    Bars start where the axis does, at the ten below everything drawn; the axis label names it.
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = _make_grid(rows, columns, 2.9 * rows + 0.9, sharey=True)
    groups = [bars for panel in panels.values() for bars in panel.values()]
    names = list(dict.fromkeys(name for bars in groups for name in bars))
    drawn = [v.low for bars in groups for v in bars.values()]
    drawn += [v for panel in paper.values() for bars in panel.values() for v in bars.values()]
    floor = min(90.0, 10 * np.floor((min(drawn) - 0.5) / 10))
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            own = {g: (at, bars[name]) for at, (g, bars) in enumerate(panel.items()) if name in bars}
            at = [x + (i - (len(names) - 1) / 2) * width for x, _ in own.values()]
            values = [v for _, v in own.values()]
            axes.bar(
                at,
                [v.mean - floor for v in values],
                0.9 * width,
                bottom=floor,
                yerr=_find_reach(values),
                color=BARS[i % len(BARS)],
                capsize=2.5,
                label=name,
            )
            published, label = paper.get(title, {}), "_" if i or not paper else "the paper"
            marks = [(x, published.get(group, {}).get(name)) for x, group in zip(at, own, strict=True)]
            axes.plot(
                [x for x, y in marks if y is not None],
                [y for _, y in marks if y is not None],
                "D",
                mfc="white",
                mec="black",
                ms=6.5,
                mew=1.4,
                zorder=4,
                label=label,
            )
        axes.set_title(title)
        axes.set_xticks(range(len(panel)), panel)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(floor, 101)
        axes.yaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator(6, integer=True))
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes in grid[:, 0]:
        axes.set_ylabel(f"%, from {floor:.0f}" if floor else "%")
    _add_legend(figure, grid[0, 0], len(names) + 1)
    return figure


# ---------------------------------------------------------------- spaces


@_style
def draw_spaces(rows: Mapping[str, Mapping[str, Space]]) -> Figure:
    """A row per backbone, a panel per space: right and wrong answers to the same question joined by a
    line. The axes of an embedding have no unit."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    figure, grid = _make_grid(len(rows), len(columns), 3.5 * len(rows) + 0.6)
    for line, (title, row) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(title, size=12, weight="bold")
        for axes, column in zip(line, columns, strict=True):
            space = row[column]
            pairs = np.stack([space.right, space.wrong, np.full_like(space.right, np.nan)], axis=1)
            axes.plot(*pairs.reshape(-1, 2).T, color="#c4c4c4", lw=0.6, zorder=1, label="same question")
            axes.plot(*space.right.T, "o", color=RIGHT, ms=4.5, mew=0, alpha=0.85, label="right answer")
            axes.plot(*space.wrong.T, "x", color=WRONG, ms=5, mew=1.3, alpha=0.9, label="wrong answer")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(space.note, size=10.5)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(column)
    _add_legend(figure, grid[0, 0], 3)
    return figure


# ---------------------------------------------------------------- worked examples


@_style
def draw_examples(rows: Sequence[WorkedExample]) -> Figure:
    """A row per edit, a column per probe: the image, the question, the answers before and after.

    An answer that an edit leaves as it was is not repeated.
    """
    columns = max(len(row.panels) for row in rows)
    names = [textwrap.wrap(row.name, 88) for row in rows]
    texts = [[wrap_panel(panel, int(122 / columns)) for panel in row.panels] for row in rows]
    longest = [max(map(len, row)) for row in texts]
    heights = [(len(name) + n + 1.2) * LINE + IMAGE + 0.1 for name, n in zip(names, longest, strict=True)]
    whole = sum(heights)
    figure = require("matplotlib.figure").Figure(figsize=(WIDTH, whole))
    top = whole
    for row, name, wrapped, height in zip(rows, names, texts, heights, strict=True):
        figure.text(0.01, (top - 0.08) / whole, "\n".join(name), size=11, weight="bold", va="top")
        under = top - 0.14 - len(name) * LINE
        for i, (panel, lines) in enumerate(zip(row.panels, wrapped, strict=True)):
            left = 0.01 + i * 0.99 / columns
            if panel.image is not None:
                width = min(0.94 / columns, IMAGE / WIDTH)
                axes = figure.add_axes((left, (under - IMAGE) / whole, width, IMAGE / whole))
                axes.imshow(require("PIL.Image").open(panel.image).convert("RGB"))
                axes.set_axis_off()
            for number, (line, colour, weight) in enumerate(lines):
                y = (under - IMAGE - 0.06 - number * LINE) / whole
                figure.text(left, y, line, size=10, color=colour, weight=weight, va="top")
        top -= height
        if row is not rows[-1]:
            line = require("matplotlib.lines").Line2D([0.01, 0.99], [top / whole] * 2, color="#bbbbbb")
            figure.add_artist(line)
    return figure


def wrap_panel(panel: ProbePanel, letters: int) -> list[tuple[str, str, str]]:
    """The text under an image: lines of at most ``letters``, each with its colour and weight."""

    def wrap(text: str) -> list[str]:
        return textwrap.wrap(text, letters, subsequent_indent="   ")

    out = [(line, "black", "bold") for line in textwrap.wrap(panel.heading, letters)]
    out += [(line, "black", "normal") for line in textwrap.wrap(panel.question, letters)]
    out += [(line, "#555555", "normal") for line in wrap(f"before: {panel.before}")]
    for name, answer in panel.after.items():
        text = "as before" if answer.text == panel.before else answer.text
        mark, colour = (PASS_MARK, RIGHT) if answer.good else (FAIL_MARK, WRONG)
        out += [(line, colour, "normal") for line in wrap(f"{mark} {name}: {text}")]
    return out
