"""The page of a run: what it shows, that it needs nothing else, and that records cannot speak in it."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from finished_runs import ended, save_run
from helpers import Project
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unike.report import images, write_report
from unike.report.__main__ import main
from unike.report.charts import draw_curve, draw_histogram, draw_shares
from unike.report.page import (
    AnswerView,
    CaseView,
    Cell,
    DotsView,
    HtmlPage,
    ProbeView,
    TableView,
    render,
)
from unike.report.run_page import build_run_page
from unike.runs.records import MANIFEST, RECORDS, read_manifest
from unike.types import FIVE_METRICS, UserError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import run_edit  # noqa: E402

HOSTILE = "</template></script><script>alert('x')</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"


class Read(HTMLParser):
    """A page's tags with their attributes, and its text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self._inside = "", [], ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def shown(folder: Path, **options: Any) -> Read:
    return shown_text(write_report(folder, **options))


def shown_text(path: Path) -> Read:
    return Read(path.read_text(encoding="utf-8"))


def tags(case: dict[str, str | None]) -> list[str]:
    return json.loads(str(case["data-tags"]))


# ---------------------------------------------------------------- what it shows


def test_a_run_is_shown_with_its_pictures(tmp_path: Path) -> None:
    lost = [m for m in FIVE_METRICS if m != "m_locality"]
    records = [ended(0), ended(1, lost), {"id": "vqa-2", "status": "failed", "error": "loss is nan"}]
    run = save_run(tmp_path / "run", records, tmp_path / "data")
    page = shown(run)
    assert "Reliability" in page.text
    assert "50.0 [0.0, 100.0]" in page.text, "M-Locality, with its interval"
    assert "what is number 1?" in page.text
    assert "loss is nan" in page.text
    cases = [a for a in page.of("li") if a.get("class") == "case"]
    assert [("failed" in tags(c), "fails m_locality" in tags(c)) for c in cases] == [
        (False, False), (True, True), (True, False),
    ]  # fmt: skip
    # Cases 0 and 1 share the picture 1.png: 0 to 3, each once.
    uris = json.loads(page.scripts[0])
    assert len(uris) == 4
    assert all(Image.open(io.BytesIO(base64.b64decode(u.split(",")[1]))).size == (28, 28) for u in uris)
    places = [int(str(a["data-image"])) for a in page.of("img")]
    assert set(places) == {0, 1, 2, 3}
    assert "No images" not in page.text


def test_alpha_and_other_decisions_are_shown(tmp_path: Path) -> None:
    (view,) = build_run_page(save_run(tmp_path / "run", [ended(3)])).cases
    assert view.probes[0].figures == (("alpha", "0.30"),)
    assert view.keys == {
        "order": 0,
        "passes": 5,
        "steps": 4,
        "loss": 0.01,
        "seconds": 0.25,
        "alpha": pytest.approx(0.3),
    }
    titles = [chart.title for chart in build_run_page(tmp_path / "run").charts]
    assert any("Alpha" in title for title in titles)


def test_the_reading_is_the_one_that_the_run_has(tmp_path: Path) -> None:
    forced = ended(0)
    forced["scores"]["teacher_forced"]["joint"] = {"before": 0.0, "after": 0.5}
    page = build_run_page(save_run(tmp_path / "both", [forced]))
    assert "generated answer" in page.lead
    assert page.cases[0].good
    del forced["scores"]["generated"]
    page = build_run_page(save_run(tmp_path / "forced", [forced]))
    assert "teacher-forced" in page.lead
    assert not page.cases[0].good
    assert "fails joint" in page.cases[0].tags


def test_sequences_have_a_curve_and_their_final_cases_alone(tmp_path: Path) -> None:
    place = {"case": "vqa-4", "sequence": 0}
    step = ended(4, id="0/1/step", position=1, kind="step", former={}, former_cases=0) | place
    later = step | {
        "id": "0/2/step",
        "position": 2,
        "former": dict.fromkeys(FIVE_METRICS, 1.0),
        "former_cases": 1,
    }
    last = later | {"id": "0/3/step", "position": 3, "former_cases": 2}
    final = ended(4, id="0/1/final", position=1, kind="final") | place
    page = build_run_page(save_run(tmp_path / "run", [step, later, last, final], tmp_path / "data"))
    assert [view.id for view in page.cases] == ["0/1/final"]
    assert page.cases[0].image == 0, "found by the id of its case"
    assert any("accumulate" in chart.title for chart in page.charts)
    short = build_run_page(save_run(tmp_path / "short", [step, later, final], tmp_path / "data"))
    assert not any("accumulate" in chart.title for chart in short.charts), "one point is no curve"


def test_missing_and_changed_pictures_are_said(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", [ended(0), ended(1)], tmp_path / "data")
    (tmp_path / "data" / "0.png").unlink()
    (tmp_path / "data" / "1.png").write_bytes(b"no picture")
    page = build_run_page(run)
    assert page.notes[0].startswith("2 images could not be read")
    assert page.cases[0].probes[0].image is None
    assert page.cases[1].probes[2].image is not None
    (tmp_path / "data" / "vqa_eval.json").write_text("[]")
    page = build_run_page(run)
    assert "has changed since the run" in page.notes[0]
    assert page.images == []
    (tmp_path / "data" / "vqa_eval.json").unlink()
    assert "no such file" in build_run_page(run).notes[0]


def test_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = save_run(tmp_path / "run", [ended(i) for i in range(6)], tmp_path / "data")
    whole = build_run_page(run)
    assert len(whole.images) == 8
    assert whole.notes == ()
    few = build_run_page(run, most=2)
    assert len(few.cases) == 2
    assert few.notes == ("The first 2 of 6 cases are shown; tables and charts are of all.",)
    assert few.tables == whole.tables
    monkeypatch.setattr(images, "MOST_BYTES", sum(map(len, whole.images[:3])))
    bounded = build_run_page(run)
    assert bounded.images == whole.images[:3]
    assert bounded.notes[0].startswith("5 images are left out")
    large = tmp_path / "large.png"
    Image.new("RGB", (1000, 500)).save(large)
    sides = []
    for count in (10, 5000):
        album = images.Album(count)
        monkeypatch.setattr(images, "MOST_BYTES", 1 << 20)
        album.place(str(large))
        sides.append(Image.open(io.BytesIO(base64.b64decode(album.uris[0].split(",")[1]))).size)
    assert sides == [(320, 160), (112, 56)]


def test_long_texts_are_cut(tmp_path: Path) -> None:
    record = ended(0)
    record["answers"]["reliability"]["after"] = "very " * 5000
    html = write_report(save_run(tmp_path / "run", [record])).read_text()
    assert "very very" in html
    assert len(html) < 60_000


@pytest.mark.parametrize("records", [[], [{"id": "a", "status": "failed", "error": "x"}], [{"id": "a"}]])
def test_a_run_with_nothing_to_measure(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    page = shown(save_run(tmp_path / "run", records))
    assert ("There is no case to show" in page.text) == (not records)


# ---------------------------------------------------------------- that it needs nothing and obeys nobody


def assert_self_contained(page: Read) -> None:
    links = {
        (tag, key) for tag, a in page.tags for key in a if key in ("src", "href", "srcset", "action", "data")
    }
    assert links <= {("link", "href"), ("a", "href")}
    assert {str(a["href"])[0] for a in page.of("a")} == {"#"}
    assert [a["href"] for a in page.of("link")] == ["data:,"]
    assert [a.get("type") for a in page.of("script")] == ["application/json", None]
    assert not [key for _, a in page.tags for key in a if key.startswith("on") or key == "style"]
    (policy,) = (a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in str(policy)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    assert_self_contained(shown(save_run(tmp_path / "run", [ended(0)], tmp_path / "data")))


@pytest.mark.parametrize(
    "html",
    ["<img src=x>", "<script>1</script>", "<p onclick=x>", "<a href='http://x'>", "<p style='color:red'>"],
)
def test_what_is_not_self_contained_is_found(tmp_path: Path, html: str) -> None:
    text = write_report(save_run(tmp_path / "run", [ended(0)])).read_text()
    with pytest.raises(AssertionError):
        assert_self_contained(Read(text.replace("<main>", f"<main>{html}")))


def hostile() -> list[dict[str, Any]]:
    record = ended(0, id=HOSTILE, task=HOSTILE)
    for part in record["answers"].values():
        part.update(prompt=HOSTILE, target=HOSTILE, before=HOSTILE, after=HOSTILE)
    record["answers"][HOSTILE] = record["answers"]["reliability"]
    for scores in record["scores"].values():
        scores[HOSTILE] = {"before": 0.0, "after": 0.0}
    record["decisions"][HOSTILE] = {"reliability": 1.0}
    return [record, {"id": "x", "status": "failed", "error": HOSTILE}]


def test_hostile_texts_are_shown_and_inert(tmp_path: Path) -> None:
    run = save_run(
        tmp_path / HOSTILE.replace("/", "|"), hostile(), command=[HOSTILE], versions={HOSTILE: HOSTILE}
    )
    page = shown(run)
    assert_self_contained(page)
    assert page.text.count("<img src=x onerror=alert(1)>{{ 7 * 7 }}") > 20
    plain = json.loads(json.dumps(hostile()).replace(json.dumps(HOSTILE)[1:-1], "plain"))
    (tmp_path / "plain").mkdir()
    same = shown(save_run(tmp_path / "plain" / "run", plain, command=["plain"], versions={"plain": "plain"}))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in same.tags]


def page_of(text: str) -> HtmlPage:
    answers = (AnswerView(text, text, True, text),)
    probe = ProbeView(text, text, text, text, answers, None, text, ((text, text),))
    dots = DotsView(((text, True), (text, None)), text, text)
    case = CaseView(
        text, text, text, False, {text: 1.0}, (text,), (probe,), ((text, text),), None, text, text, (text,),
        (dots,),
    )  # fmt: skip
    charts = (
        draw_shares(text, {text: [1, 2], f"{text}2": [1, 2]}, (text, "b")),
        draw_curve(text, {text: [1.0, 2.0]}, 2, text, text),
        draw_histogram(text, {text: [1.0, 2.0]}, text, text),
    )
    cell = Cell(text, (text,), 50.0, "good")
    table = TableView(text, (cell,), ((cell, cell),), ((cell, cell),), text, text, text)
    return HtmlPage(
        text, text, (table,), [case], {text: text}, {text: text}, [text],
        tuple(c for c in charts if c), (text,), ((text, text),), text, (text,), (text,),
    )  # fmt: skip


def test_the_page_of_every_text_is_whole() -> None:
    """What ``page_of`` makes has all of a page's parts: else the next test would pass without them."""
    read = Read(render(page_of("plain")))
    assert len([a for a in read.of("svg") if a.get("role") == "img"]) == 3
    for kind in ("verdict", "hint", "rest", "more", "dots", "fails", "thumb", "gauge", "interval"):
        assert [a for _, a in read.tags if kind in str(a.get("class")).split()], kind


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet=st.characters(codec="utf-8"), min_size=1)
    | st.sampled_from([HOSTILE, "<!--", "]]>", "&lt;"])
)
def test_no_text_changes_the_page(text: str) -> None:
    read, plain = Read(render(page_of(text))), Read(render(page_of("plain")))
    assert [(tag, list(a)) for tag, a in read.tags] == [(tag, list(a)) for tag, a in plain.tags]


# ---------------------------------------------------------------- the command


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "run", [ended(0)])
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    (tmp_path / "empty").mkdir()
    broken = save_run(tmp_path / "broken", [ended(0)])
    (broken / MANIFEST).write_text("{")
    odd = save_run(tmp_path / "odd", [ended(0, answers=["x"]), ended(1)])
    cut = save_run(tmp_path / "cut", [ended(0)])
    (cut / RECORDS).write_text("no record\n" * 2)
    file = tmp_path / "file"
    file.touch()
    for folder in (tmp_path / "no", tmp_path / "empty", broken, odd, cut):
        assert main([str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert str(folder) in error
        assert not (folder / "report.html").exists()
    for options, line in (
        (["--output", f"{file}/x.html"], f"error: {file}/x.html: cannot be written: Not a directory\n"),
        (["--output", str(tmp_path)], f"error: {tmp_path}: cannot be written: Is a directory\n"),
        (["--cases", "-1"], "error: cases: -1; expected 0 or more\n"),
    ):
        assert main([str(run), *options]) == 2
        assert capsys.readouterr().err == line
    assert main([str(run), "--output", ""]) == 2
    assert capsys.readouterr().err.startswith("error: .: cannot be written: ")
    assert main([str(run), "--output", str(tmp_path / "here.html"), "--cases", "0"]) == 0
    assert "There is no case" in (tmp_path / "here.html").read_text()


def test_a_manifest_of_another_version_still_gives_a_page(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", [ended(0)], tmp_path / "data")
    manifest = read_manifest(run)
    manifest["hparams"]["k"] = "many"
    (run / MANIFEST).write_text(json.dumps(manifest))
    assert "k: expected" in build_run_page(run).notes[0]
    (run / MANIFEST).write_text("{}")
    assert "no hyper-parameters" in build_run_page(run).notes[0]


def test_records_of_another_shape_are_refused(tmp_path: Path) -> None:
    for wrong in (
        {"answers": []},
        {"scores": {"generated": 1}},
        {"decisions": {"alpha": 3}},
        {"answers": {"a": 1}},
        {"seconds": float("nan")},
        {"decisions": {"alpha": {"reliability": float("inf")}}},
        {"steps": 10**400},
    ):
        with pytest.raises(UserError, match=r"records.jsonl: record vqa-0: \w+ is not as a run writes it"):
            build_run_page(save_run(tmp_path / "run", [ended(0, **wrong)]))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-1e9, 1e9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_record_gives_a_page_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    place = {
        "case": "vqa-1",
        "sequence": 0,
        "position": 1,
        "kind": data.draw(st.sampled_from(["final", "step"])),
    }
    record = ended(1, presets={}, base_right={}, former=dict.fromkeys(FIVE_METRICS, 1.0), **place)
    node = record
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [value for value in node.values() if isinstance(value, dict) and value]
        node = data.draw(st.sampled_from(inner)) if inner else node
    node[data.draw(st.sampled_from(list(node)))] = data.draw(json_values)
    first = ended(0, id="0", sequence=1, position=1, kind="final")
    run = save_run(tmp_path_factory.mktemp("runs") / "run", [first, record])
    # What is refused is refused by a UserError; anything else that is raised fails the test.
    with contextlib.suppress(UserError):
        render(build_run_page(run))


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", [ended(0)], tmp_path / "data")
    command = [sys.executable, "-m", "unike.report", str(run)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").is_file()


def test_a_run_writes_its_page(copied: Project, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--hparams_dir", str(copied.yaml), "--size", "2", "--output", str(copied.root / "run")]
    assert run_edit.main([*command, "--report"]) == 0
    assert capsys.readouterr().out.endswith(f"report: {copied.root / 'run' / 'report.html'}\n")
    page = shown_text(copied.root / "run" / "report.html")
    assert_self_contained(page)
    assert "number 5?" in page.text
    assert len(json.loads(page.scripts[0])) == 4
    # The page is no part of the run: it goes on, and without the option none is written.
    (copied.root / "run" / "report.html").unlink()
    assert run_edit.main([*command, "--resume"]) == 0
    assert not (copied.root / "run" / "report.html").exists()
