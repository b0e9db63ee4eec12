"""Rows of logs and audits, and the rules by which report, audit and driver call a class gone."""

from __future__ import annotations

import copy
import json
import random
import re

import pytest

from evaluation.audit.verdict import verdict
from evaluation.report import read_runs
from evaluation.report.summary import Summary, findings
from evaluation.results import LOGS
from evaluation.rows import Change, Row, rows_of
from evaluation.rules import Fate
from tests.report_fixtures import acc, audit_of, log_entry, plant, write


def row_of(before: float | None, after: float | None, audit: dict | None = None) -> Row:
    own = Change(before, after)
    return Row("A", "cat", "cat", 1, own, Change(0.9, 0.9), {}, audit=audit or {})


def audit(before: float, after: float) -> dict:
    """An audit whose verdict is of its own numbers."""
    found = audit_of(random.Random(0), "cat", ["cat", "dog"], acc(before), acc(after))
    return found | {"verdict": verdict(found)}


def counted(found: dict) -> int:
    """How many other texts the verdict speaks of."""
    (count,) = {int(n) for line in verdict(found) for n in re.findall(r"(\d+) other te", line)}
    return count


def test_report_and_verdict_count_the_same_other_words():
    """The evaluation prompt is no other word, though forgetting may not have seen it."""
    found = audit(0.9, 0.1)
    count = counted(found)
    assert (
        count == len(row_of(0.9, 0.1, found).other_words) == len(found["paraphrase"]["prompts"]) - 2
    )
    for kind, seen, more in (
        ("evaluation", False, 0),
        ("evaluation", True, 0),
        ("synonym", True, 0),
        ("synonym", False, 1),  # negative control: this one is counted by both
    ):
        changed = copy.deepcopy(found)
        changed["paraphrase"]["prompts"].append(
            found["paraphrase"]["prompts"][0] | {"kind": kind, "seen": seen}
        )
        assert counted(changed) == len(row_of(0.9, 0.1, changed).other_words) == count + more


def test_the_report_says_how_many_texts_were_tried(tmp_path):
    (one,) = read_runs(plant(tmp_path, 2))
    prompts = one.rows[0].audit["paraphrase"]["prompts"]
    assert Summary.of(one).tried == [len(prompts) - 2] * 2  # of which one is the evaluation prompt


@pytest.mark.parametrize(
    ("before", "after", "fate"),
    [
        (0.0, 0.0, Fate.NEVER),
        (0.0, 0.2, Fate.NEVER),
        (0.8, 0.0, Fate.GONE),
        (0.8, 0.375, Fate.GONE),
        (0.8, 0.4, Fate.STAYS),  # exactly half
        (0.8, 0.8, Fate.STAYS),
        (None, None, Fate.UNMEASURED),
    ],
)
def test_row_report_and_verdict_agree_on_what_became_of_a_class(tmp_path, before, after, fate):
    row = row_of(before, after)
    assert row.fate is fate and row.comes_back == (fate is Fate.STAYS)
    entry = log_entry(random.Random(0), "A", ["cat"], acc(0.9), acc(0.1), 0.0)
    for side, value in (("zero_shot", before), ("final_results", after)):
        entry[side]["A"]["cat"]["cls_acc_test"] = value
    write(tmp_path, {"A": {"settings": {}, "cat": entry}})
    (one,) = read_runs(tmp_path)
    text = " ".join([*findings(one), *one.rows[0].verdict])
    assert ("1 class is not forgotten" in text) == (fate is Fate.STAYS)
    assert ("never recognised" in text) == (fate is Fate.NEVER)
    assert Summary.of(one).back == (fate is Fate.STAYS)
    if before is not None:
        found = audit(0.9, 0.1)
        found["residue"]["zero_shot"] = {"before": acc(before), "after": acc(after)}
        lines = verdict(found)
        assert ("was not forgotten" in " ".join(lines)) == (fate is Fate.STAYS)
        assert ("never recognised" in " ".join(lines)) == (fate is Fate.NEVER)
        assert any("half of it back" in line for line in lines) == (fate is Fate.GONE)


def test_several_classes_under_one_name_are_rows_of_their_own():
    """As the paper's public code may have them: what differs by class, what they share once."""
    own = {"a|b": {"cls_acc_test": {"a": 0.1, "b": 0.3}, "no_cls_acc": 0.5, "acc_train": None}}
    results = {"A": own, "B": {"all": {"all_ds": 0.85}}}
    rows = rows_of({"A": {"a|b": {"final_results": results}}})
    assert [(row.name, row.own, row.rest, row.together) for row in rows] == [
        ("a", (None, 0.1), (None, 0.5), 2),
        ("b", (None, 0.3), (None, 0.5), 2),
    ]
    assert all(row.others == {"B": (None, 0.85)} and row.harm is None for row in rows)


def test_a_class_name_may_hold_the_separator():
    own = {"a|b": {"cls_acc_test": 0.1, "no_cls_acc": 0.5}}
    (row,) = rows_of({"A": {"a|b": {"final_results": {"A": own}}}})
    assert (row.name, row.together) == ("a|b", 1)


def test_rows_keep_the_order_of_the_logs(tmp_path):
    folder = plant(tmp_path, 6)
    logs = json.loads((folder / LOGS).read_text())
    names = [label for label in logs["ToyAnimals"] if label != "settings"]
    assert [row.label for row in rows_of(logs)] == names
