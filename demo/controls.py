"""The left side of the page: what to draw, and with which recipe."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from diffaccel.demo.actions import Actions
from diffaccel.demo.fields import Field, offered, words
from diffaccel.demo.recipes import CUSTOM
from diffaccel.recipes.presets import presets

# What answers at once and can refuse: through the queue too, since elsewhere a refusal is a server error to browsers.
QUICK: dict[str, Any] = {"concurrency_id": "quick", "concurrency_limit": None, "show_progress": "hidden"}
# What cannot refuse and nobody calls by name.
SILENT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


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


def picture_controls(actions: Actions) -> Picture:
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
        seed = gr.Number(0, label="Seed", min_width=100, elem_id="seed")  # no precision: it would round; `Ask` refuses
        steps = gr.Slider(1, 100, 25, step=1, label="Steps", min_width=180, scale=2, elem_id="steps")
    with gr.Accordion("Size and guidance", open=False, elem_id="more"), gr.Row():
        own = "model's own"
        width = gr.Number(None, label="Width", placeholder=own, min_width=90, elem_id="width")
        height = gr.Number(None, label="Height", placeholder=own, min_width=90, elem_id="height")
        guidance = gr.Number(None, label="Guidance scale", placeholder=own, min_width=110, elem_id="guidance")
    return {"seed": seed, "steps": steps, "guidance": guidance, "width": width, "height": height}


def recipe_controls(actions: Actions) -> Switches:
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
        return gr.Number(shown, placeholder=_empty(field), step=1 if field.whole else 0.01, **shared)
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), value=shown, allow_custom_value=field.open, **shared)
    return gr.Textbox(shown, placeholder=_empty(field), **shared)


def _empty(field: Field) -> str:
    return "the method's own" if field.default is None else str(field.show(field.default))


def wire_recipe(page: gr.Blocks, actions: Actions, picture: Picture, switches: Switches) -> None:
    """Presets fill the switches; every change is checked at once, and makes the recipe a custom one."""
    every = [switches.methods, *switches.fields]
    check = {
        "fn": actions.check,
        "inputs": [picture.model, *switches.recipe],
        "outputs": [switches.text, switches.message, switches.download],
        "trigger_mode": "always_last",
        **SILENT,
    }
    filled = {
        "fn": actions.fill,
        "inputs": [switches.preset, picture.model],
        "outputs": every,
        "api_visibility": "private",
        **QUICK,
    }
    gr.on([control.change for control in (*switches.recipe, picture.model)], **check)
    gr.on([control.input for control in every], lambda: CUSTOM, None, switches.preset, **SILENT)
    switches.preset.input(**filled)
    picture.model.change(**{**filled, "fn": actions.refill})
    page.load(**filled)
    # an empty number that gradio mounts late turns into 0 unless it was told once that it is empty
    optional = [picture.guidance, picture.width, picture.height]
    page.load(lambda: [None] * len(optional), None, optional, **SILENT)
    switches.methods.change(actions.groups, switches.methods, switches.groups, **SILENT)
    uploaded = switches.upload.upload(
        actions.upload,
        [switches.upload, picture.model],
        [switches.preset, *every],
        api_name="upload_recipe",
        **QUICK,
    )
    uploaded.failure(actions.problem, None, switches.message, **SILENT)
