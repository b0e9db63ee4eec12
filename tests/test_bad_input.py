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
from safetensors.torch import load_file, save_file

from clip.bundle import bundle_path
from tests.conftest import BACKBONE, REPOSITORY
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
        self.bundle = bundle_path(features, BACKBONE, "ToyAnimals")

    def images(self, root: Path, *more: str) -> list[str]:
        return [
            *("--dataset", "Caltech101", "--root", str(root), "--backbone", "mini"),
            *("--output-dir", str(self.out), "--cache", str(self.tmp / "cache")),
            *("FORGET.LAMB_PRESERVE", "0.3", "FORGET.LAMB_FORGET", "2.0", *more),
        ]

    def change_bundle(self, change: Callable[[dict], None]) -> list[str]:
        from safetensors import safe_open

        with safe_open(self.bundle, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(self.bundle)
        change(tensors)
        save_file(tensors, self.bundle, metadata)
        return self.toy


def broken_image(world: World) -> list[str]:
    root = caltech(world.tmp / "root")
    (root / "caltech-101/101_ObjectCategories/minaret/image_0001.jpg").write_bytes(b"no jpeg")
    return world.images(root)


def other_results(world: World) -> list[str]:
    settings = {"trainer": "ForgetLoRA", "backbone": "RN50"}
    store(world.out, "Caltech101", "minaret", entry("Caltech101", "minaret"), settings)
    return [*world.toy, "--forget", "cat"]


def truncated_bundle(world: World) -> list[str]:
    world.bundle.write_bytes(world.bundle.read_bytes()[:-100])
    return world.toy


def foreign_bundle(world: World) -> list[str]:
    save_file({"x": torch.ones(2)}, world.bundle)
    return world.toy


def other_checkpoint(world: World) -> list[str]:
    path = world.tmp / "weights.pt"
    torch.save({"visual.proj": torch.ones(768, 512), "text_projection": torch.ones(512, 512)}, path)
    return world.images(caltech(world.tmp / "root"), "--weights", str(path))


def nan(tensors: dict) -> None:
    tensors["class_hidden"][0, 0] = float("nan")


def bad_label(tensors: dict) -> None:
    tensors["labels"][0] = 17


def split_of(label: object = 0, file: str = "euphonium/image_0000.jpg") -> dict:
    return {"train": [], "val": [], "test": [[file, label, "euphonium"]]}


def with_split(split: dict | str) -> Callable[[World], list[str]]:
    return lambda world: world.images(caltech(world.tmp / "root", split))


def toy(*more: str) -> Callable[[World], list[str]]:
    return lambda world: [*world.toy, *more]


def with_config(text: str, name: str = "mine.yaml") -> Callable[[World], list[str]]:
    def make(world: World) -> list[str]:
        (world.tmp / name).write_text(text)
        return [*world.toy, "--config-file", str(world.tmp / name)]

    return make


ROWS = {
    "data set": (toy("--dataset", "ToyAnimls"), "no feature bundle of 'ToyAnimls'.*ToyAnimals"),
    "data set without bundles": (
        lambda world: world.images(world.tmp, "--dataset", "StanfrdDogs"),
        "unknown data set 'StanfrdDogs'; did you mean 'StanfordDogs'",
    ),
    "no data set": (toy("--dataset", ""), "pass --dataset NAME"),
    "architecture": (
        lambda world: world.images(world.tmp, "--backbone", "RN51"),
        "unknown architecture 'RN51'; did you mean 'RN50'",
    ),
    "architecture of bundles": (toy("--backbone", "RN50"), "backbones there: ViT-B-32"),
    "class": (toy("--forget", "sea_hors"), "no class 'sea_hors'.*nearest: 'sea_horse'"),
    "no class listed": (toy(), "forget_cls.py or use --forget"),
    "all beside another": (toy("--forget", "all", "--forget", "cat"), "stands for every class"),
    "all classes at once": (toy("--forget", "all", "--multiclass"), "leave none to retain"),
    "trainer": (toy("--trainer", "ForgetLora"), "unknown trainer.*did you mean 'ForgetLoRA'"),
    "seed": (
        toy("--seed", "one"),
        "SEED must be a whole number from 0 to 4,294,967,295 .*got 'one'",
    ),
    "negative seed": (toy("--seed", "-1"), "SEED must be .* from 0 to 4,294,967,295 .*, got -1"),
    "huge seed": (toy("--seed", "99999999999"), "SEED must be .*, got 99999999999"),
    "seed as a key": (toy("SEED", "-1"), "SEED must be .*, got -1"),
    "tuple": (
        toy("FORGET.CLASSES", "('cat')"),
        r"FORGET.CLASSES must be a list .* or \"\('a',\)\"",
    ),
    "flag": (toy("--forgett", "cat"), "unknown option '--forgett'; did you mean '--forget'"),
    "config key": (toy("FORGET.RNK", "3"), "unknown config key.*'FORGET.RNK'.*'FORGET.RANK'"),
    "config value": (toy("FORGET.RANK", "many"), "FORGET.RANK must be a whole number.*got 'many'"),
    "key below a value": (toy("FORGET.RANK.X", "3"), "unknown config key 'FORGET.RANK.X'"),
    "data set upwards": (toy("--dataset", ".."), "folder of its name; '..' is none"),
    "section": (toy("FORGET", "3"), "unknown config key 'FORGET'; did you mean 'FORGET\\."),
    "no terms": (toy("FORGET.TERMS", "()"), "FORGET.TERMS must be one or more of forget, .*got"),
    "no output folder": (toy("--output-dir", ""), "OUTPUT_DIR must be text, not empty"),
    "no character": (toy("--cache", "a\0b"), "holds a NUL character"),
    "workers": (toy("DATALOADER.NUM_WORKERS", "100000"), "NUM_WORKERS must be .*from 0 to 128"),
    "batch": (toy("DATALOADER.TEST.BATCH_SIZE", "0"), "BATCH_SIZE must be .*got 0"),
    "config pairs": (toy("FORGET.RANK"), "the last has none: 'FORGET.RANK'"),
    "config file": (toy("--config-file", "nowhere.yaml"), "cannot read config nowhere.yaml"),
    "config file that is a program": (
        with_config("raise SystemExit('executed')", "mine.py"),
        "mine.py: only YAML is read",
    ),
    "config that is no YAML": (with_config("FORGET: ["), "config file .*mine.yaml: while parsing"),
    "config of another shape": (with_config("- 1"), "mine.yaml: must hold keys and values"),
    "null in a config": (with_config("FORGET: {RANK: null}"), "FORGET.RANK must be .*mine.yaml"),
    "config key in a file": (with_config("FORGET: {RNK: 1}"), "'FORGET.RNK'; did you.*mine.yaml"),
    "weight": (
        toy("--forget", "cat", "FORGET.LAMB_FORGET", "-2"),
        "LAMB_FORGET must be a number from 0 to 1,000,000 or auto .*got -2",
    ),
    "loss term": (toy("--forget", "cat", "FORGET.TERMS", "('forgot',)"), "did you mean 'forget'"),
    "steps": (
        toy("--forget", "cat", "TRAINER.FORGETLORA.STEPS", "0"),
        "STEPS must be .*from 1 to .*got 0",
    ),
    "rank": (
        toy("--forget", "cat", "FORGET.RANK", "0"),
        "FORGET.RANK must be a whole number from 1 to 1,024",
    ),
    "model without weights": (toy("--forget", "cat", "--save-model"), "--save-model"),
    "feature folder": (toy("--features", "nowhere"), "no folder of feature bundles at nowhere"),
    "data root": (lambda w: w.images(w.tmp / "nowhere"), "no data root at .*nowhere.*DATASETS.md"),
    "data folder": (lambda w: w.images(w.tmp), "no folder .*caltech-101.*DATASETS.md"),
    "split file": (with_split('{"train": ['), "split_zhou_Caltech101.json"),
    "label": (with_split(split_of(label="one")), "label"),
    "missing image": (with_split(split_of(file="euphonium/none.jpg")), "none.jpg"),
    "escaping image": (with_split(split_of(file="../../../x.jpg")), "leads out of"),
    "broken image": (broken_image, "image_0001.jpg.*datasets.check"),
    "truncated bundle": (truncated_bundle, "ToyAnimals.safetensors is truncated"),
    "foreign bundle": (foreign_bundle, "format is None"),
    "NaN in a bundle": (lambda world: world.change_bundle(nan), "class_hidden holds NaN"),
    "label in a bundle": (lambda world: world.change_bundle(bad_label), "labels run from 0 to 17"),
    "missing key of a bundle": (
        lambda world: world.change_bundle(lambda tensors: tensors.pop("neutral_hidden")),
        "neutral_hidden is missing",
    ),
    "checkpoint of another architecture": (other_checkpoint, "weights.pt.*mini"),
    "missing checkpoint": (
        lambda w: w.images(caltech(w.tmp / "root"), "--weights", str(w.tmp / "no.pt")),
        "no.pt",
    ),
    "results of another architecture": (other_results, "backbone 'RN50'.*another ATTEMPT"),
    "output is a file": (
        lambda world: [*world.toy, "--forget", "cat", "--output-dir", str(world.bundle)],
        "ToyAnimals.safetensors",
    ),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("all_ds = [", r"forget_cls\.py: SyntaxError"),
        ("all_ds = [Dogs]", r"forget_cls\.py: NameError: .*Dogs.* need quotes"),
        ("all_ds = []; mini_ds = []", r"forget_cls\.py: .*forget_classes_all"),
        ("all_ds = mini_ds = []; forget_classes_all = {'A': 'cat'}", r"forget_cls\.py: .*a list"),
    ],
)
def test_a_mistake_in_forget_cls_is_one_line(
    text, message, tmp_path, toy_args, refused, monkeypatch
):
    (tmp_path / "forget_cls.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "forget_cls", raising=False)
    assert re.search(message, refused(toy_args))
    monkeypatch.delitem(sys.modules, "forget_cls", raising=False)


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
