"""What a user's hand can do to a file, a folder or an option ends in one line, and writes nothing.

Every entry point, in process; the inputs are made by rule: each kind of file by each kind of
damage, each kind of option by each kind of bad value.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
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
import forgetting.cli
import train
import utils
from clip import apply, features, train_mini
from clip.bundle import bundle_path
from clip.source import ClipSource
from engine.cli import run
from evaluation.results import join_label
from evaluation.results import place as place_of
from forgetting import Adapter, projection_sha256
from forgetting.adapter import save_adapter
from forgetting.io import STALE
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
    "compose": lambda argv: forgetting.cli.cli(["compose", *argv]),
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


def written(place: Path) -> dict[str, bytes]:
    return {path: data for path, data in tree(place).items() if not path.startswith("cache/")}


@pytest.fixture
def refusal(place: Path, capsys: pytest.CaptureFixture) -> Callable[[str, Sequence[str]], str]:
    """Run an entry point that must refuse: the one line; nothing was written."""

    def refuse(name: str, argv: Sequence[str]) -> str:
        before = written(place)
        capsys.readouterr()
        assert CLI[name](argv) == 2, capsys.readouterr()
        output = capsys.readouterr().err
        lines = [line for line in output.splitlines() if line and "%|" not in line]  # no bars
        assert len(lines) == 1 and lines[0].startswith("error: "), output
        assert lines[0].isprintable() and "Traceback" not in output
        assert written(place) == before
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
# What changes nothing that is read of a list of command lines.
GOOD = [("args", "empty"), ("args", "a key twice"), ("args", "two in one")]
ARGS = ["train", *arguments(Path())]
JSON = {
    "logs": ("out/logs.json", [["utils", "out"], ["audit", "out"], ["report", "out"]]),
    "audits": ("out/audit.json", [["report", "out"]]),
    "audit": ("out/ToyAnimals/cat.audit.json", [["audit", "out", "--features=features"]]),
    "args": ("out/args.txt", [["utils", "out"]]),
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


@pytest.mark.parametrize(
    ("kind", "damage"),
    [(kind, damage) for kind in JSON for damage in DAMAGE if (kind, damage) not in GOOD],
)
def test_damaged_json(kind, damage, place, refusal):
    file, commands = JSON[kind]
    path = place / file
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    for name, *argv in commands:
        line = refusal(name, argv)
        assert path.name in line or "Caltech101" in line


@pytest.mark.parametrize("damage", ["empty", "null", "list within", "deep lists", "many digits"])
def test_a_damaged_register_is_no_reason_to_stop(damage, place):
    argv = ["Caltech101", "mini", "--root", "data", "--cache", "cache"]
    assert CLI["features"](argv) == 0
    register = place / "cache/features/images.json"
    good = json.loads(register.read_bytes())
    register.write_bytes(DAMAGE[damage](register.read_bytes()))
    assert CLI["features"](argv) == 0
    assert json.loads(register.read_bytes()).items() >= good.items()


def test_a_broken_split_is_told_by_the_check_of_data_sets(place, capsys):
    (place / "data/caltech-101/split_zhou_Caltech101.json").write_bytes(b"[" * 200_000)
    assert CLI["check"](["data", "--set", "Caltech101"]) == 1
    assert "Caltech101: broken, " in capsys.readouterr().out


# Files of tensors: each piece of metadata by each wrong value, each tensor by each wrong one.


def bundle(place: Path) -> tuple[Path, list[str]]:
    path = place / "features/ViT-B-32/ToyAnimals.safetensors"
    return path, ["train", *arguments(Path()), "--forget", "Dog"]


def adapter(place: Path) -> tuple[Path, list[str]]:
    return place / "mini.safetensors", ["apply", "mini.safetensors", "out.pt"]


WRONG = {
    "missing": None,
    "empty": "",
    "null": "null",
    "list": "[]",
    "number within": "[1]",
    "null within": "[null]",
    "object": "{}",
    "torn": "{",
    "deep": "[" * 100_000,
    "digits": "9" * 5000,
    "surrogate": '["\\ud800"]',
}
FREE = ("weights", "split", "forget_template")  # any text will do
KEYS = {
    bundle: ["format", "backbone", "dataset", "template", "classnames", "retain_names"],
    adapter: [
        *("format", "projection_sha256", "backbone", "weights", "dataset", "classes", "trainer"),
        *("settings", "record", "recipe", "model", "changed_sha256"),
    ],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("of_kind", KEYS, ids=lambda make: make.__name__)
def test_wrong_metadata(of_kind, wrong, place, refusal):
    path, (name, *argv) = of_kind(place)
    with safe_open(path, framework="pt") as file:
        good = file.metadata()
    tensors = load_file(path)
    for key in KEYS[of_kind]:
        if WRONG[wrong] == good.get(key):
            continue
        metadata = {k: v for k, v in good.items() if k != key}
        if WRONG[wrong] is not None:
            metadata[key] = WRONG[wrong]
        save_file(tensors, path, metadata)
        line = refusal(name, argv)
        assert path.name in line or key in line


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "missing": lambda x: None,
    "scalar": lambda x: x.flatten()[0].clone(),
    "flat": lambda x: x.flatten() if x.ndim > 1 else x,
    "deeper": lambda x: x[None],
    "no rows": lambda x: x[:0],
    "a row more": lambda x: torch.cat([x, x[:1]]),
    "NaN": lambda x: torch.full_like(x, float("nan")) if x.is_floating_point() else x.double() / 0,
    "infinite": lambda x: torch.full(x.shape, float("inf")),
    "complex": lambda x: x.to(torch.complex64),
    "boolean": lambda x: x.bool(),
    "fractions": lambda x: x + 0.5 if not x.is_floating_point() else x.long(),
}


@pytest.mark.parametrize("wrong", TENSORS)
@pytest.mark.parametrize("of_kind", KEYS, ids=lambda make: make.__name__)
def test_wrong_tensors(of_kind, wrong, place, refusal):
    path, (name, *argv) = of_kind(place)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    good = load_file(path)
    for key, tensor in good.items():
        changed = {k: v.contiguous() for k, v in good.items() if k != key}
        value = TENSORS[wrong](tensor)
        if value is not None:
            if value is tensor:  # flat already
                continue
            changed[key] = value
        save_file(changed, path, metadata)
        assert path.name in refusal(name, argv), key


@pytest.mark.parametrize("damage", ["empty", "torn", "null", "deep objects", "bytes", "two in one"])
@pytest.mark.parametrize("of_kind", KEYS, ids=lambda make: make.__name__)
def test_damaged_files_of_tensors(of_kind, damage, place, refusal):
    path, (name, *argv) = of_kind(place)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert path.name in refusal(name, argv)


@pytest.mark.parametrize("damage", ["empty", "torn", "null", "deep objects", "bytes", "two in one"])
def test_damaged_adapters_of_a_run(damage, place, refusal):
    path = place / "out/ToyAnimals/cat.safetensors"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    both = ["out/ToyAnimals/cat.safetensors", "out/ToyAnimals/owl.safetensors"]
    for name, argv in (
        ("compose", [*both, "--out", "new.safetensors"]),
        ("audit", ["out", "--features=features"]),
    ):
        assert path.name in refusal(name, argv)


# Options: each kind by each wrong value.

WHOLE = {  # command -> what makes it run, were it not for one more option
    "train": ["train", *arguments(Path()), "--forget", "Dog"],
    "audit": ["audit", "out", "--features=features"],
    "report": ["report", "out"],
    "check": ["check", "data"],
    "features": ["features", "Caltech101", "mini", "--root", "data"],
    "apply": ["apply", "mini.safetensors", "out.pt"],
    "train_mini": ["train_mini", "--out", "new.safetensors"],
    "compose": ["compose", "mini.safetensors", "mini.safetensors", "--out", "new.safetensors"],
    "studies": ["experiments", "studies", "rank", "--features", "features"],
    "faithfulness": ["experiments", "faithfulness", "--features", "features"],
    "reproduce": ["experiments", "reproduce", "--data", "data"],
    "baselines": [
        *("experiments", "baselines", "--features", "features"),
        *("--dataset", "ToyAnimals", "--out", "new"),
    ],
    "driver": ["benchmarks", "driver", "--features", "features", "--dataset", "ToyAnimals"],
    "pipeline": ["benchmarks", "pipeline", "MiniDigits", "mini"],
    "solver": ["benchmarks", "solver"],
}
NUMBERS = {
    "--seed": ["train", "audit", "train_mini", "studies", "baselines"],
    "--classes": ["studies", "faithfulness", "driver", "pipeline"],
    "--steps": ["train_mini"],
}
NAMES = {
    "--dataset": ["train", "audit", "studies", "baselines", "driver"],
    "--backbone": [
        *("train", "studies", "baselines", "driver"),
    ],
    "--trainer": ["train", "driver"],
    "--target": ["train"],
    "--forget": ["train", "audit", "baselines"],
    "--without": ["audit", "compose"],
    "--set": ["check"],
    "--solver": ["studies"],
    "--methods": ["baselines"],
    "--datasets": ["reproduce"],
    "--backbones": ["reproduce"],
}
PLACES = {  # of files that must be there
    "--features": [
        *("train", "audit", "studies", "faithfulness", "baselines", "driver", "solver"),
    ],
    "--root": ["features"],
    "--data": ["reproduce"],
    "--weights": ["features", "apply", "reproduce", "pipeline"],
    "--config-file": ["train"],
    "--dataset-config-file": ["train"],
}
WRONG_NUMBERS = ["", "-1", "1.5", "nan", "1e9", "0x1", "9" * 5000, "٣", "one", "\udcff"]
WRONG_NAMES = ["No Such", "..", "a/b", "\udcff", "x\ny", "\u202e", "9" * 5000, "*"]
WRONG_PLACES = ["no/such/place", "\udcff", "x\ny", "9" * 5000, "prompts.json", "mini.safetensors/x"]


@pytest.mark.parametrize(
    ("option", "values", "who"),
    [
        pytest.param(option, values, who, id=f"{who} {option}")
        for table, values in (
            (NUMBERS, WRONG_NUMBERS),
            (NAMES, WRONG_NAMES),
            (PLACES, WRONG_PLACES),
        )
        for option, commands in table.items()
        for who in commands
    ],
)
def test_options(option, values, who, place, refusal):
    name, *argv = WHOLE[who]
    for value in [*values, "a\0b"]:
        refusal(name, [*argv, f"{option}={value}"])


@pytest.mark.parametrize("who", WHOLE)
def test_unknown_options_and_too_much(who, place, refusal):
    name, *argv = WHOLE[who]
    for more in (["--no-such-option"], ["--no-such-option=1"], ["a\0b"], ["--seed"], ["--out"]):
        refusal(name, [*argv, *more])


# Places where something must not be written over, and devices.

TAKEN = {
    "report on a folder": ["report", "out", "--out", "data"],
    "report below a file": ["report", "out", "--out", "prompts.json/x.html"],
    "report in place of a pipe": ["report", "out", "--out", "fifo"],
    "table in place of a pipe": ["utils", "out", "--csv", "fifo"],
    "picture in place of a pipe": ["utils", "out", "--draw", "fifo.png"],
    "checkpoint": ["apply", "mini.safetensors", "prompts.json"],
    "checkpoint nowhere": ["apply", "mini.safetensors", "no/such/place.pt"],
    "composition": [
        *("compose", "out/ToyAnimals/cat.safetensors", "out/ToyAnimals/owl.safetensors"),
        *("--out", "prompts.json"),
    ],
    "weights": ["train_mini", "--out", "prompts.json"],
    "results": ["train", *arguments(Path()), "--forget=Dog", "--output-dir", "prompts.json"],
    "results below a file": [
        *("train", *arguments(Path()), "--forget=Dog", "--output-dir=prompts.json/x")
    ],
    "bundle": ["features", "Caltech101", "mini", "--root", "data", "--out", "bundles"],
    "methods": [*WHOLE["baselines"][:-1], "prompts.json"],
    "config that is a pipe": [*WHOLE["train"], "--config-file=fifo.yaml"],
    "prompts that are a pipe": [*WHOLE["train"], "FORGET.PROMPTS", "fifo"],
    "prompts that are a device": [*WHOLE["train"], "FORGET.PROMPTS", "/dev/zero"],
}


@pytest.mark.parametrize("what", TAKEN)
def test_nothing_of_the_users_is_written_over_or_waited_for(what, place, refusal):
    for name in ("fifo", "fifo.png", "fifo.yaml"):
        os.mkfifo(place / name)
    (place / "bundles/mini").mkdir(parents=True)
    (place / "bundles/mini/Caltech101.safetensors").write_bytes(b"mine")
    name, *argv = TAKEN[what]
    refusal(name, argv)


def test_an_adapter_that_is_none_of_ours_stays(place, capsys):
    mine = place / "out/ToyAnimals/Dog.safetensors"
    mine.write_bytes(b"mine")
    assert train.cli([*arguments(place), "--forget", "Dog", "--forget", "newt"]) == 2
    assert "Dog.safetensors" in capsys.readouterr().err and mine.read_bytes() == b"mine"


# forget_cls.py is a program that users edit.

LISTS = "all_ds = []\nmini_ds = []\nforget_classes_all = {}\n"
EDITED = {
    "number": ("all_ds = 3", "all_ds must be a list"),
    "element": ("all_ds = [\n'a',\n3]", "all_ds / 1 must be a text"),
    "class": ("forget_classes_all = {\n'A': [\n'x', None]}", "/ A / 1 must be a text"),
    "prompts": ("forget_prompts = {'A': {'x':\n 'text'}}", "A / x must be a list"),
    "no prompts": ("forget_prompts = {'A': {'x': []}}", "not empty"),
    "many digits": ("all_ds = 9**9999", "must be a list"),
    "exit": ("import sys\nsys.exit(0)", "SystemExit"),
    "import": ("import no_such_module", "No module named 'no_such_module'"),
    "name": ("\nall_ds = [StanfordDogs]", "need quotes"),
    "recursion": ("def f(): return f()\nf()", "RecursionError"),
    "memory": ("raise MemoryError", "MemoryError"),
    "bracket": ("all_ds = [", "was never closed"),
    "encoding": ("# coding: no-such", "no-such"),
}


@pytest.mark.parametrize("edit", EDITED)
def test_mistakes_in_forget_cls(edit, place, refusal, monkeypatch):
    text, message = EDITED[edit]
    lists = text + "\n" + LISTS if edit == "encoding" else LISTS + text
    (place / "forget_cls.py").write_text(lists)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "forget_cls", raising=False)
    line = refusal("train", arguments(Path()))
    assert line.startswith("error: forget_cls.py") and message in line
    monkeypatch.delitem(sys.modules, "forget_cls", raising=False)


@pytest.mark.parametrize("content", [None, b"\0", b"\xff\xfe", b"all_ds = '\xe9'", b""])
def test_a_forget_cls_that_does_not_read(content, place, refusal, monkeypatch):
    (place / "forget_cls.py").write_bytes(content or b"")
    if content is None:  # a folder of that name
        (place / "forget_cls.py").unlink()
        (place / "forget_cls").mkdir()
    # Alone: a folder of that name is looked at last.
    monkeypatch.setattr(sys, "path", [str(place)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "forget_cls", raising=False)
    assert "forget_cls.py" in refusal("train", arguments(Path()))
    monkeypatch.delitem(sys.modules, "forget_cls", raising=False)


# Names of every kind that a system allows.

ODD = [
    "naïve ž",
    "日本語",
    "👩‍🚀 crew",
    "שלום",
    "a\u0301",
    "tab\tand\nline",
    "\x1b[31mred",
    "$x^2$",
    "a|b",
]


@pytest.fixture
def odd(place: Path) -> Path:
    """Bundles whose classes have odd names, in a folder whose name is no UTF-8."""
    folder = place / os.fsdecode(b"b\xffd")
    for dataset, names in (("Ödd", ODD[:6]), ("Odd", [*ODD[6:], "b", "c", "d"])):
        bundle = replace(toy_bundle("ToyAnimals"), dataset=dataset, classnames=names)
        bundle.save(bundle_path(folder, BACKBONE, dataset))
    return folder


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_name_end_to_end(encoding, odd, place, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    out = str(odd / os.fsdecode(b"\xfe") / "seed_0")
    argv = ["--dataset", "Ödd", "--backbone", BACKBONE, "--features", str(odd)]
    argv += ["--trainer", "ForgetExact", "--forget", "all", "--output-dir", out]
    assert CLI["train"](argv) == 0
    for name, *argv in (
        ["audit", out, "--without=relearning", f"--features={odd}"],
        ["utils", out],
        ["report", out],
    ):
        assert CLI[name](argv) == 0
    assert "\\udcff" in Path(out, place_of("Ödd"), "log.txt").read_text(encoding="utf-8")
    assert set(utils.create_results(out)[0]["name"]) >= {join_label([name]) for name in ODD[:6]}


def test_names_that_are_no_text_are_refused(place, refusal):
    split = {"train": [], "val": [], "test": [["euphonium/image_0000.jpg", 0, "\ud800"]]}
    path = place / "data/caltech-101/split_zhou_Caltech101.json"
    path.write_text(json.dumps(split))
    assert "a name that is no text" in refusal("features", WHOLE["features"][1:])


# What a kill leaves, and folders that go or may not be entered.


def test_a_run_removes_what_a_killed_one_left(place):
    left = place / f"out/ToyAnimals/.tmp-{16 * 'a'}.safetensors"
    left.write_text("half")
    fresh = left.with_name(f".tmp-{16 * 'b'}.safetensors")  # of a run at work
    fresh.write_text("half")
    os.utime(left, (0, time.time() - 2 * STALE))
    assert train.cli([*arguments(place), "--forget", "Dog"]) == 0
    assert not left.exists() and fresh.exists()


def test_folders_that_may_not_be_entered_are_named(place, refusal, monkeypatch):
    closed = ["features/ViT-B-32"]
    for name in ("scandir", "listdir"):
        real = getattr(os, name)

        def enter(path=".", real=real):
            if str(path).endswith(tuple(closed)):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(os, name, enter)
    assert "ViT-B-32: Permission denied" in refusal("train", [*arguments(Path()), "--forget=Dog"])
