"""Splits made from what lies on disk: a raw download, folders, or a table of one's own.

Official lists where the set has them, otherwise a fixed 50/20/30 shuffle of each class; of images
of one's own all are test images, unless they say otherwise. Every function takes the set's folder
and its image folder, and returns a checked `Split`. Where a set has a published split file none of
these gives its images, so numbers on them are not comparable with published ones.
"""

from __future__ import annotations

import csv
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from engine.files import read_json
from forgetting.errors import ProblemError

from .names import clean_name
from .split import PARTS, Item, Split, check_split

SEED = 1  # part of every shuffle below: changing it changes the images of all made splits
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
TABLES = (".csv", ".tsv")
COLUMNS = ("path", "class", "split")  # of a table of one's own; the last may be missing
# Folders that divide a set -> the part that their images are.
FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
FOLDERS |= {"test": "test", "testing": "test"}
CLASSNAMES = "classnames.txt"
# Two names stand twice in CoOp's list of ImageNet's; these are WordNet's.
IMAGENET_NAMES = {"n04008634": "projectile", "n04355933": "sunglass"}
NO_NAMES: Mapping[str, str | None] = MappingProxyType({})


def top_folder(path: str) -> str:
    """The class folder of an image: the first on its path."""
    return path.partition("/")[0]


def sun_class(path: str) -> str:
    """SUN397's class as CoOp writes it: `a/apartment_building/outdoor/x.jpg` is of the class
    `outdoor apartment_building`."""
    return " ".join(reversed(path.split("/")[1:-1]))


def from_folders(
    folder: Path,
    images: Path,
    names: Mapping[str, str | None] = NO_NAMES,
    group: Callable[[str], str] = top_folder,
    divided: bool = True,
) -> Split:
    """A folder for each class under the image folder: 50% train, 20% val, 30% test of each, by a
    fixed shuffle; all test if not `divided`.

    Args:
        names: renames folders, or leaves out those that it maps to None.
        group: the class folder of an image by its path.
    """
    items = _by_folder(images, names, group)
    if not divided:
        return _checked(folder, [], [], items)
    rest, test = divide(items, 0.3)
    return _checked(folder, *divide(rest, 0.2 / 0.7), test)


def _by_folder(
    images: Path, names: Mapping[str, str | None], group: Callable[[str], str] = top_folder
) -> list[Item]:
    """The images below `images` by the folder of their class. Folders that are numbers come in
    their order."""
    files: defaultdict[str, list[str]] = defaultdict(list)
    for path in _image_files(images):
        if "/" in path and names.get(group(path), "") is not None:
            files[group(path)].append(path)
    if not files:
        raise ProblemError(f"no folder with images under {images}; see DATASETS.md")
    order = sorted(files, key=lambda name: name.zfill(9) if name.isdecimal() else name)
    named = [(path, name) for name in order for path in files[name]]
    labels = {name: label for label, name in enumerate(order)}
    return [(path, labels[name], names.get(name) or name) for path, name in named]


def _image_files(folder: Path) -> list[str]:
    """The paths of all images below a folder, sorted; links are followed, hidden names are not."""

    def refuse(error: OSError) -> None:
        raise ProblemError(f"{error.filename} cannot be read ({error.strerror})") from error

    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(place))  # a link may lead back up
        folders[:] = [
            name
            for name in folders
            if name[0] != "." and os.path.realpath(os.path.join(place, name)) not in seen
        ]
        found += [
            os.path.relpath(os.path.join(place, file), folder)
            for file in files
            if file[0] != "." and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
        ]
    return sorted(found)


def from_lists(folder: Path, images: Path, files: Mapping[str, str], line: str) -> Split:
    """Official lists beside the image folder, a JPEG file a line.

    Args:
        files: the part -> its list; line: a pattern of its lines, with the groups `path` (without
            ".jpg") and `name` (of the class).
    """
    found = {}
    for part, file in files.items():
        path = images.parent / file
        if not path.is_file():
            raise ProblemError(f"no {path.name} at {path}; see DATASETS.md")
        rows = [re.match(line, text) for text in _lines(path)]
        if None in rows:
            raise ProblemError(f"{path}, line {rows.index(None) + 1}: not in the known form")
        found[part] = [(f"{row['path']}.jpg", row["name"]) for row in rows]
    names = sorted({name for rows in found.values() for _, name in rows})
    label = {name: number for number, name in enumerate(names)}
    parts = ([(path, label[n], n) for path, n in found.get(part, [])] for part in PARTS)
    return _checked(folder, *parts)


def from_imagenet(folder: Path, images: Path) -> Split:
    """ImageNet and its kin: a folder a class, called by its WordNet number or its place in CoOp's
    `classnames.txt`, which gives the names. All images are test images."""
    names = _classnames(folder)
    if not names:
        raise ProblemError(f"no {CLASSNAMES} at {folder / CLASSNAMES}; see DATASETS.md")
    names |= {number: name for number, name in IMAGENET_NAMES.items() if number in names}
    by_place = {str(place): name for place, name in enumerate(names.values())}
    items = _by_folder(images, by_place | names)
    for path, _, name in items:
        if name == top_folder(path):
            raise ProblemError(f"{folder / CLASSNAMES} has no line for the folder {images / name}")
    return _checked(folder, [], [], items)


def from_own_folders(folder: Path, images: Path) -> Split:
    """A folder a class, or folders `train`, `val`, `test` with a folder a class in each. The test
    images are those of `test`, else of `val`; all where nothing divides them. A `classnames.txt`
    may rename folders, a line each: the folder's name, a space, the class."""
    below = [path for path in images.iterdir() if path.is_dir() and path.name[0] != "."]
    parts = {path.name: FOLDERS.get(path.name.lower()) for path in below}
    names = _classnames(images)
    if not parts or None in parts.values() or any(map(_holds_images, below)):
        return _checked(images, [], [], _by_folder(images, names))
    items: dict[str, list[Item]] = {part: [] for part in PARTS}
    labels: dict[str, int] = {}
    for name, part in sorted(parts.items()):
        for path, _, label in _by_folder(images / name, names):
            number = labels.setdefault(label, len(labels))
            items[part].append((f"{name}/{path}", number, label))
    last = next(part for part in reversed(PARTS) if items[part])  # the nearest to test images
    items["test"], items[last] = items[last], items["test"]
    return _checked(images, *items.values())


def _holds_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())


def from_table(folder: Path, images: Path, table: Path) -> Split:
    """A CSV file of one's own: columns `path` and `class`, and perhaps `split` (train, val, test),
    named in its first line, in any order, among others. Commas, semicolons or tabs divide them.
    Paths are absolute or relative to the file's folder; without `split` all are test images."""
    where = f"images {table}"
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            mark = max("\t;,", key=first.count)
            titles = next(csv.reader([first], delimiter=mark), [])
            reader = csv.reader(file, delimiter=mark, strict=True)  # its lines follow the first
            rows = [(reader.line_num + 1, row) for row in reader if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ProblemError(f"{where} cannot be read as CSV ({error})") from error
    header = [title.strip().lower() for title in titles]
    if "path" not in header or "class" not in header:
        raise ProblemError(
            f"{where}: its first line must name the columns path and class (and split, if it has "
            f"one), and is {first.strip()!r:.80}"
        )
    path, name, split = (header.index(key) if key in header else None for key in COLUMNS)
    items: dict[str, list[Item]] = {part: [] for part in PARTS}
    labels: dict[str, int] = {}
    for number, row in rows:
        if len(row) != len(header):
            raise ProblemError(f"{where}, line {number}: {len(row)} cells, not {len(header)}")
        part = FOLDERS.get(row[split].strip().lower()) if split is not None else "test"
        if part is None:
            raise ProblemError(f"{where}, line {number}: split must be train, val or test")
        file = os.path.abspath(table.parent / row[path].strip())
        label = row[name].strip()
        items[part].append((file.lstrip("/"), labels.setdefault(label, len(labels)), label))
    return _checked(table, *items.values())


def _classnames(folder: Path) -> dict[str, str]:
    """Folder -> class of a `classnames.txt`, in its order; empty if there is none."""
    lines = _lines(folder / CLASSNAMES) if (folder / CLASSNAMES).is_file() else []
    pairs = [line.split(maxsplit=1) for line in lines]
    for number, pair in enumerate(pairs, start=1):
        if len(pair) != 2:
            raise ProblemError(
                f"{folder / CLASSNAMES}, line {number}: must be a folder and a class"
            )
    return dict(pairs)


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are neither empty nor comments."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ProblemError(f"{path} cannot be read ({error})") from error
    return [line for line in lines if line.strip() and not line.startswith("#")]


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
    beside = images.parent  # in torchvision's layout not the set's folder
    labels = [int(label) - 1 for label in _column(beside, "imagelabels.mat", "labels")]
    names = _flower_names(folder)

    def items(part: str) -> list[Item]:
        numbers = map(int, _column(beside, "setid.mat", part))
        return [(f"image_{n:05d}.jpg", labels[n - 1], names[labels[n - 1]]) for n in numbers]

    return _checked(folder, items("trnid"), items("valid"), items("tstid"))


def from_dogs(folder: Path, images: Path) -> Split:
    """StanfordDogs' `train_list.mat` and `test_list.mat`. A fifth of the official training images
    becomes val; names come from folders (`n02086240-Shih-Tzu` -> `Shih-Tzu`)."""

    def items(file: str) -> list[Item]:
        paths = map(str, _column(folder, f"lists/{file}", "file_list"))
        labels = _column(folder, f"lists/{file}", "labels")
        return [
            (path, int(label) - 1, clean_name(path.split("/")[0].partition("-")[2]))
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
        raise ProblemError(f"no {Path(file).name} at {folder / file}; see DATASETS.md")
    try:
        content = loadmat(path, simplify_cells=True)
    except Exception as error:  # scipy raises many kinds on a torn or foreign file
        raise ProblemError(f"{path}: is not a readable .mat file ({error})") from error
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
        raise ProblemError(f"{path}: must map '1', '2', ... to flower names ({error!r})") from error
