"""Who else feels it: the classes nearest to the forgotten one, and all texts that should stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import datasets
from evaluation.audit.case import Case
from evaluation.audit.interval import accuracy, mean_value

NEAREST = 10  # classes listed, and texts compared for the overlap
WORST = 10  # texts listed
BLOCK = 1024  # rows of a similarity matrix at once: 10,000 texts then need 40 MB for each
TIE = 1e-6  # cosines closer than float32 rounding are one place


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
            fewer) that still are; worst: the ten texts of lowest cosine, and the place that their
            former nearest text has now, 1 for still nearest.
        not_measured: what could not be measured, and why.
    """
    columns = nearest_classes(case)
    similarities = case.before.classes[columns] @ case.before.classes[case.label]  # (n, d) @ (d,)
    classes = [
        {
            "name": case.bundle.classnames[column],
            "similarity": float(similarity),
            "before": _accuracy(case, case.before.predicted, column),
            "after": _accuracy(case, case.after.predicted, column),
        }
        for column, similarity in zip(columns, similarities, strict=True)
    ]
    missing = []
    bare = [entry["name"] for entry in classes if entry["before"]["n"] == 0]
    if bare:
        missing.append(f"neighbours: no image of {', '.join(bare)}")
    if not classes:
        missing.append("neighbours: no class is retained")
    texts, groups, hidden = retained_texts(case)
    if len(texts) < 2:
        missing.append(f"moved texts: {len(texts)} of at least 2 retained texts")
    return {
        "classes": classes,
        "mean_before": mean_value([entry["before"] for entry in classes]),
        "mean_after": mean_value([entry["after"] for entry in classes]),
        "moved": _moved(texts, groups, case.before.embed(hidden), case.after.embed(hidden)),
        "not_measured": missing,
    }


def nearest_classes(case: Case) -> list[int]:
    """Columns of the at most ten retained classes nearest to the class by the cosine of their
    evaluation prompts in the untouched model, nearest first."""
    retained = torch.tensor(case.retained, dtype=torch.int64)
    cosines = case.before.classes[retained] @ case.before.classes[case.label]  # (n, d) @ (d,)
    return retained[cosines.topk(min(NEAREST, len(retained))).indices].tolist()


def retained_texts(case: Case) -> tuple[list[str], list[str], Tensor]:
    """Names, groups ("class", "vocabulary" or a data set) and hidden states (m, w) of all texts
    that should stay as they are."""
    bundle, gone = case.bundle, datasets.same_meaning(case.forgotten, case.bundle.dataset)
    texts = [bundle.classnames[column] for column in case.retained]
    groups = ["class"] * len(texts)
    rows = [bundle.class_hidden[case.retained]]
    sources = {"vocabulary": (bundle.retain_names, bundle.retain_hidden)}
    sources |= {name: (b.classnames, b.class_hidden) for name, b in case.others.items()}
    for group, (names, hidden) in sources.items():
        kept = [row for row, name in enumerate(names) if datasets.key(name) not in gone]
        texts += [names[row] for row in kept]
        groups += [group] * len(kept)
        rows.append(hidden[kept])
    return texts, groups, torch.cat(rows)


def _accuracy(case: Case, predicted: Tensor, column: int) -> dict[str, Any]:
    return accuracy(predicted[case.bundle.labels == column] == column)


def _moved(texts: list[str], groups: list[str], before: Tensor, after: Tensor) -> dict[str, Any]:
    """The entry "moved" for unit-norm embeddings (m, d) before and after."""
    count = len(texts)
    if count < 2:
        nothing = dict.fromkeys(("mean_cosine", "nearest_kept", "top10_overlap"))
        return {"count": count, **nothing, "worst": []}
    cosine = (before * after).sum(dim=1).clamp(-1, 1)  # (m, d) -> (m,)
    nearest, rank, overlap = _neighbourhoods(before, after)
    worst = cosine.argsort(stable=True)[:WORST].tolist()
    return {
        "count": count,
        "mean_cosine": float(cosine.double().mean()),
        "nearest_kept": float((rank == 1).double().mean()),
        "top10_overlap": float(overlap.mean()),
        "worst": [
            {
                "text": texts[row],
                "group": groups[row],
                "cosine": float(cosine[row]),
                "nearest_before": texts[int(nearest[row])],
                "rank_after": int(rank[row]),
            }
            for row in worst
        ],
    }


def _neighbourhoods(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each of m texts: its nearest other text before (m,), the rank (m,) that this one has
    after, and the share (m,) of its ten nearest before that are among its ten nearest after.

    All pairs are compared, m^2 d products twice, in blocks of rows.
    """
    count = len(before)
    k = min(NEAREST, count - 1)
    nearest, rank, overlap = [], [], []
    for start in range(0, count, BLOCK):
        rows = torch.arange(start, min(start + BLOCK, count))
        old, new = (texts[rows] @ texts.T for texts in (before, after))  # (b, d) @ (d, m)
        for similarity in (old, new):
            similarity[torch.arange(len(rows)), rows] = -torch.inf  # a text is not its neighbour
        top_old, top_new = old.topk(k).indices, new.topk(k).indices  # (b, k)
        now = new.gather(1, top_old[:, :1])  # (b, 1)
        nearest.append(top_old[:, 0])
        rank.append(1 + (new > now + TIE).sum(dim=1))
        both = (top_old[:, :, None] == top_new[:, None, :]).any(dim=2)  # (b, k, k) -> (b, k)
        overlap.append(both.double().mean(dim=1))
    return torch.cat(nearest), torch.cat(rank), torch.cat(overlap)
