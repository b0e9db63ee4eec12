"""Runs of train.py: planned and checked before the first starts, and run here or by Ray."""

import re
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path

import train
from engine.log import logger, quiet
from engine.ray import LauncherSettings, spread
from evaluation.results import join_label
from forgetting.errors import ProblemError
from trainers.inputs import make_plan

MODES: dict[str, list[str]] = {"alone": [], "at once": ["--multiclass"]}
KEYS = ["backbone", "trainer", "setting", "mode", "data set"]  # that a row of a table is known by
INTERRUPTED = 130  # the exit status after Ctrl-C


@dataclass(frozen=True)
class Run:
    """One run of train.py."""

    argv: list[str]
    folder: Path  # of its results
    keys: tuple[str, ...]  # values of `KEYS`
    seed: int
    labels: list[str]  # what the logs call its requests
    part: str = ""  # such as "2/4", of the set's requests

    @property
    def title(self) -> str:
        *keys, dataset = self.keys
        part = f"part {self.part}" if self.part else ""
        return ", ".join(filter(None, [dataset, *keys, f"seed {self.seed}", part]))


def plan_run(
    keys: Sequence[str], folder: Path, options: Sequence[str], seed: int = 0, part: str = ""
) -> Run:
    """A run into `folder` with further `options`; ProblemError if train.py would refuse it."""
    backbone, trainer, _, mode, dataset = keys
    argv = ["--dataset", dataset, "--seed", str(seed), "--backbone", backbone]
    argv += ["--trainer", trainer, "--output-dir", str(folder), *MODES[mode], *options]
    argv += ["FORGET.PART", part] if part else []
    with quiet():
        cfg = train.setup_cfg(train.parse(argv))
        labels = [join_label(classes) for classes in make_plan(cfg).requests]
    return Run(argv, folder, (*keys[:-1], cfg.DATASET.NAME), seed, labels, part)


def launch(runs: Sequence[Run], how: LauncherSettings) -> list[Run]:
    """Run all; returns those that failed, which stop no other. SystemExit if one is interrupted."""
    started, failed = time.monotonic(), []
    task = partial(_run, captured=how.launcher == "ray")
    for number, (run, ended) in enumerate(spread(task, runs, how), 1):
        if isinstance(ended, ProblemError):
            ended = 1, "", f"error: {run.title}: {ended}\n"
        status, out, err = ended
        if status == INTERRUPTED:
            raise SystemExit(INTERRUPTED)
        print(out, end="", flush=True)
        print(err, end="", file=sys.stderr, flush=True)
        failed += [run] if status else []
        left = round((time.monotonic() - started) / number * (len(runs) - number))
        logger.info(
            f"== {run.title}: {'failed' if status else 'done'} "
            f"({number} of {len(runs)}, {left // 60}:{left % 60:02} left)"
        )
    return failed


def refuse_failed(failed: Sequence[Run]) -> None:
    """ProblemError that names the runs that failed, if there are some."""
    if failed:
        titles = "; ".join(run.title for run in failed)
        raise ProblemError(f"failed: {titles}; see the messages above")


def _run(run: Run, captured: bool) -> tuple[int, str, str]:
    """The exit status of a run, and if `captured` what it printed; a bug stops no other run."""
    out, err = StringIO(), StringIO()
    with ExitStack() as stack:
        if captured:
            stack.enter_context(redirect_stdout(out))
            stack.enter_context(redirect_stderr(err))
        else:
            logger.info(f"== {run.title}")
        try:
            status = train.cli(run.argv)
        except Exception:
            traceback.print_exc()
            status = 1
    # Of a progress bar the last state is enough.
    return status, out.getvalue(), re.sub(r"[^\n]*\r(?!\n)", "", err.getvalue())
