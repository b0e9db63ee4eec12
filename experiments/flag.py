"""What a flag from names alone catches, and its false alarms, at stated rates.

    python -m experiments flag [--features DIR] [--dataset SET] [--classes N] [--out flag]

Each class is flagged among the images of its set; among those of all sets, without those of other
sets' classes that mean the same; and alone, where images of the other sets may tell what other
things look like. Without --features: the sets of the embedded `mini`, whose --scale is 20.
"""

import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from engine.cli import COUNT, Parser
from engine.log import logger, progress
from evaluation.tables import write_table
from experiments.hide import Index, load_bundles, mini
from forgetting.flag import SCALE, flag
from forgetting.models.vocabulary import generic_names

RATES = (0.01, 0.005, 0.001)
SAME = 0.9  # cosine of two classes' names above which they mean the same


def rows_of(
    index: Index, dataset: str, count: int | None, scale: float
) -> Iterator[dict[str, Any]]:
    """Percent caught and false alarms of each class, or of `count` random ones, at each rate."""
    names, vocabulary = index.bundles[dataset].classnames, index.vocabulary
    every = index.embed(torch.cat([each.forget_hidden for each in index.bundles.values()]))
    if index.encode:
        vocabulary = index.embed(index.encode(generic_names()))
    if count and count < len(names):
        names = random.Random(dataset).sample(names, count)
    for name in progress(names, f"{dataset}: flags"):
        label = index.first[dataset] + index.bundles[dataset].classnames.index(name)
        own, own_set = index.labels == label, (index.set_of == index.set_of[label])[index.labels]
        others = (every @ every[label] < SAME)[index.labels] & ~own_set
        cases = {
            "its set": (own_set, None),
            "all sets": (own_set | others, None),
            "alone": (own, None),
            "alone, reference": (own, index.images[others]),
        }
        for images, (some, reference) in cases.items():
            with warnings.catch_warnings(action="ignore"):  # of rates that are measured here
                how = {"reference": reference, "scale": scale}
                scores = flag(index.images[some], every[label], vocabulary, **how)[0]
            row = {"images": images, "data set": dataset, "class": name}
            for rate in RATES:
                flags = 100.0 * (1 - scores <= rate)
                row[f"caught {rate:.1%}"] = float(flags[own[some]].mean())
                row[f"false {rate:.1%}"] = float(flags[~own[some]].mean())
            yield row


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure and print; returns a row for every class and either set of images."""
    parser = Parser(prog="python -m experiments flag", description=__doc__.splitlines()[0])
    parser.add_argument("--features", help="folder of feature bundles; default: mini's four sets")
    parser.add_argument("--backbone", default="ViT-B/32", help="backbone of the bundles")
    parser.add_argument("--dataset", metavar="SET", action="append", help="default: all there are")
    parser.add_argument("--classes", metavar="N", type=COUNT, help="random ones; default: all")
    parser.add_argument("--scale", type=float, default=SCALE, help="half of the logit scale")
    parser.add_argument("--out", type=Path, default=Path("flag"), help="folder of the table")
    args = parser.parse_args(argv)
    bundles = load_bundles(args.features, args.backbone, args.dataset) if args.features else None
    index = Index(bundles) if bundles else mini(words=False)
    rows = []
    for name in args.dataset or index.bundles:
        rows += rows_of(index, name, args.classes, args.scale)
    table = pd.DataFrame(rows)
    groups = table.drop(columns="class").groupby(["images", "data set"], sort=False)
    worst = [groups[k].agg("min" if "caught" in k else "max") for k in table.columns[3:]]
    worst = pd.concat(worst, axis=1)
    for title, part in {"Mean over classes": groups.mean(), "The worst class": worst}.items():
        print(f"\n{title}, percent\n{part.to_string(float_format='{:.2f}'.format, na_rep='-')}")
    write_table(table, args.out / "flag.csv")
    logger.info(f"table: {args.out / 'flag.csv'}")
    return table
