"""logs.json: the results of all runs into one folder, merged under a lock, never overwritten.

    {dataset: {"settings": {...},
               label: {"final_results": {dataset: {class: {"cls_acc_test", "no_cls_acc",
                                                           "acc_train"}},
                                         other_dataset: {"all": {"all_ds": accuracy}}},
                       "zero_shot": {same shape, before forgetting},
                       "solver": {...}}}}

A label is a class name, or several with "|" between that were forgotten at once (see `join_label`).
Accuracies are fractions at full precision. Logs of the paper's public code have no "zero_shot" and
no "solver".
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.files import (
    Growing,
    NoJSON,
    atomic_path,
    escape,
    inside,
    lock,
    read_json,
    refuse_foreign,
    sha256_file,
    sweep,
)
from engine.log import logger
from engine.schema import SETTINGS, Args, check, check_logs
from forgetting.errors import ProblemError

if TYPE_CHECKING:
    from forgetting.adapter import Adapter

LOGS = "logs.json"
SHARED = {"backbone", "trainer", "precision"}  # settings that all data sets of a folder share
MODEL = {"backbone", "weights", "template"}  # of a set: what its accuracies before are of
ARGS = "args.txt"
AUDIT = "audit.json"
CSV = "audit.csv"  # its numbers as a table
REPORT = "report.html"
FILES = (LOGS, ARGS, AUDIT, CSV, REPORT)  # of a results folder, beside folders of data sets
SEPARATOR = "|"
PLACES = {  # of a run's files
    "features": "folder of feature bundles",
    "root": "folder of the image sets",
    "images": "images of one's own, a folder or a CSV file",
    "cache": "folder of what was encoded",
    "weights": "a checkpoint of the backbone",
}
LONGEST_NAME = 150  # of an escaped name; file systems end at 255 bytes

Logs = dict[str, dict[str, Any]]


class TornLogs(ProblemError):
    """A logs.json that is no logs: cut off, or written by something else."""


def join_label(classes: Sequence[str]) -> str:
    """The label of classes that are forgotten together: their names with "|" between, where a "|"
    or a backslash of a name has a backslash before it."""
    return SEPARATOR.join(re.sub(r"[\\|]", r"\\\g<0>", name) for name in classes)


def split_label(label: str) -> list[str]:
    """The classes that `join_label` joined."""
    parts = re.findall(r"(?:^|\|)((?:\\[\\|]|[^|])*)", label)
    return [re.sub(r"\\([\\|])", r"\1", part) for part in parts]


def place(*names: str) -> str:
    """Where results lie below their folder, by data set, or by data set and label.

    Names are escaped, so that none leads elsewhere; a long one keeps its beginning and a checksum.
    """

    def short(name: str) -> str:
        escaped = escape(name)
        if len(escaped) <= LONGEST_NAME:
            return escaped
        checksum = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:12]
        return f"{escaped[:LONGEST_NAME]}-{checksum}"

    return "/".join(map(short, names))


def no_results(folder: Path) -> ProblemError:
    """What to say of a folder without results: where some are, or how to make some."""
    if not folder.is_dir():
        return ProblemError(f"no results in {folder}: no such folder; run forget_clip.sh")
    below = sorted(path for depth in range(1, 5) for path in folder.glob(f"{'*/' * depth}{LOGS}"))
    places = " or ".join(str(path.parent) for path in below[:3])
    hint = f"did you mean {places}?" if below else "run forget_clip.sh"
    return ProblemError(f"no results in {folder}: {LOGS} is missing; {hint}")


def read_logs(folder: str | Path) -> Logs:
    """The logs of a results folder; empty if it has none.

    Raises:
        TornLogs: no JSON object of objects.
        ProblemError: results of another shape, see `engine.schema`. The file is left as it is.
    """
    path = Path(folder) / LOGS
    problem = "it is not an object of data sets"
    if not path.exists():
        return {}
    try:
        logs = read_json(path)
        if isinstance(logs, dict) and all(isinstance(entries, dict) for entries in logs.values()):
            check_logs(logs, path)
            return logs
    except NoJSON as error:
        problem = str(error)
    raise TornLogs(f"{path} is torn ({problem}); mend it, or move it away to start new logs")


def same_kind(
    folders: Sequence[str | Path], logs: Sequence[Logs], model_alone: bool = False
) -> None:
    """ProblemError unless folders are different, and hold results that differ by chance alone; or,
    with `model_alone`, unless they are of one model, whatever forgot: then what was measured before
    forgetting is the same for all."""
    places = [] if model_alone else [Path(folder).resolve() for folder in folders]
    for place, given in zip(places, folders, strict=False):
        if places.count(place) > 1:
            raise ProblemError(f"the results folder {given} is given twice")
    found: dict[tuple[str, str], tuple[str | Path, object]] = {}
    for folder, sets in zip(folders, logs, strict=True):
        settings = [  # whose, what, value: the template is a data set's, a solver's a label's
            ("" if key != "template" and not model_alone else dataset, key, value)
            for dataset, entries in sets.items()
            for key, value in entries.get(SETTINGS, {}).items()
            if key != "seed" and (key in MODEL or not model_alone)
        ]
        if not model_alone:
            settings += [
                (f"{dataset} / {label}", key, value)
                for dataset, entries in sets.items()
                for label, entry in entries.items()
                for key, value in entry.get("solver", {}).get("settings", {}).items()
            ]
        for whose, key, value in settings:
            where, other = found.setdefault((whose, key), (folder, value))
            if other != value:
                kind = "model" if model_alone else "kind"
                hint = "" if model_alone else f"; give each a name: NAME={folder}"
                raise ProblemError(
                    f"{where} and {folder} are not runs of one {kind}: {key} is {other!r:.80} and "
                    f"{value!r:.80}{hint}"
                )


def check_folder(folder: str | Path, dataset: str, settings: dict[str, Any]) -> Logs:
    """The folder's logs, if results made with `settings` may join them.

    One folder holds one backbone, one trainer, one set of weights: `create_results` reads it as a
    whole. Compared are those of `settings` that are SHARED with every data set there, and all of
    them for `dataset`. Torn logs are set aside, so that no later run can overwrite them.

    Raises:
        ProblemError: other results are there; the message names what differs and another ATTEMPT. Or
            the data set is called as one of the folder's files is.
    """
    if place(dataset).removesuffix(".lock") in FILES:
        raise ProblemError(f"a results folder has a file {dataset}; call the data set otherwise")
    return _fitting(_whole_logs(Path(folder) / LOGS), Path(folder) / LOGS, dataset, settings)


def _whole_logs(path: Path) -> Logs:
    """The logs of a file; torn ones are set aside."""
    try:
        return read_logs(path.parent)
    except TornLogs as error:
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1000000}"
        aside = path.rename(path.with_name(f"logs.torn-{stamp}.json"))
        raise ProblemError(
            f"{error} (it was kept as {aside.name}; run again to start new ones)"
        ) from error


@lru_cache(maxsize=4)
def _growing(path: Path) -> Growing:
    return Growing(path, partial(_whole_logs, path))


def _fitting(logs: Logs, path: Path, dataset: str, settings: dict[str, Any]) -> Logs:
    """The logs, if results made with `settings` may join them; see `check_folder`."""
    for name, entry in logs.items():
        there = {"precision": "fp32"} | entry.get(SETTINGS, {})
        for key in settings if name == dataset else settings.keys() & SHARED:
            if key in there and there[key] != settings[key]:
                raise ProblemError(
                    f"{path} holds results of {name} with {key} {there[key]!r}, this run has "
                    f"{settings[key]!r}; choose another ATTEMPT (or output folder)"
                )
    return logs


def is_done(
    folder: str | Path, logs: Logs, dataset: str, label: str, solver_settings: dict[str, Any]
) -> bool:
    """Whether a label has results with the same solver settings and the adapter that they are of.

    An adapter that is gone, or is not the one that the logs name by its SHA-256 (a run was killed
    between the two, or somebody changed it), means that the label is not done.

    Raises:
        ProblemError: it has results with other settings, which only `--overwrite` may replace.
    """
    entry = logs.get(dataset, {}).get(label)
    if entry is None:
        return False
    solver = entry.get("solver", {})
    # The label of a class "a|b" was once that of the classes "a" and "b" at once.
    there = {"classes": list(entry["final_results"][dataset]), **solver.get(SETTINGS, {})}
    asked = {"classes": split_label(label), **solver_settings}
    changed = [
        f"{key} {there.get(key)!r} -> {asked.get(key)!r}"
        for key in sorted({*there, *asked})
        if there.get(key) != asked.get(key)
    ]
    if changed:
        raise ProblemError(
            f"{label!r} of {dataset} has results with other settings ({', '.join(changed)}); "
            "use --overwrite to replace them, or another ATTEMPT"
        )
    path = inside(folder, solver.get("adapter", ""))
    return path.is_file() and sha256_file(path) == solver.get("adapter_sha256")


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
        ProblemError: results with other settings are there now; those that fit are written first.
    """
    # Not above: torch, and who only reads results waits for none.
    from forgetting.adapter import FORMAT
    from forgetting.io import write_bytes

    folder, path = Path(folder), Path(folder).absolute() / LOGS
    refused: ProblemError | None = None
    with lock(path):
        file = _growing(path)
        logs = _fitting(file.load(), folder / LOGS, dataset, settings)
        entries = logs.setdefault(dataset, {})
        entries[SETTINGS] = settings
        for one in finished:
            solver = one.entry["solver"]
            try:
                if not overwrite and is_done(folder, logs, dataset, one.label, solver[SETTINGS]):
                    continue
                refuse_foreign(folder / one.place, FORMAT.rpartition("/")[0])
            except ProblemError as error:
                refused = error
                continue
            replaced = entries.get(one.label, {}).get("solver", {})
            if "model" in replaced and (model := inside(folder, replaced["model"])).is_file():
                model.unlink()
                model.with_suffix(".json").unlink(missing_ok=True)  # its config
                logger.info(f"  removed {model}: it belonged to the adapter that was replaced")
            sweep((folder / one.place).parent)
            # Not waited for: after a power cut the digest tells that the file is not the adapter.
            write_bytes(one.data, folder / one.place, durable=False)
            digest = hashlib.sha256(one.data).hexdigest()
            named = {"adapter": one.place, "adapter_sha256": digest}
            entries[one.label] = one.entry | {"solver": solver | named}
        file.save()
    if refused is not None:
        raise refused


def merge_args(folder: str | Path, line: str) -> None:
    """Keep the command line of every run in args.txt, one argparse Namespace a line."""
    path = Path(folder) / ARGS
    with lock(path):
        # The last line is the latest run.
        lines = [*(other for other in _lines(path) if other != line), line]
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_args(path: str | Path) -> list[argparse.Namespace]:
    """The command lines in an args.txt, oldest first, read as text: nothing in it is executed.

    Raises:
        ProblemError: a line that is not the text of an argparse Namespace.
    """
    namespaces = []
    for line in _lines(Path(path)):
        try:
            call = ast.parse(line, mode="eval").body
            if not isinstance(call, ast.Call):
                raise ValueError("not a call")
            values = {str(part.arg): ast.literal_eval(part.value) for part in call.keywords}
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ProblemError(
                f"{path}: not the text of an argparse Namespace ({error})"
            ) from error
        check(Args, values, path)
        namespaces.append(argparse.Namespace(**values))
    return namespaces


def run_places(folder: str | Path, dataset: str) -> dict[str, str] | None:
    """Where the latest run of a data set into a results folder found its files, by the keys of
    `PLACES`, "" for nowhere; None if args.txt tells of no such run."""
    runs = read_args(Path(folder) / ARGS)
    for run in reversed(runs):
        if getattr(run, "dataset", None) == dataset:
            return {key: getattr(run, key, None) or "" for key in PLACES}
    return None


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]
