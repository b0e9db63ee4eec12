"""Runs of train.py: their command lines, and all of them here or by Ray."""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import train
from engine.log import logger
from engine.ray import LauncherSettings, spread
from forgetting.errors import ProblemError

INTERRUPTED = 130  # the exit status after Ctrl-C


@dataclass(frozen=True)
class Run:
    """One run of train.py: `argv`, into `folder`.

    Attributes:
        keys: backbone, trainer, setting, mode and data set; labels: what the logs call its
            requests; part: such as "2/4", of the set's requests.
    """

    argv: list[str]
    folder: Path
    keys: tuple[str, str, str, str, str]
    seed: int
    labels: list[str]
    part: str = ""

    @property
    def title(self) -> str:
        *keys, dataset = self.keys
        part = f"part {self.part}" if self.part else ""
        return ", ".join(filter(None, [dataset, *keys, f"seed {self.seed}", part]))


class Ended(NamedTuple):
    """The exit status of a run, and what it printed."""

    status: int
    out: str = ""
    err: str = ""


def launch(runs: Sequence[Run], how: LauncherSettings) -> list[Run]:
    """Run all, one that fails stops no other; returns those that failed.

    Raises:
        ProblemError: Ray is wanted and cannot be had.
        SystemExit: a run was interrupted.
    """
    started = time.monotonic()
    failed = []
    task = _captured if how.launcher == "ray" else _here
    for number, (run, ended) in enumerate(spread(task, runs, how), 1):
        if isinstance(ended, ProblemError):
            ended = Ended(1, "", f"error: {run.title}: {ended}\n")
        if ended.status == INTERRUPTED:
            raise SystemExit(INTERRUPTED)
        print(ended.out, end="", flush=True)
        print(ended.err, end="", file=sys.stderr, flush=True)
        failed += [run] if ended.status else []
        left = round((time.monotonic() - started) / number * (len(runs) - number))
        logger.info(
            f"== {run.title}: {'failed' if ended.status else 'done'} "
            f"({number} of {len(runs)}, {left // 60}:{left % 60:02} left)"
        )
    return failed


def _here(run: Run) -> Ended:
    logger.info(f"== {run.title}")
    return Ended(_status(run))


def _status(run: Run) -> int:
    """The exit status of a run; an error of ours is shown whole, and stops no other run."""
    try:
        return train.cli(run.argv)
    except Exception:
        traceback.print_exc()
        return 1


def _captured(run: Run) -> Ended:
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = _status(run)
    # Of a progress bar the last state is enough.
    return Ended(status, out.getvalue(), re.sub(r"[^\n]*\r(?!\n)", "", err.getvalue()))
