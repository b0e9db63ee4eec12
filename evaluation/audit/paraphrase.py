"""Does the class come back under other words?

Each prompt in turn replaces the class's own column of the classifier; all other classes keep their
evaluation prompts. Nobody who looks for a class is bound to the words that it was forgotten by.
"""

from __future__ import annotations

from typing import Any

import torch

from evaluation.audit.case import Case, Model
from evaluation.audit.statistics import Accuracy, mean_value, proportion
from evaluation.rules import holds, is_other_word


def measure(case: Case) -> dict[str, Any]:
    """Accuracy over the class's images under each prompt, before and after.

    A removed class is put back for its prompt: its name was deleted, the words still exist.

    Returns:
        prompts: text, kind, seen, before and after of each; mean_before, mean_after, worst (the
        unseen prompt that finds most afterwards) and back (texts that find at least half of what
        the class's own prompt found before, most first), all over prompts that forgetting did not
        see, except the evaluation prompt; by_kind: count, mean_before, mean_after, worst_after over
        the prompts of each kind, seen ones too; not_measured.
    """
    accuracies = zip(
        case.prompts, _accuracies(case.before, case), _accuracies(case.after, case), strict=True
    )
    prompts = [
        {"text": p.text, "kind": p.kind, "seen": p.seen, "before": before, "after": after}
        for p, before, after in accuracies
    ]
    unseen = [entry for entry in prompts if is_other_word(entry["kind"], entry["seen"])]
    own = case.before.accuracy(case.label)["value"]
    missing = list(case.missing)
    if own is None:
        missing.append(f"no images of {case.name!r}: no accuracy under any words")
    elif own == 0:
        missing.append(
            f"{case.name!r} was never recognised under its own prompt: nothing could come back"
        )
    if not unseen and not case.missing:
        missing.append(f"no other text of {case.name!r} than its own prompt and what forgot it")
    ranked = sorted(unseen, key=lambda e: -e["after"]["value"]) if own is not None else []
    worst = [{key: e[key] for key in ("text", "kind", "before", "after")} for e in ranked[:1]]
    kinds = dict.fromkeys(entry["kind"] for entry in prompts)
    return {
        "prompts": prompts,
        **_means(unseen),
        "worst": worst[0] if worst else None,
        "back": [entry["text"] for entry in ranked if holds(entry["after"]["value"], own)],
        "by_kind": {kind: _summary([p for p in prompts if p["kind"] == kind]) for kind in kinds},
        "not_measured": missing,
    }


def _accuracies(model: Model, case: Case) -> list[Accuracy]:
    """The accuracy under each prompt."""
    if not case.prompts:
        return []
    images, scores = case.data.images[case.own_images], model.scores[case.own_images]
    hidden = torch.stack([prompt.hidden for prompt in case.prompts])  # (P, w)
    own = model.image_cosines(images, hidden)  # (n, P)
    # Among equal scores the first class wins, as in zero-shot classification.
    minus_infinity = scores.new_full((len(scores), 1), -torch.inf)
    earlier = torch.cat([scores[:, : case.label], minus_infinity], dim=1).amax(dim=1)
    later = torch.cat([scores[:, case.label + 1 :], minus_infinity], dim=1).amax(dim=1)
    correct = (own > earlier[:, None]) & (own >= later[:, None])  # (n, P)
    return [proportion(right, len(images)) for right in correct.sum(dim=0).tolist()]


def _means(entries: list[dict[str, Any]]) -> dict[str, float | None]:
    sides = ("before", "after")
    return {f"mean_{side}": mean_value([entry[side] for entry in entries]) for side in sides}


def _summary(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The prompts of one kind: how many, and their accuracies."""
    values = [entry["after"]["value"] for entry in entries]
    worst = None if None in values else max(values)
    return {"count": len(entries), **_means(entries), "worst_after": worst}
