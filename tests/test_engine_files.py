"""engine/: the errors, files and names that do not depend on which engine runs."""

from __future__ import annotations

import errno
import os
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.files import (
    escape,
    inside,
    read_json,
    sha256_file,
    write_json_atomic,
)
from forgetting.errors import ProblemError, nearest, unknown
from forgetting.io import atomic_path

# --- errors ---------------------------------------------------------------------------------


def test_nearest_is_closest_first_and_ignores_case():
    known = ["toy poodle", "standard poodle", "Pekinese", "Scotch terrier"]
    assert nearest("PEKINGESE", known) == ["Pekinese"]
    assert nearest("toy podle", known)[:2] == ["toy poodle", "standard poodle"]
    assert nearest("ranger", ["2011 Ford Ranger SuperCab", "Audi"]) == ["2011 Ford Ranger SuperCab"]
    assert nearest("zzzz", known) == []
    assert len(nearest("poodle", [f"poodle {i}" for i in range(9)], n=2)) == 2


def test_unknown_is_one_line_of_bounded_length():
    assert str(unknown("class", "Pekines", ["Pekinese", "ant"])) == (
        "unknown class 'Pekines'; did you mean 'Pekinese'? known: Pekinese, ant"
    )
    many = str(unknown("class", "a\nb", [f"car number {i}" for i in range(196)]))
    assert "\n" not in many and many.endswith("... (196 in all)") and len(many) < 500
    assert str(unknown("class", "x", [])) == "unknown class 'x'; known: none"


# --- files ----------------------------------------------------------------------------------


def test_atomic_path_replaces_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "new" / "file.png"
    for content in ("one", "two"):
        with atomic_path(target) as temporary:
            assert temporary.parent == target.parent and temporary.suffix == target.suffix
            temporary.write_text(content)
        assert target.read_text() == content
    assert list(target.parent.iterdir()) == [target]
    other = tmp_path / "other"
    other.write_text("")
    assert target.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_atomic_path_keeps_the_old_file_when_the_body_fails(tmp_path, failure):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(failure), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise failure
    with pytest.raises(ProblemError, match="exists"), atomic_path(target, overwrite=False):
        pass
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_path_makes_a_folder_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    for name in "ab":
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert {path.name for path in target.iterdir()} == {"a", "b"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProblemError, match=r"cannot write .*child"):
        write_json_atomic({}, tmp_path / "file" / "deep" / "child")
    with pytest.raises(ProblemError, match="No space left"), atomic_path(tmp_path / "full"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match="source"), atomic_path(tmp_path / "out"):
        (tmp_path / "source").read_text()  # failing to read elsewhere is not failing to write


def test_pipes_and_devices_are_neither_read_nor_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for call in (read_json, lambda path: atomic_path(path).__enter__()):
        with pytest.raises(ProblemError, match="not a regular file"):
            call(tmp_path / "fifo")
    with pytest.raises(ProblemError, match="not a regular file"):
        read_json("/dev/zero")


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


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")


@given(st.text(st.characters(codec=None), max_size=40))
def test_escape_is_reversible_and_a_file_name(name):
    escaped = escape(name)
    assert unquote(escaped, errors="surrogatepass") == (name or "%")
    assert escaped and not set(escaped) & set("/\\\0:|") and escaped.isascii()
    assert not escaped.startswith(".")


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "C/V", "%", "%2F", ".hidden", "\udc80"])
def test_escape_of_awkward_names(name, tmp_path):
    (tmp_path / escape(name)).write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [escape(name)]


def test_escape_keeps_plain_names_readable():
    assert escape("2011 Ford Ranger SuperCab (2)") == "2011 Ford Ranger SuperCab (2)"
    assert escape("Audi C/V") == "Audi C%2FV"


@pytest.mark.parametrize("bad", ["..", "../x", "a/../../x", "/etc/passwd", "a\0b"])
def test_inside_refuses_to_leave(bad, tmp_path):
    with pytest.raises(ProblemError, match="leads out of"):
        inside(tmp_path, bad)


def test_inside_allows_what_stays(tmp_path):
    assert inside(tmp_path, "a/../b//c.jpg") == tmp_path / "b" / "c.jpg"
    assert inside(tmp_path, "..a") == tmp_path / "..a"
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "root").mkdir()
    elsewhere.mkdir()
    (tmp_path / "root" / "link").symlink_to(elsewhere)  # a user's own link to another disk
    assert inside(tmp_path / "root", "link/a") == tmp_path / "root" / "link" / "a"
