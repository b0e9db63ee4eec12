"""`python -m experiments forecast`: correlations, intervals, and what is set beside what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn.functional import normalize

from evaluation.zero_shot import ZeroShot
from experiments.forecast import correlation, correlations, fell, main, told_and_seen
from experiments.frontier import UNKNOWN
from tests.conftest import toy_bundle


def test_the_correlation_is_spearmans_and_its_interval_holds_it():
    generator = np.random.default_rng(1)
    said = generator.integers(5, size=60).astype(float)  # with ties
    seen = said + generator.normal(size=60)
    rho, low, high = correlation(said, seen)
    assert rho == pytest.approx(spearmanr(said, seen).statistic)
    assert low < rho < high and 0.1 < high - low < 0.6
    assert correlation(said, np.exp(said)) == pytest.approx((1, 1, 1))
    assert correlation(said, -said)[0] == pytest.approx(-1)


def test_within_sets_no_difference_between_sets_counts():
    x = np.arange(20.0)
    table = pd.DataFrame({"set": ["a"] * 10 + ["b"] * 10, "unlisted": x, "share": x, "lost": x})
    table["beyond the lead"] = x
    table["others"] = np.where(x < 10, -x, 100 - x)  # against the forecast within each set
    table["neighbour"] = 0.0  # nothing to rank: no row
    found = correlations(table).set_index(["set", "said"])["rho"]
    assert set(found.index.get_level_values("said")) == {"unlisted", "share"}
    assert found["all", "unlisted"] > 0 and found["all, within sets", "unlisted"] < -0.9


@pytest.fixture
def bundles():
    """Owl and newt are twins."""
    animals, tools = toy_bundle("ToyAnimals"), toy_bundle("ToyTools")
    hidden, prompts = animals.forget_hidden.clone(), animals.class_hidden.clone()
    hidden[5], prompts[5] = hidden[4] + 0.6 * hidden[5], prompts[4] + 0.6 * prompts[5]
    classes = normalize(prompts @ animals.text_projection, dim=1)
    noise = 0.15 * torch.randn(72, 16, generator=torch.Generator().manual_seed(5))
    images = normalize(classes[animals.labels] + noise, dim=1)
    changed = {"forget_hidden": hidden, "class_hidden": prompts, "image_features": images}
    return replace(animals, **changed), tools


@pytest.mark.parametrize("opts", [(), UNKNOWN])
def test_a_twin_is_foretold(bundles, opts):
    table = told_and_seen(bundles, opts).set_index("class")
    assert len(table) == 10 and set(table["lost"].nlargest(2).index) == {"owl", "newt"}
    assert (table[["unlisted", "share"]] > 0).all(axis=None)
    assert (table["beyond the lead"] <= table["lost"]).all()


def test_one_set_alone_has_no_others(bundles):
    table = told_and_seen(bundles[:1], ())
    assert table[["others", "share"]].isna().all(axis=None)
    assert set(correlations(table)["set"]) <= {"ToyAnimals"}


def test_the_command(features, capsys):
    found = main(["--features", str(features), "TRAINER.FORGETEXACT.OTHERS", "0"])
    assert "10 classes forgotten in turn: " in capsys.readouterr().out
    assert found["rho"].between(-1, 1).all()


def test_what_fell_was_recognised_before_and_is_no_longer(bundles):
    own = ZeroShot(bundles[0])
    correct = own.before.clone()
    for label, hits in ((0, 6), (1, 7), (3, 0)):
        mine = (own.bundle.labels == label).nonzero()[:, 0]
        own.before[mine], correct[mine] = True, False
        correct[mine[:hits]] = True
    assert fell(own, correct, 3).tolist() == [True, False, False, False, False, False]
    own.before[own.bundle.labels == 0] = False
    assert not fell(own, correct, 3).any()
