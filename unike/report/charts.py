"""Charts of a page: where bars, lines and words are. The template draws them as SVG.

Every axis has a title. What has one value only is no chart: ``describe_constant`` says it in a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, ROW, FOOT = 380, 26, 38
# A plot's left, top and bottom: the vertical axis and its title stand before and above them.
LEFT, TOP, TALL, BINS = 34, 18, 122, 12
MOST_DIGITS = 6
# Of a row's name: the least width, that of a letter, and how many are shown.
LABEL, LETTER, LETTERS = 64, 6.6, 20


@dataclass(frozen=True)
class Bar:
    """A rectangle of the series with that number."""

    series: int
    x: float
    y: float
    width: float
    height: float
    hint: str


@dataclass(frozen=True)
class Word:
    x: float
    y: float
    text: str
    look: str = ""


@dataclass(frozen=True)
class Chart:
    """``description`` is what the chart shows, in words; ``lines`` are points ``x,y``."""

    title: str
    description: str
    height: float
    series: tuple[str, ...]
    bars: tuple[Bar, ...] = ()
    words: tuple[Word, ...] = ()
    lines: tuple[str, ...] = ()
    width: float = WIDTH
    scale: str = "shades"


def draw_shares(title: str, rows: Mapping[str, Sequence[int]], series: Sequence[str]) -> Chart | None:
    """A bar per row, in parts as long as the ``series``' counts; None with fewer than two rows."""
    if len(rows) < 2:
        return None
    bars, words, texts = [], [], []
    label = max(LABEL, *(LETTER * min(len(name), LETTERS) + 12 for name in rows))
    for i, (name, counts) in enumerate(rows.items()):
        y, x, total = i * ROW, float(label), max(1, sum(counts))
        shown = name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"
        words.append(Word(label - 8, y + 16, shown, "end"))
        for number, count in enumerate(counts):
            width = (WIDTH - label) * count / total
            hint = f"{name}, {series[number]}: {count} of {total}"
            if count:
                bars.append(Bar(number, x, y + 3, width, ROW - 6, hint))
            if width > 9 * len(str(count)):
                words.append(Word(x + width / 2, y + 16, str(count), f"middle on-{number}"))
            x += width
        parts = (f"{series[k]} {count}" for k, count in enumerate(counts) if count)
        texts.append(f"{name}: {', '.join(parts)}")
    foot = len(rows) * ROW
    words += [Word(label, foot + 12, "0"), Word(WIDTH, foot + 12, "100", "end")]
    words += _name_axes("probe", "cases, in percent", label, foot, name_at=foot + 12, upright="end")
    return Chart(title, "; ".join(texts), foot + FOOT, tuple(series), tuple(bars), tuple(words))


def draw_histogram(
    title: str, groups: Mapping[str, Sequence[float]], across: str, up: str, digits: int = 2
) -> Chart | None:
    """How often values fall into evenly wide bins, a bar per group in each; None where all values are equal,
    and without any.

    ``across`` and ``up`` are the axes' titles. Numbers are written with so many ``digits``, or more
    where the ends would read alike; whole ones without.
    """
    values = np.concatenate([np.asarray(group, dtype=float) for group in groups.values()] or [np.zeros(0)])
    if not values.size or values.min() == values.max():
        return None
    low, high = float(values.min()), float(values.max())
    whole = _are_whole(values)
    # Whole numbers get a bin each: others would draw gaps that are not there.
    around = 0.5 if whole else 0.0
    edges = np.linspace(low - around, high + around, int(high - low) + 2 if whole else BINS + 1)
    counts = [np.histogram(group, edges)[0] for group in groups.values()]
    most, step = max(int(c.max()) for c in counts), (WIDTH - LEFT) / (len(edges) - 1)
    digits = 0 if whole else digits
    while f"{low:.{digits}f}" == f"{high:.{digits}f}" and digits < MOST_DIGITS:
        digits += 1
    bars = [
        Bar(
            number,
            LEFT + i * step + 1 + number * (step - 2) / len(counts),
            TALL - (TALL - TOP) * count / most,
            (step - 2) / len(counts),
            (TALL - TOP) * count / most,
            f"{name}, {_name_bin(edges[i], edges[i + 1], whole, digits)}: {count}",
        )
        for number, (name, found) in enumerate(zip(groups, counts, strict=True))
        for i, count in enumerate(found.tolist())
        if count
    ]
    margin, looks = (step / 2, ("middle", "middle")) if whole else (0.0, ("", "end"))
    words = [
        Word(LEFT + margin, TALL + 14, f"{low:.{digits}f}", looks[0]),
        Word(WIDTH - margin, TALL + 14, f"{high:.{digits}f}", looks[1]),
        Word(LEFT - 6, TALL, "0", "end"),
        Word(LEFT - 6, TOP + 8, str(most), "end"),
        *_name_axes(up, across, LEFT, TALL),
    ]
    text = "; ".join(
        f"{name}: {len(group)} values, median {np.median(group):.{digits}f}, from {min(group):.{digits}f} "
        f"to {max(group):.{digits}f}"
        for name, group in groups.items()
        if len(group)
    )
    return Chart(title, text, TALL + FOOT, tuple(groups), tuple(bars), tuple(words), scale="kinds")


def describe_constant(title: str, groups: Mapping[str, Sequence[float]], digits: int = 2) -> str:
    """In a sentence what would be a single bar: values that are all equal; empty for others."""
    values = np.concatenate([np.asarray(group, dtype=float) for group in groups.values()] or [np.zeros(0)])
    if not values.size or values.min() < values.max():
        return ""
    value = f"{values[0]:.{0 if _are_whole(values) else digits}f}"
    return f"{title}: {value} " + ("(one value)." if values.size == 1 else f"in all {values.size} values.")


def _are_whole(values: np.ndarray) -> bool:
    """Whether all values are whole numbers, and so few that each may have a bin."""
    return bool(values.max() - values.min() < 2 * BINS and (values == np.rint(values)).all())


def _name_bin(low: float, high: float, whole: bool, digits: int) -> str:
    return f"{(low + high) / 2:.0f}" if whole else f"{low:.{digits}f} to {high:.{digits}f}"


def _name_axes(
    up: str, across: str, left: float, foot: float, name_at: float = 10, upright: str = ""
) -> tuple[Word, Word]:
    """The titles: of the vertical axis above it, unless ``name_at`` says how deep, and of the other below."""
    place = left - 8 if upright else 0
    look = " ".join(filter(None, ("axis", upright)))
    return Word(place, name_at, up, look), Word((left + WIDTH) / 2, foot + 30, across, "axis middle")


def draw_curve(
    title: str, lines: Mapping[str, Sequence[float]], last: int, across: str, up: str
) -> Chart | None:
    """Percentages over the numbers up to ``last``, from 1 on where there are as many; None where no line has
    two points."""
    if all(len(values) < 2 for values in lines.values()):
        return None
    right, points = WIDTH - 8, []
    step = (right - LEFT) / max(1, last - 1)
    for values in lines.values():
        start = right - step * (len(values) - 1)
        places = ((start + i * step, TOP + (TALL - TOP) * (1 - v / 100)) for i, v in enumerate(values))
        points.append(" ".join(f"{x:.1f},{y:.1f}" for x, y in places))
    words = [Word(LEFT - 6, TOP + 4 + (TALL - TOP) * (1 - p / 100), f"{p}", "end") for p in (0, 50, 100)]
    words += [Word(LEFT, TALL + 16, "1"), Word(right, TALL + 16, f"{last}", "end")]
    words += _name_axes(up, across, LEFT, TALL)
    text = "; ".join(f"{name}: from {v[0]:.1f}% to {v[-1]:.1f}%" for name, v in lines.items())
    return Chart(
        title, text, TALL + FOOT, tuple(lines), words=tuple(words), lines=tuple(points), scale="kinds"
    )
