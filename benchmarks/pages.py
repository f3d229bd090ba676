"""How fast a run's report, and a comparison of two runs, open in headless Chromium.

    python -m benchmarks.pages results/tables/tiny_blip2-vqa-one_step/FIRST .../SECOND --json FILE

Cases are repeated until there are ``--cases`` of them, with as many images as a page takes. Each opening has
a new browser. Needs Chromium with its driver, and selenium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

from benchmarks.browser import list_missing, open_browser
from benchmarks.measuring import Measurements, time_call
from unike.report.compare import compare
from unike.report.compare_page import build_comparison_page
from unike.report.images import MOST_BYTES, find_images
from unike.report.page import HtmlPage, render
from unike.report.run_page import build_run_page
from unike.runs.records import MANIFEST, RECORDS, read_lines, read_manifest
from unike.system import launching
from unike.system.files import write_text
from unike.types import UserError

TARGET = "<= 2"
IMAGE = "data:image/webp;base64," + "A" * 8000
LOADED = "return performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"
PAINTED = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime / 1000"
CASES = "return document.querySelectorAll('.case').length"


def repeat_records(run: Path, folder: Path, cases: int) -> Path:
    """A copy of the run in ``folder`` with ``cases`` records, its own, repeated with new ids."""
    found = read_lines(run)
    if not found:
        raise UserError(f"{run}: has no records")
    read_manifest(run)
    folder.mkdir()
    shutil.copy(run / MANIFEST, folder / MANIFEST)
    records = [
        {"case": r["id"], **r, "id": f"{r['id']}-{i}"} for i, r in enumerate(islice(cycle(found), cases))
    ]
    write_text(folder / RECORDS, "".join(json.dumps(r) + "\n" for r in records))
    return folder


def time_openings(page: HtmlPage, file: Path, cases: int, times: int) -> tuple[list[float], list[float]]:
    """Seconds until the load event and until the first paint, in ``times`` browsers."""
    missing = MOST_BYTES // len(IMAGE) - len(page.images)
    file.write_text(render(replace(page, images=[*page.images, *[IMAGE] * missing])), encoding="utf-8")
    loaded, painted = [], []
    for _ in range(times):
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        with folder as profile, open_browser(Path(profile)) as tab:
            tab.open(file)
            tab.wait(PAINTED)
            if (there := tab.run(CASES)) != cases:
                raise SystemExit(f"{file.name}: has {there} cases; expected {cases}")
            loaded.append(tab.run(LOADED))
            painted.append(tab.run(PAINTED))
    return loaded, painted


def measure(args: argparse.Namespace, rows: Measurements) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = [repeat_records(run, folder / str(i), args.cases) for i, run in enumerate(args.runs)]
        page, seconds = time_call(lambda: build_run_page(runs[0]))
        rows.add(f"report, {args.cases} cases", "made", [seconds], "s")
        pages = {"report": (page, args.cases)}
        if len(runs) > 1:
            found = compare(*runs)
            shown = build_comparison_page(found, *find_images(read_manifest(runs[0])))
            pages["comparison"] = (shown, len(shown.cases))
        for kind, (view, cases) in pages.items():
            file = folder / f"{kind}.html"
            loaded, painted = time_openings(view, file, cases, args.times)
            title = f"{kind}, {cases} cases"
            rows.add(title, "size", [file.stat().st_size / 1e6], "MB")
            rows.add(title, "loaded", loaded, "s", TARGET)
            rows.add(title, "first paint", painted, "s", TARGET)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="a run's folder; two are also compared")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--times", type=int, default=5, help="openings of each page")
    parser.add_argument("--json", type=Path, help="where the rows are written to")
    args = parser.parse_args(arguments)
    if missing := list_missing(axe=False):
        parser.error(f"not installed: {missing}")
    if min(args.cases, args.times) < 1 or len(args.runs) > 2:
        parser.error("expected one run or two, and at least 1 of --cases and --times")
    rows = Measurements("pages")

    def run() -> int:
        measure(args, rows)
        rows.write(args.json)
        return 0

    return launching.run_guarded(run)


if __name__ == "__main__":
    sys.exit(main())
