"""The charts of the page: one line per method, one dot per class, as SVG images in the page."""

from base64 import b64encode
from io import BytesIO
from textwrap import fill

from evaluation.plots import styled_figure
from evaluation.report.runs import Method
from evaluation.report.summary import points, within

GOLDEN = 0.6180339887  # spreads dots of one value evenly, however many they are
COLOURS = ("#1d5b8f", "#b34a12", "#2c7468", "#7c4f86", "#6b7076")  # those of style.css
INK, MUTED = "#1a2127", "#55606a"
PANELS = (  # title, what the axis says, a quantity, and what it is multiplied by
    ("Left of each class", "% of its images recognised after forgetting", "after", 100),
    ("Under the other words that find most", "% of its images recognised", "worst", 100),
    ("Change on the rest of its set", "points; left of 0 is a loss", "rest", 1),
    ("Change on the other image sets", "points; left of 0 is a loss", "others", 1),
)


def charts(methods: list[Method]) -> list[tuple[str, str, str]]:
    """What is left of each class, and what all else lost; measured quantities only. Of each drawing
    its title, what it says in words, and an address that holds it.

    With several seeds a dot is the class's mean, a bar the standard deviation of the seeds' means.
    """
    return [
        _chart(measured, *panel)
        for panel in PANELS
        if (measured := [method for method in methods if len(method.of_classes(panel[2]))])
    ]


def _chart(
    methods: list[Method], title: str, axis_text: str, quantity: str, scale: int
) -> tuple[str, str, str]:
    labels = [fill(method.label, width=22) for method in methods]
    height = 0.9 + sum(0.6 + 0.25 * label.count("\n") for label in labels)
    texts, drawn = [], BytesIO()
    with styled_figure(6, height, {"svg.hashsalt": title, "axes.grid": False}) as figure:
        axis = figure.subplots()
        for row, method in enumerate(methods):
            values = (scale * method.of_classes(quantity)).sort_values()
            heights = [row + 0.5 * (i * GOLDEN % 1) - 0.25 for i in range(len(values))]
            axis.scatter(values, heights, s=22, color=COLOURS[row % 5], alpha=0.55, linewidths=0)
            average, deviation = (scale * value for value in method.mean(quantity))
            text = f"{average:.1f}" if scale == 100 else points(average)
            text = f"{text} {within(deviation)}".strip()
            axis.plot([average - deviation, average + deviation], [row, row], color=INK)
            axis.plot([average, average], [row - 0.3, row + 0.3], color=INK, linewidth=3)
            axis.text(1.02, row, text, transform=axis.get_yaxis_transform(), va="center", color=INK)
            texts.append(f"{method.label} {text}")
        axis.set_yticks(range(len(labels)), labels, parse_math=False)
        axis.set_ylim(len(labels) - 0.5, -0.5)
        axis.set_xlabel(axis_text, color=MUTED)
        if scale == 100:
            axis.set_xlim(-3, 103)
        axis.tick_params(length=0, labelcolor=MUTED)
        axis.grid(axis="x")
        axis.spines[:].set_visible(False)
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    about = f"{title}, {axis_text}. On average: {'; '.join(texts)}."
    return title, about, f"data:image/svg+xml;base64,{b64encode(drawn.getvalue()).decode()}"
