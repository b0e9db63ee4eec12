"""Other words for a set's classes: committed lists, and a rule for cars.

`NAME.txt` has a class per line, `#` begins a comment:

    class; other spelling | synonym; synonym | hypernym; hypernym | description; description

Cells at the end may be left out. Other spellings are of a published split that cut names.
"""

import hashlib
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from datasets.names import clean_name, entries, key
from datasets.table import SETS
from datasets.words.cars import car_words
from forgetting.errors import ProblemError

FOLDER = Path(__file__).parent


class Words(NamedTuple):
    """Other words for one class: names, names of what it is a kind of, and how it looks."""

    synonyms: list[str]
    hypernyms: list[str]
    descriptions: list[str]


NONE = Words([], [], [])


def words_of(name: str, dataset: str | None, others: Collection[str] = ()) -> Words:
    """Other words for a class, committed ones first, without its own name and those of `others`.
    ProblemError if the list of its set cannot be read or is not in the form above."""
    own = committed(name, dataset)
    is_car = dataset == "StanfordCars"
    rule = car_words(clean_name(name), read_list("bodies")) if is_car else NONE
    # The list decides what is a hypernym, over the rule.
    synonyms = _without(own.synonyms + rule[0], [name, *others, *own.hypernyms])
    hypernyms = _without(own.hypernyms + rule[1], [name, *others, *synonyms])
    return Words(synonyms, hypernyms, _without(own.descriptions + rule[2], [name, *others]))


def committed(name: str, dataset: str | None) -> Words:
    """The words of a set's committed list for a class, as written; none without list or entry."""
    return read_list(dataset).get(key(name), NONE) if dataset in SETS else NONE


def halves(name: str, dataset: str) -> tuple[list[str], list[str]]:
    """The committed synonyms of a class that `mini` was trained with, and those held out: by a
    checksum, so that nobody chose the easy half."""
    words = sorted(
        committed(name, dataset).synonyms,
        key=lambda word: hashlib.sha256(f"{name}/{word}".encode()).digest(),
    )
    middle = (len(words) + 1) // 2
    return words[:middle], words[middle:]


def _without(words: Iterable[str], others: Iterable[str]) -> list[str]:
    """The words that are none of `others` in any spelling, each once."""
    taken, new = set(map(key, others)), {}
    for word in words:
        if key(word) not in taken:
            new.setdefault(key(word), word)
    return list(new.values())


@cache
def read_list(dataset: str) -> dict[str, Words]:
    """Class name, as `key` spells it -> its words, in file order; empty if the set has no list."""
    path, words = FOLDER / f"{dataset}.txt", {}
    for where, text in entries(path, f"other words for {dataset}") if path.exists() else ():
        names, *cells = [
            [clean_name(word) for word in cell.split(";") if word.strip()]
            for cell in text.split("|")
        ]
        if not names or not any(cells) or len(cells) > len(NONE):
            raise ProblemError(f"{where}: {text!r} must be 'class | synonyms | hypernyms | texts'")
        for name in map(key, names):
            if name in words:
                raise ProblemError(f"{where}: {name!r} was there before")
            words[name] = Words(*cells, *NONE[len(cells) :])
    return words
