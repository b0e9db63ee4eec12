"""Published weights: fetched once, gone on with where a download broke off, and checked."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from clip import ARCHITECTURES, ClipSource
from clip.architectures import published
from clip.download import download
from forgetting.errors import ProblemError
from tests.clip_fixtures import one_line

CONTENT = bytes(range(256)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    address: str
    ranges: list[str | None]
    limit: int | None = None  # bytes after which the connection breaks
    length: str | None = None  # what it says in place of the Content-Length


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
            self.send_header("Content-Length", state.length or str(len(CONTENT) - start))
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
    path.rename(tmp_path / "w.pt.part")  # all of it arrived before it broke off
    assert download(server.address, DIGEST, tmp_path / "w.pt").read_bytes() == CONTENT


@pytest.mark.parametrize("length", ["abc", "-5", "1e3"])
def test_an_odd_length_is_not_believed(server: Server, tmp_path: Path, length: str) -> None:
    server.length = length
    try:
        assert download(server.address, DIGEST, tmp_path / "w.pt").read_bytes() == CONTENT
    except ProblemError as error:  # Python's own client may refuse it
        assert "\n" not in str(error)


def test_other_content_is_thrown_away(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="not 0000") as error:
        download(server.address, "0" * 64, tmp_path / "w.pt")
    one_line(error, server.address)
    assert not (tmp_path / "w.pt").exists() and not (tmp_path / "w.pt.part").exists()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "RN50.pt").write_bytes(b"put there by hand")
    with pytest.raises(ProblemError, match="not the file that OpenAI published") as error:
        _ = ClipSource("RN50", cache=tmp_path).weights_sha256
    one_line(error, tmp_path / "weights" / "RN50.pt")


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip.architectures.OPENAI_URL", "http://127.0.0.1:9/models")
    with pytest.raises(ProblemError) as error:
        _ = ClipSource("RN50", cache=tmp_path).weights_sha256
    _, url = published(ARCHITECTURES["RN50"])
    one_line(error, url, tmp_path / "weights" / "RN50.pt", "--weights PATH")
