"""Features are encoded once, whatever else changes and however often a run is killed; another
precision is reported apart; published weights are fetched once, and checked."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import clip.cache
import train
from clip.architectures import ARCHITECTURES
from clip.bundle import FeatureBundle
from clip.cache import FeatureCache
from clip.features import build_bundle
from clip.source import ClipSource
from datasets.reader import read_image
from evaluation.audit.inputs import Places
from evaluation.audit.run import audit_folder
from forgetting.errors import ProblemError
from forgetting.models import loading
from tests.clip_fixtures import caltech, picture, random_model, tiny
from tests.conftest import one_line

SET, IMAGES, BATCH = "Caltech101", 120, 16


class Counting(ClipSource):
    """A ClipSource that counts what it encodes, and can fail after some batches of images."""

    batches = images = texts = 0
    fail_after: int | None = None

    def encode_images(self, pictures: Tensor) -> Tensor:
        if self.batches == self.fail_after:
            raise KeyboardInterrupt
        self.batches += 1
        self.images += len(pictures)
        return super().encode_images(pictures)

    def encode_hidden(self, texts: list[str]) -> Tensor:
        self.texts += len(texts)
        return super().encode_hidden(texts)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with weights, a data root and a folder for a cache; shards of 32 images."""
    tiny(monkeypatch, tmp_path / "weights")
    caltech(tmp_path / "data")
    monkeypatch.setattr(clip.cache, "SHARD", 2 * BATCH)
    return tmp_path


@pytest.fixture
def encode(place: Path) -> Callable[..., tuple[FeatureBundle, Counting]]:
    def encode(fail_after: int | None = None, **settings: object) -> tuple:
        source = Counting("mini", cache=place / "cache", device="cpu")
        source.fail_after = fail_after
        settings = {"batch_size": BATCH, "workers": 0, "root": place / "data"} | settings
        return build_bundle(SET, source, **settings), source

    return encode


def test_a_bundle_holds_what_the_model_says(encode: Callable) -> None:
    bundle, source = encode(template="a drawing of a {}!")
    assert (source.images, source.batches, len(bundle.labels)) == (IMAGES, 8, IMAGES)
    assert bundle.classnames == ["crab", "sea_horse", "wild_cat", "yin_yang"]
    names = ["crab", "sea horse", "wild cat", "yin yang"]
    assert torch.equal(bundle.forget_hidden, source.encode_hidden(names))
    prompts = [f"a drawing of a {name}!" for name in names]
    assert torch.equal(bundle.class_hidden, source.encode_hidden(prompts))
    assert torch.equal(bundle.neutral_hidden, source.encode_hidden([""]))
    assert torch.equal(bundle.text_projection, source.projection)
    assert len(bundle.retain_names) >= 100
    assert bundle.labels.tolist() == [label for label in range(4) for _ in range(30)]
    assert (bundle.dataset, bundle.split, bundle.backbone) == (SET, "test", "mini")
    assert bundle.weights == source.weights_sha256
    with pytest.raises(ProblemError, match="template"):
        encode(template="{} {}")


def test_only_what_changed_is_encoded_again(place: Path, encode: Callable, monkeypatch) -> None:
    first, _ = encode()
    again, source = encode()
    assert source.images == source.texts == 0
    assert "model" not in vars(source), "what is cached needs no model"
    for key in ("image_features", "class_hidden", "retain_hidden", "text_projection"):
        assert torch.equal(getattr(first, key), getattr(again, key))
    other, source = encode(template="this is a {}.")
    assert (source.images, source.texts) == (0, 4)
    assert not torch.equal(first.class_hidden, other.class_hidden)
    monkeypatch.setattr("datasets.retain_vocabulary", lambda name: ["otter", "lynx"])
    small, source = encode()
    assert (source.images, source.texts) == (0, 2)
    assert torch.equal(small.class_hidden, first.class_hidden), "no stale template"
    folder = place / "data" / "caltech-101"
    file = folder / "split_zhou_Caltech101.json"
    swap = {0: (1, "sea_horse"), 1: (0, "crab")}
    split = json.loads(file.read_text())
    split["test"] = [[p, *swap.get(label, (label, name))] for p, label, name in split["test"]]
    file.write_text(json.dumps(split))
    other, source = encode()
    assert source.images == 0 and other.labels[0] == 1 and first.labels[0] == 0
    (place / "data").rename(place / "elsewhere")
    _, source = encode(root=place / "elsewhere")
    assert source.images == 0
    image = next((place / "elsewhere").rglob("crab/image_0000.jpg"))
    image.write_bytes(image.with_name("image_0001.jpg").read_bytes())
    _, source = encode(root=place / "elsewhere")
    assert (source.images, source.texts) == (IMAGES, 0)
    torch.save(random_model("mini", seed=1).state_dict(), place / "weights" / "mini.pt")
    _, source = encode(root=place / "elsewhere")
    assert source.images == IMAGES and source.texts > 5


def test_an_image_of_the_same_size_is_encoded_again(place: Path, encode: Callable) -> None:
    """However it was replaced; a file that is as it was is not encoded again."""
    folder = place / "data" / "caltech-101" / "101_ObjectCategories" / "crab"
    first, second = (folder / f"image_000{number}.jpg" for number in (0, 1))
    old, new = first.read_bytes(), second.read_bytes()
    size = max(len(old), len(new))
    for path, content in ((first, old), (second, new)):  # a JPEG may be followed by anything
        path.write_bytes(content.ljust(size, b"\0"))
        os.utime(path, ns=(10**18, 10**18))
    before, _ = encode()

    def copied() -> None:
        shutil.copy2(second, first)  # into the same inode, with the same times

    def moved() -> None:
        shutil.copy2(second, folder / "copy")
        (folder / "copy").rename(first)

    for replaced in (copied, moved):
        first.write_bytes(old.ljust(size, b"\0"))
        os.utime(first, ns=(10**18, 10**18))
        _, source = encode()
        assert source.images == 0, "its old content is known"
        replaced()
        assert (first.stat().st_size, first.stat().st_mtime_ns) == (size, 10**18)
        after, _ = encode()
        assert torch.allclose(after.image_features[0], before.image_features[1], atol=1e-6)
        assert not torch.allclose(after.image_features[0], before.image_features[0], atol=1e-3)


def test_a_killed_run_goes_on_where_it_was(place: Path, encode: Callable) -> None:
    """And what is damaged is made again."""
    expected, _ = encode()
    shutil.rmtree(place / "cache" / "features")
    with pytest.raises(KeyboardInterrupt):
        encode(fail_after=7)
    parts = sorted((place / "cache").rglob("*.parts/*"))
    assert len(parts) == 3, "shards of two batches"
    parts[1].write_bytes(parts[1].read_bytes()[:-7])
    bundle, source = encode()
    assert source.images == 2 * BATCH + IMAGES % (2 * BATCH), "the torn part and the missing one"
    assert torch.equal(bundle.image_features, expected.image_features)
    assert not list((place / "cache").rglob("*.parts")), "parts are removed at the end"
    register = place / "cache" / "features" / "images.json"
    for content in ("torn {", "[]", '{"a": 1}', "[" * 100_000):
        register.write_text(content)
        _, source = encode()
        assert source.images == 0 and len(json.loads(register.read_text())) >= IMAGES
    next((place / "cache").rglob(f"{SET}-test-*.safetensors")).write_bytes(b"torn")
    bundle, source = encode()
    assert source.images == IMAGES and torch.equal(bundle.image_features, expected.image_features)


def test_a_broken_image_is_named_in_one_line(place: Path, encode: Callable) -> None:
    image = next((place / "data").rglob("wild_cat/image_0003.jpg"))
    whole = image.read_bytes()
    broken = (whole[: len(whole) // 2], b"no image", b"", b"\x89PNG\r\n\x1a\n\0\0")
    for workers, content in zip((0, 0, 0, 1), broken, strict=True):
        image.write_bytes(content)
        with one_line("image_0003", "python -m datasets.check"):
            encode(workers=workers)
    image.write_bytes(whole)
    _, source = encode()
    assert source.images == IMAGES - 2 * BATCH, "the shard before the broken image was kept"


CONTENT = bytes(range(256)) * 40


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that stands at the address of OpenAI's RN50."""
    monkeypatch.setattr("clip.architectures.OPENAI_URL", (tmp_path / "server").as_uri())
    file = tmp_path / "server" / ARCHITECTURES["RN50"].sha256 / "RN50.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    return file


def published_source(tmp_path: Path) -> ClipSource:
    return ClipSource("RN50", cache=tmp_path, device="cpu")


def test_weights_are_fetched_once(published, tmp_path, monkeypatch) -> None:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setitem(loading.OPENAI, sha256, "RN50")
    monkeypatch.setitem(ARCHITECTURES, "RN50", replace(ARCHITECTURES["RN50"], sha256=sha256))
    published.parent.rename(published.parents[1] / sha256)
    assert published_source(tmp_path).weights_sha256 == sha256
    (published.parents[1] / sha256 / "RN50.pt").unlink()
    made = published_source(tmp_path)
    assert made.weights_sha256 == sha256, "what is there is not fetched again"
    assert made.weights_files[0].read_bytes() == CONTENT


def test_other_content_is_thrown_away(published, tmp_path) -> None:
    place = tmp_path / "weights" / "RN50.pt"
    for message in ("invalid hash value", "cannot download file:"):  # then there is no server
        with one_line(message, place, "--weights PATH"):
            _ = published_source(tmp_path).weights_sha256
        assert not list(place.parent.iterdir())
        published.unlink(missing_ok=True)
    place.write_bytes(b"put there by hand")
    with one_line("not the file that OpenAI published", place):
        _ = published_source(tmp_path).weights_sha256


def bundle_of(place: Path, precision: str = "fp32", **settings: object) -> FeatureBundle:
    source = ClipSource("mini", cache=place / "cache", device="cpu", precision=precision)
    return build_bundle("Caltech101", source, place / "data", **settings)


def images(place: Path, count: int) -> list[str]:
    paths = [place / f"{number}.png" for number in range(count)]
    for seed, path in enumerate(paths):
        picture(path, seed)
    return [str(path) for path in paths]


def test_where_memory_ends_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ClipSource("mini", cache=place / "cache", device="cpu")

    def encode_images(pictures: Tensor) -> Tensor:
        if len(pictures) > 8:
            raise torch.OutOfMemoryError("no more")
        return pictures.float().mean(dim=(2, 3))

    monkeypatch.setattr(source, "encode_images", encode_images)
    paths = images(place, 20)
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
