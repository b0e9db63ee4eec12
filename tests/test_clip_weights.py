"""Weights: every file that cannot be loaded is one clear line, and none is run."""

from __future__ import annotations

import hashlib
import http.server
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clip import ARCHITECTURES, ClipSource, architecture
from clip.architectures import OPENAI_FILES
from clip.checkpoint import describe, read_state_dict
from clip.download import download
from forgetting.errors import ProblemError
from tests.clip_fixtures import OPENAI, one_line, random_model, tiny


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(ProblemError, match="ViT-B/16") as error:
        architecture("vit-b16")
    one_line(error)


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return tiny(monkeypatch, tmp_path / "mini")


def test_every_form_of_a_checkpoint_is_read(mini: Path, tmp_path: Path) -> None:
    state = random_model("mini").state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    forms = {
        "plain.pt": lambda path: torch.save(state, path),
        "legacy.pt": lambda path: torch.save(state, path, _use_new_zipfile_serialization=False),
        "trained.pt": lambda path: torch.save({"epoch": 3, "state_dict": wrapped}, path),
        "w.safetensors": lambda path: save_file(state, path),
        "safetensors under another name.bin": lambda path: save_file(state, path),
    }
    for name, write in forms.items():
        write(tmp_path / name)
        source = ClipSource("mini", tmp_path / name, tmp_path / "cache", "cpu")
        assert torch.equal(source.projection, state["text_projection"]), name


def test_float16_weights_are_computed_in_float32(mini: Path, tmp_path: Path) -> None:
    state = {key: value.half() for key, value in random_model("mini").state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    source = ClipSource("mini", tmp_path / "half.safetensors", tmp_path / "cache", "cpu")
    assert {tensor.dtype for tensor in source.model.state_dict().values()} == {torch.float32}
    assert torch.equal(source.projection, state["text_projection"].float())


class Trap:
    """A pickle that would make a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_malicious_file_is_not_run(mini: Path, tmp_path: Path, form: str) -> None:
    trap, path = tmp_path / "trap", tmp_path / "evil.pt"
    content = {"text_projection": torch.ones(2, 2), "x": Trap(trap)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["x"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ProblemError, match="run") as error:
        read_state_dict(path)
    one_line(error, path)
    assert not trap.exists()
    if form != "pickle":  # negative control: the trap works
        torch.load(path, weights_only=False)
        assert trap.exists()


def test_a_program_is_run_only_if_openai_published_it(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "program.pt"
    holder = torch.nn.Linear(2, 2)
    with pytest.warns(FutureWarning):  # deprecated, but the form of OpenAI's files
        torch.jit.trace(holder, torch.ones(1, 2)).save(path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("the program was loaded"))
        with pytest.raises(ProblemError, match="none of OpenAI's published") as error:
            read_state_dict(path)
        one_line(error, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(OPENAI_FILES, "program.pt", digest)
    assert torch.equal(read_state_dict(path)["weight"], holder.weight)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_torn_file_is_one_line(mini: Path, tmp_path: Path, form: str) -> None:
    state = {"text_projection": torch.randn(8, 4), "x": torch.randn(5)}
    path = tmp_path / "torn"
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    data = path.read_bytes()
    assert read_state_dict(path).keys() == state.keys()
    for keep in {*range(0, len(data), max(1, len(data) // 40)), 1, 2, 9, len(data) - 1}:
        path.write_bytes(data[:keep])
        with pytest.raises(ProblemError) as error:
            read_state_dict(path)
        one_line(error, path)


def test_random_bytes_are_one_line(mini: Path, tmp_path: Path) -> None:
    path = tmp_path / "noise.pt"
    random = torch.Generator().manual_seed(0)
    starts = (b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02}q\x00", b"\x10\0\0\0\0\0\0\0{")
    for number in range(200):
        noise = bytes(torch.randint(256, (60,), generator=random, dtype=torch.uint8).tolist())
        path.write_bytes(starts[number % len(starts)] + noise)
        with pytest.raises(ProblemError) as error:
            read_state_dict(path)
        one_line(error, path)


def test_what_is_no_checkpoint_is_one_line(mini: Path, tmp_path: Path) -> None:
    for path, message in ((tmp_path, "folder"), (tmp_path / "none.pt", "does not exist")):
        with pytest.raises(ProblemError, match=message) as error:
            ClipSource("mini", path, tmp_path / "cache")
        one_line(error, path)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ProblemError, match="empty"):
        read_state_dict(tmp_path / "empty.pt")
    for content, message in (([1], "list"), ({}, "dict"), ({"a": 1}, "int"), ({1: 2}, "1 is")):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ProblemError, match=message) as error:
            read_state_dict(tmp_path / "other.pt")
        one_line(error, tmp_path / "other.pt")


def test_nan_weights_are_refused(mini: Path, tmp_path: Path) -> None:
    state = random_model("mini").state_dict()
    state["ln_final.weight"][3] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(ProblemError, match=r"ln_final\.weight holds NaN") as error:
        read_state_dict(tmp_path / "nan.pt")
    one_line(error)


@pytest.mark.filterwarnings("ignore::UserWarning")  # nested and quantised tensors are announced so
def test_odd_tensors_are_one_line(mini: Path, tmp_path: Path) -> None:
    plain = torch.eye(3)
    odd = {
        "sparse": plain.to_sparse(),
        "complex": plain * 1j,
        "meta": plain.to("meta"),
        "quantised": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([plain, plain[:2]]),
    }
    for name, tensor in odd.items():
        torch.save({"ln_final.weight": tensor}, tmp_path / f"{name}.pt")
        with pytest.raises(ProblemError) as error:
            read_state_dict(tmp_path / f"{name}.pt")
        one_line(error, tmp_path / f"{name}.pt")
    torch.save({"a": plain, "b": plain.to(torch.float8_e4m3fn), "c": plain.long()}, tmp_path / "ok")
    assert read_state_dict(tmp_path / "ok").keys() == {"a", "b", "c"}


@pytest.mark.parametrize("name", [*OPENAI, "mini"])
def test_weights_of_another_architecture_are_recognised(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        state = ARCHITECTURES[name].build().state_dict()
    assert describe(state) == name
    state["visual.conv1.weight"] = state["visual.conv1.weight"][:-1]
    assert describe(state) != name


def test_the_wrong_architecture_is_one_line(mini: Path, tmp_path: Path) -> None:
    with pytest.raises(ProblemError) as error:
        _ = ClipSource("RN50", mini, tmp_path / "cache", "cpu").model
    one_line(error, mini, "not those of RN50", "look like mini")
    torch.save({"fc.weight": torch.ones(2)}, tmp_path / "fc.pt")
    with pytest.raises(ProblemError, match="no CLIP") as error:
        _ = ClipSource("mini", tmp_path / "fc.pt", tmp_path / "cache", "cpu").model
    one_line(error)


# --- Download ----------------------------------------------------------------------------------


@dataclass
class Server:
    address: str
    ranges: list[str | None]
    limit: int | None = None  # bytes after which the connection breaks


CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            if start >= len(CONTENT):
                self.send_error(416)
                return
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            self.wfile.write(CONTENT[start:][: state.limit])

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        state = Server(f"http://127.0.0.1:{httpd.server_port}/w.pt", [])
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield state
        httpd.shutdown()


def test_a_download_goes_on_where_it_broke_off(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "weights" / "w.pt"
    server.limit = 3000
    with pytest.raises(ProblemError) as error:
        download(server.address, DIGEST, path)
    one_line(error, server.address, path, "--weights")
    assert not path.exists()
    server.limit = None
    assert download(server.address, DIGEST, path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=3000-"]
    assert not path.with_name("w.pt.part").exists()
    download(server.address, DIGEST, path)
    assert len(server.ranges) == 2, "what is there is not fetched again"


def test_a_finished_part_needs_no_more_bytes(server: Server, tmp_path: Path) -> None:
    (tmp_path / "w.pt.part").write_bytes(CONTENT)
    assert download(server.address, DIGEST, tmp_path / "w.pt").read_bytes() == CONTENT


def test_a_download_of_other_content_is_thrown_away(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="not 0000") as error:
        download(server.address, "0" * 64, tmp_path / "w.pt")
    one_line(error, server.address)
    assert not (tmp_path / "w.pt").exists() and not (tmp_path / "w.pt.part").exists()


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip.architectures.OPENAI_URL", "http://127.0.0.1:9/models")
    with pytest.raises(ProblemError) as error:
        _ = ClipSource("RN50", cache=tmp_path).weights_sha256
    url = ARCHITECTURES["RN50"].url
    one_line(error, url, tmp_path / "weights" / "RN50.pt", "--weights PATH")


def test_a_wrong_file_put_there_by_hand_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "RN50.pt").write_bytes(b"something else")
    with pytest.raises(ProblemError, match="not the file that OpenAI published") as error:
        _ = ClipSource("RN50", cache=tmp_path).weights_sha256
    one_line(error, tmp_path / "weights" / "RN50.pt")


def test_the_hash_follows_the_file(mini: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = ClipSource("mini", mini, cache).weights_sha256
    assert first == hashlib.sha256(mini.read_bytes()).hexdigest()
    torch.save(random_model("mini", seed=1).state_dict(), mini)
    assert ClipSource("mini", mini, cache).weights_sha256 != first
    (cache / "weights" / "sha256.json").write_text("torn {")
    assert ClipSource("mini", mini, cache).weights_sha256 != first
