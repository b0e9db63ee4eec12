"""The audit as a table: a row for every forgotten class, percent where it is an accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from engine.files import atomic_path
from evaluation.audit.record import AUDIT, read_audits

CSV = "audit.csv"
PERCENT = 100.0
# Column -> where its number stands in a class's audit; fractions become percent.
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
SHOWN = ("before", "after", "words mean", "words worst", "neighbours before", "neighbours after")
SHOWN += ("probe", "images in a cache", "named, alone")
FEW = 3  # classes whose findings are all printed


def audit_table(folder: str | Path) -> pd.DataFrame:
    """A row for every audited class of a results folder.

    `before` and `after` (with its 95 % interval) are the class's accuracy under the evaluation
    prompt, `words` under prompts that forgetting did not see (mean, worst, which, and under how
    many of them half of the class is `back`), `neighbours` the mean of the ten nearest retained
    classes, `retrieval` the images whose best text is the right one, of the class itself
    (`forgotten`) and of retained classes, `leak auc` how well the new logits tell the class's
    images from those of the class that they are now taken for, `probe` a linear probe on image
    embeddings, `images in a
    cache` how many bring half of the class back by a cache on top, `named` the
    place of the class among up to 1,000 names in the attacks that know the original projection or
    only the changed one. NaN where it was not measured.
    """
    rows = []
    for dataset, labels in read_audits(folder).items():
        for label, entry in labels.items():
            for name, found in entry["classes"].items():
                row: dict[str, Any] = {"data set": dataset, "forgotten": label, "class": name}
                for column, path in FRACTIONS.items():
                    value = _at(found, path)
                    row[column] = float("nan") if value is None else PERCENT * value
                row |= {column: _at(found, path) for column, path in VALUES.items()}
                row["words back"] = len(_at(found, ("paraphrase", "back")) or [])
                timed = found.get("seconds", {})
                row["seconds"] = sum(s for key, s in timed.items() if key != "relearning")
                rows.append(row)
    return pd.DataFrame(rows)


def report_table(folder: Path, datasets: Sequence[str]) -> None:
    """Write the whole table as CSV beside the audit, print the main columns for `datasets` with the
    findings in words, and say where both are."""
    table = audit_table(folder)
    with atomic_path(folder / CSV) as temporary:
        table.to_csv(temporary, index=False)
    chosen = table[table["data set"].isin(datasets)]
    columns = ["data set", "class", *SHOWN]
    print(chosen[columns].to_string(index=False, float_format="{:.1f}".format, na_rep="-"))
    audits = read_audits(folder)
    for dataset in datasets:
        for entry in audits.get(dataset, {}).values():
            for name, found in entry["classes"].items():
                # One line a class where there are many; the report shows all of them.
                lines = found["verdict"] if len(chosen) <= FEW else found["verdict"][:1]
                print("\n  ".join([f"{dataset} / {name}:", *lines]))
    print(f"audit: {folder / AUDIT}")
    print(f"table: {folder / CSV}")
    print(f"to look at it: python -m evaluation.report {folder}")


def _at(found: dict[str, Any], path: tuple[str, ...]) -> Any:
    """The value at a path of keys; None where a part of it was not measured."""
    value: Any = found
    for key in path:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value
