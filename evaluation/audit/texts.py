"""Where a change of low rank sends texts, without embedding them anew.

A change `left right` moves the embedding e of a text h by `s right`, with s = h left; lengths and
products afterwards follow from s and `e right^T`, a few numbers a text. Many changes are asked for
at once, so that each is a few columns of one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from evaluation.zero_shot import CANCELS, Factors

BOXES = 64  # of texts, which a bound holds for


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts in the untouched model.

    Attributes:
        hidden: (T, w); embedded: (T, d), not normalised.
    """

    hidden: Tensor
    embedded: Tensor

    @cached_property
    def squares(self) -> Tensor:
        """Squared lengths of the embeddings, (T,); nothing is divided by zero."""
        return self.embedded.square().sum(dim=1).clamp_min(torch.finfo(self.embedded.dtype).tiny)

    @cached_property
    def lengths(self) -> Tensor:
        """Lengths of the embeddings, (T,)."""
        return self.embedded.norm(dim=1)

    def moved(self, changes: Sequence[Factors]) -> list[Moved]:
        """Where each of several changes sends the texts."""
        ranks = [len(right) for _, right in changes]
        lefts, rights = (torch.cat(parts, dim) for parts, dim in zip(zip(*changes), (1, 0)))
        shares = self.hidden @ lefts.to(self.hidden)  # (T, w) @ (w, sum of ranks)
        met = self.embedded @ rights.to(self.embedded).T  # (T, d) @ (d, sum of ranks)
        columns = zip(shares.split(ranks, dim=1), met.split(ranks, dim=1), strict=True)
        return [
            Moved(self, s.contiguous(), m.contiguous(), right.to(m))
            for (s, m), (_, right) in zip(columns, changes, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Moved:
    """Texts under one change.

    Attributes:
        texts: as they were; shares: s, (T, r), of the rows of right that each goes along; met:
            (T, r), their embeddings' products with these rows; right: (r, d).
    """

    texts: Texts
    shares: Tensor
    met: Tensor
    right: Tensor

    @cached_property
    def _along(self) -> Tensor:
        """Product of each text with its way, (T,)."""
        return (self.shares * self.met).sum(dim=1)

    @cached_property
    def _way(self) -> Tensor:
        """The square of each text's way, (T,)."""
        return ((self.shares @ (self.right @ self.right.T)) * self.shares).sum(dim=1).clamp_min(0)

    @cached_property
    def _growth(self) -> Tensor:
        """Squared length after over that before, (T,); rounding where it is small."""
        return 1 + (2 * self._along + self._way) / self.texts.squares

    @cached_property
    def shrunk(self) -> Tensor:
        """Rows (k,) of texts that keep so little of their length that they are embedded anew."""
        return (self._growth < CANCELS**2).nonzero()[:, 0]

    def embedded(self, rows: Tensor) -> Tensor:
        """Embeddings (k, d) of texts `rows` (k,), not normalised."""
        return self.texts.embedded[rows] + self.shares[rows] @ self.right

    @cached_property
    def lengths(self) -> Tensor:
        """Lengths of the embeddings, (T,)."""
        lengths = self.texts.lengths * self._growth.clamp_min(0).sqrt()
        lengths[self.shrunk] = self.embedded(self.shrunk).norm(dim=1)
        return lengths

    @cached_property
    def kept(self) -> Tensor:
        """Product of each text with itself as it was, (T,)."""
        return self.texts.squares + self._along

    @cached_property
    def reach(self) -> Tensor:
        """How long each text's way is beside the text afterwards, (T,); infinite for those that
        shrink much."""
        reach = self._way.sqrt() / self.lengths
        reach[self.shrunk] = torch.inf
        return reach

    def limit(self, cosines: Tensor, rows: Tensor, others: Tensor) -> Tensor:
        """What no cosine of texts `rows` (n,) with any of `others` (k,) exceeds, (n,).

        Args:
            cosines: (n,), what none of them exceeded before.
        """
        lengths = self.lengths[:, None]
        grown, a, b = self.texts.lengths[:, None] / lengths, self.shares / lengths, self._sent / lengths
        # cos' = grown_i grown_j cos + a_i b_j + b_i a_j: at most what the corners of boxes reach,
        # each of which holds others that go about as far.
        mine = torch.cat([grown[rows] * cosines[:, None], a[rows], b[rows]], dim=1)  # (n, 1 + 2 r)
        theirs = torch.cat([grown, b, a], dim=1)[others]
        size = max(1, -(-len(others) // BOXES))
        order = theirs[:, -1].argsort()
        order = torch.cat([order, order[-1:].expand(-len(order) % size)]).reshape(-1, size)
        low, high = theirs[order].aminmax(dim=1)  # (boxes, 1 + 2 r)
        return (mine.clamp_min(0) @ high.T + mine.clamp_max(0) @ low.T).amax(dim=1)

    @cached_property
    def _sent(self) -> Tensor:
        """Z = (E + S R / 2) R^T, (T, r): products change by S Z^T + Z S^T."""
        return self.met + self.shares @ (self.right @ self.right.T) / 2

    def pairs(self, before: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Products (b, k) of texts `rows` (b,) with the texts `columns` (b, k) of each.

        Args:
            before: (b, k), the same in the untouched model. Right for texts that do not shrink.
        """
        s, z = self.shares, self._sent
        change = s[rows][:, None] @ z[columns].mT + z[rows][:, None] @ s[columns].mT
        return before + change[:, 0]  # (b, 1, r) @ (b, r, k)

    def products(self, before: Tensor, rows: Tensor, columns: Tensor | slice) -> Tensor:
        """Products (b, c) of texts `rows` (b,) with texts `columns` (c,), or a slice of all.

        Args:
            before: (b, c), the same in the untouched model.
        """
        s, z = self.shares, self._sent
        ways = torch.cat([s[rows], z[rows]], dim=1), torch.cat([z[columns], s[columns]], dim=1)
        found = torch.addmm(before, ways[0], ways[1].T)
        if len(self.shrunk):
            low = torch.zeros(len(s), dtype=torch.bool)
            low[self.shrunk] = True
            found[low[rows]] = self._anew(rows[low[rows]], columns)
            few = low[columns].nonzero()[:, 0]
            found[:, few] = self._anew(torch.arange(len(s))[columns][few], rows).T
        return found

    def _anew(self, rows: Tensor, others: Tensor | slice) -> Tensor:
        """Products (m, n) of texts `rows` (m,), embedded anew, with texts `others` (n,)."""
        one = self.embedded(rows)
        return one @ self.texts.embedded[others].T + (one @ self.right.T) @ self.shares[others].T
