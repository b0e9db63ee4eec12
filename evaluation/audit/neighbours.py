"""Which other texts change: the classes nearest to the forgotten one, and all that should stay."""

from typing import Any

import torch

import datasets
from evaluation.audit.case import AuditData, Case, highest
from evaluation.rows import mean
from evaluation.zero_shot import embedded_texts
from forgetting.edited_texts import EmbeddedTexts

LISTED = 10  # classes, and texts


def measure(case: Case) -> dict[str, Any]:
    """Accuracy of the nearest retained classes, and how far all retained texts moved.

    A retained text is the evaluation prompt of a class that is not forgotten, a name of the
    vocabulary, or the evaluation prompt of a class of another set, unless its name equals a
    forgotten class or is marked as its synonym. Texts are listed by their names.

    Returns:
        classes: the at most ten retained ones nearest by the cosine of their evaluation prompts in
        the untouched model, nearest first; mean_before, mean_after: over those that have images;
        moved: count of texts; mean_cosine between a text's embeddings before and after; worst: the
        ten texts of lowest cosine.
    """
    similar = case.before.classes @ case.before.classes[case.label]  # (C, d) @ (d,)
    similar[~case.retained] = -torch.inf
    nearest = highest(similar, min(LISTED, int(case.retained.sum()))).tolist()
    classes = list(map(case.change, nearest))
    before, after = (mean(one[side]["value"] for one in classes) for side in ("before", "after"))
    names, keys, texts = case.data.once(all_texts)
    same = datasets.same_meaning(case.forgotten, case.bundle.dataset)
    stay = torch.tensor([key not in same for key in keys])  # (T,)
    stay[: len(case.retained)] = case.retained
    cosines = texts.edited([case.after.edit])[0].cosines_with_before.clamp(-1, 1)  # (T,)
    count = int(stay.sum())
    worst = highest(-cosines.masked_fill(~stay, torch.inf), min(LISTED, count)).tolist()
    return {
        "classes": classes,
        "mean_before": before,
        "mean_after": after,
        "moved": {
            "count": count,
            "mean_cosine": mean(cosines[stay].tolist()),
            "worst": [{"text": names[row], "cosine": float(cosines[row])} for row in worst],
        },
        "not_measured": [] if before is not None else ["no image of a retained class"],
    }


def all_texts(data: AuditData) -> tuple[list[str], list[str], EmbeddedTexts]:
    """Names, keys and embeddings of T texts: the evaluation prompts of the classes, the vocabulary,
    and the evaluation prompts of the other sets."""
    bundle, others = data.bundle, data.others.values()
    names = [*bundle.classnames, *bundle.retain_names]
    names += [name for other in others for name in other.classnames]
    hidden = [bundle.class_hidden, bundle.retain_hidden, *(other.class_hidden for other in others)]
    return names, list(map(datasets.key, names)), embedded_texts(bundle, torch.cat(hidden))
