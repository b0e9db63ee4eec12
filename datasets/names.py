"""Class names: how one spelling is found among others, and text files of names.

A data set keeps its own spelling in `.classnames` (Caltech101 writes `sea_horse`, a car is called
`2012 Ram C/V Cargo Van Minivan`); a text made for CLIP uses `clean_name(name)`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.files import read_text
from forgetting.errors import ProblemError, nearest
from forgetting.retain import key


def clean_name(name: str) -> str:
    """The name as words: underscores to spaces, single spaces, spelling and case kept."""
    return " ".join(name.replace("_", " ").split())


def is_text(value: object) -> bool:
    """Whether a value is a text that Unicode can spell: JSON and file names hold others."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def match(name: str, classnames: Sequence[str], dataset: str = "") -> str:
    """The class of `classnames` that `name` means, in the data set's own spelling. An exact
    spelling wins; otherwise case and underscores are ignored, if that leaves one class. Raises
    ProblemError, with the nearest classes, if none or several fit."""
    if name in classnames:
        return name
    if not clean_name(name):
        raise ProblemError("the name of a class is empty")
    same = [classname for classname in classnames if key(classname) == key(name)]
    if len(same) == 1:
        return same[0]
    where = f"data set {dataset!r}" if dataset else "the data set"
    if same:
        choices = ", ".join(map(repr, same))
        raise ProblemError(f"class {name!r} of {where} is ambiguous: write one of {choices}")
    close = ", ".join(map(repr, nearest(name, classnames)))
    raise ProblemError(f"{where} has no class {name!r}; nearest: {close}")


def flaw(classnames: Sequence[str]) -> str:
    """What is wrong with a set's class names, in label order; empty if each means one class. Two
    may differ in case alone: ImageNet has a dog "Cardigan" and a garment "cardigan"."""
    labels: dict[str, int] = {}
    for label, name in enumerate(classnames):
        if not is_text(name):
            return f"label {label} has a name that is no text: {name!r:.80}"
        if not clean_name(name):
            return f"label {label} has an empty name"
        if (other := labels.setdefault(clean_name(name), label)) != label:
            return f"labels {other} and {label} are both called {name!r}"
    return ""


def entries(path: Path, what: str) -> Iterator[tuple[str, str]]:
    """The entries of a text file, one per line, `#` begins a comment: where each stands, for
    messages that say `what` the file holds, and its text. ProblemError if it cannot be read."""
    for number, line in enumerate(read_text(path, f"{what}:").splitlines(), start=1):
        if text := line.split("#", 1)[0].strip():
            yield f"{what}: {path}, line {number}", text
