"""What a flag from names alone catches, and its false alarms, at stated rates.

    python -m experiments flag [--features DIR] [--dataset SET] [--classes N] [--out flag]

Each class is flagged among the images of its set; among those of all sets, without those of other
sets' classes that mean the same; and alone, where images of the other sets may tell what other
things look like. Without --features: the sets of the embedded `mini`, whose --scale is 20.
"""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pandas as pd

from engine.log import progress
from experiments.hide import Index, index_parser, report, table_of
from forgetting.flag import SCALE, flag
from forgetting.models.vocabulary import generic_names

RATES = (0.01, 0.005, 0.001)
SAME = 0.9  # cosine of two classes' names above which they mean the same


def rows_of(
    index: Index, dataset: str, names: Sequence[str], scale: float
) -> Iterator[dict[str, Any]]:
    """Percent caught and false alarms of each class at each rate."""
    every = index.embed(index.bare)
    vocabulary = index.embed(index.encode(generic_names())) if index.encode else index.vocabulary
    for name in progress(names, f"{dataset}: flags"):
        label = index.label[dataset, name]
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
    parser = index_parser("flag", __doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=SCALE, help="half of the logit scale")
    args = parser.parse_args(argv)
    table = table_of("flag", args, partial(rows_of, scale=args.scale))
    report(table, ["images", "data set"])
    return table
