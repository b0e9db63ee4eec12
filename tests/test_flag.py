"""A flag from names alone: the stated rate, and nothing taken from the encoder."""

import math
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from experiments import flag as measure
from forgetting import Forgotten, ProblemError, TextEmbeddings, forget
from forgetting.flag import flag, none_of_these
from tests.conftest import TOY_CLASSES, refuses, toy_bundle
from tests.encoder_fixtures import tiny
from tests.test_patch import random

D = 1024  # where cosines of random directions spread as CLIP's do, by 0.03
NAMES = normalize(random(200, D, seed=1), dim=1)
CAT, DOG = normalize(random(2, D, seed=2), dim=1)
FEW = "the rate may not hold"


def images(count: int, text: Tensor | None = None, seed: int = 3, weight: float = 0.2) -> Tensor:
    """Of what a text names, or of things that common names name."""
    shown = 0.1 * NAMES[torch.arange(count) % len(NAMES)] if text is None else weight * text
    return normalize(random(count, D, seed=seed) / D**0.5 + shown)


OTHERS = images(2000)


@pytest.mark.parametrize("rate", [0.05, 0.02, 0.01])
@pytest.mark.filterwarnings("error")
def test_the_rate_is_held_on_images_of_other_things(rate):
    scores, flags = flag(torch.cat([images(60, CAT), OTHERS]), CAT, NAMES, rate)
    assert torch.equal(flags, scores >= 1 - rate) and scores.min() >= 0 and scores.max() <= 1
    assert flags[:60].float().mean() > 0.8
    assert rate / 4 < flags[60:].float().mean() < 2 * rate
    # Of another text, one of the same numbers, these are images of other things.
    other = flag(torch.cat([images(60, CAT), OTHERS]), CAT[torch.randperm(D)], NAMES, rate)[1]
    assert other.float().mean() < 2 * rate


def test_order_length_and_kind_of_the_vectors_do_not_matter():
    vectors, order = torch.cat([images(60, CAT), OTHERS[:500]]), torch.randperm(560)
    scores = flag(vectors, CAT, NAMES)[0]
    longer, twice = vectors * (torch.rand(560, 1) + 0.5), torch.stack([3 * CAT, CAT])
    same = flag(longer.double().numpy(), twice, 2 * NAMES)[0]
    assert torch.allclose(same, scores, atol=1e-4)
    assert torch.allclose(flag(vectors[order], CAT, NAMES)[0], scores[order], atol=1e-6)
    assert torch.allclose(flag(vectors.half(), CAT, NAMES.half())[0], scores, atol=1e-2)


def test_few_vectors_and_what_tells_instead_of_them():
    one = images(1, CAT)
    with pytest.warns(UserWarning, match=FEW):
        assert flag(torch.cat([one, OTHERS[:1]]), CAT, NAMES)[1].tolist() == [True, False]
    with pytest.warns(UserWarning, match=FEW):
        assert [len(x) for x in flag(one[:0], CAT, NAMES)] == [0, 0]
    with pytest.warns(UserWarning, match="3.% look like"):
        flag(torch.cat([images(300, CAT), OTHERS[:700]]), CAT, NAMES)
    with pytest.warns(UserWarning, match="2000 images"):
        flag(OTHERS, CAT, NAMES, 1 / 2001)
    eye, score = torch.eye(2), 0.85 * (math.log(99) - 1)  # by texts alone, 1 % score higher
    with pytest.warns(UserWarning, match="0 images"):
        found = flag(eye[:1], eye[0], eye[1:], reference=eye[:0], scale=score)[0]
    assert 0.7 < (1 - float(found)) / 0.01 < 1
    among = flag(OTHERS, CAT, NAMES, reference=OTHERS)[0]
    assert torch.allclose(flag(OTHERS[:1], CAT, NAMES, reference=OTHERS)[0], among[:1], atol=1e-4)
    assert torch.allclose(flag(OTHERS, CAT, NAMES)[0], among)
    assert flag(images(300, CAT), CAT, NAMES, reference=OTHERS)[1].float().mean() > 0.8


@pytest.mark.filterwarnings(f"ignore:{FEW}")
def test_an_index_of_siblings_and_one_with_much_of_the_class():
    """Of the former little is flagged; of the latter more than a tail through all would leave."""
    siblings, weak = images(1000, CAT, weight=0.1), images(700, CAT, weight=0.12)
    assert flag(siblings, CAT, NAMES, 0.01)[1].float().mean() < 0.1
    assert flag(torch.cat([weak, OTHERS[:1300]]), CAT, NAMES, 0.01)[1][:700].float().mean() > 0.6


def test_none_of_these():
    vectors = torch.cat([images(60, CAT), images(60, DOG, seed=4), OTHERS])
    shares, none = none_of_these(vectors, torch.stack([CAT, DOG]), NAMES, 0.01)
    assert none[:120].float().mean() < 0.2 and (~none[120:]).float().mean() < 0.02
    least = 1 - torch.maximum(flag(vectors, CAT, NAMES)[0], flag(vectors, DOG, NAMES)[0])
    assert torch.allclose(shares, (2 * least).clamp(max=1.0))  # two names are two chances to err


@pytest.mark.parametrize(
    ("change", "token"),
    [
        *(({"false_alarms": rate}, "false_alarms") for rate in (0, 1, "1 %")),
        ({"vectors": OTHERS[:, 1:]}, "vectors"),
        ({"vectors": OTHERS * float("nan")}, "vectors holds NaN"),
        ({"vectors": np.zeros((3, D), int)}, "vectors"),
        ({"text": CAT[1:]}, "text"),
        ({"vocabulary": NAMES[:0]}, "vocabulary"),
    ],
)
def test_what_cannot_be_flagged(change, token):
    refuses(token, flag, **{"vectors": OTHERS, "text": CAT, "vocabulary": NAMES} | change)


@pytest.mark.filterwarnings(f"ignore:{FEW}")
@pytest.mark.parametrize("family", ["open_clip ViT", "own with bias"])
def test_what_was_forgotten_is_flagged_in_the_original_space(family, tmp_path, monkeypatch):
    monkeypatch.setattr("forgetting.models.vocabulary.generic_names", lambda: ["a", "bee", "sea"])
    (model, words), alone = tiny(family), {"cache": None, "progress": False}
    before, vectors = {k: x.clone() for k, x in model.state_dict().items()}, random(9, 16, seed=1)
    also = {"Acme Cola": ["acme soda"]}
    listed = {"retain": ["Pepsi", "acme soda"], "protect": ["Fanta"], "templates": ["the {}"]}
    answer = forget(model, words, ["Acme Cola", "Oslo boat"], also, **listed, **alone)
    scores, flags = answer.flag(vectors, 0.2, **alone)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    texts = TextEmbeddings.of(model, words)
    scale = getattr(model, "logit_scale", torch.tensor(100.0).log()).exp().item() / 2
    named = [["the Acme Cola", "the acme soda"], ["the Oslo boat"]]
    common = texts.hidden(["the a", "the bee", "the sea", "the Pepsi", "the Fanta"])
    found = none_of_these(vectors, list(map(texts.hidden, named)), common, 0.2, scale=scale)
    assert torch.allclose(1 - found[0], scores, atol=1e-4) and torch.equal(~found[1], flags)
    assert scores.max() > 0.5 > scores.min()
    answer.save(tmp_path / "a")
    loaded = Forgotten.load(tmp_path / "a")
    refuses("texts=", loaded.flag, vectors)
    assert torch.allclose(loaded.flag(vectors, 0.2, texts=texts, **alone)[0], scores, atol=1e-4)
    with pytest.raises(ProblemError, match="not read by the model"):
        loaded.flag(vectors, texts=TextEmbeddings.of(*tiny(family, seed=1)))
    answer.apply()
    assert torch.equal(answer.flag(vectors, 0.2, **alone)[0], scores)
    refuses("forgotten Acme Cola", loaded.flag, vectors, texts=texts)


def test_what_is_caught_is_measured(features, tmp_path):
    table = measure.main(["--features", str(features), "--classes", "2", "--out", str(tmp_path)])
    assert len(table) == 2 * 2 * 4 and (tmp_path / "flag.csv").is_file()
    alone = table["images"].str.startswith("alone")
    assert table.loc[alone, "false 1.0%"].isna().all() and table["caught 1.0%"].notna().all()
    assert (table["caught 0.5%"] <= table["caught 1.0%"]).all()
    assert table.loc[~alone, "false 1.0%"].between(0, 20).all()


def test_neither_the_class_nor_one_that_means_the_same_is_taken_for_another():
    bundles = {name: toy_bundle(name) for name in TOY_CLASSES}
    bundles["ToyTools"].forget_hidden[0] = bundles["ToyAnimals"].forget_hidden[0]
    index = measure.Index(bundles)
    with mock.patch.object(measure, "flag", wraps=flag) as spy:
        list(measure.rows_of(index, "ToyAnimals", ["cat"], 50.0))
    images, reference = spy.call_args_list[1].args[0], spy.call_args_list[3].kwargs["reference"]
    assert torch.equal(images, index.images[index.labels != 6])
    assert torch.equal(reference, index.images[index.labels > 6])
