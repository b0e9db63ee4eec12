"""The door: what logs.json may hold, and what a refusal says."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from engine.schema import check_logs
from evaluation.results import LOGS, read_logs
from forgetting.errors import ProblemError
from tests.report_fixtures import acc, log_entry

ENTRY = log_entry(random.Random(0), "A", ["cat"], acc(0.9), acc(0.1), 0.0)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def logs() -> dict[str, Any]:
    return {"A": {"settings": {"trainer": "T"}, "cat": copy.deepcopy(ENTRY)}}


def put(value: Any, path: str, new: Any) -> None:
    """Replace what stands at a path of keys with slashes between; `...` removes it."""
    *above, last = path.split("/")
    for key in above:
        value = value[int(key) if isinstance(value, list) else key]
    if new is ...:
        del value[last]
    else:
        value[int(last) if isinstance(value, list) else last] = new


def test_what_is_written_is_accepted():
    check_logs(logs(), LOGS)
    check_logs({}, LOGS)


def test_what_the_papers_code_wrote_is_accepted():
    own = {"a|b": {"cls_acc_test": {"a": 0.1, "b": None}, "no_cls_acc": 0.5, "acc_train": "x"}}
    check_logs({"A": {"a|b": {"final_results": {"A": own, "B": {"all": {"all_ds": 1}}}}}}, LOGS)


@pytest.mark.parametrize(
    ("path", "new", "told"),
    [
        ("A/settings", [], "A / settings must be an object, and is []"),
        ("A/cat", None, "A / cat must be an object, and is null"),
        ("A/cat/final_results", ..., "A / cat must be an object with final_results, and is"),
        ("A/cat/final_results/A", ..., "final_results / A must be an object, and is null"),
        ("A/cat/final_results/A", {}, "/ A must be an object that is not empty, and is {}"),
        ("A/cat/final_results/ToyTools", {"all": 0.9}, "/ ToyTools / all must be an object"),
        ("A/cat/final_results/A/cat/no_cls_acc", "0.9", "cat / no_cls_acc must be a number, and"),
        ("A/cat/zero_shot/A/cat/cls_acc_test", 90.0, "cls_acc_test must be a number between 0"),
        ("A/cat/zero_shot/A/cat/cls_acc_test", True, "cls_acc_test must be a number, and is true"),
        ("A/cat/zero_shot/A/cat/cls_acc_test", {"x": "y"}, "cls_acc_test / x must be a number"),
        ("A/cat/zero_shot", None, "A / cat / zero_shot must be an object, and is null"),
        ("A/cat/solver/seconds", None, "A / cat / solver / seconds must be a number, and is"),
        ("A/cat/solver/adapter", 7, "A / cat / solver / adapter must be a text, and is 7"),
        ("A/cat/solver/excluded/0", 7, "excluded / 0 must be a text, and is 7"),
        ("A/cat/solver/certificate/gap", "small", "certificate / gap must be a number, and is"),
    ],
)
def test_logs_of_another_shape_are_refused(tmp_path, path, new, told):
    wrong = logs()
    put(wrong, path, new)
    (tmp_path / LOGS).write_text(json.dumps(wrong))
    with pytest.raises(ProblemError) as caught:
        read_logs(tmp_path)
    line = str(caught.value)
    assert told in line and str(tmp_path / LOGS) in line and "\n" not in line


def test_what_is_no_number_counts_as_not_measured(tmp_path):
    wrong = logs()
    put(wrong, "A/cat/final_results/A/cat/cls_acc_test", float("nan"))
    (tmp_path / LOGS).write_text(json.dumps(wrong))
    found = read_logs(tmp_path)["A"]["cat"]["final_results"]["A"]["cat"]
    assert found["cls_acc_test"] is None and found["no_cls_acc"] is not None


def test_a_name_cannot_break_the_line():
    with pytest.raises(ProblemError) as caught:
        check_logs({"A\nB": {"x\u2028": 3}}, LOGS)
    assert "'A\\nB' / 'x\\u2028' must be an object" in str(caught.value)


@given(JSON)
def test_any_json_is_accepted_or_refused(value):
    try:
        check_logs(value, "here")
    except ProblemError as error:
        assert str(error).startswith("here: ") and len(str(error).splitlines()) == 1
