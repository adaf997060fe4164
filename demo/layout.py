"""The page: what stands where. Which action follows which event is said beside the controls; nothing is computed here."""

from __future__ import annotations

from typing import Any

import gradio as gr

from diffaccel.demo.actions import Actions
from diffaccel.demo.controls import picture_controls, recipe_controls, wire_recipe
from diffaccel.demo.tabs import batch_tab, compare_tab, erase_tab, explore_tab

TITLE = """<div id="da-title"><h1>diffaccel</h1>
<p>The same picture, sooner. Compare a recipe with the stock pipeline, and see what it left out.</p></div>"""


def build(actions: Actions) -> gr.Blocks:
    """The whole page."""
    page: gr.Blocks = gr.Blocks(title="diffaccel", analytics_enabled=False, delete_cache=(3600, 24 * 3600))
    with page:
        gr.HTML(TITLE, elem_id="title")
        with gr.Row(equal_height=False, elem_id="workplace"):
            with gr.Column(scale=4, min_width=300, elem_id="controls"):
                picture = picture_controls(actions)
                with gr.Column(elem_id="recipe-panel"):
                    switches = recipe_controls(actions)
            with gr.Column(scale=7, min_width=300, elem_id="results"), gr.Tabs(elem_id="tabs"):
                with gr.Tab("Compare", id="compare", elem_id="tab-compare"):
                    compare_tab(actions, picture, switches)
                with gr.Tab("Explore", id="explore", elem_id="tab-explore"):
                    explore_tab(actions, picture, switches)
                with gr.Tab("Erase", id="erase", elem_id="tab-erase"):
                    erase_tab(actions, picture, switches)
                with gr.Tab("Batch", id="batch", elem_id="tab-batch"):
                    batch_tab(actions, picture, switches)
        wire_recipe(page, actions, picture, switches)
        page.unload(actions.leave)
    page.queue(max_size=64, default_concurrency_limit=4)
    for block in page.blocks.values():
        _refuse_addresses(block)
    return page


def _refuse_addresses(block: Any) -> None:
    """A client may write an address where a file belongs, and gradio would fetch it; this server asks no other machine."""
    keep = getattr(block, "async_move_resource_to_block_cache", None)
    if keep is None:
        return

    async def keep_local(place: Any) -> Any:
        if str(place).lower().startswith(("http://", "https://")):
            raise gr.Error("Upload the file itself: this server fetches no addresses.", print_exception=False)
        return await keep(place)

    block.async_move_resource_to_block_cache = keep_local
