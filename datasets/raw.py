"""Splits made from a raw download, for sets whose published split file is missing.

Official lists where the set has them, otherwise a fixed 50/20/30 shuffle of each class. Every
function takes the set's folder and its image folder, and returns a checked `Split`. None of these
gives the images of a published split, so numbers on them are not comparable with published ones.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from engine import UserError
from engine.files import read_json

from .names import plain
from .split import PARTS, Item, Split, check_split

SEED = 1  # part of every shuffle below: changing it changes the images of all made splits
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
NO_NAMES: Mapping[str, str | None] = MappingProxyType({})


def from_folders(folder: Path, images: Path, names: Mapping[str, str | None] = NO_NAMES) -> Split:
    """A folder for each class under the image folder: 50% train, 20% val, 30% test of each, by a
    fixed shuffle. `names` renames folders, or leaves out those that it maps to None."""
    items: list[Item] = []
    label = 0
    for group in sorted(path for path in images.iterdir() if path.is_dir()):
        name = names.get(group.name, group.name)
        files = sorted(p.name for p in group.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if name is not None and files:
            items += [(f"{group.name}/{file}", label, name) for file in files]
            label += 1
    if not items:
        raise UserError(f"no folder with images under {images}; see DATASETS.md")
    rest, test = divide(items, 0.3)
    return _checked(folder, *divide(rest, 0.2 / 0.7), test)


def from_cars(folder: Path, images: Path) -> Split:
    """StanfordCars' devkit: `cars_train_annos.mat`, `cars_test_annos_withlabels.mat`,
    `cars_meta.mat`. A fifth of the official training images becomes val; names have the year first
    (`Spyker C8 Coupe 2009` -> `2009 Spyker C8 Coupe`)."""
    names = [
        re.sub(r"^(.+) (\d{4})$", r"\2 \1", str(name).strip())
        for name in _column(folder, "devkit/cars_meta.mat", "class_names")
    ]

    def items(part: str, file: str) -> list[Item]:
        rows = _column(folder, f"devkit/{file}", "annotations")
        labels = [int(row["class"]) - 1 for row in rows]
        return [
            (f"cars_{part}/{row['fname']}", label, names[label])
            for row, label in zip(rows, labels, strict=True)
        ]

    train, val = divide(items("train", "cars_train_annos.mat"), 0.2)
    return _checked(folder, train, val, items("test", "cars_test_annos_withlabels.mat"))


def from_flowers(folder: Path, images: Path) -> Split:
    """OxfordFlowers' `imagelabels.mat` and `setid.mat` (the official parts); class names from
    `cat_to_name.json`, or from torchvision's list where that file is absent."""
    labels = [int(label) - 1 for label in _column(folder, "imagelabels.mat", "labels")]
    names = _flower_names(folder)

    def items(part: str) -> list[Item]:
        numbers = map(int, _column(folder, "setid.mat", part))
        return [(f"image_{n:05d}.jpg", labels[n - 1], names[labels[n - 1]]) for n in numbers]

    return _checked(folder, items("trnid"), items("valid"), items("tstid"))


def from_dogs(folder: Path, images: Path) -> Split:
    """StanfordDogs' `train_list.mat` and `test_list.mat`. A fifth of the official training images
    becomes val; names come from folders (`n02086240-Shih-Tzu` -> `Shih-Tzu`)."""

    def items(file: str) -> list[Item]:
        paths = map(str, _column(folder, f"lists/{file}", "file_list"))
        labels = _column(folder, f"lists/{file}", "labels")
        return [
            (path, int(label) - 1, plain(path.split("/")[0].partition("-")[2]))
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
        for index, item in enumerate(group):
            (taken if index in chosen else kept).append(item)
    return kept, taken


def _checked(folder: Path, *parts: list[Item]) -> Split:
    """Train, val and test through the same checks as a split file."""
    return check_split(dict(zip(PARTS, parts, strict=True)), f"made from {folder}")


def _column(folder: Path, file: str, name: str) -> list[Any]:
    """One array of a .mat file of the raw download, flat. The file lies where `file` says or in
    the set's folder itself: the archives have been published both ways."""
    from scipy.io import loadmat  # half a second, for a rare path

    path = next((p for p in (folder / file, folder / Path(file).name) if p.is_file()), None)
    if path is None:
        raise UserError(f"no {Path(file).name} at {folder / file}; see DATASETS.md")
    try:
        content = loadmat(path, simplify_cells=True)
    except Exception as error:  # scipy raises many kinds on a torn or foreign file
        raise UserError(f"{path}: is not a readable .mat file ({error})") from error
    return np.ravel(np.array(content[name], dtype=object)).tolist()


def _flower_names(folder: Path) -> list[str]:
    path = folder / "cat_to_name.json"
    if not path.is_file():
        from torchvision.datasets import Flowers102

        return list(Flowers102.classes)
    names = read_json(path)
    try:
        return [names[str(number)] for number in range(1, len(names) + 1)]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: must map '1', '2', ... to flower names ({error!r})") from error
