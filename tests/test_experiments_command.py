"""`python -m experiments` and `python -m benchmarks`: what is listed, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from benchmarks.__main__ import BENCHMARKS
from benchmarks.__main__ import cli as benchmarks
from experiments.__main__ import EXPERIMENTS
from experiments.__main__ import cli as experiments
from tests.conftest import REPOSITORY

ROOMS = {"experiments": (experiments, EXPERIMENTS), "benchmarks": (benchmarks, BENCHMARKS)}
NAMES = [(room, name) for room, (_, names) in ROOMS.items() for name in names]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_without_a_name_all_are_listed(room, argv, capsys):
    cli, names = ROOMS[room]
    assert cli(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: python -m {room} NAME")
    assert [line.split()[0] for line in lines[2:]] == list(names)


@pytest.mark.parametrize(("room", "name"), NAMES)
def test_every_name_is_a_module_whose_help_says_how_it_is_called(room, name, capsys):
    assert f"python -m {room} {name}" in import_module(f"{room}.{name}").__doc__
    with pytest.raises(SystemExit) as left:
        ROOMS[room][0]([name, "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {room} {name} ")


@pytest.mark.parametrize(("room", "name"), NAMES)
def test_an_unknown_option_is_refused(room, name, capsys):
    assert ROOMS[room][0]([name, "--helpp"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize(
    ("wrong", "message"), [("sulver", "unknown name"), ("--features", "stands before the name")]
)
def test_an_unknown_name_is_refused(room, wrong, message, capsys):
    assert ROOMS[room][0]([wrong]) == 2
    assert message in capsys.readouterr().err


def test_the_nearest_name_is_said_and_the_shell_sees_it():
    line = [sys.executable, "-m", "experiments", "study"]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean 'studies'" in done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1


def test_pipeline_needs_a_class(capsys):
    assert benchmarks(["pipeline", "--classes", "0"]) == 2
    assert "--classes: must be a whole number from 1 to" in capsys.readouterr().err
