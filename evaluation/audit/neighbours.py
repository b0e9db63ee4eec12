"""Which other texts change: the classes nearest to the forgotten one, and all that should stay."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import datasets
from evaluation.audit.case import AuditData, Case
from evaluation.audit.statistics import highest, mean_value
from evaluation.zero_shot import EditedTexts

NEAREST = 10  # classes listed, and texts compared for the overlap
WORST = 10  # texts listed
BLOCK = 256  # rows of a similarity matrix at once
SAMPLE = 1000  # texts whose neighbours are compared: a sample where there are more
TIE = 1e-6  # hidden states are float32: cosines closer than this are equal


def measure(case: Case) -> dict[str, Any]:
    """Accuracy of the nearest retained classes, and how far all retained texts moved.

    A retained text is the evaluation prompt of a class that is not forgotten, a name of the
    vocabulary, or the evaluation prompt of a class of another set, unless its name equals a
    forgotten class or is marked as its synonym. Texts are listed by their names.

    Returns:
        classes: the at most ten retained classes of highest cosine to the class in the untouched
            model, nearest first; mean_before, mean_after: over those that have images.
        moved: count of texts; mean_cosine between a text's embeddings before and after;
            nearest_kept: share of texts whose nearest text, among the others, is still nearest
            (ties count as kept); top10_overlap: share of a text's ten nearest (all, if there are
            fewer) that still are (both over at most 1,000 texts, drawn once for the set); worst:
            the ten texts of lowest cosine, and the rank that their former nearest text has now, 1
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
        "moved": _moved(case, stay),
        "not_measured": missing,
    }


@dataclass(frozen=True)
class TextNames:
    """The names of a set's T texts, see `AuditData.texts`.

    Attributes:
        names, groups: as they are spelled, and "class", "vocabulary" or a data set.
        rows: key of a name -> its rows, except those of the set's own classes, which come first.
    """

    names: list[str]
    groups: list[str]
    rows: dict[str, list[int]]


def text_names(data: AuditData) -> TextNames:
    """The names of a set's texts."""
    bundle = data.bundle
    parts = [("class", bundle.classnames), ("vocabulary", bundle.retain_names)]
    parts += [(name, other.classnames) for name, other in data.others.items()]
    names = [name for _, part in parts for name in part]
    rows = defaultdict(list)
    for row, name in list(enumerate(names))[len(bundle.classnames) :]:
        rows[datasets.key(name)].append(row)
    return TextNames(names, [group for group, part in parts for _ in part], rows)


def nearest_classes(case: Case) -> list[int]:
    """Columns of the at most ten retained classes nearest to the class by the cosine of their
    evaluation prompts in the untouched model, nearest first."""
    cosines = case.before.classes @ case.before.classes[case.label]  # (C, d) @ (d,)
    cosines[~case.retained] = -torch.inf
    return highest(cosines, min(NEAREST, int(case.retained.sum()))).tolist()


def retained_texts(case: Case) -> Tensor:
    """Which of the texts should stay as they are, (T,) bool."""
    known = case.data.once(text_names)
    stay = torch.ones(len(known.names), dtype=torch.bool)
    stay[: len(case.retained)] = case.retained
    for key in datasets.same_meaning(case.forgotten, case.bundle.dataset):
        stay[known.rows.get(key, [])] = False
    return stay


@dataclass(frozen=True)
class Sample:
    """The texts whose neighbours are compared, in the untouched model.

    Attributes:
        rows: (W,) of `AuditData.texts`; products: (W, T) of their embeddings with all;
        cosines: (W, T).
    """

    rows: Tensor
    products: Tensor
    cosines: Tensor


def sample_of(data: AuditData) -> Sample:
    """At most `SAMPLE` texts, drawn once for the set."""
    count = len(data.texts.hidden)
    rows = torch.arange(count)
    if count > SAMPLE:
        rows = torch.randperm(count, generator=data.generator("watched"))[:SAMPLE].sort().values
    products = data.texts.embeddings[rows] @ data.texts.embeddings.T  # (W, d) @ (d, T)
    return Sample(rows, products, data.before.texts.cosines(products, rows))


def _moved(case: Case, stay: Tensor) -> dict[str, Any]:
    """The entry "moved" of the texts that stay (T,)."""
    count = int(stay.sum())
    if count < 2:
        nothing = dict.fromkeys(("mean_cosine", "nearest_kept", "top10_overlap"))
        return {"count": count, **nothing, "worst": []}
    before, after = case.before.texts, case.after.texts
    kept, overlap = neighbours_kept(case.data.once(sample_of), after, stay)
    cosines = after.cosines_with_before.clamp(-1, 1)  # (T,)
    worst = highest(-cosines.masked_fill(~stay, torch.inf), min(WORST, count))
    products = case.data.texts.embeddings[worst] @ case.data.texts.embeddings.T  # (10, T)
    was = _with_others(before.cosines(products, worst), worst, stay)
    now = _with_others(after.cosines(products, worst), worst, stay)
    nearest = was.argmax(dim=1)
    rank = 1 + (now > now.gather(1, nearest[:, None]) + TIE).sum(dim=1)
    known = case.data.once(text_names)
    return {
        "count": count,
        "mean_cosine": float(cosines[stay].mean()),
        "nearest_kept": float(kept.double().mean()),
        "top10_overlap": float(overlap.mean()),
        "worst": [
            {
                "text": known.names[row],
                "group": known.groups[row],
                "cosine": cosine,
                "nearest_before": known.names[neighbour],
                "rank_after": place,
            }
            for row, cosine, neighbour, place in zip(
                worst.tolist(),
                cosines[worst].tolist(),
                nearest.tolist(),
                rank.tolist(),
                strict=True,
            )
        ],
    }


def neighbours_kept(sample: Sample, after: EditedTexts, stay: Tensor) -> tuple[Tensor, Tensor]:
    """What became of the nearest neighbours of the n texts of a sample that stay.

    Args:
        stay: (T,) bool, the texts that count.

    Returns:
        Whether the nearest other text before is the nearest after, (n,) bool, and the share of the
        ten nearest before that are among the ten nearest after, (n,) float64.
    """
    kept, overlap = [], []
    for places in stay[sample.rows].nonzero()[:, 0].split(BLOCK):
        rows = sample.rows[places]
        was = _with_others(sample.cosines[places], rows, stay)  # (b, T)
        now = _with_others(after.cosines(sample.products[places], rows), rows, stay)
        old = was.topk(min(NEAREST, int(stay.sum()) - 1)).indices  # (b, k)
        nearest, new = now.topk(old.shape[1])
        kept.append(now.gather(1, old[:, :1])[:, 0] >= nearest[:, 0] - TIE)
        overlap.append((old[:, :, None] == new[:, None, :]).any(dim=2).double().mean(dim=1))
    return torch.cat(kept), torch.cat(overlap)


def _with_others(cosines: Tensor, rows: Tensor, stay: Tensor) -> Tensor:
    """Cosines (b, T) of texts `rows` (b,), in place -inf with those that do not stay, and with the
    text itself."""
    cosines[:, ~stay] = -torch.inf
    cosines[torch.arange(len(rows)), rows] = -torch.inf
    return cosines
