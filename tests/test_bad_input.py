"""Bad input: one line on stderr saying what is wrong and what would be right; no file."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import REPOSITORY
from tests.results_fixtures import entry, store


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def caltech(root: Path, split: dict | str | None = None) -> Path:
    """A tiny Caltech101 of generated JPEGs; `split` replaces its split file."""
    images = root / "caltech-101" / "101_ObjectCategories"
    entries = []
    for label, name in enumerate(["euphonium", "minaret", "platypus"]):
        (images / name).mkdir(parents=True)
        for number in range(2):
            file = f"{name}/image_{number:04}.jpg"
            Image.new("RGB", (40, 40), (80 * label, 30 * number, 90)).save(images / file)
            entries.append([file, label, name])
    text = {"train": [], "val": [], "test": entries} if split is None else split
    path = root / "caltech-101" / "split_zhou_Caltech101.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return root


class World:
    """What a row may change: a root with images, a folder with bundles, the argument list."""

    def __init__(self, tmp_path: Path, features: Path, toy_args: list[str]) -> None:
        self.tmp, self.features, self.toy = tmp_path, features, toy_args
        self.out = tmp_path / "out"

    def images(self, root: Path, *more: str) -> list[str]:
        return [
            *("--dataset", "Caltech101", "--root", str(root), "--backbone", "mini"),
            *("--output-dir", str(self.out), "--cache", str(self.tmp / "cache")),
            *("FORGET.LAMB_PRESERVE", "0.3", "FORGET.LAMB_FORGET", "2.0", *more),
        ]


def broken_image(world: World) -> list[str]:
    root = caltech(world.tmp / "root")
    (root / "caltech-101/101_ObjectCategories/minaret/image_0001.jpg").write_bytes(b"no jpeg")
    return world.images(root)


def other_results(world: World) -> list[str]:
    settings = {"trainer": "ForgetLoRA", "backbone": "RN50"}
    store(world.out, "Caltech101", "minaret", entry("Caltech101", "minaret"), settings)
    return [*world.toy, "--forget", "cat"]


def other_checkpoint(world: World) -> list[str]:
    path = world.tmp / "weights.pt"
    torch.save({"visual.proj": torch.ones(768, 512), "text_projection": torch.ones(512, 512)}, path)
    return world.images(caltech(world.tmp / "root"), "--weights", str(path))


def split_of(label: object = 0, file: str = "euphonium/image_0000.jpg") -> dict:
    return {"train": [], "val": [], "test": [[file, label, "euphonium"]]}


def with_split(split: dict | str) -> Callable[[World], list[str]]:
    return lambda world: world.images(caltech(world.tmp / "root", split))


def toy(*more: str) -> Callable[[World], list[str]]:
    return lambda world: [*world.toy, *more]


ROWS = {
    "data set": (toy("--dataset", "ToyAnimls"), "'ToyAnimls'.*ToyAnimals"),
    "data set without bundles": (
        lambda world: world.images(world.tmp, "--dataset", "StanfrdDogs"),
        "did you mean 'StanfordDogs'",
    ),
    "spelling of CoOp": (
        lambda world: world.images(world.tmp, "--dataset", "caltech101"),
        "did you mean 'Caltech101'",
    ),
    "no data set": (toy("--dataset", ""), "pass --dataset NAME"),
    "data set upwards": (toy("--dataset", ".."), "'..' is none"),
    "architecture": (
        lambda world: world.images(caltech(world.tmp), "--backbone", "ViT-B-16"),
        "did you mean 'ViT-B/16'",
    ),
    "architecture in lower case": (
        lambda world: world.images(caltech(world.tmp), "--backbone", "vit_b16"),
        "did you mean 'ViT-B/16'",
    ),
    "architecture of bundles": (toy("--backbone", "RN50"), "backbones there: ViT-B-32"),
    "class": (toy("--forget", "sea_hors"), "'sea_hors'.*'sea_horse'"),
    "no class listed": (toy(), "forget_cls.py or use --forget"),
    "all beside another": (toy("--forget", "all", "--forget", "cat"), "stands for every class"),
    "all classes at once": (toy("--forget", "all", "--multiclass"), "leave none to retain"),
    "trainer": (toy("--trainer", "ForgetLora"), "did you mean 'ForgetLoRA'"),
    "option": (toy("--forgett", "cat"), "did you mean '--forget'"),
    "no fixed seed": (toy("--seed", "-1"), "SEED must be .*-1"),
    "no character": (toy("--cache", "a\0b"), "NUL"),
    "evaluation alone": (toy("--eval-only"), "--eval-only.*same command"),
    "resume": (toy("--resume", "out"), "--resume.*same command"),
    "domains": (toy("--source-domains", "a", "b"), "--source-domains.*--dataset"),
    "their data sets": (toy("--run_ds", "A,B"), "--run_ds.*forget_clip.sh"),
    "value of a flag": (toy("--multiclass", "1"), "--multiclass takes no value"),
    "model without weights": (toy("--forget", "cat", "--save-model"), "--save-model"),
    "feature folder": (toy("--features", "nowhere"), "no folder of feature bundles at nowhere"),
    "data root": (lambda w: w.images(w.tmp / "nowhere"), "nowhere.*DATASETS.md"),
    "data folder": (lambda w: w.images(w.tmp), "caltech-101.*DATASETS.md"),
    "label": (with_split(split_of(label="one")), "label"),
    "missing image": (with_split(split_of(file="euphonium/none.jpg")), "none.jpg"),
    "escaping image": (with_split(split_of(file="../../../x.jpg")), "leads out of"),
    "broken image": (broken_image, "image_0001.jpg.*datasets.check"),
    "checkpoint of another architecture": (other_checkpoint, "weights.pt.*mini"),
    "missing checkpoint": (
        lambda w: w.images(caltech(w.tmp / "root"), "--weights", str(w.tmp / "no.pt")),
        "no.pt",
    ),
    "results of another architecture": (other_results, "'RN50'.*another ATTEMPT"),
}


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_is_one_line_and_writes_nothing(row, tmp_path, features, toy_args, refused):
    make, message = ROWS[row]
    world = World(tmp_path, features, toy_args)
    argv = make(world)
    before = tree(world.out)
    line = refused(argv)

    assert re.search(message, line), line
    assert tree(world.out) == before


def test_the_toy_command_line_itself_is_good(toy_args):
    """Negative control of the table: without the row's change nothing is refused."""
    import train

    assert train.cli([*toy_args, "--forget", "cat"]) == 0


def run_train(argv: list[str], **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "train.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_full_disk(toy_args, tmp_path):
    """A limit of 20 KB a file stands in for a full disk: the log fits, the results do not."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))

    done = run_train([*toy_args, "--forget", "cat"], preexec_fn=limit)
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "logs.json").exists()


@pytest.mark.skipif(os.geteuid() != 0 and not shutil.which("chmod"), reason="needs chmod")
def test_read_only_disk(toy_args, tmp_path, refused):
    place = Path("/proc/results") if os.geteuid() == 0 else tmp_path / "locked"
    if os.geteuid() != 0:
        place.mkdir(mode=0o555)
    line = refused([*toy_args, "--forget", "cat", "--output-dir", str(place / "seed_0")])
    assert str(place) in line
