"""Every command line: 0 for help, 2 and one line for a mistake, the nearest option named."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cli import Parser, add_setting, run
from engine.config import FeatureSettings
from engine.ray import LauncherSettings
from forgetting.errors import ProblemError
from tests.conftest import REPOSITORY

COMMANDS = (
    *("train", "utils", "clip.features", "clip.train_mini", "datasets.check"),
    *("evaluation.audit", "evaluation.report"),
)


def status_of(command: str, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    monkeypatch.delitem(sys.modules, command, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    return ended.value.code or 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_no_error_and_an_unknown_option_is_refused_with_the_nearest(
    command, monkeypatch, capsys
):
    assert status_of(command, monkeypatch, "--help") == 0
    assert "usage: " in capsys.readouterr().out
    # Those that need arguments are given some, so that the option is what is wrong.
    assert status_of(command, monkeypatch, "a", "b", "--hepl", "x") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown option '") and "did you mean '--help" in error
    assert error.count("\n") == 1


def test_the_status_is_what_main_returns_or_why_it_does_not(capsys):
    def refuses(argv):
        raise ProblemError("no such thing")

    def stopped(argv):
        raise KeyboardInterrupt

    def missing(argv):
        Path("/nowhere/file").read_text()

    assert [run(main) for main in (lambda argv: 1, lambda argv: "text", refuses)] == [1, 0, 2]
    assert [run(main) for main in (stopped, missing)] == [130, 2]
    error = capsys.readouterr().err
    assert "error: no such thing\n" in error and "error: /nowhere/file: No such file" in error
    with pytest.raises(ZeroDivisionError):  # a bug is no refusal
        run(lambda argv: 1 / 0)


def test_a_prefix_is_no_option_and_an_argument_too_many_is_named():
    parser = Parser(prog="x")
    parser.add_argument("--weights")
    for argv, words in ((["--weig", "a"], "did you mean '--weights'"), (["b"], "arguments: b")):
        with pytest.raises(ProblemError, match=words):
            parser.parse_args(argv)


def shell(command: str, *code: str) -> subprocess.CompletedProcess:
    """Run a command of the shell, where "$0" is Python and "$1" a program."""
    words = ["sh", "-c", command, sys.executable, *code]
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


def test_a_reader_that_has_seen_enough_and_a_closed_stdout_are_no_traceback():
    start = "import sys; from engine.cli import run\n"
    many = start + "sys.exit(run(lambda argv: [print(i) for i in range(10**5)]))"
    done = shell('"$0" -c "$1" | head -n 1', many)
    assert (done.stdout, done.stderr) == ("0\n", "")
    for code in ("print('a'); logger.info('b')", "raise ProblemError('refused')"):
        text = f"""{start}
from engine.log import logger, progress
from forgetting.errors import ProblemError
def main(argv):
    for _ in progress(range(2), "loop"):
        {code}
sys.exit(run(main))
"""
        for closed in (">&-", "2>&-", ">&- 2>&-"):
            done = shell(f'"$0" -c "$1" {closed}', text)
            assert done.returncode == (2 if "raise" in code else 0), done.stderr
            assert "Traceback" not in done.stdout + done.stderr


def test_an_option_for_a_setting_has_its_range_and_knows_home():
    parser = Parser(prog="x")
    add_setting(parser, "--cache", FeatureSettings, "cache")
    add_setting(parser, "--cpus", LauncherSettings, "cpus")
    args = parser.parse_args(["--cache", "~/x"])
    assert args.cache == str(Path.home() / "x") and args.cpus == 1.0
    for wrong in ("-1", "many", "nan"):
        with pytest.raises(ProblemError, match="--cpus must be a number from 0"):
            parser.parse_args([f"--cpus={wrong}"])
