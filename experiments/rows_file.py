"""A CSV of rows that are made once: finished rows are kept, whatever happens to the run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pandas as pd

from engine.errors import UserError
from engine.files import atomic_path, lock

KEY = ("study", "dataset", "classes", "solver", "setting", "seed", "constants")


class Table:
    """The rows of one study on one data set, keyed by the columns of `KEY`.

    Every row is added by writing the whole file anew beside the old one: a run that is killed
    leaves the rows that it had finished. Rows of other seeds and constants stay.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, str]]:
        """All rows as text.

        Raises:
            UserError: the file is no such table; it is left as it is.
        """
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file, strict=True)
                rows, columns = list(reader), reader.fieldnames or []
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"cannot read {self.path}: {error}; move it aside") from error
        missing = [name for name in KEY if name not in columns]
        if missing or any(None in row or None in row.values() for row in rows):
            what = f"no column {missing[0]!r}" if missing else "a row has too few or many cells"
            raise UserError(f"{self.path} is no table of a study ({what}); move it aside")
        return rows

    def keys(self) -> set[tuple[str, ...]]:
        """The keys of all rows."""
        return {key_of(row) for row in self.read()}

    def add(self, row: dict[str, Any]) -> None:
        """Add a row; one with the same key that another process wrote meanwhile stays instead."""
        fresh = {name: _text(value) for name, value in row.items()}
        with lock(self.path):
            rows = self.read()
            if key_of(fresh) in {key_of(there) for there in rows}:
                return
            rows.append(fresh)
            columns = list(dict.fromkeys(name for each in rows for name in each))
            with (
                atomic_path(self.path) as temporary,
                temporary.open("w", encoding="utf-8", newline="") as file,
            ):
                writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)

    def frame(self, keys: list[tuple[str, ...]]) -> pd.DataFrame:
        """The rows with these keys in that order, numbers as floats."""
        rows = {key_of(row): row for row in self.read()}
        frame = pd.DataFrame([rows[key] for key in keys if key in rows])
        for name in frame.columns.difference([*KEY, "auto"]):
            frame[name] = pd.to_numeric(frame[name])
        return frame


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What makes a row itself, as text."""
    return tuple(str(row[name]) for name in KEY)


def _text(value: Any) -> str:
    if value is None or value != value:
        return ""
    return repr(value) if isinstance(value, float) else str(value)
