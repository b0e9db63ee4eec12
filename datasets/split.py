"""Split files: CoOp's `{"train": [[path, label, class name], ...], "val": ..., "test": ...}`.

Source of the format: github.com/KaiyangZhou/CoOp, DATASETS.md. The files are read as they are;
what is wrong in one is told as file, list and entry, before any image is opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import UserError, inside, write_json_atomic

PARTS = ("train", "val", "test")
Item = tuple[str, int, str]  # (path relative to the image folder, label, class name)


@dataclass(frozen=True)
class Split:
    """The images of a data set: three lists of (relative path, label, class name)."""

    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    classnames: tuple[str, ...]  # in label order, from all three lists together

    def parts(self) -> Iterator[tuple[str, tuple[Item, ...]]]:
        """The three lists with their names."""
        for part in PARTS:
            yield part, getattr(self, part)

    def paths(self) -> list[str]:
        """Every image that is named, once, in file order."""
        return list(dict.fromkeys(path for _, items in self.parts() for path, _, _ in items))


def read_split(path: Path) -> Split:
    """Read and check a split file.

    Raises:
        UserError: no file, no JSON, or an entry that breaks the format (which one, and why).
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"split file {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"split file {path}: is not JSON ({error}); download it again") from error
    return check_split(content, str(path))


def check_split(content: Any, where: str) -> Split:
    """Turn the content of a split file into a `Split`; `where` begins each message.

    Raises:
        UserError: keys, triples, labels, names or paths are not as they must be.
    """
    if not isinstance(content, dict) or any(part not in content for part in PARTS):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"split file {where}: must hold 'train', 'val' and 'test'; found {found}")
    names: dict[int, str] = {}
    lists: dict[str, tuple[Item, ...]] = {}
    for part in PARTS:
        if not isinstance(content[part], list):
            raise UserError(f"split file {where}: {part!r} must be a list of triples")
        lists[part] = tuple(
            _item(entry, names, f"split file {where}: {part}[{index}]")
            for index, entry in enumerate(content[part])
        )
    if not lists["test"]:
        raise UserError(f"split file {where}: 'test' is empty, so nothing can be evaluated")
    absent = next((i for i, label in enumerate(sorted(names)) if i != label), None)
    if absent is not None:
        raise UserError(
            f"split file {where}: labels must be 0 to {max(names)} without a gap; "
            f"no image has label {absent}"
        )
    classnames = tuple(names[label] for label in range(len(names)))
    labels = {name: label for label, name in names.items()}
    for label, name in names.items():
        if labels[name] != label:
            raise UserError(
                f"split file {where}: labels {label} and {labels[name]} are both called {name!r}"
            )
    return Split(**lists, classnames=classnames)


def _item(entry: Any, names: dict[int, str], where: str) -> Item:
    """One checked triple; `names` collects label -> class name over the whole file."""
    if not isinstance(entry, list) or len(entry) != 3:
        raise UserError(f"{where}: must be [path, label, class name], is {entry!r:.80}")
    path, label, name = entry
    if not isinstance(path, str) or not path:
        raise UserError(f"{where}: the path must be a non-empty string, is {path!r:.80}")
    try:
        inside("the image folder", path)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise UserError(f"{where}: the label must be a whole number from 0, is {label!r:.80}")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}: the class name must be a non-empty string, is {name!r:.80}")
    if names.setdefault(label, name) != name:
        raise UserError(f"{where}: label {label} is called {name!r}, but {names[label]!r} before")
    return path, label, name


def missing_images(split: Split, folder: Path) -> list[str]:
    """The images that the split names and `folder` lacks, in file order."""
    return [path for path in split.paths() if not (folder / path).is_file()]


def write_split(split: Split, path: Path) -> None:
    """Write a split in CoOp's form, atomically. Raises UserError if the disk refuses."""
    write_json_atomic({part: [list(item) for item in items] for part, items in split.parts()}, path)
