"""Search: texts for an image, images for a text."""

from typing import Any

import torch
from torch import Tensor

from evaluation.audit.case import Accuracy, AuditData, Case, Model, accuracy

CUTOFFS = (1, 5, 10)


def measure(case: Case) -> dict[str, Any]:
    """Recall at 1, 5 and 10, before and after, of the forgotten class and of the retained ones.

    Image to text: a query is an image, a hit if its class is among the K best evaluation prompts
    that the list holds; a removed name is never found. Text to image: a query is the evaluation
    prompt of a class that has images (of a removed one too: it can be typed), a hit if one of these
    is among the K best of all images. Other classes forgotten at the same time are in neither
    group, but among the answers. Where K takes in all answers the value is None.

    Returns:
        image_to_text, text_to_image: {"forgotten" | "retained": {"before" | "after": {"1", "5",
        "10": Accuracy}}}.
    """
    labels, depicted = case.bundle.labels, case.data.counts > 0
    groups = {"forgotten": torch.arange(len(depicted)) == case.label, "retained": case.retained}
    before = case.data.once(_ranks, case.before)
    ranks = {"before": before, "after": _ranks(case.data, case.after)}
    texts = len(depicted) - len(case.after.removed)
    report: dict[str, Any] = {"image_to_text": {}, "text_to_image": {}, "not_measured": []}
    for name, group in groups.items():
        for direction, queries, answers in (
            ("image_to_text", group[labels], texts),
            ("text_to_image", group & depicted, len(labels)),
        ):
            report[direction][name] = {
                side: _recalls(rank[direction][queries], answers) for side, rank in ranks.items()
            }
    if min(texts, len(labels)) <= CUTOFFS[-1]:
        report["not_measured"] = [f"recall at 10 of {texts} texts and {len(labels)} images"]
    return report


def _ranks(data: AuditData, model: Model) -> dict[str, Tensor]:
    """Direction -> how many answers come before the right one: (N,) per image, (C,) per class.

    Among equal cosines the right answer comes first; a class without images comes last.
    """
    labels, scores, cosines = data.bundle.labels[:, None], model.scores, model.cosines
    own = cosines.gather(1, labels)[:, 0]  # (N,)
    best = own.new_full((scores.shape[1],), -torch.inf).scatter_reduce(0, labels[:, 0], own, "amax")
    return {
        "image_to_text": (scores > scores.gather(1, labels)).sum(dim=1),
        "text_to_image": (cosines > best).sum(dim=0),
    }


def _recalls(ranks: Tensor, answers: int) -> dict[str, Accuracy]:
    """Recall of the queries with these ranks (n,); None at a K that takes in all answers."""
    return {
        str(k): accuracy(int((ranks < k).sum()), len(ranks)) if k < answers else accuracy(0, 0)
        for k in CUTOFFS
    }
