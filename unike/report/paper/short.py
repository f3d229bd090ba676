"""A table in short: where the row of ours stands in each block, and what it loses to."""

from __future__ import annotations

from collections.abc import Sequence

from unike.evaluation.summary import MODES
from unike.report.measures import MEASURE_TITLES, Row, compare_rows
from unike.report.paper.claims import HOLDS, LOST, UNCLEAR, choose_hm8, describe, judge
from unike.report.paper.tables import Block, list_not_run

_COLUMNS = tuple((mode, measure) for mode in MODES for measure in ("hm8", "five"))


def write_short(blocks: Sequence[Block], command: str) -> str:
    """Markdown: a line for each block, with the subject's figure, that of the best row that is not ours, and
    the paired difference; then what is lost, and what cannot be told, by row. Only complete rows count.

    Empty where the subject is in no block. ``command`` is what shows the whole.
    """
    own = [block for block in blocks if find_subject(block) is not None]
    if not own:
        return ""
    hm8 = choose_hm8([row for block in own for row in block.rows])
    measures = [(mode, hm8 if name == "hm8" else name) for mode, name in _COLUMNS]
    header = ["setting", *(f"{MEASURE_TITLES[measure]}, {_name(mode)}" for mode, measure in measures)]
    lines = [[block.title, *(_describe_best(block, *pair) for pair in measures)] for block in own]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])
    said = f"{own[0].subject} against the best row that is not ours, by paired difference with its interval."
    parts = [said, table, list_not_run(own), *_list_losses(own, measures), f"Shown by `{command}`."]
    return "\n\n".join(filter(None, parts))


def find_subject(block: Block) -> Row | None:
    """The block's row of ours that the others are compared with, if it is complete."""
    return next((row for row in block.rows if row.name == block.subject and row.complete), None)


def _describe_best(block: Block, mode: str, measure: str) -> str:
    ours = find_subject(block)
    known = [(row.find_mean(measure, mode), row) for row in block.rows if not row.ours and row.complete]
    ranked = sorted(((m, row) for m, row in known if m is not None), key=lambda pair: -pair[0])
    mine = ours.find_mean(measure, mode) if ours else None
    if ours is None or mine is None:
        return ""
    found = compare_rows(ours, ranked[0][1], measure, block.seed, mode) if ranked else None
    if found is None:
        return f"{mine:.1f}"
    return f"{mine:.1f}; {ranked[0][1].name} {ranked[0][0]:.1f}; {describe(found)}: **{judge(found)}**"


def _list_losses(blocks: Sequence[Block], measures: Sequence[tuple[str, str]]) -> list[str]:
    """What the subject loses to, and where that cannot be told, of all rows that are not ours."""
    found: dict[str, list[str]] = {LOST: [], UNCLEAR: [], HOLDS: []}
    for block in blocks:
        ours = find_subject(block)
        others = [row for row in block.rows if not row.ours and row.complete]
        for mode, measure in measures:
            by_verdict: dict[str, list[str]] = {}
            for row in others:
                difference = compare_rows(ours, row, measure, block.seed, mode) if ours else None
                if difference is not None:
                    by_verdict.setdefault(judge(difference), []).append(f"{row.name} {difference[0]:+.1f}")
            where = f"{block.title}, {MEASURE_TITLES[measure]}, {_name(mode)}"
            for verdict, names in by_verdict.items():
                found[verdict].append(f"{where}: {', '.join(names)}")
    parts = []
    for verdict, title in ((LOST, "Lost to"), (UNCLEAR, "Cannot be told from")):
        listed = "\n".join(f"- {line}" for line in found[verdict]) if found[verdict] else "- none"
        parts.append(f"{title} (ours minus theirs):\n\n{listed}")
    return parts


def _name(mode: str) -> str:
    return mode.replace("_", "-")
