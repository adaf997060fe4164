"""The page in a real browser: what people do, in the order in which they do it. Console errors fail every test."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_server import WORKING, Visitor, find_chromium, serving
from PIL import Image

from diffaccel.files import metadata

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(tmp_path_factory, tiny_folder) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("page"), "--allow", str(tiny_folder.parent)) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, address) -> Iterator[Callable[..., Visitor]]:
    visitors: list[Visitor] = []

    def come(**context: object) -> Visitor:
        visitors.append(Visitor(browser, address, **context))
        return visitors[-1]

    yield come
    for visitor in visitors:
        visitor.leave()


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def stock(prompt: str, seed: int, steps: int) -> bytes:
    """What the stock pipeline draws."""
    import torch

    import diffaccel
    from diffaccel.loading import default_guidance

    pipe = diffaccel.load_miniature()
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": steps, "guidance_scale": default_guidance("shapes-sd")}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0].convert("RGB").tobytes()


def beneath(page: Any, upper: str, lower: str) -> bool:
    """Whether one part of the page begins where another one ends."""
    first, second = page.locator(upper).first.bounding_box(), page.locator(lower).bounding_box()
    assert first
    assert second
    return first["y"] + first["height"] <= second["y"]


def test_a_full_compare(visit, tmp_path):
    visitor = visit()
    visitor.type("prompt", "a blue circle")
    visitor.type("seed", "7")
    visitor.type("steps", "12")
    visitor.run("compare")
    assert re.search(r"\d\.\d\dx to \d\.\d\dx .*in 3 rounds", visitor.text("compare-figures"))
    assert "PSNR to plain" in visitor.text("compare-figures")
    assert "12 evaluations" in visitor.text("compare-steps")
    bars = visitor.page.locator("#compare-steps .da-bars").nth(1).locator("i")
    kinds = [bar.get_attribute("class") for bar in bars.all()]
    assert len(kinds) == 12
    assert kinds.count("da-full") == 5  # of 12: 0, 3, 6, 9 and the last
    plain = visitor.download("download-plain", tmp_path)
    fast = visitor.download("download-accelerated", tmp_path)
    assert pixels(plain) == stock("a blue circle", 7, 12)
    assert pixels(fast) != pixels(plain)
    found = metadata.read(fast)
    assert found.parameters["Prompt"] == "a blue circle"
    assert found.parameters["Seed"] == "7"
    assert found.diffaccel["recipe"]["name"] == "balanced"
    assert metadata.read(plain).diffaccel["recipe"]["methods"] == []


def test_the_slider_moves_by_mouse_and_by_keyboard(visit):
    visitor = visit()
    visitor.type("steps", "2")
    visitor.run("compare")
    handle = visitor.page.get_by_role("slider", name="Border between the two pictures")
    second = visitor.page.locator("#compare-slider img").nth(1)
    assert "50%" in second.get_attribute("style")
    handle.focus()
    handle.press("ArrowRight")
    visitor.page.wait_for_function("document.activeElement.getAttribute('aria-valuenow') === '55'")
    assert "50%" not in second.get_attribute("style")
    box = handle.bounding_box()
    visitor.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    visitor.page.mouse.down()
    visitor.page.mouse.move(box["x"] - 150, box["y"] + box["height"] / 2, steps=4)
    visitor.page.mouse.up()
    assert handle.bounding_box()["x"] < box["x"] - 50


def test_cancel_in_the_middle_and_run_again(visit, tmp_path):
    visitor = visit()
    visitor.type("steps", "100")
    visitor.press("compare-run")
    visitor.wait("compare-status", "plain")
    visitor.page.wait_for_function(r"/[2-9]\/800/.test(document.querySelector('#compare-status').innerText)")
    assert beneath(visitor.page, "#compare-status .wrap", "#compare-warm")
    visitor.press("compare-cancel")
    visitor.wait("compare-status", "Cancelled after")
    done = int(re.search(r"after (\d+) of 800", visitor.text("compare-status"))[1])
    assert 0 < done < 600
    visitor.type("steps", "3")
    visitor.run("compare")
    assert pixels(visitor.download("download-plain", tmp_path)) == stock("a red square", 0, 3)


def test_two_visitors_at_once_do_not_mix(visit, tmp_path):
    first, second = visit(), visit()
    first.type("prompt", "a red circle")
    second.type("prompt", "a green star")
    for visitor, seed in ((first, "1"), (second, "2")):
        visitor.type("seed", seed)
        visitor.type("steps", "3")
    first.press("compare-run")
    second.press("compare-run")
    for visitor, prompt, seed in ((first, "a red circle", 1), (second, "a green star", 2)):
        visitor.wait("compare-status", "Done")
        path = visitor.download("download-plain", tmp_path)
        assert metadata.read(path).parameters["Prompt"] == prompt
        assert pixels(path) == stock(prompt, seed, 3)


def test_wrong_inputs_are_sentences(visit):
    visitor = visit()
    visitor.type("steps", "2")
    visitor.type("prompt", " ")
    visitor.run("compare", "Write a prompt first")
    visitor.type("prompt", "a red square")
    visitor.wait_silence("compare-status")  # it is right no longer
    visitor.type("seed", "1.7")
    visitor.run("compare", "Seed: input should be a valid integer")
    visitor.type("seed", "1")
    visitor.open("Size and guidance")
    visitor.type("width", "100")
    visitor.run("compare", "Give both width and height")
    visitor.type("height", "100")
    visitor.run("compare", "sides must be multiples of")
    visitor.type("width", "")
    visitor.type("height", "")
    visitor.type("model", "/etc")
    visitor.page.locator("#model input").press("Enter")
    visitor.run("compare", "no model this page may load")
    visitor.choose("model", "shapes-sd")
    visitor.open("Methods and their settings")
    visitor.switch("Forecast")
    visitor.wait("recipe-message", "skip_cache and forecast both replace")
    visitor.run("compare", "skip_cache and forecast both replace")
    visitor.switch("Skip cache", on=False)
    visitor.switch("Forecast", on=False)
    visitor.switch("Region sampling")
    visitor.wait("recipe-message", "works on diffusion transformers")
    visitor.run("compare", "works on diffusion transformers")
    visitor.switch("Region sampling", on=False)
    visitor.switch("Step schedule")
    visitor.type("field-step_schedule-fraction", "0.5")
    visitor.wait("recipe-message", "fraction=0.5")
    visitor.run("compare")  # and all is well again
    assert "1 evaluations" in visitor.text("compare-steps")


def test_each_refusal_has_its_own_sentence(visit):
    """What gradio refused by itself left the sentence of the refusal before."""
    visitor = visit()
    visitor.type("prompt", "")
    visitor.run("compare", "Write a prompt first")
    visitor.type("prompt", "a red square")
    visitor.type("seed", "-3")
    visitor.run("compare", "Seed: input should be greater than or equal to 0")


def test_a_recipe_goes_out_and_comes_back(visit, tmp_path):
    visitor = visit()
    visitor.choose("preset", "fast")
    visitor.wait("recipe-message", "interval=5")
    visitor.open("Methods and their settings")
    visitor.type("field-skip_cache-interval", "4")
    visitor.wait("recipe-message", "interval=4")
    assert visitor.page.locator("#preset input").input_value() == "custom"
    visitor.open("Recipe file")
    path = visitor.download("recipe-download", tmp_path)
    data = json.loads(path.read_text())
    assert [(method["method"], method["interval"]) for method in data["methods"]] == [("skip_cache", 4)]

    other = visit()
    other.open("Recipe file")
    other.upload("recipe-upload", path)
    other.wait("recipe-message", "interval=4")
    other.open("Methods and their settings")
    assert other.page.locator("#field-skip_cache-interval input").input_value() == "4"
    (tmp_path / "bad.json").write_text('{"schema": 1, "methods": [{"method": "erase", "file": "/etc/passwd"}]}')
    other.upload("recipe-upload", tmp_path / "bad.json")
    other.page.get_by_text("erase has no switches on this page").first.wait_for()  # a toast may say it too


def test_what_stands_in_files_is_text(visit, tmp_path):
    """A picture named in a recipe was fetched from its address, by the notice that refused the recipe."""
    visitor = visit()
    evil = '<img src="http://example.com/x.png" onerror="document.title=1"> ${document.title=2} {{value}}'
    (tmp_path / "evil.json").write_text(json.dumps({"schema": 1, "methods": [{"method": evil}]}))
    visitor.open("Recipe file")
    visitor.upload("recipe-upload", tmp_path / "evil.json")
    visitor.page.locator(".toast-message-text").get_by_text(evil).first.wait_for()
    visitor.wait("recipe-message", evil)
    visitor.tab("Batch")
    short = "<img src=x> ${document.title=3} {{value}}"
    (tmp_path / "<img src=x>.txt").write_text(f"{short}\n")
    visitor.page.locator("#batch-file input[type=file]").set_input_files(tmp_path / "<img src=x>.txt")
    visitor.wait("batch-preview", short)
    assert visitor.page.title() == "diffaccel"
    assert (
        visitor.page.locator(".toast-body img, #recipe-message img, #batch-file img, #batch-preview img").count() == 0
    )
    # even what became an element is not fetched
    assert (
        visitor.page.evaluate(
            """() => new Promise((done) => {
            const image = new Image();
            document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
            image.src = "http://127.0.0.1:9/x.png";
        })"""
        )
        == "img-src"
    )
    assert all("x.png" in error and "Content Security Policy" in error for error in visitor.errors)
    visitor.errors.clear()


def test_erase_applies_to_one_visitor_and_can_be_undone(visit, tmp_path):
    from playwright.sync_api import expect

    visitor, other = visit(), visit()
    for each in (visitor, other):
        each.type("prompt", "a red circle")
        each.type("steps", "4")
    visitor.tab("Erase")
    for button in ("erase-apply", "erase-undo"):  # nothing to apply, nothing to undo
        assert visitor.page.locator(f"#{button}").is_disabled()
    visitor.run("erase", "Name at least one concept")
    visitor.type("concepts", "star")
    visitor.wait("erase-hint", "does not mention star")
    visitor.type("concepts", "circle")
    visitor.wait("erase-hint", "Nothing is named under Keep")
    expect(visitor.page.locator("#erase-hint")).not_to_contain_text("does not mention", timeout=WORKING)
    visitor.type("anchor", "square")
    visitor.run("erase")
    assert "circle" in visitor.text("erase-figures")
    edit = visitor.download("erase-download", tmp_path)
    assert edit.suffix == ".safetensors"
    assert edit.stat().st_size > 1000

    def plain(each: Visitor) -> bytes:
        each.tab("Compare")
        each.run("compare")
        return pixels(each.download("download-plain", tmp_path))

    untouched = stock("a red circle", 0, 4)
    assert plain(visitor) == untouched  # computed, not applied
    visitor.tab("Erase")
    visitor.press("erase-apply")
    visitor.wait("erase-state", "Applied: all tabs")
    visitor.page.locator("#erase-apply:disabled").wait_for()
    assert plain(visitor) != untouched
    assert plain(other) == untouched
    visitor.tab("Erase")
    visitor.press("erase-undo")
    visitor.wait("erase-state", "Computed, not applied")
    assert plain(visitor) == untouched


def test_explore_draws_a_grid_and_a_plot(visit):
    visitor = visit(color_scheme="dark")
    visitor.type("steps", "4")
    visitor.tab("Explore")
    visitor.choose("explore-first", "Step schedule: fraction")
    visitor.type("explore-first-values", "0.5, 2")
    visitor.run("explore", "less than or equal to 1")
    visitor.type("explore-first-values", "0.5, 0.75")
    visitor.run("explore")
    visitor.wait_for_pictures("explore-gallery", 3)
    assert "fraction=0.75" in visitor.text("explore-figures")
    plot = visitor.page.locator("#explore-plot img")
    plot.wait_for()
    assert plot.evaluate("image => image.naturalWidth") > 300
    with Image.open(io.BytesIO(plot.screenshot())) as shown:  # its file is white
        assert int(shown.convert("L").resize((1, 1)).getpixel((0, 0))) < 100


def test_a_batch_is_checked_watched_and_downloaded(visit, tmp_path):
    visitor = visit()
    visitor.type("steps", "3")
    visitor.tab("Batch")
    bad, good = tmp_path / "bad.csv", tmp_path / "good.txt"
    bad.write_text("prompt,seed\na red square,1\na blue circle,minus\n")
    good.write_text("a red square\na blue circle\na green star\n")
    choose = visitor.page.locator("#batch-file input[type=file]")
    choose.set_input_files(bad)
    visitor.wait("batch-preview", "row 2: seed")
    visitor.run("batch", "1 problem in the list")
    assert not visitor.page.locator("#prompt").is_visible()  # rows have their own
    visitor.page.locator("#batch-file").get_by_label("Remove").or_(
        visitor.page.locator("#batch-file").get_by_label("Clear")
    ).first.click()
    choose.set_input_files(good)
    visitor.wait("batch-preview", "3 rows, all valid")
    visitor.type("seed", "5")
    visitor.page.locator("#batch-preview tr", has_text="a green star").get_by_text("7", exact=True).wait_for()
    visitor.run("batch", "Done: 3 of 3 pictures")
    visitor.wait_for_pictures("batch-gallery", 3)
    visitor.wait("batch-gallery", "2: a blue circle")
    with zipfile.ZipFile(visitor.download("batch-download", tmp_path)) as archive:
        pictures = sorted(name for name in archive.namelist() if name.endswith(".png"))
        (tmp_path / "second.png").write_bytes(archive.read(pictures[1]))
    assert metadata.read(tmp_path / "second.png").parameters["Seed"] == "6"


def test_a_batch_can_be_cancelled_and_keeps_what_it_has(visit, tmp_path):
    visitor = visit()
    visitor.tab("Batch")
    (tmp_path / "many.txt").write_text("".join(f"a red square {i}\n" for i in range(200)))
    visitor.page.locator("#batch-file input[type=file]").set_input_files(tmp_path / "many.txt")
    visitor.wait("batch-preview", "200 rows, all valid")
    visitor.press("batch-run")
    visitor.page.wait_for_function(r"/[1-9]\d*\/200/.test(document.querySelector('#batch-status').innerText)")
    visitor.press("batch-cancel")
    visitor.wait("batch-status", "pictures are complete")
    assert 0 < int(re.search(r"(\d+) of 200", visitor.text("batch-status"))[1]) < 200


def test_every_control_has_a_name_and_the_keyboard_reaches_the_result(visit):
    visitor = visit()
    visitor.type("steps", "2")
    nameless = visitor.page.evaluate(
        """() => [...document.querySelectorAll('input, textarea, select, button')]
        .filter((e) => e.offsetParent !== null)
        .filter((e) => ![...(e.labels || [])].some((l) => l.innerText.trim()) && !e.getAttribute('aria-label')
          && !e.getAttribute('aria-labelledby') && !e.innerText.trim() && !e.title)
        .map((e) => e.outerHTML.slice(0, 120))"""
    )
    assert nameless == []
    visitor.page.locator("#prompt textarea").focus()
    for _ in range(60):
        visitor.page.keyboard.press("Tab")
        if visitor.page.evaluate("document.activeElement.id") == "compare-run":
            break
    visitor.page.keyboard.press("Enter")
    visitor.wait("compare-status", "Done")


def test_a_phone_needs_no_sideways_scrolling(browser, address):
    from playwright.sync_api import expect

    context = browser.new_context(viewport={"width": 375, "height": 700}, color_scheme="dark")
    page = context.new_page()
    page.goto(address)
    expect(page.locator("#recipe-message")).to_contain_text("skip_cache", timeout=WORKING)
    for part in (page.get_by_role("tab", name="Explore"), page.locator("#compare-run")):
        box = part.bounding_box()
        assert box
        assert box["y"] + box["height"] <= 700  # in sight before anything is scrolled
    page.locator("#steps input").first.fill("2")
    assert page.locator("#compare-cancel").evaluate("button => getComputedStyle(button).opacity") == "0.6"
    page.locator("#compare-run").click()
    expect(page.locator("#compare-status")).to_contain_text("Done", timeout=WORKING)
    expect(page.locator("#compare-slider")).to_be_in_viewport(timeout=WORKING)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert page.evaluate("document.body.classList.contains('dark')")
    context.close()
