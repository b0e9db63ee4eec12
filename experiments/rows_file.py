"""A CSV of rows that are made once: finished rows are kept, whatever happens to the run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from engine.files import lock
from forgetting.errors import ProblemError
from forgetting.io import atomic_path

KEY = ["study", "dataset", "classes", "solver", "setting", "seed", "constants"]
Key = tuple[str, ...]


class RowsFile:
    """The rows of one study on one data set, each known by its cells in the columns of `KEY`.

    Rows are added by writing the whole file anew beside the old one: a run that is killed leaves
    the rows that were added. Rows of other seeds and constants stay.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> pd.DataFrame:
        """All rows as text; no column where there is no file.

        Raises:
            ProblemError: the file is no such table; it is left as it is.
        """
        try:
            rows = pd.read_csv(self.path, dtype=str, keep_default_na=False)
        except FileNotFoundError:
            return pd.DataFrame(columns=KEY, dtype=str)
        except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
            raise ProblemError(f"cannot read {self.path}: {error}; move it aside") from error
        missing = [name for name in KEY if name not in rows]
        # pandas fills a short row with empty cells, and takes what is too much for an index.
        uneven = not isinstance(rows.index, pd.RangeIndex)
        if missing or uneven or (rows["constants"] == "").any():
            what = f"no column {missing[0]!r}" if missing else "a row has too few or many cells"
            raise ProblemError(f"{self.path} is no table of a study ({what}); move it aside")
        return rows

    def keys(self) -> set[Key]:
        """The keys of all rows."""
        return set(self.read()[KEY].itertuples(index=False, name=None))

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; of two with one key the earlier stays (another process may have written it)."""
        fresh = pd.DataFrame(rows, dtype=object)
        fresh[KEY] = fresh[KEY].astype(str)
        with lock(self.path):
            table = pd.concat([self.read(), fresh], ignore_index=True).drop_duplicates(KEY)
            with atomic_path(self.path) as temporary:
                table.to_csv(temporary, index=False, lineterminator="\n")

    def frame(self, keys: Iterable[Key]) -> pd.DataFrame:
        """The rows with these keys in that order, numbers as floats."""
        frame = pd.DataFrame(list(keys), columns=KEY, dtype=str).merge(self.read(), on=KEY)
        for name in frame.columns.difference([*KEY, "auto"]):
            frame[name] = pd.to_numeric(frame[name])
        return frame
