"""The paper's experiments in one command: its numbers beside those measured here.

    make reproduce DATA=data [OUT=results] [CACHE=cache]
    python -m experiments reproduce --data data [--out results] [--cache cache]
        [--datasets StanfordDogs,Caltech101] [--backbones RN50,ViT-B/16]
        [--weights RN50=RN50.pt] [KEY VALUE ...]

Every class of forget_cls.py alone, then a set's list at once, for each set and backbone, as
`sh forget_clip.sh` does it with seed 0. A run that was killed goes on at its class. Each backbone
has a folder of its own, OUT/resultsreproduce_BACKBONE/seed_0; the tables are derived from its
logs, printed, and written to OUT/reproduce.csv and OUT/reproduce.md.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import datasets
from clip.architectures import architecture
from clip.source import ClipSource
from engine.cli import Parser
from engine.log import logger
from engine.ray import add_launcher, launcher
from evaluation.results import LOGS, read_logs, split_label
from evaluation.rows import Row, rows_of
from evaluation.tables import average_gains, write_table
from experiments.runs import launch
from experiments.sweep import DEFAULTS, MODES, runs_of
from forgetting.errors import ProblemError, unknown
from forgetting.io import atomic_path
from trainers.inputs import user_lists
from utils import create_results, summarise

BACKBONES = ("RN50", "ViT-B/16")
HEAD = "# The paper's numbers and those measured here"
COLUMNS = ["backbone", "mode", "data set", "quantity", "paper", "ours"]
# Kravets and Namboodiri (TMLR 2025): accuracies before forgetting that its authors' files hold.
PAPER_SET = {
    "RN50": {
        "StanfordDogs": 0.5168,
        "StanfordCars": 0.5576,
        "Caltech101": 0.8572,
        "OxfordFlowers": 0.6606,
    }
}
PAPER_CLASS = {
    "RN50": {
        "StanfordDogs": {"Pekinese": 0.705, "toy poodle": 0.574, "Scotch terrier": 0.500},
        "StanfordCars": {
            "2009 Spyker C8 Coupe": 0.262,
            "2010 Dodge Ram Pickup 3500 Crew Cab": 0.405,
            "2011 Ford Ranger SuperCab": 0.524,
        },
        "Caltech101": {"euphonium": 0.789, "minaret": 0.826, "platypus": 0.900},
        "OxfordFlowers": {"trumpet creeper": 0.588, "gazania": 0.957, "tree mallow": 1.000},
    }
}


@dataclass(frozen=True)
class Counts:
    """How many test images a set has, in all and by class, and whether its split is the published
    one."""

    images: int
    by_class: Counter[str]
    comparable: bool


def read_sets(root: str, names: Sequence[str]) -> dict[str, Counts]:
    """The sets under `root`.

    Raises:
        ProblemError: sets that are missing, all of them in one line, or the first that is broken.
    """
    states = datasets.available(root)
    absent = [f"{name} ({states[name]})" for name in names if states[name] is not None]
    if absent:
        raise ProblemError(
            f"missing: {'; '.join(absent)}; --datasets NAME,NAME leaves out those that you lack"
        )
    found = {}
    for name in names:
        images = datasets.load(name, root)
        by_class = Counter(item.classname for item in images.test)
        found[name] = Counts(len(images.test), by_class, images.comparable)
    return found


def results_folder(out: str | Path, backbone: str) -> Path:
    """Where the results of a backbone lie; one folder holds one backbone."""
    return Path(out) / f"resultsreproduce_{backbone.replace('/', '-')}" / "seed_0"


def whole_set(rows: Sequence[Row], test: Counts) -> float:
    """Accuracy over a whole test set before forgetting, from the rows of one request: that of its
    classes, and that over all other images."""
    right = sum((row.own.before or 0) * test.by_class[row.name] for row in rows)
    rest = test.images - sum(test.by_class[row.name] for row in rows)
    return (right + (rows[0].rest.before or 0) * rest) / test.images


def frames_of(folder: Path, sets: Iterable[str]) -> dict[str, pd.DataFrame]:
    """Mode -> the frame of `create_results`, of the modes that have results of `sets`."""
    frames = {}
    for mode, flags in MODES.items():
        try:
            frame, _ = create_results(folder, multiclass=bool(flags))
        except ProblemError:  # no run of this mode succeeded
            continue
        frame = frame[frame["ds"].isin(list(sets))]
        if len(frame):
            frames[mode] = frame
    return frames


def compare(backbone: str, folder: Path, sets: dict[str, Counts]) -> pd.DataFrame:
    """The paper's numbers beside those of a results folder, as fractions.

    Returns:
        Columns `backbone`, `mode` ("before": nothing is forgotten), `data set`, `quantity`,
        `paper`, `ours`, `difference` (ours less the paper's); NaN where there is no number.
    """
    rows: list[tuple] = []  # of all columns but the first and the last
    results = rows_of(read_logs(folder))
    for dataset, test in sets.items():
        own = [row for row in results if row.dataset == dataset]
        if not own:
            continue
        paper = PAPER_SET.get(backbone, {}).get(dataset)
        request = [row for row in own if row.label == own[0].label]
        rows.append(("before", dataset, "whole test set", paper, whole_set(request, test)))
        known = PAPER_CLASS.get(backbone, {}).get(dataset, {})
        known = {datasets.key(name): value for name, value in known.items()}
        for name, before in {row.name: row.own.before for row in own}.items():
            rows.append(("before", dataset, name, known.get(datasets.key(name)), before))
    for mode, frame in frames_of(folder, sets).items():
        parts = [*frame.groupby("ds", sort=False), ("all of them", frame)]
        rows += [
            (mode, name, "average gain", None, average_gains(part).mean()) for name, part in parts
        ]
    table = pd.DataFrame([(backbone, *row) for row in rows], columns=COLUMNS)
    table = table.astype({"paper": float, "ours": float})
    return table.assign(difference=table["ours"] - table["paper"])


def forgotten(backbone: str, folder: Path, sets: dict[str, Counts]) -> pd.DataFrame:
    """Accuracies before and after forgetting in percent, a row a class, or a set's classes at once
    (see `utils.summarise`)."""
    parts = {(backbone, mode): summarise(frame) for mode, frame in frames_of(folder, sets).items()}
    if not parts:
        return pd.DataFrame()
    table = pd.concat(parts, names=["backbone", "mode", None]).reset_index(["backbone", "mode"])
    table["forgotten"] = table["forgotten"].map(lambda label: ", ".join(split_label(label)))
    return table


def markdown(table: pd.DataFrame) -> str:
    """A frame as a Markdown table, numbers to four digits, "-" where there is none."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "-" if math.isnan(value) else f"{value:.4g}"
        return str(value).replace("|", "\\|")

    lines = [list(table.columns), ["---"] * len(table.columns)]
    lines += [[cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(args: argparse.Namespace, sets: dict[str, Counts]) -> pd.DataFrame:
    """Derive the tables from the logs, print them, write them beside the results."""
    folders = {name: results_folder(args.out, name) for name in args.backbones}
    folders = {name: folder for name, folder in folders.items() if (folder / LOGS).is_file()}
    if not folders:
        raise ProblemError(f"no results in {args.out}: every run failed, see the messages above")
    table = pd.concat([compare(*item, sets) for item in folders.items()], ignore_index=True)
    after = pd.concat([forgotten(*item, sets) for item in folders.items()], ignore_index=True)
    notes = [
        f"{name}: not the published split, so its numbers are not comparable with the paper's"
        for name, test in sets.items()
        if not test.comparable
    ]
    if args.opts:
        notes.append(f"not the paper's settings: {' '.join(args.opts)}")
    notes.append(
        'Fractions; "before": nothing is forgotten, "difference": ours less the paper\'s, "-": no '
        "such number is known. Average gain: 0 is perfect, lower is better."
    )
    parts = [HEAD, markdown(table), *notes]
    parts += ["# Before and after forgetting, in percent", markdown(after)]
    text = "\n\n".join(parts)
    print(f"\n{text}\n")
    paths = {suffix: Path(args.out) / f"reproduce.{suffix}" for suffix in ("md", "csv")}
    with atomic_path(paths["md"]) as path:
        path.write_text(text + "\n", encoding="utf-8")
    write_table(table, paths["csv"])
    logger.info(f"results: {', '.join(map(str, folders.values()))}")
    logger.info(f"written: {paths['md']} and {paths['csv']}")
    return table


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
    """The command line, checked, and checkpoint paths by backbone."""
    parser = Parser(prog="python -m experiments reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the image sets")
    parser.add_argument("--out", default="results", help="folder of the results")
    parser.add_argument("--cache", default="cache", help="folder for weights and features")
    lists = ",".join(user_lists().all_ds)
    parser.add_argument("--datasets", default=lists, help="names with commas between")
    parser.add_argument("--backbones", default=",".join(BACKBONES), help="the same")
    parser.add_argument(
        "--weights", action="append", default=[], metavar="ARCH=PATH", help="a local checkpoint"
    )
    add_launcher(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")
    args = parser.parse_args(argv)
    args.datasets = [datasets.spec(name).name for name in _listed("datasets", args.datasets)]
    args.backbones = [architecture(name).name for name in _listed("backbones", args.backbones)]
    return args, weights_by_name(args.weights, args.backbones)


def _listed(option: str, text: str) -> list[str]:
    """The names between commas, each once."""
    names = list(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))
    if not names:
        raise ProblemError(f"--{option} {text!r}: it names none")
    return names


def weights_by_name(texts: Sequence[str], backbones: Sequence[str]) -> dict[str, str]:
    """Checkpoint paths by backbone, from ARCH=PATH; ProblemError for one that is not of them."""
    weights = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise ProblemError(f"--weights {text}: must be ARCH=PATH, such as RN50=RN50.pt")
        if name not in backbones:
            raise unknown("backbone of --weights", name, backbones)
        weights[name] = path
    return weights


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Run what is not done yet, then compare; returns the table of numbers side by side.

    Raises:
        ProblemError: before any work, a set or checkpoint that cannot be had; after it, runs that
            failed (the tables hold the others).
    """
    args, weights = parse(argv)
    sets = read_sets(args.data, args.datasets)
    runs = []
    for backbone in args.backbones:
        ClipSource(backbone, weights.get(backbone), args.cache)  # downloads what is missing
        options = ["--root", args.data, "--cache", args.cache]
        options += ["--weights", weights.get(backbone, ""), *args.opts]
        varied = {"backbones": [backbone], "datasets": args.datasets, "modes": list(MODES)}
        root = results_folder(args.out, backbone).parent
        runs += runs_of(DEFAULTS | varied, root, options, always=False)
    failed = launch(runs, launcher(args))
    table = write(args, sets)
    if failed:
        titles = "; ".join(run.title for run in failed)
        raise ProblemError(f"failed: {titles}; see the messages above")
    return table
