"""What a user's hand can do to a file, a folder or an option ends in one line, and writes nothing.

Every entry point, in process; the inputs are made by rule: each kind of file by each kind of
damage, each kind of option by each kind of bad value.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import benchmarks.__main__
import datasets.check
import evaluation.audit.__main__
import evaluation.report.__main__
import experiments.__main__
import forgetting.compose
import train
import utils
from clip import apply, features, train_mini
from clip.bundle import bundle_path
from clip.source import ClipSource
from engine.cli import run
from forgetting import Adapter, projection_sha256
from forgetting.adapter import save_adapter
from tests.conftest import BACKBONE, TOY_CLASSES, toy_bundle
from tests.test_bad_input import caltech, tree

Cli = Callable[[Sequence[str]], int]


def of(main: Callable) -> Cli:
    return lambda argv: run(main, argv)


CLI: dict[str, Cli] = {
    "train": train.cli,
    "utils": of(utils.main),
    "check": of(datasets.check.main),
    "features": of(features.main),
    "apply": apply.cli,
    "train_mini": of(train_mini.main),
    "audit": evaluation.audit.__main__.cli,
    "report": of(evaluation.report.__main__.main),
    "compose": forgetting.compose.cli,
    "experiments": experiments.__main__.cli,
    "benchmarks": benchmarks.__main__.cli,
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles, results with an audit, prompts, images, and an adapter of the embedded model."""
    place = tmp_path_factory.mktemp("planted")
    for dataset in TOY_CLASSES:
        toy_bundle(dataset).save(bundle_path(place / "features", BACKBONE, dataset))
    (place / "prompts.json").write_text('{"cat": ["{}", "a photo of a {}."]}')
    argv = [*arguments(place), "--forget", "cat", "--forget", "owl", "--audit"]
    assert train.cli([*argv, "FORGET.PROMPTS", str(place / "prompts.json")]) == 0
    assert CLI["report"]([str(place / "out")]) == 0 and CLI["utils"]([str(place / "out")]) == 0
    caltech(place / "data")
    w = ClipSource("mini", None, str(place / "cache")).projection
    adapter = Adapter(
        left=torch.zeros(w.shape[0], 1),
        right=torch.zeros(1, w.shape[1]),
        projection_sha256=projection_sha256(w),
        backbone="mini",
        weights="embedded",
        dataset="MiniDigits",
        classes=["digit two"],
        trainer="ForgetZero",
    )
    save_adapter(adapter, place / "mini.safetensors")
    return place


def arguments(place: Path) -> list[str]:
    return [
        *("--dataset", "ToyAnimals", "--backbone", BACKBONE, "--trainer", "ForgetExact"),
        *("--features", str(place / "features"), "--output-dir", str(place / "out")),
        *("--cache", str(place / "cache")),
    ]


@pytest.fixture
def place(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that, which is also the working directory."""
    shutil.copytree(planted, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def refusal(place: Path, capsys: pytest.CaptureFixture) -> Callable[[str, Sequence[str]], str]:
    """Run an entry point that must refuse: the one line; nothing was written."""

    def refuse(name: str, argv: Sequence[str]) -> str:
        before = tree(place)
        capsys.readouterr()
        assert CLI[name](argv) == 2, capsys.readouterr()
        told = capsys.readouterr().err
        lines = told.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), told
        assert lines[0].isprintable() and "Traceback" not in told
        assert tree(place) == before
        return lines[0]

    return refuse


# Files of JSON: each by each damage, read by each entry point that reads it.


def twice(text: bytes) -> bytes:
    return text.replace(b"{", b'{"x": 1, "x": 2, ', 1)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "torn": lambda text: text[: len(text) // 2],
    "null": lambda text: b"null",
    "list": lambda text: b"[]",
    "number": lambda text: b"3",
    "text": lambda text: b'"x"',
    "texts": lambda text: b'["x", "y"]',
    "null within": lambda text: b'{"ToyAnimals": null, "cat": null}',
    "list within": lambda text: b'{"ToyAnimals": [1], "cat": [1]}',
    "number within": lambda text: b'{"ToyAnimals": 1e999, "cat": NaN}',
    "deep lists": lambda text: b"[" * 200_000,
    "deep objects": lambda text: b'{"a":' * 200_000,
    "many digits": lambda text: b'{"ToyAnimals": ' + b"1" * 5000 + b"}",
    "latin 1": lambda text: b'{"ToyAnimals": "\xe9"}',
    "bytes": lambda text: bytes(range(256)),
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "a key twice": twice,
    "two in one": lambda text: text + text,
    "Python": lambda text: b"{'cat': ['{}']}",
}
ARGS = ["train", *arguments(Path())]
JSON = {
    "logs": ("out/logs.json", [["utils", "out"], ["audit", "out"], ["report", "out"]]),
    "audit": ("out/audit.json", [["audit", "out"], ["report", "out"]]),
    "prompts": (
        "prompts.json",
        [[*ARGS, "--forget", "cat", "--overwrite", "FORGET.PROMPTS", "prompts.json"]],
    ),
    "split": (
        "data/caltech-101/split_zhou_Caltech101.json",
        [
            ["features", "Caltech101", "mini", "--root", "data"],
            ["train", "--dataset", "Caltech101", "--backbone", "mini", "--root", "data"],
        ],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", JSON)
def test_damaged_json(kind, damage, place, refusal):
    file, commands = JSON[kind]
    path = place / file
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    for name, *argv in commands:
        line = refusal(name, argv)
        assert path.name in line or "Caltech101" in line


# Files of tensors: metadata by metadata, tensor by tensor.


def bad_metadata(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """What is wrong, and the metadata of a safetensors file that has it."""
    with safe_open(path, framework="pt") as file:
        good = file.metadata()
    for key in good:
        yield f"{key} missing", {k: v for k, v in good.items() if k != key}
        for value in METADATA:
            if value != good[key]:
                yield f"{key} is {value[:8]}", good | {key: value}


METADATA = ("", "null", "3", "[]", "{}", "[1]", '"x"', "[null]", "[[]]", "{", "[" * 100_000)
METADATA += ('["\\ud800"]', "9" * 5000)


def rewritten(path: Path, metadata: dict[str, str], tensors: dict | None = None) -> None:
    save_file(load_file(path) if tensors is None else tensors, path, metadata)
