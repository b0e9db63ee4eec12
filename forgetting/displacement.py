"""What other texts will feel of a request, from text alone, before any image is seen.

A request moves the embedding of any text r by `r Delta = s D`, with the shares
`s = r K^-1 H_f^T (H_f K^-1 H_f^T)^-1` of the displacements `D`: 1 for the forgotten text itself,
0.6 to 0.95 for other words for it, near 0 for what is retained. Had a retained name not been on the
list, its share would have been larger (Sherman, Morrison and Woodbury, with c its weight in G; of a
name in two wordings r is (2, w), for both must go):

    s_without = (I - c (r K^-1 r^T - s (H_f K^-1 r^T)))^-1 s

so a list says itself what names *like those on it* would feel if nobody had thought of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.io import matrix
from forgetting.problem import LowRankEdit, pad_indices
from forgetting.solvers.constrained import (
    BATCH_NUMBERS,
    Ridge,
    downdate,
    pinv_psd,
    request_batches,
    woodbury_cholesky,
)

SHOWN = 5  # names that feel most
SHORTEST = 1e-300
GONE = 1e-5  # of its length: a text of which less is left points where rounding says


class AffectedName(NamedTuple):
    """A name whose text an edit moves.

    Attributes:
        displacement: how far its text moves, in units of the forgotten texts' displacement.
        cosine_loss: 1 minus the cosine between its text before and after.
        margin: 1 minus the cosine of its text with that of the nearest other name, before.
    """

    name: str
    displacement: float
    cosine_loss: float
    margin: float

    @property
    def likely_misclassified(self) -> bool:
        return self.cosine_loss > self.margin


class Margin(NamedTuple):
    """The margin and the gap of a forgotten text, see `Forecast`."""

    margin: float | None
    gap: float | None


def worst(marks: Sequence[Margin]) -> Margin:
    """That of the text which fares worst."""
    known = [mark for mark in marks if mark.margin is not None]
    return min(known, key=lambda mark: mark.margin - mark.gap, default=Margin(None, None))


@dataclass(frozen=True)
class Forecast:
    """What a change does, as far as text tells.

    Attributes:
        unlisted: group of retained names -> root mean square and largest share of names like
            them that nobody listed.
        affected: the names that lose most cosine, most first.
        gap: by how much of cosine the forgotten class's own text, as it was, lay nearer to itself
            than to any other class; margin: by how much another lies nearer to it now. Of several
            classes those of the one that fares worst.
    """

    unlisted: dict[str, tuple[float, float]]
    affected: list[AffectedName]
    margin: float | None
    gap: float | None


def shares_each(
    ridge: Ridge,
    hidden: Tensor,
    displacement: Tensor,
    owner: Tensor,
    rows: Tensor,
    shares: Tensor,
    leaving: Tensor,
    twin: Tensor,
    solved: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How far each of R requests moves each retained name, as listed and had it not been listed.

    Args:
        ridge .. leaving: as in `solve_constrained_each`.
        twin: (n,) int64, the other wording of each name, itself where there is none.
        solved: (n, w), `rows K_0^-1`, where they are known.

    Returns:
        Two (R, n) float64: `||s D||` in units of the root mean square of the rows of D, which for
        one text is `|s|`. Names that leave with a request count like texts that nobody listed.

    Raises:
        ProblemError: as in `solve_constrained_each`.
    """
    h = matrix("hidden", hidden, len(ridge.gram)).to(ridge.gram)
    d = matrix("displacement", displacement, count=len(h)).to(h)
    r = matrix("rows", rows, h.shape[1]).to(h)
    listed, unlisted = (h.new_zeros(len(leaving), len(r)) for _ in range(2))
    solved = ridge.solve(r) if solved is None else solved
    two = twin != torch.arange(len(r), device=twin.device)
    pairs = bool(two.any())
    alone, across = (solved * r).sum(dim=1), (solved * r[twin]).sum(dim=1)  # r K_0^-1 r^T, (n,)
    left_out = leaving.to(h.device) & (shares.to(h) > 0)
    for numbers, texts, base, gone in request_batches(ridge, h, owner, rows, shares, leaving):
        columns = downdate(h[texts], base, *gone)  # (B, k, w)
        a = columns @ r.T  # H_f K^-1 r^T, (B, k, n)
        s = pinv_psd(h[texts] @ columns.mT) @ a  # (B, k, n)
        own, cross = alone.expand(len(numbers), -1), across.expand(len(numbers), -1)
        if gone[0].shape[1]:
            # Many requests lose the same names: a product for each name, not for each request.
            few, which = pad_indices(left_out[numbers], shares)[0].unique(return_inverse=True)
            met = (solved[few] @ r.T)[which] * (gone[2] > 0)[..., None]  # (B, n', n)
            pulled = torch.linalg.solve_triangular(woodbury_cholesky(*gone), met, upper=False)
            own = own + pulled.square().sum(dim=1)  # (B, n)
            if pairs:
                cross = cross + (pulled * pulled[:, :, twin]).sum(dim=1)
        c = torch.where(leaving[numbers].to(h.device), 0.0, shares.to(h))  # (B, n)
        left = 1 - c * (own - (s * a).sum(dim=1))
        between = torch.where(two, -c * (cross - (s * a[:, :, twin]).sum(dim=1)), 0.0)
        others = torch.where(two, left[:, twin], 1.0)
        scale = (left * others - between.square()).clamp_min(SHORTEST)[:, None]
        without = (others[:, None] * s - between[:, None] * s[:, :, twin]) / scale  # (B, k, n)
        size = d[texts] @ d[texts].mT  # (B, k, k)
        unit = size.diagonal(dim1=1, dim2=2).mean(dim=1).sqrt()[:, None].clamp_min(SHORTEST)
        for target, part in ((listed, s), (unlisted, without)):
            target[numbers] = ((size @ part) * part).sum(dim=1).clamp_min(0).sqrt() / unit  # (B, n)
    return listed, unlisted


def follow(left: Tensor, right: Tensor, text: Tensor, wordings: Tensor) -> Tensor:
    """How far other wordings of a class follow its text, (n,): 1 is all the way, 0 not at all.

    Args:
        left (w, r), right (r, d): the change; text: (w,), by which the class was forgotten;
            wordings: (n, w), hidden states of others.
    """
    moved = ((torch.cat([text[None], wordings]).to(left)) @ left) @ right  # (1 + n, d)
    size = moved[0] @ moved[0]
    return torch.where(size > 0, (moved[1:] @ moved[0]) / size, 1.0)


@dataclass(frozen=True)
class Watch:
    """Texts that images are classified by, n of them.

    Attributes:
        names: their names; hidden: (n, w); projection: `W`, (w, d).
        rivals: how many of them, the first, images are classified among.
        bias: (d,), what the model adds to `h W`; None: nothing.
    """

    names: Sequence[str]
    hidden: Tensor
    projection: Tensor
    rivals: int
    bias: Tensor | None = None

    def embedded(self, hidden: Tensor, projection: Tensor) -> Tensor:
        """`h W + b`, (n, d), of hidden states (n, w)."""
        found = hidden @ projection
        return found if self.bias is None else found + self.bias.to(found)

    @cached_property
    def _double(self) -> tuple[Tensor, Tensor, Tensor]:
        """`hidden` (n, w), its embeddings (n, d) and their lengths (n,), float64."""
        hidden = self.hidden.double()
        before = self.embedded(hidden, self.projection.double())
        return hidden, before, before.norm(dim=1).clamp_min(SHORTEST)

    @cached_property
    def leads(self) -> Tensor:
        """How far the nearest other of these texts is, in cosine, (n,)."""
        before = normalize(self._double[1], dim=1)
        parts = [  # a block at a time: thousands of names
            (before[block] @ before.T).scatter_(1, block[:, None], -1.0).amax(dim=1)
            for block in torch.arange(len(before), device=before.device).split(1024)
        ]
        return 1 - torch.cat(parts)

    def each(
        self, changes: Sequence[LowRankEdit], forgotten: Sequence[Sequence[int]]
    ) -> list[tuple[list[AffectedName], list[Margin]]]:
        """For each change the names that lose most cosine, and of each text that it forgets the
        margin and the lead of `Forecast`: None where there is no other name, or nothing is left
        of the text.

        Args:
            forgotten: the texts (rows) of what each change forgets.
        """
        found: dict[int, tuple[list[AffectedName], list[Margin]]] = {}
        ranks = torch.tensor([change.left.shape[1] for change in changes])
        for rank in ranks.unique().tolist():
            size = max(1, BATCH_NUMBERS // (len(self.names) * rank))
            for block in (ranks == rank).nonzero()[:, 0].split(size):
                numbers = block.tolist()
                some = ([part[i] for i in numbers] for part in (changes, forgotten))
                found |= zip(numbers, self._block(*some), strict=True)
        return [found[number] for number in range(len(changes))]

    def _block(
        self, changes: Sequence[LowRankEdit], forgotten: Sequence[Sequence[int]]
    ) -> list[tuple[list[AffectedName], list[Margin]]]:
        """`each` of B changes of one rank k."""
        hidden, before, length = self._double
        left, right = (
            torch.stack([getattr(change, side) for change in changes]).to(before)
            for side in ("left", "right")
        )
        # A text ends at before + a right, so lengths and products need k numbers each.
        a = (hidden @ left.mT.flatten(0, 1).T).unflatten(1, left.shape[::2]).transpose(0, 1)
        b = (before @ right.flatten(0, 1).T).unflatten(1, left.shape[::2]).transpose(0, 1)
        moved = ((a @ (right @ right.mT)) * a).sum(dim=2).clamp_min(0).sqrt()  # (B, n)
        along = (a * b).sum(dim=2)
        after = (length**2 + 2 * along + moved**2).clamp_min(0).sqrt().clamp_min(SHORTEST)
        lost = 1 - (length + along / length) / after
        stays = torch.ones_like(lost, dtype=torch.bool)
        for stay, own in zip(stays, forgotten, strict=True):
            stay[list(own)] = False

        most = lost.masked_fill(~stays, -torch.inf).topk(min(SHOWN, lost.shape[1])).indices
        feel = [
            x.gather(1, most).tolist() for x in (moved, lost, self.leads.expand_as(lost), stays)
        ]
        units = [
            max(float(way[list(own)].mean()), SHORTEST) if own else 1.0
            for way, own in zip(moved, forgotten, strict=True)
        ]
        felt = [
            [
                AffectedName(self.names[i], way / unit, *rest)
                for i, way, *rest, stay in zip(*row, strict=True)
                if stay
            ]
            for unit, *row in zip(units, most.tolist(), *feel, strict=True)
        ]

        # The texts that are forgotten, P, each with the change that forgets it.
        own = [(change, row) for change, rows in enumerate(forgotten) for row in rows]
        which, rows = torch.tensor(own, dtype=torch.int64, device=lost.device).view(-1, 2).T
        near = slice(0, self.rivals)
        was = before[rows] @ before[near].T  # (P, n'), products
        now = (was + (a[which, near] @ b[which, rows, :, None])[..., 0]) / after[which, near]
        others = stays[which, near]

        def nearest(cosines: Tensor) -> Tensor:
            return cosines.masked_fill(~others, -torch.inf).amax(dim=1)  # (P,)

        leads = 1 - nearest(was / length[near]) / length[rows]
        margins = (nearest(now) - now[torch.arange(len(rows)), rows]) / length[rows]
        there = others.any(dim=1) & (after[which, rows] > GONE * length[rows])
        marks: list[list[Margin]] = [[] for _ in changes]
        for change, *mark, some in zip(
            *(x.tolist() for x in (which, margins, leads, there)), strict=True
        ):
            marks[change].append(Margin(*mark) if some else Margin(None, None))
        return list(zip(felt, marks, strict=True))
