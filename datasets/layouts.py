"""Splits made from a set's folder and its image folder: by official lists where there are some,
otherwise 30 % of each class are test images by a fixed shuffle. Of images of one's own all are test
images, unless they say otherwise.
"""

import csv
import io
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import read_json, read_text
from forgetting.errors import ProblemError

from .names import clean_name, flaw
from .split import PARTS, Split, check_split

SEED = 1  # part of every shuffle: changing it changes the images of all made splits
TEST = 0.3  # of each class
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
TABLES = (".csv", ".tsv")
PART_NAMES = {  # of folders and cells that divide a set -> the part that their images are
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
CLASSNAMES = "classnames.txt"
# Two names stand twice in CoOp's list of ImageNet's; these are WordNet's.
IMAGENET_NAMES = {"n04008634": "projectile", "n04355933": "sunglass"}
Row = tuple[str, str, str]  # part, path relative to the image folder, class name


def _split(folder: Path, rows: Sequence[Row], classnames: Iterable[str] = ()) -> Split:
    """The split of some rows, checked. Labels are places in `classnames`, else by the rows."""
    names = list(classnames) or dict.fromkeys(name for _, _, name in rows)
    label = {name: number for number, name in enumerate(names)}
    parts: dict[str, list] = {part: [] for part in PARTS}
    for part, path, name in rows:
        parts[part].append((path, label[name], name))
    return check_split(parts, f"made from {folder}")


# A folder per class


def top_folder(path: str) -> str:
    """The class folder of an image: the first on its path."""
    return path.partition("/")[0]


def from_folders(
    folder: Path,
    images: Path,
    rename: Mapping[str, str | None] = {},
    group: Callable[[str], str] = top_folder,
    divided: bool = True,
    prefix: str = "",
) -> Split:
    """A folder for each class under the image folder; all are test images if not `divided`.
    `rename` gives the class of a folder, None leaves it out; `group` the folder of an image."""
    rows = []
    for folder_name, paths in _by_folder(images, rename, group).items():
        name = folder_name.removeprefix(prefix)
        tests = set(tested(name, paths) if divided else paths)
        rows += [("test" if path in tests else "train", path, name) for path in paths]
    return _split(folder, rows)


all_tested = partial(from_folders, divided=False)


def from_sun(folder: Path, images: Path) -> Split:
    """SUN397's classes as CoOp writes them: `a/apartment_building/outdoor/x.jpg` is of the class
    `outdoor apartment_building`."""
    return from_folders(
        folder, images, group=lambda path: " ".join(reversed(path.split("/")[1:-1]))
    )


def tested(name: str, paths: Sequence[str]) -> list[str]:
    """The test images of a class, at least one where it has two or more. The shuffle depends on
    the class name and `SEED` only: never on other classes or the folder's order on disk."""
    count = min(max(1, round(TEST * len(paths))), len(paths) - 1)
    return random.Random(f"{SEED}/{name}").sample(paths, count)


def from_imagenet(folder: Path, images: Path) -> Split:
    """ImageNet and its kin: a folder per class, called by its WordNet number or by its place in
    CoOp's `classnames.txt`, which gives the names. All images are test images."""
    names = _classnames(folder)
    if not names:
        raise ProblemError(f"no {CLASSNAMES} at {folder / CLASSNAMES}; see DATASETS.md")
    names |= {number: name for number, name in IMAGENET_NAMES.items() if number in names}
    names |= {str(place): name for place, name in enumerate(list(names.values()))}
    for path in images.iterdir():
        if path.is_dir() and path.name not in names and path.name[0] != ".":
            raise ProblemError(f"{folder / CLASSNAMES} has no line for the folder {path}")
    return all_tested(folder, images, names)


def from_own_folders(folder: Path, images: Path) -> Split:
    """A folder per class, or folders `train`, `val`, `test` with a folder per class in each. The
    test images are those of `test`, else of `val`; all where nothing divides them. A
    `classnames.txt` may rename folders, one per line: the folder's name, a space, the class."""
    below = [path for path in images.iterdir() if path.is_dir() and path.name[0] != "."]
    parts = {path.name: PART_NAMES.get(path.name.lower()) for path in below}
    names = _classnames(images)
    holds_images = any(
        path.suffix.lower() in IMAGE_SUFFIXES for place in below for path in place.iterdir()
    )
    if not parts or None in parts.values() or holds_images:
        return all_tested(images, images, names)
    last = max(parts.values(), key=PARTS.index)
    rows = [
        ("test" if part == last else part, f"{name}/{path}", classname)
        for name, part in sorted(parts.items())
        for classname, paths in _by_folder(images / name, names).items()
        for path in paths
    ]
    return _split(images, rows)


def _by_folder(
    images: Path, rename: Mapping[str, str | None], group: Callable[[str], str] = top_folder
) -> dict[str, list[str]]:
    """The images below `images` by class. Folders that are numbers are in numerical order.
    ProblemError if two folders have one class."""
    files: defaultdict[str, list[str]] = defaultdict(list)
    for path in _image_files(images):
        if "/" in path:
            files[group(path)].append(path)
    order = sorted(files, key=lambda name: name.zfill(9) if name.isdecimal() else name)
    classes = {name: c for name in order if (c := rename.get(name, name)) is not None}
    if not classes:
        raise ProblemError(f"no folder with images under {images}; see DATASETS.md")
    if problem := flaw(list(classes.values())):
        raise ProblemError(f"split made from {images}: {problem}")
    return {classname: files[name] for name, classname in classes.items()}


def _image_files(folder: Path) -> list[str]:
    """The paths of all images below a folder, sorted; links are followed, hidden names are not."""

    def refuse(error: OSError) -> None:
        raise ProblemError(f"{error.filename} cannot be read ({error.strerror})") from error

    paths, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(place))  # a link may lead back up
        folders[:] = [
            name
            for name in folders
            if name[0] != "." and os.path.realpath(os.path.join(place, name)) not in seen
        ]
        paths += [
            os.path.relpath(os.path.join(place, file), folder)
            for file in files
            if file[0] != "." and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
        ]
    return sorted(paths)


def _classnames(folder: Path) -> dict[str, str]:
    """Folder -> class of a `classnames.txt`, in its order; empty if there is none."""
    path = folder / CLASSNAMES
    pairs = [line.split(maxsplit=1) for line in _lines(path)] if path.exists() else []
    for number, pair in enumerate(pairs, start=1):
        if len(pair) != 2:
            raise ProblemError(f"{path}, line {number}: must be a folder and a class")
    return dict(pairs)


# Lists


def from_lists(folder: Path, images: Path, files: Mapping[str, str], line: str) -> Split:
    """Official lists beside the image folder, a file for each part, one JPEG image per line, which
    is a pattern with the groups `path` (without ".jpg") and `name` (of the class)."""
    rows: list[Row] = []
    for part, file in files.items():
        path = images.parent / file
        for number, text in enumerate(_lines(path), start=1):
            if not (entry := re.match(line, text)):
                raise ProblemError(f"{path}, line {number}: not in the known form")
            rows.append((part, f"{entry['path']}.jpg", entry["name"]))
    return _split(folder, rows, sorted({name for _, _, name in rows}))


def from_cub(folder: Path, images: Path) -> Split:
    """CUB-200-2011's `images.txt` (`1 001.Black_footed_Albatross/x.jpg`) and
    `train_test_split.txt` (`1 0`: a test image), by the number of the image."""
    paths = dict(text.split(maxsplit=1) for text in _lines(folder / "images.txt"))
    parts = dict(text.split() for text in _lines(folder / "train_test_split.txt"))
    rows = [
        ({"0": "test", "1": "train"}[parts[number]], path, clean_name(top_folder(path)[4:]))
        for number, path in paths.items()
    ]
    return _split(folder, rows)


def from_table(folder: Path, images: Path, table: Path) -> Split:
    """A CSV file of one's own: columns `path` and `class`, and perhaps `split` (train, val, test),
    named in its first line, in any order, among others. Commas, semicolons or tabs divide them.
    Paths are absolute or relative to the file's folder; without `split` all are test images."""
    text = read_text(table, "images")
    first = text.partition("\n")[0].strip()
    delimiter = max("\t;,", key=first.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        reader.fieldnames = [title.strip().lower() for title in reader.fieldnames or ()]
        if not {"path", "class"} <= {*reader.fieldnames}:
            raise ProblemError(
                f"images {table}: its first line must name the columns path and class (and split, "
                f"if it has one), and is {first!r:.80}"
            )
        for cells in filter(lambda row: any(row.values()), reader):
            where = f"images {table}, line {reader.line_num}:"
            if None in cells or None in cells.values():
                raise ProblemError(f"{where} not {len(reader.fieldnames)} cells")
            part = PART_NAMES.get(cells.get("split", "test").strip().lower())
            if part is None or not cells["class"].strip():
                what = "the class is empty" if part else "split must be train, val or test"
                raise ProblemError(f"{where} {what}")
            path = os.path.abspath(table.parent / cells["path"].strip()).lstrip("/")
            rows.append((part, path, cells["class"].strip()))
    except csv.Error as error:
        raise ProblemError(f"images {table} cannot be read as CSV ({error})") from error
    return _split(table, rows)


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are neither empty nor comments."""
    if not path.exists():
        raise ProblemError(f"no {path.name} at {path}; see DATASETS.md")
    lines = read_text(path, "").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def from_flowers(folder: Path, images: Path) -> Split:
    """OxfordFlowers' `imagelabels.mat` and `setid.mat` (the official parts); class names from
    `cat_to_name.json`, or from torchvision's list where that file is absent."""
    if (path := folder / "cat_to_name.json").is_file():
        by_number = read_json(path)
        names = [by_number[str(number)] for number in range(1, len(by_number) + 1)]
    else:
        from torchvision.datasets import Flowers102

        names = getattr(Flowers102, "classes", None) or read_json(path)  # 0.19 has no list
    beside = images.parent  # in torchvision's layout not the set's folder
    labels = _column(beside / "imagelabels.mat", "labels")
    rows = [
        (part, f"image_{number:05d}.jpg", names[int(labels[number - 1]) - 1])
        for part, column in zip(PARTS, ("trnid", "valid", "tstid"), strict=True)
        for number in map(int, _column(beside / "setid.mat", column))
    ]
    return _split(folder, rows, names)


def _column(path: Path, name: str) -> list[Any]:
    """One array of a file in MATLAB's format, flat."""
    from scipy.io import loadmat  # half a second, for a rare path

    if not path.is_file():
        raise ProblemError(f"no {path.name} at {path}; see DATASETS.md")
    try:
        content = loadmat(path, simplify_cells=True)
    except Exception as error:  # scipy raises many kinds on a torn or foreign file
        raise ProblemError(f"{path}: is not a readable .mat file ({error})") from error
    return np.ravel(content[name]).tolist()
