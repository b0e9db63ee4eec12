"""Encoding fast changes no embedding beyond rounding, and another precision is told apart."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from benchmarks import encode as benchmark
from clip import ClipSource, FeatureBundle
from clip.batches import RANGE, BatchSize, encode
from clip.cache import FeatureCache
from clip.features import build_bundle, main
from engine.cli import run
from evaluation.audit.inputs import Places
from evaluation.audit.run import audit_folder
from forgetting.errors import ProblemError
from tests.clip_fixtures import caltech, tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny(monkeypatch, tmp_path / "weights", width=64)
    caltech(tmp_path / "data")
    return tmp_path


def bundle_of(place: Path, precision: str = "fp32", **settings: object) -> FeatureBundle:
    source = ClipSource("mini", cache=place / "cache", device="cpu", precision=precision)
    return build_bundle("Caltech101", source, place / "data", place / "cache", **settings)


def test_float32_is_the_plain_loops_to_1e_5(place: Path) -> None:
    """Bytes to the device, batches of whatever size is found; tests/test_clip.py has the models."""
    source = ClipSource("mini", cache=place / "cache", device="cpu")
    paths = benchmark.photographs(place, 150)
    expected = benchmark.Plain(source, 8).encode(paths, 0)
    found = FeatureCache(source, place / "cache").images("some", paths, None, 0)
    assert (found - expected).abs().max() < 1e-5
    assert (found - expected.flip(0)).abs().max() > 1e-2, "the images do differ"


def sizes(pace: dict[int, float], fixed: int | None = None) -> list[int]:
    """The sizes that are tried where a batch of b images takes `pace[b]` seconds an image."""
    size, tried = BatchSize(fixed, GPU), []
    for _ in range(12):
        tried.append(size.now)
        size.took(size.now, size.now * pace.get(size.now, 1.0))
    return tried


def test_the_size_of_a_batch_is_found_by_its_speed() -> None:
    assert RANGE["cuda"] == (64, 512)
    assert sizes({64: 1.0, 128: 0.8, 256: 0.9}) == [64, 64, 128, 128, 256, 256] + [128] * 6
    assert sizes({64: 1.0, 128: 0.99}) == [64, 64, 128, 128] + [64] * 8
    assert sizes({64: 0.9, 128: 0.8, 256: 0.5, 512: 0.4})[4:] == [256, 256] + [512] * 6
    assert sizes({}, fixed=24) == [24] * 12


def test_a_first_slow_batch_or_a_short_one_decides_nothing() -> None:
    size = BatchSize(None, GPU)
    for count, seconds in ((64, 900.0), (3, 0.0), (64, 64.0), (128, 900.0), (128, 96.0)):
        size.took(count, seconds)
    assert size.now == 256


def test_on_a_cpu_the_clock_decides_nothing() -> None:
    """Else the last digits of embeddings would differ from run to run."""
    size = BatchSize(None, CPU)
    for seconds in (900.0, 1.0, 0.1, 900.0):
        size.took(size.now, seconds)
    assert size.now == 32 and size.settled


class Small:
    """A source whose memory holds a few pictures."""

    device = CPU

    def __init__(self, room: int) -> None:
        self.room, self.done = room, []

    def encode_images(self, pictures: Tensor) -> Tensor:
        if len(pictures) > self.room:
            raise torch.OutOfMemoryError("no more")
        self.done.append(len(pictures))
        return pictures.float().mean(dim=(2, 3))


@pytest.mark.parametrize(("room", "most"), [(1000, 32), (20, 16), (5, 4), (1, 1)])
def test_where_memory_ends_batches_are_halved_and_nothing_is_lost(room: int, most: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (300, 3, 2, 2), generator=generator).to(torch.uint8)
    source, size = Small(room), BatchSize(None, CPU)
    chunks = iter(pictures.split(16))
    rows = torch.cat(list(encode(source, chunks, 300, size)))
    assert torch.equal(rows, pictures.float().mean(dim=(2, 3)))
    assert max(source.done) <= most
    with pytest.raises(ProblemError, match="not even one image"):
        list(encode(Small(0), iter(pictures.split(16)), 300, size))


def test_a_precision_is_part_of_the_identity(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = bundle_of(place)
    capsys.readouterr()
    half = bundle_of(place, "bf16")
    told = capsys.readouterr().out
    assert re.search(
        r"embeddings in bf16 differ from those in float32 by at most \S+ in a component and \S+ in "
        r"cosine \(first 16 images\)",
        told,
    )
    assert (exact.precision, half.precision) == ("fp32", "bf16") and "precision" not in exact.extra
    assert not torch.equal(exact.image_features, half.image_features)
    for key in ("class_hidden", "forget_hidden", "retain_hidden", "text_projection"):
        assert torch.equal(getattr(exact, key), getattr(half, key)), "texts are in float32"
    for precision, known in (("fp32", exact), ("bf16", half)):
        assert torch.equal(bundle_of(place, precision).image_features, known.image_features)
    assert "differ" not in capsys.readouterr().out, "what is cached is not encoded again"
    assert torch.allclose(half.image_features.norm(dim=1), torch.ones(120), atol=1e-6)
    half.save(place / "half.safetensors")
    assert FeatureBundle.load(place / "half.safetensors").precision == "bf16"


def arguments(place: Path, *more: str) -> list[str]:
    return [
        *("--dataset", "Caltech101", "--root", str(place / "data"), "--backbone", "mini"),
        *("--cache", str(place / "cache"), "--output-dir", str(place / "out")),
        *("--trainer", "ForgetExact", "--forget", "crab", *more),
    ]


def places_of(place: Path) -> Places:
    return Places(root=str(place / "data"), cache=str(place / "cache"))


def test_results_and_audits_keep_to_their_precision(place: Path, refused) -> None:
    folder = train.main(arguments(place, "--precision", "bf16"))
    logs = json.loads((folder / "logs.json").read_text())["Caltech101"]
    assert logs["settings"]["precision"] == "bf16"
    assert "with precision 'bf16', this run has 'fp32'" in refused(arguments(place))
    before = {path: path.stat().st_mtime_ns for path in (place / "cache/features").rglob("*test*")}
    audit_folder(folder, without=["relearning"], places=places_of(place))
    assert before == {
        path: path.stat().st_mtime_ns for path in (place / "cache/features").rglob("*test*")
    }, "the audit takes the embeddings of the run"


def test_results_from_before_there_was_a_choice_are_float32(place: Path, refused) -> None:
    folder = train.main(arguments(place))
    logs = json.loads((folder / "logs.json").read_text())
    assert logs["Caltech101"]["settings"].pop("precision") == "fp32"
    (folder / "logs.json").write_text(json.dumps(logs))
    train.main(arguments(place))
    line = refused(arguments(place, "--precision", "bf16"))
    assert "with precision 'fp32', this run has 'bf16'" in line
    audit_folder(folder, without=["relearning"], places=places_of(place))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--precision", "fp16"], "--precision fp16 needs a GPU; on a CPU take bf16, or fp32"),
        (["--precision", "bf61"], "did you mean 'bf16'"),
        (["--features", "x", "--precision", "bf16"], ""),
    ],
)
def test_an_impossible_precision_is_refused_before_work(
    place: Path, refused, monkeypatch: pytest.MonkeyPatch, more: Sequence[str], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in refused(arguments(place, *more))
    assert not (place / "out").exists() and not (place / "cache/features").exists()


def test_the_command_makes_a_bundle_in_a_precision(place: Path, capsys) -> None:
    options = ["--root", str(place / "data"), "--cache", str(place / "cache")]
    options += ["--out", str(place / "out"), "--precision", "bf16"]
    assert run(main, ["Caltech101", "mini", *options]) == 0
    assert FeatureBundle.load(place / "out/mini/Caltech101.safetensors").precision == "bf16"
    assert "float32, images in bf16" in capsys.readouterr().out


def test_the_benchmark_measures_every_way(place: Path) -> None:
    table = benchmark.main(["mini", "--images", "24", "--rounds", "1", "--precision", "bf16"])
    assert table["way"].tolist() == ["open_clip, fp32", "ours, fp32", "ours, bf16"]
    assert (table["images a second"] > 0).all() and table["times"][0] == 1
    assert table["largest difference"][1] < 1e-5 < table["largest difference"][2]
