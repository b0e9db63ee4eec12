"""The charts of the page: Vega-Lite drawings in JSON, made into SVG when the report is written.

Static SVG needs no script. Colours are the names of the page's own (style.css), so that they follow
it into the dark.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from markupsafe import Markup

from engine.errors import UserError
from evaluation.report.runs import Run
from evaluation.rows import Row, mean

WIDTH = 310  # pixels; the page gives a chart as much room as there is
STEP = 46  # of a method
GOLDEN = 0.6180339887  # places dots of one value beside each other, evenly however many they are
WHOLE, LOSS = 100, -1  # what a fraction, and a gain in points, is drawn as
LEAST = 1.0  # points that an axis spans; hundredths would make noise look like a finding
LONGEST = 22  # letters of a method's name
COLOURS = [f"var(--m{i})" for i in range(5)]
QUIET = {"labelColor": "var(--muted)", "titleColor": "var(--muted)", "labelFontSize": 12}
CONFIG = {
    "font": "inherit",
    "background": None,
    "view": {"stroke": None},
    "axis": QUIET
    | {"titleFontSize": 12, "titleFontWeight": "normal", "gridColor": "var(--line)"}
    | {"domain": False, "ticks": False, "labelPadding": 9, "labelFlush": False, "titlePadding": 10},
}


class Chart(NamedTuple):
    """One message: its title, what a dot is, and the drawing."""

    title: str
    about: str
    svg: Markup


def charts(runs: list[Run]) -> list[Chart]:
    """What is left of each class, and what all else lost: a line a method, a dot a class.

    Quantities that were not measured for any class have no chart.
    """
    panels: tuple[tuple[str, str, Callable[[Row], float | None], int], ...] = (
        (
            "How much is left of each class",
            "% of its images recognised after forgetting",
            lambda row: row.own.after,
            WHOLE,
        ),
        (
            "How much comes back under other words",
            "% of its images, by the words that find most",
            lambda row: row.worst,
            WHOLE,
        ),
        (
            "What the rest of its set lost",
            "points; left of 0 is a gain",
            lambda row: row.rest.points,
            LOSS,
        ),
        (
            "What the other image sets lost",
            "points; left of 0 is a gain",
            lambda row: row.others_mean.points,
            LOSS,
        ),
    )
    drawn = (_chart(runs, *panel) for panel in panels)
    return [chart for chart in drawn if chart]


def _chart(
    runs: list[Run], title: str, axis: str, value: Callable[[Row], float | None], scale: int
) -> Chart | None:
    """One panel of the values times `scale`; their axis ends at 0 and 100 for WHOLE, else where
    they do."""
    found = [(run, [value(row) for row in run.rows]) for run in runs]
    found = [(run, [scale * v for v in values if v is not None]) for run, values in found]
    dots = [
        {"method": run.label, "value": round(value, 3), "place": i * GOLDEN % 1}
        for run, values in found
        for i, value in enumerate(sorted(values))
    ]
    if not dots:
        return None
    means = [{"method": run.label, "value": mean(values)} for run, values in found if values]
    low, high = (pick(dot["value"] for dot in dots) for pick in (min, max))
    ends = [0, WHOLE] if scale == WHOLE else [min(0, low), max(high, min(0, low) + LEAST)]
    means = [
        {"label": f"{round(one['value'], 1) + 0.0:.1f}".replace("-", "−")} | one for one in means
    ]
    names = [run.label for run, values in found if values]
    x = {"field": "value", "type": "quantitative", "title": axis}
    x |= {"scale": {"domain": ends, "nice": True}, "axis": {"tickCount": 5}}
    y = {"field": "method", "type": "nominal", "sort": names, "title": None}
    y |= {"axis": {"labelLimit": 8 * LONGEST, "labelColor": "var(--ink)", "labelFontSize": 13}}
    colour = {"field": "method", "scale": {"domain": names, "range": COLOURS}, "legend": None}
    offset = {"field": "place", "type": "quantitative", "scale": {"domain": [-0.9, 1.5]}}
    dot = {"type": "circle", "size": 34, "opacity": 0.55 if len(dots) < 300 else 0.25}
    number = {"type": "text", "baseline": "bottom", "fontSize": 12, "fontWeight": "bold"}
    tick = {"type": "tick", "thickness": 3, "size": 20}
    at = {"x": x, "y": y, "color": colour}
    ink = {"color": {"value": "var(--ink)"}}
    label = {"text": {"field": "label", "type": "nominal"}}
    spec = {
        "width": WIDTH,
        "height": {"step": STEP},
        "config": CONFIG,
        "layer": [
            {"data": {"values": dots}, "mark": dot, "encoding": at | {"yOffset": offset}},
            {"data": {"values": means}, "mark": tick, "encoding": at | ink},
            {"data": {"values": means}, "mark": number | {"dy": -11}, "encoding": at | ink | label},
        ],
    }
    said = "; ".join(f"{one['method']} {one['label']}" for one in means)
    return Chart(title, f"{title}, {axis}. On average: {said}.", drawing(spec))


def drawing(spec: dict[str, Any]) -> Markup:
    """A Vega-Lite drawing as SVG that stands in a page: no script, no address, no fixed size.

    Raises:
        UserError: vl-convert-python is not installed.
    """
    try:
        import vl_convert  # not above: it brings an engine of 30 MB, and who reads rows needs none
    except ImportError as error:
        raise UserError("the report's charts need vl-convert-python; pip install it") from error
    svg = vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
    head, body = svg.split(">", 1)
    box = next(part for part in head.split('" ') if part.startswith("viewBox="))
    return Markup(f'<svg class="chart" {box}" aria-hidden="true">{body}')
