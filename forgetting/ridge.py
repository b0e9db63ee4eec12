"""Which ridge: one number for a retain set, found from text alone.

A small ridge holds the listed names still and lets names that nobody listed move; a large one the
other way round. For every ridge on a grid, each of some texts in turn stands for what is forgotten:

- a listed name r is *pushed* by its share s(r) times the length of the forgotten embedding, in
  units of the distance from r's embedding to the nearest other of its group. In these units one
  limit serves unlike animals and alike cars;
- what names that are not listed would feel is told by the listed ones, each left out in turn
  (`forgetting.displacement`).

The ridge is the largest at which no safe group is pushed further than the limit, where a push
counts together with the least that there is, by the smallest ridge: names that any ridge pushes
leave less room. Only where names that are not listed would feel much of it, it is no smaller than
the least that is about as good for them as any.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from forgetting.displacement import shares_each
from forgetting.errors import ProblemError, number
from forgetting.io import mask, matrix
from forgetting.retain import RetainSet

RIDGES = [10 ** (step / 4) for step in range(-24, -3)]  # 1e-6 to 0.1, mean squared lengths
BLOCK = 2048  # names that are compared with all others at one time
SEEN = 1024  # names of a long group that are looked at, at most
LOOKED_AT = 128  # texts that stand for what is forgotten, at most
SLACK = 1.5  # times the push of the smallest ridge is accepted
MOST = 0.1  # push that SLACK may lead to
TOLERATED = 0.15  # share that names may feel which nobody listed
NEAR = 1.1  # times the least that they can feel is as good


@dataclass(frozen=True)
class _Diagonal:
    """`K_0` in the eigenbasis of G, where it is its eigenvalues (w,)."""

    values: Tensor

    @property
    def gram(self) -> Tensor:
        return self.values[:, None]

    def solve(self, rows: Tensor) -> Tensor:
        return rows / self.values


def best_ridge(
    retain: RetainSet,
    projection: Tensor,
    like: Tensor,
    leaving: Tensor,
    limit: float,
    bias: Tensor | None = None,
) -> float:
    """The ridge of a retain set, in mean squared lengths of a retained hidden state.

    It depends on the set and on what may be forgotten, not on a request, so requests compose.

    Args:
        projection: `W`, (w, d); like: (C, w), texts such as may be forgotten, at most 128 of which
            are looked at; leaving: (C, n) bool, the names that leave with each.
        limit: of the mean of the push and the least push, each a root mean square over the names of
            a group.
        bias: (d,), what the model adds to `h W`; None: nothing.

    Raises:
        ProblemError: tensors that do not fit, or a limit that is not positive.
    """
    number("limit", limit, above=0)
    number("the mean squared length of a retained text", retain.squared_length, above=0)
    like = matrix("like", like, retain.rows.shape[1])
    if not len(like):
        raise ProblemError("like is empty: the ridge is found from texts such as may be forgotten")
    leaving = mask("leaving", leaving, len(retain.names), len(like))
    every = max(1, -(-len(like) // LOOKED_AT))
    like, leaving = like[::every], leaving[::every].to(retain.rows.device)
    values, basis = torch.linalg.eigh(retain.gram)
    h, rows = like.to(basis) @ basis, retain.rows.to(basis) @ basis
    w = matrix("projection", projection, count=len(basis)).to(basis)
    embedded = like.to(basis) @ w
    if bias is not None:
        embedded = embedded + bias.to(embedded)
    pushed_by = embedded.norm(dim=1)[:, None] / distances(retain, w)  # (C, n)
    alone, moved = torch.arange(len(h)), h.new_ones(len(h), 1)  # shares depend on no target

    some = (_seen(retain).to(rows.device) | leaving.any(dim=0)).nonzero()[:, 0]
    place = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    place[some] = torch.arange(len(some), device=rows.device)
    known = rows[some], retain.shares[some], leaving[:, some], place[retain.twin[some]]

    @cache
    def look(step: int) -> tuple[float, float]:
        """The largest push of a safe group, and what names that are not listed feel."""
        diagonal = _Diagonal(values.clamp_min(0) + RIDGES[step] * retain.squared_length)
        found = shares_each(diagonal, h, moved, alone, *known)
        shares = [
            torch.full(leaving.shape, torch.nan, dtype=h.dtype, device=h.device) for _ in "ab"
        ]
        for whole, part in zip(shares, found, strict=True):
            whole[:, some] = part
        listed, unlisted = (part.masked_fill(leaving, torch.nan) for part in shares)
        push = retain.spread(listed * pushed_by)
        safe = [float(push[name][0].mean()) for name, group in retain.groups.items() if group.safe]
        felt = [float(rms.square().mean()) for rms, _ in retain.spread(unlisted).values()]
        return max(safe, default=0.0), (sum(felt) / len(felt)) ** 0.5

    last, least = len(RIDGES) - 1, look(0)[0]
    limit = max(2 * limit - least, min(SLACK * least, MOST))
    safe = next((i for i in range(last, 0, -1) if look(i)[0] <= limit), 0)
    if look(safe)[1] <= TOLERATED:
        return RIDGES[safe]
    felt = [look(i)[1] for i in range(last + 1)]
    enough = max(TOLERATED, NEAR * min(felt))
    return RIDGES[max(safe, next(i for i, feel in enumerate(felt) if feel <= enough))]


def _seen(retain: RetainSet) -> Tensor:
    """The names whose shares are looked at, (n,) bool: of a long group every so many."""
    parts = [torch.arange(0)]
    for group in retain.groups.values():
        wordings = 1 + group.twice
        count = len(group.names) // wordings
        parts.append((torch.arange(count) % max(1, -(-count // SEEN)) == 0).repeat(wordings))
    return torch.cat(parts).bool()


def distances(retain: RetainSet, projection: Tensor) -> Tensor:
    """From each retained name's embedding to the nearest other of its group, (n,); a quarter of
    the group's median at least, for names that repeat each other. A twin is no other name."""
    found, sizes = [], list(retain.counts.values())
    places = torch.arange(len(retain.names), device=projection.device)
    for rows, place, twin in zip(
        *(part.split(sizes) for part in (retain.rows.to(projection), places, retain.twin)),
        strict=True,
    ):
        embedded, parts = rows @ projection, []
        for block in torch.arange(len(rows), device=rows.device).split(BLOCK):
            between = torch.cdist(embedded[block], embedded)  # (b, m)
            between[block - block[0], block] = torch.inf
            between[block - block[0], twin[block] - place[0]] = torch.inf
            parts.append(between.amin(dim=1))
        nearest = torch.cat([embedded[:0, 0], *parts])
        nearest = torch.where(nearest.isfinite(), nearest, embedded.norm(dim=1))  # no other name
        found.append(nearest.clamp_min(max(float(nearest.median()) / 4, 1e-300)))
    return torch.cat(found)
