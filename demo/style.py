"""How the page looks: a theme on system fonts, so that nothing is fetched from elsewhere, and a little CSS."""

from __future__ import annotations

import gradio as gr

_SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def theme() -> gr.themes.Base:
    """Soft, with the project's green; light and dark."""
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
    )


CSS = """
:root { --da-full: #0f766e; --da-partial: #2dd4bf; --da-guidance: #d97706; --da-skipped: #94a3b8; }
.dark { --da-full: #14b8a6; --da-partial: #0d7a70; --da-guidance: #f59e0b; --da-skipped: #64748b; }
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
.da-notes { margin: 0; padding-left: 20px; font-size: 13.5px; color: var(--body-text-color-subdued); }
.da-scroll { overflow-x: auto; }
.da-table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
.da-table caption { text-align: left; color: var(--body-text-color-subdued); padding-bottom: 6px; }
.da-table th, .da-table td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--border-color-primary);
  white-space: nowrap; }
.da-table th:first-child { text-align: left; } .da-table thead th { font-weight: 600; }
.da-method h4 { margin: 2px 0 0; font-size: 14px; } .da-method p { margin: 0; font-size: 13px;
  color: var(--body-text-color-subdued); }
:focus-visible { outline: 3px solid var(--primary-500) !important; outline-offset: 2px; }
@media (max-width: 640px) {
  .gradio-container { padding: 10px !important; }
  .da-tile b { font-size: 20px; } .da-bars { gap: 1px; }
}
"""
