"""The page: what stands where, and which action follows which event. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from diffaccel.demo.actions import Actions
from diffaccel.demo.batching import KINDS
from diffaccel.demo.fields import Field, offered, words
from diffaccel.demo.markup import message
from diffaccel.demo.recipes import CUSTOM
from diffaccel.erasure.settings import METHODS as ERASURES
from diffaccel.recipe import presets

WORKER = "model"  # one queue for everything that needs the model
# What answers at once and can refuse: through the queue too, since elsewhere a refusal is a server error to browsers.
QUICK: dict[str, Any] = {"concurrency_id": "quick", "concurrency_limit": None, "show_progress": "hidden"}
TITLE = """<div id="da-title"><h1>diffaccel</h1>
<p>The same picture, sooner. Compare a recipe with the stock pipeline, and see what it left out.</p></div>"""


@dataclass(frozen=True)
class Picture:
    """The controls that say what to draw."""

    model: gr.Dropdown
    prompt: gr.Textbox
    negative: gr.Textbox
    seed: gr.Number
    steps: gr.Slider
    guidance: gr.Number
    width: gr.Number
    height: gr.Number

    @property
    def all(self) -> list[Any]:
        """In the order in which actions take them."""
        return [self.model, self.prompt, self.negative, self.seed, self.steps, self.guidance, self.width, self.height]


@dataclass(frozen=True)
class Switches:
    """The controls that say with which recipe."""

    preset: gr.Dropdown
    methods: gr.CheckboxGroup
    fields: list[Any]
    groups: list[gr.Group]
    message: gr.HTML
    text: gr.Textbox
    download: gr.DownloadButton
    upload: gr.UploadButton

    @property
    def recipe(self) -> list[Any]:
        """All that a recipe is made of."""
        return [self.preset, self.methods, *self.fields]


@dataclass(frozen=True)
class Buttons:
    """Start, stop, and the sentence beside them."""

    run: gr.Button
    cancel: gr.Button
    status: gr.HTML


def build(actions: Actions) -> gr.Blocks:
    """The whole page."""
    page: gr.Blocks = gr.Blocks(title="diffaccel", analytics_enabled=False, delete_cache=(3600, 24 * 3600))
    with page:
        gr.HTML(TITLE, elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300, elem_id="controls"):
                picture = _picture(actions)
                switches = _switches(actions)
            with gr.Column(scale=7, min_width=300, elem_id="results"), gr.Tabs(elem_id="tabs"):
                with gr.Tab("Compare", id="compare", elem_id="tab-compare"):
                    _compare(actions, picture, switches)
                with gr.Tab("Explore", id="explore", elem_id="tab-explore"):
                    _explore(actions, picture, switches)
                with gr.Tab("Erase", id="erase", elem_id="tab-erase"):
                    _erase(actions, picture, switches)
                with gr.Tab("Batch", id="batch", elem_id="tab-batch"):
                    _batch(actions, picture, switches)
        _wire_recipe(page, actions, picture, switches)
        page.unload(actions.leave)
    page.queue(max_size=64, default_concurrency_limit=4)
    return page


# --- left: what to draw, with which recipe ---


def _picture(actions: Actions) -> Picture:
    models = actions.engine.models()
    return Picture(
        model=gr.Dropdown(
            models,
            value=models[0][1],
            label="Model",
            allow_custom_value=True,
            info="Bundled, or a diffusers folder that the page was started with."
            if actions.engine.allowed
            else "Bundled. Start the page with --allow DIR for models of your own.",
            elem_id="model",
        ),
        prompt=gr.Textbox("a red square", label="Prompt", lines=2, max_lines=6, max_length=2000, elem_id="prompt"),
        negative=gr.Textbox(label="Negative prompt", max_lines=4, max_length=2000, elem_id="negative"),
        **_numbers(),
    )


def _numbers() -> dict[str, Any]:
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100, elem_id="seed")
        steps = gr.Slider(1, 100, 25, step=1, label="Steps", min_width=180, scale=2, elem_id="steps")
    with gr.Accordion("Size and guidance", open=False, elem_id="more"), gr.Row():
        own = "model's own"
        width = gr.Number(None, label="Width", precision=0, placeholder=own, min_width=90, elem_id="width")
        height = gr.Number(None, label="Height", precision=0, placeholder=own, min_width=90, elem_id="height")
        guidance = gr.Number(None, label="Guidance scale", placeholder=own, min_width=110, elem_id="guidance")
    return {"seed": seed, "steps": steps, "guidance": guidance, "width": width, "height": height}


def _switches(actions: Actions) -> Switches:
    preset = gr.Dropdown([*presets(), CUSTOM], value="balanced", label="Recipe", elem_id="preset")
    status = gr.HTML(elem_id="recipe-message")
    with gr.Accordion("Methods and their settings", open=False, elem_id="methods-panel"):
        methods = gr.CheckboxGroup(
            [(words(name), name) for name in actions.methods], label="Methods", value=[], elem_id="methods"
        )
        groups, fields = [], []
        for name, own in offered().items():
            with gr.Group(visible="hidden", elem_id=f"group-{name}") as group:
                gr.HTML(_heading(name, actions), padding=True, elem_classes="da-method", elem_id=f"about-{name}")
                fields += [_control(field) for field in own]
            groups.append(group)
    with gr.Accordion("Recipe file", open=False, elem_id="file-panel"):
        with gr.Row():
            download = gr.DownloadButton("Download recipe", size="md", min_width=140, elem_id="recipe-download")
            upload = gr.UploadButton(
                "Upload recipe", file_types=[".json"], size="md", min_width=140, elem_id="recipe-upload"
            )
        text = gr.Textbox(
            label="Recipe as JSON", lines=6, max_lines=16, interactive=False, buttons=["copy"], elem_id="recipe-json"
        )
    return Switches(preset, methods, fields, groups, status, text, download, upload)


def _heading(method: str, actions: Actions) -> str:
    return f"<h4>{escape(words(method))}</h4><p>{escape(actions.described(method))}</p>"


def _control(field: Field) -> Any:
    """The control of a setting, by its kind."""
    shared: dict[str, Any] = {
        "label": field.label,
        "info": field.help or None,
        "elem_id": f"field-{field.method}-{field.name}",
    }
    shown = field.show(field.default)
    if field.kind == "switch":
        return gr.Checkbox(shown, **shared)
    if field.kind == "slider":
        return gr.Slider(field.minimum or 0, field.maximum or 1, shown, step=field.step, **shared)
    if field.kind == "number":
        precision = 0 if field.whole else None
        return gr.Number(
            shown, precision=precision, placeholder=_empty(field), step=1 if field.whole else 0.01, **shared
        )
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), value=shown, allow_custom_value=field.open, **shared)
    return gr.Textbox(shown, placeholder=_empty(field), **shared)


def _empty(field: Field) -> str:
    return "the method's own" if field.default is None else str(field.show(field.default))


def _wire_recipe(page: gr.Blocks, actions: Actions, picture: Picture, switches: Switches) -> None:
    """Presets fill the switches; every change is checked at once, and makes the recipe a custom one."""
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    every = [switches.methods, *switches.fields]
    check = {
        "fn": actions.check,
        "inputs": [picture.model, *switches.recipe],
        "outputs": [switches.text, switches.message, switches.download],
        "trigger_mode": "always_last",
        **quiet,
    }
    filled = {
        "fn": actions.fill,
        "inputs": [switches.preset, picture.model],
        "outputs": every,
        "api_visibility": "private",
        **QUICK,
    }
    gr.on([control.change for control in (*switches.recipe, picture.model)], **check)
    gr.on([control.input for control in every], lambda: CUSTOM, None, switches.preset, **quiet)
    gr.on([switches.preset.input, picture.model.change], **filled)
    page.load(**filled)
    # an empty number that gradio mounts late turns into 0 unless it was told once that it is empty
    optional = [picture.guidance, picture.width, picture.height]
    page.load(lambda: [None] * len(optional), None, optional, **quiet)
    switches.methods.change(actions.groups, switches.methods, switches.groups, **quiet)
    uploaded = switches.upload.upload(
        actions.upload,
        [switches.upload, picture.model],
        [switches.preset, *every],
        api_name="upload_recipe",
        **QUICK,
    )
    uploaded.failure(actions.problem, None, switches.message, **quiet)


# --- right: the tabs ---


def _buttons(tab: str, label: str) -> Buttons:
    with gr.Row():
        run = gr.Button(label, variant="primary", min_width=160, scale=3, elem_id=f"{tab}-run")
        cancel = gr.Button("Cancel", variant="stop", min_width=100, scale=1, interactive=False, elem_id=f"{tab}-cancel")
    return Buttons(run, cancel, gr.HTML(min_height=52, elem_id=f"{tab}-status"))


def _warm(tab: str) -> gr.Checkbox:
    return gr.Checkbox(
        True,
        label="Draw each picture once before the clock runs",
        info="Fair times at twice the wait. FLOPs and pictures are the same without.",
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
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    started = buttons.run.click(
        actions.prepare(tab),
        switches.recipe,
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
    worked.success(actions.ready, None, after, **quiet)
    for event in (worked, started):
        event.failure(actions.failed, None, after, **quiet)
    buttons.cancel.click(
        actions.cancel(tab), None, buttons.status, queue=False, show_progress="hidden", api_name=f"cancel_{tab}"
    )


def _compare(actions: Actions, picture: Picture, switches: Switches) -> None:
    buttons = _buttons("compare", "Compare")
    warm = _warm("compare")
    slider = gr.ImageSlider(
        label="Plain (left) and accelerated (right)",
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
        [*picture.all, switches.text, warm],
        [slider, figures, steps, regions, plain, fast],
    )


def _explore(actions: Actions, picture: Picture, switches: Switches) -> None:
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
    warm = _warm("explore")
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
        [*picture.all, switches.text, first, first_values, second, second_values, baseline, warm],
        [gallery, plot, figures],
    )


def _erase(actions: Actions, picture: Picture, switches: Switches) -> None:
    gr.Markdown(
        "Make the model forget concepts, in closed form and without training. The prompt on the left shows before and "
        "after. An edit acts on your pictures only, and only after you apply it.",
        elem_id="erase-about",
    )
    with gr.Row():
        concepts = gr.Textbox(
            label="Concepts to erase",
            placeholder="circle, star",
            info="With commas.",
            min_width=200,
            elem_id="concepts",
        )
        anchor = gr.Textbox(
            label="Draw instead",
            placeholder="square",
            info="Empty: nothing in particular.",
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
        method = gr.Dropdown(list(ERASURES), value="speed", label="Method", min_width=140, elem_id="erase-method")
        settings = gr.Textbox(
            label="Settings of the method",
            placeholder="ridge=0.5; strength=0.9",
            info="NAME=VALUE with semicolons; empty keeps its own.",
            min_width=220,
            scale=2,
            elem_id="erase-settings",
        )
    buttons = _buttons("erase", "Compute and preview")
    slider = gr.ImageSlider(
        label="Before (left) and after (right)",
        type="filepath",
        interactive=False,
        max_height=560,
        buttons=["fullscreen"],
        elem_id="erase-slider",
    )
    figures = gr.HTML(elem_id="erase-figures")
    state = gr.HTML(message("No edit yet. The model is as it came."), elem_id="erase-state")
    with gr.Row():
        apply = gr.Button("Apply to my pictures", min_width=150, elem_id="erase-apply")
        undo = gr.Button("Undo", min_width=110, elem_id="erase-undo")
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
    applied = apply.click(actions.apply, None, state, api_name="apply_edit", **QUICK)
    undone = undo.click(actions.undo, None, state, api_name="undo_edit", **QUICK)
    for event in (applied, undone):
        event.failure(actions.problem, None, buttons.status, api_visibility="private", **QUICK)


def _batch(actions: Actions, picture: Picture, switches: Switches) -> None:
    gr.Markdown(
        "Upload a list: a text file with a prompt a line, or CSV, JSONL or Parquet with a column `prompt` and, where rows "
        "differ, `negative_prompt`, `seed`, `steps`, `width`, `height`, `guidance_scale`, `recipe` and `name`. What a row "
        "does not say comes from the left; picture *i* gets the seed there plus *i*.",
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
    file.change(actions.check_batch, [file, *numbers, kind, metadata], preview, api_name="check_batch", **QUICK)
    _wire_run(
        actions,
        "batch",
        switches,
        buttons,
        actions.batch,
        [picture.model, picture.negative, *numbers, switches.text, file, kind, metadata],
        [gallery, figures, archive],
    )
