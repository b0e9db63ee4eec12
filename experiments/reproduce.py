"""The paper's experiments in one command: its numbers, and others', beside those measured here.

    make reproduce DATA=data [OUT=results] [CACHE=cache]
    python -m experiments reproduce --data data [--out results] [--cache cache]
        [--datasets StanfordDogs,Caltech101] [--backbones RN50,ViT-B/16]
        [--weights RN50=RN50.pt] [KEY VALUE ...]

Every class of forget_cls.py alone, then a set's list at once, for each set and backbone, as
`sh forget_clip.sh` does it with seed 0. A run that was killed goes on at its class. Results go to
OUT/reproduce/BACKBONE/ForgetLoRA/seed_0; the tables are derived from the logs there, printed, and
written to OUT/reproduce/sweep.csv (after forgetting) and paper.csv (before).
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

import datasets
from clip.architectures import architecture
from clip.source import ClipSource
from engine.cli import Parser
from engine.config import read_yaml
from engine.log import logger
from engine.ray import add_launcher, launcher
from evaluation.rows import Row, read_rows
from evaluation.tables import write_table
from experiments.runs import MODES, Run, refuse_failed, runs_of
from experiments.sweep import run_sweep
from forgetting.errors import ProblemError
from trainers.inputs import user_lists

BACKBONES = ("RN50", "ViT-B/16")
WHOLE = "whole test set"
NUMBERS = read_yaml(Path(__file__).with_name("paper.yaml"))
PAPER = NUMBERS["before"]  # backbone -> set -> class -> accuracy
PUBLISHED = NUMBERS["published"]  # backbone -> set -> method -> class, rest, after forgetting


def whole_set(rows: Sequence[Row], images: Mapping[str, int]) -> float:
    """Accuracy over a whole test set before forgetting, from the rows of one request: that of its
    classes, and that over all other images. `images`: of each class."""
    right = sum((row.own.before or 0) * images[row.name] for row in rows)
    rest = sum(images.values()) - sum(images[row.name] for row in rows)
    return (right + (rows[0].rest.before or 0) * rest) / sum(images.values())


def compare(
    backbone: str, rows: Sequence[Row], images: Mapping[str, Mapping[str, int]]
) -> pd.DataFrame:
    """Accuracies before forgetting beside the paper's, fractions; NaN where it has no number.
    `images`: set -> class -> how many test images it has."""
    lines = []
    for dataset, count in images.items():
        own = [row for row in rows if row.dataset == dataset]
        if own:
            request = [row for row in own if row.label == own[0].label]
            ours = {WHOLE: whole_set(request, count)} | {row.name: row.own.before for row in own}
            paper = PAPER.get(backbone, {}).get(dataset, {})
            known = {datasets.key(name): value for name, value in paper.items()}
            lines += [(dataset, name, known.get(datasets.key(name)), ours[name]) for name in ours]
    table = pd.DataFrame(lines, columns=["data set", "class", "paper", "ours"])
    table.insert(0, "backbone", backbone)
    table = table.astype({"paper": float, "ours": float})
    return table.assign(difference=table["ours"] - table["paper"])


def beside(after: pd.DataFrame) -> pd.DataFrame:
    """Accuracies after forgetting that others published, with ours of classes forgotten alone, in
    percent; empty if there are none for these sets and backbones. `after`: of `table_of`."""
    lines = []
    for row in after[after["mode"] == "alone"].to_dict("records"):
        others = PUBLISHED.get(row["backbone"], {}).get(row["data set"], {})
        if others:
            ours = {f"{row['method']}, here": (row["class after"], row["rest after"])}
            for method, numbers in (others | ours).items():
                lines.append((row["backbone"], row["data set"], method, *numbers))
    return pd.DataFrame(lines, columns=["backbone", "data set", "method", "class", "rest"])


def compare_all(
    args: argparse.Namespace, runs: Sequence[Run], sets: Mapping[str, datasets.ImageSet]
) -> pd.DataFrame:
    """Derive the accuracies before forgetting from the logs, print and write them."""
    images = {name: Counter(x.classname for x in each.test) for name, each in sets.items()}
    folders = {run.keys[0]: run.folder for run in runs if run.folder.exists()}
    tables = [compare(name, read_rows(folder), images) for name, folder in folders.items()]
    table, path = pd.concat(tables, ignore_index=True), Path(args.out, "reproduce", "paper.csv")
    print("\nBefore forgetting, fractions; difference: ours less the paper's\n")
    print(table.to_string(index=False, float_format="{:.4f}".format, na_rep="-"))
    for name, each in sets.items():
        if not each.comparable:
            print(f"{name}: not the published split, not comparable with the paper's numbers")
    if args.opts:
        print(f"not the paper's settings: {' '.join(args.opts)}")
    write_table(table, path)
    logger.info(f"written: {path}")
    return table


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Run what is not done yet, then compare; returns the table of numbers side by side."""
    parser = Parser(prog="python -m experiments reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the image sets")
    parser.add_argument("--out", default="results", help="folder of the results")
    parser.add_argument("--cache", default="cache", help="folder for weights and features")
    lists = ",".join(user_lists().all_ds)
    parser.add_argument("--datasets", default=lists, help="names with commas between")
    parser.add_argument("--backbones", default=",".join(BACKBONES), help="the same")
    several = {"action": "append", "default": []}
    parser.add_argument("--weights", metavar="ARCH=PATH", help="a local checkpoint", **several)
    add_launcher(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")
    args = parser.parse_args(argv)
    args.datasets = [datasets.spec(name).name for name in args.datasets.split(",")]
    args.backbones = [architecture(name).name for name in args.backbones.split(",")]
    weights = dict(text.partition("=")[::2] for text in args.weights)  # by backbone
    for name, path in weights.items():
        if name not in args.backbones or not path:
            raise ProblemError(f"--weights {name}={path}: must be ARCH=PATH, such as RN50=RN50.pt")
    sets = {name: datasets.load(name, args.data) for name in args.datasets}
    root, runs = Path(args.out, "reproduce"), []
    for backbone in args.backbones:
        ClipSource(backbone, weights.get(backbone), args.cache)  # downloads what is missing
        options = ["--root", args.data, "--cache", args.cache]
        options += ["--weights", weights.get(backbone, ""), *args.opts]
        varied = {"backbones": [backbone], "datasets": args.datasets, "modes": list(MODES)}
        runs += runs_of(varied, root, options)
    after, failed = run_sweep(runs, root, launcher(args))
    others = beside(after)
    if not others.empty:
        print("\nAfter, as others print it; what differs: docs/paper.md\n")
        print(others.to_string(index=False, float_format="{:.2f}".format))
    table = compare_all(args, runs, sets)
    refuse_failed(failed)
    return table
