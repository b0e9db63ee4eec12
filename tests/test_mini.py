"""`mini`: its four sets, its vocabularies, its committed weights and the script that made them."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import datasets
from clip import ClipSource, train_mini
from clip.architectures import architecture
from datasets import mini
from forgetting.errors import ProblemError

WEIGHTS = architecture("mini").weights
NAMES = list(mini.MINI)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four sets, each in a folder of its own name."""
    root = tmp_path_factory.mktemp("mini")
    for name in NAMES:
        mini.render(name, root / name)
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ClipSource:
    return ClipSource("mini", cache=tmp_path_factory.mktemp("cache"), device="cpu")


def _split(root: Path, name: str) -> dict[str, list]:
    return json.loads((root / name / f"split_mini_{name}.json").read_text(encoding="utf-8"))


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _predicted(source: ClipSource, root: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted and true labels of the rendered test files, by the code path of every CLIP."""
    template = datasets.spec(name).template
    hidden = source.encode_hidden([template.format(text) for text in mini.MINI[name]])
    texts = torch.nn.functional.normalize(hidden @ source.projection, dim=1)
    rows = _split(root, name)["test"]
    images = torch.stack([source.preprocess(Image.open(root / name / row[0])) for row in rows])
    predicted = (source.encode_images(images) @ texts.T).argmax(dim=1)
    return predicted, torch.tensor([row[1] for row in rows])


def test_weights_are_small_and_load_strictly() -> None:
    assert WEIGHTS.stat().st_size <= 8_000_000
    state = load_file(WEIGHTS)
    assert all(t.dtype == torch.float16 for t in state.values() if t.is_floating_point())
    model = architecture("mini").build()
    model.load_state_dict(state, strict=True)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_weights_say_how_they_were_made() -> None:
    with safe_open(WEIGHTS, "pt") as file:
        about = file.metadata()
    assert about["format"] == train_mini.FORMAT
    assert json.loads(about["steps"]) == train_mini.STEPS
    assert json.loads(about["config"]) == json.loads(architecture("mini").config.read_text())
    said = " ".join(train_mini.__doc__.split())
    for name, accuracies in json.loads(about["accuracies"]).items():
        assert " ".join([name, *(f"{value:.3f}" for value in accuracies.values())]) in said


@pytest.mark.parametrize("name", NAMES)
def test_zero_shot_accuracy(source: ClipSource, root: Path, name: str) -> None:
    predicted, labels = _predicted(source, root, name)
    accuracy = (predicted == labels).float().mean().item()
    assert accuracy >= 0.90
    with safe_open(WEIGHTS, "pt") as file:
        written = json.loads(file.metadata()["accuracies"])[name]["zero-shot"]
    assert accuracy == pytest.approx(written, abs=0.005)
    shifted = (labels + 1) % len(mini.MINI[name])  # the wrong names must fail
    assert (predicted == shifted).float().mean() < 0.1


def test_texts_that_training_never_held_are_understood(source: ClipSource) -> None:
    with safe_open(WEIGHTS, "pt") as file:
        written = json.loads(file.metadata()["accuracies"])
    found = {
        name: train_mini.measured(source.model, name, train_mini.unseen(name)) for name in NAMES
    }
    for name in NAMES:
        assert found[name] == pytest.approx(written[name], abs=0.005)
    assert np.mean([found[name]["templates"] for name in NAMES]) >= 0.80
    assert np.mean([found[name]["words"] for name in NAMES]) >= 0.60
    # The words of the next class must fail.
    words = train_mini.unseen("MiniSymbols")["words"]
    names = mini.MINI["MiniSymbols"]
    wrong = dict(zip(names, [words[name] for name in names[1:] + names[:1]], strict=True))
    assert train_mini.measured(source.model, "MiniSymbols", {"w": wrong})["w"] < 0.15


def test_held_out_words_are_in_no_training_text() -> None:
    taught = {word for words in train_mini.taught_words().values() for word in words}
    several = 0
    for dataset in NAMES:
        for name, words in train_mini.held_out(dataset).items():
            assert words and not taught & set(words), name
            several += len(train_mini.taught_words()[name]) >= 5
    assert several >= 100
    assert train_mini.taught_words()["black heart"] == ["black heart"], "a shape's own name"
    assert "black heart" not in train_mini.taught_words()["black heart suit"]


def test_texts_hold_names_within_templates() -> None:
    sampler = train_mini.TextSampler(32, np.random.default_rng(0))
    texts = [sampler.sample("digit seven") for _ in range(200)]
    assert {len(text) for text in texts} == {32}
    assert all(text[0] == sampler.start and sampler.end in text for text in texts)
    strange = set(sampler.strange)
    assert not strange & set(sampler.known)
    odd = sum(any(token in strange for token in text) for text in texts)
    assert 60 <= odd <= 120
    ways = sampler.words["digit seven"]
    found = [[way for way in ways if str(way)[1:-1] in str(text)] for text in texts]
    assert all(found) and len({str(way) for group in found for way in group}) == len(ways)


def test_tokens_that_training_never_meets_keep_their_first_embeddings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_mini, "BATCH", 16)
    torch.manual_seed(5)
    first = architecture("mini").build().token_embedding.weight
    trained = train_mini.train(seed=5, steps=3).token_embedding.weight
    known = train_mini.TextSampler(32, np.random.default_rng(5)).known
    moved = (trained != first).any(dim=1)
    assert moved.sum() > 50 and set(moved.nonzero()[:, 0].tolist()) <= set(known.tolist())


def test_the_same_files_every_time(root: Path, tmp_path: Path) -> None:
    for name in ("MiniDigits", "MiniShapes"):
        mini.render(name, tmp_path / name)
        assert _files(tmp_path / name) == _files(root / name)


@pytest.mark.parametrize("name", NAMES)
def test_split_is_whole_and_apart(root: Path, name: str) -> None:
    split = _split(root, name)
    assert split["val"] == [] and len(mini.MINI[name]) >= 8
    pictures: dict[str, set[bytes]] = {}
    for part, count in (("train", mini.TRAIN_IMAGES), ("test", mini.TEST_IMAGES)):
        assert len(split[part]) == count * len(mini.MINI[name])
        for path, label, class_name in split[part]:
            assert mini.MINI[name][label] == class_name
            with Image.open(root / name / path) as image:
                assert image.size == (32, 32) and image.mode == "RGB"
                pictures.setdefault(part, set()).add(image.tobytes())
    assert not pictures["train"] & pictures["test"]
    assert len(pictures["test"]) == len(split["test"])


def test_handwriting_of_the_test_part_is_not_trained_on() -> None:
    parts = mini._handwritten()
    for digit in range(10):
        test = {image.tobytes() for image in parts[digit, True]}
        train = {image.tobytes() for image in parts[digit, False]}
        assert len(test) >= 25 and not test & train


def test_crowding_counts_other_names_alone() -> None:
    hidden = torch.eye(4)[[0, 0, 1, 2]]
    names = torch.tensor([0, 0, 1, 2])
    same = names[:, None] == names[None, :]
    assert train_mini.crowding(hidden, same) == 0
    apart = torch.eye(4, dtype=torch.bool)
    assert train_mini.crowding(hidden, apart) == pytest.approx(2 / 12)  # 1 pair of 6 is equal


@pytest.mark.parametrize("name", NAMES)
def test_vocabularies(name: str) -> None:
    names = datasets.retain_vocabulary(name)
    assert len(names) >= 100 and len(set(names)) == len(names)
    assert all(text == text.lower().strip() and text for text in names)
    assert set(mini.MINI[name]) <= set(names)
    rng = np.random.default_rng(0)
    blank = mini._master("red circle", False, rng).point(lambda _: 0).tobytes()
    assert all(mini._master(text, False, rng).tobytes() != blank for text in names)


def test_what_cannot_be_drawn_is_named() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ProblemError, match="red sprout"):
        mini.draw("red sprout", rng)
    with pytest.raises(ProblemError, match="cuneiform sign a"):
        mini.draw("cuneiform sign a", rng)
    assert np.ptp(mini.draw("", rng), axis=(0, 1)).max() < 150  # nothing stands out


def test_render_answers_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="MiniDigits"):
        mini.render("MiniDigit", tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(ProblemError, match="full"):
        mini.render("MiniShapes", tmp_path / "full")
    assert _files(tmp_path) == {"full/mine.txt": b"keep"}


def test_two_at_once(root: Path, tmp_path: Path) -> None:
    threads = [
        threading.Thread(target=mini.render, args=("MiniDigits", tmp_path / "set")) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert _files(tmp_path / "set") == _files(root / "MiniDigits")


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(*_: object, **__: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(mini.json, "dumps", torn)
    with pytest.raises(RuntimeError):
        mini.render("MiniDigits", tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_training_is_repeatable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_mini, "BATCH", 16)
    threads = torch.get_num_threads()
    try:
        for out in "ab":
            path = tmp_path / f"{out}.safetensors"
            train_mini.main(["--out", str(path), "--seed", "3", "--steps", "20"])
        other = train_mini.train(seed=4, steps=20)
    finally:
        torch.set_num_threads(threads)
    first, same = (load_file(tmp_path / f"{out}.safetensors") for out in "ab")
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    assert not torch.equal(first["text_projection"], other.text_projection.detach().half())
    assert "MiniShapes: zero-shot 0." in capsys.readouterr().out
    architecture("mini").build().load_state_dict(first, strict=True)
    with pytest.raises(ProblemError, match="not overwritten"):
        train_mini.main(["--out", str(tmp_path / "a.safetensors")])
    with pytest.raises(ProblemError, match="--steps: must be a whole number from 1"):
        train_mini.main(["--out", str(tmp_path / "d.safetensors"), "--steps", "0"])
