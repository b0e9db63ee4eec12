"""The one table of image sets. A set of your own is one more row here (see DATASETS.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine import unknown

from . import raw
from .split import Split

# As in CoOp's split of Caltech101; None leaves a folder out.
CALTECH_NAMES = {
    "BACKGROUND_Google": None,
    "Faces_easy": None,
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
}


@dataclass(frozen=True)
class SetSpec:
    """One image set: where its files are, and how it is read.

    Paths follow CoOp's layout: `folder` under the data root, `image_folder` and the split file
    under `folder`. Paths in a split file are relative to the image folder.
    """

    name: str
    folder: str
    split_file: str  # the published one: numbers on it are comparable
    image_folder: str = ""
    template: str = "a photo of a {}."
    # (folder, image folder) -> its split, where no split file is there
    make_split: Callable[[Path, Path], Split] | None = None
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
        split_file="split_alexey_stanford_dogs.json",
        make_split=raw.from_dogs,
        address="http://vision.stanford.edu/aditya86/ImageNetDogs/",
        split_address="the repository of the paper's authors (folder files/)",
    ),
    SetSpec(
        name="StanfordCars",
        folder="stanford_cars",
        split_file="split_zhou_StanfordCars.json",
        make_split=raw.from_cars,
        address="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        split_address=_DRIVE.format("1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT"),
    ),
    SetSpec(
        name="Caltech101",
        folder="caltech-101",
        image_folder="101_ObjectCategories",
        split_file="split_zhou_Caltech101.json",
        make_split=partial(raw.from_folders, names=CALTECH_NAMES),
        address="https://data.caltech.edu/records/mzrjq-6wc02",
        split_address=_DRIVE.format("1hyarUivQE36mY6jSomru6Fjd-JzwcCzN"),
    ),
    SetSpec(
        name="OxfordFlowers",
        folder="oxford_flowers",
        image_folder="jpg",
        split_file="split_zhou_OxfordFlowers.json",
        template="a photo of a {}, a type of flower.",
        make_split=raw.from_flowers,
        address="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        split_address=_DRIVE.format("1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT"),
    ),
    *(
        SetSpec(
            name=f"Mini{kind}",
            folder=f"mini_{kind.lower()}",
            split_file=f"split_mini_Mini{kind}.json",
            template="a picture of a {}.",
            rendered=True,
        )
        for kind in ("Digits", "Letters", "Symbols", "Shapes")
    ),
)
SETS: dict[str, SetSpec] = {row.name: row for row in _ROWS}


def spec(name: str) -> SetSpec:
    """The row of a set. Raises UserError with the nearest names if there is none."""
    if name not in SETS:
        raise unknown("data set", name, SETS)
    return SETS[name]
