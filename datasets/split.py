"""Splits of a data set into train, val and test, and the files that hold them.

The format is CoOp's (github.com/KaiyangZhou/CoOp, DATASETS.md):
`{"train": [[path, label, class name], ...], "val": [...], "test": [...]}`. Every split passes
`check_split` once, whether it was read from a file or made by `datasets.layouts`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.files import read_json
from forgetting.errors import ProblemError

from .names import flaw

PARTS = ("train", "val", "test")
Item = tuple[str, int, str]  # (path relative to the image folder, label, class name)


@dataclass(frozen=True)
class Split:
    """The images of a data set.

    Attributes:
        parts: the three lists of (relative path, label, class name), by name.
        classnames: in label order, from all three lists together.
    """

    parts: dict[str, list[Item]]
    classnames: list[str]

    def paths(self) -> list[str]:
        """Every image that is named, once, in file order."""
        return list(dict.fromkeys(path for items in self.parts.values() for path, _, _ in items))

    def missing(self, folder: Path) -> list[str]:
        """The images that are named and that `folder` lacks, in file order."""
        return [path for path in self.paths() if not (folder / path).is_file()]

    def sizes(self, omit_empty: bool = False) -> str:
        """How many images each part has, in words."""
        counts = {part: len(items) for part, items in self.parts.items()}
        return ", ".join(f"{n} {part}" for part, n in counts.items() if n or not omit_empty)


def read_split(path: Path) -> Split:
    """Read and check a split file.

    Raises:
        ProblemError: no file, no JSON, or an entry that breaks the format (which one, and why).
    """
    return check_split(read_json(path, "split file"), str(path))


def check_split(content: Any, where: str) -> Split:
    """Turn the content of a split file into a `Split`; `where` begins each message.

    Raises:
        ProblemError: keys, triples, labels, names or paths are not as they must be.
    """
    where = f"split file {where}:"
    if not isinstance(content, dict) or any(part not in content for part in PARTS):
        keys = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ProblemError(f"{where} must hold 'train', 'val' and 'test'; it holds {keys}")
    names: dict[int, str] = {}  # label -> class name
    labels: dict[Path, int] = {}  # image -> label
    for part in PARTS:
        if not isinstance(content[part], list):
            raise ProblemError(f"{where} {part!r} must be a list of triples")
        for index, entry in enumerate(content[part]):
            if problem := _problem(entry, names, labels):
                raise ProblemError(f"{where} {part}[{index}]: {problem}")
    if not content["test"]:
        raise ProblemError(f"{where} 'test' is empty, so nothing can be evaluated")
    for expected, label in enumerate(sorted(names)):
        if label != expected:
            raise ProblemError(
                f"{where} labels must be 0 to {max(names)} without a gap; "
                f"no image has label {expected}"
            )
    classnames = [names[label] for label in range(len(names))]
    if problem := flaw(classnames):
        raise ProblemError(f"{where} {problem}")
    return Split({part: [tuple(entry) for entry in content[part]] for part in PARTS}, classnames)


def _problem(entry: Any, names: dict[int, str], labels: dict[Path, int]) -> str:
    """What is wrong with an entry, by itself or beside the `names` by label and the `labels` by
    image of those before it; empty if nothing is."""
    if not isinstance(entry, list | tuple) or len(entry) != 3:
        return f"must be [path, label, class name], is {entry!r:.80}"
    path, label, name = entry
    if not isinstance(path, str) or not path:
        return f"the path must be a non-empty string, is {path!r:.80}"
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        return f"the label must be a whole number from 0, is {label!r:.80}"
    if not isinstance(name, str) or not name.strip():
        return f"the class name must be a non-empty string, is {name!r:.80}"
    if (other := names.setdefault(label, name)) != name:
        return f"label {label} is called {name!r}, but {other!r} before"
    image = Path(os.path.normpath(path))
    if "\0" in path or image.is_absolute() or image.parts[:1] == ("..",):
        return f"path {path!r} leads out of the image folder"
    if (other := labels.setdefault(image, label)) != label:
        return f"{path!r} has label {label}, but {other} before"
    return ""
