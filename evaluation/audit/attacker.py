"""What somebody who wants a class back knows beside the changed weights: names and the method.

Method and constants are public, and every name that may be meant can be read by CLIP's text tower,
which forgetting does not touch. Only which class it was is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

import datasets
from clip.retain import retained
from engine.config import settings
from evaluation.audit.case import Common
from evaluation.audit.texts import Texts
from forgetting import Ridge

LIMIT = 1000  # names that a class is looked for among
# Ridge of the list's own statistics, in mean eigenvalues, see `Attacker.alike`. On real features
# one forgotten class is named first with any from 0.001 to 0.1; of several at once this names most.
EXPLAINED = 1e-2
TINY = torch.finfo(torch.float64).tiny
ROUNDING = 12  # digits of a score that are more than rounding
KERNEL = 1e-9  # of the trace: the least ridge where the paper's own is 0


@dataclass(frozen=True)
class Guess:
    """A guess of the statistics `K = G + mu I` that a change was made with, in their eigenbasis.

    Whoever forgets the text h changes the projection along `K^-1 h`.

    Attributes:
        basis: (w, w) eigenvectors of G; values: (w,) eigenvalues of K.
        names: (n, w), the hidden states of all names in that basis; squares: of its entries.
    """

    basis: Tensor
    values: Tensor
    names: Tensor
    squares: Tensor

    @classmethod
    def of(cls, gram: Tensor, hidden: Tensor, mu: float = 0.0) -> Guess:
        """From `G` (w, w) and hidden states (n, w)."""
        values, basis = torch.linalg.eigh(gram)
        names = hidden @ basis  # (n, w) @ (w, w)
        return cls(basis, values + mu, names, names.square())

    @cached_property
    def lengths(self) -> Tensor:
        """Of every name's direction, (n,)."""
        return self._lengths(self.values[None])[0]

    def _lengths(self, values: Tensor) -> Tensor:
        """The same for several K of eigenvalues (P, w): (P, n)."""
        squares = values.square().reciprocal() @ self.squares.T  # (P, w) @ (w, n)
        return squares.sqrt().clamp_min(TINY)

    def cosines(self, spans: Sequence[Tensor], mu: Tensor | None = None) -> list[Tensor]:
        """Of every name's direction with the span of each of P sets of orthonormal columns (w, r):
        (n,) each; `mu` (P,): with as much more on the eigenvalues of each."""
        sizes = [span.shape[1] for span in spans]
        values = self.values[None] if mu is None else self.values + mu[:, None]  # (P, w)
        lengths = self.lengths[None] if mu is None else self._lengths(values)  # (P, n)
        of = values if mu is None else values.repeat_interleave(torch.tensor(sizes), dim=0)
        columns = (torch.cat(list(spans), dim=1).T @ self.basis) / of  # (sum of r, w)
        inside = (columns @ self.names.T).square_()  # (sum of r, w) @ (w, n)
        owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        squares = inside.new_zeros(len(sizes), inside.shape[1]).index_add_(0, owner, inside)
        # Names that are forgotten at once all score 1: rounding does not put one of them first.
        return list(squares.sqrt_().div_(lengths).round_(decimals=ROUNDING))

    def texts(self, spans: Sequence[Tensor], mu: Tensor | None = None) -> list[Tensor]:
        """Orthonormal bases (w, r) of `K u`: of the texts that lead to these directions; arguments
        as of `cosines`."""
        sizes = [span.shape[1] for span in spans]
        values = self.values[:, None]
        if mu is not None:
            values = values + mu.repeat_interleave(torch.tensor(sizes))
        columns = self.basis @ (values * (self.basis.T @ torch.cat(list(spans), dim=1)))
        return [torch.linalg.qr(part)[0] for part in columns.split(sizes, dim=1)]

    def directions(self) -> Tensor:
        """`K^-1 h` of all names, (n, w)."""
        return (self.names / self.values) @ self.basis.T  # (n, w) @ (w, w)


@dataclass(frozen=True)
class Attacker:
    """A data set's names and statistics, float64.

    Attributes:
        names: as words, the set's own classes first, each once; hidden: (n, w).
        ridge: `G + mu I` of all names by ForgetExact's defaults.
        own_share: what one class of the set weighs in `G`.
        vocabulary: `H_r`, (m, w), the paper's retain set; ratio: `lw / lp` of its constants.
        projection: `W`, (w, d), which is published; bias: (d,), or None.
    """

    names: list[str]
    hidden: Tensor
    ridge: Ridge
    own_share: float
    vocabulary: Tensor
    ratio: float
    projection: Tensor
    bias: Tensor | None = None

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {datasets.key(name): row for row, name in enumerate(self.names)}

    def find(self, name: str) -> int | None:
        """Row of a name in any spelling; None if it is not on the list."""
        return self._rows.get(datasets.key(name))

    @cached_property
    def shared(self) -> Tensor:
        """The direction that all texts share, (w,)."""
        return normalize(self.hidden.mean(dim=0), dim=0)

    @cached_property
    def alike(self) -> Guess:
        """All names of the list alike, which no method needs to be known for.

        Ridge regression of a hidden state h on all others leaves `l (K - h^T h)^-1 h`, which is
        along `K^-1 h` with `K = H^T H + l I`: what the other names do not explain of it.
        """
        gram = self.hidden.T @ self.hidden
        return Guess.of(gram, self.hidden, EXPLAINED * float(gram.trace()) / len(gram))

    @cached_property
    def unexplained(self) -> Texts:
        """What the other names do not explain of each, and where the original sends that."""
        x = self.alike.directions()
        embedded = x @ self.projection  # (n, d)
        return Texts(x, embedded if self.bias is None else embedded + self.bias)

    @cached_property
    def unexplained_lengths(self) -> Tensor:
        """Norms (n,) of what the other names do not explain of each."""
        return self.unexplained.hidden.norm(dim=1).clamp_min(TINY)

    @cached_property
    def fixed(self) -> list[Guess]:
        """The constrained form by its defaults; all names alike; and no statistics at all, where
        the text itself is the direction, as in zeroing it."""
        gram, nothing = self.ridge.gram, torch.zeros_like(self.ridge.gram)
        default = Guess.of(gram, self.hidden, self.ridge.mu)
        return [default, self.alike, Guess.of(nothing, self.hidden, 1.0)]

    @cached_property
    def paper(self) -> Guess:
        """The paper's vocabulary, without its ridge."""
        return Guess.of(self.vocabulary.T @ self.vocabulary, self.hidden)

    def ridges(self, spans: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """The ridge of the paper's form, (P,), as it can be read from each of P changes of left
        singular vectors (w, r) and singular values (r,): `mu = (lw / lp) ||H_r Delta|| / ||Delta||`
        at the optimum."""
        ways = [u * size for u, size in zip(spans, values, strict=True)]
        moved = (self.vocabulary @ torch.cat(ways, dim=1)).split([len(v) for v in values], dim=1)
        sizes = [float(m.norm() / v.norm()) for m, v in zip(moved, values, strict=True)]
        return (self.ratio * torch.tensor(sizes).double()).clamp_min(self._least)

    @cached_property
    def _least(self) -> float:
        return KERNEL * float(self.paper.values.sum())

    def recognise(
        self, spans: Sequence[Tensor], values: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Which names P changes forget, by the known way to forget that fits each best.

        Args:
            spans, values: left singular vectors (w, r) of each, and singular values (r,).

        Returns:
            For each an orthonormal basis (w, r) of `K U` and every name's score (n,).
        """
        tried: list[tuple[Guess, Tensor | None]] = [(guess, None) for guess in self.fixed]
        if len(self.vocabulary):
            tried.append((self.paper, self.ridges(spans, values)))
        scores = [guess.cosines(spans, mu) for guess, mu in tried]
        best = torch.tensor([[float(x.max()) for x in found] for found in scores]).argmax(dim=0)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for number, (guess, mu) in enumerate(tried):
            of = (best == number).nonzero()[:, 0]  # the changes that it fits best
            some = of.tolist()
            if some:
                bases = guess.texts([spans[p] for p in some], None if mu is None else mu[of])
                own = [scores[number][p] for p in some]
                found |= dict(zip(some, zip(bases, own, strict=True), strict=True))
        return [found[p] for p in range(len(spans))]


def attacker(common: Common) -> Attacker:
    """The set's classes always stay on the list; the rest is drawn if there are too many."""
    bundle, others = common.bundle, list(common.others.values())
    exact = settings("ForgetExact")
    kept = retained(exact, bundle, others)
    retain = kept.names
    first: dict[str, int] = {}
    for row, name in enumerate(retain.names):
        first.setdefault(datasets.key(name), row)
    rows = list(first.values())
    own = sum(row < len(bundle.classnames) for row in rows)
    if len(rows) > LIMIT:
        order = torch.randperm(len(rows) - own, generator=common.generator("names"))
        drawn = order[: max(0, LIMIT - own)].sort().values.tolist()
        rows = rows[:own] + [rows[own + place] for place in drawn]
    # The paper's weights for the data set; of another backbone if it has none for the bundle's.
    paper = settings("ForgetLoRA", bundle.dataset, bundle.backbone).FORGET
    modes = paper.WEIGHTS.get(bundle.backbone) or next(iter(paper.WEIGHTS.values()))
    return Attacker(
        names=[datasets.clean_name(retain.names[row]) for row in rows],
        hidden=retain.rows[rows].double(),
        ridge=kept.ridge,
        own_share=float(retain.shares[0]),
        vocabulary=bundle.retain_hidden.double(),
        ratio=paper.LAMB_WEIGHT * paper.RANK / paper.ALPHA / modes["SINGLE"][0],
        projection=bundle.text_projection.double(),
        bias=None if bundle.text_bias is None else bundle.text_bias.double(),
    )
