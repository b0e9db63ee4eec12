"""Other words, attacked: which of them still find a forgotten class, and which can be searched out.

    python -m experiments attack --features DIR [--dataset SET] [--classes N|all] [--ridge X]
    python -m experiments attack --gold FOLDER [--dataset SET] [--classes N|all]

Each class is forgotten alone. Of bundles their own other words look for its images. On the embedded
`mini` an attacker has K images of the class and searches for a text that finds the others, by the
gradient of token embeddings or word by word. FOLDER: of `experiments gold`, whose classes it takes.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize, softplus

from clip.audit_texts import audit_rows
from engine.log import progress
from experiments.gold import TRAININGS
from experiments.hide import Index, Mini, answers, index_parser, report, table_of, unit
from forgetting.context import ExactSettings
from forgetting.displacement import displacement_along
from forgetting.errors import ProblemError
from forgetting.models.vocabulary import generic_names

IMAGES = (1, 4, 16)  # that an attacker has
STEPS, RATE, TOKENS = 60, 0.03, 4  # of Adam; token embeddings that are free
WORDS, LISTED = 2, 200  # of a text that is searched word by word; common names it is made from
SCALE = 20.0  # of cosines, in the loss


def words_at_hand(
    index: Index, dataset: str, classes: Sequence[str], ridge: float | None
) -> Iterator[dict[str, Any]]:
    """Which part of a class's images each of its other words finds among the other names of its
    set, `before` and `after`. By text alone: how far it moves along the name, `ratio`; how much
    nearer to it than what is left of it lies another name, `margin`, in cosine."""
    bundle, words = index.bundles[dataset], audit_rows(index.bundles[dataset])
    classes = [name for name in classes if name in words]
    given = answers(index, dataset, classes, ExactSettings(ridge=ridge)) if classes else []
    for name, answer in zip(classes, given, strict=True):
        own = bundle.classnames.index(name)
        images = unit(bundle.image_features[bundle.labels == own])  # (n, d)
        changed = index.changed(bundle.text_projection.double() + answer.edit.delta)
        names, name_state = bundle.class_hidden.clone(), bundle.forget_hidden[own]  # (C, w), (w,)
        for text, kind, state in words[name]:
            names[own] = state  # the text is in the place of the name
            both = index.embed(names), changed.embed(names)
            found = [((images @ x.T).argmax(dim=1) == own).double().mean() for x in both]
            cosines = both[1] @ both[0][own]  # (C,)
            others = cosines.index_fill(0, torch.tensor(own), -1.0)
            yield {
                **{"data set": dataset, "class": name, "kind": kind, "text": text},
                **{"before": float(found[0]), "after": float(found[1])},
                "ratio": float(displacement_along(answer.edit, name_state, state[None])),
                "margin": float(others.max() - cosines[own]),
            }


class Attack:
    """On images of a class."""

    def __init__(self, mini: Mini, dataset: str, name: str) -> None:
        bundle = mini.bundles[dataset]
        own = torch.arange(len(bundle.classnames)) == bundle.classnames.index(name)  # (C,)
        self.model, self.projection = deepcopy(mini.source.model), bundle.text_projection.float()
        self.model.text_projection = None  # it gives hidden states
        self.tokenize = mini.source.architecture.tokenizer()
        self.images = normalize(bundle.image_features[own[bundle.labels]], dim=1)  # (n, d)
        self.name, others = bundle.forget_hidden[own], bundle.class_hidden[~own]
        self.rivals = self.cosines(others).amax(dim=0)  # (n,)

    def cosines(self, hidden: Tensor) -> Tensor:
        """Of texts (m, w) with the images, (m, n)."""
        return normalize(hidden @ self.projection, dim=1) @ self.images.T

    def losses(self, hidden: Tensor, known: int) -> Tensor:
        """Small where texts (m, w) are nearer to the first images than all names, (m,)."""
        return softplus(SCALE * (self.rivals - self.cosines(hidden))[:, :known]).mean(dim=1)

    def gradient(self, known: int) -> Tensor:
        """Hidden state (1, w) after some steps on the token embeddings of a text."""
        tokens = self.tokenize([" ".join("a" * TOKENS)])
        rows = self.model.token_embedding(tokens).detach()
        free = rows[:, 1 : 1 + TOKENS].clone().requires_grad_()
        optimiser = torch.optim.Adam([free], RATE)
        with self.model.token_embedding.register_forward_hook(
            lambda *_: torch.cat([rows[:, :1], free, rows[:, 1 + TOKENS :]], dim=1)
        ):
            for _ in range(STEPS):
                optimiser.zero_grad()
                self.losses(self.model.encode_text(tokens), known).backward()
                optimiser.step()
            return self.model.encode_text(tokens).detach()

    @torch.no_grad()
    def greedy(self, known: int, words: Sequence[str]) -> tuple[str, Tensor]:
        """The best word, and the best behind it: text and hidden state (1, w)."""
        text = ""
        for _ in range(WORDS):
            texts = [f"{text} {word}".strip() for word in words]
            hidden = self.model.encode_text(self.tokenize(texts))
            best = int(self.losses(hidden, known).argmin())
            text = texts[best]
        return text, hidden[[best]]

    def rows(self, words: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Percent of the other images that are found, for each attack."""
        found = {("its name", 0): ("", self.name)}
        for known in IMAGES:
            found["gradient", known] = "", self.gradient(known)
            found["words", known] = self.greedy(known, words)
        for (attack, known), (text, hidden) in found.items():
            success = (self.cosines(hidden)[0] > self.rivals)[known:].double().mean()
            yield {"attack": attack, "images": known, "text": text, "success": 100 * float(success)}


def attacks(
    mini: Mini, dataset: str, classes: Sequence[str], golds: Sequence[tuple[list[str], Mini]]
) -> Iterator[dict[str, Any]]:
    """Rows of each class that some of `golds` never learnt: in these, where it is forgotten, in the
    untouched model, and where the class before it is forgotten."""
    names = generic_names()[:: len(generic_names()) // LISTED]
    names += [name for bundle in mini.bundles.values() for name in bundle.retain_names]
    words = sorted({word for name in names for word in name.split()})
    w = mini.bundles[dataset].text_projection.double()
    given = answers(mini, dataset, classes, ExactSettings())
    changed = [mini.changed(w + answer.edit.delta) for answer in given]
    for i, name in enumerate(progress(classes, f"{dataset}: attacks")):
        gone = [("never learnt", gold) for without, gold in golds if name in without]
        cases = [("forgotten", changed[i]), ("untouched", mini)]
        cases += [("another is forgotten", changed[i - 1])] if len(classes) > 1 else []
        for model, training in cases + gone if gone else ():
            for row in Attack(training, dataset, name).rows(words):
                yield {"data set": dataset, "class": name, "model": model} | row


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Look for forgotten classes by other words; returns the table."""
    parser = index_parser("attack", __doc__)
    about = "folder of experiments gold, without --features"
    parser.add_argument("--gold", type=Path, metavar="FOLDER", default=Path("gold"), help=about)
    parser.add_argument("--ridge", type=float, help="of bundles; default: that of ForgetExact")
    args = parser.parse_args(argv)
    if not args.features:
        if not args.gold.is_dir():
            raise ProblemError(f"no folder {args.gold}: python -m experiments gold makes it")
        without = {f"{name}.safetensors": names for name, (_, names) in TRAININGS.items() if names}
        golds = [(names, Mini(args.gold / file)) for file, names in without.items()]
        table = table_of("attack", args, partial(attacks, golds=golds))
        report(table, ["attack", "images", "model"])
        return table
    table = table_of("attack", args, partial(words_at_hand, ridge=args.ridge))
    for kind, rows in table[table["before"] > 0].groupby("kind"):
        back = rows["after"] > 0
        print(f"\n{kind}: {len(rows)} texts found an image before, {back.sum()} of them after")
        if back.any():
            print(rows[back].to_string(index=False, float_format="{:.3f}".format))
        for score in ("ratio", "margin"):  # the smallest are suspect
            area = roc_auc_score(~back, rows[score]) if 0 < back.sum() < len(rows) else torch.nan
            print(f"{score}: AUC {area:.3f}, mean {rows[score].mean():.3f}")
    return table
