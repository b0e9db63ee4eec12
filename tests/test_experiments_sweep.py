"""Many runs and their table: sweeps, the methods side by side, and the lists of commands."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest

import train
from benchmarks import driver, solver
from benchmarks.__main__ import BENCHMARKS
from benchmarks.__main__ import cli as benchmarks
from clip.bundle import bundle_path
from engine.cli import run
from engine.config import read_yaml
from evaluation.tables import average_gains
from experiments import baselines, sweep
from experiments.__main__ import EXPERIMENTS
from experiments.__main__ import cli as experiments
from experiments.runs import Run, runs_of
from forgetting.errors import ProblemError
from tests.conftest import BACKBONE, refuses
from tests.results_fixtures import entry
from trainers import METHODS
from utils import create_results

FILE = """
datasets: [ToyAnimals, ToyTools]
backbones: [ViT-B/32]
trainers: [ForgetNoise]
methods: {ours: {trainer: ForgetExact}}
seeds: [0, 1]
classes: [all]
settings:
  mild: {FORGET.BETA: 0.05}
  strong: {FORGET.BETA: 0.4}
"""
COMMANDS = {"experiments": (experiments, EXPERIMENTS), "benchmarks": (benchmarks, BENCHMARKS)}


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
    assert "== ToyTools, ViT-B/32, ForgetNoise strong, alone, seed 1: done (16 of 16" in out
    row = table[table["method"] == "ForgetNoise mild"].set_index("data set")
    folders = [root / f"ViT-B-32/ForgetNoise mild/seed_{seed}" for seed in (0, 1)]
    frames = [create_results(folder)[0] for folder in folders]
    gains = pd.Series([average_gains(frame).mean() for frame in frames])
    assert row.loc["all of them", "average gain"] == pytest.approx(gains.mean())
    assert row.loc["all of them", "± average gain"] == pytest.approx(gains.std())
    assert gains.std() > 0 and row.loc["all of them", "classes"] == 10
    tools = pd.Series([100 * f[f.ds == "ToyTools"].cls_forget.mean() for f in frames])
    assert row.loc["ToyTools", "class after"] == pytest.approx(tools.mean())
    again = sweep.main(command)
    pd.testing.assert_frame_equal(again, table)


@pytest.mark.parametrize("file", sorted(Path("experiments").glob("**/*.yaml")), ids=str)
def test_our_own_sweeps_can_be_run(file, features, tmp_path):
    """Every method and setting is planned; the command takes another data set than the file's."""
    if not {"methods", "trainers"} & (varied := read_yaml(file)).keys():
        return  # not a sweep
    sweep.read_sweep(file)
    varied |= {"datasets": ["ToyAnimals"], "classes": ["Dog", "cat"]}
    runs = runs_of(varied, tmp_path, ["--features", str(features)])
    settings = len(varied.get("settings", [""])) * len(varied.get("modes", [""]))
    assert len(runs) == settings * len(varied.get("methods") or varied["trainers"])


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
    options = [*command[1:], "--forget", "saw", "--forget", "axe", "--multiclass"]
    table = sweep.main([*lists, "--trainers", "ForgetZero", *options])
    assert (tmp_path / "out/seed_1/logs.json").is_file() and table["mode"].tolist() == ["at once"]


TOOLS = "datasets: [ToyTools]\nbackbones: [ViT-B/32]\n"
REFUSED = {
    "datasets: [A]\ntrainer: [x]": "'trainers'",
    "datasets: [A]\ntrainers: [ForgetExat]": "'ForgetExact'",
    "datasets: ToyAnimals": "datasets must be a list",
    "datasets: [A]\nmodes: [twice]": "modes / 0 must be alone or at once",
    "seeds: [0]": "needs a data set",
    "datasets: []": "datasets must be",
    "seeds: [x]": "must be a whole number",
    "datasets: [A]\nsettings: {a: 1}": "settings / a must",
    "datasets: [A]\nmethods: [ForgetZero]": "methods must",
    TOOLS + "classes: [sew]": "'saw'",
    TOOLS + "settings: {a: {FORGET.RANK: 0}}": "FORGET.RANK must be",
    TOOLS + "classes: [saw]\nsettings: {a: {FORGET.CLASSES: [axe]}}": "FORGET.CLASSES is varied",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_run_is_refused_before_anything_is(text, command, tmp_path, refused):
    (tmp_path / "mine.yaml").write_text(text)
    assert REFUSED[text] in refused(command, lambda argv: run(sweep.main, argv))
    assert not (tmp_path / "out").exists()


def test_runs_that_fail_are_named_and_the_table_holds_the_others(command, tmp_path, monkeypatch):
    def lose_one(cfg, build=train.build_trainer):
        if cfg.SEED == 1 and cfg.FORGET.BETA == 0.4 and cfg.DATASET.NAME == "ToyTools":
            raise ProblemError("lost")
        return build(cfg)

    monkeypatch.setattr(train, "build_trainer", lose_one)
    refuses("failed: ToyTools, ViT-B/32, ours strong", sweep.main, command)
    table = pd.read_csv(tmp_path / "out/mine/sweep.csv")
    lost = table[table["method"].str.contains("strong") & (table["data set"] == "ToyTools")]
    assert (lost["seeds"] == 1).all() and table["seeds"].max() == 2


def test_methods_side_by_side_resume(features, tmp_path, capsys):
    argv = ["--features", str(features), "--dataset", "ToyAnimals", "--out", str(tmp_path / "out")]
    argv += ["--forget", "owl", "--forget", "cat", "TRAINER.FORGETLORA.STEPS", "5"]
    table = baselines.main([*argv, "--methods", "name,exact-opposite", "--audit"])
    out = capsys.readouterr().out
    assert "config:" not in out and "exact-opposite" in out
    table = table.set_index("method")
    assert (table["class after"] == 0).all() and (table["class before"] > 90).all()
    assert (table["neighbours"].abs() < 100).all()
    assert table.loc["name", "bytes"] < table.loc["exact-opposite", "bytes"]
    every = baselines.main(argv).set_index("method")
    assert list(every.index) == list(baselines.METHODS) and (every["classes"] == 2).all()
    assert every.loc["name", "seconds"] == table.loc["name", "seconds"]
    assert {given["trainer"] for given in baselines.METHODS.values()} == set(METHODS)
    refuses("'uce'", baselines.main, [*argv, "--methods", "uec"])


def test_the_numbers_of_a_sweep_by_hand(tmp_path):
    def logged(name, own, rest, b, c, adapter):
        one = entry("A", name, *own, ("B",), rest, b, seconds=2.0 * len(name), adapter=adapter)
        for side, value in zip(("zero_shot", "final_results"), c, strict=True):
            one[side]["C"] = {"all": {"all_ds": value}}
        return one

    a = logged("a", (0.8, 0.2), (0.9, 0.8), (0.5, 0.4), (0.6, 0.6), "x")
    bb = logged("bb", (1.0, 0.0), (0.7, 0.8), (0.5, 0.2), (0.6, 0.5), "gone")
    (tmp_path / "logs.json").write_text(json.dumps({"A": {"settings": {}, "a": a, "bb": bb}}))
    (tmp_path / "x").write_bytes(b"12345678")
    run = Run([], tmp_path, ("mini", "m", "alone", "A"), 0, ["a", "bb"])
    (row,) = sweep.table_of([run]).to_dict("records")
    by_hand = ((0.2 / 0.8 + 0.1 / 0.9 + 0.1 / 0.5 + 0) / 4, (0 + 0 + 0.3 / 0.5 + 0.1 / 0.6) / 4)
    expected = {
        **{"classes": 2, "class before": 90, "class after": 10, "class worst": 20},
        **{"rest before": 80, "rest after": 80, "rest change": 0, "rest worst": 10},
        **{"others before": 55, "others after": 42.5, "others change": -12.5, "others worst": 30},
        **{"average gain": sum(by_hand) / 2, "seconds": 3.0, "bytes": 8},
    }
    assert {key: row[key] for key in expected} == pytest.approx(expected)
    assert sweep.table_of([replace(run, labels=["a", "bb", "c"])]).empty, "not all is done"


def test_benchmarks_measure_all_that_they_say(features, capsys):
    path = str(bundle_path(features, BACKBONE, "ToyAnimals"))
    exact, descents = solver.main(["--features", path]).values()
    assert exact["classes"].tolist() == [6, 6] and (exact["largest gap"] < 1e-9).all()
    assert descents["classes"].tolist() == [1, 1, 4] and (descents["seconds per class"] > 0).all()
    assert descents["above optimum"].between(0, 0.5).all()
    plain, alone, _ = descents["above optimum"]  # the same descent twice
    assert plain == pytest.approx(alone, abs=1e-3)
    table = driver.main(["--classes", "3", "5", "--trainer", "ForgetZero"])
    assert table["classes"].tolist() == [3, 5] and (table > 0).all(axis=None)


@pytest.mark.parametrize("package", COMMANDS)
def test_commands_are_listed_and_say_how_they_are_called(package, capsys):
    cli, names = COMMANDS[package]
    assert cli([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(names)
    for wrong in ("sulver", "--features"):
        assert cli([wrong]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    for name in names:
        assert f"python -m {package} {name}" in import_module(f"{package}.{name}").__doc__
        with pytest.raises(SystemExit, match="0"):
            cli([name, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: python -m {package} {name} ")
