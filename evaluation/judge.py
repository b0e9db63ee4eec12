"""What a run asks of images: accuracies for log entries, and what became of each class in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from clip.bundle import FeatureBundle
from evaluation.rules import Fate, fate
from evaluation.zero_shot import Factors, ZeroShot, accuracy, own_accuracies


class Judge:
    """Accuracies for log entries: of a set's own classes, then of every other set."""

    def __init__(self, bundle: FeatureBundle, others: dict[str, FeatureBundle]) -> None:
        self.own = ZeroShot(bundle)
        self.others = {name: ZeroShot(other) for name, other in others.items()}

    def before(self, classes: list[str]) -> dict[str, Any]:
        """One side of a log entry, for the untouched model."""
        bundle = self.own.bundle
        return {bundle.dataset: own_accuracies(bundle, classes, self.own.before)} | self._before

    @cached_property
    def _before(self) -> dict[str, Any]:
        return {name: _whole(accuracy(other.before)) for name, other in self.others.items()}

    def after(
        self, requests: list[list[str]], changes: list[Factors], removed: Sequence[Sequence[str]]
    ) -> list[dict[str, Any]]:
        """The other side, for each request and its change."""
        bundle = self.own.bundle
        correct = self.own.correct(changes)  # (R, N)
        for row, names in enumerate(removed):
            if names:
                correct[row] = self.own.predict(changes[row], names) == bundle.labels
        found = [
            {bundle.dataset: own_accuracies(bundle, classes, mine)}
            for classes, mine in zip(requests, correct, strict=True)
        ]
        for name, other in self.others.items():
            for entry, hits in zip(found, other.correct(changes), strict=True):
                entry[name] = _whole(accuracy(hits))
        return found


def outcomes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What became of each class of a request, and of the rest of its set."""
    for name, was in before.items():
        now = after[name]
        shown = ", ".join(
            f"{what} {_percent(was[key])} -> {_percent(now[key])}"
            for what, key in (("forgotten", "cls_acc_test"), ("rest", "no_cls_acc"))
        )
        yield f"{name}: {shown}"
        if fate(was["cls_acc_test"], now["cls_acc_test"]) == Fate.STAYS:
            yield f"{name}: half of its accuracy or more is left: not forgotten"


def _whole(value: float | None) -> dict[str, dict[str, float | None]]:
    return {"all": {"all_ds": value}}


def _percent(fraction: float | None) -> str:
    return "no images" if fraction is None else f"{fraction:.1%}"
