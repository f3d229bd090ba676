"""Threads on one editor: right answers, no edit lost, and a reason where waiting would never end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import Project
from PIL import Image
from test_truth import PROMPT, QUICK, load_fresh, make, picture
from untouched import assert_untouched, hook_count, weights_of

from benchmarks.threads import Crowd, learn, without_lock
from unike.backbones import guard
from unike.editor import MultimodalEditor
from unike.types import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def editor(blip2_project: Project) -> MultimodalEditor:
    return load_fresh(blip2_project)


@pytest.fixture(scope="module")
def crowd_of(blip2_project: Project) -> Callable[[], Crowd]:
    def make_crowd() -> Crowd:
        editor = load_fresh(blip2_project)
        known = [
            learn(editor, Image.open(picture(blip2_project, i)), target)
            for i, target in enumerate(("a red fox", "two dogs", "the sea", "green"))
        ]
        return Crowd(editor, known, seed=0)

    return make_crowd


def test_threads_get_right_answers_and_lose_no_edit(crowd_of: Callable[[], Crowd]) -> None:
    crowd = crowd_of()
    before, hooks = weights_of(crowd.editor.backbone), hook_count(crowd.editor.backbone.model)
    tally = crowd.run(threads=8, seconds=3)
    assert tally.wrong == []
    assert set(tally.done) == {"base", "edited", "ask", "attach", "edit"}
    assert_untouched(crowd.editor.backbone, before, hooks)


def test_threads_without_the_lock_do_not(crowd_of: Callable[[], Crowd]) -> None:
    crowd = crowd_of()
    with without_lock():
        tally = crowd.run(threads=8, seconds=3)
    assert tally.wrong


def test_a_block_lets_other_threads_wait(editor: MultimodalEditor, blip2_project: Project) -> None:
    image, done = picture(blip2_project), threading.Event()
    base, edit = editor.generate(image, PROMPT), make(editor, image)
    answers = []

    def ask() -> None:
        answers.append(editor.backbone.generate([image], [PROMPT])[0])
        done.set()

    with edit.applied(editor.backbone):
        thread = threading.Thread(target=ask)
        thread.start()
        assert not done.wait(0.3)
    thread.join()
    assert answers == [base]


def test_waiting_for_ever_is_refused(
    editor: MultimodalEditor, blip2_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that waits for a thread that waits for the block."""
    monkeypatch.setattr(guard, "PATIENCE_SECONDS", 1.0)
    image, edit = picture(blip2_project), make(editor, picture(blip2_project))
    refused = pytest.raises(UserError, match="may last for ever")
    with edit.applied(editor.backbone), ThreadPoolExecutor(1) as pool, refused:
        pool.submit(editor.generate, image, PROMPT).result()
    # A block that is busy itself is waited for.
    with ThreadPoolExecutor(1) as pool:
        with edit.applied(editor.backbone):
            waiting = pool.submit(editor.generate, image, PROMPT)
            time.sleep(2.0)
        assert waiting.result() == editor.generate(image, PROMPT)


def test_a_thread_that_ended_in_its_block_is_named(blip2_project: Project) -> None:
    editor = load_fresh(blip2_project)
    edit = make(editor, picture(blip2_project))
    thread = threading.Thread(target=edit.applied(editor.backbone).__enter__)
    thread.start()
    thread.join()
    with pytest.raises(UserError, match="has ended inside the block"):
        editor.generate(picture(blip2_project), PROMPT)


def test_a_block_is_left_by_its_own_thread(editor: MultimodalEditor, blip2_project: Project) -> None:
    block = make(editor, picture(blip2_project)).applied(editor.backbone)
    block.__enter__()
    with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match="expected that thread"):
        pool.submit(block.__exit__, None, None, None).result()
    block.__exit__(None, None, None)
    assert guard.Guard.of(editor.backbone).is_bare


def test_a_block_that_is_entered_twice_is_refused_and_can_be_used_again(
    editor: MultimodalEditor, blip2_project: Project
) -> None:
    image = picture(blip2_project)
    block, base = make(editor, image).applied(editor.backbone), editor.generate(image, PROMPT)
    with block:
        inside = editor.backbone.generate([image], [PROMPT])
        with pytest.raises(UserError, match="entered already"), block:
            pass
        assert editor.backbone.generate([image], [PROMPT]) == inside != [base]
    block.__exit__(None, None, None)
    assert editor.backbone.generate([image], [PROMPT]) == [base]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(editor.generate, image, PROMPT).result() == base
        with block:
            assert editor.backbone.generate([image], [PROMPT]) == inside


def test_joining_a_thread_that_waits_is_refused_at_once(
    editor: MultimodalEditor, blip2_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "PATIENCE_SECONDS", 1000.0)
    image, errors = picture(blip2_project), list[BaseException]()

    def ask() -> None:
        try:
            editor.generate(image, PROMPT)
        except UserError as error:
            errors.append(error)

    with make(editor, image).applied(editor.backbone):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    (error,) = errors
    assert "may last for ever" in str(error)


def test_two_models_held_crosswise_are_refused(
    blip2_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "PATIENCE_SECONDS", 1000.0)
    image, barrier = picture(blip2_project), threading.Barrier(2)
    editors = [load_fresh(blip2_project, **QUICK) for _ in range(2)]
    edits = [make(editor, image) for editor in editors]

    def cross(mine: int) -> str:
        with edits[mine].applied(editors[mine].backbone):
            barrier.wait()
            try:
                return editors[1 - mine].generate(image, PROMPT)
            except UserError as error:
                return str(error)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(cross, range(2)))
    assert sum("may last for ever" in text for text in found) >= 1
    assert editors[0].generate(image, PROMPT) == editors[1].generate(image, PROMPT)
