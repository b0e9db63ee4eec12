"""logs.json: the results of all runs into one folder, merged under a lock, never overwritten.

    {dataset: {"settings": {...},
               label: {"final_results": {dataset: {class: {"cls_acc_test", "no_cls_acc",
                                                           "acc_train"}},
                                         other_dataset: {"all": {"all_ds": accuracy}}},
                       "zero_shot": {same shape, before forgetting},
                       "solver": {...}}}}

A label is a class name, or several joined with "|" that were forgotten at once. Accuracies are
fractions at full precision. Logs of the paper's public code have no "zero_shot" and no "solver".
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import atomic_path, escape, lock, write_json_atomic

LOGS = "logs.json"
ARGS = "args.txt"
SETTINGS = "settings"
SEPARATOR = "|"
LONGEST_NAME = 150  # of an escaped label; file systems end at 255 bytes

Logs = dict[str, dict[str, Any]]


class TornLogs(UserError):
    """A logs.json that is no logs: cut off, or written by something else."""


def join_label(classes: list[str]) -> str:
    """The label of classes that are forgotten together."""
    return SEPARATOR.join(classes)


def label_file(label: str) -> str:
    """A label as a file name without suffix; a long one keeps its beginning and a checksum."""
    name = escape(label)
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(label.encode()).hexdigest()[:12]}"


def read_logs(folder: str | Path) -> Logs:
    """The logs of a results folder; empty if it has none.

    Raises:
        TornLogs: no JSON object of objects. The file is left as it is.
    """
    path = Path(folder) / LOGS
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    problem = None
    try:
        logs = json.loads(text)
        if not isinstance(logs, dict) or not all(isinstance(v, dict) for v in logs.values()):
            problem = "not an object of data sets"
    except json.JSONDecodeError as error:
        problem = str(error)
    if problem is None:
        return logs
    raise TornLogs(f"{path} is torn ({problem}); mend it, or move it away to start new logs")


def _set_aside(path: Path) -> Path:
    """Rename torn logs, so that no later run can overwrite them."""
    aside = path.with_name(
        f"logs.torn-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1000000}.json"
    )
    path.rename(aside)
    return aside


def check_folder(folder: str | Path, dataset: str, settings: dict[str, Any]) -> Logs:
    """The folder's logs, if results made with `settings` may join them.

    One folder holds one backbone, one trainer, one set of weights: `create_results` reads it as a
    whole. Compared are `backbone`, `trainer` of every data set there and all of `settings` for
    `dataset`.

    Raises:
        UserError: other results are there; the message names what differs and another ATTEMPT.
    """
    try:
        logs = read_logs(folder)
    except TornLogs as error:
        aside = _set_aside(Path(folder) / LOGS)
        raise UserError(
            f"{error} (it was kept as {aside.name}; run again to start new ones)"
        ) from error
    for name, entry in logs.items():
        there = entry.get(SETTINGS, {})
        keys = settings if name == dataset else ("backbone", "trainer")
        for key in keys:
            if key in there and there[key] != settings[key]:
                raise UserError(
                    f"{Path(folder) / LOGS} holds results of {name} with {key} {there[key]!r}, "
                    f"this run has {settings[key]!r}; choose another ATTEMPT (or output folder)"
                )
    return logs


def is_done(logs: Logs, dataset: str, label: str, solver_settings: dict[str, Any]) -> bool:
    """Whether a label has results with the same solver settings.

    Raises:
        UserError: it has results with others, which only `--overwrite` may replace.
    """
    entry = logs.get(dataset, {}).get(label)
    if entry is None:
        return False
    there = entry.get("solver", {}).get(SETTINGS)
    if there == solver_settings:
        return True
    changed = [
        f"{key} {(there or {}).get(key)!r} -> {solver_settings.get(key)!r}"
        for key in sorted({*(there or {}), *solver_settings})
        if (there or {}).get(key) != solver_settings.get(key)
    ]
    raise UserError(
        f"{label!r} of {dataset} has results with other settings ({', '.join(changed)}); "
        "use --overwrite to replace them, or another ATTEMPT"
    )


def merge_entry(
    folder: str | Path, dataset: str, settings: dict[str, Any], label: str, entry: dict[str, Any]
) -> None:
    """Add or replace one label's results; everything else in the folder stays.

    The check against other settings is repeated under the lock: two runs may have started at once.
    """
    path = Path(folder) / LOGS
    with lock(path):
        logs = check_folder(folder, dataset, settings)
        logs.setdefault(dataset, {})[SETTINGS] = settings
        logs[dataset][label] = entry
        write_json_atomic(logs, path)


def merge_args(folder: str | Path, line: str) -> None:
    """Keep the command line of every run in args.txt, one argparse Namespace a line."""
    path = Path(folder) / ARGS
    with lock(path):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if line in lines:
            lines.remove(line)  # the last line is the latest run
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join([*lines, line]) + "\n", encoding="utf-8")


def read_args(path: str | Path) -> list[argparse.Namespace]:
    """The command lines in an args.txt, oldest first, read as text: nothing in it is executed.

    Raises:
        UserError: a line that is not the text of an argparse Namespace.
    """
    path = Path(path)
    if not path.is_file():
        return []
    namespaces = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        try:
            call = ast.parse(line.strip(), mode="eval").body
            if not isinstance(call, ast.Call):
                raise ValueError("not a call")
            values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{path}: not the text of an argparse Namespace ({error})") from error
        namespaces.append(argparse.Namespace(**values))
    return namespaces
