"""Writes the reference of all hyper-parameters from their sections.

python -m scripts.reference            # docs/hparams.md
python -m scripts.reference --check    # exit code 1 if the page is out of date
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from unike.config.hparams import OPTIONS
from unike.config.schema import Option
from unike.system.launching import run_guarded

PAGE = Path(__file__).parents[1] / "docs" / "hparams.md"
HEAD = """# Hyper-parameters

<!-- Written by `python -m scripts.reference` from the sections in unike/config: change them there. -->

One flat YAML per run. `key=value` on the command line changes a key, `data.vqa.eval=...` an entry of a
mapping. Unknown, repeated or ill-typed keys end the run before anything is loaded, with one line each and
the nearest known name.

`k` is the number of retrieved items. The length of a sequence is `sequence_length`, or
`--sequence_length` among the options of `run_edit.py`.
"""
COLUMNS = "| key | what | expected | default |\n| --- | --- | --- | --- |\n"


def render_page() -> str:
    """The whole page: a table for each group, in the order of the sections."""
    parts = [HEAD]
    groups = dict.fromkeys(option.group for option in OPTIONS.values())
    for group in groups:
        parts.append(f"\n## {group[0].upper()}{group[1:]}\n\n{COLUMNS}")
        parts += [_render_row(option) for option in OPTIONS.values() if option.group == group]
    return "".join(parts)


def _render_row(option: Option) -> str:
    names = " or ".join(f"`{name}`" for name in itertools.chain([option.name], option.aliases))
    default = "**required**" if option.required else f"`{_format_default(option.default)}`"
    cells = (names, option.help, option.kind.words, default)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _format_default(value: object) -> str:
    """The value as in a YAML file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value)


def main(argv: Sequence[str] | None = None) -> int:
    return run_guarded(lambda: run(argv))


def run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; report whether the page is up to date"
    )
    args = parser.parse_args(argv)
    if args.check:
        fresh = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == render_page()
        print(f"{PAGE.name}: {'up to date' if fresh else 'out of date; run python -m scripts.reference'}")
        return 0 if fresh else 1
    PAGE.write_text(render_page(), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
