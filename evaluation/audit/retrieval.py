"""Search: texts for an image, images for a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evaluation.audit.case import Case, Model
from evaluation.audit.destinations import held
from evaluation.audit.interval import Accuracy, accuracy

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
    labels = case.bundle.labels
    retained = torch.tensor(case.retained, dtype=torch.int64)
    depicted = set(labels.tolist())
    texts = min(len(held(case.before)), len(held(case.after)))
    directions = {
        "image_to_text": (
            (_ranks_of_texts(case.before), _ranks_of_texts(case.after)),
            {"forgotten": case.mine, "retained": torch.isin(labels, retained)},
            [k for k in CUTOFFS if k < texts],
        ),
        "text_to_image": (
            (_ranks_of_images(case.before), _ranks_of_images(case.after)),
            {
                group: torch.tensor([c for c in columns if c in depicted], dtype=torch.int64)
                for group, columns in (("forgotten", [case.label]), ("retained", case.retained))
            },
            [k for k in CUTOFFS if k < len(labels)],
        ),
    }
    report: dict[str, Any] = {}
    for direction, ((before, after), groups, cutoffs) in directions.items():
        report[direction] = {
            group: {
                "before": _recalls(before[queries], cutoffs),
                "after": _recalls(after[queries], cutoffs),
            }
            for group, queries in groups.items()
        }
    report["not_measured"] = _missing(case, texts)
    return report


def _ranks_of_texts(model: Model) -> Tensor:
    """How many classes come before the right one, (N,) for every image; equal cosines rank in
    the order of the classes, as argmax has it."""
    scores, labels = model.scores, model.bundle.labels[:, None]  # (N, C), (N, 1)
    own = scores.gather(1, labels)  # (N, 1)
    columns = torch.arange(scores.shape[1])
    return ((scores > own) | ((scores == own) & (columns < labels))).sum(dim=1)


def _ranks_of_images(model: Model) -> Tensor:
    """How many images come before the first right one, (C,) for every class; equal cosines rank
    in the order of the images. A class without images comes after all of them."""
    labels = model.bundle.labels
    scores = model.bundle.image_features @ model.classes.T  # (N, d) @ (d, C); no name is removed
    count, classes = scores.shape
    own = scores.gather(1, labels[:, None])[:, 0]  # (N,)
    best = own.new_full((classes,), -torch.inf).scatter_reduce(0, labels, own, "amax")
    order = torch.arange(count)
    winners = torch.where(own == best[labels], order, count)
    first = winners.new_full((classes,), count).scatter_reduce(0, labels, winners, "amin")
    return ((scores > best) | ((scores == best) & (order[:, None] < first))).sum(dim=0)


def _recalls(ranks: Tensor, cutoffs: list[int]) -> dict[str, Accuracy]:
    """Recall of the queries with these ranks (n,), None at a K that is not in `cutoffs`."""
    return {str(k): accuracy((ranks if k in cutoffs else ranks[:0]) < k) for k in CUTOFFS}


def _missing(case: Case, texts: int) -> list[str]:
    """What could not be measured, and why."""
    missing = []
    if not case.mine.any():
        missing.append(f"retrieval: no image of {case.name}")
    if not torch.isin(case.bundle.labels, torch.tensor(case.retained, dtype=torch.int64)).any():
        missing.append("retrieval: no image of a class that is retained")
    for direction, count, answers in (
        ("image to text", texts, "texts"),
        ("text to image", len(case.bundle.labels), "images"),
    ):
        missing += [f"{direction}: K = {k} of {count} {answers}" for k in CUTOFFS if k >= count]
    return missing
