"""Search: texts for an image, images for a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evaluation.audit.case import Case, Common, Model
from evaluation.audit.interval import Accuracy, share

CUTOFFS = (1, 5, 10)
BLOCK = 64  # images at once: their cosines with all classes then stay in the cache


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
    labels, depicted = case.bundle.labels, case.common.images > 0
    groups = {"forgotten": torch.arange(len(depicted)) == case.label, "retained": case.retained}
    ranks = {"before": case.common.once(_ranks_before), "after": _ranks(case.after)}
    missing = []
    if not case.mine.any():
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
                when: _recalls(found[direction][queries], count) for when, found in ranks.items()
            }
        missing += [
            f"{direction.replace('_', ' ')}: K = {k} of {count} {answers}"
            for k in CUTOFFS
            if k >= count
        ]
    return report | {"not_measured": missing}


def _ranks_before(common: Common) -> dict[str, Tensor]:
    return _ranks(common.before)


def _ranks(model: Model) -> dict[str, Tensor]:
    """Direction -> how many answers come before the right one, for every query; equal cosines rank
    in the order of the classes, as argmax has it, or of the images."""
    return {"image_to_text": _ranks_of_texts(model), "text_to_image": _ranks_of_images(model)}


def _ranks_of_texts(model: Model) -> Tensor:
    """How many classes come before the right one, (N,) for every image."""
    scores, labels = model.scores, model.bundle.labels[:, None]  # (N, C), (N, 1)
    own = scores.gather(1, labels)  # (N, 1)
    blocks = list(zip(scores.split(BLOCK), own.split(BLOCK), strict=True))
    ranks = torch.cat([(block > o).sum(dim=1) for block, o in blocks])
    tied = torch.cat([(block == o).sum(dim=1) for block, o in blocks]) > 1
    columns = torch.arange(scores.shape[1])
    ranks[tied] += ((scores[tied] == own[tied]) & (columns < labels[tied])).sum(dim=1)
    return ranks


def _ranks_of_images(model: Model) -> Tensor:
    """How many images come before the first right one, (C,) for every class; a class without images
    comes after all of them."""
    labels, scores = model.bundle.labels, model.cosines  # (N,), (N, C) with removed names too
    count, classes = scores.shape
    own = scores.gather(1, labels[:, None])[:, 0]  # (N,)
    best = own.new_full((classes,), -torch.inf).scatter_reduce(0, labels, own, "amax")
    order = torch.arange(count)
    winners = torch.where(own == best[labels], order, count)
    first = winners.new_full((classes,), count).scatter_reduce(0, labels, winners, "amin")
    ranks = sum((block > best).sum(dim=0) for block in scores.split(BLOCK))
    tied = sum((block == best).sum(dim=0) for block in scores.split(BLOCK)) > 1
    earlier = order[:, None] < first[tied]
    ranks[tied] += ((scores[:, tied] == best[tied]) & earlier).sum(dim=0)
    return ranks


def _recalls(ranks: Tensor, answers: int) -> dict[str, Accuracy]:
    """Recall of the queries with these ranks (n,); None at a K that takes in all answers."""
    return {
        str(k): share(int((ranks < k).sum()), len(ranks)) if k < answers else share(0, 0)
        for k in CUTOFFS
    }
