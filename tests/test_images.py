"""Images of one's own: folders, tables, and how an image file is read."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
import train
from datasets.mini import draw
from datasets.reader import read_image
from evaluation.audit.inputs import Places
from evaluation.audit.run import audit_folder
from forgetting.errors import ProblemError
from forgetting.models.vocabulary import generic_names
from tests.clip_fixtures import picture
from tests.conftest import one_line, refuses
from tests.test_datasets import counts, run_check
from utils import create_results

SHAPES = ("red circle", "green_triangle", "blue star")


def shapes(root: Path, count: int = 6) -> Path:
    """A folder per class of pictures that mini recognises."""
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
    assert df.cls_Noforget[0] > 0.8 and df.cls_forget[0] < 0.2 and df.full_forget[0] > 0.8
    assert args.images == str(images)
    assert tree(images) == before, "nothing is written among the user's images"
    places = Places(images=str(images), cache=str(tmp_path / "cache"))
    audit = audit_folder(folder, without=["relearning"], places=places)
    assert audit["my shapes"]["green_triangle"]["classes"]
    out = capsys.readouterr().out
    assert "not evaluated" not in out
    # Without a vocabulary an exact solve retains the generic names.
    assert (f"{len(generic_names())} generic" in out) == (trainer == "ForgetExact")


def test_all_images_are_test_images_at_any_depth(tmp_path):
    own = tmp_path / "own"
    for name in ("a/1.jpg", "a/deep/er/2.PNG", "b_c/x.webp", ".git/no.png", "b_c/.no.png"):
        picture(own / name)
    for name in ("no.png", "..a/1.png"):
        picture(own / name)
    (own / "empty").mkdir()
    (own / "b_c/notes.txt").write_text("no image")
    (own / "a/up").symlink_to(own)  # a circle
    images = datasets.load("", "none", str(own))
    assert images.row.name == "own" and images.classnames == ["a", "b_c"]
    assert counts(images) == (0, 0, 3) and images.comparable


@pytest.mark.parametrize(
    ("parts", "classnames", "expected"),
    [
        (("train", "val", "test"), ["ant", "zebra"], (2, 2, 2)),
        (("Training", "valid"), ["ant", "zebra"], (2, 0, 2)),
        (("train",), ["ant", "zebra"], (0, 0, 2)),
        (("train", "car"), ["car", "train"], (0, 0, 4)),  # a class may be called train
    ],
)
def test_folders_that_divide_a_set(tmp_path, parts, classnames, expected):
    for part in parts:
        for name in ("zebra", "ant"):
            picture(tmp_path / "own" / part / name / "1.png")
    images = datasets.load("zoo", "none", str(tmp_path / "own"))
    assert images.classnames == classnames and counts(images) == expected


def test_folders_are_renamed_by_a_list(tmp_path):
    for number in (0, 1, 10, 2):
        picture(tmp_path / "own" / str(number) / "1.png")
    (tmp_path / "own/classnames.txt").write_text("0 sea horse\n10 crab\n")
    names = datasets.load("", "none", str(tmp_path / "own")).classnames
    assert names == ["sea horse", "1", "2", "crab"]
    (tmp_path / "own/classnames.txt").write_text("0 sea horse\n10\n")
    with pytest.raises(ProblemError, match="line 2: must be a folder and a class"):
        datasets.load("", "none", str(tmp_path / "own"))


def test_a_table_of_ones_own(tmp_path, capsys):
    for path in ("a/1.png", "a/2.png", "elsewhere/3.png"):
        picture(tmp_path / path)
    table = tmp_path / "lists" / "my birds.csv"
    table.parent.mkdir()
    for delimiter in ",;\t":
        rows = [
            ["Note", "CLASS", "Path", "split"],
            ['"x"', "sea horse", "../a/1.png", "train"],
            ["", "sea horse", "../a/2.png", "test"],
            [],
            ["", "crab", str(tmp_path / "elsewhere/3.png"), "val"],
            ["", "", "", ""],
        ]
        table.write_text("\ufeff" + "\r\n".join(delimiter.join(row) for row in rows))
        images = datasets.load("", "none", str(table))
        assert images.row.name == "my birds"
        assert set(images.classnames) == {"sea horse", "crab"} and counts(images) == (1, 1, 1)
    status, out = run_check(capsys, "--images", table)
    assert status == 0 and "my birds: present, 3 of 3 images, 2 classes, 1 train" in out


BROKEN = {
    "": "its first line must name the columns path and class",
    "path,class\n\n\na.png\n": "line 4: not 2 cells",
    "path,class,split\na.png,cat,dev\n": "line 2: split must be train, val or test",
    'path,class\n"a.png,cat\n': "cannot be read as CSV",
    "path,class\na.png, \n": "line 2: the class is empty",
    "path,class\na\0.png,cat\n": "leads out|cannot be read",
    "path,class\na.png,\udcff\n": "UTF-8",
}


@pytest.mark.parametrize(("text", "message"), BROKEN.items(), ids=range(len(BROKEN)))
def test_a_broken_table_is_one_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text, errors="surrogateescape")
    with one_line(message, "t.csv"):
        datasets.load("", "none", str(tmp_path / "t.csv"))


def test_what_are_no_images_is_one_line(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "Food101/pie/1.png")
    picture(Path(os.fsdecode(os.fsencode(tmp_path) + b"/bytes/\xff/1.png")))
    picture(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xfe/cat/1.png")))
    os.mkfifo(tmp_path / "pipe.csv")
    for images, message in {
        "empty": "no folder with images under",
        "nowhere": "no images at",
        "Food101": "Food101 is a data set of the table; call it otherwise with --dataset NAME",
        "bytes": "has a name that is no text",
        os.fsdecode(b"\xfe"): "is no name for a data set",
        "pipe.csv": "no images at",
    }.items():
        argv = ["--images", str(tmp_path / images), "--backbone", "mini", "--forget", "x"]
        assert message in refused([*argv, "--output-dir", str(tmp_path / "out")])
    argv = ["--images", str(tmp_path / "Food101"), "--dataset", "pies", "--features", str(tmp_path)]
    assert "leave them out" in refused([*argv, "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_images_of_more_than_8_bits_keep_their_shades(tmp_path):
    shades = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(shades).save(tmp_path / "deep.png")
    Image.fromarray((shades >> 8).astype(np.uint8)).save(tmp_path / "flat.png")
    Image.fromarray(shades.astype(np.float32)).save(tmp_path / "float.tiff")
    deep, flat = (read_image(tmp_path / f"{name}.png") for name in ("deep", "flat"))
    assert deep.mode == "RGB" and np.array_equal(np.asarray(deep), np.asarray(flat))
    refuses("mode F has no known range", read_image, tmp_path / "float.tiff")


def blank_png(path: Path, width: int, height: int) -> Path:
    """A PNG file of one pixel whose header names another size."""
    Image.new("1", (1, 1)).save(path)
    content = path.read_bytes()
    header = content[12:16] + struct.pack(">II", width, height) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    return path


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1_000_000, 1), "one side is more than 100 times as long"),
        ((8000, 7000), "more than 50 million pixels"),
        ((60_000, 60_000), "exceeds limit"),
    ],
)
def test_an_image_that_would_fill_the_memory_is_one_line(tmp_path, size, message):
    refuses(message, read_image, blank_png(tmp_path / "a.png", *size), megapixels=50)
    Image.new("1", (2000, 20)).save(tmp_path / "long.png")
    assert read_image(tmp_path / "long.png").size == (2000, 20)
    os.mkfifo(tmp_path / "pipe.png")
    refuses("no such file", read_image, tmp_path / "pipe.png")


def test_exif_turns_an_image_only_where_that_is_wanted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    picture = Image.new("RGB", (40, 20), "red")
    picture.save(tmp_path / "rotated.jpg", exif=exif)
    assert read_image(tmp_path / "rotated.jpg").size == (40, 20)  # as CLIP's benchmarks read it
    assert read_image(tmp_path / "rotated.jpg", upright=True).size == (20, 40)
    picture.save(tmp_path / "garbage.png", exif=b"garbage, and no header of a TIFF file")
    assert read_image(tmp_path / "garbage.png", upright=True).size == (40, 20)
