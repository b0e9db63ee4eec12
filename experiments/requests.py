"""What one to a thousand forgotten classes cost, at once and request after request.

    python -m experiments requests --features DIR --dataset SET --unlisted SET

The first classes of a random order are forgotten at once, and one after another from the projection
that the request before left; ForgetExact composes what it forgot alone, or adds it, instead.
Methods are those of baselines.yaml and requests.yaml.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import torch

import datasets
import train
from clip.bundle import FeatureBundle, load_bundles
from engine.cli import COUNT
from engine.config import read_yaml
from engine.log import logger, progress
from evaluation.plots import COLOURS, drawing
from evaluation.zero_shot import ZeroShot
from experiments.baselines import METHODS
from experiments.hide import Index, index_parser, report, table_of
from forgetting.compose import make_recipe, solve
from forgetting.context import Answer, ForgetContext
from forgetting.errors import ProblemError
from forgetting.problem import Batch, LowRankEdit
from forgetting.retain import key
from forgetting.solvers.constrained import request_batches
from trainers.base import ForgetTrainer
from trainers.methods import ForgetExact

SOFT = 0.1  # of the mean diagonal of `M = H_f K^-1 H_f^T`
# name -> trainer, config keys
NAMED: dict[str, dict[str, Any]] = METHODS | read_yaml(Path(__file__).with_suffix(".yaml"))
STYLES = ("-", "--", ":", "-.", (0, (6, 4)))  # of ways
DRAWN = ("left", "rest", "unlisted")
KEYS = ["data set", "method", "way", "count"]


def gain(images: ZeroShot, edit: LowRankEdit, without: set[str]) -> float:
    """Points that images gain by an edit, but for those of classes `without` (keys)."""
    kept = torch.tensor([key(name) not in without for name in images.bundle.classnames])
    gains = images.correct([edit])[0].double() - images.correct_before.double()  # (N,)
    return 100 * float(gains[kept[images.bundle.labels]].mean())


def measure(own: ZeroShot, classes: Sequence[str], edit: LowRankEdit) -> dict[str, float]:
    """After an edit that forgets some classes of a set: percent of their images that are found, the
    mean, the most, and of the first class; and points that the set's other images gain."""
    bundle = own.bundle
    correct = pd.Series(own.correct([edit])[0].double().numpy()).groupby(bundle.labels.numpy())
    left = 100 * correct.mean().reindex(map(bundle.classnames.index, classes))
    rest = gain(own, edit, datasets.same_meaning(classes, bundle.dataset))
    return {"left": left.mean(), "worst": left.max(), "first": left.iloc[0], "rest": rest}


def make_trainer(
    method: str, args: Namespace, bundles: dict[str, FeatureBundle], seed: int = 0
) -> ForgetTrainer:
    """A trainer of a method that knows `bundles` alone, the set's own first; it writes nothing."""
    dataset, *others = bundles
    keys = {"--features": args.features, "--backbone": args.backbone, "--dataset": dataset}
    keys |= {"--forget": "all", "--seed": seed, "--output-dir": args.out}
    keys |= {key.replace("trainer", "--trainer"): value for key, value in NAMED[method].items()}
    argv = [str(text) for pair in keys.items() for text in pair]
    trainer = train.build_trainer(train.setup_cfg(train.parse(argv)))
    trainer.plan, trainer.bundles = replace(trainer.plan, others=others), dict(bundles)
    return trainer


def soft(context: ForgetContext, answer: Answer) -> LowRankEdit:
    """The same request with `rho I` beside M, rho = SOFT (1 - 1 / k) of its mean diagonal: several
    texts go less far in directions that they share with what is retained, in which M is small."""
    h, excluded = answer.request.hidden.double(), answer.excluded.any(dim=0)
    owner = torch.zeros(len(h), dtype=torch.int64)
    ((_, _, (base,), _),) = request_batches(context.ridge, h, owner, excluded[None])  # H_f K^-1
    m = h @ base.T  # (k, k)
    m.diagonal().add_(SOFT * (1 - 1 / len(h)) * m.diagonal().mean())
    return LowRankEdit(torch.linalg.solve(m, base).T, answer.displacement)


def summed(edits: Sequence[LowRankEdit]) -> LowRankEdit:
    left = torch.cat([edit.left.double() for edit in edits], dim=1)
    return LowRankEdit(left, torch.cat([edit.right.double() for edit in edits]))


def edits_of(
    trainer: ForgetTrainer, names: Sequence[str], counts: Sequence[int]
) -> Iterator[tuple[str, int, LowRankEdit]]:
    """Way, count and edit, float64: the first `counts` of some classes, forgotten in each way."""
    if isinstance(trainer, ForgetExact):
        context = trainer.context
        alone = context.forget(trainer.requests([[name] for name in names]))
        parts = [part for each in alone for part in make_recipe(context, each, "", "").parts]
        for count in counts:
            (answer,) = context.forget(trainer.requests([names[:count]]))
            yield "at once", count, answer.edit
            yield "at once, soft", count, soft(context, answer)
            yield "added", count, summed([each.edit for each in alone[:count]])
            with suppress(ProblemError):  # more texts than dimensions
                yield "composed", count, LowRankEdit(*solve(parts[:count])[:2])
        return
    for count in counts:
        yield "at once", count, summed(trainer.solve(Batch(trainer.requests([names[:count]]))))
    own, edits = trainer.bundle, []
    for name in progress(names, f"{type(trainer).__name__}: one after another"):
        edits += trainer.solve(Batch(trainer.requests([[name]])))
        change = summed(edits)
        trainer.projection = (own.text_projection.double() + change.delta).float()
        trainer.bundles[own.dataset] = replace(own, text_projection=trainer.projection)
        if len(edits) in counts:
            yield "one after another", len(edits), change


def rows_of(
    index: Index, dataset: str, classes: Sequence[str], args: Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each method, seed, way and count. `unlisted`: points that images of that set gain,
    but for those of names that are retained. All other sets of the folder are retained."""
    where, bundles = (args.features, args.backbone), {dataset: index.bundles[dataset]}
    bundles |= load_bundles(*where, [args.unlisted]) | load_bundles(*where)
    own, apart = ZeroShot(bundles[dataset]), ZeroShot(bundles.pop(args.unlisted))
    names = [name for bundle in bundles.values() for name in bundle.classnames]
    listed = set(map(key, [*names, *own.bundle.retain_names]))
    counts = sorted({min(count, len(classes) - 1) for count in args.counts})
    for method, seed in product(args.methods, range(args.seeds)):
        order = Random(f"{seed}/{dataset}").sample(classes, counts[-1])
        trainer = make_trainer(method, args, bundles, seed)
        for way, count, edit in edits_of(trainer, order, counts):
            without = listed | datasets.same_meaning(order[:count], dataset)
            row = {"data set": dataset, "method": method, "way": way, "count": count}
            row |= measure(own, order[:count], edit)
            yield row | {"unlisted": gain(apart, edit, without)}


def draw(means: pd.DataFrame, path: Path) -> None:
    """Draw means against the number of classes: a method has a colour, a way a style."""
    colours = dict(zip(means.index.unique("method"), cycle(COLOURS), strict=False))
    styles = dict(zip(means.index.unique("way"), STYLES, strict=False))
    with drawing(path, 12, 5.4) as figure:
        for axis, column in zip(figure.subplots(1, 3), DRAWN, strict=True):
            for (_, method, way), line in means[column].unstack("count").iterrows():
                look = {"color": colours[method], "linestyle": styles[way], "marker": "."}
                axis.plot(line, label=f"{method}, {way}", **look)
            axis.set(xscale="log", xlabel="classes forgotten", title=column)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    logger.info(f"picture: {path}")


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure, and print the means over seeds; returns the table."""
    parser = index_parser("requests", __doc__, features=True)
    how = {"metavar": "SET", "required": True}
    parser.add_argument("--unlisted", help="a set whose names are not retained", **how)
    how = {"type": COUNT, "default": (1, 5, 10, 50, 100, 300, 1000), "nargs": "+"}
    parser.add_argument("--counts", help="numbers of classes, at most all but one", **how)
    parser.add_argument("--seeds", type=COUNT, default=3, help="random orders of the classes")
    how = {"nargs": "+", "choices": NAMED, "metavar": "NAME", "default": ["exact"]}
    parser.add_argument("--methods", help="of baselines.yaml, and ForgetExact's", **how)
    parser.add_argument("--draw", type=Path, metavar="FILE", help="picture of the table")
    args = parser.parse_args(argv)
    if args.unlisted in (args.dataset or [args.unlisted]):
        raise ProblemError("--dataset: a set to forget from, other than --unlisted, is needed")
    table = table_of("requests", args, partial(rows_of, args=args))
    report(table, KEYS)
    if args.draw:
        draw(table.groupby(KEYS, sort=False).mean(), args.draw)
    return table
