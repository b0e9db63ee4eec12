"""Many runs: the loops of forget_clip.sh, and a map over Ray with workers that die."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import train
from engine.cli import run
from engine.ray import LauncherSettings, cluster, spread
from evaluation.results import read_logs
from experiments import sweep
from forgetting.adapter import load_adapter
from forgetting.errors import ProblemError
from tests.conftest import BACKBONE, REPOSITORY

RAY = LauncherSettings("ray", tries=1)
HERE = LauncherSettings()
ECHO = '#!/bin/sh\nshift\nprintf \'<%s>\' "$@"\necho\n[ "$2" != fails ]\n'  # its script aside


@pytest.fixture
def driver(tmp_path):
    """Run forget_clip.sh with a Python that prints its arguments."""
    echo = tmp_path / "echo"
    echo.write_text(ECHO)
    echo.chmod(0o755)

    def call(*arguments: str, **variables: str):
        names = ("DATA", "IMAGES", "FEATURES", "CACHE", "TRAINER", "LAUNCHER")
        environment = {key: value for key, value in os.environ.items() if key not in names}
        environment |= {"OUT": str(tmp_path / "out"), "PYTHON": str(echo)} | variables
        command = ["sh", str(REPOSITORY / "forget_clip.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return call


def test_the_driver_loops_over_each_name_once(driver, tmp_path):
    done = driver(
        *("1", "00, 0,10,010", "007,*,A A,007", "mini, hf:a b", "1", "--forget", "x y"),
        TRAINER="ForgetExact, ForgetLoRA",
        IMAGES="",
    )
    assert done.returncode == 0, done.stderr
    runs = [re.findall("<(.*?)>", line) for line in done.stdout.splitlines() if "<" in line]
    assert len(runs) == 2 * 2 * 2 * 3
    values = [dict(zip(run[:10:2], run[1:10:2], strict=True)) for run in runs]
    for option, names in {
        "--dataset": ["007", "*", "A A"],
        "--seed": ["0", "10"],
        "--backbone": ["mini", "hf:a b"],
        "--trainer": ["ForgetExact", "ForgetLoRA"],
    }.items():
        assert list(dict.fromkeys(one[option] for one in values)) == names
    assert values[-1]["--output-dir"] == f"{tmp_path}/out/results1/hf:a b/ForgetLoRA/seed_10"
    assert all(run[-3:] == ["--multiclass", "--forget", "x y"] for run in runs)


def test_a_run_that_fails_stops_no_other_and_an_interrupted_one_is_the_last(driver, tmp_path):
    done = driver("1", "0", "fails,A", "mini", "0")
    assert done.returncode == 2 and "<A>" in done.stdout
    assert "failed: fails, mini, ForgetLoRA, seed 0;" in done.stderr
    stopped = tmp_path / "stopped"
    stopped.write_text("#!/bin/sh\necho once\nexit 130\n")
    stopped.chmod(0o755)
    done = driver("1", "0,1", "A", "mini", "0", PYTHON=str(stopped))
    assert done.returncode == 130 and done.stdout.count("once") == 1


FIVE = ["1", "0", "A,B", "mini", "0"]
REFUSED = [
    (["1", "0", "A"], "five arguments are needed.*got 3"),
    (["../x", *FIVE[1:]], "ATTEMPT must be.*'../x'"),
    (["1", "0,x", *FIVE[2:]], "SEED must be an integer of 0 or more.*'0,x'"),
    (["1", " ", *FIVE[2:]], "SEED must be integers.*' '"),
    ([*FIVE[:4], "2"], "MULTICLASS must be 0 or 1, got '2'"),
    (["1", "0", "A,,B", "mini", "0"], "DATASETS must be names.*'A,,B'"),
    ([*FIVE, "--seed=5"], "--seed is set"),
    ([*FIVE, "TRAINER.NAME", "x"], "TRAINER.NAME is set for each run"),
    *(
        ([*FIVE, f"--{option}", "x"], f"--{option} is set")
        for option in ("seed", "trainer", "dataset", "backbone", "output-dir", "multiclass")
    ),
    ({"PYTHON": "/nowhere/python"}, "no Python at '/nowhere/python'"),
    ({"LAUNCHER": "slurm"}, "LAUNCHER must be local or ray.*"),
    ({"IMAGES": "x"}, "IMAGES is one data set"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_the_driver_refuses_before_python_starts(driver, tmp_path, wrong, message):
    done = driver(*FIVE, **wrong) if isinstance(wrong, dict) else driver(*wrong)
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "out").exists()
    assert re.fullmatch(f"error: .*{message}.*\n", done.stderr), done.stderr


def test_the_driver_hands_its_loops_to_a_sweep(driver, tmp_path):
    done = driver("1", "0,1", "A,B", "mini", "0", "--cpus", "2", LAUNCHER="ray", TRAINER="X")
    assert re.findall("<(.*?)>", done.stdout)[:14] == [
        *("experiments", "sweep", "--datasets", "A,B", "--seeds", "0,1", "--backbones", "mini"),
        *("--trainers", "X", "--out", f"{tmp_path}/out/results1", "--launcher", "ray"),
    ]
    assert "<--cpus><2>" in done.stdout


@pytest.fixture
def lists(features: Path, tmp_path: Path) -> list[str]:
    """Every class of a set of six and of one of four, by a sweep."""
    return [
        *("--datasets", "ToyAnimals,ToyTools", "--features", str(features), "--seeds", "0,1"),
        *("--backbones", BACKBONE, "--cache", str(tmp_path / "cache"), "--forget", "all"),
        *("--trainers", "ForgetExact,ForgetNoise"),
    ]


def adapters(folder: Path) -> dict[str, bytes]:
    """The change of every adapter below a folder, bit for bit."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    loaded = {str(path.relative_to(folder)): load_adapter(path) for path in files}
    return {name: one.delta().numpy().tobytes() for name, one in loaded.items()}


def test_a_sweep_gives_what_single_runs_give(lists, features, tmp_path, capsys):
    assert run(sweep.main, [*lists, "--out", str(tmp_path / "all")]) == 0
    out = capsys.readouterr().out
    assert "(8 of 8, 0:00 left)" in out and f"results: {tmp_path}/all/ForgetNoise/seed_1" in out
    argv = ["--dataset", "ToyTools", "--features", str(features), "--backbone", BACKBONE]
    argv += ["--trainer", "ForgetNoise", "--seed", "1", "--forget", "all"]
    train.main([*argv, "--output-dir", str(tmp_path / "one")])
    single = adapters(tmp_path / "one")
    assert len(single) == 4
    assert single.items() <= adapters(tmp_path / "all/ForgetNoise/seed_1").items()


@pytest.mark.parametrize("trainer", ["ForgetExact", "ForgetLoRA"])
def test_parts_of_a_set_have_the_ridge_and_the_results_of_all_of_it(lists, tmp_path, trainer):
    """The ridge is part of the solver's settings, which every label of a folder must share."""
    lists = [*lists[:-1], trainer, "--seeds", "0", "TRAINER.FORGETLORA.STEPS", "50"]
    folders = [tmp_path / name / "seed_0" for name in ("whole", "parts")]
    for folder, parts in zip(folders, ("1", "4"), strict=True):
        assert run(sweep.main, [*lists, "--out", str(folder.parent), "--parts", parts]) == 0
    whole, parts = map(read_logs, folders)
    for dataset, entries in whole.items():
        for label in entries.keys() - {"settings"}:
            place = entries[label]["solver"]["adapter"]
            assert entries[label]["final_results"] == parts[dataset][label]["final_results"]
            own, other = (load_adapter(folder / place) for folder in folders)
            assert own.solver["settings"] == other.solver["settings"]
            assert torch.allclose(own.delta(), other.delta(), rtol=0, atol=1e-6)


def test_what_a_sweep_cannot_run_is_refused_first(lists, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for extra, word in (
        (["--seeds", "0,99999999999"], "--seed"),
        (["--eval-only"], "--eval-only"),
        (["--launcher", "ray"], "requirements-ray.txt"),
    ):
        argv = [*lists, "--out", str(tmp_path / "out"), *extra]
        assert word in refused(argv, partial(run, sweep.main))
    assert not (tmp_path / "out").exists()


def shout(word: str) -> str:
    if word == "bad":
        raise ProblemError("refused")
    return word.upper()


@pytest.fixture(scope="module")
def workers() -> Iterator[object]:
    """A Ray of two workers, started as the launcher does it."""
    if find_spec("ray") is None:  # not imported here: Ray reads its token when it is
        pytest.skip("needs Ray")
    token = Path.home() / ".ray" / "auth_token"
    existed = token.exists()
    with cluster(cores=2) as ray:
        assert existed or not token.exists(), "the token of a Ray of our own is in no file"
        yield ray


def test_ray_gives_the_results_of_one_process_bit_for_bit(workers, lists, tmp_path, capsys):
    assert run(sweep.main, [*lists, "--out", str(tmp_path / "here")]) == 0
    argv = [*lists, "--out", str(tmp_path / "ray"), "--launcher", "ray"]
    assert run(sweep.main, argv) == 0
    assert "ray: 8 tasks" in capsys.readouterr().out
    assert adapters(tmp_path / "here") == adapters(tmp_path / "ray")
    assert run(sweep.main, [*argv, "--cpus=512"]) == 2
    assert "no machine of Ray has 512 CPU" in capsys.readouterr().err


def dying(marks: str, word: str) -> str:
    """A task whose worker is killed the first time."""
    mark = Path(marks, word)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return shout(word)


def test_a_task_whose_worker_dies_is_begun_again(workers, tmp_path):
    found = dict(spread(partial(dying, str(tmp_path)), ["a", "bad"], RAY))
    assert found["a"] == "A" and str(found["bad"]) == "refused"
