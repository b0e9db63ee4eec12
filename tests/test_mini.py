"""`mini`: its four sets, its vocabularies, its committed weights and the script that made them."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

import datasets
from clip import train_mini
from clip.architectures import architecture
from clip.source import ClipSource
from datasets import mini
from datasets.words.lexicon import halves
from datasets.words.paraphrases import TEMPLATES
from tests.conftest import refuses

WEIGHTS = architecture("mini").weights
ABOUT = safe_open(WEIGHTS, "pt").metadata()
NAMES = list(mini.MINI)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four sets, each in a folder of its own name."""
    root = tmp_path_factory.mktemp("mini")
    for name in NAMES:
        mini.render(name, root / name)
    return root


@pytest.fixture(scope="module")
def held_out() -> dict[str, list[list[str]]]:
    """Of each class of each set the synonyms that training holds out."""
    known = train_mini.taught_words()
    assert "black heart" not in known["black heart suit"]
    return {
        dataset: [[w for w in halves(name, dataset)[1] if w not in known] for name in names]
        for dataset, names in mini.MINI.items()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ClipSource:
    return ClipSource("mini", cache=tmp_path_factory.mktemp("cache"), device="cpu")


def _split(root: Path, name: str) -> dict[str, list]:
    return json.loads((root / name / f"split_mini_{name}.json").read_text(encoding="utf-8"))


def _files(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_weights_are_small_and_say_how_they_were_made() -> None:
    assert WEIGHTS.stat().st_size <= 8_000_000
    assert ABOUT["format"] == train_mini.FORMAT
    assert json.loads(ABOUT["steps"]) == train_mini.STEPS
    assert json.loads(ABOUT["config"]) == json.loads(architecture("mini").config.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_accuracies_are_those_that_the_file_says(source, root: Path, held_out, name: str) -> None:
    """A text that training never held is right about an image of its class if it wins against the
    evaluation prompts of all other classes."""
    template, names = datasets.spec(name).template, mini.MINI[name]
    rows = _split(root, name)["test"]
    pictures = [source.preprocess(Image.open(root / name / row[0])) for row in rows]
    images, labels = source.encode_images(torch.stack(pictures)), torch.tensor([r[1] for r in rows])

    def scores(texts: list[str]) -> Tensor:
        hidden = source.encode_hidden(texts)
        return images @ normalize(hidden @ source.projection, dim=1).T  # (N, texts)

    prompts = scores([template.format(text) for text in names])

    def right(texts: list[list[str]]) -> float:
        found = []
        for label, own in enumerate(texts):
            mine = labels == label
            rivals = prompts[mine].index_fill(1, torch.tensor(label), -torch.inf)
            wins = scores(own)[mine] > rivals.amax(dim=1, keepdim=True)
            found += wins.float().mean(dim=0).tolist()
        return sum(found) / len(found)

    taught = set().union(*train_mini.taught_words().values())
    for own in held_out[name]:
        assert own and taught.isdisjoint(own)
    words = [[form.format(w) for w in own for form in ("{}", template)] for own in held_out[name]]
    found = {
        "zero-shot": (prompts.argmax(dim=1) == labels).float().mean().item(),
        "templates": right([[form.format(text) for form in TEMPLATES] for text in names]),
        "words": right(words),
    }
    assert found == pytest.approx(json.loads(ABOUT["accuracies"])[name], abs=0.005)
    assert found["zero-shot"] >= 0.9 and found["templates"] >= 0.8 and found["words"] >= 0.6
    assert right(words[1:] + words[:1]) < 0.15, "the words of the next class must fail"


def test_the_same_files_every_time(root: Path, tmp_path: Path) -> None:
    """Also where two processes draw at once."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(mini.render, ["MiniDigits"] * 2, [tmp_path / "set"] * 2))
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert _files(tmp_path / "set") == _files(root / "MiniDigits")
    mini.render("MiniShapes", tmp_path / "shapes")
    assert _files(tmp_path / "shapes") == _files(root / "MiniShapes")


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
    for digit in range(10) if name == "MiniDigits" else ():
        test, train = ({x.tobytes() for x in mini._handwritten(digit, of)} for of in (True, False))
        assert len(test) >= 25 and not test & train


@pytest.mark.parametrize("name", NAMES)
def test_vocabularies(name: str) -> None:
    names = datasets.retain_vocabulary(name)
    assert len(set(names)) == len(names) >= 100
    assert set(mini.MINI[name]) <= set(names)
    rng = np.random.default_rng(0)
    blank = mini._master("red circle", False, rng).point(lambda _: 0).tobytes()
    assert all(mini._master(text, False, rng).tobytes() != blank for text in names)


def test_mistakes_are_named_and_leave_nothing(tmp_path: Path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    for name in ("red sprout", "cuneiform sign a"):
        refuses(name, mini.draw, name, rng)
    assert np.ptp(mini.draw("", rng), axis=(0, 1)).max() < 150  # nothing stands out
    refuses("MiniDigits", mini.render, "MiniDigit", tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    refuses("full", mini.render, "MiniShapes", tmp_path / "full")

    def torn(*_: object, **__: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(mini.json, "dumps", torn)
    with pytest.raises(RuntimeError):
        mini.render("MiniDigits", tmp_path / "set")
    assert _files(tmp_path) == {"full/mine.txt": b"keep"}


def test_training_is_repeatable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And tokens that it never meets keep their first embeddings."""
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
    torch.manual_seed(3)
    untrained = architecture("mini").build().token_embedding.weight.half()
    known = train_mini.TextSampler(32, np.random.default_rng(3)).known
    moved = (first["token_embedding.weight"] != untrained).any(dim=1)
    assert moved.sum() > 50 and set(moved.nonzero()[:, 0].tolist()) <= set(known.tolist())
    refuses("exists; choose", train_mini.main, ["--out", str(tmp_path / "a.safetensors")])
