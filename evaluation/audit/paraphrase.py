"""Does the class come back under other words? Its column of the classifier asked anew.

For every prompt the class is looked for by that prompt alone, while all other classes keep their
evaluation prompts. Nobody who looks for a class is bound to the words that it was forgotten by.
"""

from __future__ import annotations

from typing import Any

import torch

from evaluation.audit.case import Case, Model
from evaluation.audit.interval import Accuracy, mean_value, share
from evaluation.audit.texts import SHORTEST
from evaluation.rules import holds, is_other_word


def measure(case: Case) -> dict[str, Any]:
    """Accuracy over the class's images under each prompt, before and after.

    A removed class is put back for its prompt: its name was deleted, the words are still there to
    ask with.

    Returns:
        prompts: text, kind, seen, before and after of each; mean_before, mean_after, worst (the
        unseen prompt that finds most afterwards) and back (texts that find at least half of what
        the class's own prompt found before, most first), all over prompts that forgetting did not
        see, but for the evaluation prompt itself; by_kind: count, mean_before, mean_after,
        worst_after over the prompts of each kind, seen ones too; not_measured.
    """
    found = zip(case.prompts, _found(case.before, case), _found(case.after, case), strict=True)
    prompts = [
        {"text": prompt.text, "kind": prompt.kind, "seen": prompt.seen, "before": old, "after": new}
        for prompt, old, new in found
    ]
    unseen = [entry for entry in prompts if is_other_word(entry["kind"], entry["seen"])]
    own = case.before.accuracy(case.label)["value"]
    missing = list(case.unmeasured)
    if own is None:
        missing.append(f"no images of {case.name!r}: no accuracy under any words")
    elif own == 0:
        missing.append(
            f"{case.name!r} was never recognised under its own prompt: nothing could come back"
        )
    if not unseen and not case.unmeasured:
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


def _found(model: Model, case: Case) -> list[Accuracy]:
    """The accuracy under each prompt."""
    images = case.bundle.image_features[case.mine]  # (n, d)
    if not case.prompts:
        return []
    rivals = model.scores[case.mine]  # (n, C), a copy
    rivals[:, case.label] = -torch.inf
    highest, place = rivals.max(dim=1, keepdim=True)  # (n, 1)
    texts = model.embed(torch.stack([prompt.hidden for prompt in case.prompts]))  # (P, d)
    own = images @ texts.T / texts.norm(dim=1).clamp_min(SHORTEST)  # (n, d) @ (d, P) -> (n, P)
    # Among equals the first class wins, as it does in zero-shot classification.
    found = (own > highest) | ((own == highest) & (place > case.label))
    return [share(right, len(images)) for right in found.sum(dim=0).tolist()]


def _means(entries: list[dict[str, Any]]) -> dict[str, float | None]:
    sides = ("before", "after")
    return {f"mean_{side}": mean_value([entry[side] for entry in entries]) for side in sides}


def _summary(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one kind of words: how many, and their accuracies."""
    values = [entry["after"]["value"] for entry in entries]
    worst = None if None in values else max(values)
    return {"count": len(entries), **_means(entries), "worst_after": worst}
