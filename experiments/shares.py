"""How much of a class's change other texts feel: the shares s(h), from text alone.

    python -m experiments shares --features DIR [--backbone ViT-B/32] [KEY VALUE ...]

DIR is a folder of feature bundles (`python -m clip.features DATASET ARCH --out DIR --audit`). Every
class is forgotten alone, by its bare name, by what a run of ForgetExact retains; a text h then
moves by s(h) times the way of that name. A high share of other words carries forgetting over to
them; a high share of names that nobody retained (classes and vocabularies of the other sets) is
harm to them. `TRAINER.FORGETEXACT.OTHERS 0` leaves the other sets' classes unlisted too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from clip.audit_texts import audit_rows
from clip.bundle import FeatureBundle, load_bundles
from datasets.names import key
from engine.cli import Parser
from engine.determinism import one_thread
from engine.log import Progress
from experiments.alone import Alone

COLUMNS = ["set", "texts", "count", "mean", "rms", "lowest", "highest"]


def shares(bundle: FeatureBundle, others: Sequence[FeatureBundle], opts: Sequence[str]) -> list:
    """Rows of `COLUMNS`: kinds of other words that the bundle brought, then names of others."""
    alone = Alone(bundle, others, opts)
    left = alone.left()  # (C, w)
    found: dict[str, list[Tensor]] = defaultdict(list)
    found["evaluation"] = list((left * bundle.class_hidden.double()).sum(dim=1))
    for label, name in enumerate(bundle.classnames):
        for _, kind, hidden in audit_rows(bundle).get(name, []):
            found[kind].append(left[label] @ hidden.double())
    listed = {key(name) for name in alone.retain.names}
    for other in others:
        rows = zip(
            [*other.classnames, *other.retain_names],
            torch.cat([other.forget_hidden, other.retain_hidden]).double(),
            strict=True,
        )
        for name, hidden in rows:
            if key(name) not in listed:
                found["unlisted names"] += list(left @ hidden)
                listed.add(key(name))
    return [
        (bundle.dataset, kind, len(s), s.mean(), s.square().mean().sqrt(), s.min(), s.max())
        for kind, s in ((kind, torch.stack(values)) for kind, values in found.items())
    ]


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Print the shares of every set of a folder."""
    parser = Parser(prog="python -m experiments shares", description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, help="folder of feature bundles")
    parser.add_argument("--backbone", default="ViT-B/32")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")
    args = parser.parse_args(argv)
    bundles = list(load_bundles(args.features, args.backbone).values())
    rows = []
    with one_thread():
        for bundle in Progress(bundles, "sets"):
            rows += shares(bundle, [other for other in bundles if other is not bundle], args.opts)
    table = pd.DataFrame(rows, columns=COLUMNS)
    table[COLUMNS[3:]] = table[COLUMNS[3:]].astype(float)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    return table
