"""The one table of image sets, and the row that images of one's own get (see DATASETS.md)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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


# fmt: off
CALTECH_NAMES = {  # as in CoOp's split of Caltech101; None leaves a folder out
    "BACKGROUND_Google": None, "Faces_easy": None, "Faces": "face", "Leopards": "leopard",
    "Motorbikes": "motorbike", "airplanes": "airplane",
}
EUROSAT_NAMES = {  # CoOp's words for the folders
    "AnnualCrop": "Annual Crop Land", "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road", "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",  # Forest and River stay
}
# fmt: on


def _coop(name: str, folder: str, images: str, classes: int, **more: Any) -> SetSpec:
    """A set with CoOp's split file."""
    return SetSpec(name, folder, images, classes, split_file=f"split_zhou_{name}.json", **more)


def _sun_class(path: str) -> str:
    """SUN397's class as CoOp writes it: `a/apartment_building/outdoor/x.jpg` is of the class
    `outdoor apartment_building`."""
    return " ".join(reversed(path.split("/")[1:-1]))


def _mini(kind: str) -> SetSpec:
    name, template = f"Mini{kind}", "a picture of a {}."
    split = f"split_mini_{name}.json"
    return SetSpec(name, f"mini_{kind.lower()}", split_file=split, template=template, rendered=True)


# fmt: off
_ROWS = (
    SetSpec("StanfordDogs", "stanford_dogs", "Images", 120,
            split_file="split_alexey_stanford_dogs.json"),
    _coop("StanfordCars", "stanford_cars", "", 196),
    _coop("Caltech101", "caltech-101", "101_ObjectCategories", 100,
          make_split=partial(layouts.from_folders, rename=CALTECH_NAMES),
          torchvision="Caltech101", unpacked="caltech101/101_ObjectCategories"),
    _coop("OxfordFlowers", "oxford_flowers", "jpg", 102, make_split=layouts.from_flowers,
          template="a photo of a {}, a type of flower.",
          torchvision="Flowers102", unpacked="flowers-102/jpg"),
    _coop("OxfordPets", "oxford_pets", "images", 37,
          make_split=layouts.from_lists(
              r"(?P<path>(?P<name>\S+)_\d+) ",
              train="annotations/trainval.txt", test="annotations/test.txt"),
          template="a photo of a {}, a type of pet.",
          torchvision="OxfordIIITPet", unpacked="oxford-iiit-pet/images"),
    _coop("Food101", "food-101", "images", 101,
          make_split=layouts.from_lists(
              r"(?P<path>(?P<name>[^/]+)/\S+)", train="meta/train.txt", test="meta/test.txt"),
          template="a photo of {}, a type of food.",
          torchvision="Food101", unpacked="food-101/images"),
    SetSpec("FGVCAircraft", "fgvc_aircraft", "images", 100,  # the official parts are CoOp's too
            layouts.from_lists(
                r"(?P<path>\d+) (?P<name>.+)", train="images_variant_train.txt",
                val="images_variant_val.txt", test="images_variant_test.txt"),
            template="a photo of a {}, a type of aircraft.",
            torchvision="FGVCAircraft", unpacked="fgvc-aircraft-2013b/data/images"),
    _coop("SUN397", "sun397", "SUN397", 397, torchvision="SUN397",
          make_split=partial(layouts.from_folders, group=_sun_class)),
    _coop("DescribableTextures", "dtd", "images", 47,
          make_split=layouts.from_lists(
              r"(?P<path>(?P<name>[^/]+)/\S+)\.jpg",
              train="labels/train1.txt", val="labels/val1.txt", test="labels/test1.txt"),
          template="{} texture.", torchvision="DTD", unpacked="dtd/dtd/images"),
    _coop("EuroSAT", "eurosat", "2750", 10,
          make_split=partial(layouts.from_folders, rename=EUROSAT_NAMES),
          template="a centered satellite photo of {}.",
          torchvision="EuroSAT", unpacked="eurosat/2750"),
    _coop("UCF101", "ucf101", "UCF-101-midframes", 101,
          template="a photo of a person doing {}."),
    SetSpec("ImageNet", "imagenet", "images/val", 1000, layouts.from_imagenet,
            torchvision="ImageNet", unpacked="val"),
    SetSpec("ImageNetV2", "imagenetv2", "imagenetv2-matched-frequency-format-val", 1000,
            layouts.from_imagenet),
    SetSpec("ImageNetSketch", "imagenet-sketch", "images", 1000, layouts.from_imagenet),
    SetSpec("ImageNetA", "imagenet-adversarial", "imagenet-a", 200, layouts.from_imagenet),
    SetSpec("ImageNetR", "imagenet-rendition", "imagenet-r", 200, layouts.from_imagenet),
    # The test images of CIFAR are files that datasets.download saves.
    SetSpec("CIFAR10", "cifar10", "test", 10, layouts.all_tested, torchvision="CIFAR10"),
    SetSpec("CIFAR100", "cifar100", "test", 100, layouts.all_tested, torchvision="CIFAR100"),
    SetSpec("CUB", "CUB_200_2011", "images", 200, layouts.from_cub,
            template="a photo of a {}, a type of bird."),
    SetSpec("PLANTDOC", "PlantDoc-Dataset", make_split=layouts.from_own_folders),
    SetSpec("PinsFaces", "pins_faces", "105_classes_pins_dataset", 105,
            partial(layouts.all_tested, group=lambda path: path.split("/")[0][5:]),
            template="a photo of {}."),
    *map(_mini, ("Digits", "Letters", "Symbols", "Shapes")),
)
# fmt: on
SETS: dict[str, SetSpec] = {row.name: row for row in _ROWS}
# What torchvision calls a set -> its row.
NAMES: dict[str, str] = {row.torchvision: row.name for row in _ROWS if row.torchvision}


def spec(name: str, images: str = "") -> SetSpec:
    """The row of a set, by its name or torchvision's.

    Args:
        images: of one's own, a folder with a folder per class or a CSV of path and class; `name`
            is then what to call them, like the folder or file if empty.

    Raises:
        ProblemError: no such set (with the nearest names) or images; a name that no results can go
            by, or that is another set's.
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
