"""What somebody who wants a class back knows beside the changed weights: names and the method.

Method and constants are public, and every name that may be meant can be read by CLIP's text tower,
which forgetting does not touch. Only which class it was is unknown.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import datasets
from clip.bundle import FeatureBundle
from engine.determinism import seeded
from evaluation.audit.case import Case
from forgetting.constrained import Ridge
from forgetting.statistics import RetainStatistics

LIMIT = 1000  # names that a class is looked for among
# ForgetExact's published defaults (configs/trainers/ForgetExact.yaml): weights of the groups of
# retained names, and the ridge in mean squared lengths of a retained hidden state.
WEIGHTS = {"own": 1.0, "vocabulary": 0.01, "others": 0.1}
RIDGE = 5e-6
# The paper's lamb_weight * rank / alpha over its lamb_preserve (0.25 to 0.4).
PAPER_RATIO = 5 / 0.3
# Ridge of the list's own statistics, in mean eigenvalues, see `Attacker.alike`. On real features
# one forgotten class is named first with any from 0.001 to 0.1; of several at once this names most.
EXPLAINED = 1e-2
KERNEL = 1e-9  # of the trace: the least ridge where the paper's own is 0


@dataclass(frozen=True)
class Guess:
    """A guess of the statistics that a change was made with.

    Attributes:
        matrix: `K`, (w, w) positive definite; specific: the rows `K^-1 h` of all names, (n, w), in
            whose directions the change lies if those names are forgotten.
    """

    matrix: Tensor
    specific: Tensor


@dataclass(frozen=True)
class Attacker:
    """A bundle's names and statistics, float64.

    Attributes:
        names: as words, the set's own classes first, each once; hidden: (n, w).
        ridge: `G + mu I` of all names by ForgetExact's defaults.
        own_share: what one class of the set weighs in `G`.
        vocabulary: `H_r`, (m, w), the paper's retain set.
    """

    names: list[str]
    hidden: Tensor
    ridge: Ridge
    own_share: float
    vocabulary: Tensor

    @cached_property
    def place(self) -> dict[str, int]:
        """Row of a name, by its key."""
        return {datasets.key(name): row for row, name in enumerate(self.names)}

    def find(self, name: str) -> int | None:
        """Row of a name in any spelling; None if it is not on the list."""
        return self.place.get(datasets.key(name))

    @cached_property
    def alike(self) -> Guess:
        """All names of the list alike, which no method needs to be known for.

        Ridge regression of a hidden state h on all others leaves `l (K - h^T h)^-1 h`, which is
        along `K^-1 h` with `K = H^T H + l I`: what the other names do not explain of it.
        """
        gram = self.hidden.T @ self.hidden
        return self._guess(Ridge(gram, EXPLAINED * float(gram.trace()) / len(gram)))

    @cached_property
    def constrained(self) -> Guess:
        """The constrained form by its defaults."""
        return self._guess(self.ridge)

    def guesses(self, difference: Tensor) -> list[Guess]:
        """Statistics of the known ways to forget, for a change (w, d).

        Beside the two above: none at all (the text itself is the direction, as in zeroing it), and
        the paper's, whose ridge `mu = (lw / lp) ||H_r Delta|| / ||Delta||` at the optimum can be
        read from the change.
        """
        identity = torch.eye(len(difference), dtype=torch.float64)
        found = [self.constrained, self.alike, Guess(identity, self.hidden)]
        if len(self.vocabulary):
            gram = self.vocabulary.T @ self.vocabulary
            moved = torch.linalg.matrix_norm(self.vocabulary @ difference)
            mu = PAPER_RATIO * float(moved / torch.linalg.matrix_norm(difference))
            found.append(self._guess(Ridge(gram, max(mu, KERNEL * float(gram.trace())))))
        return found

    def _guess(self, ridge: Ridge) -> Guess:
        identity = torch.eye(len(ridge.gram), dtype=torch.float64)
        return Guess(ridge.gram + ridge.mu * identity, ridge.solve(self.hidden).T)


# By identity: a bundle has no hash. An entry goes when one of its bundles does.
_known: dict[tuple[int, ...], Attacker] = {}


def set_generator(bundle: FeatureBundle, seed: int, purpose: str) -> torch.Generator:
    """Random numbers that all classes of a set share, where `Case.generator` is a class's own."""
    return seeded(seed, bundle.dataset, purpose)


def attacker(case: Case) -> Attacker:
    """Names and statistics of a case's bundle, made once for all classes of a set."""
    bundles = [case.bundle, *case.others.values()]
    key = (case.seed, *map(id, bundles))
    if key not in _known:
        _known[key] = _build(case.bundle, list(case.others.values()), case.seed)
        for bundle in bundles:
            weakref.finalize(bundle, _known.pop, key, None)
    return _known[key]


def _build(bundle: FeatureBundle, others: list[FeatureBundle], seed: int) -> Attacker:
    """The set's classes always stay on the list; the rest is drawn if there are too many."""
    groups = {
        "own": bundle.forget_hidden,
        "vocabulary": bundle.retain_hidden,
        "others": torch.cat([bundle.forget_hidden[:0], *(b.forget_hidden for b in others)]),
    }
    statistics = RetainStatistics(bundle.text_projection.shape[0])
    for group, rows in groups.items():
        statistics.update(group, rows)
    weights = {group: WEIGHTS[group] for group in statistics.counts}
    gram = statistics.weighted(weights)
    # A constant of the whole list, as the trainer takes it: mean squared length of a text.
    ridge = Ridge(gram, RIDGE * float(gram.trace()) / sum(weights.values()))

    spelled = [*bundle.classnames, *bundle.retain_names]
    spelled += [name for b in others for name in b.classnames]
    first: dict[str, int] = {}
    for row, name in enumerate(spelled):
        first.setdefault(datasets.key(name), row)
    rows = list(first.values())
    own = sum(row < len(bundle.classnames) for row in rows)
    if len(rows) > LIMIT:
        order = torch.randperm(len(rows) - own, generator=set_generator(bundle, seed, "names"))
        drawn = order[: max(0, LIMIT - own)].sort().values.tolist()
        rows = rows[:own] + [rows[own + place] for place in drawn]
    return Attacker(
        names=[datasets.plain(spelled[row]) for row in rows],
        hidden=torch.cat(list(groups.values()))[rows].double(),
        ridge=ridge,
        own_share=statistics.share("own", weights),
        vocabulary=bundle.retain_hidden.double(),
    )
