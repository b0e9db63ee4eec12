"""What text alone says of an edit, and the ridge that is chosen by it, against plain arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.displacement import (
    ClassifierTexts,
    Forecast,
    Margin,
    displacement_along,
    displacement_ratios,
    rounding_error,
)
from forgetting.edited_texts import EmbeddedTexts
from forgetting.errors import ProblemError
from forgetting.problem import LowRankEdit
from forgetting.retain import Group, RetainSet, key
from forgetting.ridge import MOST_SLACK, NEAR_BEST, RIDGES, SLACK, TOLERATED, choose_ridge
from forgetting.targets import TargetInputs
from tests.solver_fixtures import normal

W, D = 8, 6


def retain_set(seed: int = 0, near: float = 0.3) -> RetainSet:
    """Ten single names, and four names in two prompts each."""
    first = normal(4, W, seed=seed)
    both = torch.cat([first, first + near * normal(4, W, seed=seed + 1)])
    words, names = normal(10, W, seed=seed + 2), [f"word {i}" for i in range(10)]
    own = Group([*"abcd"] * 2, both, 1.0, prompt_variants=True)
    return RetainSet({"own": own, "words": Group(names, words, 0.3, limit_displacement=False)})


def delta(gram: Tensor, mu: float, h: Tensor, d: Tensor) -> Tensor:
    """The optimum by its formula."""
    inverse = torch.linalg.inv(gram + mu * torch.eye(W, dtype=torch.float64))
    return inverse @ h.T @ torch.linalg.inv(h @ inverse @ h.T) @ d


def gram_of(retain: RetainSet, stay: Tensor) -> Tensor:
    return retain.rows[stay].T @ (retain.name_weights[stay, None] * retain.rows[stay])


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), texts=st.integers(1, 2), place=st.integers(0, 17))
def test_ratios_against_brute_force(seed, texts, place):
    retain = retain_set(seed)
    ridge = retain.ridge(0.05)
    h, d = normal(texts, W, seed=seed + 3), normal(texts, D, seed=seed + 4)
    excluded = torch.zeros(1, 18, dtype=torch.bool)
    excluded[0, [1, 5, 12]] = True  # one name in both prompts, and a single one
    owner = torch.zeros(texts, dtype=torch.int64)
    listed = displacement_ratios(ridge, h, d, owner, excluded)
    unlisted = displacement_ratios(ridge, h, d, owner, excluded, retain.variant_of)
    unit = d.square().sum(dim=1).mean().sqrt()

    def moved(stay: Tensor) -> float:
        change = delta(gram_of(retain, stay), ridge.mu, h, d)
        return float((retain.rows[place] @ change).norm() / unit)

    stay = ~excluded[0]
    assert float(listed[0, place]) == pytest.approx(moved(stay), rel=1e-8)
    without = stay.clone()
    without[[place, int(retain.variant_of[place])]] = False
    if stay[place]:
        assert float(unlisted[0, place]) == pytest.approx(moved(without), rel=1e-8)
        assert moved(without) != pytest.approx(moved(stay), rel=1e-6)  # the control


def test_a_text_moves_along_itself_and_an_orthogonal_one_does_not():
    left, right, text = normal(W), normal(1, D, seed=1), normal(W, seed=2)
    still = text - (text @ left) / (left @ left) * left
    others = torch.stack([text, text / 2, still])
    ratios = displacement_along(LowRankEdit(left[:, None], right), text, others)
    assert ratios.tolist() == pytest.approx([1, 0.5, 0], abs=1e-9)


def test_affected_names_and_margins_by_plain_arithmetic():
    """Of edits of rank 1 and 2, together."""
    hidden, w = normal(7, W, seed=1), normal(W, D, seed=2)
    edits = [LowRankEdit(normal(W, r, seed=3), 0.2 * normal(r, D, seed=4)) for r in (1, 2)]
    texts = ClassifierTexts([*"abcdefg"], EmbeddedTexts(hidden, hidden @ w), {"b": 1}, 5)
    moved, forgotten = texts.texts.edited(edits), [[1], [1, 3]]
    before = hidden @ w
    for edit, own, both in zip(edits, forgotten, moved, strict=True):
        names, margins = texts.affected(both, own), texts.margins(both, own)
        after = before + hidden @ edit.delta
        loss = 1 - torch.cosine_similarity(before, after, dim=1)
        loss[own] = -1
        assert [x.name for x in names] == ["abcdefg"[i] for i in loss.argsort(descending=True)[:5]]
        for name in names:
            row = "abcdefg".index(name.name)
            assert name.cosine_loss == pytest.approx(float(loss[row]))
            way = (hidden @ edit.delta).norm(dim=1)
            assert name.displacement == pytest.approx(float(way[row] / way[own].mean()))
            near = torch.cosine_similarity(before[row : row + 1], before, dim=1)
            near[row] = -1
            assert name.margin == pytest.approx(float(1 - near.max()))
            assert name.likely_misclassified == (name.cosine_loss > name.margin)
        others = [i for i in range(5) if i not in own]
        for row, one in zip(own, margins, strict=True):
            now = torch.cosine_similarity(before[row : row + 1], after[:5], dim=1)
            assert one.margin == pytest.approx(float(now[others].max() - now[row]))
            was = torch.cosine_similarity(before[row : row + 1], before[:5], dim=1)
            assert one.gap == pytest.approx(float(1 - was[others].max()))
    # Among fewer names than are shown, those that are left.
    few = ClassifierTexts([*"abc"], EmbeddedTexts(hidden[:3], hidden[:3] @ w), {}, 3)
    assert {x.name for x in few.affected(few.texts.edited(edits)[0], [1])} == {"a", "c"}


def test_without_another_class_there_is_no_margin():
    hidden, w = normal(1, W), normal(W, D, seed=2)
    texts = ClassifierTexts(["a"], EmbeddedTexts(hidden, hidden @ w), {"a": 0}, 1)
    moved = texts.texts.edited([LowRankEdit(normal(W, 1), normal(1, D))])
    assert texts.margins(moved[0], [0]) == [(None, None)] and texts.affected(moved[0], [0]) == []


def of_own(retain: RetainSet) -> tuple[Tensor, Tensor]:
    """The four names of two prompts, and what is excluded with each."""
    excluded = torch.zeros(4, 18, dtype=torch.bool)
    for i in range(4):
        excluded[i, [i, i + 4]] = True
    return retain.rows[:4], excluded


def displacements(retain: RetainSet, w: Tensor, ridge: float) -> tuple[float, float]:
    """What the rule compares: how far listed names move, in distances to their nearest neighbour,
    and how far unlisted ones would."""
    likely, excluded = of_own(retain)
    own = retain.groups["own"].rows @ w
    apart = torch.cdist(own, own)
    apart[torch.eye(8).bool() | torch.eye(8).bool().roll(4, dims=1)] = torch.inf
    apart = apart.amin(dim=1)
    apart = apart.clamp_min(float(apart.median()) / 4)
    mu, listed, unlisted = ridge * retain.squared_length, [], []
    for h, gone in zip(likely, excluded, strict=True):
        unit = torch.eye(1, dtype=torch.float64)
        ratios = (retain.rows @ delta(gram_of(retain, ~gone), mu, h[None], unit))[:, 0]
        far = ratios[:8] * float((h @ w).norm()) / apart
        listed.append(float(far[~gone[:8]].square().mean().sqrt()))
        without = torch.full((18,), torch.nan, dtype=torch.float64)
        for i in (~gone).nonzero()[:, 0].tolist():
            stay = ~gone
            stay[[i, int(retain.variant_of[i])]] = False
            without[i] = (retain.rows[i] @ delta(gram_of(retain, stay), mu, h[None], unit))[0]
        unlisted.append([part.square().nanmean() for part in without.split([8, 10])])
    squares = torch.tensor(unlisted).mean(dim=0)
    return sum(listed) / len(listed), float(squares.mean().sqrt())


@pytest.mark.parametrize("tolerated", [1e9, TOLERATED])
@pytest.mark.parametrize("limit", [0.05, 0.15, 0.19, 1.0])
@pytest.mark.parametrize("near", [0.3, 0.02])
def test_the_ridge_by_plain_arithmetic(limit, tolerated, near, monkeypatch):
    """The largest within the limit, or within what SLACK allows; no smaller than the smallest that
    is about as good for unlisted names as any, if they would move far."""
    assert (SLACK, MOST_SLACK, NEAR_BEST, TOLERATED) == (1.5, 0.1, 1.1, 0.15)
    monkeypatch.setattr("forgetting.ridge.TOLERATED", tolerated)
    retain, w = retain_set(3, near), normal(W, D, seed=3)
    listed, unlisted = zip(*(displacements(retain, w, ridge) for ridge in RIDGES), strict=True)
    least = listed[0]
    fits = [(x + least) / 2 <= limit or x <= min(SLACK * least, MOST_SLACK) for x in listed]
    largest = max((i for i, fit in enumerate(fits) if fit), default=0)
    good = [x <= max(tolerated, NEAR_BEST * min(unlisted)) for x in unlisted]
    wanted = largest if unlisted[largest] <= tolerated else max(largest, good.index(True))
    assert choose_ridge(retain, w, *of_own(retain), limit) == RIDGES[wanted]


def test_a_group_without_a_limit_does_not_hold_the_ridge_back():
    rows, w = normal(12, W, seed=1), normal(W, D, seed=2)
    likely, excluded = rows[:2], torch.eye(2, 12).bool()

    def ridge(limit_displacement: bool) -> float:
        group = Group([*"abcdefghijkl"], rows, 1.0, limit_displacement=limit_displacement)
        return choose_ridge(RetainSet({"a": group}), w, likely, excluded, 1e-3)

    assert ridge(False) == RIDGES[-1] > ridge(True)


def test_names_are_the_same_in_any_spelling():
    assert key("Sea_Horse") == key(" sea  horse ") != key("seahorse")
    retain = RetainSet({"a": Group(["sea_horse", "sea  horse", "Sea Horse", "seal"], normal(4, W))})
    mask = retain.excluded([{"SEA HORSE"}], normal(1, W), torch.zeros(1, dtype=torch.int64))
    assert retain.named(mask[0]) == ["Sea Horse", "sea  horse", "sea_horse"]


def test_similar_names_are_excluded_but_those_of_a_list():
    """At most as many for each text, the nearest."""
    text = normal(1, W)
    near = text + 0.01 * torch.arange(1, 6)[:, None] * normal(5, W, seed=1)
    words = [f"near {i}" for i in range(5)]
    groups = {
        "own": Group(["own"], near[:1], exclude_similar=False),
        "words": Group([*words, "far"], torch.cat([near, -text])),
    }
    owner = torch.zeros(1, dtype=torch.int64)

    def excluded(similarity: float, most: int | None = None) -> list[str]:
        retain = RetainSet(groups, similarity, max_similar=most)
        return retain.named(retain.excluded([()], text, owner)[0])

    assert excluded(0.9) == words and excluded(1.0) == []
    assert excluded(0.9, 2) == words[:2]
    assert excluded(-2.0, None) == ["far", *words]


def test_the_gram_matrix_weighs_groups():
    rows, w, b = normal(6, W), normal(W, D, seed=1), normal(D, seed=2)
    groups = {"a": Group([*"ab"], rows[:2], 3.0), "b": Group([*"cdef"], rows[2:])}
    retain = RetainSet(groups | {"none": Group([], rows[:0])})
    weights = torch.tensor([1.5, 1.5, 1, 1, 1, 1]).double()
    assert torch.allclose(retain.gram, rows.T @ (weights[:, None] * rows))
    assert set(retain.counts) == {"a", "b"} and retain.weights == {"a": 3.0, "b": 4.0}
    for bias in (None, b):
        e = rows @ w + (0 if bias is None else bias)
        ridge = TargetInputs(w, bias, retain=retain, lam=0.5).ridge
        assert torch.allclose(ridge.gram, e.T @ (weights[:, None] * e)) and ridge.mu == 0.5
        mean = float((weights * e.square().sum(dim=1)).sum()) / 7
        assert retain.squared_embedding(w, bias) == pytest.approx(mean)
    assert retain.ridge(0.5).mu == pytest.approx(0.5 * float(retain.gram.trace()) / 7)


def test_a_digest_is_of_names_and_weights_not_of_float_bits():
    def digest(names: str, rows: Tensor, weight: float = 1.0, group: str = "a") -> str:
        return RetainSet({group: Group([*names], rows, weight)}).sha256

    rows = normal(3, W)
    same = digest("abc", rows)
    assert same == digest("abc", rows + 1e-6) == digest("cba", rows)
    assert same not in (digest("abd", rows), digest("abc", rows, 2.0), digest("abc", rows, 1, "b"))


@pytest.mark.parametrize(
    ("groups", "token"),
    [
        ({}, "at least one group"),
        ({"a": Group(["a"], torch.ones(2, W))}, "1 names, 2"),
        ({"a": Group(["a"], torch.ones(1, W)), "b": Group(["b"], torch.ones(1, 3))}, "group 'b'"),
        ({"a": Group(["a"], torch.ones(1, W), -1.0)}, "weight of group 'a'"),
    ],
)
def test_impossible_groups_are_refused(groups, token):
    with pytest.raises(ProblemError, match=token):
        _ = RetainSet(groups).squared_length


def test_a_margin_above_the_error_survives_it():
    """The error bounds every difference of cosines, and is reached within a factor of two."""
    exact = normal(6, 5)
    rounded = exact + 0.1 * normal(6, 5, seed=1)
    moved = normalize(rounded) - normalize(exact)
    changes = moved @ normalize(moved)[moved.norm(dim=1).argmax()]
    error = rounding_error(7 * exact, rounded)
    assert error / 2 - 1e-12 < (changes[:, None] - changes).abs().max() <= error
    assert Margin(1.01 * error, 0.2).survives(error) and not Margin(error, 0.2).survives(error)
    assert Forecast({}, [], 2 * error, 0.2).survives(error)
    assert not Margin(None, None).survives(0.0)
