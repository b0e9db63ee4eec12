"""One run under Dassl and under its built-in equivalents gives the same logs and adapters."""

import json
import os
import subprocess
import sys

import pytest
import torch

from forgetting import load_adapter
from tests.conftest import REPOSITORY
from tests.test_engine import needs_dassl


def run_under(engine: str, argv: list[str], out) -> tuple[dict, torch.Tensor]:
    """The logs of a run, without what differs between two runs, and its change."""
    command = [sys.executable, str(REPOSITORY / "train.py"), *argv, "--output-dir", str(out)]
    env = os.environ | {"CLIP_FORGET_ENGINE": engine}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = (out / "ToyAnimals" / "log.txt").read_text()
    assert f"engine: {engine}".lower() in log.lower()
    logs = json.loads((out / "logs.json").read_text())
    solver = logs["ToyAnimals"]["cat"]["solver"]
    assert solver.pop("seconds") > 0 and solver.pop("adapter_sha256")
    return logs, load_adapter(out / solver["adapter"]).delta()


# The control: two runs of one engine agree.
@pytest.mark.parametrize("engine", ["builtin", pytest.param("dassl", marks=needs_dassl)])
def test_both_engines_give_the_same(engine, toy_args, tmp_path):
    argv = [*toy_args, "--forget", "cat"]
    logs, delta = run_under("builtin", argv, tmp_path / "a")
    others, other = run_under(engine, argv, tmp_path / "b")
    assert logs == others and torch.equal(delta, other)
