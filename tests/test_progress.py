"""What a long loop and a run say: on a terminal, in a log, under --quiet, and to TensorBoard."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tqdm.std

import train
from engine.cli import Parser, run
from engine.log import EVERY, Progress, logged, note, say, warn
from engine.sink import Sink
from evaluation.audit.__main__ import main as audit


class Screen(io.StringIO):
    """A stderr that is a terminal, or a file."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    @property
    def lines(self) -> list[str]:
        """All that a terminal showed in one place, one after the other."""
        return [line.strip() for line in self.getvalue().split("\r") if line.strip()]


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Screen]:
    """Puts a screen in the place of stderr; called in a test, for pytest has its own until then."""

    def show(terminal: bool = True) -> Screen:
        found = Screen(terminal)
        monkeypatch.setattr(sys, "stderr", found)
        return found

    return show


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch):
    """Lets time pass, as loops see it."""
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_a_terminal_shows_one_line_with_the_time_left(show, wait) -> None:
    screen = show()
    for number in Progress(range(4), "sets"):
        wait(60)
        say(f"set {number}")
    assert screen.lines == [f"sets {n} of 4, {4 - n:02}:00 left" for n in (1, 2, 3, 4)]
    assert "\n" not in screen.getvalue() and screen.getvalue().endswith("\r"), "it goes away"


def test_what_was_done_before_says_nothing_of_the_pace(show, wait) -> None:
    screen = show()
    with Progress(what="images", total=2000, done=1000, rate="a second") as bar:
        bar.skip(500)
        wait(10)
        bar.update(100)
    assert screen.lines[-1] == "images 1,600 of 2,000, 10 a second, 00:40 left"


def test_a_part_of_what_is_in_hand_counts(show, wait) -> None:
    """Half of 64 descents after 100 s, of 128: 300 s to go; a second trial makes it longer."""
    screen = show()
    with Progress(what="Cars", total=128) as bar:
        wait(100)
        bar.at("trial 1 of at most 100", 32)
        assert screen.lines[-1] == "Cars 0 of 128, trial 1 of at most 100, 05:00 left"
        wait(100)
        bar.at("trial 2 of at most 100", 32)
        assert screen.lines[-1] == "Cars 0 of 128, trial 2 of at most 100, 10:00 left"
        wait(1)
        bar.update(64)
        assert screen.lines[-1].startswith("Cars 64 of 128, trial 2")


def test_a_log_is_not_flooded(show, wait) -> None:
    screen = show(terminal=False)
    for _ in Progress(range(100), "short"):
        wait(0.9 * EVERY / 100)
    assert screen.getvalue() == ""
    for _ in Progress(range(10**5), "ten hours"):
        wait(0.36)
    lines = screen.getvalue().splitlines()
    assert 20 < len(lines) < 150 and "\r" not in screen.getvalue()
    assert lines[0].startswith("ten hours 84 of 100,000, ") and lines[0].endswith(" left")


def test_quiet_hides_messages_and_loops_and_leaves_the_rest(
    show, wait, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = show()

    def main(argv: list[str]) -> None:
        Parser().parse_args(argv)
        with logged() as keep:
            keep(tmp_path / str(len(argv)))
            note("for the log")
            for _ in Progress(range(2), "loop"):
                say("a message")
                wait(60)
            warn("a warning")
            print("a table")

    texts = {}
    for argv in (["--quiet"], []):  # the second is not quiet: it ends with its command
        assert run(main, argv) == 0
        texts[len(argv)] = capsys.readouterr().out, bool(screen.getvalue())
    assert texts[1] == ("a warning\na table\n", False)
    assert texts[0] == ("a message\na message\na warning\na table\n", True)
    logs = [(tmp_path / name / "log.txt").read_text() for name in "01"]
    assert logs[0] == logs[1] == f"for the log\n{texts[0][0]}"


def test_a_quiet_run_and_audit_print_nothing_but_the_table(toy_args, tmp_path, capsys) -> None:
    assert train.cli([*toy_args, "--forget", "owl", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    log = (tmp_path / "out/ToyAnimals/log.txt").read_text()
    assert "ToyAnimals / owl" in log and "quiet=" not in (tmp_path / "out/args.txt").read_text()
    assert run(audit, [str(tmp_path / "out"), "--without", "relearning", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out.split()[:2] == ["data", "set"] and "to look at it" not in out and err == ""
    assert train.cli([*toy_args, "--forget", "nothing", "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_descent_says_which_trial_of_how_many(toy_args, monkeypatch) -> None:
    monkeypatch.setattr(Progress, "update", lambda bar, n=1: texts.append(str(bar)))
    texts: list[str] = []
    keys = ["FORGET.LAMB_FORGET", "0.001", "--forget", "cat", "--forget", "owl"]
    train.main([*toy_args, *keys])
    assert any("ToyAnimals 0 of 2, 2 at once, trial 2 of at most 2, " in text for text in texts)


# Numbers for others


def test_a_missing_package_is_one_line_before_work(
    toy_args, tmp_path, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = refused([*toy_args, "--forget", "cat", "--log", "tensorboard"])
    assert line == "error: --log tensorboard needs the package tensorboard: pip install tensorboard"
    assert not (tmp_path / "out").exists()
    assert "'tensorboard'" in refused([*toy_args, "--forget", "cat", "--log", "tensorbord"])


def test_tensorboard_gets_the_numbers_of_the_logs(toy_args, capsys) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train.main([*toy_args, "--forget", "cat", "--forget", "owl", "--log", "tensorboard"])
    place = folder / "ToyAnimals" / "numbers"
    assert capsys.readouterr().out.splitlines()[-1] == f"numbers for tensorboard: {place}"
    board = EventAccumulator(str(place))
    board.Reload()
    logs = json.loads((folder / "logs.json").read_text())["ToyAnimals"]
    for step, name in enumerate(("cat", "owl")):
        after = logs[name]["final_results"]
        own, other = after["ToyAnimals"][name], after["ToyTools"]["all"]["all_ds"]
        solver = logs[name]["solver"]
        for tag, value in (
            ("forgotten/after", own["cls_acc_test"]),
            ("rest/after", own["no_cls_acc"]),
            ("ToyTools/after", other),
            ("solver/objective", solver["objective"]),
        ):
            (found,) = [event.value for event in board.Scalars(tag) if event.step == step]
            assert found == pytest.approx(value, abs=1e-6), tag
        curve = board.Scalars(f"objective/{name}")
        assert min(event.value for event in curve) >= solver["objective"] - 1e-5
        assert curve[0].value > curve[-1].value and len(curve) > 50


def test_a_sink_of_no_kind_takes_nothing(tmp_path: Path) -> None:
    with Sink("", tmp_path / "numbers") as sink:
        sink.row("cat", {"a": 1.0}, 0)
    assert not list(tmp_path.iterdir())


def test_a_killed_process_stops_no_other():
    """A forked process that is killed while it writes holds no lock of ours."""
    ready, write = os.pipe()
    pid = os.fork()
    if not pid:
        Progress.get_lock().acquire()
        os.write(write, b".")
        signal.pause()
    os.read(ready, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert Progress.get_lock().acquire(False)
    Progress.get_lock().release()
