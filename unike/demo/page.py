"""The page, in Gradio: no requests to other hosts, errors in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from unike.demo.active import render_active
from unike.demo.desk import Desk, Question
from unike.edits.explain import Explanation
from unike.types import UserError

logger = logging.getLogger("unike")

LARGEST_UPLOAD = "10mb"
# Seconds after which an uploaded image is deleted; all are deleted when the server ends.
LIFETIME = 3600
TITLE = "UniKE: correct one answer of a vision-language model"
INTRODUCTION = f"""# {TITLE}
Four steps: choose an image, ask, edit, and ask other questions: does the edit carry over, and is everything
else unchanged?
"""
CSS = """
.gradio-container table {border-collapse: collapse; font-size: .85rem; margin: .5rem 0; width: 100%}
.gradio-container th, .gradio-container td {text-align: left; padding: .2rem .6rem; vertical-align: top;
  border-bottom: 1px solid var(--border-color-primary); white-space: pre-line}
.gradio-container caption {text-align: left; font-weight: 600}
.status {min-height: 1.5em; margin: 0}
.status.bad {color: #b91c1c; font-weight: 600}
.dark .status.bad {color: #fca5a5}
#examples .grid-wrap {min-height: 0; max-height: none; height: auto; overflow: visible}
#examples .grid-container {padding-top: 2rem; grid-template-columns: repeat(4, minmax(0, 1fr));
  grid-template-rows: none; grid-auto-flow: row; width: 100%; height: auto; overflow: visible}
@media (max-width: 640px) {
  #result {position: fixed; left: 0; right: 0; bottom: 0; z-index: 1000; gap: .3rem;
    padding: .3rem .6rem .6rem; background: var(--body-background-fill);
    border-top: 2px solid var(--border-color-primary)}
  #active {margin-bottom: 11rem}
}
#image img {width: 100%; height: 100%; object-fit: contain}
#image .or {color: inherit}
"""
# The system's fonts, and blues on which white is readable.
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_700",
)


class DemoPage:
    """The components of one page over a desk, and what their events do."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        with gr.Blocks(
            title=TITLE, analytics_enabled=False, delete_cache=(LIFETIME, LIFETIME)
        ) as self.blocks:
            gr.Markdown(INTRODUCTION)
            with gr.Row():
                with gr.Column():
                    self._build_question()
                with gr.Column():
                    self._build_answers()
            with gr.Accordion("What was active", open=False, elem_id="active"):
                self.active = gr.HTML(apply_default_css=False)
            # The example that is open, by its place; each tab has its own.
            self.example = gr.State()
        with self.blocks:
            self._connect()

    def _build_question(self) -> None:
        examples = [str(example.question.image) for example in self.desk.examples]
        self.gallery = gr.Gallery(
            examples,
            label="1. Choose an example",
            columns=4,
            height="auto",
            allow_preview=False,
            interactive=False,
            visible=bool(examples),
            buttons=[],
            elem_id="examples",
        )
        self.image = gr.Image(
            label="Image: from an example, or upload one" if examples else "1. Upload an image",
            type="filepath",
            sources=["upload"],
            height=220,
            buttons=[],
            elem_id="image",
            alt_text="The image of the question",
        )
        # As uploaded: Gradio would convert it, and raise for a file that is no image.
        self.image.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
        self.question = gr.Textbox(label="2. Question", max_lines=3, elem_id="question")
        self.ask = gr.Button("Ask", elem_id="ask")
        self.right = gr.Textbox(label="3. Right answer", max_lines=3, elem_id="right")
        self.edit = gr.Button("Edit", variant="primary", elem_id="edit")

    def _build_answers(self) -> None:
        # On a phone it stays at the lower edge of the screen, whichever step is in sight.
        with gr.Column(elem_id="result"):
            self.status = gr.HTML(_render_status("Choose an example, or upload an image."), elem_id="status")
            with gr.Row():
                self.before = gr.Textbox(label="Without edits", interactive=False, elem_id="before")
                self.after = gr.Textbox(label="With edits", interactive=False, elem_id="after")
        self.follow_ups = gr.Radio([], label="4. Ask next", type="index", visible=False, elem_id="follow-ups")
        self.edits = gr.Radio([], label="Attached edits", visible=False, elem_id="edits")
        with gr.Row():
            self.undo = gr.Button("Undo the chosen edit", interactive=False, elem_id="undo")
            self.undo_all = gr.Button("Undo all", interactive=False, elem_id="undo-all")

    def _connect(self) -> None:
        question_inputs = [self.image, self.question]
        shown = [self.status, self.before, self.after, self.active, self.edits, self.undo, self.undo_all]
        filled = [*question_inputs, self.right]
        on: list[tuple[Any, Callable[..., Any], list[Any], list[Any]]] = [
            (self.blocks.load, self._list_edits, [], shown),
            (self.gallery.select, self._show_example, [], [*filled, self.follow_ups, self.example, *shown]),
            (self.follow_ups.select, self._ask_follow_up, [self.example, self.follow_ups], [*filled, *shown]),
            (self.ask.click, self._show_answers, question_inputs, shown),
            (self.question.submit, self._show_answers, question_inputs, shown),
            (self.edit.click, self._edit, filled, shown),
            (self.undo.click, self._undo, [self.edits, *question_inputs], shown),
            (self.undo_all.click, self._undo_all, question_inputs, shown),
        ]
        for event, work, inputs, outputs in on:
            event(self._show_errors(work), inputs, outputs, api_visibility="private")

    def _show_errors(self, work: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
        """``work``, with an error as one line on the page instead of the answers."""

        @wraps(work)
        def run_safely(*values: Any) -> dict[Any, Any]:
            try:
                return work(*values)
            except UserError as error:
                line = "; ".join(error.problems)
            except Exception as error:
                line = f"internal error: {type(error).__name__}; see the terminal"
                logger.exception("the demo page failed")
            return self._list_edits() | self._clear_answers(_render_status(line, bad=True))

        return run_safely

    # ------------------------------------------------------------ events

    def _show_example(self, chosen: gr.SelectData) -> dict[Any, Any]:
        example = self.desk.examples[chosen.index]
        labels = [f"{question.about}: {question.text}" for question in example.follow_ups]
        return {
            **self._fill_inputs(example.question),
            self.follow_ups: gr.Radio(labels, value=None, visible=bool(labels)),
            self.example: chosen.index,
            **self._show_answers(example.question.image, example.question.text),
        }

    def _ask_follow_up(self, example: int, chosen: int) -> dict[Any, Any]:
        question = self.desk.examples[example].follow_ups[chosen]
        good = question.right if question.expect == "target" else "the same as without it"
        status = f"After a good edit: {good}."
        return self._fill_inputs(question) | self._show_answers(question.image, question.text, status)

    def _fill_inputs(self, question: Question) -> dict[Any, Any]:
        return {self.image: question.image, self.question: question.text, self.right: question.right}

    def _edit(self, image: str | None, question: str, right: str) -> dict[Any, Any]:
        answers = self.desk.edit(image, question, right)
        return self._list_edits() | self._fill_answers(answers, "Edited.")

    def _undo(self, chosen: str | None, image: str | None, question: str) -> dict[Any, Any]:
        self.desk.undo(chosen)
        return self._ask_again(image, question)

    def _undo_all(self, image: str | None, question: str) -> dict[Any, Any]:
        self.desk.undo_all()
        return self._ask_again(image, question)

    def _ask_again(self, image: str | None, question: str) -> dict[Any, Any]:
        """After an undo: asks the present question again, if there is one."""
        if question.strip():
            return self._show_answers(image, question, "Undone.")
        return self._list_edits() | self._clear_answers(_render_status("Undone."))

    def _show_answers(self, image: str | None, question: str, status: str = "") -> dict[Any, Any]:
        return self._list_edits() | self._fill_answers(self.desk.ask(image, question), status)

    def _fill_answers(self, answers: Explanation, status: str) -> dict[Any, Any]:
        return {
            self.status: _render_status(status),
            self.before: answers.before,
            self.after: answers.after,
            self.active: render_active(answers),
        }

    def _clear_answers(self, status: str) -> dict[Any, Any]:
        return {self.status: status, self.before: "", self.after: "", self.active: ""}

    def _list_edits(self) -> dict[Any, Any]:
        choices = [(f"{edit.question} → {edit.answer}", edit.id) for edit in self.desk.edits]
        last = choices[-1][1] if choices else None
        return {
            self.edits: gr.Radio(choices, value=last, visible=bool(choices)),
            self.undo: gr.Button(interactive=bool(choices)),
            self.undo_all: gr.Button(interactive=bool(choices)),
        }


def _render_status(text: str, bad: bool = False) -> str:
    kind = 'class="status bad" role="alert"' if bad else 'class="status" role="status"'
    return f"<p {kind}>{escape(text)}</p>"


def serve(
    desk: Desk, host: str, port: int | None, open_browser: bool, wait: bool = True
) -> tuple[gr.Blocks, str]:
    """Serves the page, until Ctrl-C unless ``wait`` is off; returns the page and its address.

    ``port``: None for the first free one from 7860 on. UserError if none is free.
    """
    blocks = DemoPage(desk).blocks
    # One call at a time: they share a model.
    blocks.queue(default_concurrency_limit=1, api_open=False)
    images = {q.image for e in desk.examples for q in (e.question, *e.follow_ups)}
    try:
        _, address, _ = blocks.launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            enable_monitoring=False,
            max_file_size=LARGEST_UPLOAD,
            theme=THEME,
            css=CSS,
            allowed_paths=[str(Path(path).resolve()) for path in images if path is not None],
        )
    except OSError as error:
        raise UserError(f"port: {port or 'all from 7860 on'}: taken; name another --port") from error
    print(f"the page is at {address} (Ctrl-C ends it)")
    if wait:
        blocks.block_thread()
    return blocks, address
