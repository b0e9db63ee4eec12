"""What it costs to hide which class was forgotten from somebody who has the changed projection.

    python -m experiments name --features DIR [--dataset SET] [--classes N|all] [--out name]

Each class is forgotten alone, and among names that serve to hide it (name.yaml). `known`, `alone`
(of `evaluation.audit.undo`) and `moved` (who looks for the name that moves most for its length) are
its places among up to 1,000 names; other columns are those of `experiments.requests.measure`.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
from torch.nn.functional import normalize

import datasets
from engine.config import read_yaml
from engine.log import progress
from evaluation.audit.case import AuditData, Case, Model
from evaluation.audit.undo import Attacker, change
from evaluation.zero_shot import ZeroShot
from experiments.hide import Index, index_parser, report, table_of
from experiments.requests import make_trainer, measure, soft
from forgetting.retain import key

WAYS: dict[str, tuple[str, str, int, float]] = read_yaml(Path(__file__).with_suffix(".yaml"))


def rows_of(
    index: Index, dataset: str, names: Sequence[str], args: Namespace
) -> Iterator[dict[str, Any]]:
    """A row for every class and way."""
    bundles = {dataset: index.bundles[dataset]} | index.bundles
    methods = {method for method, *_ in WAYS.values()}
    trainers = {method: make_trainer(method, args, bundles) for method in methods}
    own_set = ZeroShot(bundles[dataset])
    data = AuditData(bundles.pop(dataset), bundles)
    attacker = Attacker(data)
    rows = attacker.hidden  # (n, w), of their names
    lengths, cosines = data.bundle.embed(rows).norm(dim=1), normalize(rows, dim=1)
    classes = set(map(key, index.names))
    free = [row for name, row in attacker.rows.items() if name not in classes]
    for name in progress(names, f"{dataset}: attacks"):
        same, own = datasets.same_meaning([name], dataset), attacker.rows[key(name)]
        rivals = [row for word, row in attacker.rows.items() if word not in same]
        nearest = (cosines[rivals] @ cosines[own]).argsort(descending=True).tolist()
        pools = {
            "decoys": Random(name).sample(free, len(free)),  # names of no set
            "neighbours": [rivals[i] for i in nearest],
        }
        for way, (method, pool, count, part) in WAYS.items():
            context = trainers[method].context
            (request,) = trainers[method].requests([[name]])
            more = [(0, attacker.names[row], rows[row].float()) for row in pools[pool][:count]]
            (answer,) = context.forget([request.with_texts(more) if more else request])
            moved = answer.displacement.clone()
            moved[len(request.texts) :][:count] *= part  # paraphrases come behind them
            edit = soft(context, replace(answer, displacement=moved))
            found, model = measure(own_set, [name], edit), Model(data, edit)
            for attack, scores in {
                "known": attacker.recognise(*change(Case(name, [name], model))),
                "moved": ((rows @ edit.left) @ edit.right).norm(dim=1) / lengths,
                "alone": attacker.oddness(model),
            }.items():
                before, equal = scores[rivals] > scores[own], scores[rivals] == scores[own]
                found[attack] = 1 + float(before.sum() + equal.sum() / 2)
            yield {"data set": dataset, "class": name, "way": way} | found


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure, and print the means over classes; returns a row for every class and way."""
    args = index_parser("name", __doc__, features=True).parse_args(argv)
    table = table_of("name", args, partial(rows_of, args=args))
    report(table, ["data set", "way"])
    return table
