"""Files of the library: written whole or not at all, and refused if changed since."""

import os
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from forgetting import Forgotten
from forgetting.adapter import FORMAT, Adapter, adapter_bytes, load_adapter, save_adapter
from forgetting.cli import cli
from forgetting.errors import ProblemError
from forgetting.io import atomic_path, container, pack, remove_stale, unpack, write_bytes
from tests.conftest import refuses
from tests.test_compose import Animals, D, W, normal


def make() -> Adapter:
    """An adapter with a recipe of two classes."""
    made = Animals().adapter("cat", "dog", left=normal(W, 2, seed=4), right=normal(2, D, seed=5))
    return replace(made, record={"solver": {"gap": 1e-12, "texts": ["cat", "dog"]}})


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return make()


@pytest.fixture(scope="module")
def path(adapter, tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "a.safetensors"
    save_adapter(adapter, path)
    return path


def refused(path) -> str:
    with pytest.raises(ProblemError) as caught:
        load_adapter(path)
    text = str(caught.value)
    assert path.name in text and len(text.splitlines()) == 1 and len(text) < 600
    return text


def test_what_was_written_is_read_and_the_same_adapter_is_the_same_bytes(adapter, path):
    found = {adapter_bytes(x) for x in (adapter, make(), load_adapter(path))}
    assert found == {path.read_bytes()}
    assert load_file(path)["left"].dtype == torch.float32  # any reader of safetensors reads it


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_byte(adapter, path, data):
    """One byte changed, cut out or put in anywhere: refused, or read as it was written."""
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    byte = bytes([data.draw(st.integers(0, 255))])
    bent = {
        "change": content[:at] + byte + content[at + 1 :],
        "cut": content[:at] + content[at + 1 :],
        "put in": content[:at] + byte + content[at:],
        "end here": content[:at],
    }
    target = path.with_name("bent.safetensors")
    target.write_bytes(bent[data.draw(st.sampled_from(sorted(bent)))])
    try:
        found = load_adapter(target)
    except ProblemError:
        refused(target)
    else:
        assert adapter_bytes(found) == content


def test_another_format_and_what_does_not_fit_together_are_named(path, tmp_path):
    """As another version of this library may write it."""
    fields, tensors = unpack(path, FORMAT)
    less = {name: x for name, x in tensors.items() if name != "1.base"}
    other = tmp_path / "other.st"
    for content, word in (
        (pack("clip-forget-adapter/3", fields, tensors), "its format is clip-forget-adapter/3"),
        (container(tensors, {}), f"not a {FORMAT} file"),
        (pack(FORMAT, fields | {"more": 1}, tensors), "does not fit together"),
        (pack(FORMAT, {"classes": ["cat"]}, tensors), "does not fit together"),
        (pack(FORMAT, fields, less), "does not fit together"),
    ):
        other.write_bytes(content)
        assert word in refused(other)


def test_factors_that_are_none(adapter):
    good = normal(W, 2, seed=0)
    odd = [None, [[1.0]], good.numpy(), good.to_sparse(), good.to("meta"), good[0]]
    for bad in [*odd, good * torch.inf, normal(W, 3, seed=0)]:
        refuses(r"left|right", replace, adapter, left=bad)
    refuses("classes", replace, adapter, classes=[])


def test_what_is_no_file(tmp_path):
    pipe, broken = tmp_path / "pipe", tmp_path / "a\nb"
    os.mkfifo(pipe)
    broken.write_bytes(b"x")
    for path in (tmp_path, pipe, tmp_path / "none", tmp_path / ("x" * 5000), "a\0b", broken):
        refuses(None, load_adapter, path)


def test_what_is_there_stays(adapter, tmp_path):
    path = tmp_path / "a"
    write_bytes(b"1", path, overwrite=False)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in (path, tmp_path / "link", tmp_path):
        with pytest.raises(ProblemError, match="exists; choose"):
            Forgotten(adapter).save(taken)
    for bad in (path / "below", tmp_path / "a\0b", "", tmp_path / ("x" * 300), None, 1, b"x"):
        refuses("cannot write", save_adapter, adapter, bad)
    assert path.read_bytes() == b"1" and {p.name for p in tmp_path.iterdir()} == {"a", "link"}
    Forgotten(adapter).save(path, overwrite=True)
    assert load_adapter(path).classes == adapter.classes


def test_a_body_that_fails_leaves_nothing(tmp_path):
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        with pytest.raises((ProblemError, KeyboardInterrupt)), atomic_path(tmp_path / "a") as new:
            new.mkdir()
            (new / "file").write_text("half")
            raise error
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        (tmp_path / "another").read_bytes()  # its own trouble, not that of the place


def test_of_a_folder_that_is_overwritten_other_files_stay(tmp_path):
    (tmp_path / "out/sub").mkdir(parents=True)
    for name in ("notes.txt", "a", "sub/b"):
        (tmp_path / "out" / name).write_text("mine")
    with atomic_path(tmp_path / "out") as new:
        new.mkdir()
        (new / "a").write_text("new")
    texts = {name: (tmp_path / "out" / name).read_text() for name in ("notes.txt", "a", "sub/b")}
    assert texts == {"notes.txt": "mine", "a": "new", "sub/b": "mine"}
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_what_killed_processes_left_is_removed_and_what_is_being_written_stays(tmp_path):
    old, new, mine = (tmp_path / f".tmp-{16 * digit}.st" for digit in "0ax")
    folder = tmp_path / "sub" / f".tmp-{16 * '1'}"
    folder.mkdir(parents=True)
    for file in (old, new, mine, folder / "x"):
        file.write_text("half")
    for path in (old, mine, folder):
        os.utime(path, (time.time() - 7200,) * 2)
    remove_stale(tmp_path)
    assert not old.exists() and not folder.exists() and new.exists() and mine.exists()


def test_a_name_that_cannot_be_shown(tmp_path, capsys):
    """A class whose name is no UTF-8 is stored, composed and shown."""
    animals, name = Animals(), "caf\udce9\n\x1b[31m"
    animals.texts |= {name: animals.texts["owl"], f"a {name}": animals.texts["a owl"]}
    files = [tmp_path / "both.st", tmp_path / "cat.st", tmp_path / "out.st"]
    save_adapter(animals.adapter("cat", name), files[0])
    save_adapter(animals.adapter("cat"), files[1])
    both, cat, out = map(str, files)
    assert cli(["compose", both, "--without", cat, "--out", out]) == 0
    shown = capsys.readouterr().out
    assert "caf\\udce9\\n\\x1b[31m" in shown and shown.count("\n") == 1
    assert load_adapter(out).classes == [name]
