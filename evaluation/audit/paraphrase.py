"""Does the class come back under other words?

Each prompt in turn replaces the class's own column of the classifier; all other classes keep their
evaluation prompts. Nobody who looks for a class is bound to the words that it was forgotten by.
"""

from typing import Any

import torch
from torch.nn.functional import normalize

from evaluation.audit.case import Accuracy, Case, Model, accuracy
from evaluation.rows import mean
from evaluation.rules import holds, is_other_word

OWN = {"bare", "evaluation", "retained"}  # kinds of prompts that every bundle has
LISTED = ("synonym", "hypernym", "description")  # kinds that need a list of words


def measure(case: Case) -> dict[str, Any]:
    """Accuracy over the class's images under each prompt, before and after.

    A removed class is put back for its prompt: its name was deleted, the words still exist.

    Returns:
        prompts: text, kind, seen, before and after of each; mean_before, mean_after, worst (the
        unseen prompt that finds most afterwards) and back (texts that find at least half of what
        the class's own prompt found before, most first), all over prompts that forgetting did not
        see, except the evaluation prompt.
    """
    before, after = _accuracies(case.before, case), _accuracies(case.after, case)
    prompts = [
        {"text": p.text, "kind": p.kind, "seen": p.seen, "before": old, "after": new}
        for p, old, new in zip(case.prompts, before, after, strict=True)
    ]
    unseen = [entry for entry in prompts if is_other_word(entry["kind"], entry["seen"])]
    own = case.before.accuracy(case.label)["value"]
    ranked = sorted(unseen, key=lambda e: -e["after"]["value"]) if own is not None else []
    return {
        "prompts": prompts,
        "mean_before": mean(entry["before"]["value"] for entry in unseen),
        "mean_after": mean(entry["after"]["value"] for entry in unseen),
        "worst": ranked[0] if ranked else None,
        "back": [entry["text"] for entry in ranked if holds(entry["after"]["value"], own)],
        "not_measured": _missing(case, bool(unseen)),
    }


def _accuracies(model: Model, case: Case) -> list[Accuracy]:
    images, scores = case.data.images[case.images], model.scores[case.images]  # (n, d), (n, C)
    hidden = torch.stack([prompt.hidden for prompt in case.prompts])  # (P, w)
    own = images @ normalize(model.embed(hidden), dim=1).T  # (n, P)
    scores[:, case.label] = -torch.inf  # of a copy
    correct = own >= scores.amax(dim=1, keepdim=True)  # (n, P)
    return [accuracy(right, len(images)) for right in correct.sum(dim=0).tolist()]


def _missing(case: Case, unseen: bool) -> list[str]:
    """A line on the words that there are none of."""
    kinds = {prompt.kind for prompt in case.prompts}
    if kinds <= OWN:
        makes = "`python -m clip.features DATASET ARCH --out DIR --audit` makes them"
        return [f"no other words in the bundle of {case.bundle.dataset} and no model: {makes}"]
    if absent := [kind for kind in LISTED if kind not in kinds]:
        return [f"no {' and no '.join(absent)} is known"]
    nothing = f"no other text of {case.name!r} than its own prompt and what forgot it"
    return [] if unseen else [nothing]
