"""The real command line, from `sh forget_clip.sh` to a DataFrame of its own results."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from clip import ClipSource
from clip.architectures import ARCHITECTURES
from forgetting import load_adapter
from tests.clip_fixtures import save_openai
from tests.conftest import BACKBONE, REPOSITORY, whole_set
from tests.test_bad_input import caltech
from utils import create_results

TOY_KEYS = [
    *("FORGET.LAMB_PRESERVE", "0.05", "FORGET.LAMB_FORGET", "3.0", "FORGET.LAMB_WEIGHT", "0.02"),
    *("TRAINER.FORGETLORA.STEPS", "60", "TRAINER.FORGETLORA.MAX_TRIALS", "1"),
]


def driver(out: Path, *arguments: str, **environment: str) -> tuple[list[str], dict]:
    """The command and the keyword arguments of subprocess for a call of the driver."""
    places = {"OUT": str(out), "DATA": str(out.parent / "data"), "CACHE": str(out.parent / "cache")}
    env = os.environ | {"PYTHON": sys.executable} | places | environment
    command = ["sh", str(REPOSITORY / "forget_clip.sh"), *arguments]
    return command, {"env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def run_driver(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command, options = driver(out, *arguments, **environment)
    return subprocess.run(command, **options)


def skipped(stdout: str) -> int:
    """How many classes a run found done."""
    return sum(map(int, re.findall(r"done before, skipped: \w+, (\d+) of", stdout)))


def test_mini_from_the_shell_to_a_data_frame(tmp_path, monkeypatch):
    """From another working directory; the results are loaded by the line that the driver prints."""
    monkeypatch.chdir(tmp_path)
    arguments = ["7", "0", "MiniDigits, MiniShapes", "mini", "0"]
    done = run_driver(tmp_path / "out", *arguments)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("load them in "))
    namespace: dict = {}
    exec(line.split(": ", 1)[1], namespace)
    df, args = namespace["df"], namespace["args"]
    assert set(df.ds) == {"MiniDigits", "MiniShapes"} and len(df) >= 6
    assert args.backbone == "mini" and args.multiclass is False
    assert (df.cls_Noforget >= 0.8).all() and (df.full_Noforget >= 0.9).all()
    assert df.cls_forget.mean() < 0.3 and (df.full_forget - df.full_Noforget).mean() > -0.1
    for other in ("MiniLetters", "MiniSymbols"):
        assert df[f"res_{other}"].notna().all()
    again = run_driver(tmp_path / "out", *arguments)
    assert skipped(again.stdout) == len(df)


def test_jpegs_and_a_random_rn50_checkpoint(tmp_path):
    """Caltech101's layout, OpenAI's checkpoint format, a full model saved and loaded again."""
    weights = tmp_path / "RN50.pt"
    save_openai("RN50", weights)
    caltech(tmp_path / "data")
    options = ["--weights", str(weights), "--forget", "minaret", "--save-model"]
    keys = ["TRAINER.FORGETLORA.STEPS", "40", "TRAINER.FORGETLORA.MAX_TRIALS", "2"]
    done = run_driver(tmp_path / "out", "1", "0", "Caltech101", "RN50", "0", *options, *keys)
    assert done.returncode == 0, done.stderr
    assert "not evaluated: StanfordDogs" in done.stdout
    folder = tmp_path / "out/results1/seed_0"
    df, _ = create_results(folder, rn=True)
    assert df.name.tolist() == ["minaret"] and list(df.columns)[-1] == "full_forget"
    adapter = load_adapter(folder / "Caltech101" / "minaret.safetensors")
    assert adapter.left.shape == (512, 5) and adapter.right.shape == (5, 1024)
    changed = ClipSource("RN50", folder / "Caltech101" / "minaret.pt", tmp_path / "cache")
    original = ClipSource("RN50", weights, tmp_path / "cache")
    assert torch.allclose(changed.projection, adapter.apply(original.projection), atol=1e-6)
    assert ARCHITECTURES["RN50"].sha256 != changed.weights_sha256


def test_a_run_killed_by_the_system_resumes_at_its_class(tmp_path, features):
    """SIGKILL between two classes: no clean-up code runs; the second call does only the rest.

    Ascent takes one class after the other; with a tiny step each takes all of its steps.
    """
    slow = ["TRAINER.FORGETASCENT.STEPS", "10000", "TRAINER.FORGETASCENT.LR", "1e-12"]
    arguments = ["1", "0", "ToyAnimals", BACKBONE, "0", "--forget", "all", *slow]
    method = {"FEATURES": str(features), "TRAINER": "ForgetAscent"}
    command, options = driver(tmp_path / "out", *arguments, **method)
    logs = tmp_path / "out/results1/seed_0/logs.json"
    process = subprocess.Popen(command, start_new_session=True, **options)
    deadline = time.monotonic() + 120
    while not logs.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done_before = set(json.loads(logs.read_text())["ToyAnimals"]) - {"settings"}
    assert 1 <= len(done_before) < 6
    resumed = subprocess.run(command, **options)
    assert resumed.returncode == 0, resumed.stderr
    assert skipped(resumed.stdout) == len(done_before)
    whole = run_driver(tmp_path / "whole", *arguments, **method)
    assert whole.returncode == 0
    expected, _ = create_results(tmp_path / "whole/results1/seed_0")
    assert create_results(logs.parent)[0].equals(expected)


def test_two_runs_into_one_folder_at_once(tmp_path, features):
    names = ("ToyAnimals", "ToyTools")
    processes = []
    for name in names:
        arguments = ["1", "0", name, BACKBONE, "0", "--forget", "all", *TOY_KEYS]
        command, options = driver(tmp_path / "out", *arguments, FEATURES=str(features))
        processes.append(subprocess.Popen(command, **options))
    for process in processes:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    df, _ = create_results(tmp_path / "out/results1/seed_0")
    assert df.ds.value_counts().to_dict() == {"ToyAnimals": 6, "ToyTools": 4}
    assert len((tmp_path / "out/results1/seed_0/args.txt").read_text().splitlines()) == 2


def test_one_set_that_fails_does_not_stop_the_others(tmp_path, features):
    """Two data sets and two seeds: every pair of them is run."""
    arguments = ["1", "0,1", "ToyAnimals,ToyTools", BACKBONE, "0", "--forget", "saw", *TOY_KEYS]
    done = run_driver(tmp_path / "out", *arguments, FEATURES=str(features))
    assert done.returncode != 0
    named = f"failed: ToyAnimals, {BACKBONE}, seed 0; ToyAnimals, {BACKBONE}, seed 1;"
    for message in (named, "no class 'saw'"):
        assert message in done.stderr
    for seed in (0, 1):
        df, args = create_results(tmp_path / f"out/results1/seed_{seed}")
        assert df.name.tolist() == ["saw"] and args.seed == seed


REAL_CLIP = REPOSITORY.parent / "shared" / "real_clip"


@pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="needs bundles of real CLIP features")
def test_real_features_have_their_published_accuracies():
    from clip.bundle import load_bundle

    known = {"CaltechNature": 0.9402, "CaltechObjects": 0.9715, "StanfordCars": 0.6276}
    for dataset, accuracy in known.items():
        found = whole_set(load_bundle(REAL_CLIP, "ViT-B/32", dataset))
        assert round(found, 4) == accuracy
