"""The pages in a real browser: they open, sort, filter, load nothing, and can be read by everybody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from finished_runs import ended, save_run
from test_report import HOSTILE, hostile

from benchmarks import pages
from benchmarks.browser import DESKTOP, PHONE, TABLET, Browser, list_missing, open_browser
from benchmarks.report import read
from unike.report import write_report
from unike.tables import main as compare_main
from unike.types import FIVE_METRICS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(bool(list_missing()), reason=f"not installed: {list_missing()}"),
]
SHOWN = "return [...document.querySelectorAll('.case:not([hidden]) .id')].map((e) => e.textContent)"
LOADED = "return document.querySelectorAll('.case img[src]').length"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six cases: M-Locality fails in the odd ones, all in the last."""
    folder, odd = tmp_path_factory.mktemp("page"), [m for m in FIVE_METRICS if m != "m_locality"]
    records = [ended(i, odd if i % 2 else FIVE_METRICS) for i in range(5)] + [ended(5, [])]
    return write_report(save_run(folder / "run", records, folder / "data"))


def choose(tab: Browser, name: str, value: str) -> None:
    script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
    tab.run(
        f"{script} e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'));", name, value
    )


def test_it_opens_quietly_and_shows_pictures_when_they_come_near(tab: Browser, page: Path) -> None:
    tab.open(page)
    tab.run("document.getElementById('found').scrollIntoView()")
    tab.wait(f"{LOADED} === 6")
    tab.run("document.querySelector('.case summary').click()")
    tab.wait(f"{LOADED} > 6")
    assert tab.run("return [...document.querySelectorAll('article img')].every((i) => i.naturalWidth > 0)")
    assert tab.read_console() == []
    assert tab.list_requests(page) == []


def test_it_filters_and_sorts(tab: Browser, page: Path) -> None:
    tab.open(page)
    everything = [f"vqa-{i}" for i in range(6)]
    assert tab.run(SHOWN) == everything
    choose(tab, "filter", "fails m_locality")
    assert tab.run(SHOWN) == ["vqa-1", "vqa-3", "vqa-5"]
    assert tab.run("return document.getElementById('count').textContent") == "3 of 6 cases"
    choose(tab, "search", "NUMBER 3?")
    assert tab.run(SHOWN) == ["vqa-3"]
    choose(tab, "search", "no such words")
    assert tab.run(SHOWN) == []
    choose(tab, "filter", "")
    choose(tab, "search", "")
    assert tab.run(SHOWN) == everything
    choose(tab, "sort", "steps")
    assert tab.run(SHOWN) == everything
    tab.run("document.getElementById('down').click()")
    assert tab.run(SHOWN) == everything[::-1]
    choose(tab, "sort", "passes")
    assert tab.run(SHOWN) == [f"vqa-{i}" for i in (0, 2, 4, 1, 3, 5)]


def test_the_keyboard_suffices(tab: Browser, page: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    tab.open(page)
    visited = []
    for _ in range(12):
        tab.driver.switch_to.active_element.send_keys(Keys.TAB)
        visited.append(tab.run("const e = document.activeElement; return e.id || e.className || e.tagName"))
    wanted = ["skip", "wide", "filter", "sort", "down", "search", "SUMMARY"]
    assert [v for v in visited if v in wanted][: len(wanted)] == wanted
    tab.run("document.querySelector('.case summary').focus()")
    tab.driver.switch_to.active_element.send_keys(Keys.ENTER)
    tab.wait("return document.querySelectorAll('.case article').length === 5")


@pytest.mark.parametrize("dark", [False, True])
def test_nobody_is_left_out(tab: Browser, page: Path, dark: bool) -> None:
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    tab.open(page)
    tab.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    tab.wait("return document.querySelectorAll('.case article').length === 30")
    assert tab.find_violations() == []
    tab.run("document.querySelector('h1').remove(); document.querySelector('label').replaceWith('x')")
    tab.run("document.querySelectorAll('.prompt').forEach((p) => p.setAttribute('role', 'nonsense'))")
    assert tab.find_violations() != [], "axe finds what is wrong"


@pytest.mark.parametrize("screen", [PHONE, TABLET, DESKTOP])
def test_the_columns_after_the_edit_are_in_sight(
    tab: Browser, tmp_path: Path, page: Path, screen: tuple[int, int, int, bool]
) -> None:
    """On every screen no table needs to be scrolled sideways, also those of a comparison."""
    other = save_run(tmp_path / "b", [ended(i, [m for m in FIVE_METRICS if m != "joint"]) for i in range(3)])
    compared = tmp_path / "page.html"
    assert compare_main(["compare", str(page.parent), str(other), "--html", str(compared)]) == 0
    for shown in (page, compared):
        tab.open(shown, screen)
        tab.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        wide = "return [...document.querySelectorAll('.wide')].map((e) => e.scrollWidth - e.clientWidth)"
        assert set(tab.run(wide)) == {0}
        right = "return [...document.querySelectorAll('td')].map((e) => e.getBoundingClientRect().right)"
        assert max(tab.run(right)) <= screen[0]
        top = "return document.querySelector('.verdict').getBoundingClientRect().bottom"
        assert 0 < tab.run(top) < screen[1] / 2, "the verdict is read before anything is scrolled"
    tab.run("document.querySelectorAll('td').forEach((e) => { e.textContent = 'long'.repeat(200); })")
    assert max(tab.run(wide)) > 0, "what does not fit is found"


def test_a_phone_shows_all_without_scrolling_sideways(tab: Browser, page: Path) -> None:
    tab.open(page, PHONE)
    tab.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    tab.wait("return document.querySelectorAll('.case article').length === 30")
    assert tab.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.find_violations() == []


def test_hostile_records_do_nothing(tab: Browser, tmp_path: Path) -> None:
    page = write_report(save_run(tmp_path / "run", hostile()))
    tab.open(page)
    tab.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    tab.wait("return document.querySelectorAll('.case article').length > 0")
    assert HOSTILE in tab.run("return document.body.textContent")
    assert tab.run("return document.images.length") == 0
    assert tab.read_console() == []
    assert tab.list_requests(page) == []


def test_scripts_of_others_would_not_run(tab: Browser, tmp_path: Path, page: Path) -> None:
    """Even if a text were not escaped, the page's policy would hold."""
    open_page = tmp_path / "open.html"
    text = page.read_text()
    open_page.write_text(
        text.replace("<main>", "<main><script>window.ran = 1</script><img src='http://localhost/x'>")
    )
    tab.open(open_page)
    assert tab.run("return window.ran ?? null") is None
    assert len(tab.read_console()) == 2
    tab.list_requests(open_page)


def test_a_comparison_opens(tab: Browser, tmp_path: Path) -> None:
    one = save_run(tmp_path / "a", [ended(i) for i in range(3)], tmp_path / "data")
    other = save_run(tmp_path / "b", [ended(i, ["reliability"] if i else FIVE_METRICS) for i in range(3)])
    page = tmp_path / "page.html"
    assert compare_main(["compare", str(one), str(other), "--html", str(page)]) == 0
    tab.open(page)
    assert tab.run(SHOWN) == ["vqa-1", "vqa-2"]
    choose(tab, "filter", "passes in B alone")
    assert tab.run(SHOWN) == []
    assert tab.find_violations() == []
    assert tab.read_console() == []
    assert tab.list_requests(page) == []


def test_the_benchmark_opens_both_pages(tmp_path: Path) -> None:
    one = save_run(tmp_path / "a", [ended(i) for i in range(3)], tmp_path / "data")
    other = save_run(tmp_path / "b", [ended(i, ["reliability"] if i else FIVE_METRICS) for i in range(3)])
    out = tmp_path / "rows.json"
    assert pages.main([str(one), str(other), "--cases", "7", "--times", "1", "--json", str(out)]) == 0
    _, rows = read(out)
    loaded = {row.case: row.median for row in rows if row.metric == "loaded"}
    assert set(loaded) == {"report, 7 cases", "comparison, 4 cases"}
    assert all(seconds > 0 for seconds in loaded.values())
