"""Messages, progress bars and the log of a run: on a terminal, in a file, and under --quiet."""

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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch):
    """Lets time pass for progress bars."""
    now = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: sum(now))
    return now.append


def test_a_terminal_shows_the_time_left_and_a_file_gets_few_states(monkeypatch, wait):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for number in progress(range(4), "sets"):
        wait(60)
        logger.info(f"set {number}")
    shown = sys.stderr.getvalue()
    assert "sets" in shown and "01:00<03:00" in shown and "\n" not in shown
    assert shown.endswith("\r"), "the bar goes away"
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    bar = progress(range(100), "short")
    for _ in bar:
        bar.set_postfix_str("note")
        wait(0.9 * INTERVAL / 100)
    assert sys.stderr.getvalue() == ""
    for _ in progress(range(1000), "an hour"):
        wait(3.6)
    assert 20 < sys.stderr.getvalue().count("an hour") < 150


@pytest.mark.parametrize("argv", [["--quiet"], []])  # in this order: it ends with its command
def test_quiet_hides_messages_and_loops_and_leaves_the_rest(
    argv, monkeypatch, wait, tmp_path, capsys
):
    stderr = Terminal()

    def main(argv: list[str]) -> None:
        Parser().parse_args(argv)
        monkeypatch.setattr(sys, "stderr", stderr)
        with run_log() as keep:
            logger.debug("for the log")
            keep(tmp_path)
            for _ in progress(range(2), "loop"):
                once(logging.INFO, "a message")
                wait(60)
            logger.warning("a warning")
            print("a table")

    assert run(main, argv) == 0
    assert capsys.readouterr().out == ("" if argv else "a message\n") + "a warning\na table\n"
    assert ("loop" in stderr.getvalue()) == (not argv)
    lines = (tmp_path / "log.txt").read_text().splitlines()  # each has its time in front
    assert [x.split(" ", 2)[2] for x in lines] == ["for the log", "a message", "a warning"]


def test_a_missing_package_is_one_line_before_work(toy_args, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for name, word in (("tensorboard", "pip install"), ("tensorbord", "'tensorboard'")):
        assert word in refused([*toy_args, "--forget", "cat", "--log", name])
    assert not (tmp_path / "out").exists()


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
        before, after = (logs[name][side] for side in ("zero_shot", "final_results"))
        expected = {
            "solver/objective": logs[name]["solver"]["objective"],
            "forgotten/before": before["ToyAnimals"][name]["cls_acc_test"],
            "rest/after": after["ToyAnimals"][name]["no_cls_acc"],
            "ToyTools/after": after["ToyTools"]["all"]["all_ds"],
        }
        for tag, value in expected.items():
            (found,) = [event.value for event in board.Scalars(tag) if event.step == step]
            assert found == pytest.approx(value, abs=1e-6), tag
        curve = board.Scalars(f"objective/{name}")
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
