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

from evaluation.zero_shot import Factors

CANCELS = 0.1  # below this part of its length a text is embedded anew
SHORTEST = 1e-12  # length of a text: nothing is divided by less
AT_ONCE = 2**22  # numbers that are gathered
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
        """Squared lengths of the embeddings, (T,)."""
        return self.embedded.square().sum(dim=1).clamp_min(SHORTEST**2)

    @cached_property
    def lengths(self) -> Tensor:
        """Lengths of the embeddings, (T,)."""
        return self.embedded.norm(dim=1).clamp_min(SHORTEST)

    def moved(self, changes: Sequence[Factors]) -> list[Moved]:
        """Where each of several changes sends the texts."""
        ranks = [len(right) for _, right in changes]
        lefts = torch.cat([left for left, _ in changes], dim=1).to(self.hidden)
        rights = torch.cat([right for _, right in changes]).to(self.hidden)
        shares = self.hidden @ lefts  # (T, w) @ (w, sum of ranks)
        met = self.embedded @ rights.T  # (T, d) @ (d, sum of ranks)
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
        return lengths.clamp_min(SHORTEST)

    @cached_property
    def kept(self) -> Tensor:
        """Cosine of each text with itself as it was, (T,)."""
        products = self.texts.squares + self._along
        return (products / self.texts.lengths / self.lengths).clamp(-1, 1)

    @cached_property
    def reach(self) -> Tensor:
        """How long each text's way is beside the text afterwards, (T,); infinite for those that
        shrink much."""
        reach = self._way.sqrt() / self.lengths
        reach[self.shrunk] = torch.inf
        return reach

    @cached_property
    def _parts(self) -> Tensor:
        """What cosines change by, (T, 1 + 2 r): of texts i and j they are afterwards
        `g_i g_j cos + b_i a_j + a_i b_j`, with g the length before over that after, a the shares S
        and b the rows of Z = (E + S R / 2) R^T over the length after."""
        lengths = self.lengths[:, None]
        sent = self.met + self.shares @ (self.right @ self.right.T) / 2
        return torch.cat([self.texts.lengths[:, None], sent, self.shares], dim=1) / lengths

    def _against(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What `_parts` of others are multiplied with for texts `rows` (n,): the factor of the
        cosines (n, 1), and the others (n, 2 r)."""
        grown, b, a = self._parts[rows].split([1, len(self.right), len(self.right)], dim=1)
        return grown, torch.cat([a, b], dim=1)

    def pairs(self, before: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Cosines (n, k) of texts `rows` (n,) with the texts `columns` (n, k) of each.

        Args:
            before: (n, k), the same in the untouched model. Right for texts that do not shrink.
        """
        size = max(1, AT_ONCE // max(1, columns.shape[1] * self._parts.shape[1]))
        found = []
        for some in torch.arange(len(rows)).split(size):
            few = columns[some]
            parts = self._parts.index_select(0, few.flatten()).view(*few.shape, -1)
            grown, mine = self._against(rows[some])
            of = before[some] * parts[..., 0] * grown
            found.append(of.add_((parts[..., 1:] @ mine[:, :, None])[..., 0]))  # (n, k, 2 r) @ ...
        return torch.cat([before[:0], *found])

    def cosines(self, before: Tensor, rows: Tensor, columns: Tensor | slice) -> Tensor:
        """Cosines (n, c) of texts `rows` (n,) with texts `columns` (c,), or a slice of all.

        Args:
            before: (n, c), the same in the untouched model.
        """
        parts = self._parts[columns]
        grown, mine = self._against(rows)
        found = torch.addmm((before * parts[:, 0]).mul_(grown), mine, parts[:, 1:].T)
        if len(self.shrunk):
            low = torch.zeros(len(self.shares), dtype=torch.bool)
            low[self.shrunk] = True
            found[low[rows]] = self._anew(rows[low[rows]], columns)
            few = low[columns].nonzero()[:, 0]
            found[:, few] = self._anew(torch.arange(len(low))[columns][few], rows).T
        return found

    def _anew(self, rows: Tensor, others: Tensor | slice) -> Tensor:
        """Cosines (n, c) of texts `rows` (n,), embedded anew, with texts `others` (c,)."""
        one = self.embedded(rows) / self.lengths[rows, None]
        products = one @ self.texts.embedded[others].T
        return (
            torch.addmm(products, one @ self.right.T, self.shares[others].T) / self.lengths[others]
        )

    def limit(self, cosines: Tensor, rows: Tensor, others: Tensor) -> Tensor:
        """What no cosine of texts `rows` (n,) with any of `others` (k,) exceeds, (n,).

        Args:
            cosines: (n,), what none of them exceeded before.
        """
        # At most what the corners of boxes reach, each of which holds others that go about as far.
        parts, size = self._parts[others], max(1, -(-len(others) // BOXES))
        order = parts[:, -1].argsort()
        order = torch.cat([order, order[-1:].expand(-len(order) % size)]).reshape(-1, size)
        low, high = parts[order].aminmax(dim=1)  # (boxes, 1 + 2 r)
        grown, mine = self._against(rows)
        mine = torch.cat([grown * cosines[:, None], mine], dim=1)  # (n, 1 + 2 r)
        return (mine.clamp_min(0) @ high.T + mine.clamp_max(0) @ low.T).amax(dim=1)
