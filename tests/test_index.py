"""An index of images in which names are hidden: for every text the scores of the text edit."""

import re
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from forgetting import Forgotten, TextEmbeddings, forget, hide_in_index, restore_index
from forgetting.adapter import load_adapter
from forgetting.cli import cli
from forgetting.compose import compose
from forgetting.deploy.embeddings import RESTORABLE, index_edit, patch
from forgetting.models.encoder import read_encoder
from tests.clip_fixtures import open_clip_folder
from tests.conftest import refuses
from tests.encoder_fixtures import tiny
from tests.test_patch import make_adapter, random

D = 32
OTHERS = ["dog", "red car", "tree", "a house", "violin", "sea", "old man", "apple"]


def hidden_names(texts: TextEmbeddings, *names: str, **more) -> Forgotten:
    return forget(texts, None, names, retain=OTHERS, generic=False, **more)


def encode(some: list[str]) -> list[list[float]]:
    """A hosted encoder: every name has a direction of its own, beside one that all texts share."""
    rows = []
    for text in some:
        name = text.removeprefix("a photo of a ").removesuffix(".")
        own = random(D, seed=zlib.crc32(name.encode()))
        rows.append(normalize(own, dim=0) + 0.2 + 0.02 * random(D, seed=len(text)))
    return torch.stack(rows).tolist()


@pytest.fixture(scope="module")
def texts() -> TextEmbeddings:
    return TextEmbeddings(encode, "hosted-1")


@pytest.fixture(scope="module")
def answer(texts: TextEmbeddings) -> Forgotten:
    return hidden_names(texts, "cat")


@given(st.integers(0, 99), st.booleans(), st.sampled_from([np.float32, np.float64, torch.float16]))
def test_scores_are_those_of_the_text_edit_and_vectors_come_back(answer, texts, seed, unit, kind):
    vectors = random(7, D, seed=seed)
    vectors = normalize(vectors, dim=1) if unit else 3 * vectors
    as_array = kind is not torch.float16
    vectors = vectors.numpy().astype(kind) if as_array else vectors.to(kind)
    dtype = torch.from_numpy(vectors).dtype if as_array else kind
    changed = hide_in_index(vectors, answer.adapter, normalised=unit)
    assert type(changed) is type(vectors) and changed.dtype == vectors.dtype
    restored = restore_index(changed, answer.adapter, normalised=unit)
    given, changed, restored = (torch.as_tensor(x).double() for x in (vectors, changed, restored))

    queries = texts.hidden(["cat", "a photo of a cat.", *OTHERS]).double()
    adapter = answer.adapter
    edited = queries + queries @ adapter.left.double() @ adapter.right.double()
    scores, expected = changed @ queries.T, given @ edited.T
    if unit:  # every image by its own factor
        lengths = (given + (given @ adapter.right.T.double()) @ adapter.left.T.double()).norm(dim=1)
        scores = scores * lengths[:, None]
    rounding = torch.finfo(dtype).eps * given.norm(dim=1).max() * 4
    assert (scores - expected).abs().max() <= rounding * edited.norm(dim=1).max()
    assert (given @ queries.T - expected).abs().max() > 10 * rounding  # the edit does something

    off = (restored - given).norm(dim=1) / given.norm(dim=1)
    assert off.max() <= index_edit(adapter).restored_to(dtype)
    assert (changed - given).norm(dim=1).max() > 1e-2


def test_the_name_is_not_found_and_the_proof_holds(answer, texts):
    """A picture of each name lies where its text does, and a little beside."""
    names = ["cat", *OTHERS]
    queries = texts.hidden(names).double()
    images = normalize(queries + 0.05 * random(len(names), D), dim=1)
    assert torch.equal((images @ queries.T).argmax(dim=0), torch.arange(len(names)))
    changed = hide_in_index(images, answer.adapter)
    best = (changed @ queries.T).argmax(dim=1)
    assert best[0] != 0 and torch.equal(best[1:], torch.arange(1, len(names)))
    assert answer.certificate.gap < 1e-9


def test_composed_adapters_are_the_adapter_of_the_union(texts, answer):
    other, both = hidden_names(texts, "sun"), hidden_names(texts, "cat", "sun")
    made = compose({"a": answer.adapter, "b": other.adapter})
    vectors = normalize(random(5, D), dim=1)
    union = hide_in_index(vectors, both.adapter)
    assert torch.allclose(hide_in_index(vectors, made), union, atol=1e-5)
    twice = hide_in_index(hide_in_index(vectors, answer.adapter), other.adapter)
    assert not torch.allclose(twice, union, atol=1e-3)


def test_an_adapter_of_a_text_projection_needs_its_projection():
    weight = (random(12, D) / 4 + torch.eye(12, D)).float()
    adapter = make_adapter(weight)
    vectors, hidden = random(6, D, seed=3), random(4, 12, seed=4)
    changed = hide_in_index(vectors, adapter, weight, normalised=False)
    expected = hidden @ (weight.double() + adapter.delta().double()) @ vectors.T
    assert torch.allclose(hidden @ weight.double() @ changed.T, expected, atol=1e-9)
    for projection, words in ((None, "embeddings"), (weight + 1, "another text projection")):
        refuses(words, hide_in_index, vectors, adapter, projection)
    refuses("bias", index_edit, adapter, weight, torch.ones(D))
    wide = random(40, D).float()
    refuses("row rank", hide_in_index, vectors, make_adapter(wide), wide)
    bad = weight @ torch.diag(torch.logspace(0, -5, D))  # as OpenAI's own is
    refuses("stretches", hide_in_index, vectors, make_adapter(bad), bad)


def test_what_cannot_be_restored_is_refused(texts):
    lost = hidden_names(texts, "cat", target="opposite", beta=0.0)
    values = torch.linalg.svdvals(torch.eye(D) + lost.adapter.delta())
    assert values[-1] * RESTORABLE < values[0]
    refuses("stretches", hide_in_index, random(2, D), lost.adapter)


def test_vectors_that_are_none_are_refused(answer):
    refuses(r"answer\.adapter", hide_in_index, random(3, D), answer)
    good = normalize(random(3, D), dim=1)
    nothing = good.clone()
    nothing[1] = 0
    assert torch.equal(hide_in_index(nothing, answer.adapter)[1], nothing[1])
    for vectors, words in (
        (2 * good, "row 0 is not of length 1"),
        (good[:, :8], "(n, 32)"),
        (good * float("nan"), "NaN"),
        (good.int(), "dense tensor of"),
        (good.numpy().astype(">f4"), "tensor or an array"),
        (good[0], "(n, 32)"),
        (torch.empty(0, 3), "(n, 32)"),
    ):
        refuses(re.escape(words), hide_in_index, vectors, answer.adapter)


@pytest.mark.parametrize("family", ["open_clip ViT", "own with bias"])
def test_the_embeddings_of_a_model(family, answer):
    """A bias is in them. The model itself is not changed by an adapter of embeddings."""
    model, tokenize = tiny(family)
    texts = TextEmbeddings.of(model, tokenize)
    expected = normalize(read_encoder(model, tokenize).embeddings(OTHERS), dim=1)
    assert torch.allclose(texts.hidden(OTHERS), expected, atol=1e-6)
    hidden = hidden_names(texts, "cat")
    assert hidden.adapter.of_embeddings and not answer.adapter.model
    refuses("of embeddings", hidden.apply)
    refuses("backbone differs", compose, {"a": hidden.adapter, "b": answer.adapter})


@pytest.mark.parametrize(
    "broken",
    [
        lambda some: [["x"]] * len(some),
        lambda some: torch.zeros(len(some), D),
        lambda some: torch.ones(1, D),
        lambda some: torch.full((len(some), D), torch.nan),
    ],
)
def test_an_encoder_that_gives_something_else(broken):
    refuses("encode", hidden_names, TextEmbeddings(broken, "broken"), "cat")
    refuses("a name", TextEmbeddings, broken, "")


def test_on_the_command_line(tmp_path, capsys):
    out, cached = tmp_path / "cat.safetensors", tmp_path / "texts.npy"
    folder = open_clip_folder(tmp_path / "model", "ViT")
    more = ["--embeddings", "--no-generic", "--quiet", "--out", str(out)]
    retain = [word for name in OTHERS for word in ("--retain", name)]
    assert cli(["forget", str(folder), "cat", *retain, *more]) == 0, capsys.readouterr().err
    adapter = load_adapter(out)
    assert adapter.of_embeddings
    vectors = normalize(random(3, adapter.right.shape[1]), dim=1).float()
    np.save(cached, vectors.numpy())
    assert cli(["patch", str(out), str(cached), "--out", str(tmp_path / "new.npy")]) == 0
    expected, _ = patch(vectors, torch.eye(vectors.shape[1]), adapter.left, adapter.right)
    assert np.array_equal(np.load(tmp_path / "new.npy"), expected.numpy())
    capsys.readouterr()
    assert cli(["audit", str(out), "--model", str(folder), "--word", "kitten"]) == 0
    assert "cat: 10 paraphrases move" in (said := capsys.readouterr().out) and "  kitten" in said
    other = open_clip_folder(tmp_path / "other", "custom with bias")
    assert cli(["audit", str(out), "--model", str(other)]) == 2
    assert "made for another model" in capsys.readouterr().err
