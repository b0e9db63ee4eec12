"""Ray, an engine for more than one process and machine; nobody else knows how it is started.

A local one is started, or that of `RAY_ADDRESS` is joined. All machines of a cluster see the same
files at the same places: this repository, its environment, data, cache and results.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from yacs.config import CfgNode

from engine.cli import one_line
from engine.launch import Part, Run, Say, T, call, tree
from engine.log import logger
from forgetting.errors import ProblemError

REPOSITORY = Path(__file__).resolve().parents[1]
STORE = 2**27  # bytes that a local Ray keeps in memory: what passes between processes is small


class Ended(NamedTuple):
    """The exit status of a run, and what it printed."""

    status: int
    out: str
    err: str


def load(name: str) -> ModuleType:
    """The module `ray`, or one of its own; ProblemError if the package is missing."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when it is imported: nothing is reported
    try:
        return import_module(name)
    except ImportError as error:
        raise ProblemError(
            "the launcher ray needs the package ray[data]: pip install -r requirements-ray.txt"
        ) from error


@contextmanager
def cluster(cores: int | None = None) -> Iterator[ModuleType]:
    """The module `ray`, connected; a Ray that was started here is ended again.

    Args:
        cores: of a Ray that is started here; None: those of the machine.

    Raises:
        ProblemError: the package is missing, or the cluster cannot be reached.
    """
    ray = load("ray")
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS")
    own = {"include_dashboard": False, "object_store_memory": STORE, "num_cpus": cores}
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    handed = {key: value for key, value in os.environ.items() if key.startswith("CLIP_FORGET_")}
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(paths), **handed}},
            **({} if address else own),
        )
    except Exception as error:  # of a network, or of versions that differ
        where = f"the cluster {address}" if address else "this machine"
        raise ProblemError(f"Ray cannot be had on {where} ({reason(error)})") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def share(ray: ModuleType, how: CfgNode) -> tuple[dict[str, float], int]:
    """What a task asks Ray for by the settings, and how many such tasks the cluster takes at once.

    Raises:
        ProblemError: no machine has that much, so that the task would wait for ever.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    asked = {"CPU": how.CPUS}
    if any(machine.get("GPU") for machine in machines):
        asked["GPU"] = how.GPUS
    asked = {kind: count for kind, count in asked.items() if count}
    room = sum(min(int(m.get(kind, 0) / n) for kind, n in asked.items()) for m in machines)
    if not room:
        words = " and ".join(f"{count:g} {kind}" for kind, count in asked.items())
        raise ProblemError(
            f"no machine of Ray has {words} for a run (LAUNCHER.CPUS, LAUNCHER.GPUS)"
        )
    return {"num_cpus": how.CPUS, "num_gpus": asked.get("GPU", 0.0)}, room


def launch_by_ray(command: str, runs: Sequence[Run], how: CfgNode, say: Say) -> list[Run]:
    """`engine.launch.launch` with a task a run. What a run prints is shown when it has ended; one
    whose worker dies is begun again, `how.TRIES` times."""
    failed = []
    with cluster() as ray:
        asked, room = share(ray, how)
        logger.info(f"ray: {len(runs)} runs, {min(room, len(runs))} at once")
        task = ray.remote(max_retries=how.TRIES, **asked)(_captured)
        waiting = {task.remote(os.getcwd(), command, run.argv): run for run in runs}
        while waiting:
            (ready,), _ = ray.wait(list(waiting))
            run = waiting.pop(ready)
            try:
                ended = ray.get(ready)
            except ray.exceptions.RayError as error:
                ended = Ended(1, "", f"error: {run.title}: {reason(error)}\n")
            done = len(runs) - len(waiting)
            say(run, done, done)
            print(ended.out, end="", flush=True)
            print(ended.err, end="", file=sys.stderr, flush=True)
            failed += [run] if ended.status else []
    return failed


def _captured(place: str, command: str, argv: list[str]) -> Ended:
    """A run in a worker, from the folder in which it was asked for."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            go_to(place)
            status = call(command, argv)
        except ProblemError as error:
            status = 2
            print(f"error: {one_line(str(error))}", file=sys.stderr)
    # Of a progress bar the last state is enough.
    return Ended(status, out.getvalue(), re.sub(r"[^\n]*\r(?!\n)", "", err.getvalue()))


def tree_by_ray(
    parts: Sequence[Part], make: Callable[[Part], T], merge: Callable[[T, T], T], how: CfgNode
) -> T:
    """`engine.launch.tree` with a task for every part and every merge.

    Raises:
        ProblemError: what `make` or `merge` refuses; a worker that died too often.
    """
    with cluster() as ray:
        asked, room = share(ray, how)
        logger.info(f"ray: {len(parts)} parts, {min(room, len(parts))} at once")
        makes = ray.remote(max_retries=how.TRIES, **asked)(_from)
        merges = ray.remote(max_retries=how.TRIES, num_cpus=1)(merge)
        place = os.getcwd()
        whole = tree(parts, lambda part: makes.remote(place, make, part), merges.remote)
        try:
            return ray.get(whole)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ProblemError):
                raise error.cause from error
            raise
        except ray.exceptions.RayError as error:
            raise ProblemError(reason(error)) from error


def _from(place: str, make: Callable[[Part], T], part: Part) -> T:
    go_to(place)
    return make(part)


def go_to(place: str) -> None:
    """Enter the folder in which the work was asked for, to which its paths are relative.

    Raises:
        ProblemError: this machine does not have it.
    """
    try:
        os.chdir(place)
    except OSError as error:
        raise ProblemError(
            f"the machine {os.uname().nodename} has no folder {place}: all machines of a cluster "
            "must see the same files (docs/scale.md)"
        ) from error


def reason(error: Exception) -> str:
    """What an error of Ray says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(f"{type(error).__name__}: {lines[0] if lines else ''}")[:300]
