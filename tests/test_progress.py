"""Messages, progress bars and the log of a run: on a terminal, in a file, and under --quiet."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys

import pytest
import tqdm
import tqdm.std

import train
from engine.cli import Parser, run
from engine.log import INTERVAL, logger, once, progress, run_log
from evaluation.audit.__main__ import main as audit


class Stderr(io.StringIO):
    """A stderr that is a terminal, or a file."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch):
    """Lets time pass for progress bars."""
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_a_terminal_shows_the_time_left_and_a_file_gets_few_states(monkeypatch, wait):
    monkeypatch.setattr(sys, "stderr", Stderr(terminal=True))
    for number in progress(range(4), "sets"):
        wait(60)
        logger.info(f"set {number}")
    shown = sys.stderr.getvalue()
    assert "sets" in shown and "01:00<03:00" in shown and "\n" not in shown
    assert shown.endswith("\r"), "the bar goes away"
    monkeypatch.setattr(sys, "stderr", Stderr(terminal=False))
    bar = progress(range(100), "short")
    for _ in bar:
        bar.set_postfix_str("note")
        wait(0.9 * INTERVAL / 100)
    assert sys.stderr.getvalue() == ""
    for _ in progress(range(10**4), "an hour"):
        wait(0.36)
    assert 20 < sys.stderr.getvalue().count("an hour") < 150


def test_quiet_hides_messages_and_loops_and_leaves_the_rest(monkeypatch, wait, tmp_path, capsys):
    stderr = Stderr(terminal=True)

    def main(argv: list[str]) -> None:
        Parser().parse_args(argv)
        monkeypatch.setattr(sys, "stderr", stderr)
        with run_log() as keep:
            logger.debug("for the log")
            keep(tmp_path / str(len(argv)))
            for _ in progress(range(2), "loop"):
                once(logging.INFO, "a message")
                wait(60)
            logger.warning("a warning")
            print("a table")

    texts = {}
    for argv in (["--quiet"], []):  # the second is not quiet: it ends with its command
        assert run(main, argv) == 0
        texts[len(argv)] = capsys.readouterr().out, "loop" in stderr.getvalue()
    assert texts[1] == ("a warning\na table\n", False)
    assert texts[0] == ("a message\na warning\na table\n", True)
    logs = [(tmp_path / name / "log.txt").read_text() for name in "01"]
    for log in logs:  # each line has its time in front
        lines = [line.split(" ", 2)[2] for line in log.splitlines()]
        assert lines == ["for the log", "a message", "a warning"]


def test_a_quiet_run_and_audit_print_nothing_but_the_table(toy_args, tmp_path, capsys):
    assert train.cli([*toy_args, "--forget", "owl", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    log = (tmp_path / "out/ToyAnimals/log.txt").read_text()
    assert "ToyAnimals / owl" in log and "quiet=" not in (tmp_path / "out/args.txt").read_text()
    argv = [str(tmp_path / "out"), "--without=relearning", f"--features={tmp_path / 'features'}"]
    assert run(audit, [*argv, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out.split()[:2] == ["data", "set"] and err == ""


def test_a_missing_package_is_one_line_before_work(toy_args, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = refused([*toy_args, "--forget", "cat", "--log", "tensorboard"])
    assert "pip install 'tensorboard'" in line and not (tmp_path / "out").exists()
    assert "'tensorboard'" in refused([*toy_args, "--forget", "cat", "--log", "tensorbord"])


def test_tensorboard_gets_the_numbers_of_the_logs(toy_args, capsys):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train.main([*toy_args, "--forget", "cat", "--forget", "owl", "--log", "tensorboard"])
    place = folder / "ToyAnimals" / "numbers"
    assert capsys.readouterr().out.splitlines()[-1] == f"numbers for tensorboard: {place}"
    board = EventAccumulator(str(place))
    board.Reload()
    logs = json.loads((folder / "logs.json").read_text())["ToyAnimals"]
    for step, name in enumerate(("cat", "owl")):
        expected = {"solver/objective": logs[name]["solver"]["objective"]}
        for when, side in (("before", "zero_shot"), ("after", "final_results")):
            entry = logs[name][side]
            expected[f"forgotten/{when}"] = entry["ToyAnimals"][name]["cls_acc_test"]
            expected[f"rest/{when}"] = entry["ToyAnimals"][name]["no_cls_acc"]
            expected[f"ToyTools/{when}"] = entry["ToyTools"]["all"]["all_ds"]
        for tag, value in expected.items():
            (found,) = [event.value for event in board.Scalars(tag) if event.step == step]
            assert found == pytest.approx(value, abs=1e-6), tag
        curve = board.Scalars(f"objective/{name}")
        assert min(event.value for event in curve) >= expected["solver/objective"] - 1e-5
        assert curve[0].value > curve[-1].value and len(curve) > 50


def test_a_killed_process_stops_no_other():
    """A forked process that is killed while it writes holds no lock of ours."""
    ready, write = os.pipe()
    pid = os.fork()
    if not pid:
        tqdm.tqdm.get_lock().acquire()
        os.write(write, b".")
        signal.pause()
    os.read(ready, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert tqdm.tqdm.get_lock().acquire(False)
    tqdm.tqdm.get_lock().release()
