"""From a folder on disk to a data set: which split is used, whether it can be, and how an image
is opened. Every set of the table, photographs and rendered ones, goes through `ImageSet`.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageOps

from engine.files import write_json_atomic
from engine.log import logger, once
from forgetting.errors import ProblemError, line

from .mini import render
from .split import Split, read_split
from .table import SETS, SetSpec, spec

# The shorter side of an image is scaled to the model's, so a long strip would fill the memory.
ELONGATION = 100  # an image is at most so many times as long as it is wide
# Pillow refuses images of more than 179 million pixels, and warns of those of half as many.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Datum:
    """An image of a set, with the attributes of Dassl's; the file need not be there."""

    impath: str
    label: int
    classname: str
    domain: int = 0


@dataclass(frozen=True)
class LocatedSplit:
    """A set's split, with where it came from."""

    split: Split
    images: Path  # the folder that the split's paths are relative to
    source: Path | None  # the split file; None: just made
    comparable: bool  # whether numbers on it can be compared with published ones


def absent(row: SetSpec, root: Path) -> str | None:
    """Why a set cannot be read from `root`, in one line; None if it seems to be there.

    Looks at folders only: a broken split file is found by `locate`, a missing image by `ImageSet`.
    """
    if row.rendered:
        return None
    folder = root / row.folder
    needed = {"folder": folder, "image folder": row.images(folder)}
    if not Path(row.folder).is_absolute():
        needed = {"data root at": root} | needed
    for what, path in needed.items():
        if not path.is_dir():
            reason = f"no {what} {path}; see DATASETS.md"
            if row.torchvision:
                reason += f", or try `python -m datasets.download {row.name}`"
            return reason
    return None


def locate(row: SetSpec, root: Path) -> LocatedSplit:
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
            split = read_split(folder / file)
            return LocatedSplit(split, images, folder / file, comparable=file == row.split_file)
    if row.split_file:
        where += f" no split file {folder / row.split_file}"
        if row.make_split is None:
            raise ProblemError(f"{where}; see DATASETS.md")
        where += ", and none can be made:"
    try:
        split = row.make_split(folder, images)
    except ProblemError as error:
        raise ProblemError(f"{where} {error}") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ProblemError(
            f"{where} the official lists in {folder} are not in the known form ({error!r})"
        ) from error
    return LocatedSplit(split, images, None, comparable=not row.split_file)


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
        located = locate(row, root)
        _require_images(row, located)
        _report(row, located, root / row.folder)
        self.comparable = located.comparable
        self.train_x, self.val, self.test = (
            [Datum(str(located.images / path), label, name) for path, label, name in items]
            for items in located.split.parts.values()
        )
        self.classnames = list(located.split.classnames)
        self.lab2cname = dict(enumerate(self.classnames))
        self.num_classes = len(self.classnames)


def _require_images(row: SetSpec, located: LocatedSplit) -> None:
    missing = located.split.missing(located.images)
    if missing:
        again = f"; if they were removed on purpose, delete {row.made_split} and it is made anew"
        raise ProblemError(
            f"data set {row.name}: {len(missing)} of {len(located.split.paths())} images that the "
            f"split names are missing, first {located.images / missing[0]}; `python -m "
            "datasets.check` lists them, DATASETS.md says where they come from"
            f"{'' if located.comparable else again}"
        )


def _report(row: SetSpec, located: LocatedSplit, folder: Path) -> None:
    """Say which split is used; keep a new one, so that a user can read it and send it on."""
    split, source = located.split, located.source
    if row.split_file and source is None:
        source = folder / row.made_split
        try:
            write_json_atomic(split.parts, source)
            saved = f"saved as {source}"
        except ProblemError as error:  # data roots are often read-only; the next run makes the same
            saved = f"not saved ({error})"
        logger.info(f"{row.name}: made a split from the raw download, {saved}")
    source = source or located.images
    name = f"{source.name}, " if source.name else ""  # images of a table may be anywhere
    text = f"{row.name}: {name}{len(split.classnames)} classes, {split.sizes()}"
    once(logging.INFO, text)
    if not located.comparable:
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
    """Read a set from a data root, or `images` of one's own (see `table.own_images`), without a
    config.

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


def read_image(
    path: str | Path,
    formats: Sequence[str] | None = None,
    megapixels: float = math.inf,
    upright: bool = False,
) -> Image.Image:
    """An image file as RGB, decoded to the last pixel. Its size is checked before it is decoded.

    Args:
        formats: Pillow's names of those that are read; None: all.
        megapixels: at most, beside Pillow's own limit of 179.
        upright: whether to turn the image as its Exif data says. CLIP's benchmarks do not.

    Raises:
        ProblemError: a file that is missing, torn, too large or no image, or whose numbers have no
            known range; its text is the reason alone, for a message that names the file.
    """
    try:
        if not Path(path).is_file():
            raise ProblemError("no such file")
        with Image.open(path, formats=formats) as image:  # reads the header alone
            short, long = sorted(image.size)
            if long > ELONGATION * short:
                raise ProblemError(f"one side is more than {ELONGATION} times as long as the other")
            if short * long > megapixels * 1e6:
                raise ProblemError(f"more than {megapixels} million pixels")
            if image.mode.startswith("I;16"):  # Pillow cuts them off at 255: all white
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ProblemError(f"mode {image.mode} has no known range; save 8 bits per channel")
            if upright:
                with suppress(SyntaxError):  # no Exif data, but something in its place
                    image = ImageOps.exif_transpose(image)
            return image.convert("RGB")
    except ProblemError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ProblemError(line(reason.replace(f" {str(path)!r}", ""))) from error
