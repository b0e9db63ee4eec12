"""Other words for a set's classes: committed lists, a rule for cars, WordNet where installed.

`NAME.txt` has a class a line, `#` begins a comment:

    class; other spelling | synonym; synonym | hypernym; hypernym | description; description

Cells at the end may be left out. Other spellings are names under which the class is found too, for
a published split that cut them. The lists serve an audit, which asks for a forgotten class in other
words; no list is needed to forget.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from datasets.names import clean_name, entries, key
from datasets.table import SETS
from datasets.words.cars import car_words
from datasets.words.wordnet import wordnet_words
from forgetting.errors import ProblemError

FOLDER = Path(__file__).parent
CELLS = 4


class Words(NamedTuple):
    """Other words for one class: some mean the same, some mean more, some say how it looks."""

    synonyms: list[str]
    hypernyms: list[str]
    descriptions: list[str]


NONE = Words([], [], [])


def words_of(name: str, dataset: str | None, others: Iterable[str] = ()) -> Words:
    """Other words for a class, committed ones first, without the class's own name.

    Args:
        dataset: the set whose list is read; a set that the table does not have has no list.
        others: names that belong to other classes and are never given.

    Raises:
        ProblemError: a list that cannot be read or is not in the form above.
    """
    synonyms, hypernyms, descriptions = listed_words(name, dataset, others)
    taken = {key(name), *map(key, others)}
    same, above = wordnet_words(clean_name(name), synonyms, hypernyms)
    listed = taken | set(map(key, [*synonyms, *hypernyms]))
    synonyms += _new(same, listed)
    hypernyms += _new(above, listed | set(map(key, same)))
    return Words(synonyms, hypernyms, descriptions)


def listed_words(name: str, dataset: str | None, others: Collection[str] = ()) -> Words:
    """The same from the committed lists and rules alone, whatever is installed."""
    own = committed(name, dataset)
    ruled = car_words(clean_name(name)) if dataset == "StanfordCars" else NONE
    known = Words(*(listed + more for listed, more in zip(own, ruled, strict=True)))
    taken = {key(name), *map(key, others)}
    # The list decides what is a hypernym, over the rule and over WordNet.
    synonyms = _new(known.synonyms, taken | set(map(key, own.hypernyms)))
    hypernyms = _new(known.hypernyms, taken | set(map(key, synonyms)))
    return Words(synonyms, hypernyms, _new(known.descriptions, taken))


def committed(name: str, dataset: str | None) -> Words:
    """The words of a set's committed list for a class, as written; none without list or entry."""
    return _read(dataset).get(key(name), NONE) if dataset in SETS else NONE


def _new(words: Iterable[str], taken: set[str]) -> list[str]:
    """The words that are not in `taken`, each once."""
    found: dict[str, str] = {}
    for word in words:
        if key(word) not in taken:
            found.setdefault(key(word), word)
    return list(found.values())


@cache
def _read(dataset: str) -> dict[str, Words]:
    """Class name, as `key` spells it -> its words; empty if the set has no list."""
    path = FOLDER / f"{dataset}.txt"
    found: dict[str, Words] = {}
    for where, text in entries(path, f"other words for {dataset}") if path.exists() else ():
        names, *cells = [
            [clean_name(word) for word in cell.split(";") if word.strip()]
            for cell in text.split("|")
        ]
        if not names or not any(cells) or len(cells) >= CELLS:
            raise ProblemError(
                f"{where}: {text!r} must be "
                "'class | synonym; synonym | hypernym; hypernym | description'"
            )
        cells += [[]] * (CELLS - 1 - len(cells))
        for name in map(key, names):
            if name in found:
                raise ProblemError(f"{where}: {name!r} was there before")
            found[name] = Words(*cells)
    return found
