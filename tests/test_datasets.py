"""The image sets of the table: split files, made splits, names, vocabularies, checks, downloads."""

import json
import os
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import datasets
import forget_cls
from datasets import check, download, vocabulary
from engine import DATASET_REGISTRY
from engine.cli import run
from engine.config import settings
from forgetting.errors import ProblemError
from tests.clip_fixtures import picture
from tests.conftest import one_line, refuses

PAPER = ("StanfordDogs", "StanfordCars", "Caltech101", "OxfordFlowers")
FORGOTTEN = {name: forget_cls.forget_classes_all[name] for name in PAPER}
CALTECH_FOLDERS = ["BACKGROUND_Google", "Faces", "Faces_easy", "airplanes", "sea_horse"]


def caltech(root: Path) -> Path:
    """A tiny download in Caltech101's layout; the folder of the set."""
    for group in CALTECH_FOLDERS:
        for number in range(10):
            folder = root / "caltech-101/101_ObjectCategories" / group
            picture(folder / f"image_{number:04d}.jpg", number)
    return root / "caltech-101"


def entries(name: str, label: int, numbers: range) -> list[list]:
    return [[f"{name}/image_{number:04d}.jpg", label, name] for number in numbers]


def good_split() -> dict[str, list]:
    parts = {"train": range(0, 5), "val": range(5, 7), "test": range(7, 10)}
    return {
        part: entries("airplanes", 0, numbers) + entries("sea_horse", 1, numbers)
        for part, numbers in parts.items()
    }


def publish(folder: Path, split: object, name: str = "split_zhou_Caltech101.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(split))


def counts(images: datasets.ImageSet) -> tuple[int, int, int]:
    return len(images.train_x), len(images.val), len(images.test)


def run_check(capsys, *arguments: object) -> tuple[int, str]:
    status = run(check.main, [str(argument) for argument in arguments])
    return status, capsys.readouterr().out


# The published split file


def test_published_split_is_read_as_it_is(tmp_path):
    folder = caltech(tmp_path / "store")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/caltech-101").symlink_to(folder)  # images may lie on another disk
    split = good_split()
    split["train"] = entries("airplanes", 0, range(5))  # classes come from all parts together
    split["val"] += entries("airplanes", 0, range(1))  # an image may be in two parts
    # Names may differ in case alone: ImageNet has a dog "Cardigan" and a garment "cardigan".
    split["test"].append(["Faces/image_0000.jpg", 2, "Airplanes"])
    publish(folder, split)
    cfg = settings(dataset="Caltech101", opts=["DATASET.ROOT", str(tmp_path / "data")])
    data = DATASET_REGISTRY.get("Caltech101")(cfg)
    assert counts(data) == (5, 5, 7) and data.comparable
    assert data.classnames == ["airplanes", "sea_horse", "Airplanes"]  # folders not renamed
    assert data.num_classes == 3 and data.lab2cname == dict(enumerate(data.classnames))
    assert data.test[0].impath.endswith("101_ObjectCategories/airplanes/image_0007.jpg")
    assert data.test[0].domain == 0 and data.train_u is None
    assert {(x.label, x.classname) for x in data.test} == set(enumerate(data.classnames))


def split_of(*entries: list) -> dict[str, list]:
    return {"train": [], "val": [], "test": [*entries]}


# fmt: off
BROKEN = {
    "no lists": (split_of() | {"train": {}}, "lists 'train', 'val' and 'test'"),
    "empty test": (split_of(), "'test' is empty"),
    "a pair": (split_of(["a.jpg", 0]), r"test\[0\]: must be \[path"),
    "text label": (split_of(["a.jpg", "0", "a"]), r"test\[0\]: must be"),
    "boolean label": (split_of(["a.jpg", True, "a"]), "must be .* True"),
    "negative label": (split_of(["a.jpg", -1, "a"]), "must be .* -1"),
    "empty name": (split_of(["a.jpg", 0, " "]), "must be"),
    "no name": (split_of(["a.jpg", 0, None]), "must be"),
    "empty path": (split_of(["", 0, "a"]), "must be"),
    "no Unicode": (split_of(["a.jpg", 0, "\udcff"]), "no text"),
    "gap": (split_of(["a.jpg", 0, "a"], ["b.jpg", 2 * 10**8, "b"]), "without a gap; none is 1"),
    "two names": (split_of(["a.jpg", 0, "a"], ["b.jpg", 0, "b"]), "called 'b', but 'a' before"),
    "two spellings": (split_of(["a.jpg", 0, "a_b"], ["b.jpg", 1, "a  b"]), "both called 'a  b'"),
    "two labels": (split_of(["a/b.jpg", 0, "a"], ["a/./b.jpg", 1, "b"]), "label 1, but 0 before"),
    "path upwards": (split_of(["a/../../b.jpg", 0, "a"]), r"test\[0\]: .* leads out"),
    "absolute path": (split_of(["/etc/passwd", 0, "a"]), "leads out"),
}
# fmt: on


@pytest.mark.parametrize(("split", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_split_is_one_line(tmp_path, split, message):
    (tmp_path / "caltech-101/101_ObjectCategories").mkdir(parents=True)
    publish(tmp_path / "caltech-101", split)
    with one_line(message, "split_zhou_Caltech101.json"):
        datasets.load("Caltech101", tmp_path)


@pytest.mark.parametrize(
    "name", [name for name, row in datasets.SETS.items() if row.split_file and not row.rendered]
)
def test_published_splits_are_read_in_either_layout(tmp_path, name):
    row = datasets.SETS[name]
    for number, folder in enumerate({row.image_folder, row.unpacked or row.image_folder}):
        root = tmp_path / str(number)
        picture(root / row.folder / folder / "a/1.jpg")
        publish(root / row.folder, split_of(["a/1.jpg", 0, "ant"]), row.split_file)
        data = datasets.load(name, root)
        assert data.classnames == ["ant"] and data.comparable
    assert row.classes > 1


# Sets that are not there, or in part


def test_missing_images_are_counted_and_the_first_is_named(tmp_path):
    folder = caltech(tmp_path)
    publish(folder, good_split())
    for number in (8, 9):
        (folder / f"101_ObjectCategories/sea_horse/image_{number:04d}.jpg").unlink()
    os.mkfifo(folder / "101_ObjectCategories/sea_horse/image_0009.jpg")  # nothing waits for it
    with pytest.raises(ProblemError, match=r"2 of 20 images .*first .*sea_horse/image_0008\.jpg"):
        datasets.load("Caltech101", tmp_path)


def test_an_absent_set_names_the_path_and_the_document(tmp_path):
    root = tmp_path / "data"
    images = root / "caltech-101/101_ObjectCategories"
    for folder, message in {
        tmp_path: r"no data root at .*; see DATASETS\.md",
        root: r"no folder .*caltech-101; see DATASETS\.md",
        images.parent: r"no image folder .*101_ObjectCategories; see DATASETS\.md",
        images: r"no split file .*none can be made: .*no folder with",
    }.items():
        folder.mkdir(exist_ok=True)
        refuses(f"Caltech101: {message}", datasets.load, "Caltech101", root)
    states = {name: datasets.absent(row, root) for name, row in datasets.SETS.items()}
    assert states["Caltech101"] is None and states["MiniDigits"] is None
    assert "try `python -m datasets.download CIFAR10`" in states["CIFAR10"]
    refuses(r"StanfordDogs.*--images FOLDER", datasets.load, "StandfordDogs", tmp_path)


# Splits made from a raw download


def test_a_made_split_is_the_same_every_time_and_said_to_be_incomparable(tmp_path, capsys):
    folder = caltech(tmp_path)
    data = datasets.load("Caltech101", tmp_path)
    assert "not comparable" in capsys.readouterr().out and not data.comparable
    assert data.classnames == ["face", "airplane", "sea_horse"]  # CoOp's names and exclusions
    assert counts(data) == (21, 0, 9)
    assert len({datum.impath for datum in [*data.train_x, *data.test]}) == 30
    # The images that made splits of this repository have always tested on.
    numbers = {datum.impath[-8:-4] for datum in data.test if datum.classname == "sea_horse"}
    assert numbers == {"0000", "0006", "0009"}
    publish(folder, good_split())
    assert datasets.load("Caltech101", tmp_path).comparable  # the published file wins


def test_flowers_from_the_official_parts(tmp_path, monkeypatch):
    folder = tmp_path / "oxford_flowers"
    for number in range(1, 10):
        picture(folder / f"jpg/image_{number:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 3] * 3], dtype=np.uint8)})
    parts = {"trnid": [[1, 2, 3]], "valid": [[4, 5, 6]], "tstid": [[9, 7, 8]]}
    savemat(folder / "setid.mat", {part: np.array(ids) for part, ids in parts.items()})
    data = datasets.load("OxfordFlowers", tmp_path)
    assert [Path(d.impath).name for d in data.test] == [f"image_0000{n}.jpg" for n in (9, 7, 8)]
    assert [d.label for d in data.test] == [2, 0, 1]
    assert data.classnames[0] == "pink primrose"  # of torchvision's list
    monkeypatch.delattr("torchvision.datasets.Flowers102.classes")  # as in 0.19
    refuses("cat_to_name.json", datasets.load, "OxfordFlowers", tmp_path)
    names = {"1": "gazania", "2": "rose", "3": "tree mallow"}
    (folder / "cat_to_name.json").write_text(json.dumps(names))
    assert datasets.load("OxfordFlowers", tmp_path).classnames == [*names.values()]
    labels = folder / "imagelabels.mat"
    labels.write_bytes(labels.read_bytes()[:60])
    with pytest.raises(ProblemError, match=r"imagelabels\.mat: is not a readable \.mat file"):
        datasets.load("OxfordFlowers", tmp_path)
    labels.unlink()
    with pytest.raises(ProblemError, match=r"no imagelabels\.mat at .*; see DATASETS\.md"):
        datasets.load("OxfordFlowers", tmp_path)


# fmt: off
LAYOUTS = {  # the set: its folder, text files in it, images, classes, images in each part
    "OxfordPets": (
        "oxford_pets", {"annotations/trainval.txt": "#list\ngreat_pyrenees_1 1 1 1\nBengal_1 2 1 1",
                        "annotations/test.txt": "great_pyrenees_20 1 1 1"},
        "images/great_pyrenees_1.jpg images/Bengal_1.jpg images/great_pyrenees_20.jpg",
        ["Bengal", "great_pyrenees"], (2, 0, 1)),
    "Food101": (
        "food-101/food-101", {"meta/train.txt": "apple_pie/1\npho/1", "meta/test.txt": "pho/2"},
        "images/apple_pie/1.jpg images/pho/1.jpg images/pho/2.jpg",
        ["apple_pie", "pho"], (2, 0, 1)),
    "DescribableTextures": (
        "dtd/dtd/dtd", {"labels/train1.txt": "dotted/1.jpg", "labels/val1.txt": "dotted/1.jpg",
                        "labels/test1.txt": "dotted/2.jpg\nbanded/1.jpg"},
        "images/dotted/1.jpg images/dotted/2.jpg images/banded/1.jpg",
        ["banded", "dotted"], (1, 1, 2)),
    "FGVCAircraft": (
        "fgvc_aircraft", {"images_variant_train.txt": "000 707-320",
                          "images_variant_val.txt": "001 707-320",
                          "images_variant_test.txt": "002 DR-400\n003 F/A-18"},
        "images/000.jpg images/001.jpg images/002.jpg images/003.jpg",
        ["707-320", "DR-400", "F/A-18"], (1, 1, 2)),
    "CUB": (
        "CUB_200_2011", {
            "images.txt": "1 001.Black_footed_Albatross/a b.jpg\n2 002.Laysan_Albatross/c.jpg",
            "train_test_split.txt": "1 0\n2 1\n"},
        "images/001.Black_footed_Albatross/a%b.jpg images/002.Laysan_Albatross/c.jpg",
        ["Black footed Albatross", "Laysan Albatross"], (1, 0, 1)),
    "SUN397": (
        "sun397", {}, "SUN397/a/abbey/1.jpg SUN397/a/abbey/2.jpg SUN397/a/flat/outdoor/1.jpg",
        ["abbey", "outdoor flat"], (2, 0, 1)),
    "EuroSAT": (
        "eurosat/eurosat", {}, "2750/SeaLake/1.jpg 2750/SeaLake/2.jpg", ["Sea or Lake"], (1, 0, 1)),
    "PinsFaces": (
        "pins_faces", {}, "105_classes_pins_dataset/pins_Ann%Lee/1.jpg", ["Ann Lee"], (0, 0, 1)),
    "CaltechObjects": (
        "caltech-101/caltech101", {},
        "101_ObjectCategories/Faces/1.jpg 101_ObjectCategories/emu/1.jpg",
        ["human face"], (0, 0, 1)),
    "PLANTDOC": (
        "PlantDoc-Dataset", {}, "train/Rust%leaf/1.jpg train/Apple/1.jpg test/Apple/2.jpg",
        ["Apple", "Rust leaf"], (2, 0, 1)),
}
# fmt: on


@pytest.mark.parametrize("name", LAYOUTS)
def test_splits_are_made_of_lists_and_folders_in_either_layout(tmp_path, name, capsys):
    folder, files, images, classnames, expected = LAYOUTS[name]
    for file, text in files.items():
        (tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / file).write_text(text)
    for path in images.split():
        picture(tmp_path / folder / path.replace("%", " "))
    data, row = datasets.load(name, tmp_path), datasets.spec(name)
    assert sorted(data.classnames) == classnames and counts(data) == expected
    assert data.comparable == (not row.split_file)
    status, out = run_check(capsys, tmp_path, "--set", name)
    assert status == 0 and (f"has {row.classes} classes" in out) == bool(row.classes)
    for file in files:
        (tmp_path / folder / file).write_text("?\n")
        refuses("not in the known form", datasets.load, name, tmp_path)
        (tmp_path / folder / file).unlink()
        refuses(rf"no {Path(file).name} at .*; see DATASETS\.md", datasets.load, name, tmp_path)
        (tmp_path / folder / file).write_text(files[file])


@pytest.mark.parametrize("name", [f"ImageNet{kind}" for kind in ("", "V2", "Sketch", "A", "R")])
def test_imagenet_and_its_kin(tmp_path, name):
    row = datasets.spec(name)
    folder, names = tmp_path / row.folder, tmp_path / row.folder / "classnames.txt"
    numbers = name == "ImageNetV2"
    for place in ("1", "10", "2") if numbers else ("n02", "n01", "n04008634"):
        picture(folder / row.image_folder / place / "x.JPEG")
    refuses(r"no classnames\.txt at .*; see DATASETS\.md", datasets.load, name, tmp_path)
    lines = ["n01 tench", "n02 goldfish", *(f"n{n:02} fish {n}" for n in range(3, 12))]
    lines.append("n04008634 missile")  # its name in WordNet is another
    names.write_text("\n".join(lines))
    data = datasets.load(name, tmp_path)
    expected = ["goldfish", "fish 3", "fish 11"] if numbers else ["tench", "goldfish", "projectile"]
    assert data.classnames == expected and data.comparable
    names.write_text("\n".join(lines).replace("fish 3", "goldfish").replace("tench", "goldfish"))
    refuses("labels 0 and 1 are both called", datasets.load, name, tmp_path)
    names.write_text("\n".join(lines))
    picture(folder / row.image_folder / "n99/x.JPEG")
    refuses(r"no line for the folder .*n99", datasets.load, name, tmp_path)


# The table, names, vocabularies


def test_every_set_is_registered_under_its_name_and_has_torchvisions():
    import torchvision.datasets

    for name, row in datasets.SETS.items():
        assert DATASET_REGISTRY.get(name).__name__ == name
        assert row.template.count("{}") == 1
    assert all(hasattr(torchvision.datasets, name) for name in datasets.NAMES)
    assert datasets.spec("DTD").name == "DescribableTextures"


def test_match_prefers_the_exact_spelling():
    names = ["sea_horse", "Scotch terrier", "Lotus", "lotus", "C/V Van"]
    for name, meant in {"sea horse": 0, "SCOTCH_terrier": 1, "lotus": 3}.items():
        assert datasets.match(name, names) == names[meant]
    for name, message in {
        "LOTUS": "ambiguous: write one of 'Lotus', 'lotus'",
        " _": "is empty",
        "sea hose": "'Toys' has no class 'sea hose'; nearest: 'sea_horse'",
    }.items():
        refuses(message, datasets.match, name, names, "Toys")


@pytest.mark.parametrize("name", FORGOTTEN)
def test_vocabulary_of_a_set_of_photographs(name):
    words, forgotten = set(datasets.retain_vocabulary(name)), FORGOTTEN[name]
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9'. -]*", word) for word in words)
    assert all(len(datasets.same_meaning([each], name)) > 1 for each in forgotten)
    assert len(words - datasets.same_meaning(forgotten, name)) >= 100


def test_vocabulary_format(tmp_path, monkeypatch, request):
    monkeypatch.setattr(vocabulary, "FOLDER", tmp_path)
    request.addfinalizer(vocabulary._read.cache_clear)
    vocabulary._read.cache_clear()
    file = tmp_path / "Caltech101.txt"
    file.write_text("# note\nDuck Bill = platypus; sea_horse;  # why\n\nowl\nowl\n")
    assert datasets.retain_vocabulary("Caltech101") == ["duck bill", "owl"]
    for name in ("Platypus", "sea_horse"):
        assert "duck bill" in datasets.same_meaning([name], "Caltech101")
    assert datasets.same_meaning(["owl"], "Caltech101") == {"owl"}
    for broken, message in ((b"owl\nduck bill =\n", "line 2"), (b"\xff", "UTF-8")):
        file.write_bytes(broken)
        vocabulary._read.cache_clear()
        refuses(rf"Caltech101\.txt.*{message}", datasets.retain_vocabulary, "Caltech101")
    file.unlink()
    assert datasets.retain_vocabulary("Caltech101") == datasets.retain_vocabulary("../x") == []


# python -m datasets.check, python -m datasets.download


def test_check_names_each_broken_image(tmp_path, capsys, refused):
    folder = caltech(tmp_path)
    only = "--set", "Caltech101"
    status, out = run_check(capsys, tmp_path, *only)
    assert status == 0 and "put split_zhou_Caltech101.json into caltech-101/" in out
    publish(folder, good_split())
    status, out = run_check(capsys, tmp_path)
    assert status == 0 and "Caltech101: present, 20 of 20 images, 2 classes" in out
    assert "OxfordFlowers: missing, no folder" in out and "unreadable" not in out
    images = folder / "101_ObjectCategories/sea_horse"
    torn, text, gone = (images / f"image_000{number}.jpg" for number in range(3))
    torn.write_bytes(torn.read_bytes()[:-200])
    text.write_text("<html>404</html>")
    gone.unlink()
    status, out = run_check(capsys, tmp_path, *only)
    assert status == 1 and "Caltech101: broken, 19 of 20 images" in out
    for line in (f"unreadable: {torn} (", f"unreadable: {text} (", f"missing: {gone}\n"):
        assert line in out
    assert out.count("unreadable: ") == 2 and "where to get" in out
    publish(folder, [])
    status, out = run_check(capsys, tmp_path, *only, "--set", "StanfordDogs")
    assert status == 1
    assert "Caltech101: broken, split" in out and "StanfordDogs: missing" in out
    for wrong in (["nowhere"], []):
        refused(wrong, lambda argv: run(check.main, argv))


def test_cifar_is_saved_as_files_once(tmp_path, monkeypatch, capsys):
    class Fake(list):
        classes = ("apple", "aquarium_fish")

        def __init__(self, root, train, download):
            assert Path(root).is_dir() and not train and download
            super().__init__((Image.new("RGB", (32, 32), (9 * n, 0, 0)), n % 2) for n in range(6))

    monkeypatch.setattr("torchvision.datasets.CIFAR100", Fake)
    for _ in range(2):
        assert download.main(["CIFAR100", "--root", str(tmp_path / "data")]) == 0
        assert "CIFAR100: present, 6 of 6 images, 2 classes" in capsys.readouterr().out
    data = datasets.load("CIFAR100", tmp_path / "data")
    assert data.classnames == ["apple", "aquarium_fish"] and counts(data) == (0, 0, 6)


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torchvision.datasets.DTD", Mock(side_effect=OSError("no\nnetwork")))
    for name, message in {"DTD": "fetched (no network)", "UCF101": "get it by hand"}.items():
        assert run(download.main, [name, "--root", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
    assert run(download.main, ["MiniDigits", "--root", str(tmp_path)]) == 0
