"""The generic vocabulary: enough names, of enough kinds, each once and in one form."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise

import pytest

from forgetting.models.vocabulary import generic_names

# Latin letters (with accents), digits, and what stands within names: O'Neill, AT&T, C-3PO, St. Paul
FORM = re.compile(r"[^\W_](?:[^\W_]|[ &.'-])*")
NAMES, A_KIND, WORDS, LENGTH = 5_000, 40, 5, 40


@pytest.fixture(scope="module")
def kinds() -> dict[str, list[str]]:
    """The names of every kind; a file has a comment at its head, and nothing else but names."""
    found = {}
    for file in sorted(files("forgetting.models.words").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".txt"):
            text = file.read_text(encoding="utf-8")
            lines = text.removesuffix("\n").split("\n")
            assert text.endswith("\n") and lines[0].startswith("# "), file.name
            found[file.name] = [line for line in lines if not line.startswith("# ")]
    return found


def faults(kinds: dict[str, list[str]]) -> Iterator[str]:
    """What is wrong with a vocabulary, in words: nothing of one that may be committed."""
    seen: dict[str, str] = {}
    for kind, listed in kinds.items():
        if len(listed) < A_KIND:
            yield f"{kind}: {len(listed)} names"
        for before, name in pairwise(listed):
            if before.casefold() > name.casefold():
                yield f"{kind}: {name} after {before}"
        for name in listed:
            if not FORM.fullmatch(name) or name != " ".join(name.split()) or not is_latin(name):
                yield f"{name!r} is misshapen"
            if len(name.split()) > WORDS or len(name) > LENGTH:
                yield f"{name!r} is too long"
            if name.casefold() in seen:
                yield f"{name} in {kind} and in {seen[name.casefold()]}"
            seen[name.casefold()] = kind
    for name in seen:
        yield from (f"{name} and {one}" for one in singulars(name) if one in seen)
    if len(seen) < NAMES:
        yield f"{len(seen)} names in all"


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


def test_vocabulary_has_no_fault_and_is_read_whole(kinds) -> None:
    assert not list(faults(kinds))
    assert generic_names() == [name for listed in kinds.values() for name in listed]


@pytest.mark.parametrize(
    ("added", "fault"),
    [
        *(("EAGLE", "EAGLE in more and in birds"), ("zz bird", "after zz bird")),
        *(("eagles", "and eagle"), ("goldfinches", "and goldfinch"), ("canaries", "and canary")),
        *(
            (name, "misshapen")
            for name in ("aa  name", " aa", "", "cafe\u0301 table", "птица", "a, b")
        ),
        *((name, "too long") for name in ("one of those six word names", "a" * 41)),
    ],
)
def test_a_fault_is_found(kinds, added: str, fault: str) -> None:
    """The control: one bad name among good ones does not pass."""
    more = [f"zy{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(A_KIND)]
    assert not list(faults({**kinds, "more": more}))
    assert any(fault in found for found in faults({**kinds, "more": [added, *more]}))
