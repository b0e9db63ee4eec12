"""Every data set with every backbone, method, setting and seed of one file, and one table of it.

    python -m experiments sweep FILE.yaml [--launcher ray] [--out results] [--data data]
        [--cache cache] [--features DIR] [--weights RN50=RN50.pt] [KEY VALUE ...]

The file names what is varied; all but the data sets may be left out:

    datasets: [MiniDigits, MiniShapes]
    backbones: [mini]                    # what is left out is not varied
    trainers: [ForgetLoRA, ForgetExact]
    seeds: [0, 1, 2]
    modes: [alone, at once]              # each class alone; all classes of a set at once
    classes: [all]                       # for every set; without it the lists of forget_cls.py
    settings:                            # a name, and the keys that it stands for
      rank 1: {FORGET.RANK: 1}
      rank 5: {FORGET.RANK: 5}

Results go to OUT/FILE/BACKBONE/TRAINER/SETTING/seed_SEED. The same command goes on where it was
stopped. At the end the means over classes, and over seeds with their standard deviation, are
printed and written to OUT/FILE/sweep.csv, and a report of everything to OUT/FILE/report.html.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field

import datasets
import train
from clip.architectures import architecture
from engine import TRAINER_REGISTRY
from engine.cli import COUNT, Parser, add_setting
from engine.config import (
    OPTIONS,
    BackboneSettings,
    DatasetSettings,
    FeatureSettings,
    TrainerSettings,
    declared,
    methods,
    read_yaml,
)
from engine.log import logger, quiet
from engine.ray import add_launcher, launcher
from engine.schema import Text, check, some
from evaluation.report import REPORT, read_runs, write_report
from evaluation.results import join_label
from evaluation.tables import average_gains, write_table
from experiments.reproduce import MODES, OWN_KEYS, weights_by_name
from experiments.runs import Run, folder_of, launch, refuse_keys, runs_of
from forgetting.errors import ProblemError, unknown
from forgetting.settings import check_value
from utils import create_results, summarise

PARTS = "parts of a set's requests, a run each"
TABLE = "sweep.csv"
PLAIN = ""  # the name of the settings as they are
ALL_SETS = "all of them"
KEYS = ["backbone", "trainer", "setting", "mode", "data set"]  # that a row of the table is known by
DEFAULTS = {"backbones": "MODEL.BACKBONE.NAME", "trainers": "TRAINER.NAME", "seeds": "SEED"}
Texts = Annotated[list[Text], Field(min_length=1)]
VARIED = {
    "datasets": Texts,
    "backbones": Texts,
    "trainers": Texts,
    "seeds": Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)],
    "modes": Annotated[list[Literal[tuple(MODES)]], Field(min_length=1)],
    "classes": Texts,
    "settings": Annotated[dict[Text, dict[Text, Any]], Field(min_length=1)],
}


@dataclass
class Case:
    """One backbone, method and setting: the runs into one folder, and what they are to forget.

    Attributes:
        labels: mode and data set -> the labels of the requests.
    """

    backbone: str
    trainer: str
    setting: str
    folder: Path
    runs: list[Run] = field(default_factory=list)
    labels: dict[tuple[str, str], list[str]] = field(default_factory=dict)


def read_sweep(path: str | Path, bundles: bool) -> dict[str, Any]:
    """What a file varies, every key of `VARIED` filled; `bundles`: names are those of a folder of
    bundles, and any may be right.

    Raises:
        ProblemError: no such file, an unknown key or name, a value of another kind.
    """
    found = read_yaml(Path(path))
    for key in found:
        if key not in VARIED:
            raise unknown(f"key in {path}", str(key), VARIED)
    check(some(**VARIED), found, path)
    if "datasets" not in found:
        raise ProblemError(f"{path} names no data set, such as datasets: [MiniDigits]")
    default = {key: [declared()[place].default] for key, place in DEFAULTS.items()}
    default |= {"modes": ["alone"], "classes": [], "settings": {PLAIN: {}}}
    varied = default | dict(found)
    for name in varied["trainers"]:
        if name not in methods():
            raise unknown(f"trainer in {path}", name, methods())
    for seed in varied["seeds"]:
        check_value(seed, declared()["SEED"], "SEED")
    if not bundles:
        varied["datasets"] = [datasets.spec(name).name for name in varied["datasets"]]
        varied["backbones"] = [architecture(name).name for name in varied["backbones"]]
    return {k: v if k == "settings" else list(dict.fromkeys(v)) for k, v in varied.items()}


def cases_of(varied: Mapping[str, Any], args: argparse.Namespace, parts: int) -> list[Case]:
    """All runs of a sweep, those of a case together.

    Raises:
        ProblemError: a run that would be refused; nothing has been written.
    """
    own = {*OWN_KEYS, OPTIONS["trainer"], *([OPTIONS["forget"]] if varied["classes"] else [])}
    refuse_keys(args.opts[::2], own)
    for setting, keys in varied["settings"].items():
        refuse_keys(keys, own, f" (settings / {setting} in {args.file})")
    weights = weights_by_name(args.weights, varied["backbones"])
    root = Path(args.out) / Path(args.file).stem
    seeds = list(map(str, varied["seeds"]))
    cases = []
    for backbone, trainer, (setting, keys) in product(
        varied["backbones"], varied["trainers"], varied["settings"].items()
    ):
        case = Case(backbone, trainer, setting, folder_of(root, backbone, trainer, setting))
        common = ["--backbone", backbone, "--trainer", trainer, "--root", args.data]
        common += ["--cache", args.cache, "--features", args.features]
        common += ["--weights", weights.get(backbone, "")]
        common += [f"--forget={name}" for name in varied["classes"]] + args.opts
        for key, value in keys.items():
            common += [key, str(tuple(value) if isinstance(value, list) else value)]
        for mode in varied["modes"]:
            argv = [*common, *MODES[mode]]
            for run in runs_of(case.folder, varied["datasets"], seeds[:1], argv):
                with quiet():  # the runs log what they find
                    cfg = train.setup_cfg(train.parse(run.argv))
                    plan = TRAINER_REGISTRY.get(cfg.TRAINER.NAME).preflight(cfg)
                case.labels[mode, plan.dataset] = list(map(join_label, plan.requests))
            about = list(filter(None, [backbone, trainer, setting, mode]))
            split = parts if mode == "alone" else 1
            case.runs += runs_of(case.folder, varied["datasets"], seeds, argv, split, about)
        cases.append(case)
    return cases


def table_of(cases: Sequence[Case], seeds: Sequence[int]) -> pd.DataFrame:
    """Means over classes, then over seeds with their standard deviation (`±`), in percent.

    Returns:
        A row for every case, mode and data set, and one for all data sets of a case together:
        `class`, `rest` and `others` before and after (see `utils.summarise`), `average gain` (0 is
        perfect, lower is better); `classes`, and `seeds` that hold results of all of them.
    """
    rows = pd.concat([_rows(case, mode, seeds) for case, mode in product(cases, MODES)])
    if rows.empty:
        return rows
    of_seed = rows.groupby([*KEYS, "seed"], sort=False)
    each = of_seed.mean().assign(classes=of_seed.size())
    each = each[each["classes"] == each.pop("asked")].groupby(KEYS, sort=False)
    mean, deviation = each.mean(), each.std()
    for place, column in reversed(list(enumerate(mean.columns, 1))):
        if not column.endswith("before") and column != "classes":
            mean.insert(place, f"± {column}", deviation[column])
    return mean.assign(seeds=each.size()).astype({"classes": int}).reset_index()


def _rows(case: Case, mode: str, seeds: Sequence[int]) -> pd.DataFrame:
    """A row for every seed and request of a case that has results, by data set, then all again;
    in the order of the file, for logs are in that in which runs ended."""
    labels = {name: case.labels[its, name] for its, name in case.labels if its == mode}
    asked = [(name, label) for name, each in labels.items() for label in each]
    place = {pair: number for number, pair in enumerate(asked)}
    found = []
    for seed in seeds:
        try:
            frame, _ = create_results(case.folder / f"seed_{seed}", multiclass=bool(MODES[mode]))
        except ProblemError:  # nothing of this mode and seed
            continue
        pairs = zip(frame["ds"], frame["name"], strict=True)
        frame.index = [place.get(pair, -1) for pair in pairs]
        frame = frame[frame.index >= 0].sort_index().reset_index(drop=True)
        row = summarise(frame).drop(columns="forgotten")
        found.append(row.assign(seed=seed, **{"average gain": average_gains(frame)}))
    if not found:
        return pd.DataFrame()
    told = {"backbone": case.backbone, "trainer": case.trainer, "setting": case.setting}
    rows = pd.concat(found).assign(**told, mode=mode)
    rows["asked"] = rows["data set"].map({name: len(each) for name, each in labels.items()})
    if len(labels) == 1:
        return rows
    whole = {"data set": ALL_SETS, "asked": len(asked)}
    return pd.concat([rows, rows.assign(**whole)])


def run_lists(argv: Sequence[str]) -> None:
    """The loops of `LAUNCHER=ray sh forget_clip.sh`: lists between commas, and options of train.py
    for every run.

    Raises:
        ProblemError: before any work, a setting that does not fit; after it, runs that failed.
    """
    parser = Parser(prog="python -m experiments sweep")
    for name in ("datasets", "seeds", "backbones", "trainers"):
        parser.add_argument(f"--{name}", default="", metavar="LIST", help="with commas between")
    parser.add_argument("--out", default="results", help="folder of the results")
    parser.add_argument("--parts", type=COUNT, default=1, help=PARTS)
    add_launcher(parser)
    args, common = parser.parse_known_args(argv)
    how, common = launcher(args), [*common, *(["--quiet"] if args.quiet else [])]
    default = {"backbones": BackboneSettings().name, "trainers": TrainerSettings().name}
    lists = {
        name: list(filter(None, map(str.strip, getattr(args, name).split(","))))
        for name in ("datasets", "seeds", "backbones", "trainers")
    }
    runs = []
    for backbone, trainer in product(
        lists["backbones"] or [default["backbones"]], lists["trainers"] or [default["trainers"]]
    ):
        own = (
            backbone if len(lists["backbones"]) > 1 else "",
            trainer if len(lists["trainers"]) > 1 else "",
        )
        line = ["--backbone", backbone, "--trainer", trainer, *common]
        runs += runs_of(
            folder_of(args.out, *own),
            lists["datasets"],
            lists["seeds"] or ["0"],
            line,
            args.parts,
            [backbone, trainer],
        )
    with quiet():
        for run in runs:
            train.setup_cfg(train.parse(run.argv))
    failed = launch(runs, how)
    for folder in dict.fromkeys(run.folder for run in runs if run not in failed):
        logger.info(f"results: {folder}")
    if failed:
        titles = "; ".join(run.title for run in failed)
        raise ProblemError(f"failed: {titles}; see the messages above")


def main(argv: Sequence[str] | None = None) -> pd.DataFrame | None:
    """Run what is not done yet, then print and write the table of all of it; returns the table.

    Raises:
        ProblemError: before any work, a run that cannot be; after it, runs that failed (the table
            holds the others).
    """
    argv = sys.argv[2:] if argv is None else argv
    if any(word.partition("=")[0] == "--datasets" for word in argv):
        return run_lists(argv)
    parser = Parser(prog="python -m experiments sweep", description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE.yaml", help="what is varied")
    parser.add_argument("--out", default="results", help="folder of the results")
    add_setting(parser, "--data", DatasetSettings, "root")
    add_setting(parser, "--cache", FeatureSettings, "cache")
    add_setting(parser, "--features", FeatureSettings, "dir")
    parser.add_argument(
        "--weights", action="append", default=[], metavar="ARCH=PATH", help="a local checkpoint"
    )
    add_launcher(parser)
    parser.add_argument("--parts", type=COUNT, default=1, help=PARTS)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")
    args = parser.parse_args(argv)
    how = launcher(args)
    varied = read_sweep(args.file, bool(args.features))
    cases = cases_of(varied, args, args.parts)
    runs = [run for case in cases for run in case.runs]
    root = Path(args.out) / Path(args.file).stem
    failed = launch(runs, how)
    table = table_of(cases, varied["seeds"])
    if table.empty:
        why = "every run failed, see the messages above"
        if len(failed) < len(runs):
            why = f"no request of {args.file} has any (a set of one class has none at once)"
        raise ProblemError(f"no results in {root} to make a table of: {why}")
    gains = {c: "{:.4f}".format for c in table if c.endswith("average gain")}
    counts = {"classes": "{:.0f}".format}
    print(
        table.to_string(
            index=False, float_format="{:.1f}".format, formatters=gains | counts, na_rep="-"
        )
    )
    write_table(table, root / TABLE)
    logger.info(f"table: {root / TABLE}")
    there = {Path(run.folder).resolve() for run in runs}
    shown = [run for run in read_runs(root) if run.folder.resolve() in there]
    logger.info(f"report: {write_report(shown, root / REPORT)}")
    if failed:
        titles = "; ".join(run.title for run in failed)
        raise ProblemError(f"failed: {titles}; see the messages above")
    return table
