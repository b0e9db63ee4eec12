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
from typing import Any

import pandas as pd

from engine.cli import Parser, run
from engine.files import atomic_path, refuse_foreign
from engine.log import logger
from evaluation.plots import AFTER, COLOURS, check_picture, drawing
from evaluation.results import (
    ARGS,
    LOGS,
    SETTINGS,
    Logs,
    no_results,
    read_args,
    read_logs,
    same_kind,
    split_label,
)
from evaluation.rows import rows_of
from evaluation.tables import (
    GAIN,
    average_gains,
    check_table,
    other_sets,
    over_folders,
    result_table,
    write_table,
)
from forgetting.errors import ProblemError

OUTPUTS = {"csv": "CSV", "latex": "LaTeX", "draw": "a picture"}
LATEX = "% a table of utils.py"
FRAME = ("ds", "name", "full_Noforget", "cls_Noforget", "cls_forget", "full_forget")
BACKBONES = ("backbone", "backbone_arch", "arch")  # what command lines call it
Before = str | Path | pd.DataFrame | Mapping[str, Mapping[str, float]]
DRAWN = 60  # rows of a picture: more would be thousands of pixels high


def create_results(
    folder: str | Path | Sequence[str | Path],
    rn: bool | None = None,
    multiclass: bool = False,
    return_logs: bool = False,
    before: Before | None = None,
) -> tuple:
    """The results of one folder, a row for every forgotten class (or set of classes); of several,
    such as one a seed, their means and standard deviations.

    Args:
        folder: `results/resultsATTEMPT/seed_SEED`, with or without a slash at the end, or several
            of one method, backbone and weights.
        rn: whether the backbone is a ResNet; checked against the folder. None checks nothing.
        multiclass: True for the rows of classes forgotten at once, False for the others.
        return_logs: also return the logs that the rows were made from.
        before: the accuracies from before forgetting where the logs hold none: a results folder of
            the same model, a frame of it, or a mapping (see `compute_avg_gain`).

    Returns:
        df: columns `ds`, `name`, `full_Noforget`, `cls_Noforget`, `cls_forget`, `full_forget`
            (`full_*` is the accuracy over all other classes of the set, `cls_*` over the forgotten
            one, before and after), then `res_X` (after) and `full_X` (before) for every other data
            set X. With `multiclass` the `cls_*` are means and `cls_forget_all` is the dictionary by
            class. Fractions; NaN where nothing was measured. Of several folders the means, and that
            of each folder's average `gain`, then `std_*` for each of these columns (divided by the
            folders less one; NaN of one), and `folders`, how many hold the row.
        args: the command line of the folder's latest run; logs, if asked for. Of several folders
            lists of them.

    Raises:
        ProblemError: no results there, or none of the asked kind, or torn logs; folders that do not
            belong together, or `before` of another model.
    """
    if isinstance(folder, Sequence) and not isinstance(folder, str | bytes) and folder:
        parts = [_of_folder(each, rn, multiclass, before) for each in folder]
        frames, args, logs = map(list, zip(*parts, strict=True))
        same_kind(folder, logs)
        df = over_folders([frame.assign(**{GAIN: average_gains(frame)}) for frame in frames])
    else:
        df, args, logs = _of_folder(folder, rn, multiclass, before)
    return (df, args, logs) if return_logs else (df, args)


def _of_folder(
    folder: str | Path, rn: bool | None, multiclass: bool, before: Before | None
) -> tuple[pd.DataFrame, argparse.Namespace, Logs]:
    """The frame of one folder, its latest command line, and its logs."""
    if not isinstance(folder, str | PathLike):
        raise ProblemError(f"a results folder is given by its path, not by {folder!r:.80}")
    folder = Path(folder)
    if not (folder / LOGS).is_file():
        raise no_results(folder)
    logs = read_logs(folder)
    lines = read_args(folder / ARGS)
    args = lines[-1] if lines else argparse.Namespace()
    _check_rn(folder, rn, logs, args)
    df = result_table(folder, rows_of(logs), multiclass)
    if isinstance(before, str | PathLike):
        there, *whose = _of_folder(before, None, multiclass, None)
        same_kind([folder, before], [_of_model(args, logs), _of_model(*whose)], model_alone=True)
        before = there
    if before is not None:
        df = _with_before(df, before)
    if not _measured_before(df):
        warnings.warn(
            f"{folder / LOGS} holds no accuracies from before forgetting (logs of the paper's "
            "public code have none): the columns full_Noforget, cls_Noforget and full_X are NaN",
            stacklevel=3,
        )
    return df, args, logs


def _of_model(args: argparse.Namespace, logs: Logs) -> Logs:
    """Logs with the backbone of the command line where they tell of none, as those of the paper's
    public code."""
    named = [
        name for key in BACKBONES if isinstance(name := getattr(args, key, None), str) and name
    ]
    told = {"backbone": named[0]} if named else {}
    return {name: each | {SETTINGS: told | each.get(SETTINGS, {})} for name, each in logs.items()}


def _check_columns(df: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """ProblemError unless a frame has these columns, as those that `what` made have."""
    if not isinstance(df, pd.DataFrame):
        raise ProblemError(f"not a frame of {what}: {df!r:.80}")
    lacking = [column for column in columns if column not in df]
    if lacking:
        raise ProblemError(f"not a frame of {what}: it lacks {', '.join(lacking)}")


def _check_frame(df: pd.DataFrame) -> None:
    _check_columns(df, FRAME, "create_results")
    stems = [*FRAME[2:], *(f"res_{name}" for name in other_sets(df))]
    columns = [f"full_{name}" for name in other_sets(df)]
    columns += [f"std_{stem}" for stem in stems] if "folders" in df else []
    _check_columns(df, columns, "create_results")


def _measured_before(df: pd.DataFrame) -> bool:
    return not df[["full_Noforget", "cls_Noforget"]].isna().all(axis=None)


def compute_avg_gain(
    df: pd.DataFrame, before: pd.DataFrame | Mapping[str, Mapping[str, float]] | None = None
) -> float:
    """The paper's summary over a frame of `create_results`; lower is better, 0 is perfect.

    The mean over rows of `evaluation.tables.average_gains`: what is left of the forgotten class's
    accuracy and what the rest of its set and each other set lost, all relative to before.

    Args:
        before: the accuracies from before forgetting, for logs that hold none, as those of the
            paper's public code: a frame of `create_results` with the same classes, or a mapping
            such as {"Pekinese": {"cls_Noforget": 0.6, "full_Noforget": 0.5, "full_Caltech101":
            0.9}}; fractions. What the logs hold stays. Of several folders `create_results` takes
            it, for each of them.

    Raises:
        ProblemError: no accuracies from before, or none of the frame's classes. Where all of them are
            0 there is no relative loss, and the answer is NaN.
    """
    _check_frame(df)
    if before is not None:
        if GAIN in df:
            raise ProblemError(
                "a frame of several folders has the average gains of each: pass what was before to "
                "create_results(FOLDERS, before=...)"
            )
        df = _with_before(df, before)
    if not _measured_before(df):
        raise ProblemError(
            "no average gain: it is relative to the accuracies from before forgetting, and these "
            "results hold none (logs of the paper's public code have none); pass them: "
            "compute_avg_gain(df, before=FRAME) or utils.py --before FOLDER, with the results of "
            "any run on the same classes, or compute_avg_gain(df, before={CLASS: {'cls_Noforget': "
            "0.6, 'full_Noforget': 0.5, 'full_SET': 0.9}})"
        )
    return float(average_gains(df).mean())


def _with_before(
    df: pd.DataFrame, before: pd.DataFrame | Mapping[str, Mapping[str, float]]
) -> pd.DataFrame:
    """The frame with what it lacks from before forgetting by another, by data set and class."""
    columns = ["full_Noforget", "cls_Noforget", *(f"full_{name}" for name in other_sets(df))]
    keys = ["ds", "name"]
    try:
        if not isinstance(before, pd.DataFrame):
            before = pd.DataFrame.from_dict(dict(before), orient="index", dtype=float)
            before, keys = before.rename_axis("name").reset_index(), ["name"]
        known = before.set_index(keys)
        known = known[~known.index.duplicated()].reindex(columns=columns).astype(float)
        values = known.reindex(pd.MultiIndex.from_frame(df[keys]) if len(keys) > 1 else df["name"])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ProblemError(
            "before must be a frame of create_results, or {CLASS: {'cls_Noforget': 0.6, ...}} "
            f"({error})"
        ) from error
    wrong = known.where((known < 0) | (known > 1)).stack().dropna()
    if len(wrong):
        raise ProblemError(f"before holds {wrong.iloc[0]:g}: accuracies are fractions, from 0 to 1")
    filled = df.fillna(values[columns].set_index(df.index))
    lacking = filled["name"][filled[list(FRAME[2:4])].isna().all(axis=1)]
    if len(lacking) == len(df):
        raise ProblemError(f"before holds none of the classes {', '.join(lacking)[:200]}")
    if len(lacking):
        warnings.warn(
            f"no accuracies from before forgetting of {len(lacking)} of {len(df)} rows: "
            f"{', '.join(lacking)[:200]}",
            stacklevel=4,
        )
    return filled


def summarise(df: pd.DataFrame) -> pd.DataFrame:
    """The frame for reading, in percent: accuracy before and after forgetting.

    `class` is the forgotten class, `rest` the other classes of its set, `others` the mean over the
    other data sets. Of several folders, `±` is the standard deviation of what was measured after
    (of `others` the mean of the sets' own).
    """
    _check_frame(df)
    others = other_sets(df)
    table = pd.DataFrame({"data set": df["ds"], "forgotten": df["name"]})
    for title, stem in (("class", "cls"), ("rest", "full")):
        for when, suffix in (("before", "Noforget"), ("after", "forget")):
            table[f"{title} {when}"] = 100 * df[f"{stem}_{suffix}"]
    for when, stem in (("before", "full"), ("after", "res")):
        columns = [f"{stem}_{name}" for name in others]
        table[f"others {when}"] = 100 * df[columns].mean(axis=1) if columns else float("nan")
    if "folders" in df:
        spread = {"class": ["cls_forget"], "rest": ["full_forget"]}
        spread["others"] = [f"res_{name}" for name in others]
        for title, stems in spread.items():
            deviations = df[[f"std_{stem}" for stem in stems]]
            place = table.columns.get_loc(f"{title} after") + 1
            table.insert(place, f"{title} ±", 100 * deviations.mean(axis=1))
    return table


def plot_results(df: pd.DataFrame, path: str | Path) -> Path:
    """Draw rows of a frame of `create_results`, and save them as a picture.

    Three panels: what is left of the forgotten class (should be nothing), what the rest of its data
    set and what the other data sets lost (should be nothing too). Of more than 60 rows the worst
    are drawn, and the title says so. The format is that of the file name's suffix.
    """
    return _draw(summarise(df), {"after": AFTER}, path)


PANELS = {
    "class": "left of the forgotten class, %",
    "rest": "lost by the rest of its set, points",
    "others": "lost by the other sets, points",
}


def _draw(table: pd.DataFrame, dots: dict[str, dict[str, str]], path: str | Path) -> Path:
    """Three panels, a band a row and in it a line for each name of `dots`, whose numbers stand in
    the columns `STEM NAME` of the table. Losses have an axis of their own, at least a point wide.
    """
    shown = _worst(table, list(dots))
    places = pd.Series(range(len(shown)), index=shown.index)
    row = 0.16 + 0.17 * len(dots)  # inches
    with drawing(path, 13, 1.7 + row * len(shown), small=False) as figure:
        axes = figure.subplots(1, 3, sharey=True, width_ratios=(1.2, 1, 1))
        for axis, (stem, title) in zip(axes, PANELS.items(), strict=True):
            before, ends = shown[f"{stem} before"], [0.0, 1.0]
            for place in places[::2]:
                axis.axhspan(place - 0.5, place + 0.5, color="0.965", linewidth=0)
            for number, (name, dot) in enumerate(dots.items()):
                lines = places + 0.66 * ((number + 0.5) / len(dots) - 0.5)
                after = shown[f"{stem} {name}"]
                found, start = (
                    (after, before) if stem == "class" else (before - after, 0.0 * before)
                )
                axis.hlines(lines, start, found, linewidth=2, alpha=0.35, **dot)
                axis.scatter(found, lines, s=48, zorder=3, clip_on=False, **dot)
                ends += [found.min(), found.max()]
            axis.set_title(title)
            if stem == "class":
                axis.scatter(before, places, s=220 * row, marker="|", color="0.25", zorder=2)
                axis.set_xlim(-3, 103)
            else:
                low, high = pd.Series(ends).agg(["min", "max"])
                axis.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
                axis.axvline(0, color="0.25", linewidth=1)
            axis.grid(visible=False, axis="y")
            axis.spines["left"].set_visible(False)
            axis.tick_params(left=False)
        names = shown["forgotten"].map(lambda label: ", ".join(split_label(label)))
        axes[0].set_yticks(places, shown["data set"] + ": " + names, parse_math=False)
        axes[0].set_ylim(len(shown) - 0.45, -0.55)  # the first row on top
        axes[2].scatter([], [], s=120, marker="|", color="0.25", label="before")
        for name, dot in dots.items():
            axes[2].scatter([], [], s=48, label=name, **dot)
        figure.legend(loc="outside upper right", ncols=len(dots) + 1)
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


def compare_results(
    folders: Mapping[str, str | Path | Sequence[str | Path]],
    multiclass: bool = False,
    before: Before | None = None,
) -> pd.DataFrame:
    """Several methods on the same classes, side by side, in percent: before, then each method.

    Args:
        folders: what to call a method -> its results folder, or several (see `create_results`).
        before: see `create_results`; all that some method measured itself goes before it.

    Returns:
        A row for every class that all folders hold: `data set`, `forgotten`, and for `class`,
        `rest` and `others` (see `summarise`) a column `before` and one a method, then its
        `seconds`. A method of several folders has its means, and `± METHOD` behind each.

    Raises:
        ProblemError: no class is in all folders; folders of several models; a name that a column of
            the table has.
    """
    if not isinstance(folders, Mapping) or not folders:
        raise ProblemError(f"folders must map names to results folders, got {folders!r:.80}")
    titles = ["before", *map(str, folders), *(f"± {name}" for name in folders)]
    for name in folders:
        if titles.count(str(name)) > 1:
            raise ProblemError(
                f"no method can be called {name!r}, as a column of the table is; give it another "
                "name: NAME=FOLDER"
            )
    tables, places, models = {}, [], []
    for name, folder in folders.items():
        df, args, logs = create_results(folder, None, multiclass, True, before)
        several = isinstance(logs, list)
        places += folder if several else [folder]
        models += map(_of_model, args, logs) if several else [_of_model(args, logs)]
        table = summarise(df).set_index(["data set", "forgotten"])
        seconds = pd.Series(
            {
                (number, row.dataset, row.label): row.solver.get("seconds")
                for number, each in enumerate(logs if several else [logs])
                for row in rows_of(each)
            },
            dtype=float,
        )
        tables[name] = table.assign(seconds=seconds.groupby(level=[1, 2]).mean())
    same_kind(places, models, model_alone=True)
    joined = pd.concat(tables, axis=1, join="inner")  # columns (method, column of `summarise`)
    if joined.empty:
        raise ProblemError(f"no class is in all of {', '.join(map(str, folders.values()))}")
    columns = {}
    for stem in ("class", "rest", "others"):
        known = joined.xs(f"{stem} before", axis=1, level=1)  # of the first method that has it
        columns[f"{stem} before"] = known.bfill(axis=1).iloc[:, 0]
        for name in tables:
            columns[f"{stem} {name}"] = joined[name, f"{stem} after"]
            if (name, f"{stem} ±") in joined:
                columns[f"{stem} ± {name}"] = joined[name, f"{stem} ±"]
    columns |= {f"seconds {name}": joined[name, "seconds"] for name in tables}
    return pd.DataFrame(columns).reset_index()


def plot_comparison(table: pd.DataFrame, path: str | Path) -> Path:
    """Draw a table of `compare_results`, before and every method."""
    columns = ["data set", "forgotten", *(f"{stem} before" for stem in PANELS)]
    _check_columns(table, columns, "compare_results")
    methods = [c.removeprefix("seconds ") for c in table.columns if c.startswith("seconds ")]
    dots = {name: {"color": colour} for name, colour in zip(methods, cycle(COLOURS[1:]))}
    return _draw(table, dots, path)


def _check_rn(folder: Path, rn: bool | None, logs: dict, args: argparse.Namespace) -> None:
    """Warn if `rn` says another kind of backbone than the folder's."""
    found = [entry.get(SETTINGS, {}).get("backbone") for entry in logs.values()]
    found += [getattr(args, key, None) for key in BACKBONES]
    known = sorted({name for name in found if isinstance(name, str) and name})
    actual = any(name.upper().startswith("RN") for name in known)
    if known and rn not in (None, actual):
        warnings.warn(
            f"rn={rn}, but {folder} holds results of {', '.join(known)}: rn={actual} is right",
            stacklevel=4,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the results of a folder as a table; seeds of one run as mean and deviation; several
    runs side by side. Nothing is written unless a file is named."""
    parser = Parser(prog="utils.py", description=main.__doc__)
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="[NAME=]FOLDER",
        help="results/resultsATTEMPT/seed_SEED; folders of one NAME, or seeds of one ATTEMPT, "
        "belong together",
    )
    parser.add_argument("--multiclass", action="store_true", help="classes forgotten at once")
    parser.add_argument(
        "--before", metavar="FOLDER", help="results that hold the accuracies from before forgetting"
    )
    for option, about in OUTPUTS.items():
        parser.add_argument(f"--{option}", metavar="FILE", help=f"write the table as {about}")
    args = parser.parse_args(argv)
    files = [Path(file).resolve() for option in OUTPUTS if (file := getattr(args, option))]
    if len({*files}) < len(files):
        raise ProblemError("each of --csv, --latex and --draw needs a file of its own")
    how = {"multiclass": args.multiclass, "before": args.before}
    groups = {name: f if len(f) > 1 else f[0] for name, f in _groups(args.folders).items()}
    lines = [f"{name}: {_told_gain(folders, how)}" for name, folders in groups.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said above
        if len(groups) == 1:
            df, _ = create_results(*groups.values(), **how)
            table = summarise(df)
        else:
            table = compare_results(groups, **how)
    if args.csv:
        check_table(args.csv, table.columns)
    if args.latex:
        refuse_foreign(args.latex, LATEX)
    if args.draw:
        check_picture(args.draw)
    print("\n".join(lines))
    _print(table)
    if args.csv:
        write_table(table, args.csv)
        logger.info(f"table: {args.csv}")
    if args.latex:
        _write_latex(table, Path(args.latex))
        logger.info(f"table: {args.latex}")
    if args.draw:
        draw = plot_comparison(table, args.draw) if len(groups) > 1 else plot_results(df, args.draw)
        logger.info(f"picture: {draw}")


def _told_gain(folders: str | Sequence[str], how: Mapping[str, Any]) -> str:
    """The average gain of one or several folders in words, or why there is none."""
    try:
        mean = compute_avg_gain(create_results(folders, **how)[0])
    except ProblemError as error:
        if not str(error).startswith("no average gain"):
            raise
        return str(error)
    spread = ""
    if not isinstance(folders, str):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said above
            gains = [average_gains(create_results(each, **how)[0]).mean() for each in folders]
        spread = f" ± {pd.Series(gains).std():.4f} over {len(gains)}"
    return f"average gain (0 is perfect, lower is better) {mean:.4f}{spread}"


def _groups(arguments: Sequence[str]) -> dict[str, list[str]]:
    """What to call the results -> their folders. Folders of one name belong together, as do
    `seed_*` of one folder; no two others get one name."""
    found: dict[tuple[str, Path], list[str]] = {}
    for text in arguments:
        name, _, folder = text.partition("=") if not Path(text).exists() else ("", "", text)
        name, folder = (name, folder) if folder else ("", text)
        path = Path(folder).resolve()
        seed = path.name.startswith("seed_")
        key = (name, Path()) if name else ("", path.parent if seed else path)
        found.setdefault(key, []).append(folder)
    given = {name for name, _ in found if name}
    paths = [path for name, path in found if not name]
    titles: list[str] = []
    for length in range(1, 1 + max((len(path.parts) for path in paths), default=0)):
        titles = ["/".join(path.parts[-length:]) for path in paths]
        if len({*titles, *given}) == len(titles) + len(given):
            break
    short = dict(zip(paths, titles, strict=True))
    return {name or short[path]: folders for (name, path), folders in found.items()}


def _write_latex(table: pd.DataFrame, path: Path) -> None:
    """Write a table for LaTeX (package booktabs), over nothing but one of ours."""
    refuse_foreign(path, LATEX)
    titles = {column: column.replace("±", r"$\pm$") for column in table}
    safe = table.map(lambda cell: _tex(cell) if isinstance(cell, str) else cell)
    text = safe.rename(columns=titles).to_latex(index=False, float_format="%.1f", na_rep="--")
    with atomic_path(path) as temporary:
        temporary.write_text(f"{LATEX}\n{text}", encoding="utf-8")


def _tex(text: str) -> str:
    """A name as LaTeX prints it."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {c: f"\\{c}" for c in "&%$#_{}"}
    return "".join(special.get(c, c) for c in text)


def _print(table: pd.DataFrame) -> None:
    seconds = {c: "{:.3f}".format for c in table if c.startswith("seconds")}
    print(table.to_string(index=False, float_format="{:.1f}".format, formatters=seconds))


if __name__ == "__main__":
    sys.exit(run(main))
