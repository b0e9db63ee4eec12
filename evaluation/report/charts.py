"""The charts of the page: for each quantity a line per method, with a dot per class."""

from evaluation.report.runs import Method
from evaluation.report.summary import CHANGES, COLUMNS, cell

GOLDEN = 0.6180339887  # spreads dots of one value evenly, however many they are
DRAWN = ("after", "worst", "rest", "others")
Line = tuple[str, str, float, str]


def charts(methods: list[Method]) -> list[tuple[str, list[float], list[Line]]]:
    """Of each quantity that was measured: a title, where an axis from 0 to 100 begins and ends, and
    where its 0 is; and for each method its label, its mean in words and on the axis, and an SVG
    path with a dot for every class."""
    drawn = []
    for quantity in DRAWN:
        measured = [method for method in methods if method.values(quantity)]
        values = [0.0, *(x for method in measured for x in method.values(quantity))]
        low, high = (min(values), max(values)) if quantity in CHANGES else (0.0, 100.0)
        scale = 100 / (high - low or 1)
        lines = []
        for method in measured:
            dots = enumerate(sorted(method.values(quantity)))
            path = (f"M{scale * (x - low):.1f} {i * GOLDEN % 0.8 + 0.1:.2f}h0" for i, x in dots)
            mean = scale * (method.mean(quantity)[0] - low)
            lines.append((method.label, cell(method, quantity)[0], mean, "".join(path)))
        if lines:
            drawn.append((COLUMNS[quantity], [low, high, -scale * low], lines))
    return drawn
