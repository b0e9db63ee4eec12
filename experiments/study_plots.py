"""A picture a study, from its rows."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # no pyplot: works without a display
from PIL import Image

from engine.files import atomic_path
from experiments.spectrum import PARTS, SIDES
from experiments.study_report import in_points
from experiments.varied import Study

COLOURS = {"lora": "#c8553d", "optimum": "#f2b134", "constrained": "#33638d"}
THICK = {"lora": 4.0}  # what the optimum's line hides without
PANELS = {
    "forgotten": "forgotten class, accuracy left (%)",
    "rest": "rest of its set, change (points)",
    "others": "other sets, change (points)",
    "carry": "carry-over to the evaluation prompt",
}
DOTS = {"s": 7, "alpha": 0.5, "linewidths": 0}  # single classes
SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # ticks
COLOURS_LEFT = 160
WIDTH = 0.24  # of a solver's column


def plot(title: str, study: Study, frame: pd.DataFrame, path: Path) -> None:
    """Draw the rows of one study on one data set as a PNG.

    A small dot is one class, a line or a large mark the mean over classes.
    """
    if study.cells:
        figure = _spectrum(frame)
    else:
        draw = _along if study.axis else _columns
        figure = Figure(figsize=(12, 3.4), layout="constrained")
        shown = in_points(frame)
        panels = zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True)
        for axis, (column, name) in panels:
            draw(axis, shown, column)
            if study.axis:
                axis.set_xlabel(study.axis, fontsize=8)
            axis.set_title(name, fontsize=8)
            _bare(axis)
        figure.axes[0].set_ylim(-4, 104)
    figure.suptitle(f"{title}: {study.about}", fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of few colours, which is a third as large; whole or not at all."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=100, format="png")
    with atomic_path(path) as temporary, Image.open(drawn) as picture:
        picture.convert("RGB").quantize(COLOURS_LEFT).save(temporary, format="PNG", optimize=True)


def _columns(axis: Axes, frame: pd.DataFrame, column: str) -> None:
    """A column a setting, side by side for the solvers."""
    settings = list(dict.fromkeys(frame["setting"]))
    solvers = [name for name in COLOURS if name in set(frame["solver"])]
    for number, solver in enumerate(solvers):
        part = frame[frame["solver"] == solver]
        shift = WIDTH * (number - (len(solvers) - 1) / 2)
        places = part["setting"].map(settings.index) + shift
        axis.scatter(places, part[column], color=COLOURS[solver], **DOTS)
        means = part.groupby("setting", sort=False)[column].mean()
        at = [settings.index(name) + shift for name in means.index]
        axis.scatter(at, means, s=90, marker="_", color=COLOURS[solver], label=solver)
    axis.set_xticks(range(len(settings)), settings, rotation=35, ha="right", fontsize=7)


def _along(axis: Axes, frame: pd.DataFrame, column: str) -> None:
    """Lines over a numeric axis; dashed where several classes are forgotten at once."""
    for solver, colour in COLOURS.items():
        for several, style in ((False, "-"), (True, "--")):
            part = frame[(frame["solver"] == solver) & (frame["several"] == several)]
            if part.empty:
                continue
            label = f"{solver}, several classes at once" if several else solver
            means = part.groupby("place")[column].mean()
            marker = "o" if len(means) == 1 or several else None
            axis.plot(means.index, means, style, color=colour, marker=marker, ms=3, label=label)
            if not several:
                axis.scatter(
                    part["place"], part[column], s=7, color=colour, alpha=0.5, linewidths=0
                )
    places = sorted(frame["place"].unique())
    low = min((place for place in places if place > 0), default=1.0)
    axis.set_xscale("symlog", linthresh=low)
    axis.set_xticks(places, [f"{place:g}" for place in places], rotation=35)
    axis.set_xlim(left=-low / 10 if places[0] == 0 else 0.9 * low)
    axis.minorticks_off()


def _spectrum(frame: pd.DataFrame) -> Figure:
    """A line a solver and setting: the mean share of each tenth, and a random change's."""
    sides = {side: title for side, title in SIDES.items() if frame[f"{side}_1"].notna().any()}
    sides = sides or SIDES  # nothing moved: empty panels
    figure = Figure(figsize=(1 + 3.2 * len(sides), 3.4), layout="constrained")
    numbers = range(1, PARTS + 1)
    for axis, (side, title) in zip(
        figure.subplots(1, len(sides), squeeze=False)[0], sides.items(), strict=True
    ):
        columns = [f"{side}_{number}" for number in numbers]
        for (solver, setting), part in frame.groupby(["solver", "setting"], sort=False):
            style = "-" if setting == "default" else ":"
            label = solver if setting == "default" else f"{solver}, {setting}"
            line = {"color": COLOURS[solver], "label": label, "linewidth": THICK.get(solver, 1.5)}
            axis.plot(numbers, part[columns].mean(), style, **line)
        axis.axhline(1 / PARTS, color="0.5", linewidth=0.8, label="random change")
        axis.set(yscale="log", xticks=numbers)
        axis.set_xlabel("tenth, largest values first", fontsize=8)
        limits = axis.get_ylim()
        axis.set_yticks(SHARES, [f"{share:.1%}" for share in SHARES])
        axis.minorticks_off()
        axis.set_ylim(limits)
        axis.set_title(f"share of ||Delta||^2: {title}", fontsize=8)
        _bare(axis)
    return figure


def _bare(axis: Axes) -> None:
    axis.grid(color="0.94")
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
