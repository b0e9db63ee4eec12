"""Harm to others against how surely a class is gone: a table and a plot over methods.

    python -m experiments frontier --features DIR [--csv PATH] [--plot PATH] [--backbone ViT-B/32]

DIR is a folder of feature bundles. Every class of every set with images in it is forgotten in turn
by the constrained form, with each target, ridge and vocabulary weight of the tables below, once
with the other sets' class names retained and once without knowing them. All other numbers are
those of a run of ForgetExact.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from yacs.config import CfgNode

from clip.bundle import FeatureBundle, load_bundles
from clip.retain import retained
from engine import UserError
from engine.cli import Parser
from engine.config import settings
from engine.determinism import one_thread
from engine.files import refuse_foreign
from evaluation.plots import COLOURS, check_picture, drawing
from evaluation.tables import write_table
from evaluation.zero_shot import ZeroShot, accuracy
from forgetting import solve_constrained_each
from trainers.requests import Requests, Texts, specific_targets

TARGETS = (
    ("empty", 0.0),
    ("opposite", 0.0),
    ("opposite", 0.2),
    ("specific", -0.05),
    ("specific", 0.0),
    ("specific", 0.1),
)
OF_TARGET = ("0.6", COLOURS[4], COLOURS[1], COLOURS[5], COLOURS[0], COLOURS[6])
RIDGES = (5e-6, 5e-5, 5e-4)  # TRAINER.FORGETEXACT.MU
UNKNOWN = ("TRAINER.FORGETEXACT.OTHERS", "0")
RETAINED = (  # whether the names of the other sets are known, and the config keys
    ("known", ()),
    ("unknown", UNKNOWN),
    ("unknown", (*UNKNOWN, "TRAINER.FORGETEXACT.VOCABULARY", "0.1")),
)
APART = ("car",)  # names of all that another set is made of: forgetting it is to harm that set
VANISHED = 1e-5  # of a squared length
PRINTED = ["target", "beta", "mu", "vocabulary", "left_max", "margin_low", "rest_mean"]
PRINTED += ["rest_worst", "others_mean", "others_worst", "apart", "worst_class"]


class Alone:
    """Every class of a set forgotten alone, by what a run of ForgetExact retains.

    Attributes:
        requests: one a class; retain: what is retained; leaving: (C, n), which names leave.
    """

    def __init__(
        self, bundle: FeatureBundle, others: Sequence[FeatureBundle], opts: Sequence[str] = ()
    ) -> None:
        """`opts`: KEY VALUE pairs of the run."""
        self.bundle, self.texts = bundle, Texts(bundle)
        self.cfg = settings("ForgetExact", bundle.dataset, bundle.backbone, opts)
        self.requests = Requests([self.texts.request([name]) for name in bundle.classnames])
        self.kept = retained(self.cfg, bundle, others)
        self.retain = self.kept.names
        self.leaving = self.texts.leaving(self.retain, self.requests)

    def left(self, mu: float) -> Tensor:
        """(C, w) float64: Delta of class i is `left[i] (x) D_i`, whatever its D."""
        hidden, retain = self.requests.hidden, self.retain
        solutions = solve_constrained_each(
            *(retain.ridge(mu), hidden, torch.ones(len(hidden), 1), self.requests.of_text),
            *(retain.rows, retain.shares, self.leaving),
        )
        return torch.cat([solution.delta.T for solution in solutions])

    def displacements(self, target: str, beta: float) -> Tensor:
        """`D = P - h_f W` of every class, (C, d) float64."""
        requests, w = self.requests, self.bundle.text_projection
        if target == "specific":
            p = specific_targets(requests, w, self.retain, self.leaving, self.kept.lam, beta)
        else:
            draws = [torch.Generator().manual_seed(0) for _ in requests]
            p, _ = self.texts.targets(target, beta, self.cfg.FORGET.NOISE_STD, requests, draws)
        return p.double() - requests.hidden.double() @ w.double()


def cosines(own: ZeroShot, left: Tensor, d: Tensor) -> Iterator[Tensor]:
    """Cosines (N, C) of images and classes after each change of rank one, `left[i] (x) d[i]`.

    `ZeroShot.correct` says which is the largest, and is faster; margins need all of them.

    Args:
        left: (n, w), d: (n, d), float32.
    """
    images, before = own.bundle.image_features, own.embeddings
    products, squares = images @ before.T, before.square().sum(dim=1)  # (N, C), (C,)
    shares, pulls = left @ own.bundle.class_hidden.T, d @ images.T  # (n, C), (n, N)
    after = squares + 2 * shares * (d @ before.T) + shares.square() * d.square().sum(1, True)
    # What vanishes (the forgotten text itself at beta 0) has no direction, only rounding.
    lengths = torch.where(after > VANISHED * squares, after, torch.inf).sqrt()  # (n, C)
    for share, pull, length in zip(shares, pulls, lengths, strict=True):
        yield torch.addr(products, pull, share) / length


def outcomes(own: ZeroShot, others: Sequence[ZeroShot], left: Tensor, d: Tensor) -> pd.DataFrame:
    """A row for every class of `own`, forgotten alone: fractions, and cosines for margins."""
    left, d = left.float(), d.float()
    labels, rows = own.bundle.labels, []
    for i, found in enumerate(cosines(own, left, d)):
        true = found.gather(1, labels[:, None])[:, 0]  # (N,)
        # By how much another class is nearer than the true one.
        behind = found.scatter_(1, labels[:, None], -torch.inf).amax(dim=1) - true
        mine, right = labels == i, behind < 0
        margin = behind[mine]
        rows.append(
            {
                "class": own.bundle.classnames[i],
                "left": accuracy(right, mine),
                "margin": float(margin.mean()),
                "margin_low": float(margin.min()) if len(margin) else float("nan"),
                "rest": accuracy(right, ~mine) - accuracy(own.before, ~mine),
            }
        )
    changes = list(zip(left[:, :, None], d[:, None], strict=True))
    table = pd.DataFrame(rows)
    for other in others:
        gain = other.correct(changes).double().mean(dim=1) - other.before.double().mean()
        table[f"to {other.bundle.dataset}"] = gain.numpy()
    return table


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
    }


def method(cfg: CfgNode) -> dict[str, str | float]:
    """What tells the methods of the table apart, as a run of ForgetExact has it."""
    node = cfg.TRAINER.FORGETEXACT
    target = {"target": cfg.FORGET.TARGET, "beta": cfg.FORGET.BETA}
    return target | {"mu": node.MU, "vocabulary": node.VOCABULARY}


def frontier(bundles: Sequence[FeatureBundle]) -> pd.DataFrame:
    """A row for every set and method."""
    scored = [ZeroShot(bundle) for bundle in bundles]
    rows = []
    for own in scored:
        others = [other for other in scored if other is not own]
        foreign = [other.bundle for other in others]
        for names, opts in RETAINED:
            alone = Alone(own.bundle, foreign, opts)
            place = {"set": own.bundle.dataset, "names": names} | method(alone.cfg)
            moves = [(*target, alone.displacements(*target)) for target in TARGETS]
            for mu in RIDGES:
                left = alone.left(mu)
                for target, beta, d in moves:
                    here = place | {"target": target, "beta": beta, "mu": mu}
                    rows.append(here | row_of(outcomes(own, others, left, d)))
    return pd.DataFrame(rows)


def plot(table: pd.DataFrame, path: Path) -> None:
    """A panel for each set, above with the other sets' names known, below without."""
    sets = list(table["set"].unique())
    default = pd.DataFrame([method(settings("ForgetExact"))])
    sizes = {mu: 14.0 * (1 + 2 * place) for place, mu in enumerate(RIDGES)}
    ring = {"s": 170, "facecolors": "none", "edgecolors": "black", "zorder": 4}
    with drawing(path, 3.1 * len(sets) + 1, 6.2) as figure:
        axes = figure.subplots(2, len(sets), sharex=True, sharey="row", squeeze=False)
        for row, names in zip(axes, ("known", "unknown"), strict=True):
            for axis, name in zip(row, sets, strict=True):
                part = table[(table["set"] == name) & (table["names"] == names)]
                for (target, beta), colour in zip(TARGETS, OF_TARGET, strict=True):
                    mine = part[(part["target"] == target) & (part["beta"] == beta)]
                    for _, line in mine.groupby("vocabulary"):
                        axis.plot(line["margin"], -line["others_mean"], color=colour, linewidth=0.8)
                    faces = [colour if left == 0 else "white" for left in mine["left_max"]]
                    dots = {"edgecolors": colour, "facecolors": faces, "s": mine["mu"].map(sizes)}
                    axis.scatter(mine["margin"], -mine["others_mean"], zorder=3, **dots)
                standard = part.merge(default)
                axis.scatter(standard["margin"], -standard["others_mean"], **ring)
                axis.axhline(0, color="0.85", linewidth=0.8, zorder=0)
                axis.set_title(f"{name}, other names {names}")
            row[0].set_ylabel("harm to other sets, points (mean)")
        for axis in axes[1]:
            axis.set_xlabel("margin of the forgotten class, cosine")
        key = axes[0, 0].scatter
        for (target, beta), colour in zip(TARGETS, OF_TARGET, strict=True):
            label = target if target == "empty" else f"{target}, beta {beta:g}"
            key([], [], s=40, color=colour, label=label)
        key([], [], label="the default", **ring)
        key([], [], s=40, color="white", edgecolors="0.4", label="some class is left")
        for mu, size in sizes.items():
            key([], [], s=size, color="0.4", label=f"ridge {mu:g}")
        figure.legend(loc="outside lower center", ncols=4)


def load(folder: str | Path, backbone: str) -> list[FeatureBundle]:
    """The sets with images of a folder of bundles.

    Raises:
        UserError: fewer than two, so that nobody can be harmed.
    """
    bundles = [found for found in load_bundles(folder, backbone).values() if len(found.labels)]
    if len(bundles) < 2:
        raise UserError(f"{folder} has {len(bundles)} image sets of {backbone}; two are needed")
    return bundles


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Print the frontier, and write it as CSV and as a plot."""
    parser = Parser(prog="python -m experiments frontier", description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, help="folder of feature bundles")
    parser.add_argument("--backbone", default="ViT-B/32")
    parser.add_argument("--csv", type=Path, help="table to write")
    parser.add_argument("--plot", type=Path, help="picture to write")
    args = parser.parse_args(argv)
    if args.csv:  # refused before the work, not after it
        refuse_foreign(args.csv, "set,names")
    if args.plot:
        check_picture(args.plot)
    started = time.perf_counter()
    bundles = load(args.features, args.backbone)
    with one_thread():
        table = frontier(bundles)
    for (name, names), part in table.groupby(["set", "names"], sort=False):
        print(f"\n{name}, names of the other sets {names}")
        print(part[PRINTED].to_string(index=False, float_format=lambda v: f"{v:.3g}"))
    print(f"\n{len(table)} rows in {time.perf_counter() - started:.0f} s")
    if args.csv:
        write_table(table, args.csv)
    if args.plot:
        plot(table, args.plot)
    return table
