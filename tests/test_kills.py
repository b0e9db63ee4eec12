"""Killed at any moment, and raced: the next run ends where an uninterrupted one does.

Children are forked, so that a kill costs no start of Python; what they would print goes nowhere.
"""

import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train
from clip.features import build_bundle
from clip.source import ClipSource
from engine.files import sha256_file
from evaluation.audit.inputs import Places
from evaluation.audit.record import read_audits
from evaluation.audit.run import audit_folder
from evaluation.results import read_logs
from forgetting.adapter import load_adapter
from forgetting.deploy.card import Base, model_card
from forgetting.io import remove_stale
from tests.conftest import toy_line
from tests.results_fixtures import ended, fork

FEW = 10
ROUNDS = [FEW, pytest.param(100, marks=pytest.mark.slow)]


def kill_often(call: Callable[[], object], rounds: int, check: Callable[[], None]) -> None:
    """Kill `call` at random moments, each time run it again to its end, and check what it left."""
    whole, draw, killed = math.inf, random.Random(rounds), 0
    for _ in range(3):  # the first is slower than those to come
        pid, started = fork(call), time.monotonic()
        assert ended(pid) == 0
        whole = min(whole, time.monotonic() - started)
    for _ in range(rounds):
        pid = fork(call)
        time.sleep(draw.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        killed += ended(pid) == -signal.SIGKILL
        assert ended(fork(call)) == 0
        check()
    assert killed > rounds / 10  # on a busy machine most come late


def no_leftovers(folder: Path, killed: bool = False) -> None:
    """No temporary file; after a kill none but such as a later run removes, once they are old."""
    if killed:
        for path in folder.rglob(".tmp-*"):
            os.utime(path, (0, 0))
        remove_stale(folder)
    assert not [path for path in folder.rglob(".tmp-*")]


def repeatable(value: object) -> object:
    """Logs and audits without times, and without the SHA-256 of adapters, which hold them."""
    if isinstance(value, dict):
        times = ("seconds", "adapter_sha256")
        return {key: repeatable(x) for key, x in value.items() if key not in times}
    return value


def agree(folder: Path) -> None:
    """Every entry of the logs, and every card, is of the adapter that is there."""
    logs = read_logs(folder) if (folder / "logs.json").exists() else {}
    for dataset, entries in logs.items():
        for label in entries.keys() - {"settings"}:
            solver = entries[label]["solver"]
            path = folder / solver["adapter"]
            assert sha256_file(path) == solver["adapter_sha256"], (dataset, label)
            assert load_adapter(path).solver["settings"] == solver["settings"]
            card = model_card(load_adapter(path), "adapter", Base())
            assert Path(f"{path}.md").read_text("utf-8") == card


@pytest.fixture
def command(features, tmp_path) -> list[str]:
    return toy_line(tmp_path, "--trainer", "ForgetUCE", "--forget", "all")


@pytest.mark.parametrize("rounds", ROUNDS)
def test_a_run_that_overwrites(command, tmp_path, rounds):
    train.main(command)
    expected, turn = repeatable(read_logs(tmp_path / "out")), [0]

    def check() -> None:
        agree(tmp_path / "out")
        no_leftovers(tmp_path / "out", killed=True)
        assert repeatable(read_logs(tmp_path / "out")) == expected
        turn[0] += 1

    kill_often(lambda: train.cli([*command, "--overwrite"]), rounds, check)
    assert turn[0] == rounds


@pytest.mark.parametrize("rounds", ROUNDS)
def test_an_audit(command, tmp_path, rounds):
    train.main(command)
    folder = tmp_path / "out"
    places = Places(features=str(tmp_path / "features"))

    def call() -> None:
        for path in [folder / "audit.json", *folder.glob("*/*.audit.json")]:
            path.unlink(missing_ok=True)
        audit_folder(folder, without=["relearning"], places=places)

    call()
    expected = repeatable(read_audits(folder))

    def check() -> None:
        no_leftovers(folder, killed=True)
        assert repeatable(read_audits(folder)) == expected

    kill_often(call, rounds, check)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_an_encoding(tmp_path, rounds):
    """The data set is drawn, the model read and its images encoded; kills fall into all of it."""

    def call(cache: Path = tmp_path / "cache"):
        return build_bundle("MiniShapes", ClipSource("mini", cache=cache), tmp_path / "data")

    expected = call(tmp_path / "other")

    def check() -> None:
        found = call()
        assert torch.equal(found.image_features, expected.image_features)
        assert torch.equal(found.class_hidden, expected.class_hidden)
        no_leftovers(tmp_path / "cache", killed=True)
        for path in (tmp_path / "cache").rglob("*.safetensors"):
            path.unlink()  # encoded anew in the next round

    kill_often(lambda: call() and None, rounds, check)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_four_runs_in_one_folder_do_no_harm_to_each_other(command, tmp_path, rounds):
    """Each takes the classes in another order; of runs with other settings the later ones stop."""
    train.main([*command, "--output-dir", str(tmp_path / "alone")])
    expected = repeatable(read_logs(tmp_path / "alone"))
    names = [name for name in expected["ToyAnimals"] if name != "settings"]
    start = command[: command.index("--forget")]
    for turn in range(rounds):
        out = tmp_path / f"race{turn}"
        runs = [
            [*start, "--output-dir", str(out), *(x for name in order for x in ("--forget", name))]
            for order in (names, names[::-1], names[3:] + names[:3], names[1:])
        ]
        children = [fork(lambda argv=argv: train.cli(argv)) for argv in runs]
        assert list(map(ended, children)) == [0] * 4
        agree(out)
        no_leftovers(out)
        assert repeatable(read_logs(out)) == expected
    assert train.cli([*runs[0], "--beta", "0.3"]) == 2
