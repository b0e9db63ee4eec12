"""Errors, names of files, and foreign JSON: what is accepted, and what a refusal says."""

from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.files import (
    FRACTION,
    OBJECT,
    TEXT,
    check,
    escape,
    read_json,
    sha256_file,
    write_json_atomic,
)
from evaluation.results import check_logs
from forgetting.errors import ProblemError, nearest, unknown


def test_the_nearest_names_come_first_and_a_message_is_one_short_line():
    known = ["toy poodle", "standard poodle", "Pekinese", "Scotch terrier"]
    assert nearest("PEKINGESE", known) == ["Pekinese"]
    assert nearest("ranger", ["2011 Ford Ranger SuperCab", "Audi"]) == ["2011 Ford Ranger SuperCab"]
    assert nearest("zzzz", known) == []
    assert len(nearest("poodle", [f"poodle {i}" for i in range(9)], n=2)) == 2
    assert "did you mean 'Pekinese'" in str(unknown("class", "Pekines", ["Pekinese", "ant"]))
    many = str(unknown("class", "a\nb", [f"car number {i}" for i in range(196)]))
    assert "\n" not in many and many.endswith("... (196 in all)") and len(many) < 500


def test_json_is_written_whole_or_not(tmp_path):
    write_json_atomic({"name": "Ä", "value": 0.1 + 0.2}, tmp_path / "a.json")
    with pytest.raises(TypeError):
        write_json_atomic({"bad": object()}, tmp_path / "a.json")
    assert read_json(tmp_path / "a.json") == {"name": "Ä", "value": 0.1 + 0.2}
    (tmp_path / "a.json").write_text('\ufeff{"a": NaN}')
    assert read_json(tmp_path / "a.json") == {"a": None}
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")


@given(st.text(st.characters(codec=None), max_size=40))
def test_a_name_is_escaped_reversibly_to_that_of_a_file(name):
    escaped = escape(name)
    assert unquote(escaped, errors="surrogatepass") == (name or "%")
    assert escaped and not set(escaped) & set("/\\\0:|") and escaped.isascii()
    assert not escaped.startswith(".")
    assert escape(".2011 Audi C/V (2)") == "%2E2011 Audi C%2FV (2)"  # readable


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
