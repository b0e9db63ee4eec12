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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UserError
from engine.files import atomic_path, escape, inside, lock, sha256_file, write_json_atomic
from evaluation.schema import check_logs

if TYPE_CHECKING:
    from forgetting.adapter import Adapter

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
        TornLogs: no JSON object of objects.
        UserError: results of another shape, see `evaluation.schema`. The file is left as it is.
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
        logs = json.loads(text, parse_constant=lambda _: None)  # NaN: nothing was measured
        if not isinstance(logs, dict) or not all(isinstance(v, dict) for v in logs.values()):
            problem = "not an object of data sets"
    except json.JSONDecodeError as error:
        problem = str(error)
    if problem is None:
        check_logs(logs, path)
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


def is_done(
    folder: str | Path, logs: Logs, dataset: str, label: str, solver_settings: dict[str, Any]
) -> bool:
    """Whether a label has results with the same solver settings and the adapter that they are of.

    An adapter that is gone, or is not the one that the logs name by its SHA-256 (a run was killed
    between the two, or somebody changed it), means that the label is not done.

    Raises:
        UserError: it has results with other settings, which only `--overwrite` may replace.
    """
    entry = logs.get(dataset, {}).get(label)
    if entry is None:
        return False
    solver = entry.get("solver", {})
    there = solver.get(SETTINGS)
    if there == solver_settings:
        path = inside(folder, solver.get("adapter", ""))
        return path.is_file() and sha256_file(path) == solver.get("adapter_sha256")
    changed = [
        f"{key} {(there or {}).get(key)!r} -> {solver_settings.get(key)!r}"
        for key in sorted({*(there or {}), *solver_settings})
        if (there or {}).get(key) != solver_settings.get(key)
    ]
    raise UserError(
        f"{label!r} of {dataset} has results with other settings ({', '.join(changed)}); "
        "use --overwrite to replace them, or another ATTEMPT"
    )


@dataclass(frozen=True)
class Finished:
    """One request that is done and not yet on disk.

    Attributes:
        entry: of the logs; adapter: its change; data: that as the bytes of its file; place: where
            they go, below the results folder.
    """

    label: str
    entry: dict[str, Any]
    adapter: Adapter
    data: bytes
    place: str


def merge_results(
    folder: str | Path,
    dataset: str,
    settings: dict[str, Any],
    finished: Sequence[Finished],
    overwrite: bool = False,
) -> None:
    """Write adapters, and add their entries to the logs; everything else in the folder stays.

    All of it happens under the lock of the logs, and an entry names its adapter by SHA-256: the two
    cannot contradict each other, whatever else writes there and whenever the run is killed. Two
    runs may have started at once, so that what is there is checked again: a label that another run
    has finished meanwhile with the same settings keeps its results.

    Raises:
        UserError: results with other settings are there now; those that fit are written first.
    """
    from forgetting.adapter import write_bytes  # torch: who only reads results waits for none

    folder, path = Path(folder), Path(folder) / LOGS
    refused: UserError | None = None
    with lock(path):
        logs = check_folder(folder, dataset, settings)
        entries = logs.setdefault(dataset, {})
        entries[SETTINGS] = settings
        for one in finished:
            solver = one.entry["solver"]
            try:
                if not overwrite and is_done(folder, logs, dataset, one.label, solver[SETTINGS]):
                    continue
            except UserError as error:
                refused = error
                continue
            _forget_model(folder, entries.get(one.label, {}).get("solver", {}))
            # Not waited for: after a power cut the digest tells that the file is not the adapter.
            write_bytes(one.data, folder / one.place, durable=False)
            digest = hashlib.sha256(one.data).hexdigest()
            named = {"adapter": one.place, "adapter_sha256": digest}
            entries[one.label] = one.entry | {"solver": solver | named}
        write_json_atomic(logs, path)
    if refused is not None:
        raise refused


def _forget_model(folder: Path, replaced: dict[str, Any]) -> None:
    """Remove the full model that was saved with results that are replaced now."""
    if "model" in replaced and (path := inside(folder, replaced["model"])).is_file():
        path.unlink()
        print(f"  removed {path}: it belonged to the adapter that was replaced")


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
