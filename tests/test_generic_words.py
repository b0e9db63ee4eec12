"""The generic vocabulary: enough names, of enough kinds, each once and in one form."""

import re
import unicodedata
from importlib.resources import files

from forgetting.models.vocabulary import generic_names

# Latin letters (with accents), digits, and what stands within names: O'Neill, AT&T, C-3PO, St. Paul
FORM = re.compile(r"[^\W_](?:[^\W_]|[ &.'-])*")
NAMES, A_KIND, WORDS, LENGTH = 5_000, 40, 5, 40


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
        assert FORM.fullmatch(name) and name == " ".join(name.split())
        assert name == unicodedata.normalize("NFC", name)
        assert len(name.split()) <= WORDS and len(name) <= LENGTH, name
    folded = {name.casefold() for name in names}
    assert len(folded) == len(names) >= NAMES
    assert generic_names() == names
