"""Attacks on changes whose text is known, beside changes that betray nobody."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle, load_bundle
from clip.retain import retained
from engine.config import settings
from evaluation.audit import attacker as knowledge
from evaluation.audit import undo
from evaluation.audit.attacker import attacker
from evaluation.audit.case import Case, Common, Model, Prompt
from evaluation.zero_shot import Factors
from forgetting import ForgetProblem, Ridge, opposite_target, solve_constrained, solve_exact
from tests.audit_fixtures import EDGES, edge
from tests.conftest import REPOSITORY

REAL_CLIP = REPOSITORY.parent / "shared" / "real_clip"
ATTACKS = ("original_known", "two_adapters", "alone")
W, D = 48, 40


def texts(count: int, seed: int) -> Tensor:
    """Hidden states that share most of their length, as CLIP's do: (count, W), norm about 10."""
    shared = normalize(torch.randn(W, generator=torch.Generator().manual_seed(99)), dim=0)
    own = torch.randn(count, W, generator=torch.Generator().manual_seed(seed))
    return 8 * shared + 6 * normalize(own, dim=1)


def names(classes: int = 8, words: int = 60, seed: int = 0, dataset: str = "Names"):
    """A bundle of texts alone."""
    generator = torch.Generator().manual_seed(7)
    return FeatureBundle(
        image_features=torch.zeros(0, D),
        labels=torch.zeros(0, dtype=torch.int64),
        class_hidden=texts(classes, seed),
        forget_hidden=texts(classes, seed),
        retain_hidden=texts(words, seed + 1),
        neutral_hidden=texts(1, seed + 2),
        text_projection=torch.randn(W, D, generator=generator) / W**0.5,
        backbone="planted",
        weights="planted",
        dataset=dataset,
        split="test",
        template="{}",
        classnames=[f"{dataset} {number}" for number in range(classes)],
        retain_names=[f"word {number}" for number in range(words)],
    )


def names_of(bundle: FeatureBundle, columns: list[int]) -> list[str]:
    return [bundle.classnames[column] for column in columns]


def constrained(bundle: FeatureBundle, columns: list[int], beta: float = 0.2) -> Factors:
    """The constrained form at its defaults."""
    kept = retained(settings("ForgetExact"), bundle, [])
    h = bundle.forget_hidden.double()[columns]
    target = opposite_target(h, bundle.text_projection.double(), beta)
    gone = [row for row, name in enumerate(kept.names.names) if name in names_of(bundle, columns)]
    solution = solve_constrained(
        *(kept.ridge, h, target - h @ bundle.text_projection.double()),
        *(kept.names.rows[gone], kept.names.shares[gone]),
    )
    return solution.left.float(), solution.right.float()


def paper(bundle: FeatureBundle, column: int) -> Factors:
    h = bundle.forget_hidden[column : column + 1]
    target = normalize(bundle.neutral_hidden @ bundle.text_projection, dim=1)
    problem = ForgetProblem(
        bundle.text_projection, h, bundle.retain_hidden, target, 30.0, 0.3, 1.0, 5, 1.0
    )
    solution = solve_exact(problem)
    return solution.left.float(), solution.right.float()


def zeroed(bundle: FeatureBundle, column: int) -> Factors:
    """The text's own direction taken out of the projection."""
    h = bundle.forget_hidden[column : column + 1]
    return h.T / h.square().sum(), -h @ bundle.text_projection


def chance(seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(W, 1, generator=generator) / 3, torch.randn(1, D, generator=generator)


def asked(bundle: FeatureBundle, columns: list[int], factors: Factors | None, **options) -> Case:
    forgotten = [bundle.classnames[column] for column in columns]
    others, seed = options.pop("others", {}), options.pop("seed", 0)
    model = Model(Common(bundle, others, seed), factors)
    return Case(forgotten[0], forgotten, model, **options)


@pytest.mark.parametrize(
    "factors",
    [
        lambda b: constrained(b, [3]),
        lambda b: constrained(b, [3], beta=0.0),
        lambda b: paper(b, 3),
        lambda b: zeroed(b, 3),
    ],
    ids=["constrained", "to zero", "paper", "zeroed"],
)
def test_a_known_text_is_recovered(factors):
    bundle = names()
    found = undo.measure(asked(bundle, [3], factors(bundle)))["attacks"]["original_known"]
    assert found["rank"] == found["rank_expected"] == 1
    assert found["text_cosine"] > 0.99
    assert found["place"] == 1 and found["places"] == [1] and found["top"][0] == "Names 3"


def test_another_text_is_not_what_was_recovered():
    """Negative control: the same change, asked about a class that was not forgotten."""
    bundle = names()
    case = asked(bundle, [3], constrained(bundle, [3]))
    other = undo.measure(replace(case, name="Names 5", forgotten=["Names 5"]))
    found = other["attacks"]["original_known"]
    assert found["text_cosine"] < 0.6 and found["place"] > 1 and found["top"][0] == "Names 3"


def test_what_all_texts_share_is_not_taken_for_a_find():
    """Any two texts here have a cosine near 0.64; the recovered one is as near to no other."""
    bundle = names()
    hidden = normalize(bundle.forget_hidden, dim=1)
    assert hidden[3] @ hidden[5] > 0.5
    case = asked(bundle, [5], constrained(bundle, [3]))
    assert undo.measure(case)["attacks"]["original_known"]["text_cosine"] < 0.4


def test_a_change_by_chance_names_nobody():
    bundle = names(words=92)
    for attack in ("original_known", "alone"):
        places = torch.tensor(
            [
                undo.measure(asked(bundle, [seed % 8], chance(seed)))["attacks"][attack]["place"]
                for seed in range(40)
            ]
        )
        # Uniform over 100 names: the mean of 40 has a standard deviation of 4.6.
        assert 30 < places.double().mean() < 70, attack
        assert (places == 1).sum() <= 3, attack


@pytest.mark.parametrize("factors", [None, (torch.zeros(W, 3), torch.zeros(3, D))])
def test_no_change_is_no_find(factors):
    found = undo.measure(asked(names(), [2], factors))
    direct = found["attacks"]["original_known"]
    assert direct["rank"] == 0 and direct["place"] is direct["text_cosine"] is None
    assert direct["places"] == [] and direct["top"] == []
    assert "original_known: the projection is the original's to rounding" in found["not_measured"]
    assert found["attacks"]["alone"]["place"] > 1


def test_equal_scores_share_the_middle_place():
    bundle = names(words=92)
    bundle = replace(bundle, text_projection=torch.eye(W))
    bundle = replace(bundle, image_features=torch.zeros(0, W))
    found = undo.measure(asked(bundle, [2], None))
    assert 30 < found["attacks"]["alone"]["place"] < 70
    assert any(line.startswith("alone, beside a trained") for line in found["not_measured"])


def test_the_changed_projection_alone_betrays_the_text():
    bundle = names()
    for column in range(8):
        # Turned round at its own length: nothing that its length could tell.
        case = asked(bundle, [column], constrained(bundle, [column], beta=1.0))
        found = undo.measure(case)["attacks"]["alone"]
        assert found["place"] == 1 and found["rank"] is found["text_cosine"] is None


def test_two_adapters_betray_both():
    bundle = names()
    case = asked(bundle, [3], constrained(bundle, [3]))
    found = undo.measure(replace(case, stranger=(["Names 6"], constrained(bundle, [6]))))
    both = found["attacks"]["two_adapters"]
    assert both["rank"] == both["rank_expected"] == 2 and both["text_cosine"] > 0.99
    assert both["place"] == 1 and both["places"] == [1, 1]
    assert set(both["top"][:2]) == {"Names 3", "Names 6"}


def test_without_a_second_adapter_it_is_said():
    bundle = names()
    found = undo.measure(asked(bundle, [3], constrained(bundle, [3])))
    assert "two_adapters: no second adapter of the same run" in found["not_measured"]
    assert found["attacks"]["two_adapters"] == undo.NOTHING


def test_several_at_once():
    bundle = names()
    found = undo.measure(asked(bundle, [3, 0, 6], constrained(bundle, [3, 0, 6])))
    direct = found["attacks"]["original_known"]
    assert direct["rank"] == 3 and direct["place"] == 1 and direct["places"] == [1, 1, 1]
    assert set(direct["top"][:3]) == {"Names 3", "Names 0", "Names 6"}


def test_rounding_is_not_rank():
    """A published projection is float32: its rounding reaches every singular value."""
    bundle = names()
    large = replace(bundle, text_projection=300 * bundle.text_projection)
    left, right = constrained(bundle, [3])
    model = Model(Common(large), (left, right))
    difference = model.projection.double() - large.text_projection.double()
    assert (torch.linalg.svdvals(difference) > 1e-12).sum() > 1
    found = undo.measure(asked(large, [3], (left, right)))["attacks"]["original_known"]
    assert found["rank"] == 1 and found["place"] == 1


@pytest.mark.parametrize(("kind", "place"), [("retained", 1), ("synonym", 1), ("hypernym", 2)])
def test_other_words_for_the_class_are_no_rivals(kind, place):
    """The class was forgotten by a word that is on the list too, beside its own name; only a word
    for something else stands before it."""
    bundle = names()
    bundle.retain_hidden[4] = bundle.forget_hidden[3] + 0.2 * bundle.retain_hidden[5]
    word = bundle.retain_hidden[4:5]
    factors = word.T / word.square().sum(), -word @ bundle.text_projection
    prompt = Prompt("Word  4", kind, False, word[0])
    found = undo.measure(asked(bundle, [3], factors, prompts=[prompt]))["attacks"]["original_known"]
    assert found["top"][:2] == ["word 4", "Names 3"] and found["place"] == place


def test_the_texts_that_were_used_are_looked_for():
    bundle = names()
    used = Prompt("other words", "template", True, bundle.forget_hidden[6])
    case = asked(bundle, [3], constrained(bundle, [6]), prompts=[used])
    assert undo.measure(case)["attacks"]["original_known"]["text_cosine"] > 0.99


# --- what the attacker knows


def test_the_list_of_names():
    bundle, other = names(), names(classes=5, seed=20, dataset="Others")
    bundle = replace(bundle, retain_names=["names_1", *bundle.retain_names[1:]])
    other = replace(other, classnames=["word 1", "WORD  2", *other.classnames[2:]])
    known = attacker(Common(bundle, {"Others": other}))
    assert known.names[:8] == bundle.classnames
    assert known.names[8:11] == ["word 1", "word 2", "word 3"]
    assert known.names[-3:] == ["Others 2", "Others 3", "Others 4"] and len(known.names) == 70
    assert torch.equal(known.hidden[8].float(), bundle.retain_hidden[1])
    assert torch.equal(known.hidden[-1].float(), other.forget_hidden[4])
    assert known.find("NAMES_1") == 1 and known.find("nobody") is None


def test_a_long_list_is_drawn_the_same_way_for_a_seed(monkeypatch):
    monkeypatch.setattr(knowledge, "LIMIT", 30)
    bundle = names()
    known = attacker(Common(bundle))
    assert len(known.names) == 30 and known.names[:8] == bundle.classnames
    assert len(set(known.names)) == 30
    assert attacker(Common(names())).names == known.names
    assert attacker(Common(bundle, seed=1)).names != known.names
    # Every class of the set stays on the list, however many there are.
    monkeypatch.setattr(knowledge, "LIMIT", 4)
    assert attacker(Common(names())).names == bundle.classnames


def test_the_constants_are_the_published_ones():
    bundle = names()
    known, kept = attacker(Common(bundle)), retained(settings("ForgetExact"), bundle, [])
    assert torch.equal(known.ridge.gram, kept.ridge.gram) and known.ridge.mu == kept.ridge.mu
    assert known.own_share == pytest.approx(1 / (2 * len(bundle.classnames)))  # name and prompt
    # Of a set and a backbone that the paper does not have, and of one that it has.
    assert known.ratio == pytest.approx(1.0 * 5 / 1.0 / 0.3)
    cars = replace(bundle, dataset="StanfordCars", backbone="RN50")
    assert attacker(Common(cars)).ratio == pytest.approx(5 / 0.4)


@pytest.mark.parametrize("name", EDGES)
def test_edges(name):
    case = edge(name)
    found = undo.measure(case)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == {"names", "attacks", "not_measured"}
    assert tuple(found["attacks"]) == ATTACKS
    assert all(set(entry) == set(undo.NOTHING) for entry in found["attacks"].values())
    assert found["attacks"]["original_known"]["places"] == [1] * len(case.forgotten)
    assert found == undo.measure(edge(name))


def test_no_vocabulary():
    bundle = names(words=0)
    found = undo.measure(asked(bundle, [3], zeroed(bundle, 3)))
    assert found["attacks"]["original_known"]["place"] == 1 and found["names"] == 8


@pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="needs the folder shared/real_clip")
def test_a_trained_projection():
    """ViT-B/16: of 999 names, the one whose text was turned round."""
    bundle = load_bundle(REAL_CLIP, "ViT-B/16", "ImageNetText")
    gram = bundle.forget_hidden.double().T @ bundle.forget_hidden.double() / 1000
    ridge = Ridge(gram, 5e-6 * float(gram.trace()))
    w = bundle.text_projection.double()
    for column in (7, 500):
        h = bundle.forget_hidden[column : column + 1].double()
        share = torch.tensor([1 / 1000], dtype=torch.float64)
        solution = solve_constrained(ridge, h, opposite_target(h, w, 0.2) - h @ w, h, share)
        factors = solution.left.float(), solution.right.float()
        found = undo.measure(asked(bundle, [column], factors))["attacks"]
        assert found["original_known"]["place"] == found["alone"]["place"] == 1
        assert found["original_known"]["text_cosine"] > 0.99
