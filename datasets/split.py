"""A data set's images in train, val and test, as CoOp's split files hold them
(github.com/KaiyangZhou/CoOp, DATASETS.md):
`{"train": [[path, label, class name], ...], "val": [...], "test": [...]}`.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgetting.errors import ProblemError

from .names import flaw

PARTS = ("train", "val", "test")
Item = tuple[str, int, str]  # (path relative to the image folder, label, class name)


@dataclass(frozen=True)
class Split:
    """The images of a data set by part; `classnames` in label order, of all parts together."""

    parts: dict[str, list[Item]]
    classnames: list[str]

    def paths(self) -> list[str]:
        """Every image that is named, once, in file order."""
        return list(dict.fromkeys(path for items in self.parts.values() for path, _, _ in items))

    def missing(self, folder: Path) -> list[str]:
        """The images that are named and that `folder` lacks, in file order."""
        return [path for path in self.paths() if not (folder / path).is_file()]

    def sizes(self) -> str:
        """How many images each part has, in words."""
        return ", ".join(f"{len(items)} {part}" for part, items in self.parts.items() if items)


def check_split(content: Any, where: str) -> Split:
    """Turn the content of a split file into a `Split`; ProblemError, which begins with `where`, if
    keys, triples, labels, names or paths are not as they must be."""
    where = f"split {where}:"
    if not isinstance(content, dict) or any(type(content.get(p)) is not list for p in PARTS):
        raise ProblemError(f"{where} must hold the lists 'train', 'val' and 'test'")
    names: dict[int, str] = {}  # label -> class name
    labels: dict[Path, int] = {}  # image -> label
    for part in PARTS:
        for index, entry in enumerate(content[part]):
            if problem := _problem(entry, names, labels):
                raise ProblemError(f"{where} {part}[{index}]: {problem}")
    if not content["test"]:
        raise ProblemError(f"{where} 'test' is empty, so nothing can be evaluated")
    for expected, label in enumerate(sorted(names)):
        if label != expected:
            raise ProblemError(f"{where} labels begin at 0 without a gap; none is {expected}")
    classnames = [names[label] for label in range(len(names))]
    if problem := flaw(classnames):
        raise ProblemError(f"{where} {problem}")
    return Split({part: [tuple(entry) for entry in content[part]] for part in PARTS}, classnames)


def _problem(entry: Any, names: dict[int, str], labels: dict[Path, int]) -> str:
    """What is wrong with an entry, by itself or beside the `names` by label and the `labels` by
    image of those before it; empty if nothing is."""
    path, label, name = entry if isinstance(entry, list | tuple) and len(entry) == 3 else [None] * 3
    are_texts = isinstance(path, str) and isinstance(name, str)
    if type(label) is not int or label < 0 or not are_texts or not path or not name.strip():
        return f"must be [path, label from 0, class name], is {entry!r:.80}"
    if (other := names.setdefault(label, name)) != name:
        return f"label {label} is called {name!r}, but {other!r} before"
    image = Path(os.path.normpath(path))
    if "\0" in path or image.is_absolute() or image.parts[:1] == ("..",):
        return f"path {path!r} leads out of the image folder"
    if (other := labels.setdefault(image, label)) != label:
        return f"{path!r} has label {label}, but {other} before"
    return ""
