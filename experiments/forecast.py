"""How well text foretells what images show: rank correlations over classes, with their intervals.

    python -m experiments forecast --features DIR [--backbone ViT-B/32] [KEY VALUE ...]

DIR is a folder of feature bundles. Every class of every set with images is forgotten alone by
ForgetExact. What it said beforehand (`forgetting/forecast.py`) is set beside what was measured:
what names like the vocabulary's would feel (`unlisted`) beside the mean loss on other sets; the
largest loss of cosine of a name of the set (`lost`), and that less the name's lead, beside the
worst loss of a single class (`neighbour`). `share` is how far the names of the other sets truly
move, which a forecast could know only if it had them. `TRAINER.FORGETEXACT.OTHERS 0` leaves them
unlisted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor

import datasets
from clip.bundle import FeatureBundle
from engine.cli import Parser
from engine.determinism import one_thread
from engine.log import Progress
from evaluation.zero_shot import ZeroShot, class_embeddings
from experiments.alone import Alone
from experiments.frontier import by_class, factors, load, outcomes
from forgetting.forecast import Felt, follow

PAIRS = {  # said -> measured
    "unlisted": "others",
    "share": "others",
    "lost": "neighbour",
    "beyond the lead": "neighbour",
}
DRAWS = 2000
KNOWN = 0.5  # of a class's images: it was recognised


def told_and_seen(bundles: Sequence[FeatureBundle], opts: Sequence[str]) -> pd.DataFrame:
    """For every class what text said, and what it cost: losses of accuracy, larger is worse; NaN
    where there is no other set."""
    scored, tables = [ZeroShot(bundle) for bundle in bundles], []
    for own in Progress(scored, "sets"):
        others = [other for other in scored if other is not own]
        alone = Alone(own.bundle, [other.bundle for other in others], opts)
        answers = alone.answers()
        changes = factors(answers)
        table = outcomes(own, others, changes)
        leads = alone.watch.leads[: len(table)]
        before, said = class_embeddings(own.bundle), []
        foreign = torch.cat(
            [own.bundle.class_hidden[:0], *(other.bundle.class_hidden for other in others)]
        )
        for label, (answer, change, right) in enumerate(
            zip(answers, changes, own.correct(changes), strict=True)
        ):
            lost = 1 - (before * class_embeddings(own.bundle, change)).sum(dim=1)  # (C,)
            lost[label] = -1.0
            moved = follow(*change, own.bundle.forget_hidden[label], foreign)
            told = answer.report["forecast"]
            names = {one["name"] for one in told["felt"] if Felt(**one).falls}
            warned = torch.tensor([datasets.plain(name) in names for name in own.bundle.classnames])
            warned[label], down = False, fell(own, right, label)
            unlisted = told["unlisted"].get("vocabulary", {"rms": np.nan})
            said.append(
                {
                    "unlisted": unlisted["rms"],
                    "share": float(moved.square().mean().sqrt()) if others else np.nan,
                    "lost": float(lost.max()),
                    "beyond the lead": float((lost - leads).max()),
                    "warned": int(warned.sum()),
                    "fell": int(down.sum()),
                    "right": int((down & warned).sum()),
                }
            )
        columns = [column for column in table if column.startswith("to ")]
        seen = {"others": -table[columns].mean(axis=1), "neighbour": -table["neighbour"]}
        tables.append(pd.concat([table[["class"]], pd.DataFrame(said), pd.DataFrame(seen)], axis=1))
        tables[-1].insert(0, "set", own.bundle.dataset)
    return pd.concat(tables, ignore_index=True)


def fell(own: ZeroShot, correct: Tensor, label: int) -> Tensor:
    """(C,) bool, which recognised classes lost half of their accuracy or more, but `label`."""
    before, after = by_class(own, own.before), by_class(own, correct)
    found = (before >= KNOWN) & (after <= before / 2)
    found[label] = False
    return found


def correlation(said: np.ndarray, seen: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rank correlation, and its 95 % interval by a bootstrap over classes. Neither of
    the two may be one number throughout."""
    generator = np.random.default_rng(seed)
    picks = np.vstack(
        [np.arange(len(said)), generator.integers(len(said), size=(DRAWS, len(said)))]
    )
    ranks = [rankdata(values[picks], axis=1) for values in (said, seen)]
    a, b = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    size = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    found = (a * b).sum(axis=1)[size > 0] / size[size > 0]
    return float(found[0]), *map(float, np.quantile(found[1:], [0.025, 0.975]))


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each set and pair, then for all sets: as they are, which is partly a difference
    between sets, and each ranked within its set."""
    parts, sets = list(table.groupby("set", sort=False)), table.groupby("set")
    if len(parts) > 1:
        within = sets[[*PAIRS, *dict.fromkeys(PAIRS.values())]].rank(pct=True)
        parts += [("all", table), ("all, within sets", within)]
    rows = []
    for name, part in parts:
        for said, seen in PAIRS.items():
            both = part[[said, seen]].dropna()
            if (both.nunique() > 1).all():
                rho, low, high = correlation(*both.to_numpy().T)
                rows.append([name, len(both), said, seen, rho, low, high])
    return pd.DataFrame(rows, columns=["set", "classes", "said", "seen", "rho", "low", "high"])


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Print the correlations, and how often a warning was right."""
    parser = Parser(prog="python -m experiments forecast", description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, help="folder of feature bundles")
    parser.add_argument("--backbone", default="ViT-B/32")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")
    args = parser.parse_args(argv)
    with one_thread():
        table = told_and_seen(load(args.features, args.backbone, 1), args.opts)
    found = correlations(table)
    print(found.to_string(index=False, float_format=lambda value: f"{value:+.2f}"))
    warned, right, down = (table[column].sum() for column in ("warned", "right", "fell"))
    print(
        f"\n{len(table)} classes forgotten in turn: {warned} warnings that another of the set "
        f"falls, {right} of them right; {down} times one fell (it was recognised, and lost half "
        "of its accuracy or more)"
    )
    return found
