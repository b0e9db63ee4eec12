"""What one to a thousand forgotten classes cost, at once and request after request.

    python -m experiments requests --features DIR --dataset SET [--counts 1 5 10 50 100 300 1000]
        [--seeds 3] [--methods NAME NAME] [--unlisted SET] [--out requests] [--draw FILE]

The first classes of a random order are forgotten: at once; and one after another, each from the
projection that the request before left. Instead of that ForgetExact composes what it forgot alone;
beside it stands the sum of these changes. Methods are those of baselines.yaml, and `MENDED`.
Tables of one folder are printed and drawn together. docs/truth.md has them.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean

import pandas as pd
import torch

import datasets
import train
from clip.bundle import FeatureBundle, load_bundles
from engine.cli import COUNT, Parser
from engine.log import logger, progress
from evaluation.plots import COLOURS, drawing
from evaluation.tables import write_table
from evaluation.zero_shot import ZeroShot, accuracy
from experiments.baselines import METHODS
from forgetting.compose import make_recipe, solve
from forgetting.context import Answer, ForgetContext
from forgetting.errors import ProblemError
from forgetting.problem import Batch, LowRankEdit
from forgetting.retain import key
from forgetting.solvers.constrained import request_batches
from trainers.base import ForgetTrainer
from trainers.methods import ForgetExact

SOFT = 0.1  # of the mean diagonal of `M = H_f K^-1 H_f^T`
KEY = "TRAINER.FORGETEXACT."
BETA = {"trainer": "ForgetExact", KEY + "MIN_MARGIN": 0}
TARGET = BETA | {KEY + "SPECIFIC_RIDGE": 0.05}
MENDED = {
    "exact": {"trainer": "ForgetExact"},
    "exact-beta": BETA,  # never raised
    "exact-target": TARGET,  # and less of what is common is removed
    "exact-ridge": TARGET | {KEY + "RIDGE": 1e-4},  # and names that nobody lists move less
}
NAMED = METHODS | MENDED  # name -> trainer, config keys
KEYS = ["data set", "method", "way", "count"]
STYLES = ("-", "--", ":", "-.", (0, (6, 4)))
DRAWN = {"left": "left of the forgotten, %", "rest": "rest, points", "unlisted": "unlisted, points"}


def measure(
    sets: dict[str, ZeroShot], unlisted: str | None, classes: Sequence[str], edit: LowRankEdit
) -> dict[str, float]:
    """Percent and points after an edit that forgets `classes`, the first first, of the first set.

    `left`, `worst`, `first`: accuracy of their images, the mean, the most, that of the first;
    `rest`: change of the set's other images; `others`, `unlisted`: of the other sets, without
    classes that mean a forgotten one, and of a set without names that are retained; `moved`: how
    far names of that set move, the mean, in percent of the length of their embeddings.
    """
    own, *_ = sets.values()
    bundle, gone = own.bundle, datasets.same_meaning(classes, own.bundle.dataset)
    names = {name: list(map(key, images.bundle.classnames)) for name, images in sets.items()}
    listed = {word for name in sets if name != unlisted for word in names[name]}
    listed |= set(map(key, bundle.retain_names))
    found, changes = {}, {}
    for name, images in sets.items():
        without = gone | listed if name == unlisted else gone
        kept = torch.tensor([word not in without for word in names[name]])
        correct, labels = images.correct([edit])[0], images.bundle.labels
        changes[name] = float(
            (correct.double() - images.correct_before.double())[kept[labels]].mean()
        )
        if images is own:
            each = [accuracy(correct, labels == bundle.classnames.index(x)) for x in classes]
            some = [one for one in each if one is not None]
            found |= {"left": fmean(some), "worst": max(some), "first": each[0]}
        if name == unlisted:
            hidden = images.bundle.forget_hidden[kept].double()
            far = ((hidden @ edit.left) @ edit.right).norm(dim=1)
            found["moved"] = float((far / images.bundle.embed(hidden).norm(dim=1)).mean())
    found |= {"rest": changes.pop(bundle.dataset), "unlisted": changes.pop(unlisted, torch.nan)}
    found["others"] = fmean(changes.values()) if changes else torch.nan
    return {name: 100 * x for name, x in found.items()}


def make_trainer(
    method: str, bundles: dict[str, FeatureBundle], options: Sequence[str]
) -> ForgetTrainer:
    """A trainer of a method that knows `bundles` alone, the set's own first; it writes nothing."""
    given = dict(NAMED[method])
    argv = ["--trainer", given.pop("trainer"), "--forget", "all", *options]
    argv += [str(text) for pair in given.items() for text in pair]
    trainer = train.build_trainer(train.setup_cfg(train.parse(argv)))
    trainer.plan, trainer.bundles = replace(trainer.plan, others=list(bundles)[1:]), dict(bundles)
    return trainer


def soft(context: ForgetContext, answer: Answer) -> LowRankEdit:
    """The same request where several texts need not go all of their way: with `rho I` beside M.

    `rho` is `SOFT (1 - 1 / k)` of M's mean diagonal: one text goes all of its way. The directions
    that many texts share with what is retained, in which M is small, cost most; those are left."""
    h, excluded = answer.request.hidden.double(), answer.excluded.any(dim=0)
    owner, k = torch.zeros(len(h), dtype=torch.int64), len(h)
    ((_, _, (base,), _),) = request_batches(context.ridge, h, owner, excluded[None])  # H_f K^-1
    inner = h @ base.T  # M, (k, k)
    inner += SOFT * (1 - 1 / k) * inner.diagonal().mean() * torch.eye(k).to(inner)
    return LowRankEdit(torch.linalg.solve(inner, base).T, answer.displacement)


def summed(edits: Sequence[LowRankEdit]) -> LowRankEdit:
    lefts, rights = zip(*((edit.left.double(), edit.right.double()) for edit in edits), strict=True)
    return LowRankEdit(torch.cat(lefts, dim=1), torch.cat(rights))


def edits_of(
    trainer: ForgetTrainer, names: Sequence[str], counts: Sequence[int]
) -> Iterator[tuple[str, int, LowRankEdit]]:
    """Way, count and edit, float64: the first `counts` of some classes, forgotten in each way."""
    if isinstance(trainer, ForgetExact):
        alone = trainer.context.forget(trainer.requests([[name] for name in names]))
        for count in counts:
            (answer,) = trainer.context.forget(trainer.requests([names[:count]]))
            yield "at once", count, answer.edit
            yield "at once, soft", count, soft(trainer.context, answer)
            yield "added", count, summed([each.edit for each in alone[:count]])
            with suppress(ProblemError):  # more texts than dimensions
                recipes = [make_recipe(trainer.context, each, "", "") for each in alone[:count]]
                parts = [part for recipe in recipes for part in recipe.parts]
                yield "composed", count, LowRankEdit(*solve(parts)[:2])
        return
    for count in counts:
        yield "at once", count, summed(trainer.solve(Batch(trainer.requests([names[:count]]))))
    own, edits = trainer.bundle, []
    for name in progress(names, f"{type(trainer).__name__}: one after another"):
        edits += trainer.solve(Batch(trainer.requests([[name]])))
        change = summed(edits)
        changed = (own.text_projection.double() + change.left @ change.right).float()
        trainer.projection = changed
        trainer.bundles[own.dataset] = replace(own, text_projection=changed)
        if len(edits) in counts:
            yield "one after another", len(edits), change


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draw the means over seeds against the number of classes: a method has a colour, a way a
    style."""
    means = table.groupby(KEYS, sort=False).mean().reset_index()
    methods, ways = list(means["method"].unique()), list(means["way"].unique())
    with drawing(path, 12, 5.4) as figure:
        for axis, (column, title) in zip(figure.subplots(1, 3), DRAWN.items(), strict=True):
            for (method, way), rows in means.groupby(["method", "way"], sort=False):
                look = {"color": COLOURS[methods.index(method) % len(COLOURS)], "marker": "."}
                look |= {"linestyle": STYLES[ways.index(way)], "label": f"{method}, {way}"}
                axis.plot(rows["count"], rows[column], **look)
            axis.set(xscale="log", xlabel="classes forgotten", title=title)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    logger.info(f"picture: {path}")


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure, print and draw the means over seeds of all in the folder; returns a row for each."""
    parser = Parser(prog="python -m experiments requests", description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, help="folder of feature bundles")
    parser.add_argument("--backbone", default="ViT-B/32", help="backbone of the bundles")
    parser.add_argument("--dataset", required=True, help="the set to forget from")
    parser.add_argument("--unlisted", metavar="SET", help="a set whose names are not retained")
    how = {"type": COUNT, "default": (1, 5, 10, 50, 100, 300, 1000), "nargs": "+"}
    parser.add_argument("--counts", help="numbers of classes", **how)
    parser.add_argument("--seeds", type=COUNT, default=3, help="random orders of the classes")
    about = "of baselines.yaml, and ForgetExact's"
    how = {"nargs": "+", "choices": NAMED, "metavar": "NAME"}
    parser.add_argument("--methods", default=["exact"], help=about, **how)
    parser.add_argument("--out", type=Path, default=Path("requests"), help="folder of the table")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="picture of the table")
    args = parser.parse_args(argv)
    where = args.features, args.backbone
    bundles = load_bundles(*where, [args.dataset]) | load_bundles(*where)  # its own comes first
    sets = {name: ZeroShot(bundle) for name, bundle in bundles.items()}
    names = bundles[args.dataset].classnames
    counts = sorted({count for count in args.counts if count < len(names)})
    if args.unlisted in (args.dataset, "") or not counts:
        raise ProblemError("--unlisted is another set, and --counts are below the classes' number")
    if args.unlisted:
        bundles.pop(load_bundles(*where, [args.unlisted])[args.unlisted].dataset)
    options = ["--features", args.features, "--backbone", args.backbone, "--dataset", args.dataset]
    options += ["--output-dir", str(args.out)]
    for method in args.methods:
        rows = []
        for seed in range(args.seeds):
            order = Random(f"{seed}/{args.dataset}").sample(names, len(names))[: max(counts)]
            trainer = make_trainer(method, bundles, [*options, "--seed", str(seed)])
            for way, count, edit in edits_of(trainer, order, counts):
                keys = dict(zip(KEYS, (args.dataset, method, way, count), strict=True))
                rows.append(keys | measure(sets, args.unlisted, order[:count], edit))
        write_table(pd.DataFrame(rows), args.out / f"{args.dataset}-{method}.csv")
    # Also what was measured before.
    table = pd.concat(map(pd.read_csv, sorted(args.out.glob(f"{args.dataset}-*.csv"))))
    means = table.groupby(KEYS, sort=False).mean()
    print(means.to_string(float_format="{:.2f}".format, na_rep="-"))
    if args.draw:
        draw(table, args.draw)
    return table
