"""Who else feels it: the classes nearest to the forgotten one, and all texts that should stay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import datasets
from evaluation.audit.case import Case, Common
from evaluation.audit.interval import mean_value
from evaluation.audit.order import highest
from evaluation.audit.texts import Moved, Texts

NEAREST = 10  # classes listed, and texts compared for the overlap
WORST = 10  # texts listed
BLOCK = 256  # rows of a similarity matrix at once: 10,000 texts then need 10 MB for each
WATCHED = 1000  # texts whose neighbours are compared: a sample where there are more
NEAR = 128  # texts nearest to each that are looked at first
FAR = 64  # texts that go farthest, which may come near any other
TIE = 1e-6  # cosines closer than float32 rounding are one place
SURE = 1e-5  # a cosine that is larger by that is larger, whatever was rounded


def measure(case: Case) -> dict[str, Any]:
    """Accuracy of the nearest retained classes, and how far all retained texts moved.

    A retained text is the evaluation prompt of a class that is not forgotten, a name of the
    vocabulary, or the evaluation prompt of a class of another set; a name that equals a forgotten
    class or is marked as its synonym is none. Texts are listed by their names.

    Returns:
        classes: the at most ten retained classes of highest cosine to the class in the untouched
            model, nearest first; mean_before, mean_after: over those that have images.
        moved: count of texts; mean_cosine between a text's embeddings before and after;
            nearest_kept: share of texts whose nearest text, among the others, is still nearest
            (ties count as kept); top10_overlap: share of a text's ten nearest (all, if there are
            fewer) that still are (both over at most 1,000 texts, drawn once for the set); worst:
            the ten texts of lowest cosine, and the place that their former nearest text has now, 1
            for still nearest.
        not_measured: what could not be measured, and why.
    """
    columns = nearest_classes(case)
    similarities = case.before.classes[columns] @ case.before.classes[case.label]  # (n, d) @ (d,)
    classes = [
        {
            "name": case.bundle.classnames[column],
            "similarity": similarity,
            **case.sides(lambda model, column=column: model.accuracy(column)),
        }
        for column, similarity in zip(columns, similarities.tolist(), strict=True)
    ]
    bare = [entry["name"] for entry in classes if entry["before"]["n"] == 0]
    missing = [f"neighbours: no image of {', '.join(bare)}"] if bare else []
    if not classes:
        missing.append("neighbours: no class is retained")
    stay = retained_texts(case)
    if stay.sum() < 2:
        missing.append(f"moved texts: {int(stay.sum())} of at least 2 retained texts")
    return {
        "classes": classes,
        "mean_before": mean_value([entry["before"] for entry in classes]),
        "mean_after": mean_value([entry["after"] for entry in classes]),
        "moved": case.together(_moved_of),
        "not_measured": missing,
    }


@dataclass(frozen=True)
class Names:
    """What the texts of a set are called, see `Common.texts`.

    Attributes:
        names, groups: as they are spelled, and "class", "vocabulary" or a data set.
        rows: key of a name -> its rows; of the classes of the set, which have the first ones, none.
    """

    names: list[str]
    groups: list[str]
    rows: dict[str, list[int]]


def names_of(common: Common) -> Names:
    """The names of a set's texts."""
    bundle = common.bundle
    parts = [("class", bundle.classnames), ("vocabulary", bundle.retain_names)]
    parts += [(name, other.classnames) for name, other in common.others.items()]
    names = [name for _, part in parts for name in part]
    rows = defaultdict(list)
    for row, name in list(enumerate(names))[len(bundle.classnames) :]:
        rows[datasets.key(name)].append(row)
    return Names(names, [group for group, part in parts for _ in part], rows)


@dataclass(frozen=True)
class Watch:
    """The texts whose neighbours are compared, in the untouched model.

    Attributes:
        texts: all T of them; names: what they are called.
        rows: (W,), the watched ones; cosines: (W, T) with all; columns: (T, W), the same.
        near: (W, n), the nearest other texts of each, nearest first; those: (W, n), their cosines.
    """

    texts: Texts
    names: Names
    rows: Tensor
    cosines: Tensor
    columns: Tensor
    near: Tensor
    those: Tensor


def watch(common: Common) -> Watch:
    """The watched texts of a set, before any is left out."""
    texts = common.texts
    count = len(texts.hidden)
    rows = torch.arange(count)
    if count > WATCHED:
        rows = torch.randperm(count, generator=common.generator("watched"))[:WATCHED].sort().values
    return watching(texts, common.once(names_of), rows)


def watching(texts: Texts, names: Names, rows: Tensor) -> Watch:
    """`Watch` of the texts `rows` (W,)."""
    count = len(texts.hidden)
    cosines = _cosines(texts, rows)  # (W, T)
    everything = torch.ones(count, dtype=torch.bool)
    those, near = _others(cosines.clone(), rows, everything).topk(min(NEAR, count - 1))
    return Watch(texts, names, rows, cosines, cosines.T.contiguous(), near, those)


def nearest_classes(case: Case) -> list[int]:
    """Columns of the at most ten retained classes nearest to the class by the cosine of their
    evaluation prompts in the untouched model, nearest first."""
    near = case.common.once(_nearest_classes)[case.label]
    near = near[case.retained[near]][:NEAREST]
    count = min(NEAREST, int(case.retained.sum()))
    if len(near) < count:  # many of them are forgotten together
        cosines = case.before.classes @ case.before.classes[case.label]  # (C, d) @ (d,)
        near = cosines.masked_fill(~case.retained, -torch.inf).topk(count).indices
    return near.tolist()


def _nearest_classes(common: Common) -> Tensor:
    """The nearest other classes of each, twice as many as are listed, (C, n), nearest first."""
    classes = common.before.classes
    found = []
    for rows in torch.arange(len(classes)).split(BLOCK):
        cosines = classes[rows] @ classes.T  # (b, d) @ (d, C)
        cosines[rows - rows[0], rows] = -torch.inf
        found.append(cosines.topk(min(2 * NEAREST, len(classes) - 1)).indices)
    return torch.cat(found)


def retained_texts(case: Case) -> Tensor:
    """Which of the texts should stay as they are, (T,) bool."""
    names = case.common.once(names_of)
    stay = torch.ones(len(names.names), dtype=torch.bool)
    stay[: len(case.retained)] = case.retained
    for key in datasets.same_meaning(case.forgotten, case.bundle.dataset):
        stay[names.rows.get(key, [])] = False
    return stay


def _moved_of(cases: list[Case]) -> list[dict[str, Any]]:
    """The entry "moved" of each case."""
    stays, moves = [retained_texts(case) for case in cases], [case.after.moved for case in cases]
    return _moved(cases[0].common.once(watch), stays, moves)


def _moved(watch: Watch, stays: Sequence[Tensor], moves: Sequence[Moved]) -> list[dict[str, Any]]:
    """The entry "moved" of the texts that stay (T,) under a change, for each of several."""
    counts = [int(stay.sum()) for stay in stays]
    worst = [
        highest(-moved.kept.masked_fill(~stay, torch.inf), min(WORST, count))
        for stay, moved, count in zip(stays, moves, counts, strict=True)
    ]
    rows, places = torch.cat(worst).unique(return_inverse=True)
    before = _cosines(watch.texts, rows)  # (m, T)
    own = places.split([len(each) for each in worst])
    return [_entry(watch, *each, before) for each in zip(stays, moves, worst, own, strict=True)]


def _entry(
    watch: Watch, stay: Tensor, moved: Moved, worst: Tensor, own: Tensor, before: Tensor
) -> dict[str, Any]:
    """The entry of one change; its worst texts (n,) have the rows `own` (n,) of `before` (m, T)."""
    count, names = int(stay.sum()), watch.names
    if count < 2:
        nothing = dict.fromkeys(("mean_cosine", "nearest_kept", "top10_overlap"))
        return {"count": count, **nothing, "worst": []}
    kept, overlap = _neighbourhoods(watch, stay, moved)
    was = before[own]  # (n, T)
    now = _others(moved.cosines(was, worst, slice(None)), worst, stay)
    nearest = _others(was, worst, stay).argmax(dim=1)
    rank = 1 + (now > now.gather(1, nearest[:, None]) + TIE).sum(dim=1)
    return {
        "count": count,
        "mean_cosine": float(moved.kept[stay].double().mean()),
        "nearest_kept": float(kept.double().mean()),
        "top10_overlap": float(overlap.mean()),
        "worst": [
            {
                "text": names.names[row],
                "group": names.groups[row],
                "cosine": turn,
                "nearest_before": names.names[neighbour],
                "rank_after": place,
            }
            for row, turn, neighbour, place in zip(
                *(x.tolist() for x in (worst, moved.kept[worst], nearest, rank)), strict=True
            )
        ],
    }


def _neighbourhoods(watch: Watch, stay: Tensor, moved: Moved) -> tuple[Tensor, Tensor]:
    """For each watched text that stays: whether its nearest other text before is the nearest after,
    and the share of its ten nearest before that are among its ten nearest after; (n,) each.

    The nearest after are among those that were near and those that go farthest, if these are found
    nearer than any other can have come; all texts are looked at only where they are not.

    Args:
        stay: (T,) bool, the texts that count.
    """
    k = min(NEAREST, int(stay.sum()) - 1)
    rows, near, those = watch.rows, watch.near, watch.those  # (W,), (W, m) twice
    far = highest(moved.reach.masked_fill(~stay, -torch.inf), min(FAR, int(stay.sum())))  # (f,)
    counts = stay.clone()
    counts[far] = False
    close = moved.pairs(those, rows, near).masked_fill_(~counts[near], -torch.inf)
    come = moved.cosines(watch.columns[far].T, rows, far)
    come.masked_fill_(far == rows[:, None], -torch.inf)
    cosines, places = torch.cat([close, come], dim=1).topk(k)
    now = torch.cat([near, far.expand(len(rows), -1)], dim=1).gather(1, places)  # (W, k)

    old = near[:, :k].clone()
    lost = ~stay[old].all(dim=1)  # a neighbour left: another one takes its place
    order = (~stay[near[lost]]).byte().argsort(dim=1, stable=True)[:, :k]
    old[lost] = near[lost].gather(1, order)
    sure, others = stay[old].all(dim=1), counts.nonzero()[:, 0]
    if near.shape[1] < len(stay) - 1 and len(others):
        sure &= cosines[:, -1] > moved.limit(those[:, -1], rows, others) + SURE
    # What shrinks is looked at anew, and only in whole rows or as what goes far.
    small = moved.reach.isinf()
    sure &= ~(small[rows] | small[old[:, 0]] | small[others].any())
    first = moved.pairs(watch.cosines.gather(1, old[:, :1]), rows, old[:, :1])
    asked = stay[rows]
    for some in (asked & ~sure).nonzero()[:, 0].split(BLOCK):
        was = watch.cosines[some]  # (b, T)
        new = _others(moved.cosines(was, rows[some], slice(None)), rows[some], stay)
        cosines[some], now[some] = new.topk(k)
        left = ~stay[old[some]].all(dim=1)
        old[some[left]] = _others(was[left], rows[some[left]], stay).topk(k).indices
        first[some] = new.gather(1, old[some][:, :1])
    both = (old[:, :, None] == now[:, None, :]).any(dim=2)[asked]  # (W, k, k) -> (n, k)
    return (cosines[:, 0] <= first[:, 0] + TIE)[asked], both.double().mean(dim=1)


def _cosines(texts: Texts, rows: Tensor) -> Tensor:
    """Cosines (b, T) of texts `rows` (b,) with all, in the untouched model."""
    found = texts.embedded[rows] @ texts.embedded.T  # (b, d) @ (d, T)
    return found.div_(texts.lengths).div_(texts.lengths[rows, None])


def _others(cosines: Tensor, rows: Tensor, stay: Tensor) -> Tensor:
    """Cosines (b, T) of texts `rows` (b,) in place, -inf with those that do not stay, and with the
    text itself, which is not its neighbour."""
    cosines[:, ~stay] = -torch.inf
    cosines[torch.arange(len(rows)), rows] = -torch.inf
    return cosines
