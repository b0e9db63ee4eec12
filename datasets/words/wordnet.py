"""WordNet, where it is installed: `nltk` with its wordnet data, or `wn` with an English lexicon.

Neither is among the requirements. Where both are absent the committed lists stand alone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

ABSENT = "neither nltk with its wordnet data nor wn with an English lexicon is installed"


def installed() -> str | None:
    """The package that answers for WordNet here, None if there is none."""
    found = _lookup("dog")
    return found[0] if found else None


def wordnet_words(
    name: str, synonyms: Collection[str] = (), hypernyms: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Synonyms and direct hypernyms of a noun; two empty lists where WordNet has none.

    A word has several senses (a crane lifts loads or flies). The one that agrees with what is known
    of the name already is taken: with most of `synonyms`, then with most of `hypernyms`, then the
    most frequent. Where nothing is known, only a name of a single sense is answered for.
    """
    found = _lookup(name)
    senses = found[1] if found else []
    if synonyms or hypernyms:
        same = {word.casefold() for word in synonyms}
        above = {word.casefold() for word in hypernyms}
        agreed = [
            (len(same & set(map(str.casefold, _words(sense)))), len(above & _above(sense)))
            for sense in senses
        ]
        best = max(agreed, default=(0, 0))
        senses = [senses[agreed.index(best)]] if best > (0, 0) else []
    if len(senses) != 1:
        return [], []
    return _words(senses[0]), [word for sense in senses[0].hypernyms() for word in _words(sense)]


def _lookup(name: str) -> tuple[str, list[Any]] | None:
    """The package and its noun senses of a name, most frequent first; None without WordNet."""
    try:
        from nltk.corpus import wordnet

        return "nltk", wordnet.synsets(name.replace(" ", "_"), pos="n")
    except (ImportError, LookupError, OSError):  # no package, or its data absent or not whole
        pass
    try:
        import wn
    except ImportError:
        return None
    try:
        return "wn", wn.synsets(name, pos="n", lang="en")
    except wn.Error:  # no English lexicon
        return None


def _words(sense: Any) -> list[str]:
    names = sense.lemma_names() if hasattr(sense, "lemma_names") else sense.lemmas()
    return [name.replace("_", " ") for name in names]


def _above(sense: Any) -> set[str]:
    """The words of a sense and of everything that it is a kind of, in lower case."""
    words, waiting, seen = set(), [sense], set()
    while waiting:
        sense = waiting.pop()
        if sense in seen:
            continue
        seen.add(sense)
        words.update(word.casefold() for word in _words(sense))
        waiting.extend(sense.hypernyms())
    return words
