"""Attacks on changes whose text is known, beside changes that betray nobody."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle, load_bundle
from clip.retain import exact_context
from evaluation.audit import undo
from evaluation.audit.case import AuditData, Case, Model, Prompt
from evaluation.audit.undo import Attacker
from forgetting import ForgetProblem, Ridge, solve_constrained, solve_exact
from forgetting.context import ExactSettings
from forgetting.problem import LowRankEdit
from tests.conftest import REPOSITORY

REAL_CLIP = REPOSITORY.parent / "shared" / "real_clip"
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


def exact(bundle: FeatureBundle, columns: list[int], beta: float = 0.2) -> LowRankEdit:
    """The constrained form at its defaults."""
    context = exact_context(ExactSettings(), bundle)
    retain, h = context.retain, bundle.forget_hidden.double()[columns]
    e = context.embed(h)
    classes = [bundle.classnames[column] for column in columns]
    excluded = torch.tensor([name in classes for name in retain.names])
    return solve_constrained(context.ridge, h, -(1 + beta) * e, excluded)


def paper(bundle: FeatureBundle, column: int) -> LowRankEdit:
    h = bundle.forget_hidden[[column]]
    target = normalize(bundle.neutral_hidden @ bundle.text_projection, dim=1)
    hidden = h, bundle.retain_hidden, target
    return solve_exact(ForgetProblem(bundle.text_projection, *hidden, 30.0, 0.3, 1.0, 5, 1.0))


def zeroed(bundle: FeatureBundle, column: int) -> LowRankEdit:
    """The text's own direction taken out of the projection."""
    h = bundle.forget_hidden[[column]]
    return LowRankEdit(h.T / h.square().sum(), -h @ bundle.text_projection)


def random_edit(seed: int) -> LowRankEdit:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(W, 1, generator=generator) / 3
    return LowRankEdit(left, torch.randn(1, D, generator=generator))


def subject(bundle: FeatureBundle, columns: list[int], edit: LowRankEdit | None, **more) -> Case:
    data = AuditData(bundle)
    forgotten = [bundle.classnames[column] for column in columns]
    return Case(forgotten[0], forgotten, Model(data, edit or data.before.edit), **more)


def direct(case: Case) -> dict:
    """What the attacker who has the original finds."""
    return undo.measure(case)["attacks"]["original_known"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda b: exact(b, [3]),
        lambda b: exact(b, [3], 0.0),
        lambda b: paper(b, 3),
        lambda b: zeroed(b, 3),
    ],
    ids=["exact", "to zero", "paper", "zeroed"],
)
def test_a_known_text_is_recovered(edit):
    bundle = names()
    edit = edit(bundle)
    found = direct(subject(bundle, [3], edit))
    assert found["place"] == 1 and found["top"][0] == "Names 3"
    # Negative control: audited for a class that was not forgotten. Any two texts here have a cosine
    # near 0.64, which is not taken for a find.
    hidden = normalize(bundle.forget_hidden, dim=1)
    assert hidden[3] @ hidden[5] > 0.5
    assert direct(subject(bundle, [5], edit))["place"] > 1
    known, case = Attacker(AuditData(bundle)), subject(bundle, [3], edit)
    scores = known.recognise(*undo.difference(case.after, case.before))
    assert scores[3] > 0.99 > 0.9 > scores.sort().values[-2]


def test_a_random_change_names_nobody():
    case = subject(names(words=92), [0], None)
    found = []
    for seed in range(40):
        name, model = f"Names {seed % 8}", Model(case.data, random_edit(seed))
        found.append(undo.measure(Case(name, [name], model))["attacks"])
    for attack in ("original_known", "alone"):
        places = [attacks[attack]["place"] for attacks in found]
        # Uniform over 100 names: the mean of 40 has a standard deviation of 4.6.
        assert 30 < sum(places) / 40 < 70 and places.count(1) <= 3, attack


@pytest.mark.parametrize("edit", [None, LowRankEdit(torch.zeros(W, 3), torch.zeros(3, D))])
def test_no_change_is_no_find(edit):
    found = undo.measure(subject(names(), [2], edit))
    for attack in ("original_known", "two_adapters"):
        assert found["attacks"][attack] == {"place": None, "top": []}
        assert any(line.startswith(attack) for line in found["not_measured"])
    assert found["attacks"]["alone"]["place"] > 1


def test_equal_scores_share_the_middle_place():
    bundle = names(words=92)
    folded = replace(bundle, text_projection=torch.eye(W), image_features=torch.zeros(0, W))
    found = undo.measure(subject(folded, [2], None))
    assert 30 < found["attacks"]["alone"]["place"] < 70
    assert any(line.startswith("alone, beside a trained") for line in found["not_measured"])


def test_the_changed_projection_alone_betrays_the_text():
    bundle = names()
    for column in range(8):
        # To its opposite at its own length: nothing that its length could tell.
        case = subject(bundle, [column], exact(bundle, [column], beta=1.0))
        assert undo.measure(case)["attacks"]["alone"]["place"] == 1


def test_two_adapters_betray_both():
    bundle = names()
    edits = {column: exact(bundle, [column]) for column in (3, 6)}
    for one, other in ((3, 6), (6, 3)):  # the other adapter's name is no rival
        case = subject(bundle, [one], edits[one], stranger=([f"Names {other}"], edits[other]))
        found = undo.measure(case)["attacks"]["two_adapters"]
        assert found["place"] == 1 and set(found["top"][:2]) == {"Names 3", "Names 6"}


def test_several_at_once():
    bundle = names()
    for columns in ([3, 0, 6], [6, 3, 0], [0, 6, 3]):
        found = direct(subject(bundle, columns, exact(bundle, columns)))
        assert found["place"] == 1
        assert set(found["top"][:3]) == {"Names 3", "Names 0", "Names 6"}


@pytest.mark.parametrize(("size", "rank"), [(0.2, 1), (5.0, 2)])
def test_rounding_is_not_rank(size, rank):
    """A published projection is float32, whose rounding reaches every singular value. A singular
    value counts beyond the rounding of both projections."""
    bundle = names()
    bundle = replace(bundle, text_projection=300 * bundle.text_projection)
    first = exact(bundle, [3])
    noise = torch.finfo(torch.float32).eps * 2 * float(bundle.text_projection.norm())
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(n, 1, generator=generator).double() for n in (W, D))
    left -= first.left @ torch.linalg.lstsq(first.left, left).solution
    left, right = normalize(left, dim=0), normalize(right, dim=0).T
    edit = LowRankEdit(
        torch.cat([first.left, size * noise * left], 1), torch.cat([first.right, right])
    )
    case = subject(bundle, [3], edit)
    change = case.after.projection.double() - bundle.text_projection.double()
    assert (torch.linalg.svdvals(change) > 1e-12).sum() > 2
    span, values = undo.difference(case.after, case.before)
    assert len(values) == span.shape[1] == rank
    assert rank == 2 or direct(case)["place"] == 1


@pytest.mark.parametrize(("kind", "place"), [("retained", 1), ("synonym", 1), ("hypernym", 2)])
def test_other_words_for_the_class_are_no_rivals(kind, place):
    """The class was forgotten by a word that is on the list too, beside its own name; only a word
    for something else stands before it."""
    bundle = names()
    bundle.retain_hidden[4] = bundle.forget_hidden[3] + 0.2 * bundle.retain_hidden[5]
    word = bundle.retain_hidden[4:5]
    edit = LowRankEdit(word.T / word.square().sum(), -word @ bundle.text_projection)
    prompt = Prompt("Word  4", kind, False, word[0])
    found = direct(subject(bundle, [3], edit, prompts=[prompt]))
    assert found["top"][:2] == ["word 4", "Names 3"] and found["place"] == place


# --- what the attacker knows


def test_the_list_of_names():
    bundle, other = names(), names(classes=5, seed=20, dataset="Others")
    bundle = replace(bundle, retain_names=["names_1", *bundle.retain_names[1:]])
    other = replace(other, classnames=["word 1", "WORD  2", *other.classnames[2:]])
    known = Attacker(AuditData(bundle, {"Others": other}))
    assert known.names[:8] == bundle.classnames
    assert known.names[8:11] == ["word 1", "word 2", "word 3"]
    assert known.names[-3:] == ["Others 2", "Others 3", "Others 4"] and len(known.names) == 70
    assert known.rows["names 1"] == 1 and "nobody" not in known.rows


def test_a_long_list_is_drawn_the_same_way_for_a_seed(monkeypatch):
    monkeypatch.setattr(undo, "LIMIT", 30)
    bundle = names()
    known = Attacker(AuditData(bundle))
    assert len(set(known.names)) == len(known.names) == 30
    assert known.names[:8] == bundle.classnames
    assert Attacker(AuditData(names())).names == known.names
    assert Attacker(AuditData(bundle, seed=1)).names != known.names
    # Every class of the set stays on the list, however many there are.
    monkeypatch.setattr(undo, "LIMIT", 4)
    assert Attacker(AuditData(names())).names == bundle.classnames


def test_the_constants_are_the_published_ones():
    bundle = names()
    known, kept = Attacker(AuditData(bundle)), exact_context(ExactSettings(), bundle)
    assert torch.equal(known.ridge.gram, kept.ridge.gram) and known.ridge.mu == kept.ridge.mu
    # Of a set and a backbone that the paper does not have, and of one that it has.
    assert known.ratio == pytest.approx(1.0 * 5 / 1.0 / 0.3)
    cars = replace(bundle, dataset="StanfordCars", backbone="RN50")
    assert Attacker(AuditData(cars)).ratio == pytest.approx(5 / 0.4)
    # What the other names do not explain of one, by ridge regression of its text on theirs.
    h = torch.cat([bundle.forget_hidden, bundle.retain_hidden]).double()
    gram = h.T @ h
    others = gram - torch.outer(h[3], h[3]) + undo.EXPLAINED * gram.trace() / W * torch.eye(W)
    unexplained = normalize(torch.linalg.solve(others, h[3]), dim=0)
    assert torch.allclose(known.unexplained[3], unexplained)


def test_without_a_vocabulary():
    bundle = names(words=0)
    found = undo.measure(subject(bundle, [3], zeroed(bundle, 3)))
    assert found["attacks"]["original_known"]["place"] == 1 and found["names"] == 8


@pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="needs the folder shared/real_clip")
def test_a_trained_projection():
    """ViT-B/16: of 999 names, the one whose text was sent to its opposite."""
    bundle = load_bundle(REAL_CLIP, "ViT-B/16", "ImageNetText")
    names = bundle.forget_hidden
    mu = 5e-6 * float(names.square().sum(dim=1).mean())
    ridge = Ridge(names, mu, torch.full((len(names),), 1 / len(names)))
    w = bundle.text_projection.double()
    for column in (7, 500):
        h = bundle.forget_hidden[[column]].double()
        own = torch.arange(len(names)) == column
        edit = solve_constrained(ridge, h, -1.2 * h @ w, own)
        found = undo.measure(subject(bundle, [column], edit))["attacks"]
        assert found["original_known"]["place"] == found["alone"]["place"] == 1
