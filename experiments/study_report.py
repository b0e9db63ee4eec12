"""What a study shows of its rows: a printed table of means over the classes, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from evaluation.plots import COLOURS, drawing
from evaluation.results import split_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = 10
SIDES = {
    "left": "left singular directions of W",
    "right": "right singular directions of W",
    "gram": "eigen-directions of G",
}
MEANS = ("retained", "forgotten", "rest", "others", "carry", "reduction", "gap", "norm", "seconds")
OF_SOLVER = {"lora": COLOURS[1], "optimum": COLOURS[2], "constrained": COLOURS[0]}
THICK = {"lora": 4.0}  # what the optimum's line hides without
PANELS = {
    "forgotten": "left of the forgotten class, %",
    "rest": "change of the rest of its set, points",
    "others": "change of the other sets, points",
    "carry": "displacement ratio of its evaluation prompt",
}
DOTS = {"s": 16, "alpha": 0.5, "linewidths": 0}  # single classes
TICKS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # ticks
WIDTH = 0.24  # of a solver's column
APART = 1.6  # the least ratio of two ticks, so that their numbers do not touch


def in_points(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with `forgotten` (per cent left), `rest`, `others` and `worst` (points gained: the
    rest of the set, the other sets' mean, the one that lost most) and `several` (classes at once).
    """
    shown = frame.copy()
    shown["forgotten"] = 100 * frame["forgotten_after"]
    for name in ("rest", "others"):
        change = 100 * (frame[f"{name}_after"] - frame[f"{name}_before"])
        shown[name] = change.round(9)  # a difference of equal means is 0, not 1e-14
    shown["worst"] = 100 * frame["others_worst"]
    shown["several"] = frame["classes"].map(lambda label: len(split_label(label)) > 1)
    return shown


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for every solver and setting: means over the classes, with the class that kept most
    (`left_max`), what the set that lost most lost (`worst`), and in how many rows lamb_forget was
    raised above c* (`raised`)."""
    shown = in_points(frame)
    groups = shown.groupby(["solver", "several", "setting"], sort=False)
    means = groups[list(MEANS)].mean()
    means.insert(0, "rows", groups.size())
    means.insert(3, "left_max", groups["forgotten"].max())
    means.insert(6, "worst", groups["worst"].min())
    means["raised"] = groups["auto"].agg(lambda cells: (cells == "True").sum())
    return means if shown["several"].any() else means.droplevel("several")


def tenths(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean share of `||Delta||^2` in each tenth, per cent, for every basis, solver and setting."""
    parts = {}
    for side in SIDES:
        columns = {f"{side}_{number}": str(number) for number in range(1, PARTS + 1)}
        groups = frame.rename(columns=columns).groupby(["solver", "setting"], sort=False)
        parts[side] = 100 * groups[list(columns.values())].mean()
    return pd.concat(parts, names=["basis"]).dropna(how="all")


def report(frame: pd.DataFrame, width: int | None = None) -> None:
    """Print the summary; with a width w also where the changes sit."""
    tables = {"": summary(frame)}
    if width:
        sizes = [len(part) for part in torch.arange(width).tensor_split(PARTS)]
        parts = dict.fromkeys(f"{100 * size / width:.3g}" for size in sizes)
        random = f"a random change: {', '.join(parts)}"
        tables[f"per cent of ||Delta||^2 in each tenth ({random})\n"] = tenths(frame)
    for title, table in tables.items():
        print(title + table.to_string(float_format=lambda value: f"{value:.3g}", na_rep=""))


def plot(title: str, axis_text: str, spectrum: bool, frame: pd.DataFrame, path: Path) -> None:
    """Draw the rows of one study on one data set as a PNG.

    A small dot is one class, a line or a large mark the mean over classes.

    Args:
        axis_text: label of a numeric axis; "": settings are names.
        spectrum: whether to draw where the changes sit instead.
    """
    bases = [side for side in SIDES if spectrum and frame[f"{side}_1"].notna().any()]
    with drawing(path, 13, 5.2 if spectrum else 8.6) as figure:
        if spectrum:
            _spectrum(figure, frame, bases or list(SIDES))  # nothing moved: empty panels
        else:
            shown = in_points(frame)
            panels = zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True)
            for axis, (column, name) in panels:
                (_along if axis_text else _columns)(axis, shown, column)
                axis.set(xlabel=axis_text, title=name)
            figure.axes[0].set_ylim(-4, 104)
        figure.suptitle(title)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))


def _columns(axis: Axes, frame: pd.DataFrame, column: str) -> None:
    """A column a setting, side by side for the solvers."""
    settings = list(dict.fromkeys(frame["setting"]))
    solvers = [name for name in OF_SOLVER if name in set(frame["solver"])]
    for number, solver in enumerate(solvers):
        part = frame[frame["solver"] == solver]
        shift = WIDTH * (number - (len(solvers) - 1) / 2)
        places = part["setting"].map(settings.index) + shift
        axis.scatter(places, part[column], color=OF_SOLVER[solver], **DOTS)
        means = part.groupby("setting", sort=False)[column].mean()
        at = [settings.index(name) + shift for name in means.index]
        axis.scatter(
            at, means, s=160, marker="_", linewidths=2.5, color=OF_SOLVER[solver], label=solver
        )
    # Names of several words stand on several lines, so that none runs into the next.
    axis.set_xticks(range(len(settings)), [name.replace(" ", "\n") for name in settings])


def _along(axis: Axes, frame: pd.DataFrame, column: str) -> None:
    """Lines over a numeric axis; dashed where several classes are forgotten at once."""
    for solver, colour in OF_SOLVER.items():
        for several, style in ((False, "-"), (True, "--")):
            part = frame[(frame["solver"] == solver) & (frame["several"] == several)]
            if part.empty:
                continue
            label = f"{solver}, several classes at once" if several else solver
            means = part.groupby("position")[column].mean()
            marker = "o" if len(means) == 1 or several else None
            axis.plot(means.index, means, style, color=colour, marker=marker, ms=3, label=label)
            if not several:
                axis.scatter(part["position"], part[column], color=colour, **DOTS)
    places = sorted(frame["position"].unique())
    low = min((place for place in places if place > 0), default=1.0)
    axis.set_xscale("symlog", linthresh=low)
    ticks: list[float] = []  # from the last one down, each far enough from the one before
    for place in reversed(places):
        if not ticks or place <= ticks[-1] / APART:
            ticks.append(place)
    axis.set_xticks(ticks, [f"{place:g}" for place in ticks])
    axis.set_xlim(left=-low / 10 if places[0] == 0 else 0.9 * low)
    axis.minorticks_off()


def _spectrum(figure: Figure, frame: pd.DataFrame, sides: list[str]) -> None:
    """For each basis a line for every solver and setting: the mean share of each tenth, and what a
    random change has there."""
    numbers = range(1, PARTS + 1)
    axes = figure.subplots(1, len(sides), squeeze=False)[0]
    for axis, side in zip(axes, sides, strict=True):
        columns = [f"{side}_{number}" for number in numbers]
        for (solver, setting), part in frame.groupby(["solver", "setting"], sort=False):
            style = "-" if setting == "default" else ":"
            label = solver if setting == "default" else f"{solver}, {setting}"
            line = {"color": OF_SOLVER[solver], "label": label, "linewidth": THICK.get(solver, 1.5)}
            axis.plot(numbers, part[columns].mean(), style, **line)
        axis.axhline(1 / PARTS, color="0.5", linewidth=0.8, label="random change")
        axis.set(yscale="log", xticks=numbers, xlabel="tenth, largest values first")
        limits = axis.get_ylim()
        axis.set_yticks(TICKS, [f"{share:.1%}" for share in TICKS])
        axis.minorticks_off()
        axis.set_ylim(limits)
        axis.set_title(f"share of the change along\n{SIDES[side]}")
