"""Logs as tables: a row for every forgotten class, and a row for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from engine.errors import UserError
from evaluation.audit.table import audit_table
from evaluation.results import LOGS, SEPARATOR, SETTINGS, Logs, read_logs

ALL_CLASSES = "all"
# Column -> (side of the log entry, key): "Noforget" is before forgetting.
OWN_COLUMNS = {
    "full_Noforget": ("zero_shot", "no_cls_acc"),
    "cls_Noforget": ("zero_shot", "cls_acc_test"),
    "cls_forget": ("final_results", "cls_acc_test"),
    "full_forget": ("final_results", "no_cls_acc"),
}
OTHER_COLUMNS = {"res": "final_results", "full": "zero_shot"}  # after, before


def result_rows(logs: Logs, multiclass: bool = False) -> pd.DataFrame:
    """A row for every label of the logs, with the columns of `utils.create_results`.

    Args:
        logs: of `read_logs`.
        multiclass: True for the rows of classes forgotten at once, False for the others.

    Returns:
        `ds`, `name`, `OWN_COLUMNS`, and `res_X` and `full_X` for every other set X; fractions, NaN
        where nothing was measured. Empty if the logs hold no result of the asked kind.
    """
    return pd.DataFrame(
        [
            _row(dataset, label, entry)
            for dataset, entries in logs.items()
            for label, entry in entries.items()
            if label != SETTINGS and _is_multiclass(dataset, label, entry) == multiclass
        ]
    )


def average_gains(df: pd.DataFrame) -> pd.Series:
    """The paper's number of every row of `result_rows`; lower is better, 0 is perfect.

    It is the mean of: the fraction of the forgotten class's accuracy that is left, the relative
    loss on the rest of its data set, and the relative loss on each other data set, where a gain
    counts as 0. A quantity that was not measured before (or was 0) has no relative change and is
    left out.
    """
    parts = [df["cls_forget"] / df["cls_Noforget"].where(df["cls_Noforget"] > 0)]
    pairs = [("full_forget", "full_Noforget")]
    pairs += [(f"res_{name}", f"full_{name}") for name in other_sets(df)]
    for after, before in pairs:
        loss = (df[before] - df[after]) / df[before].where(df[before] > 0)
        parts.append(loss.clip(lower=0))
    return pd.concat(parts, axis=1).mean(axis=1)


def other_sets(df: pd.DataFrame) -> list[str]:
    """The other data sets that rows of `result_rows` were evaluated on."""
    return [column.removeprefix("res_") for column in df.columns if column.startswith("res_")]


def method_table(folders: dict[str, Path], multiclass: bool = False) -> pd.DataFrame:
    """A row for every method, from the logs of its results folder; accuracies in percent.

    Args:
        folders: what to call a method -> its results folder.

    Returns:
        Indexed by method: `classes`, how many rows the numbers are of; `forgotten before`, `after`
        (means) and `worst` (the most that is left of a class); `rest before`, `after` and `worst`
        (the most that forgetting one class cost, in points; negative: none lost) of the other
        classes of the set; the same for `others`, where a mean is over other data sets too and
        `worst` is of one class and one set; `seconds` (mean of a solve), `bytes` (mean size of an
        adapter's file), `avg_gain` (the paper's summary). Where the classes were audited also
        `words worst` (accuracy under the unseen text that finds a class best, mean over classes),
        `words back` (classes that come back under a text), `neighbours` (change of the ten nearest
        classes, points), `retrieval forgotten` (images of the class whose best text it is) and
        `retrieval` (change of that for retained classes, points). NaN where nothing was measured.

    Raises:
        UserError: a folder holds no results of the asked kind.
    """
    rows = {name: _method(Path(folder), multiclass) for name, folder in folders.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def _method(folder: Path, multiclass: bool) -> dict[str, float]:
    """One row of `method_table`."""
    logs = read_logs(folder)
    df = result_rows(logs, multiclass)
    if df.empty:
        kind = "multiclass" if multiclass else "single-class"
        raise UserError(f"{folder / LOGS} holds no {kind} results")
    before = {"rest": df[["full_Noforget"]], "others": _columns(df, "full")}
    after = {"rest": df[["full_forget"]], "others": _columns(df, "res")}
    row: dict[str, float] = {
        "classes": len(df),
        "forgotten before": 100 * df["cls_Noforget"].mean(),
        "forgotten after": 100 * df["cls_forget"].mean(),
        "forgotten worst": 100 * df["cls_forget"].max(),
    }
    for group in ("rest", "others"):
        old, new = (100 * side[group].to_numpy(dtype=float) for side in (before, after))
        row[f"{group} before"] = pd.Series(old.ravel()).mean()  # over what was measured
        row[f"{group} after"] = pd.Series(new.ravel()).mean()
        row[f"{group} worst"] = pd.Series((old - new).ravel()).max()
    solvers = [logs[dataset][name].get("solver", {}) for dataset, name in df[["ds", "name"]].values]
    row["seconds"] = pd.Series([solver.get("seconds") for solver in solvers], dtype=float).mean()
    row["bytes"] = pd.Series([_size(folder, solver) for solver in solvers], dtype=float).mean()
    row["avg_gain"] = float(average_gains(df).mean())
    return row | _audited(folder, df)


def _audited(folder: Path, df: pd.DataFrame) -> dict[str, float]:
    """What the audits of these rows add to `method_table`; nothing if there are none."""
    audits = audit_table(folder)
    if audits.empty:
        return {}
    wanted = set(df[["ds", "name"]].itertuples(index=False, name=None))
    rows = list(zip(audits["data set"], audits["forgotten"], strict=True))
    audits = audits[[row in wanted for row in rows]]
    if audits.empty:
        return {}
    worded = audits[audits["words worst"].notna()]
    return {
        "words worst": audits["words worst"].mean(),
        "words back": worded["words back"].gt(0).sum() if len(worded) else float("nan"),
        "neighbours": (audits["neighbours after"] - audits["neighbours before"]).mean(),
        "retrieval forgotten": audits["retrieval forgotten"].mean(),
        "retrieval": (audits["retrieval after"] - audits["retrieval before"]).mean(),
    }


def _columns(df: pd.DataFrame, stem: str) -> pd.DataFrame:
    return df[[f"{stem}_{name}" for name in other_sets(df)]]


def _size(folder: Path, solver: dict[str, Any]) -> float | None:
    """Bytes of the adapter that a solver's report names; None if it is not there."""
    path = folder / solver["adapter"] if "adapter" in solver else None
    return path.stat().st_size if path and path.is_file() else None


def _row(dataset: str, label: str, entry: dict[str, Any]) -> dict[str, Any]:
    """One row of `result_rows` from one entry of the logs."""
    row: dict[str, Any] = {"ds": dataset, "name": label}
    for column, (side, key) in OWN_COLUMNS.items():
        values = _by_class(entry.get(side, {}).get(dataset, {}), key)
        measured = [value for value in values.values() if value is not None]
        row[column] = sum(measured) / len(measured) if measured else float("nan")
        if column == "cls_forget" and SEPARATOR in label:
            row["cls_forget_all"] = values
    for other in entry["final_results"]:
        if other != dataset:
            for stem, side in OTHER_COLUMNS.items():
                value = entry.get(side, {}).get(other, {}).get(ALL_CLASSES, {}).get("all_ds")
                row[f"{stem}_{other}"] = float("nan") if value is None else value
    return row


def _by_class(results: dict[str, Any], key: str) -> dict[str, float | None]:
    """`key` of every class; logs may hold one entry a class, or one for all with a dictionary."""
    values: dict[str, float | None] = {}
    for name, numbers in results.items():
        value = numbers.get(key)
        values |= value if isinstance(value, dict) else {name: value}
    return values


def _is_multiclass(dataset: str, label: str, entry: dict[str, Any]) -> bool:
    """More than one class was forgotten; a class name may itself hold the separator."""
    own = entry["final_results"].get(dataset, {})
    return (
        len(own) > 1
        or (SEPARATOR in label and list(own) != [label])
        or any(isinstance(value, dict) for numbers in own.values() for value in numbers.values())
    )
