"""The report in a real browser: headless Chromium, opened from file://, with every network call,
console error and dialog counted."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from evaluation.report import read_runs, write_report
from tests.report_fixtures import ANIMALS, NASTY, plant, plant_sparse

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)}")

PHONE = {"width": 390, "height": 844}
GENEROUS = 20.0  # seconds; a frozen page takes minutes
ROWS = "#classes tbody tr:not([hidden])"
FIRST = f"{ROWS} th a"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser) -> Iterator:
    """Open a report with context settings; at the end nothing may have gone wrong on any page."""
    contexts, troubles = [], []

    def opened(report: Path, address: str = "", **settings):
        context = browser.new_context(**({"reduced_motion": "reduce"} | settings))
        contexts.append(context)
        page = context.new_page()
        here = report.as_uri()
        page.on("console", lambda message: troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (troubles.append("dialog"), dialog.dismiss()))
        page.on(
            "request",
            lambda request: (
                request.url.split("#")[0] != here
                and not request.url.startswith("data:")
                and troubles.append(f"request: {request.url}")
            ),
        )
        page.goto(here + address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Three folders side by side, one without an audit; class names that look like markup."""
    root = tmp_path_factory.mktemp("report")
    plant(root / "exact" / "seed_0", [*ANIMALS, *NASTY])
    plant(root / "empty" / "seed_0", 8, left=0.3)
    plant(root / "paper" / "seed_0", 8, "ToyTools", left=0.05, harm=0.02, audit=False)
    return write_report(read_runs(root, "exact"), root / "report.html")


def names(page) -> list[str]:
    return page.locator(FIRST).all_text_contents()


def column(page, index: int) -> list[float]:
    cells = page.eval_on_selector_all(ROWS, f"rows => rows.map(r => r.cells[{index}].dataset.v)")
    return [float(value) for value in cells if value != ""]


def open_class(page, name: str) -> None:
    page.get_by_role("link", name=name, exact=True).first.click()
    page.locator("#details-title", has_text=name).wait_for()
    page.locator("#details svg.chart path.mark").first.wait_for(state="attached")


def unfold(page) -> None:
    page.locator("#details details").evaluate_all("all => all.forEach(d => { d.open = true; })")


def test_it_opens_with_the_primary_folder_and_the_worst_first(open_page, report):
    page = open_page(report)
    assert page.title() == "Class forgetting: exact"
    assert len(names(page)) == len(ANIMALS) + len(NASTY)
    back = page.eval_on_selector_all(ROWS, "rows => rows.map(r => 'back' in r.dataset)")
    assert back == sorted(back, reverse=True) and any(back)
    assert page.locator("#details svg").count() == 0


@pytest.mark.parametrize("press", ["click", "Enter"])
def test_sorting_by_mouse_and_keyboard(open_page, report, press):
    page = open_page(report)
    page.select_option("#filter-run", "")
    button = page.get_by_role("button", name="Before")
    title = page.locator("#classes thead th", has=button)
    for order, reverse in (("descending", True), ("ascending", False)):
        if press == "click":
            button.click()
        else:
            button.focus()
            page.keyboard.press("Enter")
        assert title.get_attribute("aria-sort") == order
        values = column(page, 1)
        assert values == sorted(values, reverse=reverse) and len(set(values)) > 5
    assert page.locator("#classes [aria-sort]").count() == 1
    assert "ascending" in page.locator("#status").inner_text()
    for _ in range(2):  # unmeasured at the end, either way round
        page.get_by_role("button", name="Other words").click()
        words = page.eval_on_selector_all(ROWS, "rows => rows.map(r => r.cells[5].dataset.v)")
        assert words[-8:] == [""] * 8 and "" not in words[:-8]


def test_filters(open_page, report):
    page = open_page(report)
    everything = len(names(page))
    page.fill("#filter-text", "OCTO")
    assert names(page) == ["octopus"]
    assert page.locator("#status").inner_text().startswith("1 of ")
    page.fill("#filter-text", "")
    page.check("#filter-back")
    assert 0 < len(names(page)) < everything
    assert page.locator(f"{ROWS}:not([data-back])").count() == 0
    page.uncheck("#filter-back")
    page.select_option("#filter-run", "")
    page.select_option("#filter-dataset", "ToyTools")
    assert len(names(page)) == 8
    page.fill("#filter-text", "nothing is called that")
    assert names(page) == []


def test_details_come_on_demand_with_charts_and_their_numbers(open_page, report):
    page = open_page(report)
    open_class(page, "ant")
    assert page.evaluate("document.activeElement.id") == "details"
    assert page.url.endswith(page.locator("tr[aria-current]").get_attribute("id"))
    measures = page.eval_on_selector_all(
        "#details [data-measure]", "parts => parts.map(part => part.dataset.measure)"
    )
    assert len(measures) == 9
    charts = page.locator("#details svg.chart")
    assert charts.count() == 1 + 1 + 1 + 2 + 4 + 2
    assert charts.evaluate_all("all => all.every(c => c.role === 'img' && c.ariaLabel.length > 20)")
    drawn = "all => all.every(f => f.querySelector('svg') && f.querySelector('details table'))"
    assert page.locator("#details figure").evaluate_all(drawn)
    assert "Proved optimal" in page.locator("[data-measure=certificate]").inner_text()
    rows = page.get_by_role("region", name="The class in every folder").locator("tbody tr")
    assert rows.count() == 2
    rows.get_by_role("link", name="empty").click()
    assert "empty" in page.locator("#details .lead").inner_text()
    page.go_back()
    page.locator("#details .lead", has_text="exact").wait_for()
    page.get_by_role("button", name="Back to the table").click()
    assert page.evaluate("document.activeElement.textContent") == "ant"


def test_previous_and_next_follow_the_table(open_page, report):
    page = open_page(report)
    order = names(page)
    open_class(page, order[0])
    assert page.get_by_role("button", name="Previous class").is_disabled()
    page.get_by_role("button", name="Next class").click()
    assert page.locator("#details-title").inner_text() == order[1]


def test_a_link_to_a_class_opens_it(open_page, report):
    page = open_page(report, "#r3")
    assert page.locator("#details-title").inner_text() == page.locator("#r3 th a").inner_text()


def test_a_point_of_the_frontier_opens_its_class(open_page, report):
    page = open_page(report)
    point = page.locator("svg.frontier [data-row]").nth(4)
    name = page.locator(f"#r{point.get_attribute('data-row')} th a").text_content()
    point.dispatch_event("click")
    assert page.locator("#details-title").text_content() == name


def test_names_that_look_like_markup_are_text(open_page, report):
    page = open_page(report)
    scripts = page.locator("script").count()
    for name in NASTY:
        row = page.locator("#classes tbody tr").filter(has=page.get_by_text(name, exact=True))
        row.locator("th a").first.click()
        assert page.locator("#details-title").text_content() == name
        page.locator("#details svg.chart path.mark").first.wait_for(state="attached")
    assert page.locator("script").count() == scripts and page.locator("img").count() == 0


def test_a_phone_needs_no_sideways_scrolling(open_page, report):
    page = open_page(report, viewport=PHONE, is_mobile=True, has_touch=True)
    # innerWidth grows with what is too wide on a phone; the screen does not.
    fits = f"Math.max(document.documentElement.scrollWidth, innerWidth) <= {PHONE['width']}"
    assert page.evaluate(fits)
    for name in ("ant", next(name for name in NASTY if len(name) > 100)):
        open_class(page, name)
        unfold(page)
        assert page.evaluate(fits), name
    small = "all => all.filter(t => parseFloat(getComputedStyle(t).fontSize) < 11).length"
    assert page.locator("#details svg text").evaluate_all(small) == 0


def test_print_shows_the_open_class_on_white(open_page, report):
    page = open_page(report, color_scheme="dark")
    open_class(page, "ant")
    page.emulate_media(media="print", color_scheme="dark")
    style = "(selector, key) => getComputedStyle(document.querySelector(selector))[key]"

    def styled(selector: str, key: str) -> str:
        return page.evaluate(f"([s, k]) => ({style})(s, k)", [selector, key])

    assert styled("body", "backgroundColor") == "rgb(255, 255, 255)"
    for hidden in (".filters", "nav", ".bar-of-buttons", ".skip", "#details .numbers"):
        assert styled(hidden, "display") == "none", hidden
    assert styled("#classes thead th", "position") == "static"
    assert styled("#classes tbody th", "position") == "static"
    assert styled(".scroll.tall", "maxHeight") == "none"
    assert page.locator("#details-title").is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_without_javascript_the_table_and_the_chart_are_there(open_page, report):
    page = open_page(report, java_script_enabled=False)
    rows = page.locator("#classes tbody tr")
    assert rows.count() == len(ANIMALS) + len(NASTY) + 16
    assert rows.last.is_visible() and page.locator("svg.frontier").is_visible()
    assert not page.locator("#filters").is_visible() and page.locator("button").count() == 0
    assert "need JavaScript" in page.locator("noscript").inner_text()


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const over = (colour, under) => {
    canvas.fillStyle = `rgb(${under})`; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((m, n) => n - m);
    return (x + 0.05) / (y + 0.05); };
  const ground = (node) => node ? over(getComputedStyle(node).backgroundColor,
    ground(node.parentElement)) : [255, 255, 255];
  const bad = [];
  const check = (node, colour, under, least) => {
    const found = ratio(over(colour, under), under);
    if (found < least) bad.push(`${found.toFixed(2)} ${node.outerHTML.slice(0, 90)}`);
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let texts = 0;
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    const hidden = !node.checkVisibility() || node.closest("title, desc, script, style, noscript");
    if (hidden || !walk.currentNode.textContent.trim() || node.disabled) continue;
    texts += 1;
    const style = getComputedStyle(node);
    const svg = node instanceof SVGElement;
    const cell = node.classList.contains("count") ? node.previousElementSibling : null;
    const under = cell ? over(getComputedStyle(cell).fill, ground(node)) : ground(node);
    check(node, svg ? style.fill : style.color, under, 4.5);
  }
  for (const node of document.querySelectorAll(".chart .mark, .chart .line, .chart .points path, .chart .whisker, .chart .way, input, select"))
    check(node, getComputedStyle(node)[node.closest("svg") ? "stroke" : "borderTopColor"],
      ground(node), 3);
  for (const node of document.querySelectorAll(".chart .bar, .chart .mean"))
    check(node, getComputedStyle(node).fill, ground(node), 3);
  return {texts, bad};
}"""  # noqa: E501 (a selector)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_texts_and_charts(open_page, report, scheme):
    """WCAG AA: 4.5 to 1 for every text, in a chart's cell too; 3 to 1 for marks and fields."""
    page = open_page(report, color_scheme=scheme)
    open_class(page, "ant")
    unfold(page)
    page.evaluate("document.querySelector('rect.cell').style.setProperty('--share', 1)")
    found = page.evaluate(CONTRAST)
    assert found["texts"] > 1000 and found["bad"] == []
    backgrounds = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (backgrounds == "rgb(255, 255, 255)") == (scheme == "light")


def test_keyboard_and_motion(open_page, report):
    page = open_page(report)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "filter-text"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    behaviour = "getComputedStyle(document.documentElement).scrollBehavior"
    assert page.evaluate(behaviour) == "auto"
    scrolling = "all => all.filter(a => a.scrollWidth > a.clientWidth && a.tabIndex < 0).length"
    open_class(page, "ant")
    assert page.locator(".scroll, .drawing").evaluate_all(scrolling) == 0


def test_headings_of_details_skip_no_level(open_page, report):
    page = open_page(report)
    open_class(page, "ant")
    levels = page.eval_on_selector_all("h1, h2, h3, h4, h5", "all => all.map(h => +h.tagName[1])")
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert levels.count(5) >= 6


def test_any_measure_and_any_number_may_be_absent(open_page, tmp_path):
    names = plant_sparse(tmp_path)
    page = open_page(write_report(read_runs(tmp_path), tmp_path / "report.html"))
    for index in range(len(names)):
        page.locator(FIRST).nth(index).click()
        page.locator("#details [data-measure=certificate]").wait_for()
        unfold(page)
        page.wait_for_function("requestAnimationFrame(() => {}) > 0")
        shown = page.locator("#details").inner_text()
        assert not any(word in shown for word in ("undefined", "NaN", "[object"))
        assert page.locator("#details [data-measure]").count() == 9
        missing = page.locator("#details [data-measure]", has_text="Not measured.").count()
        assert missing >= page.locator("#details-title").inner_text().startswith("without")


def test_logs_alone(open_page, tmp_path):
    folder = plant(tmp_path, 1, audit=False)
    page = open_page(write_report(read_runs(folder), tmp_path / "report.html"))
    details = page.locator("#details").inner_text()  # the only class is open from the start
    assert "python -m evaluation.audit" in details and "Proved optimal" in details


def test_a_thousand_classes_do_not_freeze_the_page(open_page, tmp_path):
    folder = plant(tmp_path, 1000, alike=20)
    report = write_report(read_runs(folder), tmp_path / "report.html")
    started = time.perf_counter()
    page = open_page(report)
    assert len(names(page)) == 1000
    page.get_by_role("button", name="After").click()
    page.fill("#filter-text", "number 97")
    assert len(names(page)) == 11
    page.fill("#filter-text", "")
    open_class(page, "animal number 7")
    assert time.perf_counter() - started < GENEROUS
