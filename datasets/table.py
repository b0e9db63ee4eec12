"""The one table of image sets. A set of your own is one more row here (see DATASETS.md)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine import unknown

from . import raw
from .names import plain
from .split import Split

# CoOp leaves these two folders of Caltech101 out and renames four; None leaves a folder out.
CALTECH_NAMES = {
    "BACKGROUND_Google": None,
    "Faces_easy": None,
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
}


def caltech_name(folder: str) -> str | None:
    """Caltech101's folder name as CoOp's class name, or None where CoOp leaves the folder out."""
    return CALTECH_NAMES.get(folder, folder)


def year_first(name: str) -> str:
    """`Spyker C8 Coupe 2009` -> `2009 Spyker C8 Coupe`."""
    found = re.fullmatch(r"(.+) (\d{4})", name.strip())
    return f"{found[2]} {found[1]}" if found else name.strip()


def after_hyphen(folder: str) -> str:
    """StanfordDogs' folder `n02086240-Shih-Tzu` -> `Shih-Tzu`."""
    return plain(folder.partition("-")[2])


@dataclass(frozen=True)
class SetSpec:
    """One image set: where its files are, and how it is read.

    Paths follow CoOp's layout: `folder` under the data root, `image_folder` and the split files
    under `folder`. Paths in a split file are relative to the image folder.
    """

    name: str
    folder: str
    split_files: tuple[str, ...]  # in order of preference; numbers on these are comparable
    image_folder: str = ""
    template: str = "a photo of a {}."
    class_name: raw.ClassName = str
    # (folder, image folder, class_name) -> its split, where no split file is there
    make_split: Callable[[Path, Path, raw.ClassName], Split] | None = None
    rendered: bool = False  # drawn by datasets.mini instead of downloaded
    address: str = ""  # where the images come from
    split_address: str = ""  # where the split file comes from

    @property
    def made_split(self) -> str:
        """Name of the split file that `make_split`'s result is saved under."""
        return f"split_made_{self.name}.json"


_DRIVE = "https://drive.google.com/file/d/{}/view"
_ROWS = (
    SetSpec(
        name="StanfordDogs",
        folder="stanford_dogs",
        image_folder="Images",
        split_files=("split_alexey_stanford_dogs.json",),
        class_name=after_hyphen,
        make_split=raw.from_dogs,
        address="http://vision.stanford.edu/aditya86/ImageNetDogs/",
        split_address="the repository of the paper's authors (folder files/)",
    ),
    SetSpec(
        name="StanfordCars",
        folder="stanford_cars",
        split_files=("split_zhou_StanfordCars.json",),
        class_name=year_first,
        make_split=raw.from_cars,
        address="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        split_address=_DRIVE.format("1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT"),
    ),
    SetSpec(
        name="Caltech101",
        folder="caltech-101",
        image_folder="101_ObjectCategories",
        split_files=("split_zhou_Caltech101.json",),
        class_name=caltech_name,
        make_split=raw.from_folders,
        address="https://data.caltech.edu/records/mzrjq-6wc02",
        split_address=_DRIVE.format("1hyarUivQE36mY6jSomru6Fjd-JzwcCzN"),
    ),
    SetSpec(
        name="OxfordFlowers",
        folder="oxford_flowers",
        image_folder="jpg",
        split_files=("split_zhou_OxfordFlowers.json",),
        template="a photo of a {}, a type of flower.",
        make_split=raw.from_flowers,
        address="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        split_address=_DRIVE.format("1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT"),
    ),
    *(
        SetSpec(
            name=name,
            folder=folder,
            split_files=(f"split_mini_{name}.json",),
            template="a picture of a {}.",
            rendered=True,
        )
        for name, folder in {
            "MiniDigits": "mini_digits",
            "MiniLetters": "mini_letters",
            "MiniSymbols": "mini_symbols",
            "MiniShapes": "mini_shapes",
        }.items()
    ),
)
SETS: dict[str, SetSpec] = {row.name: row for row in _ROWS}


def spec(name: str) -> SetSpec:
    """The row of a set. Raises UserError with the nearest names if there is none."""
    if name not in SETS:
        raise unknown("data set", name, list(SETS))
    return SETS[name]
