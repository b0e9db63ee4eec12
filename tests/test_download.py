"""Published weights: fetched once, and checked."""

import hashlib
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
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that stands at the address of OpenAI's RN50."""
    monkeypatch.setattr("clip.architectures.OPENAI_URL", (tmp_path / "server").as_uri())
    file = tmp_path / "server" / ARCHITECTURES["RN50"].sha256 / "RN50.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    return file


def source(tmp_path: Path) -> ClipSource:
    return ClipSource("RN50", cache=tmp_path, device="cpu")


def test_weights_are_fetched_once(published, tmp_path, monkeypatch) -> None:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setitem(loading.OPENAI, sha256, "RN50")
    monkeypatch.setitem(ARCHITECTURES, "RN50", replace(ARCHITECTURES["RN50"], sha256=sha256))
    published.parent.rename(published.parents[1] / sha256)
    assert source(tmp_path).weights_sha256 == sha256
    (published.parents[1] / sha256 / "RN50.pt").unlink()
    made = source(tmp_path)
    assert made.weights_sha256 == sha256, "what is there is not fetched again"
    assert made.weights_files[0].read_bytes() == CONTENT


def test_other_content_is_thrown_away(published, tmp_path) -> None:
    place = tmp_path / "weights" / "RN50.pt"
    for message in ("invalid hash value", "cannot download file:"):  # then there is no server
        with pytest.raises(ProblemError, match=message) as error:
            _ = source(tmp_path).weights_sha256
        one_line(error, place, "--weights PATH")
        assert not list(place.parent.iterdir())
        published.unlink(missing_ok=True)
    place.write_bytes(b"put there by hand")
    with pytest.raises(ProblemError, match="not the file that OpenAI published") as error:
        _ = source(tmp_path).weights_sha256
    one_line(error, place)
