"""Which of a class's listed synonyms `mini` was trained with, and which are held out.

A checksum decides, so that nobody chose the easy half, and every other form of words is held out
for one class and trained for the next.
"""

from __future__ import annotations

import hashlib

from datasets.words.lexicon import committed


def halves(name: str, dataset: str) -> tuple[list[str], list[str]]:
    """The synonyms of a class's committed list, halved: (trained, held out), without WordNet's.

    A list of odd length trains the one more. Raises ProblemError as `words_of` does.
    """
    words = sorted(
        committed(name, dataset).synonyms,
        key=lambda word: hashlib.sha256(f"{name}/{word}".encode()).digest(),
    )
    middle = (len(words) + 1) // 2
    return words[:middle], words[middle:]
