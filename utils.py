"""What a notebook imports: results of a folder as a DataFrame, the paper's summary, a picture.

from utils import create_results
df, args = create_results("results/results1/seed_0/", rn=True, multiclass=False)
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle
from os import PathLike
from pathlib import Path

import pandas as pd

from engine.cli import Parser, run
from engine.errors import UserError
from evaluation.plots import AFTER, BEFORE, COLOURS, drawing
from evaluation.results import ARGS, LOGS, SETTINGS, read_args, read_logs, split_label
from evaluation.rows import rows_of
from evaluation.tables import average_gains, other_sets, result_table

DRAWN = 60  # rows of a picture: more would be thousands of pixels high


def create_results(
    folder: str | Path,
    rn: bool | None = None,
    multiclass: bool = False,
    return_logs: bool = False,
) -> tuple[pd.DataFrame, argparse.Namespace] | tuple[pd.DataFrame, argparse.Namespace, dict]:
    """The results of one folder, a row for every forgotten class (or set of classes).

    Args:
        folder: `results/resultsATTEMPT/seed_SEED`, with or without a slash at the end.
        rn: whether the backbone is a ResNet; checked against the folder. None checks nothing.
        multiclass: True for the rows of classes forgotten at once, False for the others.
        return_logs: also return the logs that the rows were made from.

    Returns:
        df: columns `ds`, `name`, `full_Noforget`, `cls_Noforget`, `cls_forget`, `full_forget`
            (`full_*` is the accuracy over all other classes of the set, `cls_*` over the forgotten
            one, before and after), then `res_X` (after) and `full_X` (before) for every other data
            set X. With `multiclass` the `cls_*` are means and `cls_forget_all` is the dictionary by
            class. Fractions; NaN where nothing was measured.
        args: the command line of the folder's latest run.

    Raises:
        UserError: no results there, or none of the asked kind, or torn logs.
    """
    if not isinstance(folder, str | PathLike):
        raise UserError(f"a results folder is given by its path, not by {folder!r:.80}")
    folder = Path(folder)
    if not (folder / LOGS).is_file():
        raise UserError(f"no results in {folder}: {folder / LOGS} is missing; run forget_clip.sh")
    logs = read_logs(folder)
    lines = read_args(folder / ARGS)
    args = lines[-1] if lines else argparse.Namespace()
    _check_rn(folder, rn, logs, args)
    df = result_table(folder, rows_of(logs), multiclass)
    if df[["full_Noforget", "cls_Noforget"]].isna().all(axis=None):
        warnings.warn(
            f"{folder / LOGS} holds no accuracies from before forgetting (logs of the paper's "
            "public code have none): the columns full_Noforget, cls_Noforget and full_X are NaN",
            stacklevel=2,
        )
    return (df, args, logs) if return_logs else (df, args)


def compute_avg_gain(df: pd.DataFrame) -> float:
    """The paper's summary over a frame of `create_results`; lower is better, 0 is perfect.

    The mean over rows of `evaluation.tables.average_gains`: what is left of the forgotten class's
    accuracy and what the rest of its set and each other set lost, all relative to before.
    """
    return float(average_gains(df).mean())


def summarise(df: pd.DataFrame) -> pd.DataFrame:
    """The frame for reading, in percent: accuracy before and after forgetting.

    `class` is the forgotten class, `rest` the other classes of its set, `others` the mean over the
    other data sets.
    """
    others = other_sets(df)
    table = pd.DataFrame({"data set": df["ds"], "forgotten": df["name"]})
    for title, stem in (("class", "cls"), ("rest", "full")):
        for when, suffix in (("before", "Noforget"), ("after", "forget")):
            table[f"{title} {when}"] = 100 * df[f"{stem}_{suffix}"]
    for when, stem in (("before", "full"), ("after", "res")):
        columns = [f"{stem}_{name}" for name in others]
        table[f"others {when}"] = 100 * df[columns].mean(axis=1) if columns else float("nan")
    return table


def plot_results(df: pd.DataFrame, path: str | Path) -> Path:
    """Draw rows of a frame of `create_results` before and after, and save them as a picture.

    Three panels: accuracy on the forgotten class (should fall to zero), on the rest of its data set
    and on the other data sets (should stay). Of more than 60 rows the worst are drawn, and the
    title says so. The format is that of the file name's suffix.
    """
    return _draw(summarise(df), {"before": BEFORE, "after": AFTER}, path)


def _draw(table: pd.DataFrame, dots: dict[str, dict[str, str]], path: str | Path) -> Path:
    """Three panels of dots, one column `STEM NAME` of the table for each name of `dots`."""
    shown = _worst(table, [name for name in dots if name != "before"])
    places = range(len(shown))
    titles = {"class": "forgotten class", "rest": "rest of its set", "others": "other sets"}
    with drawing(path, 11, 1.6 + 0.25 * len(shown), small=False) as figure:
        axes = figure.subplots(1, 3, sharey=True)
        for axis, (stem, title) in zip(axes, titles.items(), strict=True):
            numbers = shown[[f"{stem} {name}" for name in dots]]
            axis.hlines(places, numbers.min(axis=1), numbers.max(axis=1), color="0.8", zorder=1)
            for order, (name, dot) in enumerate(dots.items(), start=2):
                axis.scatter(numbers[f"{stem} {name}"], places, s=42, zorder=order, **dot)
            axis.set_title(title)
            axis.set_xlim(-4, 104)
            axis.set_xlabel("zero-shot accuracy, %")
            axis.grid(visible=False, axis="y")
            axis.spines["left"].set_visible(False)
            axis.tick_params(left=False)
        names = shown["forgotten"].map(lambda label: ", ".join(split_label(label)))
        axes[0].set_yticks(places, shown["data set"] + ": " + names, parse_math=False)
        axes[0].set_ylim(len(shown) - 0.3, -0.7)  # the first row on top
        for name, dot in dots.items():
            axes[2].scatter([], [], s=42, label=name, **dot)
        figure.legend(loc="outside upper right", ncols=len(dots))
        if len(shown) < len(table):
            figure.suptitle(
                f"the {len(shown)} of {len(table):,} rows with most left of the class, then with "
                "most lost by the rest"
            )
    return Path(path)


def _worst(table: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """The rows to draw, in their order: the `DRAWN` where some method leaves most of the class, or
    where as much is left, loses most of the rest of its set."""
    if len(table) <= DRAWN:
        return table
    left = table[[f"class {name}" for name in methods]].max(axis=1)
    kept = table[[f"rest {name}" for name in methods]].min(axis=1)
    rank = pd.DataFrame({"left": -left, "lost": kept - table["rest before"]})
    return table.loc[rank.sort_values(["left", "lost"], kind="stable").index[:DRAWN].sort_values()]


def compare_results(folders: dict[str, str | Path], multiclass: bool = False) -> pd.DataFrame:
    """Several methods on the same classes, side by side, in percent: before, then each method.

    Args:
        folders: what to call a method -> its results folder.

    Returns:
        A row for every class that all folders hold: `data set`, `forgotten`, and for `class`,
        `rest` and `others` (see `summarise`) a column `before` and one a method, then its
        `seconds`.

    Raises:
        UserError: no class is in all folders.
    """
    if not isinstance(folders, Mapping) or not folders:
        raise UserError(f"folders must map names to results folders, got {folders!r:.80}")
    tables = {}
    for name, folder in folders.items():
        df, _, logs = create_results(folder, multiclass=multiclass, return_logs=True)
        table = summarise(df).set_index(["data set", "forgotten"])
        seconds = {(row.dataset, row.label): row.solver.get("seconds") for row in rows_of(logs)}
        tables[name] = table.assign(seconds=pd.Series(seconds, dtype=float))
    joined = pd.concat(tables, axis=1, join="inner")  # columns (method, column of `summarise`)
    if joined.empty:
        raise UserError(f"no class is in all of {', '.join(map(str, folders.values()))}")
    columns = {}
    for stem in ("class", "rest", "others"):
        columns[f"{stem} before"] = joined[next(iter(tables)), f"{stem} before"]
        columns |= {f"{stem} {name}": joined[name, f"{stem} after"] for name in tables}
    columns |= {f"seconds {name}": joined[name, "seconds"] for name in tables}
    return pd.DataFrame(columns).reset_index()


def plot_comparison(table: pd.DataFrame, path: str | Path) -> Path:
    """Draw a table of `compare_results`, before and every method."""
    methods = [c.removeprefix("seconds ") for c in table.columns if c.startswith("seconds ")]
    dots = {"before": BEFORE}
    dots |= {name: {"color": colour} for name, colour in zip(methods, cycle(COLOURS[1:]))}
    return _draw(table, dots, path)


def _check_rn(folder: Path, rn: bool | None, logs: dict, args: argparse.Namespace) -> None:
    """Warn if `rn` says another kind of backbone than the folder's."""
    found = [entry.get(SETTINGS, {}).get("backbone") for entry in logs.values()]
    found += [getattr(args, key, None) for key in ("backbone", "backbone_arch", "arch")]
    known = sorted({name for name in found if isinstance(name, str) and name})
    actual = any(name.upper().startswith("RN") for name in known)
    if known and rn not in (None, actual):
        warnings.warn(
            f"rn={rn}, but {folder} holds results of {', '.join(known)}: rn={actual} is right",
            stacklevel=3,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the results of a folder as a table and draw them beside the logs; several folders are
    shown side by side, and drawn beside the last one's."""
    parser = Parser(prog="utils.py", description=main.__doc__)
    parser.add_argument(
        "folders", nargs="+", metavar="[NAME=]FOLDER", help="results/resultsATTEMPT/seed_SEED"
    )
    parser.add_argument("--multiclass", action="store_true", help="classes forgotten at once")
    args = parser.parse_args(argv)
    named = [folder.rpartition("=") for folder in args.folders]
    folders = {name or Path(folder).parent.name: folder for name, _, folder in named}
    for name, folder in folders.items():
        df, _ = create_results(folder, multiclass=args.multiclass)
        if len(folders) == 1:
            _print(summarise(df))
            print(f"picture: {plot_results(df, Path(folder) / 'results.png')}")
        print(f"{name}: average gain (0 is perfect, lower is better) {compute_avg_gain(df):.4f}")
    if len(folders) > 1:
        table = compare_results(folders, args.multiclass)
        _print(table)
        print(f"picture: {plot_comparison(table, Path(folder) / 'comparison.png')}")


def _print(table: pd.DataFrame) -> None:
    seconds = {c: "{:.3f}".format for c in table if c.startswith("seconds")}
    print(table.to_string(index=False, float_format="{:.1f}".format, formatters=seconds))


if __name__ == "__main__":
    sys.exit(run(main))
