"""WordNet, where it is installed: `nltk` with its wordnet data, or `wn` with an English lexicon."""

from collections.abc import Collection
from typing import Any

ABSENT = "neither nltk with its wordnet data nor wn with an English lexicon is installed"


def installed() -> str | None:
    """The package that provides WordNet here; None if there is none."""
    return _look_up("dog")[0]


def wordnet_words(
    name: str, synonyms: Collection[str] = (), hypernyms: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Synonyms and direct hypernyms of a noun; two empty lists where WordNet has none.

    Of several senses the one that agrees with most of `synonyms`, then with most of `hypernyms`,
    then the most frequent one is taken. Where neither is known, only a single sense has words.
    """
    senses = _look_up(name)[1]
    if synonyms or hypernyms:
        same, above = ({word.casefold() for word in words} for words in (synonyms, hypernyms))
        agreed = [(len(same & _folded(sense)), len(above & _above(sense))) for sense in senses]
        best = max(agreed, default=(0, 0))
        senses = [senses[agreed.index(best)]] if best > (0, 0) else []
    if len(senses) != 1:
        return [], []
    return _words(senses[0]), [word for sense in senses[0].hypernyms() for word in _words(sense)]


def _look_up(name: str) -> tuple[str | None, list[Any]]:
    """The package and its noun senses of a name, most frequent first."""
    try:
        from nltk.corpus import wordnet

        return "nltk", wordnet.synsets(name.replace(" ", "_"), pos="n")
    except (ImportError, LookupError, OSError):  # no package, or its data absent or incomplete
        pass
    try:
        import wn
    except ImportError:
        return None, []
    try:
        return "wn", wn.synsets(name, pos="n", lang="en")
    except wn.Error:  # no English lexicon
        return None, []


def _words(sense: Any) -> list[str]:
    names = sense.lemma_names() if hasattr(sense, "lemma_names") else sense.lemmas()
    return [name.replace("_", " ") for name in names]


def _folded(sense: Any) -> set[str]:
    return {word.casefold() for word in _words(sense)}


def _above(sense: Any) -> set[str]:
    """The words of a sense and of everything that it is a kind of, in lower case."""
    return _folded(sense).union(*map(_above, sense.hypernyms()))
