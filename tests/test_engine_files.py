"""engine/: the errors, files and names that do not depend on which engine runs."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.files import (
    atomic_path,
    escape,
    inside,
    lock,
    sha256_file,
    write_json_atomic,
)
from forgetting.errors import ProblemError, nearest, unknown

ROOT = Path(__file__).resolve().parents[1]


def run(code: str) -> str:
    """What `code` prints in a process of its own."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout


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
            assert temporary.parent.parent == target.parent and temporary.name == target.name
            temporary.write_text(content)
        assert target.read_text() == content
    assert list(target.parent.iterdir()) == [target]
    plain = tmp_path / "plain"
    plain.write_text("")
    assert target.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_atomic_path_keeps_the_old_file_when_the_body_fails(tmp_path, failure):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(failure), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise failure
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_path_makes_a_folder_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_path(target) as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("a")
    assert (target / "a").read_text() == "a"
    with pytest.raises(ProblemError, match="not empty"), atomic_path(target) as temporary:
        temporary.mkdir()
    assert (target / "a").read_text() == "a" and list(tmp_path.iterdir()) == [target]


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProblemError, match=r"cannot write .*child"):
        write_json_atomic({}, tmp_path / "file" / "deep" / "child")
    with pytest.raises(ProblemError, match="cannot write"):
        lock(tmp_path / "file" / "deep" / "child")
    with pytest.raises(ProblemError, match="No space left"), atomic_path(tmp_path / "full"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_failing_to_read_elsewhere_is_not_failing_to_write(tmp_path):
    with pytest.raises(FileNotFoundError, match="source"), atomic_path(tmp_path / "out"):
        (tmp_path / "source").read_text()
    with pytest.raises(OSError, match="unreachable"), atomic_path(tmp_path / "out"):
        raise OSError("host unreachable")


def test_json_that_cannot_be_written_leaves_the_old(tmp_path):
    write_json_atomic({"name": "Ä", "value": 0.1 + 0.2}, tmp_path / "a.json")
    with pytest.raises(TypeError):
        write_json_atomic({"bad": object()}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"name": "Ä", "value": 0.1 + 0.2}


def test_lock_keeps_another_process_out(tmp_path):
    path = tmp_path / "sub" / "logs.json"
    code = (
        "from engine import ProblemError, lock\n"
        f"try:\n    with lock({str(path)!r}, timeout=0.2): print('got it')\n"
        "except ProblemError as error: print(error)"
    )
    with lock(path):
        told = run(code)
        assert told.startswith(f"another process holds {path}.lock") and told.count("\n") == 1
    assert run(code) == "got it\n"  # the control: free again


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
