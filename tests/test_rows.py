"""Rows of logs and audits, and the rules by which report, audit and driver call a class gone."""

import pytest

from evaluation.audit.verdict import verdict
from evaluation.rows import Change, Row, rows_of
from evaluation.rules import Fate
from tests.report_fixtures import acc, audit_of
from trainers.base import outcomes


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
def test_row_screen_and_verdict_agree_on_what_became_of_a_class(before, after, fate):
    row = Row("A", "cat", "cat", 1, Change(before, after), Change(0.9, 0.9), {})
    assert row.fate is fate and row.comes_back == (fate is Fate.STAYS)
    sides = [{"cat": {"cls_acc_test": x, "no_cls_acc": 0.9}} for x in (before, after)]
    assert any("not forgotten" in line for line in outcomes(*sides)) == (fate is Fate.STAYS)
    if before is not None:
        lines = " ".join(verdict(audit_of("cat", acc(before), acc(after))))
        assert ("was not forgotten" in lines) == (fate is Fate.STAYS)
        assert ("never recognised" in lines) == (fate is Fate.NEVER)


def test_several_classes_under_one_name_are_rows_of_their_own():
    """As the paper's public code may have them: what differs by class, what they share once."""
    own = {"a|b": {"cls_acc_test": {"a": 0.1, "b": 0.3}, "no_cls_acc": 0.5, "acc_train": None}}
    results = {"A": own, "B": {"all": {"all_ds": 0.85}}}
    rows = rows_of({"A": {"a|b": {"final_results": results}}})
    assert [(row.name, row.own, row.together) for row in rows] == [
        *(("a", (None, 0.1), 2), ("b", (None, 0.3), 2))
    ]
    assert all(row.rest == (None, 0.5) for row in rows)
    assert all(row.others == {"B": (None, 0.85)} and row.harm is None for row in rows)
    own = {"a|b": {"cls_acc_test": 0.1, "no_cls_acc": 0.5}}  # a class name may hold the separator
    (row,) = rows_of({"A": {"a|b": {"final_results": {"A": own}}}})
    assert (row.name, row.together) == ("a|b", 1)


def test_others_are_compared_where_they_were_measured_before_and_after():
    others = {"B": Change(0.5, 0.4), "C": Change(None, 0.9)}
    row = Row("A", "cat", "cat", 1, Change(0.9, 0.0), Change(0.8, 0.7), others)
    assert row.others_mean == (0.5, 0.4) and row.harm == pytest.approx(20)
