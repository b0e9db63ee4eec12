"""A generic vocabulary: names of what photographs commonly show, by kind.

Each kind is a file KIND.txt beside this one: a name a line, sorted, and no name twice in all files;
`#` begins a comment. The lists were written from general knowledge and copied from no other list;
they say what is common, not how often it is seen.
"""

from __future__ import annotations

from importlib.resources import files

SUFFIX = ".txt"


def generic() -> dict[str, list[str]]:
    """The names of every kind, in the order of the files: `generic()["birds"]` lists birds."""
    found = sorted(
        (file for file in files(__name__).iterdir() if file.name.endswith(SUFFIX)),
        key=lambda file: file.name,
    )
    return {
        file.name.removesuffix(SUFFIX): names(file.read_text(encoding="utf-8")) for file in found
    }


def names(text: str) -> list[str]:
    """The names in the text of one file, without its comments and empty lines."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]
