"""The charts of the page: one line per method, one dot per class, as SVG inside the page."""

from __future__ import annotations

import re
from io import BytesIO
from textwrap import fill
from typing import NamedTuple

from markupsafe import Markup

from evaluation.plots import COLOURS, STYLE
from evaluation.report.runs import Method

GOLDEN = 0.6180339887  # spreads dots of one value evenly, however many they are
LETTERS = 22  # of a line of a method's name
PANELS = (  # title, what the axis says, a quantity, and what it is multiplied by
    ("Left of each class", "% of its images recognised after forgetting", "after", 100),
    ("Under the other words that find most", "% of its images recognised", "worst", 100),
    ("Change on the rest of its set", "points; left of 0 is a loss", "rest", 1),
    ("Change on the other image sets", "points; left of 0 is a loss", "others", 1),
)
# Colours of the page (style.css), so that charts follow it into the dark.
PAGE = {colour: f"var(--m{i})" for i, colour in enumerate(COLOURS[:5])}
PAGE |= {"#010101": "var(--ink)", "#020202": "var(--muted)", "#030303": "var(--line)"}


class Chart(NamedTuple):
    """A drawing with its title, and what it says in words."""

    title: str
    about: str
    svg: Markup


def charts(methods: list[Method]) -> list[Chart]:
    """What is left of each class, and what all else lost; measured quantities only.

    With several seeds a dot is the class's mean, and a bar spans the standard deviation of the
    seeds' means.
    """
    return [
        _chart(measured, *panel)
        for panel in PANELS
        if (measured := [method for method in methods if method.of_classes(panel[2])])
    ]


def _chart(methods: list[Method], title: str, axis_text: str, quantity: str, scale: int) -> Chart:
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: works without a display

    labels = [fill(method.label, LETTERS) for method in methods]
    lines = [1 + label.count("\n") for label in labels]
    texts = []
    settings = {"svg.fonttype": "none", "svg.hashsalt": title, "axes.grid": False}
    with matplotlib.rc_context({**STYLE, **settings}):
        figure = Figure(
            figsize=(6, 0.9 + sum(0.35 + 0.25 * n for n in lines)), layout="constrained"
        )
        axis = figure.subplots()
        for row, (method, label) in enumerate(zip(methods, labels, strict=True)):
            values = sorted(scale * value for value in method.of_classes(quantity))
            heights = [row + 0.5 * (i * GOLDEN % 1) - 0.25 for i in range(len(values))]
            colour = COLOURS[row % 5]
            axis.scatter(values, heights, s=22, color=colour, alpha=0.55, linewidths=0)
            mean, deviation = (None if x is None else scale * x for x in method.mean(quantity))
            text = f"{round(mean, 1) + 0.0:.1f}".replace("-", "−")
            if deviation is not None:
                text += f" ± {deviation:.1f}"
                axis.plot([mean - deviation, mean + deviation], [row, row], color="#010101")
            axis.plot([mean, mean], [row - 0.3, row + 0.3], color="#010101", linewidth=3)
            axis.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center")
            texts.append(f"{label} {text}".replace("\n", " "))
        axis.set_yticks(range(len(labels)), labels, parse_math=False)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.set_xlabel(axis_text)
        if scale == 100:
            axis.set_xlim(-3, 103)
        axis.tick_params(length=0, labelcolor="#020202")
        axis.xaxis.label.set_color("#020202")
        axis.grid(axis="x", color="#030303")
        for spine in axis.spines.values():
            spine.set_visible(False)
        for text in axis.texts:
            text.set_color("#010101")
        figure.patch.set_visible(False)
        axis.patch.set_visible(False)
        written = BytesIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return Chart(
        title,
        f"{title}, {axis_text}. On average: {'; '.join(texts)}.",
        _inline(written, f"{quantity}-"),
    )


def _inline(written: BytesIO, prefix: str) -> Markup:
    """A drawing as an element of the page: its colours, no fixed size, no address."""
    svg = written.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}", svg)  # no id twice in the page
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    for colour, name in PAGE.items():
        svg = svg.replace(colour, name)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = svg.replace('xlink:href="', 'href="')
    return Markup(f'<svg class="chart" {box} aria-hidden="true">{svg[svg.index(">") + 1 :]}')
