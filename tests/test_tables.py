"""The table of methods."""

from __future__ import annotations

import json

import pytest

from evaluation.tables import method_table
from forgetting.errors import ProblemError
from utils import compute_avg_gain, create_results


def test_the_table_counts_by_hand(tmp_path):
    def entry(name, own, rest, others, adapter):
        sides = {
            side: {
                "A": {name: {"cls_acc_test": own[i], "no_cls_acc": rest[i], "acc_train": None}},
                **{other: {"all": {"all_ds": pair[i]}} for other, pair in others.items()},
            }
            for i, side in enumerate(("zero_shot", "final_results"))
        }
        return sides | {"solver": {"seconds": 2.0 * len(name), "adapter": adapter}}

    (tmp_path / "x").write_bytes(b"12345678")
    logs = {
        "A": {
            "settings": {},
            "a": entry("a", (0.8, 0.2), (0.9, 0.8), {"B": (0.5, 0.4), "C": (0.6, 0.6)}, "x"),
            "bb": entry("bb", (1.0, 0.0), (0.7, 0.8), {"B": (0.5, 0.2), "C": (0.6, 0.5)}, "gone"),
        }
    }
    (tmp_path / "logs.json").write_text(json.dumps(logs))
    row = method_table({"m": tmp_path}).loc["m"]
    expected = {
        "classes": 2,
        **{"forgotten before": 90, "forgotten after": 10, "forgotten worst": 20},
        **{"rest before": 80, "rest after": 80, "rest worst": 10},
        **{"others before": 55, "others after": 42.5, "others worst": 30},
        **{"seconds": 3.0, "bytes": 8},
    }
    assert {key: row[key] for key in expected} == pytest.approx(expected)
    gains = ((0.2 / 0.8 + 0.1 / 0.9 + 0.1 / 0.5 + 0) / 4, (0 + 0 + 0.3 / 0.5 + 0.1 / 0.6) / 4)
    assert row["avg_gain"] == pytest.approx(sum(gains) / 2)
    assert row["avg_gain"] == pytest.approx(compute_avg_gain(create_results(tmp_path)[0]).mean())
    with pytest.raises(ProblemError, match="no multiclass results"):
        method_table({"m": tmp_path}, multiclass=True)
