"""What counts as forgotten, as still there, and as back: the one place that says so."""

from enum import StrEnum

HALF = 0.5  # of the accuracy before forgetting: from there on a class counts as there
EVALUATION = "evaluation"  # the kind of the prompt that accuracies are measured with


class Fate(StrEnum):
    """What became of a class under one prompt."""

    GONE = "gone"
    STAYS = "stays"
    NEVER = "never recognised"  # before forgetting either: there was nothing to forget
    UNMEASURED = "not measured"


def holds(accuracy: float | None, before: float | None) -> bool:
    """Whether an accuracy is at least half of what the class had before forgetting: the threshold
    for a class that stays, that comes back, and that images bring back. False if unknown, or where
    there was nothing to lose."""
    return bool(before) and accuracy is not None and accuracy >= HALF * before


def fate(before: float | None, after: float | None) -> Fate:
    """What became of a class (accuracies before and after, None: no images)."""
    if before is None or after is None:
        return Fate.UNMEASURED
    if before == 0:
        return Fate.NEVER
    return Fate.STAYS if holds(after, before) else Fate.GONE


def is_other_word(kind: str, seen: bool) -> bool:
    """Whether a prompt asks for the class in words that forgetting did not see, and is not the
    evaluation prompt."""
    return not seen and kind != EVALUATION
