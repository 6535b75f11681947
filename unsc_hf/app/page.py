"""The page, in Gradio."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..data.columns import find_text_columns, read_labels
from ..data.selection import at_most_per_class
from ..errors import UNSCError, first_line
from ..evaluation.audits.relearning import EVERY, RATES
from ..reporting.report import FILE
from ..reporting.summary import sentences
from ..reporting.tables import counted
from .answering import Answers, ask, drawing_to_image, is_drawable, top, what_changed
from .attack import MOST, Attacked, can_attack, relearn, what_came_back
from .opening import OpenedRun

PORT = 7860
_PAPER = 280  # side in pixels
_OFFERED = 3  # forgotten test rows to click on
_SHOWN = 3  # most likely classes of each model
_SHORT = 6  # letters of class names of which two models fit beside each other on a phone
_NOTE = (
    "Every model is trained on the same few examples of *every* class, for 40 steps of AdamW. The forgotten classes "
    "start with an empty head. Where the original does not come back either, the attack is too weak to say anything."
)
_READY_TO_DRAW = "() => setTimeout(() => document.querySelector('button[aria-label=Brush]')?.click(), 500)"
_COLOURS = {"original": "#6b7280", "unlearned": "#ea580c", "retrained": "#2563eb"}
_STYLE = """
iframe.report { width: 100%; height: 80vh; border: 0 }
footer { display: none !important }
.gradio-container .output-class { font-size: 1.4rem !important; overflow-wrap: anywhere }
.gradio-container .confidence-set .text { overflow-wrap: anywhere }
"""


def load_gradio() -> Any:
    """The library, which sends nothing anywhere; UNSCError where it is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        return import_module("gradio")
    except ImportError as error:
        raise UNSCError('app: gradio is not installed; run pip install "unsc_hf[app]".') from error


def build(run: OpenedRun) -> Any:
    """The page of a run, a `gradio.Blocks`; UNSCError where gradio is not installed."""
    gr = load_gradio()
    names = [str(name) for name in run.results["request"].get("forget_classes") or ()]
    forgotten = f"{len(names)} classes" if len(names) > _OFFERED else ", ".join(names)
    forgotten = forgotten or counted(run.results["request"]["rows"], "training row")
    with gr.Blocks(title=f"Forgotten: {forgotten}", analytics_enabled=False) as page:
        gr.Markdown("\n\n".join([f"# Forgotten: {forgotten}", *sentences(run.results)[:1], *run.missing]))
        with gr.Tab("Try it"):
            _try_it(gr, run)
        if (run.folder / FILE).is_file():
            with gr.Tab("Report"):
                report = html.escape((run.folder / FILE).read_text(encoding="utf-8"))
                gr.HTML(f'<iframe class="report" title="Report" sandbox="" srcdoc="{report}"></iframe>', padding=False)
        if can_attack(run):
            with gr.Tab("Attack it"):
                _attack_it(gr, run)
        if is_drawable(run):
            page.load(js=_READY_TO_DRAW)
    return page


def _try_it(gr: Any, run: OpenedRun) -> None:
    """Inputs at the left (on a phone above), and what each model says about them."""
    pad = text = picture = button = None
    with gr.Row():
        with gr.Column(scale=2):
            if run.task != "image-classification":
                text = gr.Textbox(label="Your question" if run.task == "text-generation" else "Your text", lines=2)
                button = gr.Button("Ask", variant="primary")
                _offer_rows(gr, run, text)
            if is_drawable(run):
                brush = gr.Brush(default_size=_PAPER // 16, colors=["#000000"], color_mode="fixed")
                size = {"canvas_size": (_PAPER, _PAPER), "fixed_canvas": True, "height": _PAPER + 70}
                pad = gr.Sketchpad(label="Draw", type="pil", brush=brush, layers=False, transforms=(), **size)
            if text is None:
                with gr.Accordion("Or take an image", open=pad is None):
                    picture = gr.Image(label="Image", type="pil", sources=["upload"], height=200)
                    _offer_rows(gr, run, picture)
        with gr.Column(scale=3):
            sentence = gr.Markdown("*What changed appears here.*")
            show: Callable[..., Any] = gr.Textbox if run.task == "text-generation" else gr.Label
            width = 150 if show is gr.Label and max(map(len, run.names)) <= _SHORT else 220  # on a phone 220 fill a row
            with gr.Row():
                shown = [show(label=title.capitalize(), min_width=width) for title in run.models]

    def answer(value: Any) -> list[Any]:
        if isinstance(value, dict):  # a drawing
            value = drawing_to_image(value["composite"], run.processors["unlearned"]) if value["composite"] else None
        try:
            answers = ask(run, value)
        except UNSCError as error:
            return [f"*{error}*", *(gr.update(value=None) for _ in run.models)]
        return [what_changed(run, answers), *(_shown(gr, run, answers, title) for title in run.models)]

    outputs = [sentence, *shown]
    if text is not None and button is not None:
        gr.on([button.click, text.submit], answer, text, outputs)
    if picture is not None:
        picture.change(answer, picture, outputs)
    if pad is not None:
        pad.change(answer, pad, outputs, trigger_mode="always_last", show_progress="hidden")


def _shown(gr: Any, run: OpenedRun, answers: Answers, title: str) -> Any:
    """A model's answers in its own box."""
    if run.task == "text-generation":
        text = top(answers[title])
        return gr.update(value=text, label=f"{title.capitalize()}, {answers[title][text]:.0%} sure of its words")
    likely = sorted(answers[title], key=lambda name: -answers[title][name])[:_SHOWN]
    return {name: answers[title][name] for name in likely}


def _offer_rows(gr: Any, run: OpenedRun, box: Any) -> None:
    """Some test rows to click on, of forgotten and of kept classes."""
    if not can_attack(run) or run.data is None:
        return
    rows, (label, texts) = run.data["test"], run.columns
    labels = read_labels(rows, label)
    one_of_each = at_most_per_class(labels, 1)
    gone = np.isin(labels[one_of_each], run.forgotten)
    chosen = [*one_of_each[gone][:_OFFERED], *one_of_each[~gone]][: 2 * _OFFERED]
    taken = rows.select(chosen)
    if run.task == "image-classification":
        images = (next(value for value in row.values() if isinstance(value, Image.Image)) for row in taken)
        examples = [[ImageOps.scale(image, max(1, 200 // image.height), Image.Resampling.NEAREST)] for image in images]
    else:
        examples = [[text] for text in taken[find_text_columns(rows, texts)[0]]]
    gr.Examples(examples, box, label="Test rows, forgotten classes first", examples_per_page=2 * _OFFERED)


def _attack_it(gr: Any, run: OpenedRun) -> None:
    """Choices at the left, what came back at the right."""
    import pandas

    columns = ["step", "recognised", "model"]
    gr.Markdown(_NOTE)
    with gr.Row():
        with gr.Column():
            examples = gr.Slider(1, MOST, value=10, step=1, label="Examples of each class")
            rate = gr.Dropdown(list(RATES), value=RATES[2], label="Learning rate")
            button = gr.Button("Relearn", variant="primary")
        with gr.Column():
            sentence = gr.Markdown()
            axes = {"x": "step", "y": "recognised", "color": "model", "color_map": _COLOURS}
            plot = gr.LinePlot(pandas.DataFrame(columns=columns), **axes, y_lim=[0, 1], height=280)

    def attack(count: float, learning_rate: float) -> Iterator[tuple[str, Any]]:
        curves: dict[str, list[float]] = {title: [math.nan] for title in run.models}  # all, for the plot's legend
        done: list[Attacked] = []
        yield "Training ...", None
        for one in relearn(run, int(count), learning_rate):
            done.append(one)
            curves[one.title] = one.curve
            points = [(EVERY * i, value, title) for title, curve in curves.items() for i, value in enumerate(curve)]
            yield what_came_back(done, int(count)), pandas.DataFrame(points, columns=columns)

    button.click(attack, [examples, rate], [sentence, plot])


def serve(page: Any, host: str = "127.0.0.1", port: int | None = None, wait: bool = True) -> str:
    """Show the page until it is stopped; returns its address where one need not `wait`.

    Args:
        page: what `build` made.
        host: "0.0.0.0" lets other machines in.
        port: the first free one from 7860 when None.

    Raises:
        UNSCError: the port is in use.
    """
    gr = load_gradio()
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, theme=theme, css=_STYLE, share=False,
            footer_links=[], quiet=True, ssr_mode=False,
        )  # fmt: skip
    except OSError as error:
        where = f"{host}:{PORT if port is None else port}"
        raise UNSCError(f"port: cannot listen on {where} ({first_line(error)}); choose another one.") from error
    if wait:
        page.block_thread()
    return str(address)
