"""One-line errors for the user, and the names that a mistyped one was closest to."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

CUTOFF = 0.4  # below this similarity a suggestion puzzles more than it helps
LISTED = 20  # known names written out in a message; a set of cars has 196


class UserError(Exception):
    """Bad input. Its text is one line: what is wrong, where, and what would be right."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The at most `n` names of `known` that resemble `name`, closest first, case ignored.

    A name that contains `name` counts as near ("ranger" finds "2011 Ford Ranger SuperCab").
    """
    wanted = name.casefold()

    def similarity(candidate: str) -> float:
        folded = candidate.casefold()
        ratio = SequenceMatcher(None, wanted, folded).ratio()
        return max(ratio, 0.6) if len(wanted) > 2 and wanted in folded else ratio

    scored = [(similarity(candidate), candidate) for candidate in dict.fromkeys(known)]
    close = [pair for pair in scored if pair[0] >= CUTOFF]
    close.sort(key=lambda pair: -pair[0])
    return [candidate for _, candidate in close[:n]]


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a `name` that is none of `known`; `kind` says of what ("data set")."""
    known = list(dict.fromkeys(known))
    close = nearest(name, known)
    meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else ";"
    listed = ", ".join(known[:LISTED]) or "none"
    if len(known) > LISTED:
        listed += f", ... ({len(known)} in all)"
    return UserError(f"unknown {kind} {name!r}{meant} known: {listed}")
