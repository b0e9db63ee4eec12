"""Harm to others against how surely a class is gone: a table and a plot over methods.

    python -m experiments frontier --features DIR [--csv PATH] [--plot PATH] [--backbone ViT-B/32]
        [--methods NAME ...] [--names DATASET]

DIR is a folder of feature bundles. Every class of every set with images in it is forgotten in turn
by ForgetExact in each way of `experiments/levers.py`, once with the other sets' class names
retained and once without knowing them; by the two defaults also with one set's names left out,
which then is the only one judged. With `--names`, a bundle of many names without images, the
shares of names that nobody listed are printed instead, against how many are retained.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle, load_bundle, load_bundles
from engine import UserError, unknown
from engine.cli import Parser
from engine.config import settings
from engine.determinism import one_thread
from engine.files import refuse_foreign
from engine.log import Progress, say
from evaluation.plots import COLOURS, check_picture, drawing
from evaluation.tables import write_table
from evaluation.zero_shot import Factors, ZeroShot, accuracy
from experiments.alone import Alone
from experiments.levers import FIRST, NEW, VARIANTS, Variant
from forgetting import Group, RetainSet
from forgetting.forecast import shares_each
from forgetting.ridge import best_ridge
from trainers.base import Solved

UNKNOWN = ("TRAINER.FORGETEXACT.OTHERS", "0")
KINDS = {  # of variants -> colour and mark
    "default": (COLOURS[6], "o"),
    "weights": (COLOURS[0], "o"),
    "push": (COLOURS[5], "^"),
    "target": (COLOURS[1], "s"),
    "lever": (COLOURS[2], "D"),
}
APART = ("car",)  # names of all that another set is made of: forgetting it is to harm that set
VANISHED = 1e-5  # of a squared length
PRINTED = ["method", "mu", "kept", "left_max", "margin", "margin_low", "rest_mean", "rest_worst"]
PRINTED += ["others_mean", "others_worst", "apart", "joined", "raised", "worst_class"]
COUNTS = (100, 300, 500, 700, 900)  # names retained
JUDGED = 50  # names forgotten, and names that nobody lists


def margins(own: ZeroShot, label: int, change: Factors) -> Tensor:
    """By how much of cosine another class is nearer to each image of a class, (n,)."""
    bundle, (left, right) = own.bundle, change
    after = own.embeddings + (bundle.class_hidden @ left) @ right  # (C, d)
    # What vanishes (the forgotten text itself at beta 0) has no direction, only rounding.
    gone = after.square().sum(dim=1) <= VANISHED * own.embeddings.square().sum(dim=1)
    images = bundle.image_features[bundle.labels == label]
    found = (images @ normalize(after, dim=1).T).masked_fill(gone, 0.0)  # (n, C)
    true = found[:, label].clone()
    found[:, label] = -torch.inf
    return found.amax(dim=1) - true


def outcomes(own: ZeroShot, others: Sequence[ZeroShot], changes: Sequence[Factors]) -> pd.DataFrame:
    """A row for every class of `own`, forgotten alone: fractions, and cosines for margins."""
    bundle, rows = own.bundle, []
    for label, (right, change) in enumerate(zip(own.correct(changes), changes, strict=True)):
        mine, margin = bundle.labels == label, margins(own, label, change)
        rows.append(
            {
                "class": bundle.classnames[label],
                "left": accuracy(right, mine),
                "margin": float(margin.mean()),
                "margin_low": float(margin.min()) if len(margin) else float("nan"),
                "rest": accuracy(right, ~mine) - accuracy(own.before, ~mine),
                "neighbour": worst_loss(own, right, label),
            }
        )
    table = pd.DataFrame(rows)
    for other in others:
        gain = other.correct(changes).double().mean(dim=1) - other.before.double().mean()
        table[f"to {other.bundle.dataset}"] = gain.numpy()
    return table


def by_class(own: ZeroShot, correct: Tensor) -> Tensor:
    """The accuracy on each class, (C,); 0 on one without images."""
    labels, count = own.bundle.labels, len(own.bundle.classnames)
    hits = torch.zeros(count).index_add_(0, labels, correct.float())
    return hits / torch.bincount(labels, minlength=count).clamp_min(1)


def worst_loss(own: ZeroShot, correct: Tensor, label: int) -> float:
    """The change of accuracy of the class that lost most, other than the forgotten one."""
    change = by_class(own, correct) - by_class(own, own.before)
    change[label] = torch.inf
    return float(change.min())


def row_of(table: pd.DataFrame) -> dict[str, float | str]:
    """One row of the frontier: percentage points; for the margins, cosines.

    `rest` and `others` are changes, negative for harm, `worst` those of one class and one set. What
    a class of `APART` does to other sets is no part of `others` but stands in `apart`.
    """
    others = table[[column for column in table.columns if column.startswith("to ")]]
    apart = table["class"].str.casefold().isin(APART)
    harm = others[~apart]
    worst = harm.min(axis=1)
    return {
        "kept": int((table["left"] > 0).sum()),
        "left_max": 100 * table["left"].max(),
        "left_mean": 100 * table["left"].mean(),
        "margin": table["margin"].mean(),
        "margin_low": table["margin_low"].min(),
        "rest_mean": 100 * table["rest"].mean(),
        "rest_worst": 100 * table["rest"].min(),
        "others_mean": 100 * harm.to_numpy().mean(),
        "others_worst": 100 * worst.min(),
        "worst_class": table["class"][worst.idxmin()],
        "apart": 100 * others[apart].min(axis=None) if apart.any() else float("nan"),
    } | {
        f"{column} {word}": 100 * of(harm[column])
        for column in others
        for word, of in (("mean", pd.Series.mean), ("worst", pd.Series.min))
    }


def factors(answers: Sequence[Solved]) -> list[Factors]:
    return [(answer.left, answer.right) for answer in answers]


def row(alone: Alone, own: ZeroShot, judged: Sequence[ZeroShot]) -> dict[str, float | str]:
    """What a run finds, and how that fares on images."""
    answers = alone.answers()
    beta = float(alone.cfg.FORGET.BETA)
    return {
        "mu": alone.retained.mu,
        "joined": sum(bool(answer.report["wordings"]["joined"]) for answer in answers),
        "raised": sum(answer.report["beta"] > beta for answer in answers),
    } | row_of(outcomes(own, judged, factors(answers)))


def places(others: Sequence[ZeroShot], default: bool) -> Iterator[tuple[str, list, list, tuple]]:
    """What is said of the other sets' names: a word for it, the sets that are listed, those that
    are judged, and KEY VALUE pairs."""
    yield "known", list(others), list(others), ()
    yield "unknown", list(others), list(others), UNKNOWN
    if default and len(others) > 1:
        for out in others:
            listed = [other for other in others if other is not out]
            yield f"all but {out.bundle.dataset}", listed, [out], ()


def frontier(
    bundles: Sequence[FeatureBundle], variants: Sequence[Variant] = VARIANTS
) -> pd.DataFrame:
    """A row for every set and method."""
    scored = [ZeroShot(bundle) for bundle in bundles]
    work = [
        (own, variant, place)
        for own in scored
        for variant in variants
        for place in places([o for o in scored if o is not own], variant.kind == "default")
    ]
    rows = []
    for own, variant, (names, listed, judged, opts) in Progress(work, "methods"):
        foreign = [other.bundle for other in listed]
        alone = Alone(own.bundle, foreign, [*variant.opts, *opts], variant.lever)
        place = {"set": own.bundle.dataset, "names": names, "method": variant.name}
        rows.append(place | {"kind": variant.kind} | row(alone, own, judged))
    return pd.DataFrame(rows)


def more_names(bundle: FeatureBundle, seed: int = 0) -> pd.DataFrame:
    """Shares of names that nobody listed, and of other words for what is forgotten, where more and
    more of the bundle's classes are retained: random ones, each a superset of the one before."""
    order = torch.randperm(len(bundle.classnames), generator=torch.Generator().manual_seed(seed))
    gone, free, pool = order.split([JUDGED, JUDGED, len(order) - 2 * JUDGED])
    cfg = settings("ForgetExact", bundle.dataset, bundle.backbone)
    limit, hidden = cfg.TRAINER.FORGETEXACT.ALONE.PUSH, bundle.forget_hidden
    like, alone, rows = hidden[gone], torch.arange(JUDGED), []
    moved = torch.ones(JUDGED, 1)
    for count in COUNTS:
        chosen = pool[:count]
        names = [bundle.classnames[i] for i in chosen.tolist()]
        retain = RetainSet({"own": Group(names, hidden[chosen], 1.0, alike=False)})
        leaving = torch.zeros(JUDGED, len(names), dtype=torch.bool)
        found = best_ridge(retain, bundle.text_projection, like, leaving, limit)
        for rule, mu in (("first default", 5e-6), ("found", found)):
            texts = torch.cat([hidden[free], bundle.class_hidden[gone]])
            away = torch.zeros(JUDGED, len(texts), dtype=torch.bool)
            shares, _ = shares_each(
                *(retain.ridge(mu), like, moved, alone, texts),
                *(torch.zeros(len(texts)), away, torch.arange(len(texts))),
            )
            unlisted, words = shares.split(JUDGED, dim=1)
            rows.append(
                {
                    "retained": len(names),
                    "ridge": rule,
                    "mu": mu,
                    "unlisted_rms": float(unlisted.square().mean().sqrt()),
                    "unlisted_max": float(unlisted.max()),
                    "other_words": float(words.diagonal().mean()),
                }
            )
    return pd.DataFrame(rows)


def plot(table: pd.DataFrame, path: Path) -> None:
    """A panel for each set, above with the other sets' names known, below without."""
    sets = list(table["set"].unique())
    marks = {FIRST: {"marker": "X", "s": 150}, NEW: {"marker": "*", "s": 260}}
    with drawing(path, 4.2 * len(sets) + 0.6, 9.4) as figure:
        axes = figure.subplots(2, len(sets), sharex=True, sharey="row", squeeze=False)
        for line, names in zip(axes, ("known", "unknown"), strict=True):
            for axis, name in zip(line, sets, strict=True):
                part = table[(table["set"] == name) & (table["names"] == names)]
                for kind, (colour, marker) in KINDS.items():
                    for _, one in part[part["kind"] == kind].iterrows():
                        face = colour if one["kept"] == 0 else "white"
                        style = marks.get(one["method"], {"marker": marker, "s": 48})
                        where = one["margin"], -one["others_mean"]
                        over = {"zorder": 4 if kind == "default" else 3}
                        axis.scatter(*where, edgecolors=colour, facecolors=face, **over, **style)
                axis.axhline(0, color="0.85", linewidth=0.8, zorder=0)
                axis.set_title(f"{name},\nother sets' names {names}")
            line[0].set_ylabel("lost by other sets, points")
        for axis in axes[1]:
            axis.set_xlabel("how surely it is gone, cosine")
        key = axes[0, 0].scatter
        for label, style in marks.items():
            key([], [], color=KINDS["default"][0], label=label, **style)
        for kind, (colour, marker) in list(KINDS.items())[1:]:
            key([], [], s=48, color=colour, marker=marker, label=kind)
        key([], [], s=60, color="white", edgecolors="0.4", label="some class is left")
        figure.suptitle("the further down and to the right, the better")
        figure.legend(loc="outside lower center", ncols=4)


def load(folder: str | Path, backbone: str, least: int = 2) -> list[FeatureBundle]:
    """The sets with images of a folder of bundles.

    Raises:
        UserError: fewer than two (`least`), so that nobody can be harmed.
    """
    bundles = [found for found in load_bundles(folder, backbone).values() if len(found.labels)]
    if len(bundles) < least:
        raise UserError(
            f"{folder} has {len(bundles)} image sets of {backbone}; "
            f"{'one is' if least == 1 else 'two are'} needed"
        )
    return bundles


def chosen(names: Sequence[str]) -> list[Variant]:
    """The variants of these names; all where there are none."""
    known = {variant.name: variant for variant in VARIANTS}
    for name in names:
        if name not in known:
            raise unknown("method", name, list(known))
    return [known[name] for name in names or known]


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Print the frontier, and write it as CSV and as a plot."""
    parser = Parser(prog="python -m experiments frontier", description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, help="folder of feature bundles")
    parser.add_argument("--backbone", default="ViT-B/32")
    parser.add_argument("--methods", nargs="*", default=[], metavar="NAME", help="default: all")
    parser.add_argument("--names", metavar="DATASET", help="a bundle of many names; see above")
    parser.add_argument("--csv", type=Path, help="table to write")
    parser.add_argument("--plot", type=Path, help="picture to write")
    args = parser.parse_args(argv)
    if args.csv:  # refused before the work, not after it
        refuse_foreign(args.csv, "set,names")
    if args.plot:
        check_picture(args.plot)
    variants, started = chosen(args.methods), time.perf_counter()
    if args.names:
        bundle = load_bundle(args.features, args.backbone, args.names)
        if len(bundle.classnames) < COUNTS[-1] + 2 * JUDGED:
            raise UserError(f"{args.names} has {len(bundle.classnames)} names, which are too few")
        with one_thread():
            table = more_names(bundle)
        print(table.to_string(index=False, float_format=lambda v: f"{v:.3g}"))
        return table
    bundles = load(args.features, args.backbone)
    with one_thread():
        table = frontier(bundles, variants)
    for (name, names), part in table.groupby(["set", "names"], sort=False):
        print(f"\n{name}, names of the other sets: {names}")
        print(part[PRINTED].to_string(index=False, float_format=lambda v: f"{v:.3g}"))
    say(f"\n{len(table)} rows in {time.perf_counter() - started:.0f} s")
    if args.csv:
        write_table(table, args.csv)
    if args.plot:
        plot(table, args.plot)
    return table
