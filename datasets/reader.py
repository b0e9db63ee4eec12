"""From a folder on disk to a data set: which split file is used, and whether it can be.

Every set of the table, photographs and rendered ones alike, goes through `ImageSet`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from engine import UserError

from .split import Split, missing_images, read_split, write_split
from .table import SETS, SetSpec, spec


@dataclass(frozen=True)
class Datum:
    """An image of a set, with the attributes of Dassl's; the file need not be there."""

    impath: str
    label: int
    classname: str
    domain: int = 0


@dataclass(frozen=True)
class Found:
    """A set's split, with where it came from."""

    split: Split
    images: Path  # the folder that the split's paths are relative to
    source: Path | None  # the split file, None: just made
    comparable: bool  # whether numbers on it can be compared with published ones


def absent(row: SetSpec, root: Path) -> str | None:
    """Why a set cannot be read from `root`, in one line; None if it seems to be there.

    Looks at folders only: a broken split file is found by `find`, a missing image by `ImageSet`.
    """
    if row.rendered:
        return None
    folder = root / row.folder
    if not root.is_dir():
        return f"no data root at {root}; see DATASETS.md"
    if not folder.is_dir():
        return f"no folder {folder}; see DATASETS.md"
    if not (folder / row.image_folder).is_dir():
        return f"no image folder {folder / row.image_folder}; see DATASETS.md"
    return None


def find(row: SetSpec, root: Path) -> Found:
    """The split of a set under `root`: the published file, else one made earlier, else a new one.

    Raises:
        UserError: the set is absent (names the path), or its split file or lists are broken.
    """
    reason = absent(row, root)
    if reason:
        raise UserError(f"data set {row.name}: {reason}")
    folder = root / row.folder
    images = folder / row.image_folder
    for file in row.split_files:
        if (folder / file).is_file():
            return Found(read_split(folder / file), images, folder / file, comparable=True)
    made = folder / row.made_split
    if made.is_file():
        return Found(read_split(made), images, made, comparable=False)
    wanted = f"no split file {folder / row.split_files[0]}"
    if row.make_split is None:
        raise UserError(f"data set {row.name}: {wanted}; see DATASETS.md")
    try:
        split = row.make_split(folder, images, row.class_name)
    except UserError as error:
        raise UserError(f"data set {row.name}: {wanted}, and none can be made: {error}") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"data set {row.name}: {wanted}, and none can be made: the official lists in {folder} "
            f"are not in the known form ({error!r})"
        ) from error
    return Found(split, images, None, comparable=False)


def render_if_new(row: SetSpec, root: Path) -> None:
    """Draw a Mini set under `root` unless it is there; the folder appears whole or not at all.

    Raises:
        UserError: the disk refuses, or something else lies where the set belongs.
    """
    folder = root / row.folder
    split = folder / row.split_files[0]
    if split.is_file():
        return
    # Looked at again, after the folder: another process may have put the whole set there just now.
    if folder.is_dir() and any(folder.iterdir()) and not split.is_file():
        raise UserError(
            f"data set {row.name}: {folder} exists, but holds no {split.name}; "
            "move it away, and the set is drawn anew"
        )
    from .mini import render  # drawing libraries, only needed the first time

    print(f"{row.name}: drawing the images into {folder}")
    render(row.name, folder)


class ImageSet:
    """One row of the table as a data set, with the attributes of Dassl's; Dassl's own class takes
    its class names from the training images alone, and fails on a set that is only evaluated.

    Attributes:
        train_x, val, test: images; train_u: None, no set has unlabelled ones.
        classnames: as the split file spells them, in label order, from all three lists together.
        comparable: False for a split made here.

    Raises:
        UserError: anything missing or broken, named with its path.
    """

    row: ClassVar[SetSpec]
    train_u = None

    def __init__(self, cfg: Any) -> None:
        row = self.row
        root = Path(cfg.DATASET.ROOT).expanduser().absolute()
        if row.rendered:
            render_if_new(row, root)
        found = find(row, root)
        self.dataset_dir = str(root / row.folder)
        self.image_dir = str(found.images)
        self.comparable = found.comparable
        _demand_images(row, found)
        _report(row, found, root)
        self.train_x, self.val, self.test = (
            [Datum(str(found.images / path), label, name) for path, label, name in items]
            for _, items in found.split.parts()
        )
        self.classnames = list(found.split.classnames)
        self.lab2cname = dict(enumerate(self.classnames))
        self.num_classes = len(self.classnames)


def _demand_images(row: SetSpec, found: Found) -> None:
    lost = missing_images(found.split, found.images)
    if lost:
        again = (
            ""
            if found.comparable
            else f"; if they were removed on purpose, delete {row.made_split} and it is made anew"
        )
        raise UserError(
            f"data set {row.name}: {len(lost)} of {len(found.split.paths())} images that the split "
            f"names are missing, first {found.images / lost[0]}; "
            f"`python -m datasets.check` lists them, DATASETS.md says where they come from{again}"
        )


def _report(row: SetSpec, found: Found, root: Path) -> None:
    """Say which split is used; keep a new one, so that a user can read it and send it on."""
    split = found.split
    counts = ", ".join(f"{len(items)} {part}" for part, items in split.parts())
    source = found.source
    if source is None:
        source = root / row.folder / row.made_split
        try:
            write_split(split, source)
            print(f"{row.name}: made a split from the raw download, saved as {source}")
        except UserError as error:  # data roots are often read-only; the next run makes the same
            print(f"{row.name}: made a split from the raw download, not saved ({error})")
    print(f"{row.name}: {source.name}, {len(split.classnames)} classes, {counts}")
    if not found.comparable:
        print(
            f"{row.name}: this is not the published split {row.split_files[0]}: "
            "numbers are not comparable with published ones (DATASETS.md says where to get it)"
        )


# Dassl registers classes under their own names, so each row needs a class called like the set.
CLASSES: dict[str, type[ImageSet]] = {
    name: type(name, (ImageSet,), {"row": row, "__module__": __name__})
    for name, row in SETS.items()
}


def load(name: str, root: str | Path) -> ImageSet:
    """Read a set from a data root, without a config.

    Raises:
        UserError: unknown name (nearest given), or as `ImageSet`.
    """
    return CLASSES[spec(name).name](SimpleNamespace(DATASET=SimpleNamespace(ROOT=str(root))))


def available(root: str | Path) -> dict[str, str | None]:
    """For each set of the table: None if its folder is there (or it is drawn on demand), else the
    reason in one line."""
    return {name: absent(row, Path(root).expanduser()) for name, row in SETS.items()}
