"""One run under Dassl and one without: the same logs to the last digit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from forgetting import load_adapter
from tests.conftest import REPOSITORY

HAS_DASSL = importlib.util.find_spec("dassl") is not None


def run_under(engine: str, argv: list[str], out) -> dict:
    """The logs of a run, without the seconds that it took."""
    command = [sys.executable, str(REPOSITORY / "train.py"), *argv, "--output-dir", str(out)]
    env = os.environ | {"CLIP_FORGET_ENGINE": engine}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = (out / "ToyAnimals" / "log.txt").read_text()
    assert f"engine: {engine}".lower() in log.lower()
    logs = json.loads((out / "logs.json").read_text())
    assert logs["ToyAnimals"]["cat"]["solver"].pop("seconds") > 0
    return logs


def test_builtin_runs_agree_with_themselves(toy_args, tmp_path):
    """What the comparison below rests on: nothing but the seconds differs between two runs."""
    argv = [*toy_args, "--forget", "cat"]
    first = run_under("builtin", argv, tmp_path / "a")
    assert first == run_under("builtin", argv, tmp_path / "b")


@pytest.mark.skipif(not HAS_DASSL, reason="needs Dassl: make test-dassl DASSL=path")
def test_both_engines_write_the_same_logs(toy_args, tmp_path):
    argv = [*toy_args, "--forget", "cat"]
    assert run_under("dassl", argv, tmp_path / "a") == run_under("builtin", argv, tmp_path / "b")
    factors = [load_adapter(tmp_path / f / "ToyAnimals/cat.safetensors") for f in "ab"]
    assert torch.equal(factors[0].left, factors[1].left)
