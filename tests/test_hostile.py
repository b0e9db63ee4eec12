"""What a user can do wrong to a file, a folder or an option ends in one line, and nothing written:
every entry point, each kind of file by each damage, each kind of option by each bad value."""

import io
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import benchmarks.__main__
import datasets.check
import evaluation.audit.__main__
import evaluation.report.__main__
import experiments.__main__
import forgetting.cli
import train
import utils
from clip import features, train_mini
from clip.bundle import bundle_path
from clip.source import ClipSource
from engine.cli import run
from evaluation.results import join_label
from evaluation.results import place as place_of
from forget_cls import forget_classes_all
from forgetting.adapter import save_adapter
from forgetting.io import STALE
from tests.clip_fixtures import caltech
from tests.conftest import BACKBONE, REPOSITORY, TOY_CLASSES, toy_bundle, toy_line
from tests.test_patch import make_adapter

Cli = Callable[[Sequence[str]], int]
CLI: dict[str, Cli] = {
    "train": train.cli,
    "utils": partial(run, utils.main),
    "check": partial(run, datasets.check.main),
    "features": partial(run, features.main),
    "train_mini": partial(run, train_mini.main),
    "audit": partial(run, evaluation.audit.__main__.main),
    "report": partial(run, evaluation.report.__main__.main),
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
    argv = toy_line(place, "--trainer=ForgetExact", "--forget=cat", "--forget=owl", "--audit")
    assert train.cli([*argv, "FORGET.PROMPTS", str(place / "prompts.json")]) == 0
    assert CLI["report"]([str(place / "out")]) == 0 and CLI["utils"]([str(place / "out")]) == 0
    caltech(place / "data", 2, forget_classes_all["Caltech101"])
    w = ClipSource("mini", None, str(place / "cache")).projection
    adapter = replace(make_adapter(w), backbone="mini", weights="embedded")
    save_adapter(adapter, place / "mini.safetensors")
    return place


@pytest.fixture
def place(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that, which is also the working directory."""
    shutil.copytree(planted, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def written(place: Path) -> dict[Path, bytes]:
    """Every file, but for those of the cache."""
    paths = [path for path in place.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: path.read_bytes() for path in paths if place / "cache" not in path.parents}


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


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "torn": lambda text: text[: len(text) // 2],
    "null": lambda text: b"null",
    "list": lambda text: b"[]",
    "null within": lambda text: b'{"ToyAnimals": null, "cat": null}',
    "number within": lambda text: b'{"ToyAnimals": 1e999, "cat": NaN}',
    "deep lists": lambda text: b"[" * 200_000,
    "deep objects": lambda text: b'{"a":' * 200_000,
    "many digits": lambda text: b'{"ToyAnimals": ' + b"1" * 5000 + b"}",
    "latin 1": lambda text: b'{"ToyAnimals": "\xe9"}',
    "bytes": lambda text: bytes(range(256)),
    "a key twice": lambda text: text.replace(b"{", b'{"x": 1, "x": 2, ', 1),
    "two in one": lambda text: text + text,
}
# What changes nothing that is read of a list of command lines.
GOOD = [("args", "empty"), ("args", "a key twice"), ("args", "two in one")]
ARGS = ["train", *toy_line(Path(), "--trainer=ForgetExact")]
JSON = {
    "logs": ("out/logs.json", [["utils", "out"], ["audit", "out"], ["report", "out"]]),
    "audits": ("out/audit.json", [["report", "out"]]),
    "audit": ("out/ToyAnimals/cat.audit.json", [["audit", "out", "--features=features"]]),
    "args": ("out/args.txt", [["utils", "out"]]),
    "prompts": ("prompts.json", [[*ARGS, "--forget=Dog", "FORGET.PROMPTS", "prompts.json"]]),
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


# Files of tensors.


def bundle(place: Path) -> tuple[Path, list[str]]:
    path = place / "features/ViT-B-32/ToyAnimals.safetensors"
    return path, ["train", *toy_line(Path(), "--trainer=ForgetExact", "--forget=Dog")]


def adapter_of_a_run(place: Path) -> tuple[Path, list[str]]:
    paths = [f"out/ToyAnimals/{name}.safetensors" for name in ("cat", "owl")]
    return place / paths[0], ["compose", *paths, "--out", "new.safetensors"]


@pytest.mark.parametrize("damage", ["empty", "torn", "null", "deep objects", "bytes", "two in one"])
@pytest.mark.parametrize("of_kind", [bundle, adapter_of_a_run])
def test_damaged_files_of_tensors(of_kind, damage, place, refusal):
    path, (name, *argv) = of_kind(place)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert path.name in refusal(name, argv)
    if of_kind is adapter_of_a_run:
        assert path.name in refusal("audit", ["out", "--features=features"])


# Options: each kind by each wrong value.

FEATURES = ["--features", "features"]
ANIMALS = [*FEATURES, "--dataset", "ToyAnimals"]
WHOLE = {  # command -> what makes it run, were it not for one more option
    "train": ["train", *toy_line(Path(), "--trainer=ForgetExact", "--forget=Dog")],
    "audit": ["audit", "out", "--features=features"],
    "report": ["report", "out"],
    "check": ["check", "data"],
    "features": ["features", "Caltech101", "mini", "--root", "data"],
    "train_mini": ["train_mini", "--out", "new.safetensors"],
    "compose": ["compose", "mini.safetensors", "mini.safetensors", "--out", "new.safetensors"],
    "sweep": ["experiments", "sweep", *ANIMALS, "--out", "new"],
    "reproduce": ["experiments", "reproduce", "--data", "data"],
    "baselines": ["experiments", "baselines", *ANIMALS, "--out", "new"],
    "driver": ["benchmarks", "driver"],
    "solver": ["benchmarks", "solver"],
}
OPTIONS = {  # of each, some that take a number, a name, or a file that must be there
    "train": "seed dataset backbone trainer target forget features config-file dataset-config-file",
    "audit": "seed dataset forget without features",
    "check": "set",
    "features": "root weights",
    "train_mini": "seed steps",
    "compose": "without",
    "sweep": "seed dataset backbone trainer features",
    "reproduce": "datasets backbones data weights",
    "baselines": "seed dataset backbone forget methods features",
    "driver": "classes trainer",
    "solver": "features",
}
NUMBERS = ["", "-1", "1.5", "nan", "1e9", "0x1", "9" * 5000, "٣", "one", "\udcff"]
NAMES = ["No Such", "..", "a/b", "\udcff", "x\ny", "\u202e", "9" * 5000, "*"]
PLACES = ["no/such/place", "\udcff", "x\ny", "9" * 5000, "prompts.json", "mini.safetensors/x"]
KINDS = dict.fromkeys(("seed", "classes", "steps"), NUMBERS)
KINDS |= dict.fromkeys(
    ("features", "root", "data", "weights", "config-file", "dataset-config-file"), PLACES
)


@pytest.mark.parametrize(
    ("who", "option"), [(who, option) for who in OPTIONS for option in OPTIONS[who].split()]
)
def test_options(who, option, place, refusal):
    name, *argv = WHOLE[who]
    for value in KINDS.get(option, NAMES):
        refusal(name, [*argv, f"--{option}={value}"])


@pytest.mark.parametrize("who", WHOLE)
def test_unknown_options_and_too_much(who, place, refusal):
    name, *argv = WHOLE[who]
    for more in (["--no-such-option"], ["--no-such-option=1"], ["--seed"], ["--out"]):
        refusal(name, [*argv, *more])


# What a command line may say wrongly, and what would be right.

MINI = ["train", "--dataset", "Caltech101", "--backbone", "mini", "--root"]
WRONG_LINES = {
    "data set": (["--dataset", "ToyAnimls"], "'ToyAnimls'.*ToyAnimals"),
    "spelling of CoOp": ([*MINI, "data", "--dataset", "caltech101"], "did you mean 'Caltech101'"),
    "no data set": (["--dataset", ""], "pass --dataset NAME"),
    "architecture": ([*MINI, "data", "--backbone", "vit_b16"], "did you mean 'ViT-B/16'"),
    "class": (["--forget", "sea_hors"], "'sea_hors'.*'sea_horse'"),
    "no class listed": ([], "forget_cls.py or use --forget"),
    "all beside another": (["--forget", "all", "--forget", "cat"], "stands for every class"),
    "all classes at once": (["--forget", "all", "--multiclass"], "leave none to retain"),
    "trainer": (["--trainer", "ForgetLora"], "did you mean 'ForgetLoRA'"),
    "part": (["--forget", "all", "FORGET.PART", "3/2"], "FORGET.PART must be i/n.*3/2"),
    "evaluation alone": (["--eval-only"], "--eval-only.*same command"),
    "domains": (["--source-domains", "a", "b"], "--source-domains.*--dataset"),
    "their data sets": (["--run_ds", "A,B"], "--run_ds.*forget_clip.sh"),
    "value of a flag": (["--multiclass", "1"], "--multiclass takes no value"),
    "weights of bundles": (["--forget", "cat", "--weights", "w.pt"], "--weights"),
    "data folder": ([*MINI, "features"], "caltech-101.*DATASETS.md"),
    "target of none": (["--trainer", "ForgetZero", "--target", "empty"], "FORGET.TARGET"),
    "specific": (["--trainer=ForgetLoRA", "--target=specific"], "specific needs.*ForgetLoRA"),
    "target": (["--trainer", "ForgetUCE", "--target", "oposite"], "did you mean 'opposite'"),
    "terms": (["--forget", "cat", "FORGET.TERMS", "('forget',)"], "TERMS has no effect"),
    "protect": (["--trainer=ForgetZero", "--forget=owl", "--protect=cat"], "PROTECT has no"),
    "another architecture": (["--trainer", "ForgetUCE", "--forget", "cat"], "ForgetExact.*another"),
}


@pytest.mark.parametrize("row", WRONG_LINES)
def test_a_wrong_command_line_says_what_is_right(row, place, refusal):
    argv, message = WRONG_LINES[row]
    whole = argv if argv[:1] == ["train"] else [*ARGS, *argv]
    assert re.search(message, refusal(whole[0], whole[1:]))


def test_full_disk(place):
    def limit():  # on the size of a file: it stands in for a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))

    command = [sys.executable, str(REPOSITORY / "train.py"), *WHOLE["train"][1:]]
    command += ["--output-dir", "new"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.lower().count("error") == 1
    assert not (place / "new/logs.json").exists()


# Places where something must not be written over, and devices.

TAKEN = {
    "report on a folder": ["report", "out", "--out", "data"],
    "report in place of a pipe": ["report", "out", "--out", "fifo"],
    "picture in place of a pipe": ["utils", "out", "--draw", "fifo.png"],
    "weights": ["train_mini", "--out", "prompts.json"],
    "results": [*WHOLE["train"], "--output-dir=prompts.json"],
    "results below a file": [*WHOLE["train"], "--output-dir=prompts.json/x"],
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
    assert train.cli(toy_line(place, "--trainer=ForgetExact", "--forget=Dog", "--forget=newt")) == 2
    assert "Dog.safetensors" in capsys.readouterr().err and mine.read_bytes() == b"mine"


# forget_cls.py is a program that users edit.

LISTS = "all_ds = []\nmini_ds = []\nforget_classes_all = {}\n"
EDITED = {
    "element": ("all_ds = [\n'a',\n3]", "all_ds / 1 must be a text"),
    "prompts": ("forget_prompts = {'A': {'x':\n 'text'}}", "A / x must be a list"),
    "many digits": ("all_ds = 9**9999", "must be a list"),
    "exit": ("import sys\nsys.exit(0)", "SystemExit"),
    "name": ("\nall_ds = [StanfordDogs]", "need quotes"),
    "encoding": ("# coding: no-such", "no-such"),
}


@pytest.fixture
def edited(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Have forget_cls.py of the working directory read anew, with another content."""
    monkeypatch.setattr(sys, "path", [str(place)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "forget_cls", raising=False)
    yield (place / "forget_cls.py").write_bytes
    sys.modules.pop("forget_cls", None)


@pytest.mark.parametrize("edit", EDITED)
def test_mistakes_in_forget_cls(edit, refusal, edited):
    text, message = EDITED[edit]
    edited((text + "\n" + LISTS if edit == "encoding" else LISTS + text).encode())
    line = refusal("train", ARGS[1:])
    assert line.startswith("error: forget_cls.py") and message in line


@pytest.mark.parametrize("content", [None, b"\0", b"\xff\xfe", b"all_ds = '\xe9'", b""])
def test_a_forget_cls_that_does_not_read(content, place, refusal, edited):
    edited(content or b"")
    if content is None:  # a folder of that name, which is looked at last
        (place / "forget_cls.py").unlink()
        (place / "forget_cls").mkdir()
    assert "forget_cls.py" in refusal("train", ARGS[1:])


# Names of every kind that a system allows.

ODD = ["日本語", "👩‍🚀 crew", "שלום", "a\u0301", "tab\tand\nline", "a|b"]
ODD += ["naïve ž", "\x1b[31mred", "$x^2$"]


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
    assert CLI["audit"]([out, "--without=relearning", f"--features={odd}"]) == 0
    assert CLI["utils"]([out]) == 0 and CLI["report"]([out]) == 0
    assert "\\udcff" in Path(out, place_of("Ödd"), "log.txt").read_text(encoding="utf-8")
    assert set(utils.create_results(out)[0]["name"]) >= {join_label([name]) for name in ODD[:6]}


# What a kill leaves, and folders that go or may not be entered.


def test_a_run_removes_what_a_killed_one_left(place):
    left = place / f"out/ToyAnimals/.tmp-{16 * 'a'}.safetensors"
    left.write_text("half")
    fresh = left.with_name(f".tmp-{16 * 'b'}.safetensors")  # of a run at work
    fresh.write_text("half")
    os.utime(left, (0, time.time() - 2 * STALE))
    assert train.cli(toy_line(place, "--trainer=ForgetExact", "--forget=Dog")) == 0
    assert not left.exists() and fresh.exists()
