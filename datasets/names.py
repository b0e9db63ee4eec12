"""Class names: how one spelling is found among a data set's classes.

A data set keeps its own spelling in `.classnames` (Caltech101 writes `sea_horse`, cars are called
`2012 Ram C/V Cargo Van Minivan`); a text made for CLIP uses `plain(name)`.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine import UserError, nearest


def plain(name: str) -> str:
    """The name as words: underscores to spaces, single spaces, spelling and case kept."""
    return " ".join(name.replace("_", " ").split())


def key(name: str) -> str:
    """What two spellings of one name have in common: `plain`, in lower case."""
    return plain(name).casefold()


def match(name: str, classnames: Sequence[str], dataset: str = "") -> str:
    """The class of `classnames` that `name` means, in the data set's own spelling.

    Exact spelling wins; otherwise case and underscores are ignored, if that leaves one class.

    Raises:
        UserError: no class, or several, fit; names the data set and the nearest classes.
    """
    if name in classnames:
        return name
    same = [known for known in classnames if key(known) == key(name)]
    if len(same) == 1:
        return same[0]
    where = f"data set {dataset!r}" if dataset else "the data set"
    if same:
        choices = ", ".join(repr(known) for known in same)
        raise UserError(f"class {name!r} of {where} is ambiguous: write one of {choices}")
    close = ", ".join(repr(known) for known in nearest(name, list(classnames)))
    raise UserError(
        f"{where} has no class {name!r}; nearest: {close} ({len(classnames)} classes in all)"
    )
