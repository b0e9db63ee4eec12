"""The door: what logs.json and audit.json may hold, and what a refusal says."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from engine.schema import MEASURES, check_audits, check_logs
from evaluation.audit.record import read_audits
from evaluation.audit.run import audit_class
from evaluation.results import LOGS, read_logs
from forgetting.errors import ProblemError
from tests.audit_fixtures import EDGES, edge
from tests.report_fixtures import acc, audit_of, log_entry, sparse_audits

NAMES = ["cat", "dog"]
FOUND = audit_of(random.Random(0), "cat", NAMES, acc(0.9), acc(0.1))
ENTRY = log_entry(random.Random(0), "A", ["cat"], acc(0.9), acc(0.1), 0.0)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def logs() -> dict[str, Any]:
    return {"A": {"settings": {"trainer": "T"}, "cat": copy.deepcopy(ENTRY)}}


def audits(found: dict[str, Any] | None = None) -> dict[str, Any]:
    found = copy.deepcopy(FOUND) if found is None else found
    return {"A": {"cat": {"adapter_sha256": "0", "settings": {}, "classes": {"cat": found}}}}


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
    check_audits(audits(), "audit.json")
    for found in sparse_audits(FOUND).values():
        check_audits(audits(found), "audit.json")


@pytest.mark.parametrize("name", EDGES)
def test_what_an_audit_finds_is_accepted(name):
    asked = edge(name)
    found = json.loads(json.dumps(audit_class(asked), allow_nan=False))
    assert set(MEASURES) <= set(found)
    check_audits(audits(found), "audit.json")


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


@pytest.mark.parametrize(
    ("path", "new", "told"),
    [
        ("A/cat/adapter_sha256", ..., "A / cat must be an object with adapter_sha256"),
        ("A/cat/classes/cat/verdict", ..., "classes / cat must be an object with verdict"),
        ("A/cat/classes/cat/verdict", "gone", "cat / verdict must be a list, and is"),
        *(
            (f"A/cat/classes/cat/{measure}", None, f"cat / {measure} must be an object, and is")
            for measure in MEASURES
        ),
    ],
)
def test_audits_of_another_shape_are_refused(tmp_path, path, new, told):
    wrong = audits()
    put(wrong, path, new)
    text = json.dumps({"format": "clip-forget-audit/1", "audits": wrong})
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(ProblemError) as caught:
        read_audits(tmp_path)
    line = str(caught.value)
    assert told in line and str(tmp_path / "audit.json") in line and "\n" not in line


@pytest.mark.parametrize(
    ("path", "new", "told"),
    [
        ("paraphrase/prompts/0/seen", 1, "prompts / 0 / seen must be a boolean, and is 1"),
        ("paraphrase/prompts/0/kind", "new", "an object whose 'by_kind' has 'new'"),
        ("paraphrase/worst/after/value", -0.1, "/ after / value must be a number between 0"),
        ("neighbours/moved/count", 2.5, "moved / count must be a whole number, and is 2.5"),
        ("neighbours/classes/1/name", ..., "classes / 1 must be an object with name"),
        ("destinations/after/0/share", None, "after / 0 / share must be a number, and is null"),
        ("confusion/before/0", [1], "confusion must be an object whose 'before' has 11 rows of 12"),
        ("residue/linear_probe/auc", "high", "linear_probe / auc must be a number, and is"),
        ("retrieval/text_to_image/retained/after/5", ..., "retained / after must be an object wi"),
        ("undo/attacks/alone/top", None, "attacks / alone / top must be a list, and is null"),
        ("relearning/methods/cache/no_text", [], "relearning must be an object whose 'no_text'"),
        ("relearning/words/needed", 1.5, "words / needed must be a whole number, and is 1.5"),
    ],
)
def test_every_measure_is_looked_into(path, new, told):
    wrong = audits()
    put(wrong["A"]["cat"]["classes"]["cat"], path, new)
    with pytest.raises(ProblemError) as caught:
        check_audits(wrong, "audit.json")
    assert "audit.json: A / cat / classes / cat / " in str(caught.value)
    assert told in str(caught.value)


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
    for check in (check_logs, check_audits):
        try:
            check(value, "here")
        except ProblemError as error:
            assert str(error).startswith("here: ") and len(str(error).splitlines()) == 1
