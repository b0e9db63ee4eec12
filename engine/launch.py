"""A list of runs: one after the other in this process, or spread by Ray over cores and machines.

A run is a command line that can be begun again: what is done is skipped, and files are merged under
locks. So it does not matter where a run takes place, in which order, or how often it is begun.
"""

from __future__ import annotations

import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TypeVar

from yacs.config import CfgNode

from engine.config import settings
from engine.log import logger

INTERRUPTED = 130  # the exit status after Ctrl-C
Part, T = TypeVar("Part"), TypeVar("T")


@dataclass(frozen=True)
class Run:
    """A command line, what to call it, and where its results go."""

    title: str
    argv: list[str]
    folder: str


Say = Callable[[Run, int, int], None]  # a run, its number from 1, and how many are done


def launch(command: str, runs: Sequence[Run], how: CfgNode) -> list[Run]:
    """Run all, and show which one is at hand; returns those that failed.

    Args:
        command: where a function stands that takes a command line, says itself what it refuses,
            and returns an exit status: such as "train:cli".
        how: the section `LAUNCHER` of the settings.

    Raises:
        ProblemError: Ray is asked for and cannot be had, before anything is run.
        SystemExit: a run was interrupted.
    """
    started = time.monotonic()

    def say(run: Run, number: int, done: int) -> None:
        progress = f" (run {number} of {len(runs)}" if len(runs) > 1 else ""
        if done and done < len(runs):
            left = round((time.monotonic() - started) / done * (len(runs) - done))
            progress += f", {left // 60}:{left % 60:02} left"
        logger.info(f"== {run.title}{progress and progress + ')'}")

    if how.NAME == "ray":
        from engine.cluster import launch_by_ray

        return launch_by_ray(command, runs, how, say)
    failed = []
    for number, run in enumerate(runs, 1):
        say(run, number, number - 1)
        status = call(command, run.argv)
        if status == INTERRUPTED:
            raise SystemExit(status)
        failed += [run] if status else []
    return failed


def call(command: str, argv: list[str]) -> int:
    """The exit status of one run. A mistake of ours is shown whole, and stops no other run."""
    try:
        return resolve_name(command)(argv)
    except Exception:  # whatever it is, the runs that are left are not to blame
        traceback.print_exc()
        return 1


def add_launcher(parser: ArgumentParser) -> None:
    """Give a command line the option that says where its work takes place, and KEY VALUE pairs for
    the rest of `LAUNCHER`."""
    parser.add_argument("--launcher", metavar="NAME", help="local or ray")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")


def launcher(args: Namespace) -> CfgNode:
    """The section `LAUNCHER` of a command line's settings.

    Raises:
        ProblemError: a key or value that does not fit, or Ray is asked for and missing.
    """
    named = ["LAUNCHER.NAME", args.launcher] if args.launcher else []
    how = settings(opts=[*args.opts, *named]).LAUNCHER
    if how.NAME == "ray":
        from engine.cluster import load

        load("ray")
    return how


def tree(parts: Sequence[Part], make: Callable[[Part], T], merge: Callable[[T, T], T]) -> T:
    """What `make` makes of each part, merged two by two. The order is that of the parts, whoever
    makes them, so that rounding is the same everywhere."""
    if len(parts) == 1:
        return make(parts[0])
    half = len(parts) // 2
    return merge(tree(parts[:half], make, merge), tree(parts[half:], make, merge))
