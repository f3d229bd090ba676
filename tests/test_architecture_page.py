"""The page on architecture: its figure and table are what the code imports."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from test_architecture import PYTHON, imports, module_name, room_of
from test_architecture import ROOMS as ORDER

from scripts import architecture
from scripts.architecture import ROOT, draw, drop_implied, read_arrows
from unike.types import UserError


def write_package(root: Path, **sources: str) -> Path:
    """A package with a file for each room; a room without a source imports nothing."""
    folders = [room for room in architecture.ROOMS if (ROOT / "unike" / room).is_dir()]
    for room in architecture.ROOMS:
        path = root / "unike" / (f"{room}/__init__.py" if room in folders else f"{room}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sources.get(room, ""), encoding="utf-8")
    return root


def test_the_page_is_what_the_script_writes() -> None:
    assert architecture.main(["--check"]) == 0


def test_the_order_of_the_table_is_that_of_the_rule() -> None:
    assert tuple(architecture.ROOMS) == tuple(filter(None, ORDER))


def test_the_order_for_contributors_is_that_of_the_rule() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (order,) = re.findall(r"in this order: (.*?)\. Put", text, re.S)
    assert tuple(re.findall(r"`(\w+)`", order)) == tuple(filter(None, ORDER))


def test_the_arrows_are_those_that_the_rule_reads() -> None:
    found: dict[str, set[str]] = {room: set() for room in architecture.ROOMS}
    for path in (p for p in PYTHON if p.startswith("unike/")):
        if room := room_of(module_name(path)):
            names = [name for _, name in imports(path, (ROOT / path).read_text(encoding="utf-8"))]
            found[room] |= {room_of(name) for name in names if name.startswith("unike.")} - {room, ""}
    assert read_arrows(ROOT) == found


def test_every_import_is_an_arrow_or_implied_by_arrows() -> None:
    arrows = read_arrows(ROOT)
    shown = drop_implied(arrows)

    def reach(room: str) -> set[str]:
        return shown[room].union(*(reach(other) for other in shown[room]))

    assert all(others <= reach(room) for room, others in arrows.items())
    assert sum(map(len, shown.values())) < sum(map(len, arrows.values()))


def test_a_new_import_changes_the_figure(tmp_path: Path) -> None:
    before = read_arrows(write_package(tmp_path, config="from unike.types import Query"))
    after = read_arrows(write_package(tmp_path, config="def late():\n    from unike.system import text"))
    assert before["config"] == {"types"}
    assert after["config"] == {"system"}
    assert draw(before) != draw(after)


def test_a_room_without_a_description_is_named(tmp_path: Path) -> None:
    root = write_package(tmp_path)
    (root / "unike" / "attic.py").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"unike/attic: ROOMS in scripts/architecture\.py lacks it"):
        read_arrows(root)


def test_an_old_page_is_noticed_and_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "architecture.md"
    page.write_text(architecture.PAGE.read_text(encoding="utf-8").replace("**config**", "**attic**"))
    assert architecture.main(["--check", "--write", str(page)]) == 1
    assert "out of date: architecture.md, architecture.svg" in capsys.readouterr().out
    assert architecture.main(["--write", str(page)]) == 0
    assert architecture.main(["--check", "--write", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == architecture.PAGE.read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "figures")
    assert architecture.main(["--check", "--write", str(page)]) == 1


def test_a_page_without_the_markers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Nothing\n", encoding="utf-8")
    assert architecture.main(["--write", str(page)]) == 2
    assert "expected <!-- rooms all -->" in capsys.readouterr().err
    assert architecture.main(["--write", str(tmp_path / "nowhere.md")]) == 2


def test_boxes_and_arrows_stay_inside_the_figure_and_apart() -> None:
    text = draw(read_arrows(ROOT))
    boxes = [tuple(map(float, box)) for box in re.findall(r'class="box" x="([\d.-]+)" y="([\d.-]+)"', text)]
    assert len(boxes) == len(architecture.ROOMS)
    width, height = architecture.BOX
    whole = float(re.findall(r'viewBox="0 0 (\d+) ', text)[0])
    assert whole >= architecture.WIDTH
    assert all(x >= 0 and x + width <= whole for x, _ in boxes)
    apart = [
        abs(x - u) >= width or abs(y - v) >= height for x, y in boxes for u, v in boxes if (x, y) < (u, v)
    ]
    assert all(apart)
