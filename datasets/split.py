"""Split files: CoOp's `{"train": [[path, label, class name], ...], "val": ..., "test": ...}`.

Source of the format: github.com/KaiyangZhou/CoOp, DATASETS.md. The files are read as they are;
what is wrong in one is told as file, list and entry, before any image is opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import inside
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
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ProblemError(f"{where} must hold 'train', 'val' and 'test'; found {found}")
    names: dict[int, str] = {}
    labels: dict[Path, int] = {}
    for part in PARTS:
        if not isinstance(content[part], list):
            raise ProblemError(f"{where} {part!r} must be a list of triples")
        for index, entry in enumerate(content[part]):
            _check_item(entry, names, labels, f"{where} {part}[{index}]:")
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


def _check_item(entry: Any, names: dict[int, str], labels: dict[Path, int], where: str) -> None:
    """Refuse an entry that is no triple, or contradicts the `names` by label and the `labels` by
    image that those before it left behind."""
    if not isinstance(entry, list | tuple) or len(entry) != 3:
        raise ProblemError(f"{where} must be [path, label, class name], is {entry!r:.80}")
    path, label, name = entry
    if not isinstance(path, str) or not path:
        raise ProblemError(f"{where} the path must be a non-empty string, is {path!r:.80}")
    try:
        image = inside("the image folder", path)
    except ProblemError as error:
        raise ProblemError(f"{where} {error}") from error
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise ProblemError(f"{where} the label must be a whole number from 0, is {label!r:.80}")
    if not isinstance(name, str) or not name.strip():
        raise ProblemError(f"{where} the class name must be a non-empty string, is {name!r:.80}")
    if names.setdefault(label, name) != name:
        raise ProblemError(f"{where} label {label} is called {name!r}, but {names[label]!r} before")
    if labels.setdefault(image, label) != label:
        raise ProblemError(f"{where} {path!r} has label {label}, but {labels[image]} before")
