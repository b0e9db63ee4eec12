"""Which ridge: one number for a retain set, chosen from text alone.

A small ridge moves the listed names little and names that nobody listed far; a large one the other
way round. Some texts stand, one after the other, for what is forgotten. For every ridge of a grid

- a listed name moves by its displacement ratio times the length of the forgotten embedding, in
  units of the distance from its embedding to the nearest other of its group, so that one limit
  serves unlike animals and similar cars;
- how far unlisted names would move is estimated from the listed ones, each left out in turn
  (`forgetting.displacement.displacement_ratios`).

The largest ridge is taken at which the mean displacement of every group with
`limit_displacement`, averaged with that at the smallest ridge, stays below the limit. If unlisted
names would then move more than `TOLERATED`, the ridge is no smaller than the smallest one that is
within 10 % of the best for them.
"""

import torch
from torch import Tensor

from forgetting.displacement import SHORTEST, displacement_ratios
from forgetting.retain import RetainSet
from forgetting.solvers.constrained import Ridge

RIDGES = [10 ** (step / 4) for step in range(-24, -3)]  # 1e-6 to 0.1, in mean squared lengths
BLOCK = 2048  # names that are compared with all others of their group at once
MOST_NAMES = 1024  # names of a group that are looked at
MOST_TEXTS = 128  # texts that stand for what is forgotten
SLACK = 1.5  # times the displacement at the smallest ridge is accepted
MOST_SLACK = 0.1  # displacement that SLACK may lead to
TOLERATED = 0.15  # displacement ratio of unlisted names
NEAR_BEST = 1.1  # times the least ratio of unlisted names is as good


def choose_ridge(
    retain: RetainSet,
    projection: Tensor,
    likely: Tensor,
    excluded: Tensor,
    limit: float,
    bias: Tensor | None = None,
) -> float:
    """The ridge of a retain set, in mean squared lengths of a retained hidden state.

    It depends on the set and on what may be forgotten, not on a request, so that requests compose.

    Args:
        projection: `W`, (w, d); bias: `b`, (d,), or None.
        likely: (C, w), texts such as may be forgotten; excluded: (C, n) bool, the names that are
            excluded with each. At most `MOST_TEXTS` of them are looked at.
        limit: of the displacement, a root mean square over the names of a group.
    """
    every = max(1, -(-len(likely) // MOST_TEXTS))
    excluded = excluded[::every].to(retain.rows.device)
    w, texts = projection.to(retain.gram), likely[::every].to(retain.gram)
    embeddings = texts @ w
    lengths = (embeddings if bias is None else embeddings + bias.to(w)).norm(dim=1)  # (C,)

    some = (_sample(retain).to(excluded.device) | excluded.any(dim=0)).nonzero()[:, 0]
    position = torch.zeros(len(retain.names), dtype=torch.int64, device=some.device)
    position[some] = torch.arange(len(some), device=some.device)  # of the names looked at
    names = retain.rows[some], retain.name_weights[some], retain.root
    variant_of = position[retain.variant_of[some]]
    of_texts = texts, texts.new_ones(len(texts), 1), torch.arange(len(texts)), excluded[:, some]

    def ratios(ridge: float, variant_of: Tensor | None = None) -> Tensor:
        """(C, n); NaN of names that are excluded or not looked at."""
        of_names = Ridge(names[0], ridge * retain.squared_length, *names[1:])
        values = torch.full_like(excluded, torch.nan, dtype=torch.float64)
        values[:, some] = displacement_ratios(of_names, *of_texts, variant_of)
        return values.masked_fill(excluded, torch.nan)

    units = lengths[:, None] / _nearest_distances(retain, w, some)  # (C, n)
    limited = [name for name, group in retain.groups.items() if group.limit_displacement]

    def displacement(ridge: float) -> float:
        """That of the group that moves most of those that are limited."""
        groups = retain.rms_and_max(ratios(ridge) * units)
        return max((float(groups[name][0].mean()) for name in limited), default=0.0)

    def unlisted(ridge: float) -> float:
        groups = retain.rms_and_max(ratios(ridge, variant_of)).values()
        return (sum(float(rms.square().mean()) for rms, _ in groups) / len(groups)) ** 0.5

    displacements = [displacement(ridge) for ridge in RIDGES]
    least = displacements[0]
    limit = max(2 * limit - least, min(SLACK * least, MOST_SLACK))
    largest = max((i for i, moved in enumerate(displacements) if moved <= limit), default=0)
    if unlisted(RIDGES[largest]) <= TOLERATED:
        return RIDGES[largest]
    estimates = [unlisted(ridge) for ridge in RIDGES]
    good = max(TOLERATED, NEAR_BEST * min(estimates))
    smallest = next(i for i, estimate in enumerate(estimates) if estimate <= good)
    return RIDGES[max(largest, smallest)]


def _sample(retain: RetainSet) -> Tensor:
    """The names that are looked at, (n,) bool: of a long group evenly spaced ones."""
    parts = [torch.arange(0)]
    for group in retain.groups.values():
        prompts = 1 + group.prompt_variants
        count = len(group.names) // prompts
        parts.append((torch.arange(count) % max(1, -(-count // MOST_NAMES)) == 0).repeat(prompts))
    return torch.cat(parts).bool()


def _nearest_distances(retain: RetainSet, projection: Tensor, some: Tensor) -> Tensor:
    """From the embeddings of some names, in groups with `limit_displacement`, to the nearest other
    name of their group, (n,); NaN of all others. It is at least a quarter of the group's median,
    for names that repeat each other. The same name in its other prompt is no other name."""
    distances = projection.new_full((len(retain.names),), torch.nan)
    start = 0
    for group in retain.groups.values():
        stop = start + len(group.names)
        mine = some[(some >= start) & (some < stop)]
        if group.limit_displacement and len(mine):
            embeddings = group.rows.to(projection) @ projection
            for block in mine.split(BLOCK):
                between = torch.cdist(embeddings[block - start], embeddings)  # (b, m)
                between.scatter_(1, (block - start)[:, None], torch.inf)
                between.scatter_(1, (retain.variant_of[block] - start)[:, None], torch.inf)
                distances[block] = between.amin(dim=1)
            lengths = embeddings[mine - start].norm(dim=1)
            nearest = distances[mine]
            nearest = torch.where(nearest.isfinite(), nearest, lengths)  # there is no other name
            distances[mine] = nearest.clamp_min(max(float(nearest.median()) / 4, SHORTEST))
        start = stop
    return distances
