"""The one table of image sets, and the row that images of one's own have (see DATASETS.md)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from forgetting.errors import ProblemError, unknown

from . import raw
from .names import is_text
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
EUROSAT_NAMES = {  # CoOp's words for the folders
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}


@dataclass(frozen=True)
class SetSpec:
    """One image set: where its files are, and how it is read.

    Paths follow CoOp's layout: `folder` under the data root, the image folder and the split file
    under `folder`. Paths in a split file are relative to the image folder.
    """

    name: str
    folder: str  # absolute for images of one's own, which no data root holds
    split_file: str = ""  # the published one: numbers on it are comparable; "": needs none
    image_folder: str = ""
    template: str = "a photo of a {}."
    classes: int = 0  # as published; 0: not known
    # (folder, image folder) -> its split, where no split file is there
    make_split: Callable[[Path, Path], Split] | None = None
    rendered: bool = False  # drawn by datasets.mini instead of downloaded
    address: str = ""  # where the images come from
    split_address: str = ""  # where the split file comes from
    torchvision: str = ""  # torchvision's name of the set, if datasets.download fetches it
    unpacked: str = ""  # where that leaves the images, under `folder`

    @property
    def made_split(self) -> str:
        """Name of the split file that `make_split`'s result is saved under."""
        return f"split_made_{self.name}.json"

    def images(self, folder: Path) -> Path:
        """The image folder in CoOp's layout, or in torchvision's where only that is there."""
        other = folder / self.unpacked
        return other if self.unpacked and other.is_dir() else folder / self.image_folder


_DRIVE = "https://drive.google.com/file/d/{}/view"
_ROWS = (
    SetSpec(
        name="StanfordDogs",
        folder="stanford_dogs",
        image_folder="Images",
        split_file="split_alexey_stanford_dogs.json",
        classes=120,
        make_split=raw.from_dogs,
        address="http://vision.stanford.edu/aditya86/ImageNetDogs/",
        split_address="the repository of the paper's authors (folder files/)",
    ),
    SetSpec(
        name="StanfordCars",
        folder="stanford_cars",
        split_file="split_zhou_StanfordCars.json",
        classes=196,
        make_split=raw.from_cars,
        address="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        split_address=_DRIVE.format("1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT"),
    ),
    SetSpec(
        name="Caltech101",
        folder="caltech-101",
        image_folder="101_ObjectCategories",
        split_file="split_zhou_Caltech101.json",
        classes=100,
        make_split=partial(raw.from_folders, names=CALTECH_NAMES),
        address="https://data.caltech.edu/records/mzrjq-6wc02",
        split_address=_DRIVE.format("1hyarUivQE36mY6jSomru6Fjd-JzwcCzN"),
        torchvision="Caltech101",
        unpacked="caltech101/101_ObjectCategories",
    ),
    SetSpec(
        name="OxfordFlowers",
        folder="oxford_flowers",
        image_folder="jpg",
        split_file="split_zhou_OxfordFlowers.json",
        template="a photo of a {}, a type of flower.",
        classes=102,
        make_split=raw.from_flowers,
        address="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        split_address=_DRIVE.format("1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT"),
        torchvision="Flowers102",
        unpacked="flowers-102/jpg",
    ),
    SetSpec(
        name="OxfordPets",
        folder="oxford_pets",
        image_folder="images",
        split_file="split_zhou_OxfordPets.json",
        template="a photo of a {}, a type of pet.",
        classes=37,
        make_split=partial(
            raw.from_lists,
            files={"train": "annotations/trainval.txt", "test": "annotations/test.txt"},
            line=r"(?P<path>(?P<name>\S+)_\d+) ",
        ),
        address="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        split_address=_DRIVE.format("1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs"),
        torchvision="OxfordIIITPet",
        unpacked="oxford-iiit-pet/images",
    ),
    SetSpec(
        name="Food101",
        folder="food-101",
        image_folder="images",
        split_file="split_zhou_Food101.json",
        template="a photo of {}, a type of food.",
        classes=101,
        make_split=partial(
            raw.from_lists,
            files={"train": "meta/train.txt", "test": "meta/test.txt"},
            line=r"(?P<path>(?P<name>[^/]+)/\S+)",
        ),
        address="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        split_address=_DRIVE.format("1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl"),
        torchvision="Food101",
        unpacked="food-101/images",
    ),
    SetSpec(  # the official parts are CoOp's too, so it published no split file
        name="FGVCAircraft",
        folder="fgvc_aircraft",
        image_folder="images",
        template="a photo of a {}, a type of aircraft.",
        classes=100,
        make_split=partial(
            raw.from_lists,
            files={part: f"images_variant_{part}.txt" for part in ("train", "val", "test")},
            line=r"(?P<path>\d+) (?P<name>.+)",
        ),
        address="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        torchvision="FGVCAircraft",
        unpacked="fgvc-aircraft-2013b/data/images",
    ),
    SetSpec(
        name="SUN397",
        folder="sun397",
        image_folder="SUN397",
        split_file="split_zhou_SUN397.json",
        classes=397,
        make_split=partial(raw.from_folders, group=raw.sun_class),
        address="https://vision.princeton.edu/projects/2010/SUN/",
        split_address=_DRIVE.format("1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq"),
        torchvision="SUN397",
    ),
    SetSpec(
        name="DescribableTextures",
        folder="dtd",
        image_folder="images",
        split_file="split_zhou_DescribableTextures.json",
        template="{} texture.",
        classes=47,
        make_split=partial(
            raw.from_lists,
            files={part: f"labels/{part}1.txt" for part in ("train", "val", "test")},
            line=r"(?P<path>(?P<name>[^/]+)/\S+)\.jpg",
        ),
        address="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        split_address=_DRIVE.format("1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x"),
        torchvision="DTD",
        unpacked="dtd/dtd/images",
    ),
    SetSpec(
        name="EuroSAT",
        folder="eurosat",
        image_folder="2750",
        split_file="split_zhou_EuroSAT.json",
        template="a centered satellite photo of {}.",
        classes=10,
        make_split=partial(raw.from_folders, names=EUROSAT_NAMES),
        address="http://madm.dfki.de/files/sentinel/EuroSAT.zip",
        split_address=_DRIVE.format("1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o"),
        torchvision="EuroSAT",
        unpacked="eurosat/2750",
    ),
    SetSpec(
        name="UCF101",
        folder="ucf101",
        image_folder="UCF-101-midframes",
        split_file="split_zhou_UCF101.json",
        template="a photo of a person doing {}.",
        classes=101,
        address=_DRIVE.format("10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O"),
        split_address=_DRIVE.format("1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y"),
    ),
    *(
        SetSpec(  # all images are test images: nothing else of these sets is evaluated by anybody
            name=f"ImageNet{kind}",
            folder=folder,
            image_folder=image_folder,
            classes=classes,
            make_split=raw.from_imagenet,
            address=address,
            torchvision="" if kind else "ImageNet",
            unpacked="" if kind else "val",
        )
        for kind, folder, image_folder, classes, address in (
            ("", "imagenet", "images/val", 1000, "https://image-net.org/"),
            (
                "V2",
                "imagenetv2",
                "imagenetv2-matched-frequency-format-val",
                1000,
                "https://github.com/modestyachts/ImageNetV2",
            ),
            (
                "Sketch",
                "imagenet-sketch",
                "images",
                1000,
                "https://github.com/HaohanWang/ImageNet-Sketch",
            ),
            (
                "A",
                "imagenet-adversarial",
                "imagenet-a",
                200,
                "https://github.com/hendrycks/natural-adv-examples",
            ),
            (
                "R",
                "imagenet-rendition",
                "imagenet-r",
                200,
                "https://github.com/hendrycks/imagenet-r",
            ),
        )
    ),
    *(
        SetSpec(  # its test images, which datasets.download saves as files
            name=f"CIFAR{classes}",
            folder=f"cifar{classes}",
            image_folder="test",
            classes=classes,
            make_split=partial(raw.from_folders, divided=False),
            address="https://www.cs.toronto.edu/~kriz/cifar.html",
            torchvision=f"CIFAR{classes}",
        )
        for classes in (10, 100)
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


# What torchvision calls a set -> its row.
NAMES: dict[str, str] = {row.torchvision: row.name for row in _ROWS if row.torchvision}


def spec(name: str, images: str = "") -> SetSpec:
    """The row of a set, by its name or torchvision's; that of images of one's own if `images`, a
    folder or a CSV file, is given: see `own`. Raises ProblemError with the nearest names if there is
    none."""
    if images:
        return own(images, name)
    name = NAMES.get(name, name)
    if name not in SETS:
        raise unknown("data set", name, SETS)
    return SETS[name]


def own(images: str, name: str = "") -> SetSpec:
    """The row of images of one's own: a folder with a folder a class, or a CSV of path and class.

    Args:
        name: what to call the set; that of the folder or file if empty.

    Raises:
        ProblemError: a name that no results can go by, or that is another set's.
    """
    path = Path(os.path.expanduser(images)).absolute()
    hint = "; call it otherwise with --dataset NAME"
    name = name or (path.stem if path.suffix.lower() in raw.TABLES else path.resolve().name)
    if not is_text(name) or not name.strip(" .") or "/" in name or not name.isprintable():
        raise ProblemError(f"images {images!r}: {name!r} is no name for a data set{hint}")
    if name in SETS or name in NAMES:
        raise ProblemError(f"images {images!r}: {name} is a data set of the table{hint}")
    if path.is_dir():
        return SetSpec(name=name, folder=str(path), make_split=raw.from_own_folders)
    if not path.is_file():
        raise ProblemError(
            f"no images at {path}: give a folder with a folder a class, or a CSV file"
        )
    return SetSpec(name=name, folder="/", make_split=partial(raw.from_table, table=path))
