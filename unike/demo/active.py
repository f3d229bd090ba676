"""What was active for a question, as HTML tables with every text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from unike.edits.explain import Explanation, describe_activity, describe_item, rate_strength

MOST_EDITS = 10


def render_active(answers: Explanation) -> str:
    """The edits that apply, the strongest first, and each layer's alpha and retrieved items, as HTML."""
    if not answers.edits:
        return "<p>No edit is attached: the base model answers.</p>"
    gates = "".join(f"; threshold of the {escape(name)} gate: {at:.3f}" for name, at in answers.gates.items())
    active = sorted((edit for edit in answers.edits if edit.active), key=rate_strength, reverse=True)
    edits = [
        (e.prompt or "-", e.target or "-", "-" if e.scope is None else f"{e.scope:.3f}", describe_activity(e))
        for e in active[:MOST_EDITS]
    ]
    parts = [f"<p>{len(active)} of {len(answers.edits)} edits apply{gates}.</p>"]
    if edits:
        parts.append(_render_table("Edits", ("question", "answer", "scope", "effect"), edits))
    if answers.layers:
        items = [
            (
                f"{layer.layer}",
                f"{layer.alpha:.3f}",
                f"{i.weight:.3f}",
                f"{i.similarity:.3f}",
                describe_item(i),
            )
            for layer in answers.layers
            for i in layer.items
        ]
        columns = ("layer", "alpha", "weight", "similarity", "retrieved")
        parts.append(_render_table("Retrieved knowledge", columns, items))
        parts.append("<p>alpha: the share of attention for knowledge; weight: the item's share of that.</p>")
    return "".join(parts)


def _render_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
