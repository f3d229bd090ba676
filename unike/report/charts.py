"""Charts of a page: where bars, lines and words are. The template draws them as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, ROW, LABEL, FOOT = 380, 26, 64, 20
TALL, BINS = 120, 12


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


def draw_shares(title: str, rows: Mapping[str, Sequence[int]], series: Sequence[str]) -> Chart:
    """A bar per row, in parts as long as the ``series``' counts."""
    bars, words, texts = [], [], []
    for i, (name, counts) in enumerate(rows.items()):
        y, x, total = i * ROW, float(LABEL), max(1, sum(counts))
        words.append(Word(LABEL - 8, y + 16, name, "end"))
        for number, count in enumerate(counts):
            width = (WIDTH - LABEL) * count / total
            hint = f"{name}, {series[number]}: {count} of {total}"
            if count:
                bars.append(Bar(number, x, y + 3, width, ROW - 6, hint))
            if width > 9 * len(str(count)):
                words.append(Word(x + width / 2, y + 16, str(count), f"middle on-{number}"))
            x += width
        parts = (f"{series[k]} {count}" for k, count in enumerate(counts) if count)
        texts.append(f"{name}: {', '.join(parts)}")
    return Chart(title, "; ".join(texts), len(rows) * ROW, tuple(series), tuple(bars), tuple(words))


def draw_histogram(title: str, groups: Mapping[str, Sequence[float]], digits: int = 2) -> Chart | None:
    """How often values fall into evenly wide bins, a bar per group in each; None without values.

    Numbers are written with so many ``digits``, whole ones without.
    """
    values = np.concatenate([np.asarray(group, dtype=float) for group in groups.values()] or [np.zeros(0)])
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    whole = high - low < 2 * BINS and bool((values == np.rint(values)).all())
    # Whole numbers get a bin each: others would draw gaps that are not there.
    around = 0.5 if whole or low == high else 0.0
    edges = np.linspace(low - around, high + around, int(high - low) + 2 if whole else BINS + 1)
    counts = [np.histogram(group, edges)[0] for group in groups.values()]
    most, step = max(int(c.max()) for c in counts), WIDTH / (len(edges) - 1)
    digits = 0 if whole else digits
    bars = [
        Bar(
            number,
            i * step + 1 + number * (step - 2) / len(counts),
            TALL - (TALL - 14) * count / most,
            (step - 2) / len(counts),
            (TALL - 14) * count / most,
            f"{name}, {_name_bin(edges[i], edges[i + 1], whole, digits)}: {count}",
        )
        for number, (name, found) in enumerate(zip(groups, counts, strict=True))
        for i, count in enumerate(found.tolist())
        if count
    ]
    margin, looks = (step / 2, ("middle", "middle")) if around else (0.0, ("", "end"))
    words = [Word(margin, TALL + 15, f"{low:.{digits}f}", looks[0])]
    if low < high:
        words.append(Word(WIDTH - margin, TALL + 15, f"{high:.{digits}f}", looks[1]))
    words.append(Word(0, 10, f"highest bar: {most}"))
    text = "; ".join(
        f"{name}: {len(group)} values, median {np.median(group):.{digits}f}, from {min(group):.{digits}f} "
        f"to {max(group):.{digits}f}"
        for name, group in groups.items()
        if len(group)
    )
    return Chart(title, text, TALL + FOOT, tuple(groups), tuple(bars), tuple(words), scale="kinds")


def _name_bin(low: float, high: float, whole: bool, digits: int) -> str:
    return f"{(low + high) / 2:.0f}" if whole else f"{low:.{digits}f} to {high:.{digits}f}"


def draw_curve(title: str, lines: Mapping[str, Sequence[float]], last: int) -> Chart:
    """Percentages over the numbers up to ``last``, from 1 on where there are as many."""
    right, left = WIDTH - 8, 34
    step, points = (right - left) / max(1, last - 1), []
    for values in lines.values():
        start = right - step * (len(values) - 1)
        places = ((start + i * step, 8 + TALL * (1 - value / 100)) for i, value in enumerate(values))
        points.append(" ".join(f"{x:.1f},{y:.1f}" for x, y in places))
    words = [Word(left - 6, 12 + TALL * (1 - p / 100), f"{p}", "end") for p in (0, 50, 100)]
    words += [Word(left, TALL + 26, "1"), Word(right, TALL + 26, f"{last} edits", "end")]
    text = "; ".join(f"{name}: from {v[0]:.1f}% to {v[-1]:.1f}%" for name, v in lines.items())
    return Chart(title, text, TALL + 32, tuple(lines), words=tuple(words), lines=tuple(points), scale="kinds")
