"""Encoding fast changes no embedding beyond rounding, and another precision is reported apart."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from benchmarks import encode as benchmark
from benchmarks.encode import photographs
from clip.bundle import FeatureBundle
from clip.cache import FeatureCache
from clip.features import build_bundle
from clip.source import ClipSource
from datasets.reader import read_image
from evaluation.audit.inputs import Places
from evaluation.audit.run import audit_folder
from forgetting.errors import ProblemError
from tests.clip_fixtures import caltech, tiny


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny(monkeypatch, tmp_path / "weights", width=64)
    caltech(tmp_path / "data")
    return tmp_path


def bundle_of(place: Path, precision: str = "fp32", **settings: object) -> FeatureBundle:
    source = ClipSource("mini", cache=place / "cache", device="cpu", precision=precision)
    return build_bundle("Caltech101", source, place / "data", **settings)


def test_where_memory_ends_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ClipSource("mini", cache=place / "cache", device="cpu")

    def encode_images(pictures: Tensor) -> Tensor:
        if len(pictures) > 8:
            raise torch.OutOfMemoryError("no more")
        return pictures.float().mean(dim=(2, 3))

    monkeypatch.setattr(source, "encode_images", encode_images)
    paths = photographs(place, 20)
    with pytest.raises(ProblemError, match="out of memory for 32 images"):
        FeatureCache(source).images("some", paths, None, 0)
    rows = FeatureCache(source).images("some", paths, 8, 0)
    pictures = torch.stack([source.preprocess(read_image(path)) for path in paths])
    assert torch.equal(rows, pictures.float().mean(dim=(2, 3)))


def test_a_precision_is_part_of_the_identity(place: Path) -> None:
    exact, half = bundle_of(place), bundle_of(place, "bf16")
    assert (exact.precision, half.precision) == ("fp32", "bf16") and "precision" not in exact.extra
    assert not torch.equal(exact.image_features, half.image_features)
    for key in ("class_hidden", "forget_hidden", "retain_hidden", "text_projection"):
        assert torch.equal(getattr(exact, key), getattr(half, key)), "texts are in float32"
    for precision, known in (("fp32", exact), ("bf16", half)):
        assert torch.equal(bundle_of(place, precision).image_features, known.image_features)
    assert torch.allclose(half.image_features.norm(dim=1), torch.ones(120), atol=1e-6)
    half.save(place / "half.safetensors")
    assert FeatureBundle.load(place / "half.safetensors").precision == "bf16"


def test_parts_of_a_killed_run_are_of_its_precision(place: Path, monkeypatch) -> None:
    seen, paths = [], photographs(place, 3)

    def encode(self: FeatureCache, name: str, shards: dict, *_: object) -> Tensor:
        seen.append(set(shards))
        return torch.zeros(3, 12)

    monkeypatch.setattr(FeatureCache, "encode", encode)
    for precision in ("fp32", "bf16"):
        source = ClipSource("mini", cache=place / "cache", device="cpu", precision=precision)
        FeatureCache(source).images("some", paths, None, 0)
    assert not seen[0] & seen[1]


def arguments(place: Path, *more: str) -> list[str]:
    return [
        *("--dataset", "Caltech101", "--root", str(place / "data"), "--backbone", "mini"),
        *("--cache", str(place / "cache"), "--output-dir", str(place / "out")),
        *("--trainer", "ForgetExact", "--forget", "crab", *more),
    ]


def test_results_and_audits_keep_to_their_precision(place: Path, refused) -> None:
    folder = train.main(arguments(place, "--precision", "bf16"))
    logs = json.loads((folder / "logs.json").read_text())["Caltech101"]
    assert logs["settings"]["precision"] == "bf16"
    assert "with precision 'bf16', this run has 'fp32'" in refused(arguments(place))

    def times() -> dict[Path, int]:
        found = (place / "cache/features").rglob("*test*")
        return {path: path.stat().st_mtime_ns for path in found}

    before, places = times(), Places(root=str(place / "data"), cache=str(place / "cache"))
    audit_folder(folder, without=["relearning"], places=places)
    assert times() == before, "the audit takes the embeddings of the run"


def test_an_impossible_precision_is_refused_before_work(place: Path, refused, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "fp16 needs a GPU" in refused(arguments(place, "--precision", "fp16"))
    assert "'bf16'" in refused(arguments(place, "--precision", "bf61"))
    assert refused(arguments(place, "--features", "x", "--precision", "bf16"))
    assert not (place / "out").exists() and not (place / "cache/features").exists()


def test_the_benchmark_measures_every_way(place: Path) -> None:
    table = benchmark.main(["mini", "--images", "40", "--rounds", "1", "--precision", "bf16"])
    assert table["way"].tolist() == ["open_clip, fp32", "ours, fp32", "ours, bf16"]
    assert (table["images a second"] > 0).all() and table["times"][0] == 1
    assert table["largest difference"][1] < 1e-5 < table["largest difference"][2]
