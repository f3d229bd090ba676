"""The demo page in a real browser: ask, edit, undo; nothing is asked of another host."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Project

pytest.importorskip("gradio", reason="not installed: gradio (make test-page)")

from benchmarks.browser import PHONE, Browser, list_missing, open_browser
from unike.demo.__main__ import HOST
from unike.demo.desk import Desk
from unike.demo.page import serve
from unike.editor import MultimodalEditor
from unike.runs.inputs import open_datasets

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(bool(list_missing()), reason=f"not installed: {list_missing()}"),
]
# Gradio's own: the upload button's name for screen readers is not the text on it.
THEIRS = ('label-content-name-mismatch: <button class="upload-container',)
READY = "return document.querySelectorAll('#examples button img').length === 3"
VALUE = "return document.querySelector(arguments[0] + ' textarea').value"


@pytest.fixture(scope="module")
def called() -> Iterator[list[str]]:
    """Hosts other than this one that this process, the page's server, has connected to."""
    hosts: list[str] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            hosts.append(address[0])
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", watched)
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        yield hosts


@pytest.fixture(scope="module")
def served(blip2_project: Project, called: list[str]) -> Iterator[tuple[Desk, str]]:
    editor = MultimodalEditor.from_hparams(blip2_project.yaml, progress=False)
    desk = Desk(editor, open_datasets(editor.hparams, "vqa", 3))
    blocks, url = serve(desk, HOST, None, open_browser=False, wait=False)
    yield desk, url
    blocks.close()


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(tab: Browser, served: tuple[Desk, str]) -> Browser:
    served[0].undo_all()
    tab.open(served[1])
    tab.wait(READY)
    return tab


def press(tab: Browser, name: str, place: int = 0) -> None:
    tab.run("document.querySelectorAll(arguments[0])[arguments[1]].click()", name, place)


def write(tab: Browser, name: str, text: str) -> None:
    box = tab.driver.find_element("css selector", f"{name} textarea")
    box.clear()
    box.send_keys(text)


def answers(tab: Browser) -> list[str]:
    return [tab.run(VALUE, name) for name in ("#before", "#after")]


def says(tab: Browser, words: str) -> None:
    tab.wait(f"return document.querySelector('#status').innerText.includes({words!r})")


def test_an_edit_from_the_first_question_to_its_undoing(page: Browser, served: tuple[Desk, str]) -> None:
    desk, url = served
    press(page, "#examples button:has(img)")
    page.wait("return document.querySelector('#before textarea').value !== ''")
    before, after = answers(page)
    assert before == after
    assert page.run(VALUE, "#question") == "what is number 5?"
    assert page.run(VALUE, "#right") == "two dogs"
    press(page, "#edit")
    says(page, "Edited.")
    edited = answers(page)
    assert edited[0] == before
    assert edited[1] != before
    assert "two dogs".startswith(edited[1])
    assert len(desk.edits) == 1
    press(page, "#follow-ups input")
    says(page, "After a good edit: two dogs.")
    assert page.run(VALUE, "#question") == "which thing is number 5?"
    assert answers(page)[0] == desk.ask(desk.examples[0].question.image, "which thing is number 5?").before
    press(page, "#examples button:has(img)")
    page.wait("return document.querySelector('#question textarea').value === 'what is number 5?'")
    press(page, "#ask")
    page.wait(f"return document.querySelector('#after textarea').value === {edited[1]!r}")
    press(page, "#undo")
    says(page, "Undone.")
    assert answers(page) == [before, before]
    assert desk.edits == []
    assert page.read_console() == []
    assert [address for address in page.list_requests(url) if not address.startswith((url, "blob:"))] == []


def test_the_page_is_readable_by_everybody(page: Browser, served: tuple[Desk, str]) -> None:
    for screen in (None, PHONE):
        if screen is not None:
            page.open(served[1], screen)
            page.wait(READY)
        press(page, "#examples button:has(img)")
        page.wait("return document.querySelector('#before textarea').value !== ''")
        press(page, "#edit")
        page.wait("return document.querySelectorAll('#edits input').length > 0")
        press(page, "#active button")
        page.wait("return document.querySelectorAll('#active table').length === 2")
        assert [v for v in page.find_violations() if not v.startswith(THEIRS)] == []
        press(page, "#undo-all")
        page.wait("return document.querySelectorAll('#edits input').length === 0")


@pytest.mark.parametrize("screen", [PHONE, (768, 1024, 1, False), (1280, 800, 1, False)])
def test_the_gallery_is_whole_and_on_a_phone_the_result_stays_in_sight(
    page: Browser, served: tuple[Desk, str], screen: tuple[int, int, int, bool]
) -> None:
    page.open(served[1], screen)
    page.wait(READY)
    press(page, "#examples button:has(img)")
    page.wait("return document.querySelector('#before textarea').value !== ''")
    press(page, "#edit")
    says(page, "Edited.")
    inside = "const r = document.querySelector(arguments[0]).getBoundingClientRect();"
    inside += "return r.top >= 0 && r.bottom <= innerHeight && r.left >= 0 && r.right <= innerWidth"
    for button in ("#edit", "#ask", "#undo-all") if screen == PHONE else ():
        page.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", button)
        assert page.run(inside, "#before"), button
        assert page.run(inside, "#after"), button
        assert page.run(inside, button)
    page.run("scrollTo(0, 1e6)")
    end = "return document.querySelector('#active').getBoundingClientRect().bottom"
    top = "return document.querySelector('#result').getBoundingClientRect().top"
    assert screen != PHONE or page.run(end) <= page.run(top), "nothing is hidden below the result"
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")
    # Every example lies within the gallery, and the gallery has no scroll bar.
    cut = (
        "const g = document.querySelector('#examples').getBoundingClientRect();"
        "return [...document.querySelectorAll('#examples button:has(img)')].filter((b) => {"
        "const r = b.getBoundingClientRect(); return r.bottom > g.bottom || r.right > g.right}).length"
    )
    assert page.run(cut) == 0
    scrolls = "return [...document.querySelectorAll('#examples, #examples div')].filter((e) =>"
    scrolls += " ['auto', 'scroll'].includes(getComputedStyle(e).overflowY)"
    scrolls += " && e.scrollHeight > e.clientHeight + 1).length"
    assert page.run(scrolls) == 0


def test_the_steps_are_numbered(page: Browser) -> None:
    press(page, "#examples button:has(img)")
    page.wait("return document.querySelectorAll('#follow-ups input').length > 0")
    text = page.run("return document.body.innerText")
    places = [text.index(step) for step in ("1. ", "2. Question", "3. Right answer", "4. Ask next")]
    assert places == sorted(places)


def test_uploads(page: Browser, served: tuple[Desk, str], blip2_project: Project, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(bytes(11_000_000))
    (tmp_path / "bad.png").write_bytes(b"no picture")

    def upload(path: Path) -> None:
        page.driver.find_element("css selector", "#image input[type=file]").send_keys(str(path))

    upload(tmp_path / "large.png")
    page.wait("return document.body.innerText.includes('exceed the maximum allowed size')")
    upload(tmp_path / "bad.png")
    page.wait("return document.querySelectorAll('#image img').length === 1")
    write(page, "#question", "<b>what</b> is it?")
    press(page, "#ask")
    says(page, "bad.png: not an image")
    assert answers(page) == ["", ""]
    assert "Traceback" not in page.driver.page_source
    press(page, "#image button[aria-label]")
    page.wait("return document.querySelectorAll('#image input[type=file]').length === 1")
    mine = blip2_project.data / "2.png"
    upload(mine)
    page.wait("return document.querySelectorAll('#image img').length === 1")
    press(page, "#ask")
    page.wait("return document.querySelector('#before textarea').value !== ''")
    assert answers(page)[0] == served[0].ask(str(mine), "<b>what</b> is it?").before, (
        "the picture is as it was"
    )
    write(page, "#right", "")
    press(page, "#edit")
    says(page, "right answer: is empty")


def test_a_failure_of_ours_is_one_line(
    page: Browser, served: tuple[Desk, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret path")

    monkeypatch.setattr(served[0].editor, "ask", fail)
    press(page, "#examples button:has(img)")
    says(page, "internal error: RuntimeError; see the terminal")
    assert "secret" not in page.driver.page_source


def test_files_beside_the_pictures_are_not_served(page: Browser, served: tuple[Desk, str]) -> None:
    import httpx

    picture = served[0].examples[0].question.image
    assert picture is not None
    there = f"{served[1]}gradio_api/file={picture}"
    assert httpx.get(there).status_code == 200
    assert httpx.get(there.replace("5.png", "vqa_eval.json")).status_code == 403


def test_nobody_else_was_called(called: list[str]) -> None:
    """The last of this file: what the server did while the others ran."""
    assert called == []
    # An address that belongs to nobody, to see that calls are seen.
    with contextlib.suppress(OSError):
        socket.create_connection(("192.0.2.1", 9), timeout=0.01)
    assert called == ["192.0.2.1"]
