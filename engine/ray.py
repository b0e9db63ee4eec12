"""Many tasks: one after the other in this process, or spread by Ray over cores and machines.

A task is a function of one item that can be begun again: what it finished before is skipped. All
machines of a cluster see the same files at the same places. Only this file knows Ray.
"""

import os
import platform
import secrets
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.cli import add_setting
from engine.log import logger
from forgetting.errors import ProblemError, reason
from forgetting.settings import setting

REPOSITORY = Path(__file__).resolve().parents[1]
STORE = 2**27  # bytes of memory for what passes between processes, which is small


@dataclass(frozen=True)
class LauncherSettings:
    """Where many tasks run; options of `experiments sweep` and `clip.features`."""

    launcher: str = setting(
        "local",
        "ray: spread by Ray over this machine, or over the cluster of RAY_ADDRESS",
        choices=("local", "ray"),
    )
    cpus: float = setting(1.0, "cores that a task requests from Ray", 0, 1024)
    gpus: float = setting(1.0, "GPUs of a task where there are any; 0.25: four share one", 0, 64)
    tries: int = setting(3, "how often a task is begun again whose worker died", 0, 100)


def add_launcher(parser: ArgumentParser) -> None:
    """Add an option for every field of `LauncherSettings`."""
    for spec in fields(LauncherSettings):
        add_setting(parser, f"--{spec.name}", LauncherSettings, spec.name)


def launcher(args: Namespace) -> LauncherSettings:
    """The settings of a command line; ProblemError if Ray is wanted and not installed."""
    if args.launcher == "ray":
        _import_ray()
    return LauncherSettings(args.launcher, args.cpus, args.gpus, args.tries)


def spread(
    task: Callable[[Any], Any], items: Sequence[Any], how: LauncherSettings
) -> Iterator[tuple[Any, Any]]:
    """Yield each item with the result of `task(item)` as soon as it is there. A ProblemError that
    the task raises is its result; one is raised if no machine of Ray has what a task requests.
    `task` is what Ray can pickle, such as a function of a module or a `partial` of one."""
    if how.launcher == "local":
        for item in items:
            try:
                yield item, task(item)
            except ProblemError as error:
                yield item, error
        return
    with cluster() as ray:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = how.gpus if any(machine.get("GPU") for machine in machines) else 0.0
        if not any(m.get("CPU", 0) >= how.cpus and m.get("GPU", 0) >= gpus for m in machines):
            words = f"{how.cpus:g} CPU and {gpus:g} GPU"
            raise ProblemError(f"no machine of Ray has {words} for a task (--cpus, --gpus)")
        logger.info(f"ray: {len(items)} tasks")
        options = {"max_retries": how.tries, "num_cpus": how.cpus, "num_gpus": gpus}
        remote = ray.remote(**options)(_in_folder)
        running = {remote.remote(os.getcwd(), task, item): item for item in items}
        while running:
            (ended,), _ = ray.wait(list(running))
            item = running.pop(ended)
            try:
                result = ray.get(ended)
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, ProblemError):
                    raise
                result = error.cause
            except ray.exceptions.RayError as error:  # the worker died too often
                result = ProblemError(f"Ray: {reason(error)}")
            yield item, result


@contextmanager
def cluster(cores: int | None = None) -> Iterator[ModuleType]:
    """The module `ray`, connected; a Ray that was started here, with `cores` of this machine or
    all, is ended again. ProblemError if the package is missing or the cluster cannot be reached."""
    ray = _import_ray()
    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": STORE, "num_cpus": cores}
    passed = {key: value for key, value in os.environ.items() if key.startswith("CLIP_FORGET_")}
    paths = filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
    passed["PYTHONPATH"] = os.pathsep.join(paths)
    try:
        ray.init(address=address, runtime_env={"env_vars": passed}, **options)
    except Exception as error:  # of a network, or of versions that differ
        raise ProblemError(f"Ray is not available ({address}): {reason(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _import_ray() -> ModuleType:
    # Read at import. Ray listens on all interfaces: a token that is in no file keeps others out.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if not {"RAY_ADDRESS", "RAY_AUTH_MODE"} & os.environ.keys():
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    try:
        return import_module("ray")
    except ImportError as error:
        raise ProblemError("ray is missing: pip install -r requirements-ray.txt") from error


def _in_folder(folder: str, task: Callable[[Any], Any], item: Any) -> Any:
    """Run a task on a worker in the folder to which its paths are relative."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise ProblemError(f"{platform.node()} has no folder {folder}") from error
    return task(item)
