"""Published weights: fetched once, and checked."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from clip.architectures import ARCHITECTURES
from clip.source import ClipSource
from forgetting.errors import ProblemError
from forgetting.models import loading
from tests.clip_fixtures import one_line

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths that a server was asked for, which has CONTENT as OpenAI's RN50."""
    found: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        address = f"http://127.0.0.1:{httpd.server_port}"
        monkeypatch.setattr("clip.architectures.OPENAI_URL", address)
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield found
        httpd.shutdown()


def source(tmp_path: Path) -> ClipSource:
    return ClipSource("RN50", cache=tmp_path, device="cpu")


def test_weights_are_fetched_once(requests, tmp_path, monkeypatch) -> None:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setitem(loading.OPENAI, sha256, "RN50")
    spec = replace(ARCHITECTURES["RN50"], sha256=sha256)
    monkeypatch.setitem(ARCHITECTURES, "RN50", spec)
    for _ in range(2):
        made = source(tmp_path)
        assert made.weights_sha256 == sha256
        assert made.weights_files[0].read_bytes() == CONTENT
    assert requests == [f"/{sha256}/RN50.pt"], "what is there is not fetched again"


def test_other_content_is_thrown_away(requests, tmp_path) -> None:
    with pytest.raises(ProblemError, match="invalid hash value") as error:
        _ = source(tmp_path).weights_sha256
    place = tmp_path / "weights" / "RN50.pt"
    one_line(error, place, "--weights PATH")
    assert requests and not list(place.parent.iterdir())
    place.write_bytes(b"put there by hand")
    with pytest.raises(ProblemError, match="not the file that OpenAI published") as error:
        _ = source(tmp_path).weights_sha256
    one_line(error, place)


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clip.architectures.OPENAI_URL", "http://127.0.0.1:9/models")
    with pytest.raises(ProblemError, match="cannot download http:") as error:
        _ = source(tmp_path).weights_sha256
    one_line(error, tmp_path / "weights" / "RN50.pt", "--weights PATH")
