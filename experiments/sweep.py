"""Every data set with every backbone, method, setting and seed, and one table of it.

    python -m experiments sweep FILE.yaml [--launcher ray] [--out results] [options of train.py]
    python -m experiments sweep --datasets A,B --seeds 0,1 --backbones mini
        --trainers ForgetLoRA,ForgetExact --out FOLDER [--launcher ray] [options of train.py]

The file names what is varied, as docs/scale.md shows it; what `DEFAULTS` has may be left out.

Results of a file go to OUT/FILE/BACKBONE/TRAINER/SETTING/seed_SEED; those of the second form to
OUT/seed_SEED as `forget_clip.sh` has them, below a folder for each backbone and method where there
are several. The same command resumes. At the end the means over classes, and over seeds with their
standard deviation, are printed and written to sweep.csv beside a report.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from engine.cli import COUNT, Parser
from engine.config import OPTIONS, read_yaml
from engine.files import escape
from engine.log import logger
from engine.ray import add_launcher, launcher
from evaluation.report.page import write_report
from evaluation.report.runs import read_methods
from evaluation.results import REPORT, read_logs
from evaluation.rows import rows_of
from evaluation.tables import average_gains, result_table, summarise, write_table
from experiments.runs import KEYS, MODES, Run, launch, plan_run, refuse_failed
from forgetting.errors import ProblemError, shown, unknown
from trainers import SETTINGS

TABLE = "sweep.csv"
ALL_SETS = "all of them"
DEFAULTS: dict[str, Any] = {
    "datasets": [],
    "backbones": ["mini"],
    "trainers": ["ForgetLoRA"],
    "seeds": [0],
    "modes": ["alone"],  # or "at once": all classes of a set
    "classes": [],  # of every set, or all; without them the lists of forget_cls.py
    "settings": {"": {}},  # a name, and the keys that it stands for
}
VARIED = ("dataset", "seed", "backbone", "trainer", "output_dir", "multiclass")


def read_sweep(path: str | Path) -> dict[str, Any]:
    """What a file varies, with defaults; ProblemError for a key, name or value that is none."""
    varied = dict(DEFAULTS)
    for key, value in read_yaml(Path(path)).items():
        if key not in DEFAULTS:
            raise unknown(f"key in {path}", str(key), DEFAULTS)
        kind = int if key == "seeds" else str
        if key == "settings":
            if not value or not all(isinstance(keys, Mapping) for keys in value.values()):
                raise ProblemError(f"{path}: settings must map names to config keys")
        elif not isinstance(value, list) or not value or {type(x) for x in value} != {kind}:
            names = "whole numbers" if kind is int else "names"
            raise ProblemError(f"{path}: {key} must be a list of {names}, not {shown(value)}")
        varied[key] = value if key == "settings" else list(dict.fromkeys(value))
    if not varied["datasets"]:
        raise ProblemError(f"{path} names no data set, such as datasets: [MiniDigits]")
    for key, known in (("modes", MODES), ("trainers", SETTINGS)):
        for name in varied[key]:
            if name not in known:
                raise unknown(f"{key[:-1]} in {path}", name, known)
    return varied


def runs_of(
    varied: Mapping[str, Any],
    root: Path,
    options: Sequence[str],
    always: bool = True,
    parts: int = 1,
) -> list[Run]:
    """All runs of a sweep; ProblemError for one that would be refused, before anything is written.
    `always`: whether there is a folder for each backbone and trainer even if there is one only;
    `parts`: of the requests of a set whose classes are forgotten alone, a run each."""
    varied = DEFAULTS | dict(varied)
    own = ["FORGET.PART", *(OPTIONS[name] for name in VARIED)]
    own += [OPTIONS["forget"]] if varied["classes"] else []
    for setting, keys in [("", options), *varied["settings"].items()]:
        for key in own:
            if key in keys:
                where = f" (settings / {setting})" if setting else ""
                raise ProblemError(f"{key} is varied by the sweep and cannot be set too{where}")
    runs = []
    axes = [varied[key] for key in ("backbones", "trainers", "settings", "modes", "datasets")]
    for keys in product(*axes):
        backbone, trainer, setting, mode, _ = keys
        folders = [
            backbone.replace("/", "-") if always or len(varied["backbones"]) > 1 else "",
            trainer if always or len(varied["trainers"]) > 1 else "",
            escape(setting) if setting else "",
        ]
        more = [f"--forget={name}" for name in varied["classes"]] + list(options)
        for key, value in varied["settings"][setting].items():
            more += [key, str(tuple(value) if isinstance(value, list) else value)]
        count = parts if mode == "alone" else 1
        for seed, number in product(varied["seeds"], range(1, count + 1)):
            folder = Path(root, *filter(None, folders), f"seed_{seed}")
            part = f"{number}/{count}" if count > 1 else ""
            runs.append(plan_run(keys, folder, more, seed, part))
    return runs


def table_of(runs: Sequence[Run]) -> pd.DataFrame:
    """Means over classes, then over seeds with their standard deviation (`±`), in percent: a row of
    each backbone, method, setting, mode and data set, and one of all data sets together, over the
    seeds with results of all classes."""
    rows = pd.concat(map(results_of, runs))
    if rows.empty:
        return rows
    rows = rows.drop(columns="forgotten")
    if len({run.keys[-1] for run in runs}) > 1:
        rows = pd.concat([rows, rows.assign(**{"data set": ALL_SETS})])
    expected: dict[tuple[Any, ...], int] = {}
    for run in runs:
        for key in (run.keys, (*run.keys[:-1], ALL_SETS)):
            expected[(*key, run.seed)] = expected.get((*key, run.seed), 0) + len(run.labels)
    of_seed = rows.groupby([*KEYS, "seed"], sort=False)
    means = of_seed.mean().assign(classes=of_seed.size())
    complete = [count == expected[key] for key, count in means["classes"].items()]
    groups = means[complete].groupby(KEYS, sort=False)
    mean, deviation = groups.mean(), groups.std()
    for position, column in reversed(list(enumerate(mean.columns, 1))):
        if not column.endswith("before") and column != "classes":
            mean.insert(position, f"± {column}", deviation[column])
    return mean.assign(seeds=groups.size()).astype({"classes": int}).reset_index()


def results_of(run: Run) -> pd.DataFrame:
    """A row of `summarise` for every finished request of a run, with its gain, seed and `KEYS`."""
    try:
        rows = rows_of(read_logs(run.folder))
        rows = [row for row in rows if row.dataset == run.keys[-1] and row.label in run.labels]
        frame = result_table(run.folder, rows, multiclass=run.keys[3] == "at once")
    except ProblemError:  # nothing of this mode and seed
        return pd.DataFrame()
    table = summarise(frame).assign(**{"average gain": average_gains(frame)})
    return table.assign(seed=run.seed, **dict(zip(KEYS, run.keys, strict=True)))


def print_table(table: pd.DataFrame) -> None:
    formats = {c: "{:.4f}".format for c in table if c.endswith("average gain")}
    formats |= {c: "{:.0f}".format for c in ("classes", "seeds")}
    text = {"index": False, "float_format": "{:.1f}".format, "na_rep": "-"}
    print(table.to_string(formatters=formats, **text))


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Run what is not done yet, then print and write the table of all of it. ProblemError before
    any work for a run that cannot be; at the end for those that failed."""
    parser = Parser(prog="python -m experiments sweep", description=__doc__.splitlines()[0])
    lists = any(word.partition("=")[0] == "--datasets" for word in argv or ())
    parser.set_defaults(file=None)
    if not lists:  # else KEY VALUE pairs are the only words without a dash
        parser.add_argument("file", metavar="FILE.yaml", help="what is varied")
    names = ("datasets", "seeds", "backbones", "trainers")
    for name in names:
        text = f"{name} with commas between, in place of a file"
        parser.add_argument(f"--{name}", metavar="LIST", help=text)
    parser.add_argument("--out", default="results", help="folder of the results")
    parser.add_argument("--parts", type=COUNT, default=1, help="runs that share a set's requests")
    add_launcher(parser)
    args, options = parser.parse_known_args(argv)
    options += ["--quiet"] if args.quiet else []
    how = launcher(args)
    if args.file:
        varied, root = read_sweep(args.file), Path(args.out) / Path(args.file).stem
    else:
        given = {name: getattr(args, name) for name in names}
        varied = {name: text.split(",") for name, text in given.items() if text}
        if not all(seed.isdecimal() for seed in varied.get("seeds", [])):
            raise ProblemError(f"--seeds {args.seeds}: whole numbers with commas between")
        varied["seeds"] = list(map(int, varied.get("seeds", ["0"])))
        varied["modes"] = ["at once" if "--multiclass" in options else "alone"]
        options, root = [word for word in options if word != "--multiclass"], Path(args.out)
    runs = runs_of(varied, root, options, bool(args.file), args.parts)
    failed = launch(runs, how)
    table = table_of(runs)
    if table.empty:
        raise ProblemError(f"no results in {root} to make a table of; see the messages above")
    print_table(table)
    write_table(table, root / TABLE)
    methods = read_methods(root, {run.folder.resolve() for run in runs})
    for folder in dict.fromkeys(run.folder for run in runs):
        logger.info(f"results: {folder}")
    logger.info(f"table: {root / TABLE}; report: {write_report(methods, root / REPORT)}")
    refuse_failed(failed)
    return table
