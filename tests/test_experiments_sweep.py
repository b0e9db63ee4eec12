"""Many runs and their table: sweeps, the methods side by side, and the lists of commands."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest

import train
from benchmarks import driver, solver
from benchmarks.__main__ import BENCHMARKS
from benchmarks.__main__ import cli as benchmarks
from clip.bundle import bundle_path
from engine import TRAINER_REGISTRY
from engine.cli import run
from evaluation.tables import average_gains
from experiments import baselines, sweep
from experiments.__main__ import EXPERIMENTS
from experiments.__main__ import cli as experiments
from forgetting.errors import ProblemError
from tests.conftest import BACKBONE
from trainers import SETTINGS
from utils import create_results

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
COMMANDS = {"experiments": (experiments, EXPERIMENTS), "benchmarks": (benchmarks, BENCHMARKS)}
NAMES = [(package, name) for package, (_, names) in COMMANDS.items() for name in names]


@pytest.fixture
def command(features: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "mine.yaml").write_text(FILE)
    options = ["--features", str(features), "--cache", str(tmp_path / "cache")]
    return [str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out"), *options]


def test_a_sweep_and_its_table(command, tmp_path, capsys):
    table = sweep.main(command)
    root = tmp_path / "out/mine"
    assert len(table) == 2 * 2 * 3 and (table["seeds"] == 2).all()
    assert (root / "report.html").stat().st_size > 10_000
    pd.testing.assert_frame_equal(pd.read_csv(root / "sweep.csv"), table, check_dtype=False)
    out = capsys.readouterr().out
    assert "== ToyTools, ViT-B/32, ForgetExact, strong, alone, seed 1: done (16 of 16" in out
    row = table[(table["trainer"] == "ForgetNoise") & (table["setting"] == "mild")]
    row = row.set_index("data set")
    folders = [root / f"ViT-B-32/ForgetNoise/mild/seed_{seed}" for seed in (0, 1)]
    frames = [create_results(folder)[0] for folder in folders]
    gains = pd.Series([average_gains(frame).mean() for frame in frames])
    assert row.loc["all of them", "average gain"] == pytest.approx(gains.mean())
    assert row.loc["all of them", "± average gain"] == pytest.approx(gains.std())
    assert gains.std() > 0 and row.loc["all of them", "classes"] == 10
    tools = pd.Series([100 * f[f.ds == "ToyTools"].cls_forget.mean() for f in frames])
    assert row.loc["ToyTools", "class after"] == pytest.approx(tools.mean())
    again = sweep.main(command)
    pd.testing.assert_frame_equal(again, table)


def test_the_table_is_of_what_the_file_names_now(command, tmp_path):
    sweep.main(command)
    text = FILE.replace("[all]", "[saw, axe]").replace("ToyAnimals, ", "").replace("[0, 1]", "[1]")
    (tmp_path / "mine.yaml").write_text(text + "modes: [alone, at once]\n")
    table = sweep.main(command)
    assert set(table["data set"]) == {"ToyTools"} and (table["seeds"] == 1).all()
    assert table["mode"].value_counts().to_dict() == {"alone": 4, "at once": 4}
    counts = table.groupby("mode")["classes"].first()
    assert counts.to_dict() == {"alone": 2, "at once": 1} and table["± class after"].isna().all()


def test_lists_on_the_command_line_have_the_drivers_folders(command, tmp_path):
    lists = ["--datasets", "ToyTools", "--seeds", "0,1", "--backbones", "ViT-B/32"]
    options = [*command[1:], "--forget", "saw", "--forget", "axe"]
    sweep.main([*lists, "--trainers", "ForgetZero", *options])
    assert (tmp_path / "out/seed_1/ToyTools/saw.safetensors").is_file()
    sweep.main([*lists, "--trainers", "ForgetZero,ForgetNoise", *options, "--multiclass"])
    assert (tmp_path / "out/ForgetNoise/seed_0/logs.json").is_file()


TOOLS = "datasets: [ToyTools]\nbackbones: [ViT-B/32]\n"
REFUSED = {
    "datasets: [A]\ntrainer: [x]": "'trainers'",
    "datasets: [A]\ntrainers: [ForgetExat]": "'ForgetExact'",
    "datasets: ToyAnimals": "datasets must be a list",
    "datasets: [A]\nmodes: [twice]": "unknown mode",
    "seeds: [0]": "names no data set",
    "datasets: []": "datasets must be",
    "datasets: [A]\nsettings: {}": "settings must",
    TOOLS + "seeds: [-1]": "SEED",
    TOOLS + "classes: [sew]": "'saw'",
    TOOLS + "settings: {a: {FORGET.RANK: 0}}": "FORGET.RANK must be",
    TOOLS + "settings: {a: {FORGET.MULTICLASS: True}}": "FORGET.MULTICLASS is varied",
    "datasets: [": "mine.yaml",
    FILE: "FORGET.CLASSES is varied",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_run_is_refused_before_anything_is(text, command, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(text)
    pair = ["FORGET.CLASSES", "('saw',)"] if text == FILE else []
    assert run(sweep.main, [*command, *pair]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and REFUSED[text] in line, line
    assert not (tmp_path / "out").exists()


def test_runs_that_fail_are_named_and_the_table_holds_the_others(command, tmp_path, monkeypatch):
    def lose_one(cfg, build=train.build_trainer):
        if cfg.SEED == 1 and cfg.FORGET.BETA == 0.4 and cfg.DATASET.NAME == "ToyTools":
            raise ProblemError("lost")
        return build(cfg)

    monkeypatch.setattr(train, "build_trainer", lose_one)
    with pytest.raises(ProblemError, match="failed: ToyTools, ViT-B/32, ForgetNoise, strong"):
        sweep.main(command)
    table = pd.read_csv(tmp_path / "out/mine/sweep.csv")
    lost = table[(table["setting"] == "strong") & (table["data set"] == "ToyTools")]
    assert (lost["seeds"] == 1).all() and table["seeds"].max() == 2


# The methods side by side


def test_methods_side_by_side_resume(features, tmp_path, capsys):
    argv = ["--features", str(features), "--dataset", "ToyAnimals", "--out", str(tmp_path / "out")]
    argv += ["--forget", "owl", "--forget", "cat"]
    table = baselines.main([*argv, "--methods", "name,exact-opposite"])
    out = capsys.readouterr().out
    assert "config:" not in out and "exact-opposite" in out
    assert (table["forgotten after"] == 0).all() and (table["forgotten before"] > 90).all()
    assert table.loc["name", "bytes"] < table.loc["exact-opposite", "bytes"]
    more = baselines.main([*argv, "--methods", "name,zero"])
    assert more.loc["name", "seconds"] == table.loc["name", "seconds"]
    assert list(more.index) == ["name", "zero"] and (more["classes"] == 2).all()
    with pytest.raises(ProblemError, match="'uce'"):
        baselines.main([*argv, "--methods", "uec"])


def test_every_method_can_be_run(features, tmp_path):
    assert {given["trainer"] for given in baselines.METHODS.values()} == set(SETTINGS)
    for method in baselines.METHODS.values():
        given = dict(method)
        trainer = given.pop("trainer")
        keys = [str(text) for pair in given.items() for text in pair]
        argv = ["--features", str(features), "--dataset", "ToyAnimals", "--backbone", "ViT-B/32"]
        argv += ["--output-dir", str(tmp_path), "--forget", "owl", "--trainer", trainer, *keys]
        cfg = train.setup_cfg(train.parse(argv))
        TRAINER_REGISTRY.get(trainer).preflight(cfg)


# The commands


def test_benchmarks_measure_all_that_they_say(features, capsys):
    path = str(bundle_path(features, BACKBONE, "ToyAnimals"))
    exact, descents = solver.main(["--features", path]).values()
    assert exact["classes"].tolist() == [6, 6] and (exact["largest gap"] < 1e-9).all()
    assert descents["classes"].tolist() == [1, 1, 4] and (descents["seconds per class"] > 0).all()
    assert descents["above optimum"].between(0, 0.5).all()
    table = driver.main(["--classes", "3", "5", "--trainer", "ForgetZero"])
    assert table["classes"].tolist() == [3, 5] and (table > 0).all(axis=None)


@pytest.mark.parametrize("package", COMMANDS)
def test_without_a_name_all_are_listed(package, capsys):
    cli, names = COMMANDS[package]
    assert cli([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(names)
    for wrong in ("sulver", "--features"):
        assert cli([wrong]) == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_every_name_is_a_module_whose_help_says_how_it_is_called(package, name, capsys):
    assert f"python -m {package} {name}" in import_module(f"{package}.{name}").__doc__
    with pytest.raises(SystemExit) as left:
        COMMANDS[package][0]([name, "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {package} {name} ")
