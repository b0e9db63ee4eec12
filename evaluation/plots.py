"""Pictures of an audit: what is left of one class, in four panels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.files import atomic_path

BEFORE = {"facecolors": "white", "edgecolors": "#33638d", "label": "before"}
AFTER = {"color": "#c8553d", "label": "after"}
PROMPTS = 14  # rows of the panel of other words: the worst ones
CURVES = {
    "before": ("#33638d", "never forgotten"),
    "forgotten": ("#c8553d", "forgotten"),
    "no_text": ("0.55", "no text at all"),
}


def plot_audit(name: str, found: dict[str, Any], path: str | Path) -> Path:
    """Draw the audit of one class and save it; the suffix of `path` says the format.

    Panels: its accuracy under other words, its nearest classes, the classes that its images are
    now taken for, and how many images bring it back.

    Args:
        name: the class; found: its entry under `classes` in audit.json.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    _words(axes[0, 0], found.get("paraphrase") or {})
    _neighbours(axes[0, 1], found.get("neighbours") or {})
    _destinations(axes[1, 0], found.get("destinations") or {})
    _relearning(axes[1, 1], found.get("relearning") or {})
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="0.93")
        axis.set_axisbelow(True)
    figure.suptitle(name, parse_math=False)  # a class may be called $x$
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=85)
    return Path(path)


def _words(axis: Axes, words: dict[str, Any]) -> None:
    rows = [row for row in words.get("prompts", []) if row["after"]["value"] is not None]
    rows.sort(key=lambda row: (-row["after"]["value"], -row["before"]["value"]))
    title = "accuracy under other words, %"
    if len(rows) > PROMPTS:
        title += f" (the {PROMPTS} worst of {len(rows)})"
    rows = rows[:PROMPTS]
    _dumbbells(axis, [f"{row['text'][:34]} ({row['kind']})" for row in rows], rows, title)


def _neighbours(axis: Axes, near: dict[str, Any]) -> None:
    rows = [row for row in near.get("classes", []) if row["before"]["value"] is not None]
    _dumbbells(axis, [row["name"] for row in rows], rows, "accuracy of its nearest classes, %")


def _dumbbells(axis: Axes, names: list[str], rows: list[dict[str, Any]], title: str) -> None:
    """One line a row, from before to after, with the 95 % interval of after."""
    axis.set_title(title, fontsize=10)
    if not rows:
        _nothing(axis)
        return
    for place, row in enumerate(rows):
        before, after = (100 * row[side]["value"] for side in ("before", "after"))
        axis.hlines(place, *sorted((before, after)), color="0.8", zorder=1)
        low, high = 100 * row["after"]["low"], 100 * row["after"]["high"]
        axis.hlines(place, low, high, color=AFTER["color"], alpha=0.35, linewidth=5, zorder=2)
        only = {} if place else {"before": BEFORE["label"], "after": AFTER["label"]}
        axis.scatter(before, place, s=34, zorder=3, **BEFORE | {"label": only.get("before")})
        axis.scatter(after, place, s=34, zorder=4, **AFTER | {"label": only.get("after")})
    axis.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axis.invert_yaxis()
    axis.set_xlim(-4, 104)
    axis.legend(frameon=False, fontsize=8)


def _destinations(axis: Axes, destinations: dict[str, Any]) -> None:
    axis.set_title("what its images are taken for, % of them", fontsize=10)
    rows = destinations.get("after", [])
    if not rows:
        _nothing(axis)
        return
    places = range(len(rows))
    axis.barh(places, [100 * row["share"] for row in rows], color="#6f8fae")
    axis.set_yticks(places, [row["name"] for row in rows], fontsize=8, parse_math=False)
    axis.invert_yaxis()


def _relearning(axis: Axes, relearned: dict[str, Any]) -> None:
    axis.set_title("accuracy with n of its images in a cache on top, %", fontsize=10)
    curves = relearned.get("methods", {}).get("cache")
    if not curves:
        _nothing(axis)
        return
    for key, (colour, label) in CURVES.items():
        points = [
            (shots, 100 * point["value"])
            for shots, point in zip(relearned["shots"], curves[key], strict=False)
            if point["value"] is not None
        ]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(relearned["shots"], relearned["shots"])
    axis.set_xlabel("images")
    axis.set_ylim(-4, 104)
    axis.legend(frameon=False, fontsize=8)


def _nothing(axis: Axes) -> None:
    axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes)
    axis.set_xticks([])
    axis.set_yticks([])
