"""The right side of the page: the four tabs, each with its run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from diffaccel.demo.actions import Actions
from diffaccel.demo.batching import KINDS
from diffaccel.demo.controls import QUICK, SILENT, Picture, Switches
from diffaccel.demo.erasing import ABOUT, AUTOMATIC
from diffaccel.demo.exploring import COSTS
from diffaccel.demo.fields import words
from diffaccel.demo.markup import message
from diffaccel.demo.timing import ROUNDS

WORKER = "model"  # one queue for everything that needs the model
# On a phone the result is below the controls; what was invisible until now is mounted a moment later.
SHOW = "if (innerWidth <= 640) setTimeout(() => document.querySelector('#{}')?.scrollIntoView(), 400);"


@dataclass(frozen=True)
class Buttons:
    """Start, stop, and the sentence beside them."""

    run: gr.Button
    cancel: gr.Button
    status: gr.HTML


def _buttons(tab: str, label: str) -> Buttons:
    with gr.Column(elem_classes="da-bar", elem_id=f"{tab}-bar"):
        with gr.Row():
            run = gr.Button(label, variant="primary", min_width=160, scale=3, elem_id=f"{tab}-run")
            cancel = gr.Button(
                "Cancel", variant="stop", min_width=100, scale=1, interactive=False, elem_id=f"{tab}-cancel"
            )
        return Buttons(run, cancel, gr.HTML(elem_classes="da-status", elem_id=f"{tab}-status"))


def _timed(tab: str, *, value: bool) -> gr.Checkbox:
    """Clients know it as `warm`, from the time when it meant one drawing before the clock ran."""
    return gr.Checkbox(
        value,
        label="Measure times",
        info=f"Draws everything once before the clock runs, then {ROUNDS} times in turns, and shows the range.",
        elem_id=f"{tab}-warm",
    )


def _wire_run(
    actions: Actions,
    tab: str,
    switches: Switches,
    buttons: Buttons,
    work: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
) -> None:
    """A run in three parts: claim the buttons, wait for the model and work, give the buttons back."""
    drawn_with = switches.recipe if switches.text in inputs else []
    started = buttons.run.click(
        actions.prepare(tab),
        drawn_with,
        [switches.text, buttons.run, buttons.cancel, buttons.status],
        api_visibility="private",
        **QUICK,
    )
    worked = started.success(
        work,
        list(inputs),
        [*outputs, buttons.status],
        api_name=tab,
        concurrency_id=WORKER,
        concurrency_limit=1,
        show_progress_on=buttons.status,
    )
    after = [buttons.status, buttons.run, buttons.cancel]
    worked.success(actions.ready, None, after, **SILENT)
    for event in (worked, started):
        event.failure(actions.failed(tab), list(inputs), after, **SILENT)
    worked.success(None, js=f"() => {{ {SHOW.format(outputs[0].elem_id)} }}", **SILENT)
    changes = [control.change for control in inputs]
    gr.on(changes, actions.forget(tab), list(inputs), buttons.status, trigger_mode="always_last", **SILENT)
    # not into the status: this answer may come after the run's own last word
    answer = gr.HTML(visible=False, elem_id=f"{tab}-answer")
    buttons.cancel.click(actions.cancel(tab), None, answer, api_name=f"cancel_{tab}", **QUICK)


def compare_tab(actions: Actions, picture: Picture, switches: Switches) -> None:
    buttons = _buttons("compare", "Compare")
    timed = _timed("compare", value=True)
    slider = gr.ImageSlider(
        label="Plain | accelerated",
        type="filepath",
        interactive=False,
        max_height=520,
        buttons=["fullscreen"],
        elem_id="compare-slider",
    )
    figures = gr.HTML(elem_id="compare-figures")
    steps = gr.HTML(elem_id="compare-steps")
    regions = gr.Image(
        label="How often each region was computed: white is always, black never",
        type="filepath",
        interactive=False,
        visible=False,
        height=300,
        buttons=["download", "fullscreen"],
        elem_id="compare-regions",
    )
    with gr.Row():
        plain = gr.DownloadButton("Download plain PNG", interactive=False, min_width=160, elem_id="download-plain")
        fast = gr.DownloadButton(
            "Download accelerated PNG", interactive=False, min_width=160, elem_id="download-accelerated"
        )
    _wire_run(
        actions,
        "compare",
        switches,
        buttons,
        actions.compare,
        [*picture.all, switches.text, timed],
        [slider, figures, steps, regions, plain, fast],
    )


def explore_tab(actions: Actions, picture: Picture, switches: Switches) -> None:
    settings = [(f"{words(f.method)}: {f.label.lower()}", f"{f.method}.{f.name}") for f in actions.fields]
    gr.Markdown(
        "Vary one or two settings of the recipe on the left; everything else stays. A method that is not in the recipe is "
        "added.",
        elem_id="explore-about",
    )
    with gr.Row():
        first = gr.Dropdown(
            settings, value="skip_cache.interval", label="Setting", min_width=200, elem_id="explore-first"
        )
        first_values = gr.Textbox(
            "2, 3, 5", label="Values", info="With commas.", min_width=160, elem_id="explore-first-values"
        )
    with gr.Row():
        second = gr.Dropdown(
            [("none", ""), *settings], value="", label="Second setting", min_width=200, elem_id="explore-second"
        )
        second_values = gr.Textbox(
            label="Its values", info="With commas.", min_width=160, elem_id="explore-second-values"
        )
    baseline = gr.Checkbox(
        True,
        label="Add the plain pipeline with fewer steps to the plot",
        info="The line that a recipe has to beat.",
        elem_id="explore-baseline",
    )
    timed = _timed("explore", value=False)
    over = gr.Radio(
        list(COSTS),
        value="FLOPs",
        label="Plot over",
        info="FLOPs repeat exactly; times need the tick above.",
        elem_id="explore-over",
    )
    buttons = _buttons("explore", "Explore")
    gallery = gr.Gallery(
        label="Pictures",
        type="filepath",
        interactive=False,
        columns=3,
        height="auto",
        object_fit="contain",
        visible=False,
        elem_id="explore-gallery",
    )
    figures = gr.HTML(elem_id="explore-figures")
    plot = gr.Image(
        label="Fidelity over cost",
        show_label=False,
        type="filepath",
        interactive=False,
        visible=False,
        buttons=["download", "fullscreen"],
        elem_id="explore-plot",
    )
    _wire_run(
        actions,
        "explore",
        switches,
        buttons,
        actions.explore,
        [*picture.all, switches.text, first, first_values, second, second_values, baseline, timed, over],
        [gallery, plot, figures],
    )


def erase_tab(actions: Actions, picture: Picture, switches: Switches) -> None:
    gr.Markdown(
        "Make the model forget concepts, in closed form and without training. The prompt on the left shows before and "
        "after. An edit acts on your pictures only, and only after you apply it.",
        elem_id="erase-about",
    )
    with gr.Row():
        concepts = gr.Textbox(
            label="Concepts to erase",
            placeholder="circle, star",
            info="With commas; \\, is a comma of a name.",
            min_width=200,
            elem_id="concepts",
        )
        anchor = gr.Textbox(
            label="Draw instead",
            placeholder="square",
            info="Empty: another thing of its kind.",
            min_width=200,
            elem_id="anchor",
        )
    keep = gr.Textbox(
        label="Keep",
        placeholder="square, heart, ring",
        info="What must stay as it is, with commas.",
        elem_id="keep",
    )
    with gr.Row():
        method = gr.Dropdown(list(ABOUT), value=AUTOMATIC, label="Method", min_width=140, elem_id="erase-method")
        settings = gr.Textbox(
            label="Settings of the method",
            placeholder="ridge=0.1; erase_weight=0.5",
            info="NAME=VALUE with semicolons; empty keeps its own.",
            min_width=220,
            scale=2,
            elem_id="erase-settings",
        )
    with gr.Accordion("What the methods do", open=False, elem_id="erase-methods"):
        gr.Markdown("\n".join(f"- **{name}**: {text}" for name, text in ABOUT.items()))
    hint = gr.HTML(elem_id="erase-hint")
    gr.on(
        [control.change for control in (picture.prompt, concepts, keep)],
        actions.hint,
        [picture.prompt, concepts, keep],
        hint,
        trigger_mode="always_last",
        **SILENT,
    )
    buttons = _buttons("erase", "Compute and preview")
    slider = gr.ImageSlider(
        label="Before | after",
        type="filepath",
        interactive=False,
        max_height=560,
        buttons=["fullscreen"],
        elem_id="erase-slider",
    )
    figures = gr.HTML(elem_id="erase-figures")
    state = gr.HTML(message("No edit yet. The model is as it came."), elem_id="erase-state")
    with gr.Row():
        apply = gr.Button("Apply to my pictures", interactive=False, min_width=150, elem_id="erase-apply")
        undo = gr.Button("Undo", interactive=False, min_width=110, elem_id="erase-undo")
        download = gr.DownloadButton("Download edit", interactive=False, min_width=140, elem_id="erase-download")
    _wire_run(
        actions,
        "erase",
        switches,
        buttons,
        actions.erase,
        [*picture.all, concepts, keep, anchor, method, settings],
        [slider, figures, download, state],
    )
    state.change(actions.edit_buttons, None, [apply, undo], **SILENT)
    applied = apply.click(actions.apply, None, state, api_name="apply_edit", **QUICK)
    undone = undo.click(actions.undo, None, state, api_name="undo_edit", **QUICK)
    for event in (applied, undone):
        event.failure(actions.failed("erase"), None, [buttons.status, buttons.run, buttons.cancel], **SILENT)
        event.success(actions.forget("erase"), None, buttons.status, **SILENT)


def batch_tab(actions: Actions, picture: Picture, switches: Switches) -> None:
    gr.Markdown(
        "Upload a list: a text file with a prompt a line, or CSV, JSONL or Parquet with a column `prompt` and, where rows "
        "differ, `negative_prompt`, `seed`, `steps`, `width`, `height`, `guidance_scale`, `recipe` and `name`. What a row "
        "does not say comes from the left: row 1 gets the seed there, row 2 the next one, and so on.",
        elem_id="batch-about",
    )
    file = gr.File(label="List", file_types=list(KINDS), type="filepath", height=130, elem_id="batch-file")
    with gr.Row():
        kind = gr.Dropdown(
            ["png", "jpeg", "webp"], value="png", label="File format", min_width=140, elem_id="batch-format"
        )
        metadata = gr.Checkbox(
            True,
            label="Metadata in the pictures",
            info="Prompt, seed, recipe and report as text.",
            min_width=180,
            elem_id="batch-metadata",
        )
    preview = gr.HTML(elem_id="batch-preview")
    buttons = _buttons("batch", "Draw all")
    figures = gr.HTML(elem_id="batch-figures")
    gallery = gr.Gallery(
        label="The last pictures",
        type="filepath",
        interactive=False,
        columns=4,
        height="auto",
        object_fit="contain",
        visible=False,
        elem_id="batch-gallery",
    )
    archive = gr.DownloadButton("Download all as ZIP", interactive=False, elem_id="batch-download")
    numbers = [picture.seed, picture.steps, picture.guidance, picture.width, picture.height]
    shared: list[Any] = [*numbers, kind, metadata, picture.model]
    gr.on(
        [control.change for control in (file, *shared)],
        actions.check_batch,
        [file, *shared],
        preview,
        api_name="check_batch",
        trigger_mode="always_last",
        **QUICK,
    )
    _wire_run(
        actions,
        "batch",
        switches,
        buttons,
        actions.batch,
        [picture.model, picture.negative, *numbers, switches.text, file, kind, metadata],
        [gallery, figures, archive],
    )
