"""``unike list``: the shipped YAMLs, methods by models."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from unike.config.hparams import HyperParams
from unike.config.shipped_yamls import list_names
from unike.system.arguments import ArgumentParser
from unike.types import UserError

# What a YAML's folder says of its method; YAMLs without a folder are the paper's own.
METHODS = {
    "": "UniKE, paper preset",
    "scoped": "UniKE + scope gate: edits apply where a trained classifier says so",
    "ft": "fine-tuning",
    "wise": "WISE, a side memory beside one feed-forward matrix",
    "grace": "GRACE, a codebook of keys and values at one layer",
    "lora": "LoRA, factors beside linear modules",
    "ike": "in-context editing",
    "ke": "KnowledgeEditor, meta-learned",
    "liveedit": "LiveEdit, meta-learned experts, routed by image and question",
    "mend": "MEND, meta-learned",
    "serac": "SERAC, meta-learned",
    "serac_multimodal": "SERAC with images in its scope classifier",
    "tpatcher": "T-Patcher",
    "tpatcher_published": "T-Patcher as published",
    "lavis": "UniKE, paper preset, in LAVIS's own modules",
}
_UNNAMED = "(none)"
# Columns of text.
_TERMINAL = 88


def run(argv: Sequence[str]) -> int:
    """Prints the YAMLs; the exit code."""
    parser = ArgumentParser("unike list", description="Lists the YAMLs that come with the package.")
    parser.add_argument("--names", action="store_true", help="names only, one a line")
    args = parser.parse_args(argv)
    names = list_names()
    if not names:
        raise UserError("no YAML came with this package; expected a wheel, or a clone of the project")
    print("\n".join(names) if args.names else format_matrix(names))
    return 0


def format_matrix(names: Sequence[str]) -> str:
    """A row per model, a column per method, and what each of them is."""
    pairs = {tuple(("", name) if "/" not in name else name.split("/", 1)) for name in names}
    methods = sorted({method for method, _ in pairs}, key=_rank_method)
    models = sorted({model for _, model in pairs}, key=lambda model: (not _is_bundled(model), model))
    lines: list[str] = []
    for some in _split_columns(methods, max(map(len, models))):
        lines += [""] if lines else []
        lines += _format_block(some, models, pairs)
    lines += ["", f"{len(names)} YAMLs. Name one as METHOD/MODEL, or MODEL alone for the column {_UNNAMED}:"]
    lines += ["  unike edit --hparams scoped/tiny_blip2 --size 5", ""]
    label = max(len(method or _UNNAMED) for method in methods)
    lines += [f"  {method or _UNNAMED:<{label}}  {METHODS.get(method, '')}".rstrip() for method in methods]
    bundled = ", ".join(model for model in models if _is_bundled(model))
    lines += ["", f"Weights of {bundled or 'no model'} are included; the others are downloaded."]
    return "\n".join(lines)


def _split_columns(methods: Sequence[str], width: int) -> list[list[str]]:
    """The methods in blocks that are no wider than a terminal, beside names of that width."""
    blocks: list[list[str]] = [[]]
    used = width
    for method in methods:
        own = 1 + max(map(len, _split_head(method)))
        if used + own > _TERMINAL and blocks[-1]:
            blocks.append([])
            used = width
        blocks[-1].append(method)
        used += own
    return blocks


def _split_head(method: str) -> tuple[str, str]:
    """A column's two lines."""
    first, _, second = (method or _UNNAMED).partition("_")
    return first + "_" * bool(second), second


def _format_block(
    methods: Sequence[str], models: Sequence[str], pairs: Collection[tuple[str, ...]]
) -> list[str]:
    heads = [_split_head(method) for method in methods]
    width, widths = max(map(len, models)), [max(map(len, head)) for head in heads]
    lines = [_format_row("", [head[i] for head in heads], width, widths) for i in (0, 1)]
    for model in models:
        cells = ["x" if (method, model) in pairs else "" for method in methods]
        lines.append(_format_row(model, cells, width, widths))
    return [line.rstrip() for line in lines]


def _format_row(first: str, cells: Sequence[str], width: int, widths: Sequence[int]) -> str:
    return f"{first:<{width}}" + "".join(f" {cell:<{w}}" for cell, w in zip(cells, widths, strict=True))


def _rank_method(method: str) -> tuple[int, str]:
    known = list(METHODS)
    return (known.index(method) if method in known else len(known), method)


def _is_bundled(model: str) -> bool:
    """Whether the weights of a model's own YAML are there."""
    try:
        return Path(HyperParams.from_hparams(model).name).is_dir()
    except UserError:
        return False
