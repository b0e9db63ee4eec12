"""From a folder on disk to a data set, and how an image is opened. Every set of the table,
photographs and rendered ones, goes through `ImageSet`.
"""

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

from engine.files import read_json
from engine.log import once
from forgetting.errors import ProblemError, line

from .mini import render
from .split import Split, check_split
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


def absent(row: SetSpec, root: Path) -> str | None:
    """Why a set cannot be read from `root`, by its folders alone; None if they are there."""
    folder = root / row.folder
    needed = {"folder": folder, "image folder": row.images(folder)}
    if not Path(row.folder).is_absolute():
        needed = {"data root at": root} | needed
    for what, path in {} if row.rendered else needed.items():
        if not path.is_dir():
            hint = f", or try `python -m datasets.download {row.name}`" if row.torchvision else ""
            return f"no {what} {path}; see DATASETS.md{hint}"
    return None


def find_split(row: SetSpec, root: Path) -> tuple[Split, bool]:
    """The split of a set under `root`, and whether numbers on it can be compared with published
    ones: that of the published file, else one made of what is there, the same every time. Raises
    ProblemError: the set is absent (names the path), or its split file or lists are broken."""
    where = f"data set {row.name}:"
    if reason := absent(row, root):
        raise ProblemError(f"{where} {reason}")
    folder = root / row.folder
    file = folder / row.split_file
    if row.split_file and file.is_file():
        return check_split(read_json(file, "split file"), str(file)), True
    if row.make_split is None:
        raise ProblemError(f"{where} no split file {file}; see DATASETS.md")
    if row.split_file:
        where += f" no split file {file}, and none can be made:"
    try:
        return row.make_split(folder, row.images(folder)), not row.split_file
    except ProblemError as error:
        raise ProblemError(f"{where} {error}") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ProblemError(f"{where} lists are not in the known form ({error!r})") from error


class ImageSet:
    """One row of the table as a data set, with the attributes of Dassl's; Dassl's own class takes
    its class names from the training images alone, and fails on a set that is only evaluated.
    Raises ProblemError: anything missing or broken, named with its path."""

    row: ClassVar[SetSpec]
    train_u = None  # no set has unlabelled images

    def __init__(self, cfg: Any) -> None:
        row = self.row
        root = Path(cfg.DATASET.ROOT).expanduser().absolute()
        if row.rendered:
            render(row.name, root / row.folder)
        split, self.comparable = find_split(row, root)  # not if it is made here
        images = row.images(root / row.folder)
        if missing := split.missing(images):
            raise ProblemError(
                f"data set {row.name}: {len(missing)} of {len(split.paths())} images are missing, "
                f"first {images / missing[0]}; `python -m datasets.check` lists them"
            )
        once(logging.INFO, f"{row.name}: {len(split.classnames)} classes, {split.sizes()}")
        if not self.comparable:
            about = f"not the published split {row.split_file}: numbers are not comparable"
            once(logging.WARNING, f"{row.name}: {about} (DATASETS.md)")
        self.train_x, self.val, self.test = (
            [Datum(str(images / path), label, name) for path, label, name in items]
            for items in split.parts.values()
        )
        self.classnames = list(split.classnames)  # in label order, of all three parts
        self.lab2cname = dict(enumerate(self.classnames))
        self.num_classes = len(self.classnames)


# Dassl registers classes under their own names, so each row needs a class called like the set.
CLASSES = {name: type(name, (ImageSet,), {"row": row}) for name, row in SETS.items()}


def load(name: str, root: str | Path, images: str = "") -> ImageSet:
    """Read a set from a data root, or `images` of one's own (see `datasets.spec`), without a
    config. Raises ProblemError as `spec` and `ImageSet`."""
    row = spec(name, images)
    kind = CLASSES.get(row.name) or type("OwnImages", (ImageSet,), {"row": row})
    return kind(SimpleNamespace(DATASET=SimpleNamespace(ROOT=str(root))))


def read_image(
    path: str | Path,
    formats: Sequence[str] | None = None,
    megapixels: float = math.inf,
    upright: bool = False,
) -> Image.Image:
    """An image file as RGB, decoded to the last pixel. Its size is checked before it is decoded.

    `formats`: Pillow's names of those that are read; `megapixels`: at most, beside Pillow's 179;
    `upright`: whether to turn the image as its Exif data says, which CLIP's benchmarks do not.
    Raises ProblemError: why it cannot be read, for a message that names the file.
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
