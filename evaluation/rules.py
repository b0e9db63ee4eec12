"""What counts as forgotten, as still there, and as back: the one place that says so."""

from enum import StrEnum


class Fate(StrEnum):
    """What became of a class under one prompt."""

    GONE = "gone"
    STAYS = "stays"
    NEVER = "never recognised"  # before forgetting either: there was nothing to forget
    UNMEASURED = "not measured"


def holds(accuracy: float | None, before: float | None) -> bool:
    """Whether an accuracy is at least half of that before forgetting: then a class stays, comes
    back, or is brought back by images. False if unknown, or where there was nothing to lose."""
    return bool(before) and accuracy is not None and accuracy >= 0.5 * before


def fate(before: float | None, after: float | None) -> Fate:
    """What became of a class (accuracies before and after, None: no images)."""
    if before is None or after is None:
        return Fate.UNMEASURED
    if before == 0:
        return Fate.NEVER
    return Fate.STAYS if holds(after, before) else Fate.GONE


def is_other_word(kind: str, seen: bool) -> bool:
    """Whether a prompt's words were not seen by forgetting, and it is not the evaluation prompt."""
    return not seen and kind != "evaluation"
