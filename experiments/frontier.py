"""Harm to others against how surely a class is gone: a table and a plot over methods.

    python -m experiments frontier --features DIR [--csv PATH] [--plot PATH] [--backbone ViT-B/32]

DIR is a folder of feature bundles. Every class of every set with images in it is forgotten in turn
by the constrained form, with each target, ridge and vocabulary weight of the tables below, once
with the other sets' class names retained and once without knowing them. All other numbers are
those of configs/trainers/ForgetExact.yaml, and so is the rule by which names leave the retain set.

Nothing is solved twice: the statistics of a set are factorised once, names leave them by Woodbury's
formula, and since Delta has rank one a class h afterwards lies at `h W + s(h) D`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

import datasets
from clip.bundle import FeatureBundle, list_bundles
from engine import UserError
from engine.cli import Parser
from engine.files import atomic_path
from evaluation.plots import COLOURS, drawing
from evaluation.zero_shot import class_embeddings
from forgetting import empty_target
from forgetting.constrained import Ridge, solve_from_base
from forgetting.retain import RetainStatistics

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
OWN, VOCABULARY, OTHERS, SHARED, SIMILARITY = 1.0, 0.01, 0.1, 0.5, 0.95  # the trainer's defaults
WEIGHTS = ((VOCABULARY, OTHERS), (VOCABULARY, 0.0), (0.1, 0.0))  # (vocabulary, other sets' names)
DEFAULT = {"target": "specific", "beta": 0.1, "mu": 5e-6, "vocabulary": VOCABULARY}
APART = ("car",)  # names of all that another set is made of: forgetting it is to harm that set
VANISHED = 1e-5  # of a squared length
PRINTED = (
    "left_max",
    "margin_low",
    "rest_mean",
    "rest_worst",
    "others_mean",
    "others_worst",
    "apart",
)


@dataclass(frozen=True)
class Scored:
    """One image set, ready to be scored under many changes of rank one.

    Attributes:
        bundle: the set; embeddings: (C, d) of the evaluation prompts, not normalised, float32;
        products: (N, C), images times embeddings; squares: (C,) squared lengths; correct: (N,),
            whether each image is recognised before anything is forgotten.
    """

    bundle: FeatureBundle
    embeddings: Tensor
    products: Tensor
    squares: Tensor
    correct: Tensor

    @classmethod
    def of(cls, bundle: FeatureBundle) -> Scored:
        embeddings = bundle.class_hidden @ bundle.text_projection  # (C, d)
        products, squares = bundle.image_features @ embeddings.T, embeddings.square().sum(dim=1)
        correct = (products / squares.sqrt()).argmax(dim=1) == bundle.labels
        return cls(bundle, embeddings, products, squares, correct)

    def after(self, left: Tensor, displacement: Tensor) -> Iterator[Tensor]:
        """Cosines (N, C) after each of n changes `left[i] (x) displacement[i]`.

        Args:
            left: (n, w), displacement: (n, d), float32.
        """
        shares = left @ self.bundle.class_hidden.T  # (n, C), s(h)
        pulls = displacement @ self.bundle.image_features.T  # (n, N)
        squares = self.squares + 2 * shares * (displacement @ self.embeddings.T)
        squares += shares.square() * displacement.square().sum(dim=1, keepdim=True)
        # What vanishes (the forgotten text itself at beta 0) has no direction, only rounding.
        lengths = torch.where(squares > VANISHED * self.squares, squares, torch.inf).sqrt()
        for share, pull, length in zip(shares, pulls, lengths, strict=True):
            yield torch.addr(self.products, pull, share) / length


class RetainSet:
    """What is retained when classes of one set are forgotten, factorised once for all of them."""

    def __init__(
        self, bundle: FeatureBundle, others: Sequence[FeatureBundle], weights: dict[str, float]
    ) -> None:
        plain = datasets.plain
        self.bundle, self.weights = bundle, weights
        groups = {
            "own": ([plain(name) for name in bundle.classnames], bundle.forget_hidden),
            "vocabulary": (bundle.retain_names, bundle.retain_hidden),
            "others": (
                [plain(name) for other in others for name in other.classnames],
                torch.cat([bundle.forget_hidden[:0], *(other.forget_hidden for other in others)]),
            ),
        }
        statistics = RetainStatistics(bundle.text_projection.shape[0])
        for group, (_, rows) in groups.items():
            statistics.update(group, rows)
        used = [group for group in statistics.counts if weights[group] > 0]
        self.total = sum(weights[group] for group in used)
        self.gram = statistics.weighted({g: weights[g] for g in statistics.counts})
        self.rows = torch.cat([groups[group][1] for group in used]).double()  # (n, w)
        self.names = [plain(name).casefold() for group in used for name in groups[group][0]]
        counts = torch.tensor([statistics.counts[group] for group in used])
        share = torch.tensor([statistics.share(group, weights) for group in used]).double()
        self.shares = share.repeat_interleave(counts)  # (n,)
        self.own = torch.arange(len(used)).repeat_interleave(counts) == used.index("own")

    def leaving(self) -> list[Tensor]:
        """For each class the rows of the retained names that mean the same (trainers/)."""
        known = (
            datasets.synonyms(self.bundle.dataset) if self.bundle.dataset in datasets.SETS else {}
        )
        texts = self.bundle.forget_hidden.double()
        alike = normalize(texts, dim=1) @ normalize(self.rows, dim=1).T > SIMILARITY  # (C, n)
        alike[:, self.own] = False  # the set's own classes are different things
        for i, name in enumerate(self.bundle.classnames):
            name = datasets.plain(name).casefold()
            same = {name} | {datasets.plain(n).casefold() for n in known.get(name, set())}
            alike[i] |= torch.tensor([other in same for other in self.names])
        return [torch.nonzero(row)[:, 0] for row in alike]

    def directions(self, mu: float, rows: Tensor, texts: Tensor, gram: Tensor) -> Tensor:
        """`(G_i + mu I)^-1 x_i`, (C, n), for texts x (C, n), where class i's names have left G.

        Args:
            rows: (m, n), what was summed up in `gram` (n, n).
        """
        ridge = Ridge(gram, mu)
        base, columns = ridge.solve(texts), ridge.solve(rows)  # (n, C), (n, m)
        return torch.stack(
            [
                solve_from_base(
                    texts[i : i + 1],
                    base[:, i : i + 1],
                    rows[places],
                    columns[:, places],
                    self.shares[places],
                    texts[i : i + 1],
                )[0][:, 0]
                for i, places in enumerate(self.leaving())
            ]
        )

    def left(self, mu: float) -> Tensor:
        """(C, w), Delta of class i is `left[i] (x) D_i`; mu in mean squared lengths of a text."""
        texts = self.bundle.forget_hidden.double()
        scale = float(self.gram.trace()) / self.total
        u = self.directions(mu * scale, self.rows, texts, self.gram)
        return u / (u * texts).sum(dim=1, keepdim=True)

    def specific(self) -> Tensor:
        """(C, d), the unit direction of `specific_target` of every class."""
        w = self.bundle.text_projection.double()
        shared = w.T @ self.gram @ w
        lam = SHARED * float(shared.trace()) / self.total
        texts = self.bundle.forget_hidden.double() @ w
        return normalize(self.directions(lam, self.rows @ w, texts, shared), dim=1)


def displacements(bundle: FeatureBundle, specific: Tensor, target: str, beta: float) -> Tensor:
    """`D = P - h_f W` of every class, (C, d) float64."""
    e = bundle.forget_hidden.double() @ bundle.text_projection.double()
    if target == "opposite":
        return -(1 + beta) * e
    if target == "specific":
        return -(1 + beta) * (e * specific).sum(dim=1, keepdim=True) * specific
    generator, classes = torch.Generator().manual_seed(0), class_embeddings(bundle)
    empty = [
        empty_target(bundle.neutral_hidden, bundle.text_projection, classes, [i], generator)[0]
        for i in range(len(e))
    ]
    return torch.cat(empty).double() - e


def outcomes(own: Scored, others: Sequence[Scored], left: Tensor, d: Tensor) -> pd.DataFrame:
    """A row for every class of `own`, forgotten alone: fractions, and cosines for margins."""
    left, d = left.float(), d.float()
    rows = []
    for i, cosines in enumerate(own.after(left, d)):
        mine = own.bundle.labels == i
        right = cosines.argmax(dim=1) == own.bundle.labels
        rival = cosines[mine].clone()
        rival[:, i] = -torch.inf
        margin = rival.amax(dim=1) - cosines[mine, i]  # what another class is nearer by
        rows.append(
            {
                "class": own.bundle.classnames[i],
                "left": float(right[mine].double().mean()),
                "margin": float(margin.mean()),
                "margin_low": float(margin.min()) if len(margin) else float("nan"),
                "rest": float((right[~mine].double() - own.correct[~mine].double()).mean()),
            }
        )
    for other in others:
        before = float(other.correct.double().mean())
        for row, cosines in zip(rows, other.after(left, d), strict=True):
            hits = cosines.argmax(dim=1) == other.bundle.labels
            row[f"to {other.bundle.dataset}"] = float(hits.double().mean()) - before
    return pd.DataFrame(rows)


def summarise(table: pd.DataFrame) -> dict[str, float | str]:
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


def frontier(bundles: Sequence[FeatureBundle]) -> pd.DataFrame:
    """A row for every set and method."""
    scored = [Scored.of(bundle) for bundle in bundles]
    rows = []
    for own in scored:
        others = [other for other in scored if other is not own]
        for vocabulary, weight in WEIGHTS:
            weights = {"own": OWN, "vocabulary": vocabulary, "others": weight}
            retained = RetainSet(own.bundle, [other.bundle for other in others], weights)
            specific = retained.specific()
            moves = [(t, b, displacements(own.bundle, specific, t, b)) for t, b in TARGETS]
            for mu in RIDGES:
                left = retained.left(mu)
                for target, beta, d in moves:
                    method = {"target": target, "beta": beta, "mu": mu, "vocabulary": vocabulary}
                    result = summarise(outcomes(own, others, left, d))
                    names = {"set": own.bundle.dataset, "names": "known" if weight else "unknown"}
                    rows.append(names | method | result)
    return pd.DataFrame(rows)


def plot(table: pd.DataFrame, path: Path) -> None:
    """A panel for each set, above with the other sets' names known, below without."""
    sets = list(table["set"].unique())
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
                standard = part.merge(pd.DataFrame([DEFAULT]))
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
    bundles = [FeatureBundle.load(path) for path in list_bundles(folder, backbone).values()]
    bundles = [bundle for bundle in bundles if len(bundle.labels)]
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
    started = time.perf_counter()
    table = frontier(load(args.features, args.backbone))
    for (name, names), part in table.groupby(["set", "names"], sort=False):
        print(f"\n{name}, names of the other sets {names}")
        columns = ["target", "beta", "mu", "vocabulary", *PRINTED, "worst_class"]
        print(part[columns].to_string(index=False, float_format=lambda v: f"{v:.3g}"))
    print(f"\n{len(table)} rows in {time.perf_counter() - started:.0f} s")
    if args.csv:
        with atomic_path(args.csv) as temporary:
            table.to_csv(temporary, index=False)
    if args.plot:
        plot(table, args.plot)
    return table
