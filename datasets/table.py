"""The image sets of sets.yaml, and the row that images of one's own get (see DATASETS.md)."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from forgetting.errors import ProblemError, unknown

from . import layouts
from .names import is_text
from .split import Split


@dataclass(frozen=True)
class SetSpec:
    """One image set: where its files are, in CoOp's layout, and how it is read. Paths in a split
    file are relative to the image folder."""

    name: str
    folder: str  # under the data root; absolute for images of one's own
    image_folder: str = ""  # under `folder`, as is the split file
    classes: int = 0  # as published; 0: not known
    # (folder, image folder) -> its split, where no split file is there
    make_split: Callable[[Path, Path], Split] | None = None
    template: str = "a photo of a {}."
    split_file: str = ""  # the published one: numbers on it are comparable; "": needs none
    torchvision: str = ""  # torchvision's name of the set, if datasets.download fetches it
    unpacked: str = ""  # where that leaves the images, under `folder`
    rendered: bool = False  # drawn by datasets.mini instead of downloaded

    def images(self, folder: Path) -> Path:
        """The image folder in CoOp's layout, or in torchvision's where only that is there."""
        other = folder / self.unpacked
        return other if self.unpacked and other.is_dir() else folder / self.image_folder


def _row(name: str, make: Mapping[str, Mapping] = {}, **fields: Any) -> SetSpec:
    made = [partial(getattr(layouts, key), **options) for key, options in make.items()]
    return SetSpec(name, **fields, make_split=made[0] if made else None)


ROWS = yaml.safe_load(Path(__file__).with_name("sets.yaml").read_text(encoding="utf-8"))
SETS: dict[str, SetSpec] = {name: _row(name, **fields) for name, fields in ROWS.items()}
# What torchvision calls a set -> its row.
NAMES: dict[str, str] = {row.torchvision: row.name for row in SETS.values() if row.torchvision}


def spec(name: str, images: str = "") -> SetSpec:
    """The row of a set, by its name or torchvision's; or of `images` of one's own, a folder with a
    folder per class or a CSV of path and class, called `name`, else like the folder or file.

    Raises ProblemError: no such set (with the nearest names) or images; a name that no results can
    go by, or that is another set's.
    """
    if not images:
        name = NAMES.get(name, name)
        if name not in SETS:
            hint = "; images of your own: --images FOLDER"
            raise ProblemError(f"{unknown('data set', name, SETS)}{hint}")
        return SETS[name]
    path = Path(os.path.expanduser(images)).absolute()
    hint = "; call it otherwise with --dataset NAME"
    name = name or (path.stem if path.suffix.lower() in layouts.TABLES else path.resolve().name)
    if not is_text(name) or not name.strip(" .") or "/" in name or not name.isprintable():
        raise ProblemError(f"images {images!r}: {name!r} is no name for a data set{hint}")
    if name in SETS or name in NAMES:
        raise ProblemError(f"images {images!r}: {name} is a data set of the table{hint}")
    if path.is_dir():
        return SetSpec(name, str(path), make_split=layouts.from_own_folders)
    if not path.is_file():
        raise ProblemError(f"no images at {path}: give a folder with a folder per class, or a CSV")
    return SetSpec(name, "/", make_split=partial(layouts.from_table, table=path))
