"""Pictures: the common style of all drawings, and results as three panels.

Matplotlib is imported when the first picture is drawn.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.results import split_label
from forgetting.errors import ProblemError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

# Okabe and Ito's colours, which colour-blind people can tell apart (https://jfly.uni-koeln.de).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLE = Path(__file__).with_suffix(".mplstyle")
SUFFIXES = (".png", ".svg", ".pdf")
DRAWN = 60  # rows of a picture: more would be thousands of pixels high
PANELS = {
    "class": "left of the\nforgotten class, %",
    "rest": "lost by the rest\nof its set, points",
    "others": "lost by the\nother sets, points",
}


@contextmanager
def drawing(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """An empty figure of a size in inches; what the body drew on it is saved, whole or not at all,
    in the format of the path's suffix."""
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: works without a display and leaks nothing

    from forgetting.io import write_bytes

    path, drawn = Path(path), BytesIO()
    if path.suffix.lower() not in SUFFIXES:
        raise ProblemError(f"picture {path}: its name must end in {', '.join(SUFFIXES)}")
    with matplotlib.rc_context(fname=STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(drawn, format=path.suffix[1:].lower())
    write_bytes(drawn.getvalue(), path)


def thumbnail(image: Image.Image, side: int) -> str:
    """A copy of an image of at most `side` pixels, as an address that holds it."""
    small, packed = image.copy(), BytesIO()
    small.thumbnail((side, side))
    small.convert("RGB").save(packed, "WEBP", lossless=max(small.size) < side, quality=80)
    return f"data:image/webp;base64,{b64encode(packed.getvalue()).decode()}"


def draw_results(table: pd.DataFrame, colours: dict[str, str], path: str | Path) -> Path:
    """Draw what is left of each forgotten class, and what the rest of its set and the other data
    sets lost, for the `DRAWN` rows with most left of a table of `summarise` or `compare_results`.
    `colours`: by the names in its columns `STEM NAME`, for the stems of `PANELS`. A row has a line
    for each."""
    shown = table.nlargest(DRAWN, [f"class {name}" for name in colours]).sort_index()
    row_height = 0.16 + 0.17 * len(colours)  # inches
    with drawing(path, 13, 2.0 + row_height * len(shown)) as figure:
        axes = figure.subplots(1, 3, sharey=True, width_ratios=(1.2, 1, 1))
        for axis, stem in zip(axes, PANELS, strict=True):
            _panel(axis, shown, stem, colours, row_height)
        names = shown["forgotten"].map(lambda label: ", ".join(split_label(label)))
        axes[0].set_yticks(range(len(shown)), shown["data set"] + ": " + names, parse_math=False)
        axes[0].set_ylim(len(shown) - 0.45, -0.55)  # the first row on top
        axes[2].scatter([], [], s=120, marker="|", color="0.25", label="before")
        for name, colour in colours.items():
            axes[2].scatter([], [], s=48, color=colour, label=name)
        figure.legend(loc="outside upper right", ncols=len(colours) + 1)
        if len(shown) < len(table):
            figure.suptitle(f"the {len(shown)} of {len(table):,} rows with most left of the class")
    return Path(path)


def _panel(
    axis: Axes, shown: pd.DataFrame, stem: str, colours: dict[str, str], row_height: float
) -> None:
    """One quantity of all rows: a dot for each name, and a line to it from before."""
    before, low, high = shown[f"{stem} before"], 0.0, 0.2
    for row in range(0, len(shown), 2):
        axis.axhspan(row - 0.5, row + 0.5, color="0.965", linewidth=0)
    for number, (name, colour) in enumerate(colours.items()):
        offset = 0.66 * ((number + 0.5) / len(colours) - 0.5)
        lines = [row + offset for row in range(len(shown))]
        after = shown[f"{stem} {name}"]
        values, start = (after, before) if stem == "class" else (before - after, 0 * before)
        axis.hlines(lines, start, values, linewidth=2, alpha=0.35, color=colour)
        axis.scatter(values, lines, s=48, zorder=3, clip_on=False, color=colour)
        low, high = min(low, values.min()), max(high, values.max())
    axis.set_title(PANELS[stem])
    if stem == "class":
        rows = range(len(shown))
        axis.scatter(before, rows, s=220 * row_height, marker="|", color="0.25", zorder=2)
        axis.set_xlim(-3, 103)
    else:  # losses have a scale of their own
        margin = 0.04 * (high - low)
        axis.set_xlim(low - margin, high + margin)
        axis.axvline(0, color="0.25", linewidth=1)
    axis.grid(visible=False, axis="y")
    axis.spines["left"].set_visible(False)
    axis.tick_params(left=False)
