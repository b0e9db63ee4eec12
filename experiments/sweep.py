"""Every data set with every backbone, method, setting and seed, and one table of it.

    python -m experiments sweep FILE.yaml [--datasets A,B] [--methods C,D] [--launcher ray]
        [--out results] [options of train.py, such as --forget]
    python -m experiments sweep --datasets A,B --seeds 0,1 --backbones mini
        --trainers ForgetLoRA,ForgetExact --out FOLDER [--launcher ray] [options of train.py]

The file names what is varied, as docs/scale.md shows it; lists and options go before it.

Results of a file go to OUT/FILE/BACKBONE/METHOD/seed_SEED; those of the second form to
OUT/seed_SEED as `forget_clip.sh` has them, below a folder for each backbone and method where there
are several. The same command resumes. At the end the means over classes, and over seeds with their
standard deviation, are printed and written to sweep.csv beside a report.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from engine.cli import COUNT, SEED, Parser
from engine.config import read_yaml
from engine.files import OBJECT, TEXT, Kind, check
from engine.log import logger, screen
from engine.ray import LauncherSettings, add_launcher, launcher
from evaluation.report.page import write_report
from evaluation.report.runs import read_methods
from evaluation.results import REPORT
from evaluation.rows import Row, read_rows
from evaluation.tables import (
    QUANTITIES,
    audit_table,
    average_gains,
    quantities,
    result_table,
    summarise,
    write_table,
)
from experiments.runs import DEFAULTS, KEYS, LEVELS, MODES, Run, launch, refuse_failed, runs_of
from forgetting.errors import ProblemError, unknown

TABLE = "sweep.csv"
ALL_SETS = "all of them"
WHOLE = Kind("a whole number", lambda value: type(value) is int)
MODE = Kind(" or ".join(MODES), lambda value: value in list(MODES))
SHAPE: dict[str, Any] = {f"{key}?": [TEXT, ...] for key in DEFAULTS}
SHAPE |= {"methods?": {str: OBJECT}, "settings?": {str: OBJECT}}
SHAPE |= {"seeds?": [WHOLE, ...], "modes?": [MODE, ...]}
STEMS = ("before", "after", "change", "worst")
COLUMNS = [f"{name} {stem}" for name in QUANTITIES for stem in STEMS]
WORST = [column for column in COLUMNS if column.endswith(" worst")]
FORMATS = {"average gain": "z.4f", "seconds": ".3f", "objective": ".4g", "gap": ".0e"}
FORMATS |= dict.fromkeys(("classes", "seeds", "bytes"), ".0f")


def read_sweep(path: Path) -> dict[str, Any]:
    """What a file varies; ProblemError for a key or value that is none."""
    varied = read_yaml(path)
    for key in varied:
        if key not in DEFAULTS:
            raise unknown(f"key in {path}", str(key), DEFAULTS)
    check(varied, SHAPE, path)
    return varied


def results_of(run: Run) -> pd.DataFrame:
    """A row for every finished request of a run: its `KEYS`, its seed, `forgotten` and numbers.

    In percent: `before`, `after` and their difference `change` of the forgotten `class`, of the
    `rest` of its set and (mean) of the `others`; `worst`, what is left of the class, and the points
    that the rest or one other set lost. `seconds`, `bytes` of the adapter, `objective` and `gap` of
    its certificate. Of audited classes: `words worst`, under the other words that find most of it;
    `comes back`, of 100; `neighbours` and `retrieval`, changes in points; `retrieval forgotten`.
    """
    try:
        rows = read_rows(run.folder)
        rows = [row for row in rows if row.dataset == run.keys[-1] and row.label in run.labels]
        frame = result_table(run.folder, rows, multiclass=run.keys[2] == "at once")
    except ProblemError:  # nothing of this mode and seed
        return pd.DataFrame()
    table = summarise(frame)
    for name, (before, after) in quantities(frame).items():
        change = pd.DataFrame(100 * (frame[after].to_numpy() - frame[before].to_numpy()))
        table[f"{name} change"] = change.mean(axis=1)
        table[f"{name} worst"] = table["class after"] if name == "class" else -change.min(axis=1)
    table = table[["forgotten", *COLUMNS]].drop(columns="class change")
    table["average gain"] = average_gains(frame)
    by_label = {row.label: _recorded(row, run.folder) for row in rows}
    table = table.join(pd.DataFrame.from_dict(by_label, orient="index", dtype=float), "forgotten")
    if len(audits := audit_table(rows)):
        known = audits["words worst"].notna()
        audits["comes back"] = 100 * audits["words back"].gt(0).astype(float).where(known)
        for name in ("neighbours", "retrieval"):
            audits[name] = audits[f"{name} after"] - audits[f"{name} before"]
        columns = ["words worst", "comes back", "neighbours", "retrieval", "retrieval forgotten"]
        table = table.join(audits.groupby("forgotten")[columns].mean(), "forgotten")
    return table.assign(seed=run.seed, **dict(zip(KEYS, run.keys, strict=True)))


def _recorded(row: Row, folder: Path) -> dict[str, Any]:
    adapter = folder / row.solver.get("adapter", "")
    return {
        "seconds": row.solver.get("seconds"),
        "bytes": adapter.stat().st_size if adapter.is_file() else None,
        "objective": row.solver.get("objective", row.solver.get("certificate", {}).get("primal")),
        "gap": row.gap,
    }


def table_of(runs: Sequence[Run]) -> pd.DataFrame:
    """Means over classes of what `results_of` has (of `WORST` the largest), then over seeds, with
    the standard deviation (`±`) of what was measured after: a row of each backbone, method, mode
    and data set, and one of all data sets together, over the seeds with results of all classes."""
    rows = pd.concat(map(results_of, runs))
    if rows.empty:
        return rows
    rows = rows.drop(columns="forgotten")
    if len({run.keys[-1] for run in runs}) > 1:
        rows = pd.concat([rows, rows.assign(**{"data set": ALL_SETS})])
    expected = Counter()
    for run in runs:
        for dataset in (run.keys[-1], ALL_SETS):
            expected[(*run.keys[:-1], dataset, run.seed)] += len(run.labels)
    of_seed = rows.groupby([*KEYS, "seed"], sort=False)
    means = of_seed.mean().assign(classes=of_seed.size(), **of_seed[WORST].max())
    means = means[[count == expected[key] for key, count in means["classes"].items()]]
    groups = means.groupby(KEYS, sort=False)
    table, deviations = groups.mean(), groups.std()
    for column in [x for x in table if x.endswith((" after", " gain"))]:
        table.insert(table.columns.get_loc(column) + 1, f"± {column}", deviations[column])
    return table.assign(seeds=groups.size()).astype({"classes": int}).reset_index()


def print_table(table: pd.DataFrame) -> None:
    """Print a table of `table_of`: first a line of what is the same in all of its rows."""
    texts = table.dropna(axis=1, how="all")
    for column in texts.select_dtypes("number"):
        form = FORMATS.get(column.removeprefix("± "), "z.2f")
        texts[column] = texts[column].map(lambda x, form=form: "-" if pd.isna(x) else f"{x:{form}}")
    same = [column for column in texts if len(texts) > 1 and texts[column].nunique() == 1]
    print("\nAfter, in percent; average gain, of classes recognised before: 0 is perfect")
    if same:
        print(", ".join(f"{column} {texts[column].iloc[0]}" for column in same))
    print("", texts.drop(columns=same).to_string(index=False), sep="\n")


def run_sweep(
    runs: Sequence[Run], root: Path, how: LauncherSettings | None = None
) -> tuple[pd.DataFrame, list[Run]]:
    """Run what is not done yet; print the table of all of it, and write it and a report to `root`.
    Returns the table, and the runs that failed; ProblemError if all did."""
    if root.exists() and not root.is_dir():
        raise ProblemError(f"{root} is no folder; choose another --out")
    failed = launch(runs, how or LauncherSettings())
    table = table_of(runs)
    if table.empty:
        raise ProblemError(f"no results in {root} to make a table of; see the messages above")
    print_table(table)
    write_table(table, root / TABLE)
    methods = read_methods(root, {run.folder.resolve() for run in runs})
    for folder in dict.fromkeys(run.folder for run in runs):
        logger.info(f"results: {folder}")
    logger.info(f"table: {root / TABLE}; report: {write_report(methods, root / REPORT)}")
    return table, failed


def main(argv: Sequence[str] | None = None, ours: dict[str, Any] | None = None) -> pd.DataFrame:
    """Run what is not done yet, then print and write the table of all of it. ProblemError before
    any work for a run that cannot be; at the end for those that failed. `ours`: what is varied,
    without a file, by `experiments baselines`; its runs are quiet."""
    name, about = "baselines" if ours else "sweep", __doc__.splitlines()[0]
    more = "Options of train.py (--features, --forget, ...) and KEY VALUE pairs may follow."
    parser = Parser(prog=f"python -m experiments {name}", description=about, epilog=more)
    parser.set_defaults(file=None)
    words = argv or ["FILE.yaml"]
    lists = words[0][:1] == "-" and "--datasets" in [word.partition("=")[0] for word in words]
    if not ours and not lists:  # else KEY VALUE pairs are the only words without a dash
        parser.add_argument("file", type=Path, metavar="FILE.yaml", help="what is varied")
    for name in ("datasets", "backbones", "methods", "trainers", "seeds"):
        split = partial(_split, SEED if name == "seeds" else str)
        about = f"{name} with commas between, in place of the file's"
        parser.add_argument(f"--{name}", f"--{name[:-1]}", type=split, metavar="LIST", help=about)
    parser.add_argument("--out", type=Path, default="results", help="folder of the results")
    parser.add_argument("--parts", type=COUNT, default=1, help="runs that share a set's requests")
    add_launcher(parser)
    args, options = parser.parse_known_args(argv)
    options += ["--quiet"] if args.quiet or ours else []
    if args.quiet:
        screen.setLevel(logging.WARNING)
    varied = read_sweep(args.file) if args.file else dict(ours or {})
    known = varied.get("methods", {})
    for name in args.methods or ():
        if name not in known:
            raise unknown("method", name, known)
    args.methods = {name: known[name] for name in args.methods or known}
    varied |= {name: given for name in DEFAULTS if (given := vars(args).get(name))}
    root, levels = args.out, ["methods"]
    if args.file:
        root, levels = root / args.file.stem, LEVELS
    elif not ours:
        several = {"backbones": args.backbones, "methods": args.trainers}
        levels = [level for level, names in several.items() if len(names or ()) > 1]
    runs = runs_of(varied, root, options, levels, args.parts)
    table, failed = run_sweep(runs, root, launcher(args))
    refuse_failed(failed)
    return table


def _split(kind: Callable[[str], Any], text: str) -> list[Any]:
    return [kind(part) for part in text.split(",")]
