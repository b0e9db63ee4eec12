"""Search: texts for an image, images for a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evaluation.audit.case import AuditData, Case, Model
from evaluation.audit.statistics import Accuracy, proportion

CUTOFFS = (1, 5, 10)


def measure(case: Case) -> dict[str, Any]:
    """Recall at 1, 5 and 10, before and after, of the forgotten class and of the retained ones.

    Image to text: a query is an image, a hit if its class is among the K best evaluation prompts
    that the list holds; a removed name is never found. Text to image: a query is the evaluation
    prompt of a class that has images, a hit if one of these is among the K best of all images.
    Whoever types a name searches with it whether or not the list holds it, so a removed name still
    is a query. Other classes forgotten at the same time are in neither group, though their texts
    and images stay among the answers. Intervals are over queries: over images, and over classes
    (of the forgotten class there is one). Where K takes in all answers a hit means nothing, and
    the value is None.

    Returns:
        image_to_text, text_to_image: {"forgotten" | "retained": {"before" | "after": {"1", "5",
        "10": Accuracy}}}; not_measured.
    """
    labels, depicted = case.bundle.labels, case.data.counts > 0
    groups = {"forgotten": torch.arange(len(depicted)) == case.label, "retained": case.retained}
    ranks = {"before": case.data.once(_ranks_before), "after": _ranks(case.after)}
    missing = []
    if not case.own_images.any():
        missing.append(f"retrieval: no image of {case.name}")
    if not case.retained[labels].any():
        missing.append("retrieval: no image of a class that is retained")
    report: dict[str, Any] = {}
    for direction, answers, count in (
        ("image_to_text", "texts", len(depicted) - len(case.after.removed)),
        ("text_to_image", "images", len(labels)),
    ):
        report[direction] = {}
        for name, group in groups.items():
            queries = group[labels] if answers == "texts" else group & depicted
            report[direction][name] = {
                when: _recalls(rank[direction][queries], count) for when, rank in ranks.items()
            }
        missing += [
            f"{direction.replace('_', ' ')}: K = {k} of {count} {answers}"
            for k in CUTOFFS
            if k >= count
        ]
    return report | {"not_measured": missing}


def _ranks_before(data: AuditData) -> dict[str, Tensor]:
    return _ranks(data.before)


def _ranks(model: Model) -> dict[str, Tensor]:
    """Direction -> how many answers come before the right one: (N,) per image, (C,) per class.

    Equal cosines rank in the order of the classes or images. A class without images comes last.
    """
    labels, scores, cosines = model.bundle.labels[:, None], model.scores, model.cosines
    n, classes = scores.shape
    own = scores.gather(1, labels)  # (N, 1)
    ahead = (scores > own) | ((scores == own) & (torch.arange(classes) < labels))  # (N, C)
    # Of its own images the best, and of equally good ones the first.
    own = cosines.masked_fill(torch.arange(classes) != labels, -torch.inf)  # (N, C)
    best, first = own.max(dim=0) if n else (own.new_zeros(classes), torch.zeros(classes).long())
    earlier = torch.arange(n)[:, None] < first
    images = (cosines > best) | ((cosines == best) & earlier)  # (N, C)
    return {"image_to_text": ahead.sum(dim=1), "text_to_image": images.sum(dim=0)}


def _recalls(ranks: Tensor, answers: int) -> dict[str, Accuracy]:
    """Recall of the queries with these ranks (n,); None at a K that takes in all answers."""
    return {
        str(k): proportion(int((ranks < k).sum()), len(ranks)) if k < answers else proportion(0, 0)
        for k in CUTOFFS
    }
