"""The report in a real browser: headless Chromium, opened from file://, with every network call,
console error and dialog counted."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from evaluation.report.page import write_report
from evaluation.report.runs import read_methods
from tests.conftest import needs_chromium
from tests.report_fixtures import ANIMALS, NASTY, plant, plant_shapes

pytestmark = needs_chromium

PHONE = {"width": 390, "height": 844}
GENEROUS = 60.0  # seconds on a busy machine; a frozen page takes minutes
SHOWN = "#classes > details:not([hidden])"


@pytest.fixture
def open_page(browser) -> Iterator:
    """Open a report with context settings; at the end nothing may have gone wrong on any page."""
    contexts, troubles = [], []

    def opened(report: Path, **settings):
        contexts.append(browser.new_context(**settings))
        page, here = contexts[-1].new_page(), report.as_uri()
        page.on("console", lambda message: troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (troubles.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: troubles.append(request.url))
        page.goto(here)
        troubles[:] = [x for x in troubles if x != here and not x.startswith("data:")]
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Four folders side by side, one without an audit; class names that look like markup; a set
    whose images are at hand."""
    root = tmp_path_factory.mktemp("report")
    plant(root / "exact" / "seed_0", [*ANIMALS, *NASTY])
    plant(root / "empty" / "seed_0", 8, left=0.3, trainer="ForgetLoRA")
    plant(root / "paper" / "seed_0", 8, "ToyBirds", left=0.05, harm=0.02, audit=False)
    plant_shapes(root / "mini" / "seed_0", 2, [0, 5])
    return write_report(read_methods(root), root / "report.html")


def names(page) -> list[str]:
    return page.eval_on_selector_all(SHOWN, "all => all.map(one => one.dataset.name)")


def style(page, selector: str, key: str) -> str:
    return page.eval_on_selector(selector, f"one => getComputedStyle(one).{key}")


def unfold(page) -> None:
    page.locator("details").evaluate_all("all => all.forEach(d => { d.open = true; })")


def test_it_opens_with_the_methods_and_the_worst_class_and_its_pictures(open_page, report):
    page = open_page(report)
    assert page.locator("h1").inner_text() == "ViT-B/32 was made to forget 33 classes by 4 methods."
    titles = ["Methods side by side", "All classes", "Settings"]
    assert page.locator("h2").all_inner_texts() == titles
    back = page.eval_on_selector_all(SHOWN, "all => all.map(one => 'back' in one.dataset)")
    assert back == sorted(back, reverse=True) and any(back) and len(back) == 33
    opened = page.eval_on_selector_all(SHOWN, "all => all.map(one => one.open)")
    assert opened == [True] * 3 + [False] * 30
    unfold(page)
    sizes = "all => all.map(i => Math.min(i.naturalWidth, i.width, i.height))"
    pictures = page.locator(".strip img").evaluate_all(sizes)
    assert len(pictures) == 12 and min(pictures) >= 32  # of two classes, each with two that lost
    ends = "all => all.map(one => one.getBBox()).map(box => [box.x, box.x + box.width])"
    boxes = page.locator("svg path:nth-child(2)").evaluate_all(ends)
    assert len(boxes) == 15 and all(-0.1 <= low <= high <= 100.1 for low, high in boxes)


def test_search_and_order(open_page, report):
    page = open_page(report)
    everything = names(page)
    page.fill("#search", "SUNFL")
    assert names(page) == ["sunflower"]
    assert page.locator("#status").inner_text() == "1 of 33"
    page.fill("#search", "toybirds")
    assert len(names(page)) == 8
    page.fill("#search", "")
    page.check("#back")
    assert 0 < len(names(page)) < len(everything)
    assert page.locator(f"{SHOWN}:not([data-back])").count() == 0
    page.uncheck("#back")
    for key in ("after", "harm"):
        page.select_option("#order", key)
        values = page.eval_on_selector_all(SHOWN, f"all => all.map(one => +one.dataset.{key})")
        assert values == sorted(values, reverse=True) and len(set(values)) > 5
    page.select_option("#order", "name")
    assert names(page).index("ant") < names(page).index("leopard") < names(page).index("octopus")
    page.select_option("#order", "place")
    assert names(page) == everything


def test_a_class_opens_by_mouse_and_keyboard_and_its_name_is_text(open_page, report):
    page = open_page(report)
    card = page.locator(SHOWN).nth(5)
    card.locator("summary").first.click()
    assert card.locator("table.methods").first.is_visible()
    card.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert not card.locator("table.methods").first.is_visible()
    assert style(page, ":focus", "outlineStyle") != "none"
    unfold(page)
    shown = " ".join(page.locator("main").inner_text().split())
    assert all(" ".join(name.split()) in shown for name in NASTY)
    assert page.locator("script").count() == 1
    scrolling = "all => all.filter(a => a.scrollHeight > a.clientHeight && a.tabIndex < 0).length"
    assert page.locator("pre").evaluate_all(scrolling) == 0


def test_a_phone_needs_no_sideways_scrolling(open_page, report):
    page = open_page(report, viewport=PHONE, is_mobile=True, has_touch=True)
    unfold(page)
    # innerWidth grows with what is too wide on a phone; the screen does not.
    widths = "[document.documentElement.scrollWidth, innerWidth]"
    assert max(page.evaluate(widths)) <= PHONE["width"]
    last = "all => all.map(t => t.lastElementChild.offsetTop)"
    assert len({*page.locator("table.methods").first.locator("tr").evaluate_all(last)}) == 1
    assert page.locator("nav").bounding_box()["y"] <= 4 * 28, "the head has at most four lines"
    pictures = page.locator("[data-name='red circle'] .strips").bounding_box()
    assert pictures["height"] <= PHONE["height"]


def test_print_shows_what_is_open_on_white_and_no_script_is_needed(open_page, report):
    page = open_page(report, color_scheme="dark", java_script_enabled=False)
    assert page.locator(SHOWN).count() == 33 and not page.locator("#filters").is_visible()
    page.locator(SHOWN).nth(4).locator("summary").first.click()
    assert page.locator(SHOWN).nth(4).locator("table.methods").is_visible()
    page = open_page(report, color_scheme="dark")
    assert style(page, "body", "backgroundColor") == "rgb(20, 25, 29)"
    page.emulate_media(media="print", color_scheme="dark")
    assert style(page, "body", "backgroundColor") == "rgb(255, 255, 255)"
    for hidden in ("#filters", "nav", "#settings"):
        assert style(page, hidden, "display") == "none", hidden
    tables = "all => all.every(t => t.checkVisibility() && t.offsetHeight > 0)"
    assert page.locator(f"{SHOWN} > table.methods").evaluate_all(tables), "closed classes as well"
    assert page.locator("main > ul").first.is_visible()


@pytest.mark.slow
def test_a_thousand_classes_do_not_freeze_the_page(open_page, tmp_path):
    folder = plant(tmp_path, 1000)
    report = write_report(read_methods(folder), tmp_path / "report.html")
    started = time.perf_counter()
    page = open_page(report)
    assert len(names(page)) == 1000
    page.select_option("#order", "after")
    page.fill("#search", "number 97")
    assert len(names(page)) == 11
    page.locator(SHOWN).nth(7).locator("summary").first.click()
    assert page.locator(f"{SHOWN}[open] table.methods").first.is_visible()
    assert time.perf_counter() - started < GENEROUS
