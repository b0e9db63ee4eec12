"""The paper's experiments in one command, and its numbers beside ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import datasets
import train
from engine.cli import run
from evaluation.results import read_logs
from evaluation.rows import Change, Row, read_rows
from experiments import reproduce
from experiments.reproduce import WHOLE, compare, whole_set
from forget_cls import all_ds, forget_classes_all
from forgetting.errors import ProblemError
from tests.clip_fixtures import reduce_depth, save_openai
from tests.conftest import REPOSITORY

QUICK = ["TRAINER.FORGETLORA.STEPS", "5", "TRAINER.FORGETLORA.MAX_TRIALS", "1"]
MINI = ["FORGET.LAMB_PRESERVE", "0.3", "FORGET.LAMB_FORGET", "1.5"]
OTHERS = ["something else", "another thing"]
IMAGES = 2  # of a class


def image_root(root: Path, names: list[str] = all_ds) -> Path:
    """The four sets in CoOp's layout with their published split files; a few images of noise."""
    rng = np.random.default_rng(0)
    for name in names:
        row, entries = datasets.spec(name), []
        folder = root / row.folder / row.image_folder
        for label, title in enumerate([*forget_classes_all[name], *OTHERS]):
            for number in range(IMAGES):
                path = f"class_{label}/image_{number}.jpg"
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / path)
                entries.append([path, label, title])
        split = {"train": [], "val": [], "test": entries}
        (root / row.folder / row.split_file).write_text(json.dumps(split))
    return root


def command(tmp_path: Path, *more: str) -> list[str]:
    return [
        *("--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")),
        *("--cache", str(tmp_path / "cache"), *more, *QUICK),
    ]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Callable[[str], list[str]]]:
    """Write random weights of a backbone; the option that names them. Removed after the test:
    they are hundreds of megabytes."""

    def write(backbone: str) -> list[str]:
        path = tmp_path / "weights" / f"{backbone.replace('/', '-')}.pt"
        path.parent.mkdir(exist_ok=True)
        save_openai(backbone, path)
        return ["--weights", f"{backbone}={path}"]

    yield write
    for path in tmp_path.glob("weights/*.pt"):
        path.unlink()


def check_outcome(before: pd.DataFrame, out: Path, backbones: list[str], names: list[str]) -> None:
    """Measured numbers everywhere, the paper's where it has them; means after forgetting."""
    assert len(before) == len(backbones) * len(names) * (1 + 3)
    assert before["ours"].between(0, 1).all()
    rn50 = before[before["backbone"] == "RN50"]
    assert rn50["paper"].notna().all()
    assert np.allclose(rn50["difference"], rn50["ours"] - rn50["paper"])
    assert before[before["backbone"] != "RN50"]["paper"].isna().all()
    pd.testing.assert_frame_equal(pd.read_csv(out / "reproduce/paper.csv"), before)
    after = pd.read_csv(out / "reproduce/sweep.csv")
    sets = [*names, *(["all of them"] if len(names) > 1 else [])]
    assert sorted(after["data set"]) == sorted(sets * 2 * len(backbones))
    assert set(after["mode"]) == {"alone", "at once"} and after["average gain"].notna().all()
    for backbone in backbones:
        folder = out / "reproduce" / backbone.replace("/", "-") / "ForgetLoRA/seed_0"
        logs = read_logs(folder)
        assert {len(logs[name]) for name in names} == {1 + 3 + 1}  # settings, alone, at once
        ours = before[before["backbone"] == backbone].set_index(["data set", "class"])["ours"]
        for name in names:  # the accuracy that the runs on the other sets logged for this one
            for other in set(names) - {name}:
                entry = logs[other][forget_classes_all[other][0]]["zero_shot"]
                assert ours[name, WHOLE] == pytest.approx(entry[name]["all"]["all_ds"])


def test_one_backbone_on_tiny_images(tmp_path, checkpoint, monkeypatch, capsys):
    """In process with one layer a stage; then again, which skips all, then one set is lost."""
    names = ["StanfordCars", "OxfordFlowers"]
    reduce_depth(monkeypatch, tmp_path, "RN50")
    image_root(tmp_path / "data", names)
    options = ["--datasets", ",".join(names), "--backbones", "RN50", *checkpoint("RN50")]
    table = reproduce.main(command(tmp_path, *options))
    check_outcome(table, tmp_path / "out", ["RN50"], names)
    printed = capsys.readouterr().out
    assert "== OxfordFlowers, RN50, ForgetLoRA, at once, seed 0: done (4 of 4" in printed
    assert "0.6606" in printed and "not the paper's settings" in printed
    pd.testing.assert_frame_equal(reproduce.main(command(tmp_path, *options)), table)

    (tmp_path / "data/oxford_flowers/jpg").rename(tmp_path / "gone")
    assert "data set OxfordFlowers: no image folder" in refusal(command(tmp_path, *options), capsys)


def test_a_run_that_fails_is_named_and_the_others_are_compared(tmp_path, monkeypatch, capsys):
    names = ["StanfordCars", "OxfordFlowers"]
    image_root(tmp_path / "data", names)

    def lose_cars(cfg, build=train.build_trainer):
        if cfg.DATASET.NAME == "StanfordCars":
            raise ProblemError("lost")
        return build(cfg)

    monkeypatch.setattr(train, "build_trainer", lose_cars)
    options = ["--datasets", ",".join(names), "--backbones", "mini", *MINI]
    assert run(reproduce.main, command(tmp_path, *options)) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: failed: StanfordCars") and "OxfordFlowers" not in last
    assert "OxfordFlowers" in captured.out.partition("After, in percent")[2]
    assert "StanfordCars" not in captured.out.partition("Before forgetting")[2]


@pytest.mark.slow
def test_the_whole_command_on_both_backbones(tmp_path, checkpoint):
    """Checkpoints in OpenAI's format at full depth, all four sets, from the shell."""
    image_root(tmp_path / "data")
    backbones = ["RN50", "ViT-B/16"]
    weights = [text for backbone in backbones for text in checkpoint(backbone)]
    script = [sys.executable, "-m", "experiments", "reproduce"]
    done = subprocess.run(
        [*script, *command(tmp_path, *weights)], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    assert "0.5168" in done.stdout
    table = pd.read_csv(tmp_path / "out/reproduce/paper.csv")
    check_outcome(table, tmp_path / "out", backbones, all_ds)


# The arithmetic, from planted logs


def side(own: dict, others: dict[str, float], dataset: str) -> dict:
    entries = {
        name: {"cls_acc_test": c, "no_cls_acc": rest, "acc_train": None}
        for name, (c, rest) in own.items()
    }
    return {dataset: entries} | {name: {"all": {"all_ds": v}} for name, v in others.items()}


def plant(folder: Path) -> None:
    """Ten test images of Pekinese, 30 of toy poodle, 60 of others; half of Caltech101 right."""
    before = {"Pekinese": (0.8, 0.5), "toy_poodle": (0.6, 0.5)}  # 8 of 10, 45 of 90; 18 of 30
    dogs = {"settings": {"backbone": "RN50"}}
    for name, (own, rest) in before.items():
        dogs[name] = {
            "zero_shot": side({name: (own, rest)}, {"Caltech101": 0.5}, "StanfordDogs"),
            "final_results": side({name: (0.2, 0.45)}, {"Caltech101": 0.4}, "StanfordDogs"),
        }
    folder.mkdir(parents=True)
    (folder / "logs.json").write_text(json.dumps({"StanfordDogs": dogs}))


def test_numbers_side_by_side_from_planted_logs(tmp_path):
    plant(tmp_path / "logs")
    rows = read_rows(tmp_path / "logs")
    images = {"StanfordDogs": Counter({"Pekinese": 10, "toy_poodle": 30, "other": 60})}
    table = compare("RN50", rows, images)
    numbers = table.set_index("class")[["paper", "ours", "difference"]]
    assert numbers.loc[WHOLE].tolist() == pytest.approx([0.5168, 0.53, 0.53 - 0.5168])
    assert numbers.loc["Pekinese"].tolist() == pytest.approx([0.705, 0.8, 0.095])
    # the split's own spelling, found under the paper's
    assert numbers.loc["toy_poodle"].tolist() == pytest.approx([0.574, 0.6, 0.026])
    other = compare("ViT-B/16", rows, images)
    assert other["paper"].isna().all() and other["ours"].equals(table["ours"])
    assert compare("RN50", rows, {"Caltech101": Counter(x=9)}).empty


def test_whole_set_from_classes_and_the_rest():
    images = Counter({"a": 2, "b": 3, "empty": 0, "rest": 5})

    def rows(**own: float | None) -> list[Row]:
        rest = Change(0.4, None)
        return [Row("A", "x", name, len(own), Change(b, None), rest, {}) for name, b in own.items()]

    assert whole_set(rows(b=1 / 3), images) == pytest.approx(0.38)
    assert whole_set(rows(a=1.0, b=0.0), images) == pytest.approx((2 + 0 + 0.4 * 5) / 10)
    assert whole_set(rows(empty=None), images) == pytest.approx(0.4)


# What is refused, before any work


def refusal(argv: list[str], capsys) -> str:
    assert run(reproduce.main, argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--datasets", "Caltech101,StanfordCats"], "did you mean 'StanfordCars'"),
        (["--backbones", "RN51"], "did you mean 'RN50'"),
        (["--weights", "RN50.pt"], "must be ARCH=PATH, such as RN50=RN50.pt"),
        (["--weights", "ViT-B/32=x.pt"], "did you mean 'ViT-B/16'"),
        (["--datasets", "Caltech101", "--weights", "RN50=none.pt"], "none.pt"),
        (["--dataset", "Caltech101"], "did you mean '--datasets'"),
        (["--datasets", "Caltech101", "--backbones", "mini", "FORGET.RNK", "3"], "FORGET.RANK"),
        (["--datasets", "Caltech101", "--backbones", "mini", "SEED", "3"], "SEED is varied"),
        (["--datasets", ","], "must name one"),
        (["--backbones", "mini"], "StanfordCars: no folder"),
        (["--datasets", "Caltech101,", "--weights", "RN50=none.pt"], "none.pt"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, capsys, options, message):
    image_root(tmp_path / "data", ["Caltech101"])
    assert message in refusal(command(tmp_path, *options), capsys)
    assert not (tmp_path / "out").exists()


def test_make_asks_for_the_images():
    done = subprocess.run(
        ["make", "reproduce", "DATA="], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "error: make reproduce DATA=path" in done.stderr
