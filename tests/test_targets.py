"""Targets, on plain embeddings."""

from __future__ import annotations

import pytest
import torch

from forgetting import (
    Ridge,
    empty_target,
    opposite_target,
    orthogonal_target,
    specific_target,
)
from forgetting.errors import ProblemError
from tests.solver_fixtures import normal


def target_inputs(nearest_class: int):
    """Three classes in 4 dimensions; the empty prompt points at `nearest_class`."""
    classes = torch.eye(4)[:3]
    neutral = 0.1 * torch.ones(1, 4) + torch.eye(4)[nearest_class]
    return neutral, classes


def test_target_is_the_unit_norm_empty_prompt():
    neutral, classes = target_inputs(nearest_class=2)
    target, draws = empty_target(neutral, classes, [0, 1], torch.Generator())
    assert draws == 0 and target.shape == (1, 4)
    assert torch.allclose(target, neutral / neutral.norm())


def test_target_is_drawn_again_while_it_is_a_class_to_forget():
    neutral, classes = target_inputs(nearest_class=1)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return empty_target(neutral, classes, [1], generator)

    target, draws = draw(0)
    assert draws > 0
    assert int((target[0] @ classes.T).argmax()) != 1
    assert target.norm(dim=1) == pytest.approx(1, abs=1e-5)
    assert torch.equal(target, draw(0)[0]) and not torch.equal(target, draw(1)[0])


def test_target_without_a_class_left_is_refused():
    neutral, classes = target_inputs(nearest_class=1)
    with pytest.raises(ProblemError, match="every class is to be forgotten"):
        empty_target(neutral, classes, [0, 1, 2], torch.Generator())


def test_specific_targets_of_many_texts_are_those_of_each_alone():
    embeddings, rows = normal(6, 8), normal(14, 8, seed=1)
    weights = torch.linspace(0.2, 1.0, 14, dtype=torch.float64)
    excluded = torch.rand(6, 14, generator=torch.Generator().manual_seed(2)) < 0.3
    excluded[0] = False
    retained = Ridge(rows, 0.3, weights)
    together = specific_target(embeddings, retained, 0.1, excluded)
    for i, names in enumerate(excluded):
        fewer = Ridge(rows[~names], 0.3, weights[~names])
        alone = specific_target(embeddings[i : i + 1], fewer, 0.1)
        assert torch.allclose(together[i], alone[0], rtol=1e-9, atol=1e-9)
        if names.any():  # negative control
            kept = specific_target(embeddings[i : i + 1], retained, 0.1)
            assert not torch.allclose(together[i], kept[0], rtol=1e-3)


def test_opposite_and_orthogonal_targets():
    embeddings, flat = normal(3, 8), normal(20, 8, seed=1)
    assert torch.equal(opposite_target(embeddings, 0.0), torch.zeros(3, 8))
    assert torch.allclose(opposite_target(embeddings, 0.3), -0.3 * embeddings)
    with pytest.raises(ProblemError, match="beta"):
        opposite_target(embeddings, -0.1)
    flat[:, 5] = 0  # nothing uses this direction
    found = orthogonal_target(flat)
    assert found.shape == (1, 8) and found[0].abs().argmax() == 5
    assert float(found.norm()) == pytest.approx(1) and (flat @ found.T).abs().max() < 1e-12
