"""Rows as data frames: of one results folder, of methods side by side, and of an audit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from engine.log import logger
from evaluation.results import AUDIT, CSV, LOGS
from evaluation.rows import Row, read_rows
from forgetting.errors import ProblemError

FOR_EACH = "cls_forget_all"  # the column with the accuracy of each class of a request
GAIN = "gain"  # the column with the mean of the folders' own average gains
KEYS = ["ds", "name"]
FRAME = ("ds", "name", "full_Noforget", "cls_Noforget", "cls_forget", "full_forget")
QUANTITIES = ("class", "rest", "others")
# Columns of audit.csv -> where the number stands in a class's audit; fractions become percent.
FRACTIONS = {
    "before": ("residue", "zero_shot", "before", "value"),
    "after": ("residue", "zero_shot", "after", "value"),
    "after low": ("residue", "zero_shot", "after", "low"),
    "after high": ("residue", "zero_shot", "after", "high"),
    "words mean": ("paraphrase", "mean_after"),
    "words worst": ("paraphrase", "worst", "after", "value"),
    "neighbours before": ("neighbours", "mean_before"),
    "neighbours after": ("neighbours", "mean_after"),
    "retrieval forgotten": ("retrieval", "image_to_text", "forgotten", "after", "1", "value"),
    "retrieval before": ("retrieval", "image_to_text", "retained", "before", "1", "value"),
    "retrieval after": ("retrieval", "image_to_text", "retained", "after", "1", "value"),
    "probe": ("residue", "linear_probe", "after", "value"),
}
VALUES = {
    "worst words": ("paraphrase", "worst", "text"),
    "leak auc": ("destinations", "worst_auc"),
    "images in a cache": ("relearning", "methods", "cache", "needed"),
    "named, original known": ("undo", "attacks", "original_known", "place"),
    "named, alone": ("undo", "attacks", "alone", "place"),
}
SHOWN = (
    "before",
    "after",
    "words mean",
    "words worst",
    "neighbours before",
    "neighbours after",
    "probe",
    "images in a cache",
    "named, alone",
)


def result_table(folder: Path, rows: Sequence[Row], multiclass: bool = False) -> pd.DataFrame:
    """A row for every request (of several classes at once, if `multiclass`), with the columns of
    `utils.create_results`. Raises ProblemError if there is no such request in the folder."""
    lines, after = [], {}
    for row in rows:
        if (row.together > 1) == multiclass:
            values = row.rest.before, row.own.before, row.own.after, row.rest.after
            line = dict(zip(FRAME, (row.dataset, row.label, *values), strict=True))
            for name, change in row.others.items():
                line |= {f"res_{name}": change.after, f"full_{name}": change.before}
            lines.append(line)
            after.setdefault((row.dataset, row.label), {})[row.name] = row.own.after
    if not lines:
        kind = "multiclass" if multiclass else "single-class"
        raise ProblemError(f"no {kind} results in {folder / LOGS}: multiclass={not multiclass}?")
    numbers = pd.DataFrame(lines).set_index(KEYS).astype(float)  # None to NaN
    table = numbers.groupby(KEYS, sort=False).mean().reset_index()
    if multiclass:
        table.insert(len(FRAME), FOR_EACH, list(after.values()))
    return table


def over_folders(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Every row over the frames of several folders, such as one a seed: the means, and that of each
    folder's average `gain`; the standard deviation `std_*` of each column (divided by the folders
    less one; NaN of one); and `folders`, how many hold the row."""
    rows = pd.concat([frame.assign(**{GAIN: average_gains(frame)}) for frame in frames])
    groups = rows.groupby(KEYS, sort=False)
    numbers = [column for column in rows.columns if column not in (*KEYS, FOR_EACH)]
    df = groups[numbers].mean().join(groups[numbers].std().add_prefix("std_"))
    if FOR_EACH in rows:
        each = groups[FOR_EACH].agg(lambda each: pd.DataFrame(list(each)).mean().to_dict())
        df.insert(len(numbers), FOR_EACH, each)
    return df.join(groups.size().rename("folders")).reset_index()


def other_sets(df: pd.DataFrame) -> list[str]:
    """The other data sets that a `result_table` has columns of."""
    return [column.removeprefix("res_") for column in df.columns if column.startswith("res_")]


def average_gains(df: pd.DataFrame) -> pd.Series:
    """The paper's number of every row of a `result_table`; lower is better, 0 is perfect.

    It is the mean of: the fraction of the forgotten class's accuracy that is left, the relative
    loss on the rest of its data set, and the relative loss on each other data set, where a gain
    counts as 0. It is NaN for a class that was not recognised before; a set that was not is left
    out. Of several folders it is the mean of their own: a loss of one is not made up for by what
    another gained.
    """
    if GAIN in df:
        return df[GAIN]
    parts = [df["cls_forget"] / df["cls_Noforget"].where(df["cls_Noforget"] > 0)]
    pairs = [("full_forget", "full_Noforget")]
    pairs += [(f"res_{name}", f"full_{name}") for name in other_sets(df)]
    for after, before in pairs:
        loss = (df[before] - df[after]) / df[before].where(df[before] > 0)
        parts.append(loss.clip(lower=0))
    return pd.concat(parts, axis=1).mean(axis=1).where(parts[0].notna())


def check_columns(df: Any, columns: Sequence[str], source: str) -> None:
    """ProblemError unless `df` is a frame with these columns, as those that `source` makes have."""
    lacking = [c for c in columns if c not in df] if isinstance(df, pd.DataFrame) else columns
    if lacking:
        raise ProblemError(f"not a frame of {source}: it lacks {', '.join(lacking)}")


def quantities(df: pd.DataFrame) -> dict[str, tuple[list[str], list[str]]]:
    """The columns of a `result_table` before and after forgetting, of the forgotten class, of the
    rest of its set, and of the other data sets."""
    sets = other_sets(df)
    return {
        "class": (["cls_Noforget"], ["cls_forget"]),
        "rest": (["full_Noforget"], ["full_forget"]),
        "others": ([f"full_{name}" for name in sets], [f"res_{name}" for name in sets]),
    }


def summarise(df: pd.DataFrame) -> pd.DataFrame:
    """A frame of `utils.create_results` for reading, in percent before and after forgetting: of the
    forgotten `class`, of the `rest` of its set, and the mean over the `others`. Of several folders
    `±` is the standard deviation of what was measured after (of `others` the mean of their own)."""
    check_columns(df, FRAME, "create_results")
    table = pd.DataFrame({"data set": df["ds"], "forgotten": df["name"]})
    for title, (before, after) in quantities(df).items():
        table[f"{title} before"] = 100 * df[before].mean(axis=1)
        table[f"{title} after"] = 100 * df[after].mean(axis=1)
        if "folders" in df:
            table[f"{title} ±"] = 100 * df[[f"std_{column}" for column in after]].mean(axis=1)
    return table


def side_by_side(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Tables of `summarise` with a column `seconds`, joined: the rows that all of them have, with
    `data set`, `forgotten`, and for `class`, `rest` and `others` a column `before` and one for each
    method (and `± METHOD`), then its `seconds`."""
    keys = ["data set", "forgotten"]
    joined = pd.concat({n: t.set_index(keys) for n, t in tables.items()}, axis=1, join="inner")
    columns = {}
    for quantity in QUANTITIES:
        before = joined.xs(f"{quantity} before", axis=1, level=1)
        columns[f"{quantity} before"] = before.bfill(axis=1).iloc[:, 0]  # of the first that has it
        for name in tables:
            columns[f"{quantity} {name}"] = joined[name, f"{quantity} after"]
            if (name, f"{quantity} ±") in joined:
                columns[f"{quantity} ± {name}"] = joined[name, f"{quantity} ±"]
    columns |= {f"seconds {name}": joined[name, "seconds"] for name in tables}
    return pd.DataFrame(columns).reset_index()


def audit_table(rows: Sequence[Row]) -> pd.DataFrame:
    """A row for every audited class, as audit.csv has it: `FRACTIONS` in percent, `VALUES`, by how
    many other words it comes back, and the seconds that the audit took without relearning."""
    lines = [
        {"data set": row.dataset, "forgotten": row.label, "class": row.name}
        | {column: row.measured(*path) for column, path in (FRACTIONS | VALUES).items()}
        | {"words back": len(row.back)}
        | {"seconds": sum(s for key, s in row.audit["seconds"].items() if key != "relearning")}
        for row in rows
        if row.audit
    ]
    table = pd.DataFrame(lines)
    return table.assign(**{name: 100 * table[name].astype(float) for name in FRACTIONS if lines})


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as CSV, whole or not at all; a table that is there is replaced."""
    from forgetting.io import write_bytes  # who only reads results does not wait for torch

    write_bytes(table.to_csv(index=False).encode(errors="backslashreplace"), path)


def report_audit(folder: Path, datasets: Sequence[str]) -> None:
    """Write the table of a folder's audits as CSV beside them, print its main columns for
    `datasets` with the findings in words, and say where both are."""
    rows = [row for row in read_rows(folder) if row.audit]
    table = audit_table(rows)
    write_table(table, folder / CSV)
    chosen = table[table["data set"].isin(datasets)]
    columns = ["data set", "class", *SHOWN]
    print(chosen[columns].to_string(index=False, float_format="{:.1f}".format, na_rep="-"))
    for row in rows:
        if row.dataset in datasets:
            # One line a class where there are many; the report shows all of them.
            lines = row.audit["verdict"][: None if len(chosen) <= 3 else 1]
            print("\n  ".join([f"{row.dataset} / {row.name}:", *lines]))
    logger.info(f"audit: {folder / AUDIT}")
    logger.info(f"table: {folder / CSV}")
    logger.info(f"to look at it: python -m evaluation.report {folder}")
