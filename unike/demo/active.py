"""What was active for a question, as HTML tables; every text in them is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from unike.edits.explain import Explanation, describe_activity, describe_item, rate_strength

MOST_EDITS = 10


def active_html(asked: Explanation) -> str:
    """The edits that could speak, the strongest first, and of each layer alpha and the retrieved items."""
    if not asked.edits:
        return "<p>No edit is in force: the model answers for itself.</p>"
    gates = "".join(f"; the {escape(name)} gate opens at {at:.3f}" for name, at in asked.gates.items())
    able = sorted((edit for edit in asked.edits if edit.active), key=rate_strength, reverse=True)
    edits = [
        (e.prompt or "-", e.target or "-", "-" if e.scope is None else f"{e.scope:.3f}", describe_activity(e))
        for e in able[:MOST_EDITS]
    ]
    parts = [f"<p>{len(able)} of {len(asked.edits)} edits could speak{gates}.</p>"]
    if edits:
        parts.append(_table("Edits", ("its question", "its answer", "scope", "what it did"), edits))
    if asked.layers:
        items = [
            (
                f"{layer.layer}",
                f"{layer.alpha:.3f}",
                f"{i.weight:.3f}",
                f"{i.similarity:.3f}",
                describe_item(i),
            )
            for layer in asked.layers
            for i in layer.items
        ]
        columns = ("layer", "alpha", "weight", "similarity", "retrieved")
        parts.append(_table("Retrieved knowledge", columns, items))
        parts.append("<p>alpha: knowledge's share of attention; weight: the item's share of that.</p>")
    return "".join(parts)


def _table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
