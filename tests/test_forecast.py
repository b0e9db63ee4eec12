"""What text alone says of a request: shares of names that nobody listed, twins, margins, ridges."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from clip.bundle import bundle_path
from forgetting import Group, RetainSet
from forgetting.displacement import (
    ClassifierTexts,
    RetainedNames,
    displacement_along,
    displacement_ratios,
    leave_one_out_ratios,
)
from forgetting.errors import ProblemError
from forgetting.problem import LowRankEdit
from forgetting.ridge import MOST_SLACK, RIDGES, SLACK, choose_ridge
from tests.conftest import toy_bundle

W, D = 8, 6


def retain_set(generator: torch.Generator) -> RetainSet:
    """Ten single names, and four names in two wordings each."""

    def rows(n: int) -> torch.Tensor:
        return torch.randn(n, W, generator=generator, dtype=torch.float64)

    first = rows(4)
    second = first + 0.3 * rows(4)
    names = ["a", "b", "c", "d"]
    return RetainSet(
        {
            "own": Group(names * 2, torch.cat([first, second]), 1.0, prompt_variants=True),
            "vocabulary": Group(
                [f"v{i}" for i in range(10)], rows(10), 0.3, limit_displacement=False
            ),
        }
    )


def change(gram, mu, h, d) -> torch.Tensor:
    """The optimum by its formula, from statistics that are given as they are."""
    inverse = torch.linalg.inv(gram + mu * torch.eye(W, dtype=torch.float64))
    return inverse @ h.T @ torch.linalg.inv(h @ inverse @ h.T) @ d


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), texts=st.integers(1, 2), place=st.integers(0, 17))
def test_shares_against_brute_force(seed, texts, place):
    generator = torch.Generator().manual_seed(seed)
    retain, mu = retain_set(generator), 0.05
    ridge = retain.ridge(mu)
    h = torch.randn(texts, W, generator=generator, dtype=torch.float64)
    d = torch.randn(texts, D, generator=generator, dtype=torch.float64)
    leaving = torch.zeros(1, 18, dtype=torch.bool)
    leaving[0, [1, 5, 12]] = True  # one name in both wordings, and a single one
    owner = torch.zeros(texts, dtype=torch.int64)
    names = RetainedNames(
        retain.rows, retain.name_weights, leaving, retain.variant_of, retain.base(ridge)
    )
    listed, unlisted = (
        function(ridge, h, d, owner, names)
        for function in (displacement_ratios, leave_one_out_ratios)
    )
    stay = ~leaving[0]
    unit = d.square().sum(dim=1).mean().sqrt()

    def moved(stay: torch.Tensor) -> float:
        kept = retain.rows[stay]
        gram = kept.T @ (retain.name_weights[stay, None] * kept)
        return float((retain.rows[place] @ change(gram, ridge.mu, h, d)).norm() / unit)

    assert float(listed[0, place]) == pytest.approx(moved(stay), rel=1e-8)
    without = stay.clone()
    without[[place, int(retain.variant_of[place])]] = False
    if stay[place]:
        assert float(unlisted[0, place]) == pytest.approx(moved(without), rel=1e-8)
        assert moved(without) != pytest.approx(moved(stay), rel=1e-6)  # it could have failed


def test_a_text_follows_itself_and_nothing_else_fully():
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(W, 1, generator=generator)
    right, text = torch.randn(1, D, generator=generator), torch.randn(W, generator=generator)
    away = torch.randn(W, generator=generator)
    away -= (away @ left[:, 0]) / (left[:, 0] @ left[:, 0]) * left[:, 0]
    shares = displacement_along(LowRankEdit(left, right), text, torch.stack([text, text / 2, away]))
    assert shares.tolist() == pytest.approx([1, 0.5, 0], abs=1e-5)


def test_who_loses_most_against_plain_arithmetic():
    generator = torch.Generator().manual_seed(1)
    hidden, w = (torch.randn(*size, generator=generator).double() for size in ((7, W), (W, D)))
    answer = LowRankEdit(
        torch.randn(W, 2, generator=generator).double(),
        0.2 * torch.randn(2, D, generator=generator).double(),
    )
    texts = ClassifierTexts([*"abcdefg"], hidden, hidden @ w, {"b": 1}, 5)
    moved = texts.moved([answer])
    [felt], [[(margin, gap)]] = texts.affected(moved, [[1]]), texts.margins(moved, [[1]])
    before = hidden @ w
    after = before + hidden @ answer.delta
    lost = 1 - torch.cosine_similarity(before, after, dim=1)
    lost[1] = -1
    assert [one.name for one in felt] == ["abcdefg"[i] for i in lost.argsort(descending=True)[:5]]
    assert felt[0].cosine_loss == pytest.approx(float(lost.max()))
    row = "abcdefg".index(felt[0].name)
    near = torch.cosine_similarity(before[row : row + 1], before, dim=1)
    near[row] = -1
    assert felt[0].margin == pytest.approx(float(1 - near.max()))
    assert felt[0].likely_misclassified == (felt[0].cosine_loss > felt[0].margin)
    own = torch.cosine_similarity(before[1:2], after[:5], dim=1)
    rivals = torch.tensor([0, 2, 3, 4])
    assert margin == pytest.approx(float(own[rivals].max() - own[1]))
    was = torch.cosine_similarity(before[1:2], before[:5], dim=1)
    assert gap == pytest.approx(float(1 - was[rivals].max()))
    nothing = LowRankEdit(answer.left, torch.zeros_like(answer.right))
    [[(margin, gap)]] = texts.margins(texts.moved([nothing]), [[1]])
    assert margin == pytest.approx(-gap)


def test_the_ridge_keeps_its_limit_and_grows_with_it():
    generator = torch.Generator().manual_seed(2)
    retain = retain_set(generator)
    w = torch.randn(W, D, generator=generator, dtype=torch.float64)
    like = retain.rows[:4]
    leaving = torch.zeros(4, 18, dtype=torch.bool)
    for i in range(4):
        leaving[i, [i, i + 4]] = True
    found = [choose_ridge(retain, w, like, leaving, limit) for limit in (1e-3, 0.3, 1e3)]
    assert found == sorted(found) and found[0] < found[-1] == pytest.approx(0.1)
    with pytest.raises(ProblemError, match="limit"):
        choose_ridge(retain, w, like, leaving, 0.0)
    with pytest.raises(ProblemError, match="likely is empty"):
        choose_ridge(retain, w, like[:0], leaving[:0], 0.1)


@pytest.mark.parametrize("limit", [0.05, 0.15, 0.19, 1.0])
def test_the_ridge_by_plain_arithmetic(limit, monkeypatch):
    """The largest at which push and least push average to the limit, or that SLACK allows."""
    monkeypatch.setattr("forgetting.ridge.TOLERATED", 1.0)  # whatever unlisted names feel
    generator = torch.Generator().manual_seed(3)
    retain = retain_set(generator)
    w = torch.randn(W, D, generator=generator, dtype=torch.float64)
    like, own = retain.rows[:4], retain.groups["own"].rows @ w
    leaving = torch.tensor([[i % 4 == j % 4 and i < 8 for i in range(18)] for j in range(4)])
    apart = torch.cdist(own, own)
    apart[torch.eye(8).bool() | torch.eye(8).bool().roll(4, dims=1)] = torch.inf
    apart = apart.amin(dim=1)
    apart = apart.clamp_min(float(apart.median()) / 4)

    def push(mu: float) -> float:
        pushed = []
        for h, gone in zip(like, leaving, strict=True):
            away = retain.rows[gone]
            gram = retain.gram - away.T @ (retain.name_weights[gone, None] * away)
            column = change(gram, mu * retain.squared_length, h[None], torch.eye(1).double())
            share = (retain.rows @ column)[:8, 0] * float((h @ w).norm()) / apart
            pushed.append(float(share[~gone[:8]].square().mean().sqrt()))
        return sum(pushed) / len(pushed)

    pushes = [push(mu) for mu in RIDGES]
    least = pushes[0]
    fits = [(x + least) / 2 <= limit or x <= min(SLACK * least, MOST_SLACK) for x in pushes]
    wanted = max((mu for mu, fit in zip(RIDGES, fits, strict=True) if fit), default=RIDGES[0])
    assert choose_ridge(retain, w, like, leaving, limit) == wanted


@pytest.fixture
def exact(features, tmp_path):
    """Run ForgetExact on ToyAnimals; what the solver logged of a label."""

    def run(label: str, *options: str) -> dict:
        folder = tmp_path / "_".join(["run", *options]).replace("/", "_")
        argv = ["--dataset", "ToyAnimals", "--features", str(features), "--backbone", "ViT-B/32"]
        argv += ["--output-dir", str(folder), "--trainer", "ForgetExact", "--forget", label]
        train.main([*argv, *options])
        return json.loads((folder / "logs.json").read_text())["ToyAnimals"][label]["solver"]

    return run


def test_the_forecast_is_in_the_logs(exact):
    forecast = exact("owl")["forecast"]
    assert set(forecast["unlisted"]) == {"own", "vocabulary", "others"}
    assert all(0 < part["rms"] <= part["max"] for part in forecast["unlisted"].values())
    lost = [one["cosine_loss"] for one in forecast["affected"]]
    assert lost == sorted(lost, reverse=True) and "owl" not in [
        n["name"] for n in forecast["affected"]
    ]
    assert forecast["margin"] >= forecast["gap"] > 0


def test_a_small_margin_sends_the_class_further(exact):
    low, high = (exact("owl", "TRAINER.FORGETEXACT.MIN_MARGIN", value) for value in ("0", "1.2"))
    assert low["beta"] == 0 < high["beta"]
    assert low["forecast"]["margin"] < high["forecast"]["margin"]
    assert high["forecast"]["margin"] >= 1.2 * high["forecast"]["gap"] or high["beta"] == 0.4


def test_a_name_to_keep_feels_less(exact):
    felt = {one["name"]: one["cosine_loss"] for one in exact("owl")["forecast"]["affected"]}
    name = max(felt, key=felt.__getitem__)
    kept = {
        one["name"]: one["cosine_loss"]
        for one in exact("owl", "--protect", name, "TRAINER.FORGETEXACT.PROTECT", "10")["forecast"][
            "affected"
        ]
    }
    assert kept.get(name, 0) < felt[name]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--protect", "unicorn"], "unknown name to protect (FORGET.PROTECT) 'unicorn'"),
        (["--protect", "OWL"], "'OWL' is to be forgotten and to be protected"),
        (["--protect", " "], "is empty"),
        (["--protect", "cat", "--trainer", "ForgetLoRA"], "FORGET.PROTECT"),
    ],
)
def test_names_to_keep_are_checked(exact_refused, options, said):
    assert said in exact_refused(options)


@pytest.fixture
def exact_refused(features, tmp_path, refused):
    def run(options: list[str]) -> str:
        argv = ["--dataset", "ToyAnimals", "--features", str(features), "--backbone", "ViT-B/32"]
        argv += ["--output-dir", str(tmp_path / "out"), "--trainer", "ForgetExact"]
        return refused([*argv, "--forget", "owl", *options])

    return run


def test_a_wording_that_stays_behind_joins(features, tmp_path):
    """The evaluation prompt of a class is made of another name: the bare name moves alone."""
    bundle = toy_bundle("ToyAnimals")
    prompts = bundle.class_hidden.clone()
    prompts[4] = 0.2 * bundle.forget_hidden[4] + bundle.retain_hidden[3]
    odd = replace(bundle, class_hidden=prompts)
    odd.save(bundle_path(tmp_path / "odd", "ViT-B/32", "ToyAnimals"))
    argv = ["--dataset", "ToyAnimals", "--features", str(tmp_path / "odd"), "--forget", "owl"]
    argv += ["--backbone", "ViT-B/32", "--trainer", "ForgetExact"]
    texts = {}
    for limit in ("0", "0.5"):
        keys = [
            "TRAINER.FORGETEXACT.MIN_DISPLACEMENT",
            limit,
            "TRAINER.FORGETEXACT.MIN_MARGIN",
            "0",
        ]
        folder = train.main([*argv, "--output-dir", str(tmp_path / limit), *keys])
        solver = json.loads((folder / "logs.json").read_text())["ToyAnimals"]["owl"]["solver"]
        texts[limit] = solver["texts"], solver["paraphrases"]
    assert texts["0"][0] == ["owl"] and texts["0"][1]["added"] == []
    assert texts["0.5"][0] == ["owl", "a photo of a owl."]
    assert texts["0.5"][1] == {"checked": 1, "added": ["a photo of a owl."], "lagging": {}}
