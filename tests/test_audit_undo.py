"""Attacks on changes whose text is known, beside changes that betray nobody."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clip.bundle import FeatureBundle
from clip.retain import exact_context
from evaluation.audit import undo
from evaluation.audit.case import AuditData, Case, Model, Prompt
from evaluation.audit.undo import Attacker
from forgetting import ForgetProblem, solve_exact
from forgetting.context import ExactSettings
from forgetting.problem import LowRankEdit
from tests.audit_fixtures import exact, planted

W, D = 48, 40


def texts(count: int, seed: int) -> Tensor:
    """Hidden states that share most of their length, as CLIP's do: (count, W), norm about 10."""
    shared = normalize(torch.randn(W, generator=torch.Generator().manual_seed(99)), dim=0)
    own = torch.randn(count, W, generator=torch.Generator().manual_seed(seed))
    return 8 * shared + 6 * normalize(own, dim=1)


def names(classes: int = 8, words: int = 60, seed: int = 0, dataset: str = "Names"):
    """A bundle of texts alone."""
    generator = torch.Generator().manual_seed(7)
    hidden = texts(classes, seed)
    return replace(
        planted(classes, images=0, words=0, dataset=dataset),
        image_features=torch.zeros(0, D),
        class_hidden=hidden,
        forget_hidden=hidden,
        retain_hidden=texts(words, seed + 1),
        neutral_hidden=texts(1, seed + 2),
        text_projection=torch.randn(W, D, generator=generator) / W**0.5,
        classnames=[f"{dataset} {number}" for number in range(classes)],
        retain_names=[f"word {number}" for number in range(words)],
    )


def paper(bundle: FeatureBundle, column: int) -> LowRankEdit:
    h = bundle.forget_hidden[[column]]
    target = normalize(bundle.neutral_hidden @ bundle.text_projection, dim=1)
    hidden = h, bundle.retain_hidden, target
    return solve_exact(ForgetProblem(bundle.text_projection, *hidden, 30.0, 0.3, 1.0, 5, 1.0))


def zeroed(bundle: FeatureBundle, column: int) -> LowRankEdit:
    """The text's own direction taken out of the projection."""
    h = bundle.forget_hidden[[column]]
    return LowRankEdit(h.T / h.square().sum(), -h @ bundle.text_projection)


def subject(bundle: FeatureBundle, columns: list[int], edit: LowRankEdit | None, **more) -> Case:
    data = AuditData(bundle)
    forgotten = [bundle.classnames[column] for column in columns]
    return Case(forgotten[0], forgotten, Model(data, edit or data.before.edit), **more)


def direct(case: Case) -> dict:
    """What the attacker who has the original finds."""
    return undo.measure(case)["attacks"]["original_known"]


@pytest.mark.parametrize("method", [exact, partial(exact, beta=0.0), paper, zeroed])
def test_a_known_text_is_recovered(method):
    bundle = names()
    edit = method(bundle, 3)
    found = direct(subject(bundle, [3], edit))
    assert found["place"] == 1 and found["top"][0] == "Names 3"
    # Negative control: audited for a class that was not forgotten. Any two texts here have a cosine
    # near 0.64, which is not taken for a find.
    hidden = normalize(bundle.forget_hidden, dim=1)
    assert hidden[3] @ hidden[5] > 0.5
    assert direct(subject(bundle, [5], edit))["place"] > 1
    known, case = Attacker(AuditData(bundle)), subject(bundle, [3], edit)
    scores = known.recognise(*undo.change(case))
    assert scores[3] > 0.99 > 0.9 > scores.sort().values[-2]


def test_a_random_change_names_nobody():
    case, generator = subject(names(words=92), [0], None), torch.Generator().manual_seed(0)
    found = []
    for number in range(40):
        left, right = (torch.randn(*n, generator=generator) / 3 for n in ((W, 1), (1, D)))
        name, model = f"Names {number % 8}", Model(case.data, LowRankEdit(left, right))
        found.append(undo.measure(Case(name, [name], model))["attacks"])
    for attack in ("original_known", "alone"):
        places = [attacks[attack]["place"] for attacks in found]
        # Uniform over 100 names: the mean of 40 has a standard deviation of 4.6.
        assert 30 < sum(places) / 40 < 70 and places.count(1) <= 3, attack


@pytest.mark.parametrize("edit", [None, LowRankEdit(torch.zeros(W, 3), torch.zeros(3, D))])
def test_no_change_is_no_find_and_equal_scores_share_the_middle_place(edit):
    bundle = names(words=92)
    found = undo.measure(subject(bundle, [2], edit))
    assert found["attacks"]["original_known"] == {"place": None, "top": []}
    assert found["not_measured"] == ["original_known: the projection is the same"]
    assert found["attacks"]["alone"]["place"] > 1
    folded = replace(bundle, text_projection=torch.eye(W), image_features=torch.zeros(0, W))
    found = undo.measure(subject(folded, [2], None))
    assert 30 < found["attacks"]["alone"]["place"] < 70
    assert any(line.startswith("alone, beside a trained") for line in found["not_measured"])


def test_the_changed_projection_alone_betrays_the_text():
    bundle = names()
    for column in range(8):
        # To its opposite at its own length: nothing that its length could tell.
        case = subject(bundle, [column], exact(bundle, column, beta=1.0))
        assert undo.measure(case)["attacks"]["alone"]["place"] == 1


def test_several_at_once_betray_all():
    bundle = names()
    edit = exact(bundle, 3, 0, 6)
    for columns in ([3, 0, 6], [6, 3, 0], [0, 6, 3]):
        found = direct(subject(bundle, columns, edit))
        assert found["place"] == 1 and set(found["top"][:3]) == {"Names 3", "Names 0", "Names 6"}


@pytest.mark.parametrize(("size", "rank"), [(0.2, 1), (5.0, 2)])
def test_rounding_is_not_rank(size, rank):
    """A published projection is float32, whose rounding reaches every singular value. A singular
    value counts beyond the rounding of both projections."""
    bundle = names()
    bundle = replace(bundle, text_projection=300 * bundle.text_projection)
    first = exact(bundle, 3)
    noise = torch.finfo(torch.float32).eps * 2 * float(bundle.text_projection.norm())
    left = normalize(first.left[:, 0].roll(1).double(), dim=0)
    left, right = size * noise * left[:, None], torch.eye(D)[:1]
    edit = LowRankEdit(torch.cat([first.left, left], 1), torch.cat([first.right, right]))
    case = subject(bundle, [3], edit)
    change = case.after.projection.double() - bundle.text_projection.double()
    assert (torch.linalg.svdvals(change) > 1e-12).sum() > 2
    span, values = undo.change(case)
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
    alone = names(words=0)
    found = undo.measure(subject(alone, [3], zeroed(alone, 3)))
    assert found["attacks"]["original_known"]["place"] == 1 and found["names"] == 8


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
