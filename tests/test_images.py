"""Images of one's own, CoOp's other sets in every layout, and torchvision's downloads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
import train
from clip.bundle import FeatureBundle
from datasets import check, download
from datasets.mini import draw
from engine.cli import run
from evaluation.audit.inputs import Places
from evaluation.audit.run import audit_folder
from forgetting.errors import ProblemError
from forgetting.models.vocabulary import generic_names
from tests.conftest import REPOSITORY
from tests.test_datasets import picture, publish, run_check
from utils import create_results

SHAPES = ("red circle", "green_triangle", "blue star")


def shapes(root: Path, count: int = 6) -> Path:
    """A folder a class of pictures that mini recognises."""
    for label, name in enumerate(SHAPES):
        (root / name).mkdir(parents=True)
        for number in range(count):
            random = np.random.default_rng([label, number])
            pixels = draw(name.replace("_", " "), random, test=True)
            file = os.fsencode(root / name / f"{number} ä'\"") + b"\xff.png"
            Image.fromarray(pixels).save(os.fsdecode(file))
    return root


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def counts(images: datasets.ImageSet) -> tuple[int, int, int]:
    return len(images.train_x), len(images.val), len(images.test)


# A folder a class


@pytest.mark.parametrize("trainer", ["ForgetExact", "ForgetLoRA"])
def test_a_folder_of_ones_own_is_forgotten_from_and_audited(tmp_path, capsys, trainer):
    images = shapes(tmp_path / "my shapes")
    before = tree(images)
    argv = ["--images", str(images), "--backbone", "mini", "--trainer", trainer]
    argv += ["--root", str(tmp_path / "none"), "--cache", str(tmp_path / "cache")]
    argv += ["--output-dir", str(tmp_path / "out"), "--forget", "Green Triangle"]
    folder = train.main(argv)
    df, args = create_results(folder)
    assert df.ds.tolist() == ["my shapes"] and df.name.tolist() == ["green_triangle"]
    assert df.cls_Noforget[0] > 0.8 and df.full_Noforget[0] > 0.8
    assert df.cls_forget[0] < 0.2 and df.full_forget[0] > 0.8
    assert args.images == str(images)
    assert tree(images) == before, "nothing is written among the user's images"
    found = audit_folder(
        folder,
        without=["relearning"],
        places=Places(images=str(images), cache=str(tmp_path / "cache")),
    )
    assert found["my shapes"]["green_triangle"]["classes"]
    out = capsys.readouterr().out
    assert "not evaluated" not in out
    common = f"{len(generic_names())} generic"  # what an exact solve retains without a vocabulary
    assert (common in out) == (trainer == "ForgetExact")


def test_all_images_are_test_images_at_any_depth(tmp_path):
    for name in (
        "a/1.jpg",
        "a/deep/er/2.PNG",
        "b_c/x.webp",
        ".git/no.png",
        "b_c/.no.png",
        "no.png",
    ):
        picture(tmp_path / "own" / name)
    picture(tmp_path / "own/..a/1.png")
    (tmp_path / "own/empty").mkdir()
    (tmp_path / "own/b_c/notes.txt").write_text("no image")
    (tmp_path / "own/a/up").symlink_to(tmp_path / "own")  # a circle
    images = datasets.load("", "none", str(tmp_path / "own"))
    assert images.row.name == "own" and images.classnames == ["a", "b_c"]
    assert counts(images) == (0, 0, 3) and images.comparable


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("train", "val", "test"), (2, 2, 2)),
        (("Training", "valid"), (2, 0, 2)),
        (("train",), (0, 0, 2)),
    ],
)
def test_folders_that_divide_a_set(tmp_path, parts, expected):
    for part in parts:
        picture(tmp_path / "own" / part / "zebra/1.png")
        picture(tmp_path / "own" / part / "ant/1.png")
    images = datasets.load("zoo", "none", str(tmp_path / "own"))
    assert images.classnames == ["ant", "zebra"] and counts(images) == expected


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train/1.png", "car/1.png"):
        picture(tmp_path / "own" / name)
    assert datasets.load("", "none", str(tmp_path / "own")).classnames == ["car", "train"]


def test_folders_are_renamed_by_a_list(tmp_path):
    for number in (0, 1, 10, 2):
        picture(tmp_path / "own" / str(number) / "1.png")
    (tmp_path / "own/classnames.txt").write_text("0 sea horse\n10 crab\n")
    names = datasets.load("", "none", str(tmp_path / "own")).classnames
    assert names == ["sea horse", "1", "2", "crab"]


ODD = ["|", "a|b\\", "ü", "'; rm -rf $HOME #", "a\nb", "%2E", "x" * 200, "{}", "settings "]


def test_any_folder_name_is_a_class(tmp_path):
    for name in ODD:
        picture(tmp_path / "own" / name / "1.png")
    argv = ["--images", str(tmp_path / "own"), "--backbone", "mini", "--trainer", "ForgetExact"]
    argv += ["--cache", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "out")]
    folder = train.main([*argv, "--root", str(tmp_path), "--forget", "all"])
    assert create_results(folder)[0].name.nunique() == len(ODD)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.safetensors")]
    assert len([path for path in files if path.parts[0] == "out"]) >= len(ODD)


# A table


def test_a_table_of_ones_own(tmp_path, capsys):
    for path in ("a/1.png", "a/2.png", "elsewhere/3.png"):
        picture(tmp_path / path)
    for mark in ",;\t":
        rows = [
            ["Note", "CLASS", "Path", "split"],
            ['"x"', "sea horse", "../a/1.png", "train"],
            ["", "sea horse", "../a/2.png", "test"],
            [],
            ["", "crab", str(tmp_path / "elsewhere/3.png"), "val"],
        ]
        table = tmp_path / "lists" / "my birds.csv"
        table.parent.mkdir(exist_ok=True)
        table.write_text("\ufeff" + "\r\n".join(mark.join(row) for row in rows))
        images = datasets.load("", "none", str(table))
        assert images.row.name == "my birds"
        assert set(images.classnames) == {"sea horse", "crab"} and counts(images) == (1, 1, 1)
    status, out, _ = run_check(capsys, "--images", table)
    assert status == 0 and "my birds: present, 3 of 3 images, 2 classes, 1 train" in out
    (tmp_path / "a/1.png").write_text("<html>")
    (tmp_path / "a/2.png").unlink()
    status, out, _ = run_check(capsys, "--images", table)
    assert status == 1 and "missing: " in out and "unreadable: " in out and "split:" not in out
    with pytest.raises(ProblemError, match=r"1 of 3 images .*a/2\.png"):
        datasets.load("", "none", str(table))


BROKEN = {
    "": "its first line must name the columns path and class",
    "a.png,cat\n": "its first line must name",
    "path,class\n": "'test' is empty",
    "path,class\n\n\na.png\n": "line 4: 1 cells, not 2",
    "path,class,split\na.png,cat,dev\n": "line 2: split must be train, val or test",
    'path,class\n"a.png,cat\n': "cannot be read as CSV",
    "path,class\na.png, \n": "class name must be a non-empty",
    "path,class\na.png,cat\na.png,dog\n": "has label 1, but 0 before",
    "path,class\na.png,sea horse\nb.png,sea_horse\n": "are both called",
    "path,class\na\0.png,cat\n": "leads out|cannot be read",
}


@pytest.mark.parametrize(("text", "message"), BROKEN.items(), ids=range(len(BROKEN)))
def test_a_broken_table_is_one_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ProblemError, match=message) as caught:
        datasets.load("", "none", str(tmp_path / "t.csv"))
    assert "\n" not in str(caught.value) and "t.csv" in str(caught.value)


def test_what_are_no_images_is_one_line(tmp_path, refused, capsys):
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "Food101/pie/1.png")
    picture(Path(os.fsdecode(os.fsencode(tmp_path) + b"/bytes/\xff/1.png")))
    picture(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xfe/cat/1.png")))
    (tmp_path / "latin.csv").write_bytes(b"path,class\na.png,\xff\n")
    for images, message in {
        "empty": "no folder with images under",
        "nowhere": "no images at",
        "Food101": "Food101 is a data set of the table; call it otherwise with --dataset NAME",
        "bytes": "has a name that is no text",
        os.fsdecode(b"\xfe"): "is no name for a data set",
        "latin.csv": "cannot be read as CSV",
    }.items():
        argv = ["--images", str(tmp_path / images), "--backbone", "mini", "--forget", "x"]
        assert message in refused([*argv, "--output-dir", str(tmp_path / "out")])
    argv = ["--images", str(tmp_path / "Food101"), "--dataset", "pies", "--features", str(tmp_path)]
    assert "leave them out" in refused([*argv, "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    assert run(check.main, []) == 2 and "give ROOT, or --images" in capsys.readouterr().err


def test_the_commands_of_the_documentation(tmp_path, monkeypatch):
    for name in ("robin", "wren", "magpie"):
        picture(tmp_path / "birds" / name / "1.png")
    rows = [f"birds/{name}/1.png,{name}" for name in ("robin", "wren")]
    (tmp_path / "birds.csv").write_text("\n".join(["path,class", *rows]))
    text = (REPOSITORY / "DATASETS.md").read_text().partition("## Your own images")[2]
    commands = [line.strip() for line in text.partition("\nA folder")[0].splitlines() if line]
    assert len(commands) == 4
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OUT", str(tmp_path / "results"))
    monkeypatch.setenv("PYTHON", sys.executable)
    for line in commands:
        line = line.replace("/my/", f"{tmp_path}/").replace("python ", f"{sys.executable} ")
        for file in ("train.py", "forget_clip.sh"):
            line = line.replace(f" {file}", f" {REPOSITORY / file}")
        told = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert told.returncode == 0, told.stdout + told.stderr
    df, _ = create_results(tmp_path / "results/birds")
    assert df.ds.tolist() == ["birds"] and df.name.tolist() == ["robin"]
    df, _ = create_results(tmp_path / "results/results9/seed_0")
    assert df.ds.tolist() == ["Birds"] and df.name.tolist() == ["robin"]
    bundle = FeatureBundle.load(tmp_path / "bundles/mini/Birds.safetensors")
    assert bundle.classnames == ["magpie", "robin", "wren"] and bundle.retain_names == []


def test_several_names_for_one_folder_are_refused(tmp_path):
    script = ["sh", "forget_clip.sh", "1", "0", "A,B", "mini", "0"]
    environment = os.environ | {"IMAGES": str(tmp_path), "OUT": str(tmp_path / "out")}
    told = subprocess.run(script, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert told.returncode == 2 and "IMAGES is one data set" in told.stderr


# CoOp's other sets


def lists(root: Path, beside: str, files: dict[str, list[str]], images: list[str]) -> None:
    for name, lines in files.items():
        (root / beside / name).parent.mkdir(parents=True, exist_ok=True)
        (root / beside / name).write_text("\n".join(lines) + "\n")
    for path in images:
        picture(root / beside / "images" / path)


PETS = {
    "annotations/trainval.txt": ["#list", "great_pyrenees_1 1 1 1", "Bengal_1 2 1 1"],
    "annotations/test.txt": ["great_pyrenees_20 1 1 1"],
}
FOOD = {"meta/train.txt": ["apple_pie/1", "pho/1"], "meta/test.txt": ["pho/2"]}
TEXTURES = {f"labels/{part}1.txt": ["dotted/dotted_1.jpg"] for part in ("train", "val")}
TEXTURES["labels/test1.txt"] = ["dotted/dotted_2.jpg", "banded/banded_1.jpg"]
PLANES = {
    f"images_variant_{part}.txt": [f"00{n} 707-320"] for n, part in enumerate(("train", "val"))
}
PLANES["images_variant_test.txt"] = ["002 DR-400", "003 F/A-18"]
OFFICIAL = {
    "OxfordPets": (
        ("oxford_pets", "oxford_pets/oxford-iiit-pet"),
        PETS,
        ["great_pyrenees_1.jpg", "Bengal_1.jpg", "great_pyrenees_20.jpg"],
        (["Bengal", "great_pyrenees"], (2, 0, 1)),
    ),
    "Food101": (
        ("food-101", "food-101/food-101"),
        FOOD,
        ["apple_pie/1.jpg", "pho/1.jpg", "pho/2.jpg"],
        (["apple_pie", "pho"], (2, 0, 1)),
    ),
    "DescribableTextures": (
        ("dtd", "dtd/dtd/dtd"),
        TEXTURES,
        ["dotted/dotted_1.jpg", "dotted/dotted_2.jpg", "banded/banded_1.jpg"],
        (["banded", "dotted"], (1, 1, 2)),
    ),
    "FGVCAircraft": (
        ("fgvc_aircraft", "fgvc_aircraft/fgvc-aircraft-2013b/data"),
        PLANES,
        ["000.jpg", "001.jpg", "002.jpg", "003.jpg"],
        (["707-320", "DR-400", "F/A-18"], (1, 1, 2)),
    ),
}


@pytest.mark.parametrize("layout", [0, 1], ids=["CoOp", "torchvision"])
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_lists_in_both_layouts(tmp_path, name, layout, capsys):
    places, files, images, (classnames, expected) = OFFICIAL[name]
    lists(tmp_path, places[layout], files, images)
    data = datasets.load(name, tmp_path)
    assert data.classnames == classnames and counts(data) == expected
    assert data.comparable == (name == "FGVCAircraft")  # CoOp published no other split of it
    row = datasets.spec(name)
    status, out, _ = run_check(capsys, tmp_path, "--set", name)
    assert status == 0 and f"the published set has {row.classes} classes" in out
    last = tmp_path / places[layout] / next(iter(files))
    last.write_text("?\n")
    (tmp_path / row.folder / row.made_split).unlink(missing_ok=True)
    with pytest.raises(ProblemError, match="line 1: not in the known form"):
        datasets.load(name, tmp_path)
    last.unlink()
    with pytest.raises(ProblemError, match=rf"no {last.name} at .*; see DATASETS\.md"):
        datasets.load(name, tmp_path)


@pytest.mark.parametrize(
    "name", [name for name, row in datasets.SETS.items() if row.split_file and not row.rendered]
)
def test_published_splits_are_read_in_either_layout(tmp_path, name):
    row = datasets.SETS[name]
    for number, folder in enumerate({row.image_folder, row.unpacked or row.image_folder}):
        root = tmp_path / str(number)
        picture(root / row.folder / folder / "a/1.jpg")
        publish(
            root / row.folder,
            {"train": [], "val": [], "test": [["a/1.jpg", 0, "ant"]]},
            row.split_file,
        )
        data = datasets.load(name, root)
        assert data.classnames == ["ant"] and data.comparable
    assert row.template.count("{}") == 1 and row.classes > 1 and row.address and row.split_address


def test_folders_of_sun_and_eurosat_are_called_as_in_coop(tmp_path):
    for number in range(4):
        picture(tmp_path / f"sun397/SUN397/a/abbey/{number}.jpg")
        picture(tmp_path / f"sun397/SUN397/a/apartment_building/outdoor/{number}.jpg")
        picture(tmp_path / f"eurosat/eurosat/2750/SeaLake/{number}.jpg")
    names = datasets.load("SUN397", tmp_path).classnames
    assert names == ["abbey", "outdoor apartment_building"]
    assert datasets.load("EuroSAT", tmp_path).classnames == ["Sea or Lake"]


@pytest.mark.parametrize("name", [f"ImageNet{kind}" for kind in ("", "V2", "Sketch", "A", "R")])
def test_imagenet_and_its_kin(tmp_path, name):
    row = datasets.spec(name)
    folder = tmp_path / row.folder
    numbers = name == "ImageNetV2"
    for place in ("1", "10", "2") if numbers else ("n02", "n01"):
        picture(folder / row.image_folder / place / "x.JPEG")
    with pytest.raises(ProblemError, match=r"no classnames\.txt at .*; see DATASETS\.md"):
        datasets.load(name, tmp_path)
    lines = ["n01 tench", "n02 goldfish", *(f"n{n:02} fish {n}" for n in range(3, 12))]
    (folder / "classnames.txt").write_text("\n".join(lines))
    data = datasets.load(name, tmp_path)
    expected = ["goldfish", "fish 3", "fish 11"] if numbers else ["tench", "goldfish"]
    assert data.classnames == expected and data.comparable
    assert not list(tmp_path.rglob("split_made*"))
    picture(folder / row.image_folder / "n99/x.JPEG")
    with pytest.raises(ProblemError, match=r"no line for the folder .*n99"):
        datasets.load(name, tmp_path)


# torchvision


def test_torchvision_names_are_names(tmp_path):
    assert datasets.spec("DTD").name == "DescribableTextures"
    assert datasets.spec("OxfordIIITPet").name == "OxfordPets"
    with pytest.raises(ProblemError, match="did you mean 'CIFAR10"):
        datasets.spec("cifar-10")
    with pytest.raises(
        ProblemError, match=r"see DATASETS\.md, or try `python -m datasets\.download CIFAR10`"
    ):
        datasets.load("CIFAR10", tmp_path)


def test_every_name_is_torchvisions(tmp_path):
    import torchvision.datasets

    wanted = "CIFAR10 CIFAR100 Food101 OxfordIIITPet DTD EuroSAT FGVCAircraft SUN397 Caltech101"
    wanted = {*wanted.split(), "Flowers102", "ImageNet"}
    assert set(datasets.NAMES) == wanted
    assert all(hasattr(torchvision.datasets, name) for name in wanted)


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
    def fail(root, **_):
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr("torchvision.datasets.DTD", fail)
    assert run(download.main, ["DTD", "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be fetched (no network)" in error
    assert run(download.main, ["UCF101", "--root", str(tmp_path)]) == 2
    assert "UCF101 cannot be fetched: get it by hand from https://" in capsys.readouterr().err
    assert run(download.main, ["StanfordCars", "--root", str(tmp_path)]) == 2
    assert run(download.main, ["MiniDigits", "--root", str(tmp_path)]) == 0
