"""How many images, or how many words, bring the class back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from evaluation.audit.case import Case, Model
from evaluation.audit.shots import METHODS, REPEATS, SHOTS, Method, Start
from evaluation.audit.statistics import Accuracy, accuracy
from evaluation.rules import holds, is_other_word


def measure(case: Case) -> dict[str, Any]:
    """Accuracy of the class's other images, among all classes of the set, from k images or words.

    Returns:
        shots: numbers of images; methods: `cache`, `probe`, `refit` (see `evaluation.audit.shots`),
        each with a list of accuracies, one per number of images, for each of

        - forgotten: the class, learnt on top of the changed model;
        - before: the same on the untouched model;
        - no_text: the same where the class has no text at all, as if it had never been known: what
          images alone give. Whoever drops the changed text has as much, so where `forgotten` lies
          below it (a text sent to its opposite speaks against its class) that protects nobody;
        - control: the nearest retained class with as many images, under the changed model;

        and `needed`, the least number that reaches half of what the class had before forgetting.
        words: accuracy with the mean of n prompts that forgetting did not see as the class's text,
        `counts` of them, under the changed model and the untouched one; needed.

        An accuracy is the mean over `REPEATS` draws of images (or prompts); its n counts every
        image once, however often it was tested. None where nothing is left to test.
    """
    images = int(case.own_images.sum())
    missing: list[str] = []
    comparable = images < len(case.own_images)
    if images == 0:
        missing.append(f"relearning: no image of {case.name!r}")
    elif not comparable:
        missing.append("relearning: no image of another class to compare with")
    elif images <= SHOTS[-1]:
        few = [k for k in SHOTS if k >= images]
        missing.append(f"relearning from {few[0]} or more images: {case.name!r} has {images}")
    own = case.before.accuracy(case.label)["value"]
    if own == 0:
        missing.append(f"relearning: {case.name!r} was never recognised, so half of it is nothing")
    control = _control(case)
    if control is None:
        missing.append("relearning: no retained class has images to compare with")
    starts = {
        "forgotten": Start(case.after, case.label),
        "before": Start(case.before, case.label),
        "no_text": Start(case.before, case.label, named=False),
        "control": None if control is None else Start(case.after, control),
    }
    methods: dict[str, dict[str, Any]] = {}
    for name, method in METHODS.items():
        curves = {
            curve: [_learnt(method, start if comparable else None, k) for k in SHOTS]
            for curve, start in starts.items()
        }
        methods[name] = curves | {"needed": _needed(SHOTS, curves["forgotten"], own)}
    words, lacking = _words(case, own)
    return {
        "shots": list(SHOTS),
        "methods": methods,
        "control_class": None if control is None else case.bundle.classnames[control],
        "words": words,
        "not_measured": missing + lacking,
    }


def _learnt(method: Method, start: Start | None, k: int) -> Accuracy:
    """Accuracy of a class's other images after k of them, over all draws; none without a start."""
    tested, correct = [], []
    for draw in range(REPEATS if start else 0):
        images = start.shots.rest(draw, k, start.label)
        if len(images):
            tested.append(images)
            correct.append(method(start, draw, k, images) == start.label)
    return _pooled(tested, correct)


def _words(case: Case, own: float | None) -> tuple[dict[str, Any], list[str]]:
    """The entry "words", and what was lacking for it."""
    unseen = [p.hidden for p in case.prompts if is_other_word(p.kind, p.seen)]
    counts = [n for n in SHOTS if n <= len(unseen)]
    generator = case.generator("words")
    orders = [torch.randperm(len(unseen), generator=generator) for _ in range(REPEATS)]
    images = case.own_images.nonzero()[:, 0]  # (n,)

    def correct(model: Model, order: Tensor) -> Tensor:
        """Which of the class's images (n,) the mean of these prompts finds as its column."""
        texts = normalize(model.embed(torch.stack([unseen[i] for i in order])), dim=1)
        scores = model.scores[images]  # (n, C), a copy
        scores[:, case.label] = case.data.images[images] @ normalize(texts.mean(0), dim=0)
        return scores.argmax(dim=1) == case.label

    curves = {
        curve: [
            _pooled([images] * REPEATS, [correct(model, order[:n]) for order in orders])
            for n in counts
        ]
        for curve, model in (("forgotten", case.after), ("before", case.before))
    }
    few = f"relearning from {SHOTS[-1]} words: {len(unseen)} unseen prompts of {case.name!r}"
    lacking = [few] if len(unseen) < SHOTS[-1] else []
    needed = _needed(counts, curves["forgotten"], own)
    return {"counts": counts, **curves, "needed": needed}, lacking


def _pooled(tested: list[Tensor], correct: list[Tensor]) -> Accuracy:
    """The mean over all draws, with the interval of as many images as there are.

    An image that was tested in five draws is one image: five answers for it say little more than
    one, and an interval of all answers would be too narrow.
    """
    if not sum(map(len, tested)):
        return accuracy(torch.zeros(0, dtype=torch.bool))
    value = float(torch.cat(correct).double().mean())
    n = len(torch.cat(tested).unique())
    pooled = accuracy(torch.arange(n) < round(value * n)) | {"value": value}
    return pooled | {"low": min(pooled["low"], value), "high": max(pooled["high"], value)}


def _needed(counts: Sequence[int], curve: list[Accuracy], own: float | None) -> int | None:
    """The least count with which the class is back; None if it is with none."""
    back = (n for n, point in zip(counts, curve, strict=True) if holds(point["value"], own))
    return next(back, None)


def _control(case: Case) -> int | None:
    """Column of the nearest retained class with as many images as the class has, or enough for
    every number of shots; if there is none, of the one with most images."""
    counts = case.data.counts
    retained = (case.retained & (counts > 1)).nonzero()[:, 0]
    if not len(retained):
        return None
    enough = retained[counts[retained] >= min(int(counts[case.label]), SHOTS[-1] + 1)]
    if not len(enough):
        return int(retained[counts[retained].argmax()])
    cosines = case.before.classes[enough] @ case.before.classes[case.label]  # (n, d) @ (d,)
    return int(enough[cosines.argmax()])
