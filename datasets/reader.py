"""From a folder on disk to a data set: which split file is used, whether it can be, and how an
image is opened.

Every set of the table, photographs and rendered ones alike, goes through `ImageSet`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from engine import write_json_atomic
from engine.log import logger, once
from forgetting.errors import ProblemError

from .mini import render
from .split import Split, read_split
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
    places = {"folder": folder, "image folder": row.images(folder)}
    if not Path(row.folder).is_absolute():
        places = {"data root at": root} | places
    for what, place in places.items():
        if not place.is_dir():
            fetch = f", or try `python -m datasets.download {row.name}`" * bool(row.torchvision)
            return f"no {what} {place}; see DATASETS.md{fetch}"
    return None


def find(row: SetSpec, root: Path) -> Found:
    """The split of a set under `root`: the published file, else one made earlier, else a new one.

    Raises:
        ProblemError: the set is absent (names the path), or its split file or lists are broken.
    """
    where = f"data set {row.name}:"
    if reason := absent(row, root):
        raise ProblemError(f"{where} {reason}")
    folder = root / row.folder
    images = row.images(folder)
    for file in (row.split_file, row.made_split) if row.split_file else ():
        if (folder / file).is_file():
            source = folder / file
            return Found(read_split(source), images, source, comparable=file == row.split_file)
    if row.split_file:
        where += f" no split file {folder / row.split_file}"
        if row.make_split is None:
            raise ProblemError(f"{where}; see DATASETS.md")
        where += ", and none can be made:"
    try:
        return Found(row.make_split(folder, images), images, None, comparable=not row.split_file)
    except ProblemError as error:
        raise ProblemError(f"{where} {error}") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ProblemError(
            f"{where} the official lists in {folder} are not in the known form ({error!r})"
        ) from error


class ImageSet:
    """One row of the table as a data set, with the attributes of Dassl's; Dassl's own class takes
    its class names from the training images alone, and fails on a set that is only evaluated.

    Attributes:
        train_x, val, test: images; train_u: None, no set has unlabelled ones.
        classnames: as the split file spells them, in label order, from all three lists together.
        comparable: False for a split made here.

    Raises:
        ProblemError: anything missing or broken, named with its path.
    """

    row: ClassVar[SetSpec]
    train_u = None

    def __init__(self, cfg: Any) -> None:
        row = self.row
        root = Path(cfg.DATASET.ROOT).expanduser().absolute()
        if row.rendered:
            render(row.name, root / row.folder)
        found = find(row, root)
        _demand_images(row, found)
        _report(row, found, root)
        self.comparable = found.comparable
        self.train_x, self.val, self.test = (
            [Datum(str(found.images / path), label, name) for path, label, name in items]
            for items in found.split.parts.values()
        )
        self.classnames = list(found.split.classnames)
        self.lab2cname = dict(enumerate(self.classnames))
        self.num_classes = len(self.classnames)


def _demand_images(row: SetSpec, found: Found) -> None:
    lost = found.split.missing(found.images)
    if lost:
        again = f"; if they were removed on purpose, delete {row.made_split} and it is made anew"
        raise ProblemError(
            f"data set {row.name}: {len(lost)} of {len(found.split.paths())} images that the split "
            f"names are missing, first {found.images / lost[0]}; `python -m datasets.check` lists "
            f"them, DATASETS.md says where they come from{'' if found.comparable else again}"
        )


def _report(row: SetSpec, found: Found, root: Path) -> None:
    """Say which split is used; keep a new one, so that a user can read it and send it on."""
    parts = found.split.parts
    file = found.source or root / row.folder / row.made_split
    if not row.split_file:
        file = found.images
    elif found.source is None:
        try:
            write_json_atomic(parts, file)
            saved = f"saved as {file}"
        except ProblemError as error:  # data roots are often read-only; the next run makes the same
            saved = f"not saved ({error})"
        logger.info(f"{row.name}: made a split from the raw download, {saved}")
    counts = ", ".join(f"{len(items)} {part}" for part, items in parts.items())
    of = "" if file == Path("/") else f"{file.name}, "  # images of a table may lie anywhere
    once(logging.INFO, f"{row.name}: {of}{len(found.split.classnames)} classes, {counts}")
    if not found.comparable:
        text = (
            f"{row.name}: this is not the published split {row.split_file}: "
            "numbers are not comparable with published ones (DATASETS.md says where to get it)"
        )
        once(logging.WARNING, text)


# Dassl registers classes under their own names, so each row needs a class called like the set.
CLASSES: dict[str, type[ImageSet]] = {
    name: type(name, (ImageSet,), {"row": row}) for name, row in SETS.items()
}


def load(name: str, root: str | Path, images: str = "") -> ImageSet:
    """Read a set from a data root, or `images` of one's own (see `table.own`), without a config.

    Raises:
        ProblemError: unknown name (nearest given), or as `ImageSet`.
    """
    row = spec(name, images)
    kind = CLASSES.get(row.name) or type("OwnImages", (ImageSet,), {"row": row})
    return kind(SimpleNamespace(DATASET=SimpleNamespace(ROOT=str(root))))


def available(root: str | Path) -> dict[str, str | None]:
    """For each set of the table: None if its folder is there (or it is drawn on demand), else the
    reason in one line."""
    return {name: absent(row, Path(root).expanduser()) for name, row in SETS.items()}


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB, decoded to the last pixel.

    Raises:
        ProblemError: a file that is missing, torn, too large or no image, or whose numbers have no
            known range; its text is the reason alone, for a message that names the file.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # Pillow cuts them off at 255: all white
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode} have no known range; save 8 bits")
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ProblemError(reason.replace(f" {str(path)!r}", "")) from error
