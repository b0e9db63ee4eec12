"""The shapes of foreign JSON: what is accepted, and what a refusal says."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from engine.files import FRACTION, OBJECT, TEXT, check
from evaluation.results import check_logs
from forgetting.errors import ProblemError

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
SHAPE = {"name": TEXT, "parts?": [FRACTION, ...], "by_class?": {str: FRACTION}, "any?": OBJECT}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"name": "a", "other": [None]}, None),
        ({"name": "", "parts": [1, 0.5], "by_class": {"x": 1, "y": None}, "any": {}}, None),
        (3, ["all of it", "an object"]),
        ({}, ["an object with name"]),
        ({"name": None}, ["name must be a text"]),
        ({"name": "a", "parts": {}}, ["parts must be a list"]),
        ({"name": "a", "parts": []}, ["parts", "not empty"]),
        ({"name": "a", "parts": [1, True]}, ["parts / 1 must be a number from 0 to 1"]),
        ({"name": "a", "parts": [float("nan")]}, ["parts / 0 must be a number from 0 to 1"]),
        ({"name": "a", "by_class": {"x\ny": 1.5}}, ["by_class / x\\ny", "from 0 to 1"]),
    ],
)
def test_what_has_not_the_shape_is_refused_with_its_place(value, words):
    if words is None:
        return check(value, SHAPE, "here")
    with pytest.raises(ProblemError) as caught:
        check(value, SHAPE, "here")
    line = str(caught.value)
    assert line.startswith("here: ") and line.isprintable()
    assert all(word in line for word in words), line


def test_logs_of_the_papers_code_are_accepted():
    own = {"a|b": {"cls_acc_test": {"a": 0.1, "b": None}, "no_cls_acc": 0.5, "acc_train": "x"}}
    logs = {"A": {"a|b": {"final_results": {"A": own, "B": {"all": {"all_ds": 1}}}}}}
    check_logs(logs, "logs.json")
    for wrong in (90.0, True, "0.9", {"a": 2}):
        own["a|b"]["cls_acc_test"] = wrong
        with pytest.raises(ProblemError, match="cls_acc_test must be a number from 0 to 1"):
            check_logs(logs, "logs.json")


@given(JSON)
def test_any_json_is_accepted_or_refused(value):
    for logs in (value, {"A": value}, {"A": {"b": value}}, {"A": {"b": {"final_results": value}}}):
        try:
            check_logs(logs, "here")
        except ProblemError as error:
            assert str(error).startswith("here: ") and len(str(error).splitlines()) == 1
