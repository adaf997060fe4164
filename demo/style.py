"""How the page looks: a theme on system fonts, so that nothing is fetched from elsewhere, and a little CSS."""

from __future__ import annotations

import gradio as gr

_SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def theme() -> gr.themes.Base:
    """Soft, in teal, with borders that show where to type; light and dark."""
    made = gr.themes.Soft(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", radius_size="md", font=_SANS, font_mono=_MONO
    )
    return made.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        block_label_background_fill="*background_fill_primary",
        block_shadow="none",
        block_shadow_dark="none",
        block_border_width="1px",
        body_text_size="15px",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_text_weight="600",
        block_title_text_size="14px",
        block_title_background_fill="transparent",
        block_title_padding="0",
        block_label_background_fill_dark="*block_background_fill",
        block_label_text_color="*body_text_color",
        block_label_text_color_dark="*body_text_color",
        block_label_text_size="13px",
        input_border_width="1px",
        input_border_color="*neutral_400",
        input_border_color_dark="*neutral_600",
        checkbox_border_width="1px",
        checkbox_border_color="*neutral_400",
        checkbox_border_color_dark="*neutral_500",
        checkbox_label_shadow="none",
        checkbox_label_border_width="1px",
        checkbox_label_border_color="*neutral_300",
        checkbox_label_border_color_dark="*neutral_600",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700",
        checkbox_label_text_color_selected="white",
        input_shadow="none",
        input_shadow_dark="none",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_secondary_shadow="none",
        button_primary_shadow="none",
        button_large_text_size="15px",
        button_large_padding="9px 16px",
    )


CSS = """
:root { --da-full: #0f766e; --da-partial: #2dd4bf; --da-guidance: #d97706; --da-skipped: #94a3b8; }
.dark { --da-full: #14b8a6; --da-partial: #0d7a70; --da-guidance: #f59e0b; --da-skipped: #64748b; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container { max-width: 1440px !important; margin: 0 auto !important; }
#da-title { padding: 4px 2px 0; }
#da-title h1 { font-size: 26px; margin: 0; letter-spacing: -0.02em; }
#da-title p { margin: 2px 0 0; color: var(--body-text-color-subdued); }
.da-card, .da-tile { border: 1px solid var(--border-color-primary); border-radius: 10px;
  background: var(--block-background-fill); }
.da-card { padding: 14px 16px; }
.da-card h3 { margin: 0 0 10px; font-size: 15px; }
.da-tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 10px; }
.da-tile { padding: 12px 14px; display: flex; flex-direction: column; min-width: 0; }
.da-tile b { font-size: 24px; line-height: 1.2; font-variant-numeric: tabular-nums; letter-spacing: -0.02em; }
.da-tile span { font-weight: 600; font-size: 13px; }
.da-tile small { color: var(--body-text-color-subdued); font-size: 12.5px; }
.da-strip { margin-bottom: 12px; }
.da-strip-name { display: flex; justify-content: space-between; font-size: 13px; margin-bottom: 4px; gap: 12px; }
.da-strip-name span { color: var(--body-text-color-subdued); white-space: nowrap; }
.da-bars { display: flex; align-items: flex-end; gap: 2px; height: 44px; }
.da-slot { flex: 1 1 0; min-width: 1px; height: 100%; display: flex; align-items: flex-end; border-radius: 2px;
  background: var(--background-fill-secondary); }
.da-slot i { display: block; width: 100%; border-radius: 2px; }
.da-full { background: var(--da-full); } .da-partial { background: var(--da-partial); }
.da-guidance { background: var(--da-guidance); } .da-skipped { background: var(--da-skipped); }
.da-legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 12.5px; color: var(--body-text-color-subdued); }
.da-legend span { display: inline-flex; align-items: center; gap: 6px; }
.da-legend i { width: 11px; height: 11px; border-radius: 3px; display: inline-block; }
.da-message { padding: 9px 12px; border-radius: 8px; border: 1px solid var(--border-color-primary); font-size: 14px;
  overflow-wrap: anywhere; background: var(--block-background-fill); }
.da-message.da-good { border-left: 4px solid var(--da-full); }
.da-message.da-bad { border-left: 4px solid #dc2626; }
.block.da-status { min-height: 44px; }
/* Progress takes a place of its own: over the page it would cover what stands below. */
.da-status > .wrap:not(.hide) { position: static !important; padding: 0 !important; gap: 4px;
  overflow: visible; }
.da-status > .wrap:not(.hide) .meta-text, .da-status > .wrap:not(.hide) .meta-text-center { position: static; padding: 0;
  transform: none; }
.da-status > .wrap:not(.hide) .progress-level { width: 100%; gap: 6px; }
.da-status > .wrap:not(.hide) .progress-bar-wrap { width: 100%; }
.da-status > .wrap:not(.hide) ~ .html-container { display: none; }
.gradio-container button:disabled { background: var(--background-fill-secondary) !important; box-shadow: none !important;
  color: var(--body-text-color-subdued) !important; border: 1px solid var(--border-color-primary) !important;
  opacity: 0.6 !important; cursor: not-allowed; }
/* The picture file of a plot stays white; on a dark page it is shown the other way round, with the colours it has. */
.dark #explore-plot img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; }
/* What a tab does not use. */
.gradio-container:has(#tab-batch-button[aria-selected="true"]) #prompt,
.gradio-container:has(#tab-erase-button[aria-selected="true"]) #recipe-panel { display: none; }
#explore-gallery, #explore-gallery .grid-wrap, #batch-gallery .grid-wrap { max-height: none; min-height: 0; height: auto; }
.da-notes { margin: 10px 0 0; padding-left: 20px; font-size: 13.5px; color: var(--body-text-color-subdued); }
.da-scroll { overflow-x: auto; width: 0; min-width: 100%; }  /* its width is not the page's */
.da-scroll { margin-top: 14px; }
.prose table.da-table, .da-scroll table.da-table, .da-scroll table.da-table thead, .da-scroll table.da-table tbody,
.da-scroll table.da-table tr { border: 0 !important; }
.da-scroll table.da-table { border-collapse: collapse; width: 100%; margin: 0; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
.da-table caption { text-align: left; color: var(--body-text-color-subdued); padding-bottom: 4px; caption-side: top; }
.da-scroll table.da-table tr > * { padding: 7px 10px; text-align: right; white-space: nowrap; border: 0;
  border-bottom: 1px solid var(--border-color-primary); background: none; }
.da-scroll table.da-table tr > *:first-child { text-align: left; padding-left: 2px; }
.da-scroll table.da-words tr > * { text-align: left; }
.da-table thead th { font-weight: 500; color: var(--body-text-color-subdued); }
.da-method h4 { margin: 0 !important; padding: 10px 12px 0; font-size: 14px; }
.da-method p { margin: 0; padding: 0 12px 10px; font-size: 13px; color: var(--body-text-color-subdued); }
:focus-visible { outline: 3px solid var(--primary-500) !important; outline-offset: 2px; }
@media (max-width: 640px) {
  .gradio-container { padding: 10px !important; }
  .da-tiles { grid-template-columns: 1fr 1fr; }
  .da-tile b { font-size: 20px; } .da-bars { gap: 1px; }
  /* Tabs above the controls, and a run at hand wherever one has scrolled to. */
  #results, #tabs { display: contents !important; }
  #tabs > .tab-wrapper { order: -1; flex-basis: 100%; }
  #tabs > [role="tabpanel"] { flex-basis: 100%; }
  .da-bar { position: fixed !important; left: 0; right: 0; bottom: 0; z-index: 40; max-height: 45vh; overflow-y: auto;
    padding: 8px 10px calc(8px + env(safe-area-inset-bottom)); background: var(--body-background-fill);
    border-top: 1px solid var(--border-color-primary); gap: 6px !important; }
  .da-bar .block.da-status { min-height: 0; }
  #explore-gallery .grid-container, #batch-gallery .grid-container { grid-template-columns: 1fr 1fr !important; }
  .gradio-container { padding-bottom: 150px !important; }
}
"""

# Gradio's image slider answers to the mouse only: here its handle takes the focus, and arrow keys move it.
HEAD = """<script>
(() => {
  const mouse = (kind, at, target) => target.dispatchEvent(
    new MouseEvent(kind, {bubbles: true, cancelable: true, view: window, clientX: at.x, clientY: at.y, button: 0}));
  const place = (handle) => {
    const box = handle.parentElement.getBoundingClientRect(), knob = handle.getBoundingClientRect();
    const x = knob.x + knob.width / 2;
    return {box, x, share: Math.round(100 * (x - box.x) / box.width)};
  };
  const move = (handle, by) => {
    const {box, x} = place(handle);
    const to = Math.min(box.right - 1, Math.max(box.x + 1, x + by * box.width)), y = box.y + box.height / 2;
    mouse("mousedown", {x, y}, handle);
    mouse("mousemove", {x: to, y}, window);
    mouse("mouseup", {x: to, y}, window);
    requestAnimationFrame(() => handle.setAttribute("aria-valuenow", place(handle).share));
  };
  const prepare = (handle) => {
    if (handle.dataset.keys) return;
    handle.dataset.keys = "yes";
    const set = {role: "slider", tabindex: "0", "aria-label": "Border between the two pictures, in percent",
      "aria-valuemin": "0", "aria-valuemax": "100", "aria-valuenow": "50"};
    for (const [name, value] of Object.entries(set)) handle.setAttribute(name, value);
    handle.addEventListener("keydown", (event) => {
      const by = {ArrowLeft: -0.05, ArrowRight: 0.05, Home: -1, End: 1}[event.key];
      if (by === undefined) return;
      event.preventDefault();
      move(handle, by);
    });
  };
  const look = () => document.querySelectorAll(".image-container [data-testid=slider]").forEach(prepare);
  new MutationObserver(look).observe(document.documentElement, {childList: true, subtree: true});
})();
</script>"""
