"""Splits made from a raw download, for sets whose published split file is missing.

Official lists where the set has them, otherwise a fixed 50/20/30 shuffle a class. Every function
takes the set's folder, its image folder and its rule of class names, and returns a checked `Split`.
None of these gives the images of a published split, so numbers on them are not comparable with
published ones.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from engine import UserError

from .split import PARTS, Item, Split, check_split

ClassName = Callable[[str], str | None]  # name in a raw download -> class name; None: left out

SEED = 1  # part of every shuffle below: changing it changes the images of all made splits
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}


def from_folders(folder: Path, images: Path, class_name: ClassName) -> Split:
    """A folder a class under the image folder: 50% train, 20% val, 30% test of each, by a fixed
    shuffle. The rule of class names renames folders, or leaves them out."""
    items: list[Item] = []
    label = 0
    for group in sorted(path for path in images.iterdir() if path.is_dir()):
        name = class_name(group.name)
        files = sorted(p.name for p in group.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if name is None or not files:
            continue
        items += [(f"{group.name}/{file}", label, name) for file in files]
        label += 1
    if not items:
        raise UserError(f"no folder with images under {images}; see DATASETS.md")
    rest, test = divide(items, 0.3)
    train, val = divide(rest, 0.2 / 0.7)
    return _checked(folder, train, val, test)


def from_cars(folder: Path, images: Path, class_name: ClassName) -> Split:
    """StanfordCars' devkit: `cars_train_annos.mat`, `cars_test_annos_withlabels.mat`,
    `cars_meta.mat`. A fifth of the official training images becomes val."""
    names = [
        class_name(str(name))
        for name in _vector(_load(folder, "cars_meta.mat", "devkit")["class_names"])
    ]

    def items(file: str, subfolder: str) -> list[Item]:
        rows = _vector(_load(folder, file, "devkit")["annotations"])
        return [
            (f"{subfolder}/{row['fname']}", int(row["class"]) - 1, names[int(row["class"]) - 1])
            for row in rows
        ]

    train, val = divide(items("cars_train_annos.mat", "cars_train"), 0.2)
    return _checked(folder, train, val, items("cars_test_annos_withlabels.mat", "cars_test"))


def from_flowers(folder: Path, images: Path, class_name: ClassName) -> Split:
    """OxfordFlowers' `imagelabels.mat` and `setid.mat` (the official parts); class names from
    `cat_to_name.json`, or from torchvision's list where that file is absent."""
    labels = _vector(_load(folder, "imagelabels.mat")["labels"])
    ids = _load(folder, "setid.mat")
    names = _flower_names(folder)

    def items(part: str) -> list[Item]:
        numbers = (int(number) for number in _vector(ids[part]))
        return [
            (f"image_{n:05d}.jpg", int(labels[n - 1]) - 1, names[int(labels[n - 1]) - 1])
            for n in numbers
        ]

    return _checked(folder, items("trnid"), items("valid"), items("tstid"))


def from_dogs(folder: Path, images: Path, class_name: ClassName) -> Split:
    """StanfordDogs' `train_list.mat` and `test_list.mat`. A fifth of the official training images
    becomes val."""

    def items(file: str) -> list[Item]:
        content = _load(folder, file, "lists")
        paths = [str(path) for path in _vector(content["file_list"])]
        labels = [int(label) - 1 for label in _vector(content["labels"])]
        return [
            (path, label, class_name(path.split("/")[0]))
            for path, label in zip(paths, labels, strict=True)
        ]

    train, val = divide(items("train_list.mat"), 0.2)
    return _checked(folder, train, val, items("test_list.mat"))


def divide(items: Iterable[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Take `share` of each class away, at least one image where a class has two or more; both
    parts keep the given order.

    The shuffle depends on the class name and `SEED` only: never on other classes, the folder's
    order on disk, or Python's hash seed.
    """
    by_class: defaultdict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_class[item[2]].append(item)
    kept: list[Item] = []
    taken: list[Item] = []
    for name, group in by_class.items():
        count = min(max(1, round(share * len(group))), len(group) - 1)
        chosen = set(random.Random(f"{SEED}/{name}").sample(range(len(group)), count))
        kept += [item for index, item in enumerate(group) if index not in chosen]
        taken += [item for index, item in enumerate(group) if index in chosen]
    return kept, taken


def _checked(folder: Path, *parts: list[Item]) -> Split:
    """Three lists through the same checks as a split file."""
    content = {
        part: [list(item) for item in items] for part, items in zip(PARTS, parts, strict=True)
    }
    return check_split(content, f"made from {folder}")


def _load(folder: Path, file: str, subfolder: str = "") -> dict[str, Any]:
    """A .mat file of the raw download, from the set's folder or `subfolder` of it: the archives
    have been published both ways."""
    from scipy.io import loadmat  # half a second, for a rare path

    candidates = [folder / subfolder / file, folder / file]
    for path in candidates:
        if path.is_file():
            try:
                return loadmat(path, simplify_cells=True)
            except Exception as error:  # scipy raises many kinds on a torn or foreign file
                raise UserError(f"{path}: is not a readable .mat file ({error})") from error
    raise UserError(f"no {file} at {candidates[0]}; see DATASETS.md")


def _vector(values: Any) -> list[Any]:
    """A .mat array as a flat list; a single entry comes unwrapped from scipy."""
    return np.ravel(np.array(values, dtype=object)).tolist()


def _flower_names(folder: Path) -> list[str]:
    path = folder / "cat_to_name.json"
    if not path.is_file():
        from torchvision.datasets import Flowers102

        return list(Flowers102.classes)
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        return [names[str(number)] for number in range(1, len(names) + 1)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: must map '1', '2', ... to flower names ({error!r})") from error
