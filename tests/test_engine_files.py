"""Errors, files and names that do not depend on which engine runs."""

from __future__ import annotations

import errno
import os
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.files import escape, read_json, sha256_file, write_json_atomic
from forgetting.errors import ProblemError, nearest, unknown
from forgetting.io import atomic_path


def test_the_nearest_names_come_first_and_a_message_is_one_short_line():
    known = ["toy poodle", "standard poodle", "Pekinese", "Scotch terrier"]
    assert nearest("PEKINGESE", known) == ["Pekinese"]
    assert nearest("toy podle", known)[:2] == ["toy poodle", "standard poodle"]
    assert nearest("ranger", ["2011 Ford Ranger SuperCab", "Audi"]) == ["2011 Ford Ranger SuperCab"]
    assert nearest("zzzz", known) == []
    assert len(nearest("poodle", [f"poodle {i}" for i in range(9)], n=2)) == 2
    assert str(unknown("class", "Pekines", ["Pekinese", "ant"])) == (
        "unknown class 'Pekines'; did you mean 'Pekinese'? known: Pekinese, ant"
    )
    many = str(unknown("class", "a\nb", [f"car number {i}" for i in range(196)]))
    assert "\n" not in many and many.endswith("... (196 in all)") and len(many) < 500
    assert str(unknown("class", "x", [])) == "unknown class 'x'; known: none"


def test_a_place_that_cannot_be_read_or_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProblemError, match=r"cannot write .*child"):
        write_json_atomic({}, tmp_path / "file" / "deep" / "child")
    with pytest.raises(ProblemError, match="No space left"), atomic_path(tmp_path / "full"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match="source"), atomic_path(tmp_path / "out"):
        (tmp_path / "source").read_text()  # failing to read elsewhere is not failing to write
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path / "fifo", "/dev/zero"):
        for call in (read_json, lambda path: atomic_path(path).__enter__()):
            with pytest.raises(ProblemError, match="not a regular file"):
                call(place)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_json_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ProblemError, match=r"thing .*a\.json"):
        read_json(tmp_path / "a.json", "thing")


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


def test_plain_names_stay_readable_and_awkward_ones_are_files(tmp_path):
    assert escape("2011 Ford Ranger SuperCab (2)") == "2011 Ford Ranger SuperCab (2)"
    assert escape("Audi C/V") == "Audi C%2FV"
    names = ["", ".", "..", "../a", "C/V", "%", "%2F", ".hidden", "\udc80"]
    for name in names:
        (tmp_path / escape(name)).write_text("x")
    assert len(list(tmp_path.iterdir())) == len(names)
