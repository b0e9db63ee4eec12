"""Errors, files and names that do not depend on which engine runs."""

from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.files import escape, read_json, sha256_file, write_json_atomic
from forgetting.errors import nearest, unknown


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
