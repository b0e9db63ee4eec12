"""What a notebook imports: results of a folder as a DataFrame, the paper's summary, a picture.

from utils import create_results
df, args = create_results("results/results1/seed_0/", rn=True, multiclass=False)
"""

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from engine.cli import Parser, run
from engine.log import logger
from evaluation import results, tables
from evaluation.plots import COLOURS, draw_results
from evaluation.results import LOGS, SETTINGS, Logs
from evaluation.rows import rows_of
from evaluation.tables import FRAME, KEYS, check_columns, summarise
from forgetting.errors import ProblemError, shown

BACKBONES = ("backbone", "backbone_arch", "arch")  # what command lines call it
LEFT_OUT = "left out, since not recognised (or not measured) before"
Folder = str | Path


def create_results(
    folder: Folder | Sequence[Folder],
    return_logs: bool = False,
    rn: bool | None = None,
    log_name: str | Logs = LOGS,
    multiclass: bool = False,
    *,
    before: Folder | pd.DataFrame | None = None,
) -> tuple:
    """The results of one folder, a row for every forgotten class (or set of classes); of several,
    such as one for each seed, their means and standard deviations.

    Args:
        folder: `results/resultsATTEMPT/seed_SEED`, or several of one method, backbone and weights;
            "" if `log_name` holds the logs themselves.
        return_logs: also return the logs that the rows were made from.
        rn: whether the backbone is a ResNet; checked against the folder. None checks nothing.
        log_name: the file in the folder, or logs that were read already.
        multiclass: True for the rows of classes forgotten at once, False for the others.
        before: the accuracies before forgetting where the logs hold none, as those of the paper's
            public code: a results folder of the same model, or a frame of it.

    Returns:
        df: columns `ds`, `name`, `full_Noforget`, `cls_Noforget`, `cls_forget`, `full_forget`
            (`full_*` is the accuracy over all other classes of the set, `cls_*` over the forgotten
            one, before and after), then `res_X` (after) and `full_X` (before) for every other data
            set X. With `multiclass` the `cls_*` are means and `cls_forget_all` is the dictionary by
            class. Fractions; NaN where nothing was measured. Of several folders see
            `evaluation.tables.over_folders`.
        args: the command line of the latest run; logs, if wanted. Of several folders: lists.

    Raises ProblemError: no results there, or none of the wanted kind; folders that do not belong
    together, or `before` of another model.
    """
    folders = [folder] if isinstance(folder, str | PathLike) else folder
    is_list = isinstance(folders, Sequence) and len(folders) > 0
    if not is_list or not all(isinstance(each, str | PathLike) for each in folders):
        raise ProblemError(f"a results folder is given by its path, not by {shown(folder)}")
    parts = []
    for each in folders:
        parts.append(_of_folder(each, rn, log_name, multiclass, before))
    df, args, logs = parts[0]
    if folders is folder:
        frames, args, logs = map(list, zip(*parts, strict=True))
        results.same_kind(folder, logs)
        df = tables.over_folders(frames)
    return (df, args, logs) if return_logs else (df, args)


def _of_folder(
    folder: Folder,
    rn: bool | None,
    log_name: str | Logs,
    multiclass: bool,
    before: Folder | pd.DataFrame | None,
) -> tuple[pd.DataFrame, argparse.Namespace, Logs]:
    """The frame of one folder, its latest command line, and its logs."""
    folder, args, logs = Path(folder), argparse.Namespace(), log_name
    if not isinstance(log_name, Mapping):
        logs = results.read_logs(folder, log_name)
        args = [args, *results.read_args(folder / results.ARGS)][-1]
    models = _with_backbone(args, logs)
    names = {str(each[SETTINGS].get("backbone", "")) for each in models.values()} - {""}
    resnet = any(name.upper().startswith("RN") for name in names)
    if names and rn not in (None, resnet):
        held = f"{folder} holds results of {', '.join(sorted(names))}"
        warnings.warn(f"rn={rn}, but {held}: rn={resnet} is right", stacklevel=3)
    df = tables.result_table(folder, rows_of(logs), multiclass)
    lacking = ["full_Noforget", "cls_Noforget", *(f"full_{name}" for name in tables.other_sets(df))]
    if isinstance(before, str | PathLike):
        theirs, *other = _of_folder(before, None, LOGS, multiclass, None)
        results.same_kind([folder, before], [models, _with_backbone(*other)], model_alone=True)
        before = theirs
    if before is not None:
        check_columns(before, FRAME[:4], "create_results")
        known = before.drop_duplicates(KEYS).set_index(KEYS).reindex(columns=lacking)
        df = df.set_index(KEYS).fillna(known.astype(float)).reset_index()
    if df[lacking[:2]].isna().all(axis=None):
        warnings.warn(
            f"{folder / LOGS} holds no accuracies before forgetting, so those columns are NaN; "
            "before=FOLDER takes them from other results of the same model and classes",
            stacklevel=3,
        )
    return df, args, logs


def _with_backbone(args: argparse.Namespace, logs: Logs) -> Logs:
    """Logs whose settings name the backbone, which the paper's public code keeps in args.txt."""
    named = [name for key in BACKBONES if isinstance(name := getattr(args, key, None), str)]
    known = {"backbone": named[0]} if named else {}
    return {name: each | {SETTINGS: known | each.get(SETTINGS, {})} for name, each in logs.items()}


def compute_avg_gain(df: pd.DataFrame) -> pd.Series:
    """The paper's summary of every row of a frame of `create_results`; lower is better, 0 is
    perfect (see `evaluation.tables.average_gains`). `compute_avg_gain(df).mean()` is the number of
    a table, without the classes that were not recognised before: theirs is NaN, and a warning says
    so. Raises ProblemError without accuracies before forgetting."""
    check_columns(df, FRAME, "create_results")
    if df[["full_Noforget", "cls_Noforget"]].isna().all(axis=None):
        raise ProblemError(
            "no average gain without accuracies before forgetting: create_results(FOLDER, "
            "before=OTHER) or utils.py --before OTHER takes them from a run on the same classes"
        )
    gains = tables.average_gains(df)
    if lacking := int(gains.isna().sum()):
        warnings.warn(f"{LEFT_OUT}: {lacking} of {len(gains)} results", stacklevel=2)
    return gains


def plot_results(df: pd.DataFrame, path: Folder) -> Path:
    """Draw a frame of `create_results` and save it as a picture, in the format of its suffix: what
    is left of the forgotten class, what the rest of its data set and what the others lost."""
    return draw_results(summarise(df), {"after": COLOURS[1]}, path)


def compare_results(
    folders: Mapping[str, Folder | Sequence[Folder]],
    multiclass: bool = False,
    before: Folder | pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Several methods on the same classes, side by side, in percent: before, then each method. A
    row for every class that all folders hold, see `evaluation.tables.side_by_side`. `folders`: what
    to call a method -> its results folder, or several; `before`: see `create_results`. Raises
    ProblemError: no class is in all folders, or folders of several models."""
    if not isinstance(folders, Mapping) or not folders:
        raise ProblemError(f"folders must map names to results folders, not {shown(folders)}")
    summaries, places, models, keys = {}, [], [], ["data set", "forgotten"]
    for name, each in folders.items():
        if name in {"before", *(f"± {other}" for other in folders)}:
            raise ProblemError(f"no method can be called {name!r}: give it another name")
        df, args, logs = create_results(each, True, multiclass=multiclass, before=before)
        if not isinstance(logs, list):
            each, args, logs = [each], [args], [logs]
        places += each
        models += map(_with_backbone, args, logs)
        rows = [(r.dataset, r.label, r.solver.get("seconds")) for x in logs for r in rows_of(x)]
        seconds = pd.DataFrame(rows, columns=[*keys, "seconds"]).astype({"seconds": float})
        summaries[name] = summarise(df).join(seconds.groupby(keys).mean(), on=keys)
    results.same_kind(places, models, model_alone=True)
    table = tables.side_by_side(summaries)
    if table.empty:
        raise ProblemError(f"no class is in all of {', '.join(map(str, places))}")
    return table


def plot_comparison(table: pd.DataFrame, path: Folder) -> Path:
    """Draw a table of `compare_results`: before and every method."""
    columns = ["data set", "forgotten", *(f"{name} before" for name in tables.QUANTITIES)]
    check_columns(table, columns, "compare_results")
    methods = [c.removeprefix("seconds ") for c in table.columns if c.startswith("seconds ")]
    colours = {name: COLOURS[1 + i % (len(COLOURS) - 1)] for i, name in enumerate(methods)}
    return draw_results(table, colours, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Print results as a table: one folder, seeds as mean and deviation, or several methods."""
    epilog = "example: python utils.py paper=results/results1/seed_0 exact=results/results2/seed_0"
    parser = Parser(prog="utils.py", description=main.__doc__, epilog=epilog)
    about = "results/resultsATTEMPT/seed_SEED; folders of one NAME or ATTEMPT are averaged"
    parser.add_argument("folders", nargs="+", metavar="[NAME=]FOLDER", help=about)
    parser.add_argument("--multiclass", action="store_true", help="classes forgotten at once")
    about = "results that hold the accuracies before forgetting"
    parser.add_argument("--before", metavar="FOLDER", help=about)
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV, too")
    parser.add_argument("--draw", metavar="FILE", help="draw the table, too: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    options: dict[str, Any] = {"multiclass": args.multiclass, "before": args.before}
    groups: dict[str, list[str]] = {}
    for text in args.folders:
        name, _, folder = text.partition("=") if not Path(text).exists() else ("", "", text)
        path = Path(folder)
        name = name or str(path.parent if path.name.startswith("seed_") else path)
        groups.setdefault(name, []).append(folder or text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the line of the average gain says it
        lines = [f"{name}: {_gain(folders, options)}" for name, folders in groups.items()]
        if len(groups) == 1:
            groups = {"after": next(iter(groups.values()))}
        # A list of one folder would have deviations, which are NaN.
        methods = {name: x if len(x) > 1 else x[0] for name, x in groups.items()}
        table = compare_results(methods, **options)
    if args.draw:
        plot_comparison(table, args.draw)
    if len(groups) == 1:  # "after" is its method, and no time
        table = table.rename(columns={"seconds after": "seconds"})
    if args.csv:
        tables.write_table(table, args.csv)
    print("\n".join(lines))
    seconds = {c: "{:.3f}".format for c in table if c.startswith("seconds")}
    print(table.to_string(index=False, float_format="{:.1f}".format, formatters=seconds))
    for path in filter(None, (args.csv, args.draw)):
        logger.info(f"written: {path}")


def _gain(folders: Sequence[str], options: Mapping[str, Any]) -> str:
    """The average gain of the folders of one method in words, or why there is none."""
    try:
        every = [compute_avg_gain(create_results(each, **options)[0]) for each in folders]
    except ProblemError as error:
        return str(error)
    known, gains = pd.concat(every).notna(), pd.Series([each.mean() for each in every])
    left_out = f"; {LEFT_OUT}: {(~known).sum()} of {len(known)} results"
    gain = f"average gain (0 is perfect, lower is better) {gains.mean():.4f}"
    gain += f" ± {gains.std():.4f} over {len(gains)}" if len(gains) > 1 else ""
    gain = gain if known.any() else "no average gain"
    return gain if known.all() else gain + left_out


if __name__ == "__main__":
    sys.exit(run(main))
