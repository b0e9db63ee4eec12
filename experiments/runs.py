"""Runs of train.py: planned and checked before the first starts, and run here or by Ray."""

import re
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import train
from engine.config import OPTIONS
from engine.files import escape
from engine.log import logger, quiet
from engine.ray import LauncherSettings, spread
from evaluation.results import join_label
from forgetting.errors import ProblemError
from trainers.inputs import make_plan

KEYS = ["backbone", "method", "mode", "data set"]  # that a row of a table is known by
LEVELS = ("backbones", "methods")  # of folders
MODES: dict[str, list[str]] = {"alone": [], "at once": ["--multiclass"]}
DEFAULTS: dict[str, Any] = {  # of a sweep
    "datasets": [],
    "backbones": ["mini"],
    "methods": {},  # a name, and its trainer and config keys
    "trainers": [],  # methods without keys; ForgetLoRA if there are no others
    "settings": {},  # a name, and further keys; each is of every method
    "seeds": [0],
    "modes": ["alone"],  # or "at once": all classes of a set
    "classes": [],  # of every set, or all; without them the lists of forget_cls.py
}
VARIED = ("dataset", "seed", "backbone", "trainer", "output_dir", "multiclass")
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


def methods_of(varied: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The methods of a sweep: name -> `trainer` and config keys."""
    methods = varied["methods"] | {name: {"trainer": name} for name in varied["trainers"]}
    return {
        f"{method} {setting}".strip(): keys | more
        for method, keys in (methods or {"ForgetLoRA": {}}).items()
        for setting, more in (varied["settings"] or {"": {}}).items()
    }


def runs_of(
    varied: Mapping[str, Any],
    root: Path,
    options: Sequence[str],
    levels: Sequence[str] = LEVELS,
    parts: int = 1,
) -> list[Run]:
    """All runs of a sweep; ProblemError for one that would be refused, before anything is written.

    `varied`: over `DEFAULTS`. `options`: of train.py; its `--multiclass` and `--forget` replace the
    modes and classes. `levels`: what has folders of its own below `root`. `parts`: of the requests
    of a set whose classes are forgotten alone, a run each.
    """
    varied = DEFAULTS | dict(varied)
    if "--multiclass" in options:
        varied["modes"] = ["at once"]
        options = [word for word in options if word != "--multiclass"]
    if any(word.partition("=")[0] == "--forget" for word in options):
        varied["classes"] = []
    if not varied["datasets"]:
        raise ProblemError("a sweep needs a data set, such as --datasets MiniDigits")
    methods = methods_of(varied)
    own = [OPTIONS[name] for name in VARIED]
    own += [OPTIONS["forget"]] if varied["classes"] else []
    own += ["FORGET.PART"] if parts > 1 else []
    for name, keys in [("", options), *methods.items()]:
        for key in own:
            if key in keys:
                where = f" (method {name})" if name else ""
                raise ProblemError(f"{key} is varied by the sweep and cannot be set too{where}")
    runs = []
    axes = (varied["backbones"], methods, varied["modes"], varied["datasets"], varied["seeds"])
    for backbone, method, mode, dataset, seed in product(*axes):
        folders = {"backbones": backbone.replace("/", "-"), "methods": escape(method)}
        folder = Path(root, *(folders[level] for level in levels), f"seed_{seed}")
        argv = ["--dataset", dataset, "--seed", str(seed), "--backbone", backbone]
        argv += ["--output-dir", str(folder), *MODES[mode], *options]
        argv += [f"--forget={name}" for name in varied["classes"]]
        for key, value in methods[method].items():
            text = str(tuple(value) if isinstance(value, list) else value)
            argv += ["--trainer" if key == "trainer" else key, text]
        is_split = parts > 1 and mode == "alone"
        for part in [f"{n}/{parts}" for n in range(1, parts + 1)] if is_split else [""]:
            line = [*argv, "FORGET.PART", part] if part else argv
            with quiet():
                cfg = train.setup_cfg(train.parse(line))
                labels = [join_label(classes) for classes in make_plan(cfg).requests]
            keys = backbone, method, mode, cfg.DATASET.NAME
            runs.append(Run(line, folder, keys, seed, labels, part))
    return runs


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
        except Exception:  # a bug of any kind, in a method of your own say: the others still run
            traceback.print_exc()
            status = 1
    # Of a progress bar the last state is enough.
    return status, out.getvalue(), re.sub(r"[^\n]*\r(?!\n)", "", err.getvalue())
