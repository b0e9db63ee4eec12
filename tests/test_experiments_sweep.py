"""Many runs from one file: what is refused first, what is run, and the table of all of it."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from engine.cli import run
from experiments import sweep
from experiments.runs import launch
from forgetting.errors import ProblemError
from tests.test_bad_input import caltech
from utils import compute_avg_gain, create_results

FILE = """
datasets: [ToyAnimals, ToyTools]
backbones: [ViT-B/32]
trainers: [ForgetNoise, ForgetExact]
seeds: [0, 1]
classes: [all]
settings:
  mild: {FORGET.BETA: 0.05}
  strong: {FORGET.BETA: 0.4}
"""


@pytest.fixture
def command(features: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "mine.yaml").write_text(FILE)
    return [
        *(str(tmp_path / "mine.yaml"), "--features", str(features)),
        *("--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")),
    ]


def test_a_sweep_and_its_table(command, tmp_path, capsys):
    table = sweep.main(command)
    root = tmp_path / "out/mine"
    assert len(table) == 2 * 2 * 3 and (table["seeds"] == 2).all()
    assert (root / "report.html").stat().st_size > 10_000
    written = pd.read_csv(root / "sweep.csv")
    pd.testing.assert_frame_equal(written, table, check_dtype=False)
    out = capsys.readouterr().out
    assert "== ToyTools, ViT-B/32, ForgetExact, strong, alone, seed 1: done (16 of 16" in out
    row = table[(table["trainer"] == "ForgetNoise") & (table["setting"] == "mild")]
    row = row.set_index("data set")
    folders = [root / f"ViT-B-32/ForgetNoise/mild/seed_{seed}" for seed in (0, 1)]
    frames = [create_results(folder)[0] for folder in folders]
    gains = pd.Series([compute_avg_gain(frame).mean() for frame in frames])
    assert row.loc["all of them", "average gain"] == pytest.approx(gains.mean())
    assert row.loc["all of them", "± average gain"] == pytest.approx(gains.std())
    assert gains.std() > 0 and row.loc["all of them", "classes"] == 10
    left = pd.Series([100 * f[f.ds == "ToyTools"].cls_forget.mean() for f in frames])
    assert row.loc["ToyTools", "class after"] == pytest.approx(left.mean())
    assert row.loc["ToyTools", "± class after"] == pytest.approx(left.std())
    again = sweep.main(command)
    pd.testing.assert_frame_equal(again, table)
    assert capsys.readouterr().out.count("done before, skipped") == 2 * 2 * 2 * 2  # a line a run
    (tmp_path / "mine.yaml").write_text(
        FILE.replace("ToyAnimals, ToyTools", "ToyTools, ToyAnimals")
    )
    assert sweep.main(command)["data set"].tolist()[:2] == ["ToyTools", "ToyAnimals"]


def test_the_table_is_of_what_the_file_names_now(command, tmp_path):
    sweep.main(command)
    text = FILE.replace("[all]", "[saw, axe]").replace("ToyAnimals, ", "").replace("[0, 1]", "[1]")
    (tmp_path / "mine.yaml").write_text(text + "modes: [alone, at once]\n")
    table = sweep.main(command)
    assert set(table["data set"]) == {"ToyTools"} and (table["seeds"] == 1).all()
    assert table["mode"].value_counts().to_dict() == {"alone": 4, "at once": 4}
    counts = table.groupby("mode")["classes"].first()
    assert counts.to_dict() == {"alone": 2, "at once": 1} and table["± class after"].isna().all()


REFUSED = {
    "key": ("datasets: [A]\ntrainer: [x]", "unknown key in .* 'trainer'; did you mean 'trainers'"),
    "trainer": ("datasets: [A]\ntrainers: [ForgetExat]", "did you mean 'ForgetExact'"),
    "kind": ("datasets: ToyAnimals", "datasets must be a list"),
    "seed": ("datasets: [A]\nseeds: [-1]", "seeds / 0 must be"),
    "mode": ("datasets: [A]\nmodes: [twice]", "modes / 0 must be"),
    "nothing": ("seeds: [0]", "names no data set"),
    "empty": ("datasets: []", "datasets must be"),
    "no setting": ("datasets: [A]\nsettings: {}", "settings must be an object that is not empty"),
    "class": ("datasets: [ToyTools]\nbackbones: [ViT-B/32]\nclasses: [sew]", "nearest: 'saw'"),
    "setting": (
        "datasets: [ToyTools]\nbackbones: [ViT-B/32]\nsettings: {a: {FORGET.RANK: 0}}",
        "FORGET.RANK must be",
    ),
    "own key": (
        "datasets: [ToyTools]\nbackbones: [ViT-B/32]\nsettings: {a: {FORGET.MULTICLASS: True}}",
        "FORGET.MULTICLASS is set for each run .*settings / a in .*mine.yaml",
    ),
    "huge seed": ("datasets: [A]\nseeds: [0, 99999999999]", "SEED must be a whole number"),
    "yaml": ("datasets: [", "mine.yaml"),
    "date": ("datasets: [2020-01-01]", "datasets / 0 must be a text, and is 2020-01-01"),
    "set": ("datasets: !!set {a, b}", "datasets must be a list, and is {'"),
    "twice": ("datasets: [A]\nseeds: [0]\nseeds: [1]", "stands twice"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_cannot_be_run_is_refused_before_anything_is(row, command, tmp_path, capsys):
    text, message = REFUSED[row]
    (tmp_path / "mine.yaml").write_text(text)
    assert run(sweep.main, command) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_runs_that_fail_are_named_and_the_table_holds_the_others(command, monkeypatch):
    def some(runs, how):
        launch(runs[:-1], how)
        return runs[-1:]

    monkeypatch.setattr(sweep, "launch", some)
    with pytest.raises(
        ProblemError, match="failed: ToyTools, ViT-B/32, ForgetExact, strong, alone, s"
    ):
        sweep.main(command)


def test_runs_without_a_row_are_not_called_failed(command, tmp_path, capsys):
    text = FILE.replace("[all]", "[saw]").replace("ToyAnimals, ", "") + "modes: [at once]\n"
    (tmp_path / "mine.yaml").write_text(text)
    assert run(sweep.main, command) == 2
    assert "(a set of one class has none at once)" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["SEED", "OUTPUT_DIR", "FORGET.PART", "FORGET.CLASSES"])
def test_no_pair_sets_what_the_file_varies(key, command, tmp_path, capsys):
    value = {"FORGET.PART": "1/2", "FORGET.CLASSES": "('saw',)"}.get(key, "5")
    assert run(sweep.main, [*command, key, value]) == 2
    assert f"{key} is set for each run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_split_that_is_not_the_published_one_is_told_on_the_screen_and_in_each_log(
    tmp_path, capsys
):
    root = caltech(tmp_path / "data")
    next(root.glob("*/split_zhou_Caltech101.json")).unlink()
    (tmp_path / "mine.yaml").write_text(
        "datasets: [Caltech101]\ntrainers: [ForgetNothing]\nseeds: [0, 1]\nbackbones: [mini]"
    )
    options = ["--data", "data", "--cache", "cache", "--out", "out"]
    options[1::2] = [str(tmp_path / name) for name in options[1::2]]
    assert run(sweep.main, [str(tmp_path / "mine.yaml"), *options, "--quiet"]) == 0
    out, told = capsys.readouterr().out, "Caltech101: this is not the published split"
    assert told in out and "table:" not in out
    logs = [path.read_text() for path in (tmp_path / "out").rglob("log.txt")]
    assert [log.count(told) for log in logs] == [1, 1]
    assert all("classes, " in log for log in logs)


@pytest.mark.slow
def test_a_sweep_by_ray_is_that_of_one_process(command, tmp_path):
    pytest.importorskip("ray", reason="needs Ray: pip install -r requirements-ray.txt")
    from engine.ray import cluster

    here = sweep.main([*command, "--out", str(tmp_path / "here")])
    with cluster(cores=2):
        pd.testing.assert_frame_equal(sweep.main([*command, "--launcher", "ray"]), here)
