"""The outside links of the pages are recorded, those recorded are used, and the check by network works."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scripts import links
from scripts.links import (
    LIST,
    ROOT,
    UNCHECKED,
    compare,
    find_links,
    read_list,
    read_pages,
    render_list,
    request,
)
from unike.types import UserError


def test_every_link_is_recorded_and_every_recorded_one_is_used() -> None:
    assert compare(read_pages(ROOT), read_list(ROOT / LIST)) == []


def test_the_list_is_as_the_script_writes_it() -> None:
    text = (ROOT / LIST).read_text(encoding="utf-8")
    assert text == render_list(read_list(ROOT / LIST))
    assert list(read_list(ROOT / LIST)) == sorted(read_list(ROOT / LIST))


def make_project(root: Path, page: str, recorded: str) -> Path:
    (root / "docs").mkdir()
    (root / "docs" / "page.md").write_text(page)
    (root / "README.md").write_text("no link, but http://127.0.0.1:1/x and https://example.org/x\n")
    (root / LIST).parent.mkdir(parents=True)
    (root / LIST).write_text(recorded)
    return root


def test_what_differs_is_named_with_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = "[a](https://a.test/x#y), <https://b.test>.\n```bash\npip --url https://c.test/whl  # c\n```\n"
    root = make_project(tmp_path, page, f"https://b.test 2026-01-02\nhttps://old.test/ {UNCHECKED}\n")
    assert links.run([], root) == 1
    said = capsys.readouterr().out
    assert "docs/page.md: https://a.test/x#y: is not recorded" in said
    assert "docs/page.md: https://c.test/whl: is not recorded" in said
    assert f"{LIST}: https://old.test/: no page has it" in said
    assert "https://b.test:" not in said
    assert links.run(["--write"], root) == 0
    assert read_list(root / LIST) == {
        "https://a.test/x#y": UNCHECKED,
        "https://b.test": "2026-01-02",
        "https://c.test/whl": UNCHECKED,
    }
    assert links.run([], root) == 0


@pytest.mark.parametrize("line", ["https://a.test", "https://a.test yesterday", "https://a.test 2026-1-2"])
def test_a_damaged_list_is_refused_in_one_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "links.txt").write_text(f"# head\n{line}\n")
    with pytest.raises(UserError, match=r"links\.txt:2: expected a link and a date"):
        read_list(tmp_path / "links.txt")
    (tmp_path / "links.txt").write_text("https://a.test 2026-01-02\nhttps://a.test 2026-01-02\n")
    with pytest.raises(UserError, match="recorded twice"):
        read_list(tmp_path / "links.txt")


def test_a_sentence_ends_no_link() -> None:
    text = "See https://a.test/b. (https://c.test/d) [x](https://e.test/f_g) `https://h.test`, https://i.test/?q=1;"
    assert [*find_links(text)] == [
        "https://a.test/b",
        "https://c.test/d",
        "https://e.test/f_g",
        "https://h.test",
        "https://i.test/?q=1",
    ]


class Site(BaseHTTPRequestHandler):
    """Answers by the path: a code for HEAD, and one for GET."""

    def answer(self, place: int) -> None:
        code = int(self.path.strip("/").split("-")[place])
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "/200-200")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.answer(0)

    def do_GET(self) -> None:
        self.answer(1)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("codes", "reason"),
    [
        ("200-200", None),
        ("302-302", None),
        ("405-200", None),
        ("404-200", None),
        ("403-403", None),
        ("429-429", None),
        ("404-404", "HTTP 404"),
        ("410-410", "HTTP 410"),
        ("500-500", "HTTP 500"),
    ],
)
def test_a_link_is_there_or_not(site: str, codes: str, reason: str | None) -> None:
    assert request(f"{site}/{codes}", 5) == reason


def test_those_that_answer_get_todays_date(site: str) -> None:
    there, lost = f"{site}/200-200", f"{site}/404-404"
    closed = "http://127.0.0.1:9/"
    recorded = {there: UNCHECKED, lost: "2026-01-02", closed: UNCHECKED}
    dated, problems = links.check(recorded, "2026-03-04", lambda link: request(link, 5))
    assert dated == {there: "2026-03-04", lost: "2026-01-02", closed: UNCHECKED}
    assert problems[0] == f"{lost}: HTTP 404; last answered: 2026-01-02"
    assert problems[1].startswith(f"{closed}: ")
    assert "refused" in problems[1]
    assert len(problems) == 2


def test_without_a_network_nothing_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = "https://b.test 2026-01-02\n"
    root = make_project(tmp_path, "https://b.test\n", before)
    monkeypatch.setattr(links, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(UserError, match=r"no link answered, the first: https://b\.test: no route"):
        links.run(["--fetch"], root)
    assert (root / LIST).read_text() == before
