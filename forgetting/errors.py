"""One error class, its one-line messages, and checks of names and numbers, without torch."""

import textwrap
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any

CUTOFF = 0.4  # below this similarity a suggestion puzzles more than it helps
SHOWN = 60  # characters of a wrong value in a message
LISTED = 20  # known names written out in a message; a set of cars has 196
LARGEST = 1e40  # of any number: products of four of them stay in the range of float64
MOST = 2**31  # of anything that is counted


class ProblemError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what would be right."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The at most `n` names of `known` that resemble `name`, closest first, case ignored.

    A name that contains `name` counts as near ("ranger" finds "2011 Ford Ranger SuperCab").
    """
    wanted = name.casefold()

    def similarity(candidate: str) -> float:
        folded = candidate.casefold()
        ratio = SequenceMatcher(None, wanted, folded).ratio()
        return max(ratio, 0.6) if len(wanted) > 2 and wanted in folded else ratio

    scores = {candidate: similarity(candidate) for candidate in known}
    close = [candidate for candidate, score in scores.items() if score >= CUTOFF]
    return sorted(close, key=lambda candidate: -scores[candidate])[:n]


def unknown(kind: str, name: str, known: Iterable[str]) -> ProblemError:
    """The error for a `name` that is none of `known`; `kind` says of what ("data set")."""
    known = list(dict.fromkeys(known))
    close = " or ".join(map(repr, nearest(name, known)))
    listed = ", ".join(known[:LISTED]) or "none"
    if len(known) > LISTED:
        listed += f", ... ({len(known)} in all)"
    meant = f" did you mean {close}?" if close else ""
    return ProblemError(f"unknown {kind} {shown(name)};{meant} known: {listed}")


def line(text: Any) -> str:
    """A text in a message: whatever would break the line, or cannot be shown, escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def reason(error: BaseException) -> str:
    """What somebody else's code raised, in a message."""
    return line(textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ..."))


def shown(value: Any) -> str:
    """A value in a message, in a few words."""
    try:
        text = line(repr(value))
    except (ValueError, RecursionError):  # thousands of digits, or of levels
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def in_range(
    value: Any,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    whole: bool = False,
) -> bool:
    """Whether `value` is a number that can be computed with, from `low` to `high`, above `above`.

    True, NaN and infinity are no numbers; nor is one nearer to 0 than 1e-40 that is not 0.
    """
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    size = abs(value)
    return (
        size <= (MOST if whole else LARGEST)
        and not 0 < size < 1 / LARGEST
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
    )


def range_in_words(**bounds: Any) -> str:
    """The range of `in_range` in words, such as "a number above 0"."""
    words = "a whole number" if bounds.get("whole") else "a number"
    names = {"above": "above", "low": "of at least", "high": "at most"}
    ends = {name: bounds[name] for name in names if bounds.get(name) is not None}
    if ends.keys() == {"low", "high"}:
        return f"{words} from {ends['low']:,.12g} to {ends['high']:,.12g}"
    return f"{words} {' and '.join(f'{names[k]} {end:,.12g}' for k, end in ends.items())}".strip()


def number(name: str, value: Any, **bounds: Any) -> Any:
    """`value` itself; ProblemError if it is not `in_range` of the bounds."""
    if not in_range(value, **bounds):
        raise ProblemError(f"{name} must be {range_in_words(**bounds)}, not {shown(value)}")
    return value
