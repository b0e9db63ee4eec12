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
    """One image set: where its files are, and how it is read.

    Paths follow CoOp's layout: `folder` under the data root, the image folder and the split file
    under `folder`. Paths in a split file are relative to the image folder.
    """

    name: str
    folder: str  # absolute for images of one's own, which no data root holds
    image_folder: str = ""
    classes: int = 0  # as published; 0: not known
    # (folder, image folder) -> its split, where no split file is there
    make_split: Callable[[Path, Path], Split] | None = None
    address: str = ""  # where the images come from
    template: str = "a photo of a {}."
    split_file: str = ""  # the published one: numbers on it are comparable; "": needs none
    split_address: str = ""  # where the split file comes from
    torchvision: str = ""  # torchvision's name of the set, if datasets.download fetches it
    unpacked: str = ""  # where that leaves the images, under `folder`
    rendered: bool = False  # drawn by datasets.mini instead of downloaded

    @property
    def made_split(self) -> str:
        """Name of the split file that `make_split`'s result is saved under."""
        return f"split_made_{self.name}.json"

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


def _coop(name: str, folder: str, images: str, classes: int, drive: str, **more: Any) -> SetSpec:
    """A set with CoOp's split file, which has the number `drive` at Google Drive."""
    split, address = f"split_zhou_{name}.json", f"https://drive.google.com/file/d/{drive}/view"
    return SetSpec(name, folder, images, classes, split_file=split, split_address=address, **more)


def _lists(line: str, **files: str) -> Callable[[Path, Path], Split]:
    return partial(layouts.from_lists, files=files, line=line)


def _imagenet(
    kind: str, folder: str, images: str, classes: int, address: str, **more: Any
) -> SetSpec:
    """ImageNet or a kin of it. All images are test images: nobody evaluates anything else."""
    read = layouts.from_imagenet
    return SetSpec(f"ImageNet{kind}", folder, images, classes, read, address, **more)


def _cifar(classes: int) -> SetSpec:
    """The test images, which datasets.download saves as files."""
    name, read = f"CIFAR{classes}", partial(layouts.from_folders, divided=False)
    address = "https://www.cs.toronto.edu/~kriz/cifar.html"
    return SetSpec(name, name.lower(), "test", classes, read, address, torchvision=name)


def _mini(kind: str) -> SetSpec:
    name, template = f"Mini{kind}", "a picture of a {}."
    split = f"split_mini_{name}.json"
    return SetSpec(name, f"mini_{kind.lower()}", split_file=split, template=template, rendered=True)


# fmt: off
_ROWS = (
    SetSpec("StanfordDogs", "stanford_dogs", "Images", 120, layouts.from_dogs,
            "http://vision.stanford.edu/aditya86/ImageNetDogs/",
            split_file="split_alexey_stanford_dogs.json",
            split_address="the repository of the paper's authors (folder files/)"),
    _coop("StanfordCars", "stanford_cars", "", 196, "1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT",
          make_split=layouts.from_cars,
          address="https://ai.stanford.edu/~jkrause/cars/car_dataset.html"),
    _coop("Caltech101", "caltech-101", "101_ObjectCategories", 100,
          "1hyarUivQE36mY6jSomru6Fjd-JzwcCzN",
          make_split=partial(layouts.from_folders, rename=lambda x: CALTECH_NAMES.get(x, x)),
          address="https://data.caltech.edu/records/mzrjq-6wc02",
          torchvision="Caltech101", unpacked="caltech101/101_ObjectCategories"),
    _coop("OxfordFlowers", "oxford_flowers", "jpg", 102, "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT",
          make_split=layouts.from_flowers, template="a photo of a {}, a type of flower.",
          address="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
          torchvision="Flowers102", unpacked="flowers-102/jpg"),
    _coop("OxfordPets", "oxford_pets", "images", 37, "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs",
          make_split=_lists(r"(?P<path>(?P<name>\S+)_\d+) ",
                            train="annotations/trainval.txt", test="annotations/test.txt"),
          template="a photo of a {}, a type of pet.",
          address="https://www.robots.ox.ac.uk/~vgg/data/pets/",
          torchvision="OxfordIIITPet", unpacked="oxford-iiit-pet/images"),
    _coop("Food101", "food-101", "images", 101, "1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl",
          make_split=_lists(r"(?P<path>(?P<name>[^/]+)/\S+)",
                            train="meta/train.txt", test="meta/test.txt"),
          template="a photo of {}, a type of food.",
          address="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
          torchvision="Food101", unpacked="food-101/images"),
    SetSpec("FGVCAircraft", "fgvc_aircraft", "images", 100,  # the official parts are CoOp's too
            _lists(r"(?P<path>\d+) (?P<name>.+)", train="images_variant_train.txt",
                   val="images_variant_val.txt", test="images_variant_test.txt"),
            "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
            template="a photo of a {}, a type of aircraft.",
            torchvision="FGVCAircraft", unpacked="fgvc-aircraft-2013b/data/images"),
    _coop("SUN397", "sun397", "SUN397", 397, "1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq",
          make_split=partial(layouts.from_folders, group=layouts.sun_class),
          address="https://vision.princeton.edu/projects/2010/SUN/", torchvision="SUN397"),
    _coop("DescribableTextures", "dtd", "images", 47, "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x",
          make_split=_lists(r"(?P<path>(?P<name>[^/]+)/\S+)\.jpg", train="labels/train1.txt",
                            val="labels/val1.txt", test="labels/test1.txt"),
          template="{} texture.", address="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
          torchvision="DTD", unpacked="dtd/dtd/images"),
    _coop("EuroSAT", "eurosat", "2750", 10, "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o",
          make_split=partial(layouts.from_folders, rename=lambda x: EUROSAT_NAMES.get(x, x)),
          template="a centered satellite photo of {}.",
          address="http://madm.dfki.de/files/sentinel/EuroSAT.zip",
          torchvision="EuroSAT", unpacked="eurosat/2750"),
    _coop("UCF101", "ucf101", "UCF-101-midframes", 101, "1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y",
          template="a photo of a person doing {}.",
          address="https://drive.google.com/file/d/10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O/view"),
    _imagenet("", "imagenet", "images/val", 1000, "https://image-net.org/",
              torchvision="ImageNet", unpacked="val"),
    _imagenet("V2", "imagenetv2", "imagenetv2-matched-frequency-format-val", 1000,
              "https://github.com/modestyachts/ImageNetV2"),
    _imagenet("Sketch", "imagenet-sketch", "images", 1000,
              "https://github.com/HaohanWang/ImageNet-Sketch"),
    _imagenet("A", "imagenet-adversarial", "imagenet-a", 200,
              "https://github.com/hendrycks/natural-adv-examples"),
    _imagenet("R", "imagenet-rendition", "imagenet-r", 200,
              "https://github.com/hendrycks/imagenet-r"),
    _cifar(10), _cifar(100),
    SetSpec("CUB", "CUB_200_2011", "images", 200, layouts.from_cub,
            "https://data.caltech.edu/records/65de6-vp158",
            template="a photo of a {}, a type of bird."),
    SetSpec("PLANTDOC", "PlantDoc-Dataset", make_split=layouts.from_own_folders,
            address="https://github.com/pratikkayal/PlantDoc-Dataset"),
    SetSpec("PinsFaces", "pins_faces", "105_classes_pins_dataset", 105,
            partial(layouts.from_folders, rename=lambda x: x.removeprefix("pins_"), divided=False),
            "https://www.kaggle.com/datasets/hereisburak/pins-face-recognition",
            template="a photo of {}."),
    *map(_mini, ("Digits", "Letters", "Symbols", "Shapes")),
)
# fmt: on
SETS: dict[str, SetSpec] = {row.name: row for row in _ROWS}
# What torchvision calls a set -> its row.
NAMES: dict[str, str] = {row.torchvision: row.name for row in _ROWS if row.torchvision}


def spec(name: str, images: str = "") -> SetSpec:
    """The row of a set, by its name or torchvision's; that of images of one's own if `images`, a
    folder or a CSV file, is given: see `own_images`. Raises ProblemError with the nearest names if
    there is none."""
    if images:
        return own_images(images, name)
    name = NAMES.get(name, name)
    if name not in SETS:
        raise ProblemError(
            f"{unknown('data set', name, SETS)}; images of your own: --images FOLDER"
        )
    return SETS[name]


def own_images(images: str, name: str = "") -> SetSpec:
    """The row of images of one's own: a folder with a folder per class, or a CSV of path and class.

    Args:
        name: what to call the set; that of the folder or file if empty.

    Raises:
        ProblemError: a name that no results can go by, or that is another set's.
    """
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
        raise ProblemError(
            f"no images at {path}: give a folder with a folder per class, or a CSV file"
        )
    return SetSpec(name, "/", make_split=partial(layouts.from_table, table=path))
