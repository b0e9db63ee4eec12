"""The paper's experiments in one command, and its numbers beside ours."""

import json
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import datasets
from engine.cli import run
from evaluation.results import read_logs
from evaluation.rows import Change, Row
from experiments import reproduce
from experiments.reproduce import WHOLE, compare, whole_set
from forget_cls import forget_classes_all
from tests.clip_fixtures import picture, reduce_depth, save_openai
from tests.conftest import REPOSITORY

QUICK = ["TRAINER.FORGETLORA.STEPS", "5", "TRAINER.FORGETLORA.MAX_TRIALS", "1"]
OTHERS = ["something else", "another thing"]


def image_root(root: Path, names: list[str]) -> None:
    """Sets in CoOp's layout with their published split files; a few images of noise."""
    for name in names:
        row, entries = datasets.spec(name), []
        for label, title in enumerate([*forget_classes_all[name], *OTHERS]):
            for number in range(2):
                path = f"class_{label}/image_{number}.jpg"
                picture(root / row.folder / row.image_folder / path, 2 * label + number)
                entries.append([path, label, title])
        split = {"train": [], "val": [], "test": entries}
        (root / row.folder / row.split_file).write_text(json.dumps(split))


def command(tmp_path: Path, *more: str) -> list[str]:
    return [
        *("--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")),
        *("--cache", str(tmp_path / "cache"), *more, *QUICK),
    ]


def test_one_backbone_on_tiny_images(tmp_path, monkeypatch, capsys, refused):
    """In process with one layer a stage; then again, which skips all, then one set is lost."""
    names, out = ["StanfordCars", "OxfordFlowers"], tmp_path / "out"
    reduce_depth(monkeypatch, tmp_path, "RN50")
    image_root(tmp_path / "data", names)
    save_openai("RN50", tmp_path / "weights.pt")
    options = ["--datasets", ",".join(names), "--backbones", "RN50"]
    options += ["--weights", f"RN50={tmp_path / 'weights.pt'}"]
    before = reproduce.main(command(tmp_path, *options))
    printed = capsys.readouterr().out
    assert "== OxfordFlowers, RN50, ForgetLoRA, at once, seed 0: done (4 of 4" in printed
    assert "0.6606" in printed and "not the paper's settings" in printed
    assert "average gain" in printed.partition("After, in percent; ")[2].partition("\n")[2]
    # Measured numbers everywhere, the paper's beside them; means after forgetting.
    assert len(before) == 2 * (1 + 3) and before["ours"].between(0, 1).all()
    assert np.allclose(before["difference"], before["ours"] - before["paper"])
    pd.testing.assert_frame_equal(pd.read_csv(out / "reproduce/paper.csv"), before)
    after = pd.read_csv(out / "reproduce/sweep.csv")
    assert sorted(after["data set"]) == sorted([*names, "all of them"] * 2)
    assert set(after["mode"]) == {"alone", "at once"} and after["average gain"].notna().all()
    logs = read_logs(out / "reproduce/RN50/ForgetLoRA/seed_0")
    assert {len(logs[name]) for name in names} == {1 + 3 + 1}  # settings, alone, at once
    ours = before.set_index(["data set", "class"])["ours"]
    for name, other in (names, names[::-1]):  # what the runs on the other set logged for this one
        entry = logs[other][forget_classes_all[other][0]]["zero_shot"]
        assert ours[name, WHOLE] == pytest.approx(entry[name]["all"]["all_ds"])
    pd.testing.assert_frame_equal(reproduce.main(command(tmp_path, *options)), before)
    (tmp_path / "data/oxford_flowers/jpg").rename(tmp_path / "gone")
    line = refused(command(tmp_path, *options), partial(run, reproduce.main))
    assert "OxfordFlowers: no image folder" in line


def row(name: str, before: float | None, rest: float, label: str = "") -> Row:
    own, others = Change(before, 0.2), Change(rest, 0.45)
    return Row("StanfordDogs", label or name, name, 1, own, others, {})


def test_numbers_side_by_side():
    """Ten test images of Pekinese, 30 of toy poodle, 60 of others: 8 + 45 of 100 are right."""
    rows = [row("Pekinese", 0.8, 0.5), row("toy_poodle", 0.6, 0.5)]
    images = {"StanfordDogs": {"Pekinese": 10, "toy_poodle": 30, "other": 60}}
    table = compare("RN50", rows, images)
    numbers = table.set_index("class")[["paper", "ours", "difference"]]
    assert numbers.loc[WHOLE].tolist() == pytest.approx([0.5168, 0.53, 0.53 - 0.5168])
    # the split's own spelling, found under the paper's
    assert numbers.loc["toy_poodle"].tolist() == pytest.approx([0.574, 0.6, 0.026])
    other = compare("ViT-B/16", rows, images)
    assert other["paper"].isna().all() and other["ours"].equals(table["ours"])
    assert compare("RN50", rows, {"Caltech101": {"x": 9}}).empty
    several = [row("Pekinese", 1.0, 0.4, "both"), row("toy_poodle", None, 0.4, "both")]
    assert whole_set(several, images["StanfordDogs"]) == pytest.approx((10 + 0.4 * 60) / 100)


def test_make_asks_for_the_images():
    make = ["make", "reproduce", "DATA="]
    done = subprocess.run(make, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "error: make reproduce DATA=path" in done.stderr
