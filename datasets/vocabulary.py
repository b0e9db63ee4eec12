"""Retain vocabularies: names of the same kind as a set's classes, one text file per set.

`vocabularies/NAME.txt` has one name per line, `#` begins a comment. `name = Class; Other class`
says that `name` means the same as those classes. It is not retained when one of them is forgotten:
a synonym that is retained keeps the forgotten class alive.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from forgetting.errors import ProblemError

from .names import entries, key
from .table import SETS

FOLDER = Path(__file__).parent / "vocabularies"


def retain_vocabulary(name: str) -> list[str]:
    """The names of a set's vocabulary, lower case, in file order, without repeats, synonyms
    included. A set without a file has none. Raises ProblemError for a broken file (named)."""
    return list(_read(name))


def same_meaning(names: Iterable[str], dataset: str) -> set[str]:
    """What means the same as one of the classes `names`, as `key`s: their own names and what the
    vocabulary of `dataset` marks as their synonyms."""
    own = {key(name) for name in names}
    return own | {word for word, means in _read(dataset).items() if means & own}


@cache
def _read(name: str) -> dict[str, set[str]]:
    """Vocabulary name -> the classes that it is a synonym of (mostly none)."""
    words: dict[str, set[str]] = {}
    path = FOLDER / f"{name}.txt"
    is_known = name in SETS and path.exists()  # any other name may lead anywhere
    for where, text in entries(path, f"retain vocabulary of {name}") if is_known else ():
        word, has_classes, classes = text.partition("=")
        means = {key(part) for part in classes.split(";") if part.strip()}
        if not word.strip() or (has_classes and not means):
            raise ProblemError(f"{where}: {text!r} must be 'name' or 'name = Class; Other class'")
        words.setdefault(key(word), set()).update(means)
    return words
