"""Which other texts change: the classes nearest to the forgotten one, and all that should stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import datasets
from evaluation.audit.case import AuditData, Case
from evaluation.audit.statistics import highest, mean_value

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


def text_names(data: AuditData) -> tuple[list[str], list[str], list[str]]:
    """Names of `AuditData.texts`, their groups ("class", "vocabulary" or a data set) and keys."""
    parts = [("class", data.bundle.classnames), ("vocabulary", data.bundle.retain_names)]
    parts += [(name, other.classnames) for name, other in data.others.items()]
    names = [name for _, part in parts for name in part]
    groups = [group for group, part in parts for _ in part]
    return names, groups, list(map(datasets.key, names))


def nearest_classes(case: Case) -> list[int]:
    """Columns of the at most ten retained classes nearest to the class by the cosine of their
    evaluation prompts in the untouched model, nearest first."""
    cosines = case.before.classes @ case.before.classes[case.label]  # (C, d) @ (d,)
    cosines[~case.retained] = -torch.inf
    return highest(cosines, min(NEAREST, int(case.retained.sum()))).tolist()


def retained_texts(case: Case) -> Tensor:
    """Which of the texts should stay as they are, (T,) bool."""
    same = datasets.same_meaning(case.forgotten, case.bundle.dataset)
    stay = torch.tensor([key not in same for key in case.data.once(text_names)[2]])
    stay[: len(case.retained)] = case.retained
    return stay


def sample_of(data: AuditData) -> tuple[Tensor, Tensor]:
    """Rows (W,) of the at most 1,000 texts whose neighbours are compared, and the products (W, T)
    of their embeddings with all."""
    embeddings = data.texts.embeddings
    rows = torch.randperm(len(embeddings), generator=data.generator("watched"))
    rows = rows[:SAMPLE].sort().values
    return rows, embeddings[rows] @ embeddings.T  # (W, d) @ (d, T)


def _moved(case: Case, stay: Tensor) -> dict[str, Any]:
    """The entry "moved" of the texts that stay (T,)."""
    count = int(stay.sum())
    if count < 2:
        nothing = dict.fromkeys(("mean_cosine", "nearest_kept", "top10_overlap"))
        return {"count": count, **nothing, "worst": []}
    before, after = case.before.texts, case.after.texts
    kept, overlap = neighbours_kept(case, stay)
    cosines = after.cosines_with_before.clamp(-1, 1)  # (T,)
    worst = highest(-cosines.masked_fill(~stay, torch.inf), min(WORST, count))
    products = case.data.texts.embeddings[worst] @ case.data.texts.embeddings.T  # (10, T)
    was = _with_others(before.cosines(products, worst), worst, stay)
    now = _with_others(after.cosines(products, worst), worst, stay)
    nearest = was.argmax(dim=1)
    rank = 1 + (now > now.gather(1, nearest[:, None]) + TIE).sum(dim=1)
    names, groups, _ = case.data.once(text_names)
    return {
        "count": count,
        "mean_cosine": float(cosines[stay].mean()),
        "nearest_kept": float(kept.double().mean()),
        "top10_overlap": float(overlap.mean()),
        "worst": [
            {
                "text": names[row],
                "group": groups[row],
                "cosine": float(cosines[row]),
                "nearest_before": names[neighbour],
                "rank_after": place,
            }
            for row, neighbour, place in zip(
                worst.tolist(), nearest.tolist(), rank.tolist(), strict=True
            )
        ],
    }


def neighbours_kept(case: Case, stay: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of the n texts of the sample that stay: whether its nearest other text before is the
    nearest after, (n,) bool, and the share of its ten nearest before that are among its ten nearest
    after, (n,) float64."""
    sample, products = case.data.once(sample_of)
    count = min(NEAREST, int(stay.sum()) - 1)
    kept, overlap = [], []
    for block in stay[sample].nonzero()[:, 0].split(BLOCK):
        rows = sample[block]
        was, now = (
            _with_others(model.texts.cosines(products[block], rows), rows, stay)  # (b, T)
            for model in (case.before, case.after)
        )
        old, (best, new) = was.topk(count).indices, now.topk(count)  # (b, 10) each
        kept.append(now.gather(1, old[:, :1])[:, 0] >= best[:, 0] - TIE)
        overlap.append((old[:, :, None] == new[:, None, :]).any(dim=2).double().mean(dim=1))
    return torch.cat(kept), torch.cat(overlap)


def _with_others(cosines: Tensor, rows: Tensor, stay: Tensor) -> Tensor:
    """Cosines (b, T) of texts `rows` (b,), in place -inf with those that do not stay, and with the
    text itself."""
    cosines[:, ~stay] = -torch.inf
    cosines[torch.arange(len(rows)), rows] = -torch.inf
    return cosines
