"""Pictures: the one style that all drawings of this repository share, and the audit of a class.

    with drawing("picture.png", 11, 4) as figure:
        axis = figure.subplots()
        axis.plot([1, 2, 3], color=COLOURS[0])

Matplotlib is imported when the first picture is drawn: most commands draw none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from engine.files import atomic_path, refuse_foreign
from forgetting.errors import ProblemError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can tell apart (https://jfly.uni-koeln.de).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# Dots of an accuracy before and after forgetting: hollow and filled, so grey print tells them too.
BEFORE = {"facecolors": "white", "edgecolors": COLOURS[0]}
AFTER = {"color": COLOURS[1]}
STYLE = {  # sizes that can be read where a picture is shown at half of its own
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.labelsize": 13,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 13,
    "legend.frameon": False,
    "figure.titlesize": 15,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.93",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
    "savefig.dpi": 110,
}
GENERATOR = "clip-forget picture"  # in every picture, so that nothing else is drawn over
# The formats that hold such a text, and where.
MARKS = {
    ".png": {"Software": GENERATOR},
    ".svg": {"Creator": GENERATOR},
    ".pdf": {"Creator": GENERATOR},
}
FEW = 160  # colours of a PNG: no eye sees the difference, and the file is a third as large


@contextmanager
def drawing(path: str | Path, width: float, height: float, small: bool = True) -> Iterator[Figure]:
    """An empty figure in the common style; what the body drew on it is saved, whole or not at all.

    Args:
        path: of the picture; its suffix says the format.
        width, height: inches.
        small: a PNG is reduced to a few colours, which takes a third of a second.
    """
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: works without a display and leaks nothing

    path = check_picture(path)
    marks = MARKS[path.suffix.lower()]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with atomic_path(path) as temporary:
            if small and path.suffix.lower() == ".png":
                _save_small(figure, temporary, marks)
            else:
                figure.savefig(temporary, metadata=marks)


def check_picture(path: str | Path) -> Path:
    """`path`, if a picture may be drawn there.

    Raises:
        ProblemError: a suffix of another format, or a file that is no picture of ours.
    """
    path = Path(path)
    if path.suffix.lower() not in MARKS:
        raise ProblemError(f"picture {path}: its name must end in {', '.join(MARKS)}")
    refuse_foreign(path, GENERATOR)
    return path


def _save_small(figure: Figure, path: Path, marks: dict[str, str]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    drawn, written = BytesIO(), PngInfo()
    for key, text in marks.items():
        written.add_text(key, text)
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as picture:
        few = picture.convert("RGB").quantize(FEW)
        few.save(path, format="PNG", optimize=True, pnginfo=written)


LETTERS = 44  # of a text
PROMPTS = 14  # rows of the panel of other words: the worst ones
CURVES = {
    "before": (COLOURS[0], "never forgotten"),
    "forgotten": (COLOURS[1], "forgotten"),
    "no_text": ("0.55", "no text at all"),
}


def plot_audit(name: str, found: dict[str, Any], path: str | Path) -> Path:
    """Draw the audit of one class and save it; the suffix of `path` says the format.

    Panels: its accuracy under other words, its nearest classes, the classes that its images are
    now taken for, and how many images bring it back.

    Args:
        name: the class; found: its entry under `classes` in audit.json.
    """
    panels = {"paraphrase": _words, "neighbours": _neighbours}
    panels |= {"destinations": _destinations, "relearning": _relearning}
    with drawing(path, 14, 11) as figure:
        for axis, (measure, draw) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
            if not draw(axis, found.get(measure, {})):
                axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
                axis.set_xticks([])
                axis.set_yticks([])
        figure.suptitle(name, parse_math=False)  # a class may be called $x$
    return Path(path)


# A panel each; it returns whether there was anything to draw.


def _words(axis: Axes, words: dict[str, Any]) -> bool:
    rows = [row for row in words.get("prompts", []) if row["after"]["value"] is not None]
    rows.sort(key=lambda row: (-row["after"]["value"], -row["before"]["value"]))
    more = f" (worst of {len(rows)})" if len(rows) > PROMPTS else ""
    axis.set_title(f"found under other words, %{more}")
    rows = rows[:PROMPTS]
    return _dumbbells(axis, [shorten(row["text"], LETTERS, placeholder="…") for row in rows], rows)


def _neighbours(axis: Axes, near: dict[str, Any]) -> bool:
    axis.set_title("found of its nearest classes, %")
    rows = [row for row in near.get("classes", []) if row["before"]["value"] is not None]
    return _dumbbells(axis, [row["name"] for row in rows], rows)


def _dumbbells(axis: Axes, names: list[str], rows: list[dict[str, Any]]) -> bool:
    """One line a row, from before to after, with the 95 % interval of after."""
    if not rows:
        return False
    places = range(len(rows))
    sides = {side: [100 * row[side]["value"] for row in rows] for side in ("before", "after")}
    low, high = ([100 * row["after"][end] for row in rows] for end in ("low", "high"))
    axis.hlines(places, sides["before"], sides["after"], color="0.8", zorder=1)
    axis.hlines(places, low, high, alpha=0.35, linewidth=5, zorder=2, **AFTER)
    for order, (side, dot) in enumerate({"before": BEFORE, "after": AFTER}.items(), start=3):
        axis.scatter(sides[side], places, s=34, zorder=order, label=side, **dot)
    axis.set_yticks(places, names, parse_math=False)
    axis.invert_yaxis()
    axis.set_xlim(-4, 104)
    axis.legend()
    return True


def _destinations(axis: Axes, destinations: dict[str, Any]) -> bool:
    axis.set_title("what its images are taken for, %")
    rows = destinations.get("after", [])
    places = range(len(rows))
    axis.barh(places, [100 * row["share"] for row in rows], color=COLOURS[5])
    axis.set_yticks(places, [row["name"] for row in rows], parse_math=False)
    axis.invert_yaxis()
    return bool(rows)


def _relearning(axis: Axes, relearned: dict[str, Any]) -> bool:
    axis.set_title("found once n images were shown, %")
    curves = relearned.get("methods", {}).get("cache")
    if not curves:
        return False
    shots = relearned["shots"]
    for key, (colour, label) in CURVES.items():
        values = [point["value"] for point in curves[key]]
        heights = [float("nan") if value is None else 100 * value for value in values]
        if any(value is not None for value in values):
            axis.plot(shots, heights, "o-", color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(shots, shots)
    axis.set_xlabel("images")
    axis.set_ylim(-4, 104)
    axis.legend()
    return True
