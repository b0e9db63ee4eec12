"""Retain vocabularies: names of the same kind as a set's classes, one text file a set.

`vocabularies/NAME.txt` has a name a line, `#` begins a comment. `name = Class; Other class` says
that `name` means the same as those classes, so it must leave the retain set when one of them is
forgotten: a synonym that is retained keeps the forgotten class alive.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from engine import UserError

from .names import entries, key
from .table import SETS, spec

FOLDER = Path(__file__).parent / "vocabularies"


def retain_vocabulary(name: str) -> list[str]:
    """The names of a set's vocabulary, lower case, in file order, without repeats, synonyms
    included (the caller removes what `synonyms` names for the classes it forgets).

    Raises:
        UserError: unknown set, or no or an unreadable vocabulary file (named).
    """
    return list(_read(spec(name).name))


def synonyms(name: str) -> dict[str, set[str]]:
    """Class name, as `key` spells it -> the vocabulary names that mean the same.

    Raises:
        UserError: as `retain_vocabulary`.
    """
    words = _read(spec(name).name)
    marked = set().union(*words.values())
    return {known: {word for word, means in words.items() if known in means} for known in marked}


def same_meaning(names: Iterable[str], dataset: str) -> set[str]:
    """What means the same as one of the classes `names`, as `key`s: their own names and what the
    vocabulary of `dataset` marks as their synonyms. A set without a row in the table marks none."""
    own = {key(name) for name in names}
    marked = _read(dataset) if dataset in SETS else {}
    return own | {word for word, means in marked.items() if means & own}


@cache
def _read(name: str) -> dict[str, set[str]]:
    """Vocabulary name -> the classes that it is a synonym of (mostly none)."""
    words: dict[str, set[str]] = {}
    for where, text in entries(FOLDER / f"{name}.txt", f"retain vocabulary of {name}"):
        word, marked, classes = text.partition("=")
        means = {key(part) for part in classes.split(";") if part.strip()}
        if not word.strip() or (marked and not means):
            raise UserError(f"{where}: {text!r} must be 'name' or 'name = Class; Other class'")
        words.setdefault(key(word), set()).update(means)
    return words
