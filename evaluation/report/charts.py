"""The charts of the page: Vega-Lite drawings in JSON, made into SVG when the report is written.

Static SVG needs no script. Colours are the names of the page's own (style.css), so that they follow
it into the dark.
"""

from __future__ import annotations

import json
from textwrap import wrap
from typing import Any, NamedTuple

from markupsafe import Markup

from evaluation.report.runs import Method, Run, methods
from forgetting.errors import ProblemError

WIDTH = 310  # pixels; the page gives a chart as much room as there is
STEP = 46  # of a method
LINE = 16  # of its name
GOLDEN = 0.6180339887  # places dots of one value beside each other, evenly however many they are
WHOLE, LOSS = 100, -1  # what a fraction, and a gain in points, is drawn as
EDGE = 0.12  # of an axis, which half a number takes
LEAST = 1.0  # points that an axis spans; hundredths would make noise look like a finding
LETTERS = 22  # of a line of a method's name
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


PANELS = (  # title, what the axis says, a quantity, and what it is drawn times
    (
        "How much is left of each class",
        "% of its images recognised after forgetting",
        "after",
        WHOLE,
    ),
    (
        "How much comes back under other words",
        "% of its images, by the words that find most",
        "worst",
        WHOLE,
    ),
    ("What the rest of its set lost", "points; left of 0 is a gain", "rest", LOSS),
    ("What the other image sets lost", "points; left of 0 is a gain", "others", LOSS),
)


class Chart(NamedTuple):
    """One message: its title, what a dot is, and the drawing."""

    title: str
    about: str
    svg: Markup


def charts(runs: list[Run]) -> list[Chart]:
    """What is left of each class, and what all else lost: a line a method, a dot a class.

    Quantities that were not measured for any class have no chart. Of several seeds a dot is the
    class's mean, and a bar leads as far to both sides as their means over classes deviate.
    """
    told = methods(runs)
    return [chart for chart in (_chart(told, *panel) for panel in PANELS) if chart]


def _chart(told: list[Method], title: str, axis: str, quantity: str, scale: int) -> Chart | None:
    """One panel of the values times `scale`; their axis ends at 0 and 100 for WHOLE, else where
    they do."""
    found = {method.label: scale * method.classes[quantity].dropna() for method in told}
    dots = [
        {"method": label, "value": round(value, 3), "place": i * GOLDEN % 1}
        for label, values in found.items()
        for i, value in enumerate(sorted(values))
    ]
    if not dots:
        return None
    means = []
    for method in told:
        mean, deviation = method.means[quantity], method.means[f"std_{quantity}"]
        if mean is not None:
            value, spread = scale * mean, abs(scale) * (deviation or 0.0)
            said = f"{round(value, 1) + 0.0:.1f}".replace("-", "−")
            said += f" ± {spread:.1f}" if deviation is not None else ""
            bar = {"from": value - spread, "to": value + spread}
            means.append({"method": method.label, "value": value, "label": said} | bar)
    low, high = (pick(dot["value"] for dot in dots) for pick in (min, max))
    ends = [0, WHOLE] if scale == WHOLE else [min(0, low), max(high, min(0, low) + LEAST)]
    for one in means:  # numbers at an end of the axis stand on this side of it
        place = (one["value"] - ends[0]) / (ends[1] - ends[0])
        one["align"] = "left" if place < EDGE else "right" if place > 1 - EDGE else "center"
    names = [one["method"] for one in means]
    lines = {name: wrap(name, LETTERS) or [""] for name in names}
    x = {"field": "value", "type": "quantitative", "title": axis}
    x |= {"scale": {"domain": ends, "nice": True, "clamp": True}, "axis": {"tickCount": 5}}
    y = {"field": "method", "type": "nominal", "sort": names, "title": None}
    y |= {"axis": {"labelLimit": 0, "labelColor": "var(--ink)", "labelFontSize": 13}}
    text = f"({json.dumps(lines)})[datum.label]"
    y["axis"] |= {"labelExpr": text, "labelLineHeight": LINE, "labelOffset": _centred(text, lines)}
    colour = {"field": "method", "scale": {"domain": names, "range": COLOURS}, "legend": None}
    offset = {"field": "place", "type": "quantitative", "scale": {"domain": [-0.9, 1.5]}}
    dot = {"type": "circle", "size": 34, "opacity": 0.55 if len(dots) < 300 else 0.25}
    number = {"type": "text", "baseline": "bottom", "fontSize": 12, "fontWeight": "bold"}
    number |= {"dy": -11, "align": {"expr": "datum.align"}}
    tick = {"type": "tick", "thickness": 3, "size": 20}
    bar = {"x": x | {"field": "from"}, "x2": {"field": "to"}}
    at = {"x": x, "y": y, "color": colour}
    ink = {"color": {"value": "var(--ink)"}}
    label = {"text": {"field": "label", "type": "nominal"}}
    spec = {
        "width": WIDTH,
        "height": {"step": max([STEP, *(LINE * (1 + len(each)) for each in lines.values())])},
        "config": CONFIG,
        "layer": [
            {"data": {"values": dots}, "mark": dot, "encoding": at | {"yOffset": offset}},
            {"data": {"values": means}, "mark": tick, "encoding": at | ink},
            {"data": {"values": means}, "mark": number, "encoding": at | ink | label},
            {"data": {"values": means}, "mark": "rule", "encoding": at | ink | bar},
        ],
    }
    said = "; ".join(f"{one['method']} {one['label']}" for one in means)
    return Chart(title, f"{title}, {axis}. On average: {said}.", drawing(spec))


def _centred(text: str, lines: dict[str, list[str]]) -> dict[str, Any]:
    """The offsets of labels of several lines, which Vega draws from the first line down; `text`:
    the expression of a label's lines."""
    return {
        "value": 0,
        "condition": [
            {"test": f"length({text}) == {count}", "value": -LINE * (count - 1) / 2}
            for count in sorted({len(each) for each in lines.values()})
        ],
    }


def drawing(spec: dict[str, Any]) -> Markup:
    """A Vega-Lite drawing as SVG that stands in a page: no script, no address, no fixed size.

    Raises:
        ProblemError: vl-convert-python is not installed.
    """
    try:
        import vl_convert  # not above: it brings an engine of 30 MB, and who reads rows needs none
    except ImportError as error:
        raise ProblemError("the report's charts need vl-convert-python; pip install it") from error
    svg = vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
    head, body = svg.split(">", 1)
    box = next(part for part in head.split('" ') if part.startswith("viewBox="))
    return Markup(f'<svg class="chart" {box}" aria-hidden="true">{body}')
