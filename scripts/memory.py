"""The memory that one edit takes, by model and precision, from the published configurations.

python -m scripts.memory                           # prints the table
python -m scripts.memory --write docs/devices.md   # writes it between the page's markers
python -m scripts.memory --check                   # exit code 1 where the page is out of date
python -m scripts.memory --short                   # 16 bit alone, a row for each model

What was measured is read from docs/performance_figures.md (benchmarks/full_size.py).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from unike.backbones.checking import count_published_parameters
from unike.config.hparams import HyperParams
from unike.config.untrained import make_untrained
from unike.report.paper.published import FAMILY_TITLES
from unike.report.paper.tables import rewrite_blocks
from unike.runs.memory import EditMemory, estimate_edit_memory
from unike.system.arguments import ArgumentParser
from unike.system.files import write_text
from unike.system.launching import run_guarded
from unike.types import BACKBONES, UserError

ROOT = Path(__file__).parents[1]
PAGE, FIGURES = ROOT / "docs" / "devices.md", ROOT / "docs" / "performance_figures.md"
PRECISIONS = {"float32": "32 bit", "bfloat16": "16 bit"}
# In the benchmark's rows, by family.
MEASURED = {"blip2": "BLIP2-OPT-2.7B", "minigpt4": "MiniGPT-4-7B"}
# smol is made of packages: no configuration of it is published.
FAMILIES = tuple(family for family in BACKBONES if family != "smol")
COLUMNS = (
    "model, parameters",
    "precision",
    "weights",
    "edit without data",
    "UniKE, paper preset",
    "FT, last layer",
)
# Where the weights are, in a YAML of a model.
_PLACES = ("name", "state_dict_file", "qformer_checkpoint", "pretrained_ckpt", "image_size")


def read_hparams(family: str, dtype: str) -> Iterator[HyperParams]:
    """Of a family: an edit without data, the paper's preset, and fine-tuning."""
    preset = HyperParams.from_hparams(ROOT / "hparams" / f"{family}.yaml").replace(dtype=dtype)
    places = {name: getattr(preset, name) for name in _PLACES}
    yield make_untrained(f"hparams/{family}.yaml", model_name=family, dtype=dtype, **places)
    yield preset
    yield HyperParams.from_hparams(ROOT / "hparams" / "ft" / f"{family}.yaml").replace(dtype=dtype)


def estimate(hparams: HyperParams) -> EditMemory:
    """As ``estimate_edit_memory``, of the model as published. UserError for a model that is not published."""
    parameters = count_published_parameters(hparams.backbone)
    found = None if parameters is None else estimate_edit_memory(hparams, parameters)
    if found is None:
        raise UserError(f"{hparams.source}: name: {hparams.name}: its size is not known")
    return found


def read_measured(text: str) -> dict[str, float]:
    """By family the measured peak in GB, in bfloat16, from the page of figures."""
    row = r"^\| full_size \| {} \| peak resident \| ([\d.]+) GB"
    found = {
        family: re.search(row.format(re.escape(title)), text, re.M) for family, title in MEASURED.items()
    }
    if lost := [title for family, title in MEASURED.items() if found[family] is None]:
        raise UserError(f"{FIGURES.name}: has no peak resident of {', '.join(lost)}")
    return {family: float(match[1]) for family, match in found.items() if match}


def render_table(short: bool = False) -> str:
    """Markdown: a row for each model and precision, in GB; ``short``: for each model, in 16 bit."""
    rows = [(*COLUMNS, "measured"), ("---", "---", *["---:"] * (len(COLUMNS) - 1))]
    measured = read_measured(FIGURES.read_text(encoding="utf-8"))
    for family in FAMILIES:
        for dtype in [*PRECISIONS][-1:] if short else PRECISIONS:
            kinds = [*read_hparams(family, dtype)]
            found = [estimate(hparams) for hparams in kinds]
            sizes = [found[0].weights, *(memory.peak for memory in found)]
            known = measured.get(family) if dtype == "bfloat16" else None
            cells = [*(f"{size / 1e9:.1f}" for size in sizes), f"{known:.1f}" if known else "-"]
            parameters = count_published_parameters(kinds[0].backbone) or 0
            model = f"{FAMILY_TITLES[family]}, {parameters / 1e9:.1f} B"
            rows.append((model, PRECISIONS[dtype], *cells))
    return "\n".join(f"| {' | '.join(row[:1] + row[2:] if short else row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    return run_guarded(lambda: run(argv))


def run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the page with the markers")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; report whether the page is up to date"
    )
    parser.add_argument("--short", action="store_true", help="16 bit alone; the markers are `memory short`")
    args = parser.parse_args(argv)
    page = args.write or PAGE
    table = render_table(args.short)
    if not args.write and not args.check:
        print(table)
        return 0
    try:
        before = page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{page}: cannot be read: {error.strerror}") from error
    after = rewrite_blocks(before, str(page), {"short" if args.short else "edit": table}, "memory")
    if args.check:
        print(f"{page.name}: {'up to date' if before == after else 'out of date; run --write'}")
        return 0 if before == after else 1
    write_text(page, after)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
