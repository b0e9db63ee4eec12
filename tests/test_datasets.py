"""The image sets: split files, made splits, names, vocabularies, `python -m datasets.check`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import datasets
from datasets import check, vocabulary
from datasets.raw import divide
from datasets.reader import read_image
from engine import DATASET_REGISTRY
from engine.cli import run
from engine.config import settings
from forgetting.errors import ProblemError

FORGOTTEN = {
    "StanfordDogs": ["Pekinese", "toy poodle", "Scotch terrier"],
    "StanfordCars": [
        "2009 Spyker C8 Coupe",
        "2010 Dodge Ram Pickup 3500 Crew Cab",
        "2011 Ford Ranger SuperCab",
    ],
    "Caltech101": ["euphonium", "minaret", "platypus"],
    "OxfordFlowers": ["trumpet creeper", "gazania", "tree mallow"],
}
CALTECH_FOLDERS = ["BACKGROUND_Google", "Faces", "Faces_easy", "airplanes", "sea_horse"]


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def caltech(root: Path, images: int = 10) -> Path:
    """A tiny download in Caltech101's layout; the folder of the set."""
    for group in CALTECH_FOLDERS:
        for number in range(images):
            picture(
                root / "caltech-101/101_ObjectCategories" / group / f"image_{number:04d}.jpg",
                number,
            )
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
    (folder / name).write_text(split if isinstance(split, str) else json.dumps(split))


def structs(**columns: list) -> np.ndarray:
    """A MATLAB struct array, (1, n), as the devkit of StanfordCars holds it."""
    rows = list(zip(*columns.values(), strict=True))
    array = np.zeros((1, len(rows)), dtype=[(name, "O") for name in columns])
    for index, row in enumerate(rows):
        array[0, index] = row
    return array


def cells(values: list[str], column: bool = False) -> np.ndarray:
    array = np.array(values, dtype=object)
    return array[:, None] if column else array[None, :]


# The published split file


def test_published_split_is_read_as_it_is(tmp_path, capsys):
    publish(caltech(tmp_path), good_split())
    cfg = settings(dataset="Caltech101", opts=["DATASET.ROOT", str(tmp_path)])
    data = DATASET_REGISTRY.get("Caltech101")(cfg)
    assert (len(data.train_x), len(data.val), len(data.test)) == (10, 4, 6)
    assert data.classnames == ["airplanes", "sea_horse"]  # spelling kept, folders not renamed
    assert data.num_classes == 2 and data.lab2cname == {0: "airplanes", 1: "sea_horse"}
    assert data.test[0].impath.endswith("101_ObjectCategories/airplanes/image_0007.jpg")
    assert data.test[0].domain == 0 and data.train_u is None
    assert {(datum.label, datum.classname) for datum in data.test} == {
        (0, "airplanes"),
        (1, "sea_horse"),
    }
    assert data.comparable
    assert "not comparable" not in capsys.readouterr().out
    assert not list(tmp_path.rglob("split_made*"))


def test_classes_come_from_all_splits_together(tmp_path):
    split = good_split()
    split["train"], split["val"] = [], entries("airplanes", 0, range(2))
    split["test"] = entries("sea_horse", 1, range(3))
    publish(caltech(tmp_path), split)
    data = datasets.load("Caltech101", tmp_path)
    assert data.classnames == ["airplanes", "sea_horse"] and data.train_x == []


def test_cars_paths_start_at_the_set_folder(tmp_path):
    name = "2012 Ram C/V Cargo Van Minivan"
    picture(tmp_path / "stanford_cars/cars_test/00001.jpg")
    split = {"train": [], "val": [], "test": [["cars_test/00001.jpg", 0, name]]}
    publish(tmp_path / "stanford_cars", split, "split_zhou_StanfordCars.json")
    data = datasets.load("StanfordCars", tmp_path)
    assert data.classnames == [name]
    assert Path(data.test[0].impath) == tmp_path / "stanford_cars/cars_test/00001.jpg"


def test_an_image_folder_of_links_is_read(tmp_path):
    folder = caltech(tmp_path / "store")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/caltech-101").symlink_to(folder)
    linked = folder / "101_ObjectCategories/airplanes/image_0007.jpg"
    linked.rename(tmp_path / "blob")
    linked.symlink_to(tmp_path / "blob")
    publish(folder, good_split())
    assert len(datasets.load("Caltech101", tmp_path / "data").test) == 6


BROKEN = {
    "no JSON": ('{"train": [', "is not JSON"),
    "a list": ("[1, 2]", "must hold 'train', 'val' and 'test'; found list"),
    "no test": ({"train": [], "val": []}, "must hold 'train', 'val' and 'test'"),
    "empty test": ({"train": entries("a", 0, range(1)), "val": [], "test": []}, "'test' is empty"),
    "no lists": ({"train": {}, "val": [], "test": []}, "'train' must be a list"),
    "a pair": ({"train": [], "val": [], "test": [["a.jpg", 0]]}, r"test\[0\]: must be \[path"),
    "text label": (
        {"train": [], "val": [["a.jpg", "0", "a"]], "test": []},
        r"val\[0\]: the label must be a whole number from 0, is '0'",
    ),
    "negative label": ({"train": [], "val": [], "test": [["a.jpg", -1, "a"]]}, "is -1"),
    "boolean label": ({"train": [], "val": [], "test": [["a.jpg", True, "a"]]}, "is True"),
    "gap in labels": (
        {"train": entries("a", 0, range(1)), "val": [], "test": entries("b", 2, range(1))},
        "no image has label 1",
    ),
    "huge label": ({"train": [], "val": [], "test": [["a.jpg", 10**9, "a"]]}, "has label 0"),
    "huge gap": (
        {"train": entries("a", 0, range(1)), "val": [], "test": [["b.jpg", 2 * 10**8, "b"]]},
        "labels must be 0 to 200000000 without a gap; no image has label 1",
    ),
    "endless label": ('{"train": [], "val": [], "test": [["a.jpg", ' + "9" * 5000, "is not JSON"),
    "two names a label": (
        {"train": entries("a", 0, range(1)), "val": [], "test": entries("b", 0, range(1))},
        r"test\[0\]: label 0 is called 'b', but 'a' before",
    ),
    "two labels a name": (
        {"train": entries("a", 0, range(1)), "val": [], "test": entries("a", 1, range(1, 2))},
        "labels 0 and 1 are both called 'a'",
    ),
    "two spellings of a name": (
        {"train": [["a.jpg", 0, "a_b"]], "val": [], "test": [["b.jpg", 1, "a  b"]]},
        "labels 0 and 1 are both called 'a  b'",
    ),
    "two labels an image": (
        {"train": [["a/b.jpg", 0, "a"]], "val": [], "test": [["a/./b.jpg", 1, "b"]]},
        r"test\[0\]: 'a/./b.jpg' has label 1, but 0 before",
    ),
    "deep nesting": ("[" * 100_000, "is not JSON"),
    "empty name": ({"train": [], "val": [], "test": [["a.jpg", 0, " "]]}, "class name must be"),
    "empty path": ({"train": [], "val": [], "test": [["", 0, "a"]]}, "path must be"),
    "path upwards": (
        {"train": [], "val": [], "test": [["a/../../b.jpg", 0, "a"]]},
        r"test\[0\]: path 'a/../../b.jpg' leads out of the image folder",
    ),
    "absolute path": (
        {"train": [], "val": [], "test": [["/etc/passwd", 0, "a"]]},
        "path '/etc/passwd' leads out",
    ),
}


@pytest.mark.parametrize(("split", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_split_is_one_line(tmp_path, split, message):
    (tmp_path / "caltech-101/101_ObjectCategories").mkdir(parents=True)
    publish(tmp_path / "caltech-101", split)
    with pytest.raises(ProblemError, match=message) as caught:
        datasets.load("Caltech101", tmp_path)
    text = str(caught.value)
    assert "split_zhou_Caltech101.json" in text and "\n" not in text


def test_names_that_differ_in_case_and_an_image_in_two_parts_are_read(tmp_path):
    """Negative control: ImageNet has a dog "Cardigan" and a garment "cardigan"."""
    folder = tmp_path / "caltech-101/101_ObjectCategories"
    for name in "ab":
        picture(folder / f"{name}.jpg")
    both = [["a.jpg", 0, "Cardigan"], ["b.jpg", 1, "cardigan"]]
    publish(tmp_path / "caltech-101", {"train": both, "val": [], "test": both})
    assert datasets.load("Caltech101", tmp_path).classnames == ["Cardigan", "cardigan"]


def test_images_of_more_than_8_bits_keep_their_shades(tmp_path):
    shades = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(shades).save(tmp_path / "deep.png")
    Image.fromarray((shades >> 8).astype(np.uint8)).save(tmp_path / "plain.png")
    Image.fromarray(shades.astype(np.float32)).save(tmp_path / "float.tiff")
    with Image.open(tmp_path / "deep.png") as image:
        assert np.asarray(image.convert("RGB")).mean() > 250, "what Pillow alone makes of it"
    deep, plain = (read_image(tmp_path / f"{name}.png") for name in ("deep", "plain"))
    assert deep.mode == "RGB" and np.array_equal(np.asarray(deep), np.asarray(plain))
    with pytest.raises(ProblemError, match="mode F have no known range"):
        read_image(tmp_path / "float.tiff")


def test_missing_images_are_counted_and_the_first_is_named(tmp_path):
    folder = caltech(tmp_path)
    publish(folder, good_split())
    for number in (8, 9):
        (folder / f"101_ObjectCategories/sea_horse/image_{number:04d}.jpg").unlink()
    with pytest.raises(ProblemError, match=r"2 of 20 images .*first .*sea_horse/image_0008\.jpg"):
        datasets.load("Caltech101", tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (".", r"no folder .*caltech-101; see DATASETS\.md"),
        ("caltech-101", r"no image folder .*101_ObjectCategories; see DATASETS\.md"),
        (None, r"no data root at .*; see DATASETS\.md"),
        ("caltech-101/101_ObjectCategories", r"no split file .*none can be made: .*no folder with"),
    ],
)
def test_absent_set_names_the_path_and_the_document(tmp_path, make, message):
    root = tmp_path / "data"
    if make:
        (root / make).mkdir(parents=True)
    with pytest.raises(ProblemError, match=f"Caltech101: {message}"):
        datasets.load("Caltech101", root)


def test_available_tells_present_from_absent(tmp_path):
    publish(caltech(tmp_path), good_split())
    found = datasets.available(tmp_path)
    assert list(found) == list(datasets.SETS)
    assert found["Caltech101"] is None and found["MiniDigits"] is None
    assert "stanford_dogs" in found["StanfordDogs"]


def test_unknown_set_names_the_nearest():
    with pytest.raises(ProblemError, match="'StanfordDogs'"):
        datasets.load("StandfordDogs", "data")


# Splits made from a raw download


def test_caltech_split_is_made_once_and_said_to_be_incomparable(tmp_path, capsys):
    folder = caltech(tmp_path)
    data = datasets.load("Caltech101", tmp_path)
    assert data.classnames == ["face", "airplane", "sea_horse"]  # CoOp's names and exclusions
    assert (len(data.train_x), len(data.val), len(data.test)) == (15, 6, 9)
    paths = [datum.impath for part in (data.train_x, data.val, data.test) for datum in part]
    assert len(set(paths)) == 30
    assert not data.comparable
    assert "not comparable" in capsys.readouterr().out
    made = folder / "split_made_Caltech101.json"
    written = made.read_bytes()

    again = datasets.load("Caltech101", tmp_path)
    assert made.read_bytes() == written and not again.comparable
    assert [d.impath for d in again.test] == [d.impath for d in data.test]
    made.unlink()
    datasets.load("Caltech101", tmp_path)
    assert made.read_bytes() == written  # the same from scratch

    publish(folder, good_split())
    assert datasets.load("Caltech101", tmp_path).comparable  # the published file wins


def test_made_split_that_cannot_be_saved_is_used_all_the_same(tmp_path, capsys):
    folder = caltech(tmp_path)
    (folder / "split_made_Caltech101.json").mkdir()  # in the way, as a read-only disk is
    assert len(datasets.load("Caltech101", tmp_path).test) == 9
    assert "not saved (cannot write" in capsys.readouterr().out


def test_division_of_a_class_does_not_depend_on_the_others():
    ants, bees = entries("ant", 0, range(20)), entries("bee", 1, range(20))
    as_items = [tuple(entry) for entry in ants + bees]
    both = [item for item in divide(as_items, 0.3)[1] if item[2] == "bee"]
    assert both == divide([tuple(entry) for entry in bees], 0.3)[1]
    assert len(both) == 6
    assert both != [tuple(entry) for entry in bees[:6]]  # shuffled, not the first ones


def cars(root: Path) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    labels = [1, 1, 1, 1, 1, 2, 2, 2, 2, 2]
    files = [f"{number:05d}.jpg" for number in range(1, 11)]
    for images in ("cars_train", "cars_test"):
        for file in files:
            picture(folder / images / file)
    names = ["AM General Hummer SUV 2000", "Spyker C8 Coupe 2009"]
    savemat(folder / "devkit/cars_meta.mat", {"class_names": cells(names)})
    annotations = {"annotations": structs(**{"class": labels, "fname": files})}
    savemat(folder / "devkit/cars_train_annos.mat", annotations)
    savemat(folder / "cars_test_annos_withlabels.mat", annotations)


def test_cars_from_the_devkit_have_the_year_first(tmp_path):
    cars(tmp_path)
    data = datasets.load("StanfordCars", tmp_path)
    assert data.classnames == ["2000 AM General Hummer SUV", "2009 Spyker C8 Coupe"]
    assert (len(data.train_x), len(data.val), len(data.test)) == (8, 2, 10)
    assert all("cars_test/" in datum.impath for datum in data.test)
    assert data.test[9].label == 1 and not data.comparable


def test_torn_official_list_is_one_line(tmp_path):
    cars(tmp_path)
    meta = tmp_path / "stanford_cars/devkit/cars_meta.mat"
    meta.write_bytes(meta.read_bytes()[:60])
    with pytest.raises(ProblemError, match=r"cars_meta\.mat: is not a readable \.mat file"):
        datasets.load("StanfordCars", tmp_path)
    savemat(meta, {"something_else": np.arange(3)})
    with pytest.raises(ProblemError, match="not in the known form"):
        datasets.load("StanfordCars", tmp_path)
    meta.unlink()
    with pytest.raises(ProblemError, match=r"no cars_meta\.mat at .*; see DATASETS\.md"):
        datasets.load("StanfordCars", tmp_path)


@pytest.mark.parametrize("with_names", [True, False])
def test_flowers_from_the_official_parts(tmp_path, with_names):
    folder = tmp_path / "oxford_flowers"
    for number in range(1, 10):
        picture(folder / f"jpg/image_{number:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2, 3] * 3], dtype=np.uint8)})
    parts = {"trnid": [[1, 2, 3]], "valid": [[4, 5, 6]], "tstid": [[9, 7, 8]]}
    savemat(folder / "setid.mat", {part: np.array(ids) for part, ids in parts.items()})
    if with_names:
        names = {"1": "gazania", "2": "rose", "3": "tree mallow"}
        (folder / "cat_to_name.json").write_text(json.dumps(names))
    data = datasets.load("OxfordFlowers", tmp_path)
    assert [Path(d.impath).name for d in data.test] == [f"image_0000{n}.jpg" for n in (9, 7, 8)]
    assert [d.label for d in data.test] == [2, 0, 1]
    if with_names:
        assert data.classnames == ["gazania", "rose", "tree mallow"]
    else:
        assert data.classnames[0] == "pink primrose"  # torchvision's list


def test_dogs_from_the_official_lists(tmp_path):
    folder = tmp_path / "stanford_dogs"
    dogs = ["n02085936-Maltese_dog", "n02086240-Shih-Tzu"]
    paths = [f"{dog}/{dog.split('-')[0]}_{number}.jpg" for dog in dogs for number in range(10)]
    for path in paths:
        picture(folder / "Images" / path)
    labels = np.repeat([[1], [2]], 10, axis=0)
    (folder / "lists").mkdir()
    for file, part in (("train_list.mat", slice(0, None, 2)), ("test_list.mat", slice(1, None, 2))):
        content = {"file_list": cells(paths[part], column=True), "labels": labels[part]}
        savemat(folder / "lists" / file, content)
    data = datasets.load("StanfordDogs", tmp_path)
    assert data.classnames == ["Maltese dog", "Shih-Tzu"]
    assert (len(data.train_x), len(data.val), len(data.test)) == (8, 2, 10)
    assert data.test[0].impath == str(folder / "Images" / paths[1])


# Mini sets go through the same reader


def test_mini_set_is_drawn_once_and_read(tmp_path, capsys):
    data = datasets.load("MiniShapes", tmp_path / "new")
    assert data.num_classes >= 8 and data.comparable
    assert "drawing" in capsys.readouterr().out
    datasets.load("MiniShapes", tmp_path / "new")
    assert "drawing" not in capsys.readouterr().out


def test_foreign_folder_in_place_of_a_mini_set(tmp_path):
    (tmp_path / "mini_digits").mkdir()
    (tmp_path / "mini_digits/mine.txt").write_text("mine")
    with pytest.raises(ProblemError, match="move it away"):
        datasets.load("MiniDigits", tmp_path)
    assert (tmp_path / "mini_digits/mine.txt").read_text() == "mine"


# The table, names, vocabularies


def test_every_set_is_registered_under_its_name():
    for name, row in datasets.SETS.items():
        assert DATASET_REGISTRY.get(name).__name__ == name
        assert row.template.count("{}") == 1
    assert datasets.spec("OxfordFlowers").template == "a photo of a {}, a type of flower."
    with pytest.raises(ProblemError, match="did you mean 'Caltech101'"):
        datasets.spec("Caltech-101")


def test_match_prefers_the_exact_spelling():
    names = ["sea_horse", "Scotch terrier", "Lotus", "lotus", "C/V Van"]
    assert datasets.match("sea horse", names) == "sea_horse"
    assert datasets.match("SCOTCH_terrier", names) == "Scotch terrier"
    assert datasets.match("lotus", names) == "lotus"
    assert datasets.match("c/v van", names) == "C/V Van"
    with pytest.raises(ProblemError, match="ambiguous: write one of 'Lotus', 'lotus'"):
        datasets.match("LOTUS", names)
    with pytest.raises(ProblemError, match="the name of a class is empty"):
        datasets.match(" _", ["cat"], "Toys")
    with pytest.raises(ProblemError, match="'Toys' has no class 'sea hose'; nearest: 'sea_horse'"):
        datasets.match("sea hose", names, "Toys")


@pytest.mark.parametrize("name", FORGOTTEN)
def test_vocabulary_of_a_set_of_photographs(name):
    words = datasets.retain_vocabulary(name)
    assert len(words) >= 110
    assert len(set(words)) == len(words) and words == [word.lower() for word in words]
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9'. -]*", word) for word in words)
    means = datasets.synonyms(name)
    assert all(names <= set(words) for names in means.values())
    assert {forgotten.lower() for forgotten in FORGOTTEN[name]} <= set(means)
    kept = set(words) - {w for f in FORGOTTEN[name] for w in means[f.lower()]}
    assert len(kept) >= 100  # enough is left to retain


def test_a_neighbour_is_no_synonym():
    dogs = datasets.synonyms("StanfordDogs")
    assert dogs["pekinese"] >= {"pekingese"}
    assert not any("miniature poodle" in names for names in dogs.values())


def test_flower_synonyms_name_classes_of_the_set():
    from torchvision.datasets import Flowers102

    assert set(datasets.synonyms("OxfordFlowers")) <= set(Flowers102.classes)


def test_vocabulary_format(tmp_path, monkeypatch, request):
    monkeypatch.setattr(vocabulary, "FOLDER", tmp_path)
    request.addfinalizer(vocabulary._read.cache_clear)
    vocabulary._read.cache_clear()
    file = tmp_path / "Caltech101.txt"
    file.write_text("# note\nDuck Bill = platypus; sea_horse;  # why\n\nowl\nowl\n")
    assert datasets.retain_vocabulary("Caltech101") == ["duck bill", "owl"]
    assert datasets.synonyms("Caltech101") == {
        "platypus": {"duck bill"},
        "sea horse": {"duck bill"},
    }
    file.write_text("owl\nduck bill =\n")
    vocabulary._read.cache_clear()
    with pytest.raises(ProblemError, match=r"Caltech101\.txt, line 2"):
        datasets.retain_vocabulary("Caltech101")
    file.write_bytes(b"\xff")
    with pytest.raises(ProblemError, match=r"Caltech101\.txt cannot be read"):
        datasets.retain_vocabulary("Caltech101")
    file.unlink()
    assert datasets.retain_vocabulary("Caltech101") == datasets.retain_vocabulary("../x") == []


# python -m datasets.check


def run_check(capsys, *arguments: object) -> tuple[int, str, str]:
    status = run(check.main, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_check_names_each_broken_image(tmp_path, capsys):
    folder = caltech(tmp_path)
    publish(folder, good_split())
    status, out, _ = run_check(capsys, tmp_path)
    assert status == 0
    assert "Caltech101: present, 20 of 20 images, 2 classes" in out
    assert "OxfordFlowers: missing, no folder" in out and "unreadable" not in out

    images = folder / "101_ObjectCategories"
    torn = images / "airplanes/image_0003.jpg"
    torn.write_bytes(torn.read_bytes()[:-200])
    (images / "sea_horse/image_0001.jpg").write_text("<html>404</html>")
    (images / "sea_horse/image_0002.jpg").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status, out, _ = run_check(capsys, tmp_path, "--set", "Caltech101")
    assert status == 1
    assert "Caltech101: broken, 19 of 20 images" in out
    assert f"unreadable: {torn} (image file is truncated" in out
    assert f"unreadable: {images / 'sea_horse/image_0001.jpg'} (cannot identify image file" in out
    assert f"missing: {images / 'sea_horse/image_0002.jpg'}" in out
    assert out.count("unreadable: ") == 2 and "data.caltech.edu" in out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_check_of_a_set_without_its_split(tmp_path, capsys):
    folder = caltech(tmp_path)
    status, out, _ = run_check(capsys, tmp_path, "--set", "Caltech101")
    assert status == 0 and "30 of 30 images" in out
    assert "put split_zhou_Caltech101.json into caltech-101/" in out
    assert not (folder / "split_made_Caltech101.json").exists()  # a check writes nothing


def test_check_of_a_broken_split(tmp_path, capsys):
    publish(caltech(tmp_path), "{")
    status, out, _ = run_check(capsys, tmp_path, "--set", "Caltech101", "--set", "StanfordDogs")
    assert status == 1
    assert "Caltech101: broken, split file" in out and "StanfordDogs: missing" in out


@pytest.mark.parametrize("arguments", [["nowhere"], [".", "--set", "Caltech"]])
def test_check_of_wrong_arguments_is_one_line(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    status, out, err = run_check(capsys, *arguments)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
