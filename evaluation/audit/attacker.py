"""What an attacker knows beside the changed weights: names, and how forgetting is done.

Methods and constants are public, and every candidate name can be encoded by CLIP's text encoder,
which forgetting does not touch. Only which class was forgotten is unknown.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

import datasets
from clip.retain import exact_context
from engine.config import paper_weights, settings
from evaluation.audit.case import AuditData
from forgetting import ForgetProblem
from forgetting.context import ExactSettings

LIMIT = 1000  # names that a class is looked for among
# Ridge of the statistics of all listed names, in mean eigenvalues, see `Attacker.uniform`. On real
# features one forgotten class is named first with any from 0.001 to 0.1; of several at once this
# names most.
EXPLAINED = 1e-2
TINY = torch.finfo(torch.float64).tiny
DIGITS = 12  # of a score that are more than rounding
KERNEL = 1e-9  # of the trace: the least ridge where the paper's own is 0


class Statistics:
    """Candidate statistics `G` of a change `Delta = K^-1 H_f^T Z` with `K = G + mu I`.

    Whoever forgets the text h changes the projection along `K^-1 h`.

    Args:
        gram: `G`, (w, w); hidden: (n, w), hidden states of all names.
    """

    def __init__(self, gram: Tensor, hidden: Tensor) -> None:
        self.values, self.basis = torch.linalg.eigh(gram)  # (w,), (w, w)
        self.names = hidden @ self.basis  # (n, w)
        self.squares = self.names.square()

    def cosines(self, span: Tensor, mu: float) -> Tensor:
        """Cosine (n,) of every name's direction with the span of orthonormal columns (w, r)."""
        values = self.values[:, None] + mu
        inside = self.names @ (self.basis.T @ span / values)  # (n, w) @ (w, r)
        lengths = (self.squares @ values.pow(-2))[:, 0].sqrt().clamp_min(TINY)  # of K^-1 h
        cosines = inside.norm(dim=1) / lengths
        # Names that are forgotten together all score 1: rounding does not put one of them first.
        return cosines.round(decimals=DIGITS)

    def texts(self, span: Tensor, mu: float) -> Tensor:
        """Orthonormal basis (w, r) of `K u`, the texts that lead to the directions in a span."""
        columns = self.basis @ ((self.values + mu)[:, None] * (self.basis.T @ span))
        return torch.linalg.qr(columns)[0]


class Attacker:
    """A data set's names and statistics, float64.

    Attributes:
        names: as words, the set's own classes first, each once; hidden: (n, w). The classes always
            stay on the list; the rest is drawn if there are too many.
        ridge: `G + mu I` of all names by ForgetExact's defaults.
        vocabulary: `H_r`, (m, w), the paper's retain set; ratio: `lw / lp` of its constants.
    """

    def __init__(self, data: AuditData) -> None:
        bundle = data.bundle
        exact = exact_context(ExactSettings(), bundle, list(data.others.values()))
        retain, self.ridge = exact.retain, exact.ridge
        first: dict[str, int] = {}
        for row, name in enumerate(retain.names):
            first.setdefault(datasets.key(name), row)
        rows = list(first.values())
        own = sum(row < len(bundle.classnames) for row in rows)
        if len(rows) > LIMIT:
            order = torch.randperm(len(rows) - own, generator=data.generator("names"))
            drawn = order[: max(0, LIMIT - own)].sort().values.tolist()
            rows = rows[:own] + [rows[own + index] for index in drawn]
        self.names = [datasets.clean_name(retain.names[row]) for row in rows]
        self.hidden = retain.rows[rows].double()
        paper = settings("ForgetLoRA", bundle.dataset, bundle.backbone)
        problem = ForgetProblem(
            bundle.text_projection,
            forget_hidden=bundle.forget_hidden[:1],
            retain_hidden=bundle.retain_hidden,
            target=bundle.embed(bundle.neutral_hidden),
            rank=paper.FORGET.RANK,
            alpha=float(paper.FORGET.ALPHA),
            **paper_weights(paper),
        ).double
        self.vocabulary, self.ratio = problem.retain_hidden, problem.lw / problem.lamb_preserve

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {datasets.key(name): row for row, name in enumerate(self.names)}

    def row(self, name: str) -> int | None:
        """Row of a name in any spelling; None if it is not on the list."""
        return self._rows.get(datasets.key(name))

    @cached_property
    def shared(self) -> Tensor:
        """The direction that all texts share, (w,)."""
        return normalize(self.hidden.mean(dim=0), dim=0)

    @cached_property
    def uniform(self) -> tuple[Statistics, float]:
        """All names of the list with equal weight, and a ridge. It assumes no method.

        Ridge regression of a hidden state h on all others leaves `mu (K - h^T h)^-1 h`, which is
        along `K^-1 h` with `K = H^T H + mu I`: what the other names do not explain of it.
        """
        gram = self.hidden.T @ self.hidden
        return Statistics(gram, self.hidden), EXPLAINED * float(gram.trace()) / len(gram)

    @cached_property
    def unexplained(self) -> Tensor:
        """What the other names do not explain of each, (n, w), unit norm."""
        statistics, mu = self.uniform
        directions = statistics.names / (statistics.values + mu) @ statistics.basis.T
        return normalize(directions, dim=1, eps=TINY)

    @cached_property
    def candidates(self) -> list[tuple[Statistics, float]]:
        """Statistics with their ridges: ForgetExact by its defaults; all names with equal weight;
        and none, where the text itself is the direction, as in zeroing it."""
        exact = Statistics(self.ridge.gram, self.hidden)
        none = Statistics(torch.zeros_like(self.ridge.gram), self.hidden)
        return [(exact, self.ridge.mu), self.uniform, (none, 1.0)]

    @cached_property
    def paper(self) -> Statistics:
        """The paper's vocabulary."""
        return Statistics(self.vocabulary.T @ self.vocabulary, self.hidden)

    def paper_ridge(self, span: Tensor, values: Tensor) -> float:
        """The ridge of the paper's objective, which follows from the change itself.

        At the optimum `mu = (lw / lp) ||H_r Delta|| / ||Delta||`.

        Args:
            span, values: left singular vectors (w, r) and singular values (r,) of the change.
        """
        moved = float((self.vocabulary @ (span * values)).norm() / values.norm())
        return max(self.ratio * moved, KERNEL * float(self.paper.values.sum()))

    def recognise(self, span: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Which names a change forgets, by the known method that fits it best.

        A change that forgets the text h has `K^-1 h` in its column space, spanned by its left
        singular vectors U. A name's score is the cosine of `K^-1 h` with that span: 1, the maximum,
        for a forgotten text and the right K; about `sqrt(r / w)`, the same for all names, where U
        is random. Of the known methods' K the one is taken under which some name scores highest.

        Args:
            span, values: left singular vectors (w, r) and singular values (r,) of the change.

        Returns:
            An orthonormal basis (w, r) of `K U`, and every name's score (n,).
        """
        candidates = list(self.candidates)
        if len(self.vocabulary):
            candidates.append((self.paper, self.paper_ridge(span, values)))
        scores = [statistics.cosines(span, mu) for statistics, mu in candidates]
        best = max(range(len(scores)), key=lambda i: float(scores[i].max()))
        statistics, mu = candidates[best]
        return statistics.texts(span, mu), scores[best]
