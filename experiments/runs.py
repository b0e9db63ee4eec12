"""Runs of train.py: their command lines, and all of them here or by Ray."""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import train
from engine.files import escape
from engine.log import logger
from engine.ray import LauncherSettings, spread
from forgetting.errors import ProblemError

PART = "FORGET.PART"  # which runs of the parts of a set differ in
INTERRUPTED = 130  # the exit status after Ctrl-C


@dataclass(frozen=True)
class Run:
    """A command line of train.py, what to call it, and where its results go."""

    title: str
    argv: list[str]
    folder: str


class Ended(NamedTuple):
    """The exit status of a run, and what it printed."""

    status: int
    out: str = ""
    err: str = ""


def folder_of(root: str | Path, backbone: str, trainer: str, setting: str = "") -> Path:
    """Where results lie that differ from others of `root` in these; "" for what they share."""
    names = (backbone.replace("/", "-"), trainer, setting and escape(setting))
    return Path(root, *filter(None, names))


def runs_of(
    folder: str | Path,
    names: Sequence[str],
    seeds: Sequence[str],
    argv: Sequence[str],
    parts: int = 1,
    about: Sequence[str] = (),
) -> list[Run]:
    """The runs of one method and backbone: a data set, a seed and a part of the requests each.

    Args:
        folder: of the results, below which each seed has its own.
        argv: what all have in common.
        parts: of a set's requests.
        about: words for the titles beside data set and seed.
    """
    runs = []
    for seed in seeds:
        for name in names:
            for part in range(1, parts + 1):
                out = f"{folder}/seed_{seed}"
                own = ["--dataset", name, "--seed", seed, "--output-dir", out]
                own += [PART, f"{part}/{parts}"] if parts > 1 else []
                title = [name, *about, f"seed {seed}"]
                title += [f"part {part} of {parts}"] if parts > 1 else []
                runs.append(Run(", ".join(title), [*argv, *own], out))
    return runs


def refuse_keys(given: Iterable[str], own: Iterable[str], where: str = "") -> None:
    """ProblemError for a key of KEY VALUE pairs that each run is given a value of its own for."""
    own = set(own)
    for key in given:
        if key in own:
            raise ProblemError(f"{key} is set for each run and cannot be set beside that{where}")


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
