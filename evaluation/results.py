"""Results on disk: one adapter per request, and the logs.json that is compiled from the adapters.

    FOLDER/DATASET/LABEL.safetensors    adapter; its metadata holds the settings and the log entry
    FOLDER/DATASET/LABEL.safetensors.md its model card, compiled from it like logs.json
    FOLDER/logs.json                    {dataset: {"settings": {...},
        label: {"final_results": {dataset: {class: {"cls_acc_test", "no_cls_acc", "acc_train"}},
                                  other_dataset: {"all": {"all_ds": accuracy}}},
                "zero_shot": {same shape, before forgetting},
                "solver": {...}}}}
    FOLDER/args.txt                     command lines of the runs, the latest last

A label is a class name, or several with "|" between that were forgotten at once (`join_label`).
Accuracies are fractions at full precision. Logs of the paper's public code have no "zero_shot" and
no "solver"; their reader knows "settings" by its key "kwargs".
"""

import argparse
import ast
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from engine.files import FRACTION, OBJECT, Kind, check, escape, read_json, read_text
from forgetting.errors import ProblemError, shown

SETTINGS = "settings"  # the key of logs.json beside the labels of a data set
LOGS = "logs.json"
ARGS = "args.txt"
AUDIT = "audit.json"
CSV = "audit.csv"  # its numbers as a table
REPORT = "report.html"
SUFFIX = ".safetensors"
SHARED = {"backbone", "trainer", "precision"}  # settings that all data sets of a folder share
MODEL = {"backbone", "weights", "template"}  # what accuracies before forgetting depend on
PLACES = ("features", "root", "images")  # where a run finds its images
ELSEWHERE = "another --output-dir (ATTEMPT of forget_clip.sh)"
SEPARATOR = "|"
LONGEST_NAME = 150  # of an escaped name; file systems end at 255 bytes
INTERVAL = 3.0  # seconds between two versions of logs.json, at least
PATIENCE = 20  # and at least so many times as long as it takes to write one

Logs = dict[str, dict[str, Any]]


def join_label(classes: Sequence[str]) -> str:
    """The label of classes that are forgotten together: their names with "|" between, where a "|"
    or a backslash of a name has a backslash before it."""
    return SEPARATOR.join(re.sub(r"[\\|]", r"\\\g<0>", name) for name in classes)


def split_label(label: str) -> list[str]:
    """The classes that `join_label` joined."""
    parts = re.findall(r"(?:^|\|)((?:\\[\\|]|[^|])*)", label)
    return [re.sub(r"\\([\\|])", r"\1", part) for part in parts]


def place(*names: str) -> str:
    """The path below a results folder of a data set, or of a data set and label.

    Names are escaped, so that none leads elsewhere. A long one keeps its beginning and a checksum.
    """
    short = []
    for name in names:
        checksum = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:12]
        escaped = escape(name)
        is_short = len(escaped) <= LONGEST_NAME
        short.append(escaped if is_short else f"{escaped[:LONGEST_NAME]}-{checksum}")
    return "/".join(short)


class Record(NamedTuple):
    """What an adapter of a run says of itself."""

    dataset: str
    label: str
    indices: list[int]  # of the classes in their data set, by which logs are sorted
    settings: dict[str, Any]  # of the run: model, trainer, seed
    entry: dict[str, Any]  # of the logs


class Results:
    """A results folder that runs write to, several at once if need be. Raises ProblemError if its
    logs.json is no regular file, or is there without an adapter of a run.

    Each run writes adapters of its own and compiles logs.json from all that are there, so that no
    run changes what another one wrote.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.logs_path = Path(folder), Path(folder) / LOGS
        self._due = 0.0
        if self.logs_path.exists() and not (self.logs_path.is_file() and self.records()):
            where = f"move it away, or choose {ELSEWHERE}"
            raise ProblemError(f"{self.logs_path} was not made from adapters; {where}")

    def path(self, dataset: str, label: str) -> Path:
        """Where the adapter of a label is."""
        return self.folder / (place(dataset, label) + SUFFIX)

    def record(self, path: Path) -> Record | None:
        """The record of an adapter in this folder; None of a file that no run wrote there."""
        try:
            data = path.read_bytes() if path.is_file() else b""
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            names = ("dataset", "classes", "settings", "record")
            dataset, classes, settings, record = (json.loads(metadata[name]) for name in names)
            label = join_label(classes)
            if self.path(dataset, label) != path:
                return None
            file = {"adapter": place(dataset, label) + SUFFIX}
            file["adapter_sha256"] = hashlib.sha256(data).hexdigest()
            entry = {key: record[key] for key in ("final_results", "zero_shot")}
            entry["solver"] = record["solver"] | file
            return Record(dataset, label, record["indices"], settings, entry)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def records(self) -> list[Record]:
        """Of all adapters, in the order of logs.json."""
        records = filter(None, map(self.record, self.folder.glob(f"*/[!.]*{SUFFIX}")))
        return sorted(records, key=lambda r: (r.dataset, len(r.indices) > 1, r.indices, r.label))

    def check(self, dataset: str, settings: Mapping[str, Any]) -> None:
        """Refuse a run whose results cannot stand beside those that are there.

        One folder holds one backbone and one trainer: `create_results` reads it as a whole.
        Compared are those of `settings` that are `SHARED`, and all of them for the same data set.
        """
        for record in self.records():
            for key in settings if record.dataset == dataset else settings.keys() & SHARED:
                if key in record.settings and record.settings[key] != settings[key]:
                    raise ProblemError(
                        f"{self.folder} holds results with {key} {shown(record.settings[key])}, "
                        f"this run has {shown(settings[key])}; choose {ELSEWHERE}"
                    )

    def is_done(self, dataset: str, label: str, settings: Mapping[str, Any]) -> bool:
        """Whether the adapter of a label is there. Raises ProblemError if it was made with other
        settings of its method."""
        path = self.path(dataset, label)
        if not path.exists() or not path.stat().st_size:  # a power cut leaves an empty file
            return False
        if (record := self.record(path)) is None:
            raise ProblemError(f"{path} was not written by a run; move it, or use --overwrite")
        before = record.entry["solver"].get("settings", {})
        changed = [
            f"{key} was {shown(before.get(key))}, is now {shown(settings.get(key))}"
            for key in sorted({*before, *settings})
            if before.get(key) != settings.get(key)
        ]
        if changed:
            raise ProblemError(
                f"{label!r} of {dataset} is done with other settings: {', '.join(changed)}; use "
                f"--overwrite to replace its results, or {ELSEWHERE} to keep both"
            )
        return True

    def add(
        self, data: bytes, dataset: str, label: str, settings: Mapping[str, Any] | None
    ) -> None:
        """Write an adapter, and logs.json if it is time. `settings`: of its method, which an
        adapter that is there must share; None: it need not."""
        from forgetting.io import write_bytes  # who only reads results does not wait for torch

        if settings is not None:
            self.is_done(dataset, label, settings)
        path = self.path(dataset, label)
        Path(f"{path}.md").unlink(missing_ok=True)  # of an adapter that is replaced
        write_bytes(data, path)
        if time.monotonic() >= self._due:
            self.compile()

    def compile(self) -> None:
        """Write logs.json from all adapters, again if one came meanwhile, and missing cards."""
        from forgetting.deploy.card import write_card
        from forgetting.io import write_bytes

        started, written = time.monotonic(), []
        while (records := self.records()) != written:
            logs: Logs = {}
            for record in records:
                settings = record.settings | {"kwargs": {}}
                logs.setdefault(record.dataset, {SETTINGS: settings})[record.label] = record.entry
            data = f"{json.dumps(logs, ensure_ascii=False)}\n".encode(errors="backslashreplace")
            if self.logs_path.is_file() and self.logs_path.read_bytes() == data:
                break
            write_bytes(data, self.logs_path)
            written = records
        ended = time.monotonic()
        self._due = ended + max(INTERVAL, PATIENCE * (ended - started))
        for path in (self.path(record.dataset, record.label) for record in records):
            if not os.path.lexists(f"{path}.md"):
                with suppress(ProblemError):  # a damaged adapter has no card
                    write_card(path)


def add_args(folder: str | Path, line: str) -> None:
    """Keep the command line of a run in args.txt, one argparse Namespace per line."""
    path = Path(folder) / ARGS
    if _lines(path)[-1:] != [line]:
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{line}\n")


def no_results(folder: Path) -> ProblemError:
    """What to say of a folder without results: where some are, or how to make some."""
    below = sorted(path for depth in range(1, 5) for path in folder.glob(f"{'*/' * depth}{LOGS}"))
    places = " or ".join(str(path.parent) for path in below[:3])
    hint = f"did you mean {places}?" if below else "run forget_clip.sh"
    return ProblemError(f"no results in {folder}: {LOGS} is missing; {hint}")


def read_logs(folder: str | Path, name: str = LOGS) -> Logs:
    """The logs of a results folder, those of the paper's public code too. Raises ProblemError if
    there are none, or for no JSON, or results of another shape."""
    path = Path(folder) / name
    if not path.exists():
        raise no_results(Path(folder))
    logs = read_json(path, "the logs")
    check_logs(logs, path)
    return logs


# The paper's public code may have several classes under one name, with an accuracy of each.
ACCURACY = Kind(
    FRACTION.words,
    lambda x: all(map(FRACTION.fits, x.values())) if isinstance(x, dict) else FRACTION.fits(x),
)
CLASSES = {str: {"cls_acc_test?": ACCURACY, "no_cls_acc?": ACCURACY}}
OTHERS = {"all": {"all_ds": FRACTION}}
ENTRY = {"final_results": {str: OBJECT}, "zero_shot?": {str: OBJECT}, "solver?": OBJECT}


def check_logs(logs: Any, where: str | Path) -> None:
    """Raise ProblemError, one line, if the JSON in the file `where` holds no logs."""
    check(logs, {str: OBJECT}, where)
    for dataset, entries in logs.items():
        check(entries.get(SETTINGS, {}), OBJECT, where, dataset, SETTINGS)
        for label in entries.keys() - {SETTINGS}:
            entry, path = entries[label], (where, dataset, label)
            check(entry, ENTRY, *path)
            if not entry["final_results"].get(dataset):
                raise ProblemError(f"{where}: {dataset} / {label} has no accuracies of {dataset}")
            for side in ("final_results", "zero_shot"):
                for name, accuracies in entry.get(side, {}).items():
                    shape = CLASSES if name == dataset else OTHERS
                    check(accuracies, shape, *path, side, name)


def same_kind(
    folders: Sequence[str | Path], logs: Sequence[Logs], model_alone: bool = False
) -> None:
    """ProblemError unless folders differ by chance alone, such as seeds. `model_alone`: whether it
    is enough that they are of one model, whatever forgot: then what was measured before forgetting
    is the same for all."""
    if not model_alone and len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ProblemError(f"a results folder is given twice: {', '.join(map(str, folders))}")
    known: dict[tuple[str, str], tuple[str | Path, Any]] = {}
    for folder, sets in zip(folders, logs, strict=True):
        for whose, key, value in _settings(sets, model_alone):
            other_folder, other = known.setdefault((whose, key), (folder, value))
            if other != value:
                both = f"{other_folder} and {folder} do not belong together"
                hint = "" if model_alone else "; a list is of seeds, compare_results takes methods"
                raise ProblemError(f"{both}: {key} is {shown(other)} and {shown(value)}{hint}")


def _settings(logs: Logs, model_alone: bool) -> Iterator[tuple[str, str, Any]]:
    """Whose setting, which, and its value: the template is a data set's, a solver's a label's."""
    for dataset, entries in logs.items():
        for key, value in entries.get(SETTINGS, {}).items():
            if key in MODEL if model_alone else key != "seed":
                yield dataset if key == "template" or model_alone else "", key, value
        for label, entry in entries.items() if not model_alone else ():
            for key, value in entry.get("solver", {}).get("settings", {}).items():
                yield f"{dataset} / {label}", key, value


def read_args(path: str | Path) -> list[argparse.Namespace]:
    """The command lines in an args.txt, oldest first, read as text: nothing in it is executed.
    Raises ProblemError for a line that is not the text of an argparse Namespace."""
    namespaces = []
    for line in _lines(Path(path)):
        try:
            keywords = ast.parse(line, mode="eval").body.keywords
            values = {str(part.arg): ast.literal_eval(part.value) for part in keywords}
        except (SyntaxError, ValueError, AttributeError, RecursionError, MemoryError) as error:
            raise ProblemError(f"{path}: not the text of a Namespace ({error})") from error
        namespaces.append(argparse.Namespace(**values))
    return namespaces


def run_places(folder: str | Path, dataset: str) -> dict[str, str] | None:
    """Where the latest run of a data set into a results folder found its files, by the keys of
    `PLACES`, "" for nowhere; None if args.txt tells of no such run."""
    for run in reversed(read_args(Path(folder) / ARGS)):
        if getattr(run, "dataset", None) == dataset:
            return {key: str(getattr(run, key, None) or "") for key in PLACES}
    return None


def _lines(path: Path) -> list[str]:
    text = read_text(path, "command lines") if path.exists() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]
