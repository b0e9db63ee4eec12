"""What the frontier compares: settings of a run, and other ways to retain the same names.

A lever is a function from what a run retains, the texts that are forgotten (C, w) and the names
that leave with each (C, n) to another set of names. The ridge is found anew for what it returns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.retain import Retained
from experiments.alone import Lever
from forgetting import Group, RetainSet
from forgetting.forecast import shares_each

MOST = 4  # one in so many names weighs more
TIMES = 5.0  # than the others of its group
NEAREST = 100  # names of a vocabulary, as many as the paper's have
NODE = "TRAINER.FORGETEXACT."


def half(number: int) -> Lever:
    """Only the first wording of names that have two (their bare names), or only the second."""

    def lever(kept: Retained, like: Tensor, leaving: Tensor) -> RetainSet:
        groups = {}
        for name, group in kept.names.groups.items():
            if group.twice:
                size = len(group.names) // 2
                part = slice(number * size, (number + 1) * size)
                group = replace(group, names=group.names[part], rows=group.rows[part], twice=False)
            groups[name] = group
        return RetainSet(groups, kept.names.similarity)

    return lever


def felt(kept: Retained, like: Tensor, leaving: Tensor) -> tuple[Tensor, Tensor]:
    """How far a first solution moves each name, as listed and had it not been listed: (n,), root
    mean squares over the forgotten texts with which it does not leave."""
    names, moved = kept.names, torch.ones(len(like), 1)
    alone = torch.arange(len(like))
    both = shares_each(
        kept.ridge, like, moved, alone, names.rows, names.shares, leaving, names.twin
    )
    stays = [part.masked_fill(leaving, torch.nan).square() for part in both]
    listed, unlisted = (part.nanmean(dim=0).nan_to_num(0.0).sqrt() for part in stays)
    return listed, unlisted


def heavier(retain: RetainSet, score: Tensor) -> RetainSet:
    """The names of each group with the largest score (n,), one in MOST, weigh TIMES the others;
    the group weighs what it weighed. Both wordings of a name go together."""
    groups: dict[str, Group] = {}
    for (name, group), part in zip(
        retain.groups.items(), score.split(list(retain.counts.values())), strict=True
    ):
        wordings = 2 if group.twice else 1
        part = part.view(wordings, -1).amax(dim=0)
        most = torch.zeros(len(part), dtype=torch.bool)
        most[part.topk(-(-len(part) // MOST)).indices] = True
        total = float(most.sum()) * TIMES + float((~most).sum())
        for label, chosen, times in ((name, ~most, 1.0), (f"{name}, heavier", most, TIMES)):
            rows = chosen.repeat(wordings)
            groups[label] = replace(
                group,
                names=[group.names[i] for i in rows.nonzero()[:, 0].tolist()],
                rows=group.rows[rows],
                weight=group.weight * times * float(chosen.sum()) / total,
            )
    return RetainSet(groups, retain.similarity)


def by_influence(kept: Retained, like: Tensor, leaving: Tensor) -> RetainSet:
    """Names that a first solution moves most weigh more (as in SPEED)."""
    return heavier(kept.names, felt(kept, like, leaving)[0])


def by_leave_one_out(kept: Retained, like: Tensor, leaving: Tensor) -> RetainSet:
    """Names that would feel most, had they not been listed, weigh more."""
    return heavier(kept.names, felt(kept, like, leaving)[1])


def shrunk(part: float) -> Lever:
    """`(1 - part) G + part C`, C the covariance of the vocabulary at the trace of G."""

    def lever(kept: Retained, like: Tensor, leaving: Tensor) -> RetainSet:
        groups = {
            name: replace(group, weight=(1 - part) * group.weight)
            for name, group in kept.names.groups.items()
        }
        vocabulary = kept.names.groups["vocabulary"]
        rows = vocabulary.rows - vocabulary.rows.mean(dim=0)
        weight = part * float(kept.names.gram.trace()) / float(rows.square().sum(dim=1).mean())
        spread = Group(vocabulary.names, rows, weight, safe=False)
        return RetainSet(groups | {"covariance": spread}, kept.names.similarity)

    return lever


def parted(generic: float) -> Lever:
    """The NEAREST words to what is forgotten stand for a set's own vocabulary, the others for a
    generic one that takes over a part of its weight; 0: they are not retained."""

    def lever(kept: Retained, like: Tensor, leaving: Tensor) -> RetainSet:
        groups = dict(kept.names.groups)
        words = groups.pop("vocabulary")
        cosine = normalize(words.rows, dim=1) @ normalize(like, dim=1).T  # (n, C)
        near = torch.zeros(len(words.names), dtype=torch.bool)
        near[cosine.amax(dim=1).topk(min(NEAREST, len(near) // 2)).indices] = True
        for name, mask, part in (("vocabulary", near, 1 - generic), ("generic", ~near, generic)):
            if part > 0:
                names = [words.names[i] for i in mask.nonzero()[:, 0].tolist()]
                rows, weight = words.rows[mask], part * words.weight
                groups[name] = replace(words, names=names, rows=rows, weight=weight)
        return RetainSet(groups, kept.names.similarity)

    return lever


class Variant(NamedTuple):
    """A row of the frontier: its name, what it varies, KEY VALUE pairs of the run, a lever."""

    name: str
    kind: str
    opts: tuple[str, ...] = ()
    lever: Lever | None = None


def _pairs(**values: float | str) -> tuple[str, ...]:
    return tuple(text for key, value in values.items() for text in (NODE + key, str(value)))


def _fixed(target: str, beta: float) -> tuple[str, ...]:
    return "FORGET.TARGET", target, "FORGET.BETA", str(beta), *_pairs(MARGIN=0)


FIRST, NEW = "first default", "new default"
VARIANTS = [
    Variant(
        FIRST,
        "default",
        (*_fixed("specific", 0.1), *_pairs(VOCABULARY=0.01, MU=5e-6, FOLLOW=0)),
        half(0),
    ),
    Variant(NEW, "default"),
    *(Variant(f"vocabulary {v:g}", "weights", _pairs(VOCABULARY=v)) for v in (0.01, 0.1, 0.3, 1)),
    *(Variant(f"push {v:g}", "push", _pairs(PUSH=v)) for v in (0.02, 0.05, 0.1, 0.2)),
    *(Variant(f"specific, {b:g}", "target", _fixed("specific", b)) for b in (0, 0.1, 0.2)),
    *(Variant(f"opposite, {b:g}", "target", _fixed("opposite", b)) for b in (0, 0.2)),
    Variant("empty", "target", _fixed("empty", 0)),
    *(Variant(f"shared {v:g}", "target", _pairs(SHARED=v)) for v in (0.1, 2)),
    Variant("names only", "lever", (), half(0)),
    Variant("prompts only", "lever", (), half(1)),
    Variant("by influence", "lever", (), by_influence),
    Variant("by leave-one-out", "lever", (), by_leave_one_out),
    *(Variant(f"shrunk {v:g}", "lever", (), shrunk(v)) for v in (0.1, 0.3)),
    *(Variant(f"generic {v:g}", "lever", (), parted(v)) for v in (0, 0.25, 0.5, 0.75)),
    Variant("no wording joins", "lever", _pairs(FOLLOW=0)),
]
