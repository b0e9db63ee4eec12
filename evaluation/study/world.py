"""A data set, those beside it, and which names are retained when classes are forgotten."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

import datasets
from clip.bundle import FeatureBundle
from engine.determinism import seeded
from evaluation.results import join_label
from evaluation.study.constants import GROUPS, Constants
from evaluation.zero_shot import class_embeddings
from forgetting import empty_target, opposite_target, orthogonal_target, specific_target

TARGETS = ("empty", "opposite", "orthogonal", "specific")


@dataclass(frozen=True, eq=False)
class Case:
    """One row to be: classes forgotten at once, by one solver, in one setting of a study.

    Attributes:
        labels: of the classes; texts: (k, w), what stands for them; owner: (k,) index into labels.
        solver, setting: names; place: where the setting lies on a numeric axis, NaN if on none.
        target, beta: where texts are sent; rank: of the descent and of the weight term.
        off: a loss term, or a retained group, that is switched off.
        pick: (n,) rows of the vocabulary that alone are retained; None: what the method retains.
    """

    labels: tuple[int, ...]
    texts: Tensor
    owner: tuple[int, ...]
    solver: str
    setting: str
    target: str
    beta: float
    rank: int
    place: float = float("nan")
    off: str = ""
    pick: Tensor | None = None


class World:
    """One data set under one backbone, with everything that can be retained beside its classes.

    Attributes:
        bundle: the set that classes are forgotten from; others: the other sets.
        names, rows: by group (own, vocabulary, others), m names and hidden states (m, w).
        groups: those that have names and weight.
        mu: ridge of the constrained form; lam: that of the target specific. Both come from all
            groups together, so that they do not move with what a study retains.
    """

    def __init__(
        self,
        bundle: FeatureBundle,
        others: dict[str, FeatureBundle],
        constants: Constants,
        seed: int,
    ) -> None:
        self.bundle, self.others, self.constants, self.seed = bundle, others, constants, seed
        foreign = [bundle.forget_hidden[:0], *(b.forget_hidden for b in others.values())]
        names = (
            bundle.classnames,
            bundle.retain_names,
            [name for other in others.values() for name in other.classnames],
        )
        rows = (bundle.forget_hidden, bundle.retain_hidden, torch.cat(foreign))
        self.names = {
            g: list(map(datasets.key, each)) for g, each in zip(GROUPS, names, strict=True)
        }
        self.rows = dict(zip(GROUPS, rows, strict=True))
        self.groups = [g for g in GROUPS if len(self.rows[g]) and constants.weights[g] > 0]
        # Means over the weighted groups, as the trainer takes them.
        total = sum(constants.weights[group] for group in self.groups)
        w = bundle.text_projection.double()
        squares, lengths = 0.0, 0.0
        for group in self.groups:
            rows = self.rows[group].double()
            share = constants.weights[group] / len(rows)
            squares += share * float(rows.square().sum())
            lengths += share * float((rows @ w).square().sum())
        self.mu, self.lam = constants.mu * squares / total, constants.shared * lengths / total

    def label(self, labels: tuple[int, ...]) -> str:
        """The classes' names as one, as in logs.json."""
        return join_label([self.bundle.classnames[index] for index in labels])

    def generator(self, labels: tuple[int, ...], purpose: str = "") -> torch.Generator:
        """Random numbers of these classes; without a purpose those of a run of train.py."""
        return seeded(self.seed, self.bundle.dataset, self.label(labels) + purpose)

    def stays(self, group: str, label: int, texts: Tensor, alike: bool) -> Tensor:
        """(m,) bool, the names of a group that stay when class `label` is forgotten by `texts`.

        What leaves is its own name and marked synonyms; with `alike` also what is nearer to a text
        than the similarity limit, except the set's own classes.
        """
        same = datasets.same_meaning([self.bundle.classnames[label]], self.bundle.dataset)
        stay = torch.tensor([name not in same for name in self.names[group]], dtype=torch.bool)
        limit = self.constants.similarity
        if alike and group != "own" and limit < 1:
            cosines = normalize(self.rows[group], dim=1) @ normalize(texts, dim=1).T  # (m, k)
            stay &= cosines.amax(dim=1) <= limit
        return stay

    def pool(self, label: int, texts: Tensor) -> Tensor:
        """(n,) rows of the vocabulary that a study of retained names may pick from."""
        return torch.nonzero(self.stays("vocabulary", label, texts, alike=True))[:, 0]

    def plain(self, case: Case) -> Tensor:
        """`H_r` (m, w) of the paper's objective: the vocabulary less the forgotten names."""
        rows = self.bundle.retain_hidden
        if case.pick is not None:
            return rows[case.pick]
        stay = [self.stays("vocabulary", x, case.texts, alike=False) for x in case.labels]
        return rows[torch.stack(stay).all(dim=0)]

    def weighted(self, case: Case, only: int | None = None) -> tuple[Tensor, Tensor]:
        """Rows (m, w) float64 and shares (m,) of `G = sum share h^T h`, the constrained form's.

        Args:
            only: index into `case.labels` of the one class whose names leave; None: all of them.
        """
        like = self.bundle.forget_hidden[:0].double()  # (0, w)
        if case.pick is not None:
            rows = self.bundle.retain_hidden[case.pick].to(like)
            return rows, like.new_full((len(rows),), 1 / max(1, len(rows)))
        owner = torch.tensor(case.owner)
        members = range(len(case.labels)) if only is None else [only]
        kept, shares = [like], [like.new_zeros(0)]
        for group in self.groups:
            if group == case.off:
                continue
            rows, weight = self.rows[group], self.constants.weights[group]
            stay = torch.ones(len(rows), dtype=torch.bool)
            for index in members:
                stay &= self.stays(group, case.labels[index], case.texts[owner == index], True)
            kept.append(rows[stay].to(like))
            # A name's weight does not depend on which others have left.
            shares.append(like.new_full((int(stay.sum()),), weight / len(rows)))
        return torch.cat(kept), torch.cat(shares)

    def gram(self, case: Case, only: int | None = None) -> Tensor:
        """`G` (w, w) float64 of `weighted`."""
        rows, shares = self.weighted(case, only)
        return (rows.T * shares) @ rows  # (w, m) @ (m, w) -> (w, w)

    def target(self, case: Case, generator: torch.Generator) -> Tensor:
        """`P` (k, d) of a case, float32 for `empty` and `orthogonal`, else float64."""
        bundle, w = self.bundle, self.bundle.text_projection
        if case.target == "empty":
            labels = [case.labels[index] for index in case.owner]
            classes, std = class_embeddings(bundle), self.constants.noise_std
            return empty_target(bundle.neutral_hidden, w, classes, labels, generator, std)[0]
        if case.target == "orthogonal":
            texts = torch.cat([bundle.class_hidden, bundle.forget_hidden, bundle.retain_hidden])
            return orthogonal_target(texts @ w, len(case.texts))
        texts = case.texts.double()
        if case.target == "opposite":
            return opposite_target(texts, w.double(), case.beta)
        target, owner = texts.new_empty(len(texts), w.shape[1]), torch.tensor(case.owner)
        for index in range(len(case.labels)):
            mine = owner == index
            gram = self.gram(case, only=index)
            target[mine] = specific_target(texts[mine], w, gram, self.lam, case.beta)
        return target
