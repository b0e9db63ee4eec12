"""The generic vocabulary: enough names, of enough kinds, each once and in one form."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from importlib.resources import files
from itertools import pairwise

import pytest

from forgetting.models.words import generic, names

# Latin letters (with accents), digits, and what stands within names: O'Neill, AT&T, C-3PO, St. Paul
FORM = re.compile(r"[^\W_](?:[^\W_]|[ &.'-])*")
NAMES = 5_000
A_KIND = 40
WORDS = 5
LENGTH = 40


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
            yield from (f"{kind}: {name!r} {fault}" for fault in misshapen(name))
            if name.casefold() in seen:
                yield f"{name} in {kind} and in {seen[name.casefold()]}"
            seen[name.casefold()] = kind
    for name in seen:
        yield from (f"{name} and {one}" for one in singulars(name) if one in seen)
    if len(seen) < NAMES:
        yield f"{len(seen)} names in all"


def misshapen(name: str) -> Iterator[str]:
    """What is wrong with the form of one name."""
    if name != " ".join(name.split()):
        yield "has spaces that nothing needs"
    if not 1 <= len(name.split()) <= WORDS:
        yield "has too many words or none"
    if len(name) > LENGTH:
        yield "is too long"
    if name != unicodedata.normalize("NFC", name):
        yield "is not in composed form"
    if not FORM.fullmatch(name) or not all(map(latin, name)):
        yield "has characters of another kind"


def latin(character: str) -> bool:
    """Not a letter, or one of the Latin alphabet."""
    return not character.isalpha() or unicodedata.name(character).startswith("LATIN")


def singulars(name: str) -> set[str]:
    """What a name may be the plural of: baskets a basket, berries a berry, knives a knife."""
    found = set()
    for ending, others in (("s", [""]), ("es", [""]), ("ies", ["y"]), ("ves", ["f", "fe"])):
        if name.endswith(ending) and not name.endswith("ss"):
            found |= {name.removesuffix(ending) + other for other in others}
    return found


def test_vocabulary_has_no_fault() -> None:
    assert not list(faults(generic()))


def test_every_file_is_a_kind() -> None:
    texts = [
        file for file in files("forgetting.models.words").iterdir() if file.name.endswith(".txt")
    ]
    assert sorted(generic()) == sorted(file.name.removesuffix(".txt") for file in texts)
    for file in texts:
        text = file.read_text(encoding="utf-8")
        lines = text.removesuffix("\n").split("\n")
        # Nothing is left to trim, and a comment stands on a line of its own.
        assert text.endswith("\n") and lines[0].startswith("# "), file.name
        assert names(text) == [line for line in lines if not line.startswith("# ")], file.name


def test_callers_cannot_change_each_others_names() -> None:
    generic()["birds"].clear()
    assert "eagle" in generic()["birds"]


def test_comments_and_empty_lines_are_no_names() -> None:
    assert names("# birds\n\nauk\n crow  # black\n#wren\n") == ["auk", "crow"]


@pytest.mark.parametrize(
    ("added", "fault"),
    [
        ("EAGLE", "EAGLE in more and in birds"),
        ("eagles", "eagles and eagle"),
        ("goldfinches", "goldfinches and goldfinch"),
        ("canaries", "canaries and canary"),
        ("aa  name", "has spaces that nothing needs"),
        (" aa", "has spaces that nothing needs"),
        ("", "has too many words or none"),
        ("one of those six word names", "has too many words or none"),
        ("a" * 41, "is too long"),
        ("cafe\u0301 table", "is not in composed form"),
        ("птица", "has characters of another kind"),
        ("bird, small", "has characters of another kind"),
        ("zz bird", "after zz bird"),
    ],
)
def test_a_fault_is_found(added: str, fault: str) -> None:
    """The control: one bad name among good ones does not pass."""
    kinds = generic()
    more = [f"zy{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(A_KIND)]
    assert not list(faults({**kinds, "more": more}))
    assert any(fault in found for found in faults({**kinds, "more": [added, *more]}))


def test_too_few_are_found() -> None:
    found = list(faults({"birds": generic()["birds"][: A_KIND - 1]}))
    assert "birds: 39 names" in found and "39 names in all" in found
