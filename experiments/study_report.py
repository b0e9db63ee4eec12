"""The printed table of a study: means over the forgotten classes."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from evaluation.results import split_label
from experiments.spectrum import PARTS, SIDES, random_shares

MEANS = ("retained", "forgotten", "rest", "others", "carry", "reduction", "gap", "norm", "seconds")


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

    def show(table: pd.DataFrame) -> None:
        print(table.to_string(float_format=lambda value: f"{value:.3g}", na_rep=""))

    show(summary(frame))
    if width:
        print(f"per cent of ||Delta||^2 in each tenth (a random change: {shares(width)})")
        show(tenths(frame))


def shares(width: int) -> str:
    """A random change's shares as text, one number where the tenths are alike."""
    numbers: Sequence[str] = [f"{100 * share:.3g}" for share in random_shares(width)]
    return ", ".join(dict.fromkeys(numbers))
