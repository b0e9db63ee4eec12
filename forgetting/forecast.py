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

from forgetting.checks import matrix
from forgetting.constrained import Ridge, downdate, inner_root, inverse, requests
from forgetting.problem import Change

SHOWN = 5  # names that feel most
SHORTEST = 1e-300


class Felt(NamedTuple):
    """A name that a change moves.

    Attributes:
        share: the part of the forgotten text's way that its text goes.
        lost: by how much the cosine between its text before and after is less than 1; lead: by how
            much that with the nearest other name was. A name that loses more than its lead is
            likely to fall with the class.
    """

    name: str
    share: float
    lost: float
    lead: float

    @property
    def falls(self) -> bool:
        return self.lost > self.lead


@dataclass(frozen=True)
class Forecast:
    """What a change does, as far as text tells.

    Attributes:
        unlisted: group of retained names -> root mean square and largest share of names like
            them that nobody listed.
        felt: the names that lose most cosine, most first.
        lead: by how much of cosine the forgotten class's own text, as it was, lay nearer to itself
            than to any other class; margin: by how much another lies nearer to it now. Of several
            classes those of the one that fares worst.
    """

    unlisted: dict[str, tuple[float, float]]
    felt: list[Felt]
    lead: float | None
    margin: float | None


def shares_each(
    ridge: Ridge,
    hidden: Tensor,
    displacement: Tensor,
    owner: Tensor,
    rows: Tensor,
    shares: Tensor,
    leaving: Tensor,
    twin: Tensor,
) -> tuple[Tensor, Tensor]:
    """How far each of R requests moves each retained name, as listed and had it not been listed.

    Args:
        ridge .. leaving: as in `solve_constrained_each`.
        twin: (n,) int64, the other wording of each name, itself where there is none.

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
    solved, two = ridge.solve(r), twin != torch.arange(len(r), device=twin.device)
    alone, across = (solved * r).sum(dim=1), (solved * r[twin]).sum(dim=1)  # r K_0^-1 r^T, (n,)
    for numbers, texts, base, gone in requests(ridge, h, owner, rows, shares, leaving):
        columns = downdate(h[texts], base, *gone)  # (B, k, w)
        a = columns @ r.T  # H_f K^-1 r^T, (B, k, n)
        s = inverse(h[texts] @ columns.mT) @ a  # (B, k, n)
        own, cross = alone.expand(len(numbers), -1), across.expand(len(numbers), -1)
        if gone[0].shape[1]:
            pulled = torch.linalg.solve_triangular(inner_root(*gone), gone[1] @ r.T, upper=False)
            own = own + pulled.square().sum(dim=1)  # (B, n)
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
    def leads(self) -> Tensor:
        """How far the nearest other of these texts is, in cosine, (n,)."""
        before = self.embedded(self.hidden.double(), self.projection.double())
        before = normalize(before, dim=1)
        parts = [  # a block at a time: thousands of names
            (before[block] @ before.T).scatter_(1, block[:, None], -1.0).amax(dim=1)
            for block in torch.arange(len(before), device=before.device).split(1024)
        ]
        return 1 - torch.cat(parts)

    def each(
        self, changes: Sequence[Change], forgotten: Sequence[Sequence[int]]
    ) -> list[tuple[list[Felt], float | None, float | None]]:
        """For each change the names that lose most cosine, and the margin and the lead of
        `Forecast`.

        Args:
            forgotten: the texts (rows) of what each change forgets.
        """
        like = changes[0].left
        hidden, w = self.hidden.to(like), self.projection.to(like)
        before = self.embedded(hidden, w)  # (n, d)
        length = before.norm(dim=1).clamp_min(SHORTEST)
        sizes = [change.left.shape[1] for change in changes]
        ways = (hidden @ torch.cat([change.left for change in changes], dim=1)).split(sizes, dim=1)
        rights = torch.cat([change.right for change in changes])
        meets = (before @ rights.T).split(sizes, dim=1)  # (n, k) each
        found = []
        for change, own, a, b in zip(changes, forgotten, ways, meets, strict=True):
            # Of rank k: before + a right, so lengths and products need k numbers for each text.
            size = change.right @ change.right.T  # (k, k)
            moved = ((a @ size) * a).sum(dim=1).clamp_min(0).sqrt()  # (n,)
            along = (a * b).sum(dim=1)
            after = (length**2 + 2 * along + moved**2).clamp_min(0).sqrt().clamp_min(SHORTEST)
            lost = 1 - (length + along / length) / after
            stays = torch.ones(len(before), dtype=torch.bool, device=like.device)
            stays[list(own)] = False
            most = lost.masked_fill(~stays, -torch.inf).topk(min(SHOWN, int(stays.sum()))).indices
            share = moved / moved[list(own)].mean() if own else moved
            felt = [
                Felt(self.names[i], *(float(x[i]) for x in (share, lost, self.leads)))
                for i in most.tolist()
            ]
            margins: list[tuple[float, float]] = []
            near = slice(0, self.rivals)
            for row in own:
                cosines = (before[near] @ before[row] + a[near] @ b[row]) / after[near]
                others = cosines[stays[near]] / length[row]
                if len(others):
                    was = before[near] @ before[row] / length[near] / length[row]
                    lead = 1 - float(was[stays[near]].max())
                    margins.append((float(others.max() - cosines[row] / length[row]), lead))
            ahead = min(margins, key=lambda pair: pair[0] - pair[1], default=(None, None))
            found.append((felt, *ahead))
        return found
