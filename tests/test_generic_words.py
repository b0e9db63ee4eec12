"""The generic vocabulary: enough names, of enough kinds, each once and in one form."""

from __future__ import annotations

import re
import unicodedata
from importlib.resources import files

from forgetting.models.vocabulary import generic_names

# Latin letters (with accents), digits, and what stands within names: O'Neill, AT&T, C-3PO, St. Paul
FORM = re.compile(r"[^\W_](?:[^\W_]|[ &.'-])*")
NAMES, A_KIND, WORDS, LENGTH = 5_000, 40, 5, 40


def is_latin(name: str) -> bool:
    """Composed, and with letters of the Latin alphabet alone."""
    letters = [unicodedata.name(c) for c in name if c.isalpha()]
    return name == unicodedata.normalize("NFC", name) and all(x[:5] == "LATIN" for x in letters)


def singulars(name: str) -> set[str]:
    """What a name may be the plural of: baskets a basket, berries a berry, knives a knife."""
    found = set()
    for ending, others in (("s", [""]), ("es", [""]), ("ies", ["y"]), ("ves", ["f", "fe"])):
        if name.endswith(ending) and not name.endswith("ss"):
            found |= {name.removesuffix(ending) + other for other in others}
    return found


def test_vocabulary_has_no_fault_and_is_read_whole() -> None:
    """A file has a comment at its head, and nothing else but names, in order."""
    names = []
    for file in sorted(files("forgetting.models.words").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".txt"):
            text = file.read_text(encoding="utf-8")
            lines = text.removesuffix("\n").split("\n")
            assert text.endswith("\n") and lines[0].startswith("# "), file.name
            listed = [line for line in lines if not line.startswith("# ")]
            assert len(listed) >= A_KIND and listed == sorted(listed, key=str.casefold), file.name
            names += listed
    for name in names:
        assert FORM.fullmatch(name) and name == " ".join(name.split()) and is_latin(name)
        assert len(name.split()) <= WORDS and len(name) <= LENGTH, name
    folded = {name.casefold() for name in names}
    assert len(folded) == len(names) >= NAMES
    assert not [name for name in folded if singulars(name) & folded]
    assert generic_names() == names
