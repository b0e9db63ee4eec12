"""Closed forms to compare with, concept erasure and ascent: planted answers, without a trainer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgetting.baselines import LOGIT_SCALE, ascend, leace, noise, null_space, uce, zeroing
from tests.solver_fixtures import normal


@given(st.integers(1, 4), st.floats(1e-2, 1e4), st.floats(1e-2, 10), st.integers(0, 99))
def test_uce_is_where_its_objective_is_stationary(k, erase, lam, seed):
    h_f, h_r, d = normal(k, 9, seed=seed), normal(14, 9, seed=seed + 1), normal(k, 5, seed=seed + 2)
    delta = uce(h_f, h_r.T @ h_r, erase, lam) @ d
    slope = erase * h_f.T @ (h_f @ delta - d) + h_r.T @ h_r @ delta + lam * delta
    assert float(slope.norm()) <= 1e-9 * erase * float((h_f.T @ d).norm())


def test_the_null_space_moves_a_text_and_leaves_what_is_retained():
    h_r, h_f, d = normal(6, 4) @ normal(4, 10, seed=1), normal(2, 10, seed=2), normal(2, 3, seed=3)
    delta = null_space(h_f, h_r.T @ h_r, 6, 0.0, 1e-9) @ d
    assert torch.allclose(h_f @ delta, d, atol=1e-9) and float((h_r @ delta).norm()) < 1e-6
    crowded = normal(40, 10, seed=4)
    assert null_space(h_f, crowded.T @ crowded, 40, 0.0, 1e-9).eq(0).all()


@given(st.integers(1, 4), st.integers(0, 99))
def test_zeroing_is_the_least_change_that_zeroes(k, seed):
    h_f, w = normal(k, 8, seed=seed), normal(8, 5, seed=seed + 1)
    left, right = zeroing(h_f, w)
    delta = left @ right
    assert left.shape[1] == k and float((h_f @ (w + delta)).norm()) < 1e-10
    b = normal(5, seed=seed + 3)
    biased = torch.mm(*zeroing(h_f, w, b))
    assert torch.allclose(biased, -torch.linalg.pinv(h_f) @ (h_f @ w + b), atol=1e-9)
    assert torch.allclose(delta, -torch.linalg.pinv(h_f) @ h_f @ w, atol=1e-9)
    again, right = zeroing(torch.cat([h_f, h_f.sum(dim=0, keepdim=True)]), w)
    assert again.shape == left.shape and torch.allclose(again @ right, delta, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_noise_moves_a_text_as_full_noise_of_its_norm_does(rank):
    generator, h = torch.Generator().manual_seed(0), normal(1, 12)
    moved = []
    for _ in range(4000):
        left, right = noise(12, 9, rank, 5.0, generator)
        assert float((left @ right).norm()) == pytest.approx(5.0)
        moved.append(float((h @ left @ right).square().sum()))
    assert sum(moved) / len(moved) == pytest.approx(float(h.square().sum()) * 25 / 12, rel=0.1)


def test_leace_leaves_no_linear_trace_of_its_classes():
    retained, w = normal(200, 20), normal(20, 6, seed=1)
    shift = 2 * normal(2, 20, seed=2)
    texts = [retained[:3] + shift[0], retained[3:8] + shift[1]]
    left, right, apart = leace(texts, retained[8:], w)
    assert left.shape == (20, 2) and right.shape == (2, 6) and apart < 1e-9
    x = torch.cat([*texts, retained[8:]])
    z = torch.zeros(len(x), 2, dtype=torch.float64)
    z[:3, 0] = z[3:8, 1] = 1.0
    for y, traced in ((x @ w, True), (x @ w + (x @ left) @ right, False)):
        covariance = (y - y.mean(dim=0)).T @ (z - z.mean(dim=0)) / len(y)
        assert (float(covariance.norm()) > 0.01) == traced


def test_leace_erases_a_few_texts_among_very_many():
    """Negative control: the package alone, with indicators of 0 and 1, erases nothing there."""
    from concept_erasure import LeaceFitter

    retained, text = normal(30_000, 6), normal(1, 6, seed=1) + 2
    left, right, apart = leace([text], retained, torch.eye(6, dtype=torch.float64))
    assert apart < 1e-9 and float((text @ left @ right).norm()) > 0.1
    x = torch.cat([text, retained])
    z = torch.zeros(len(x), 1, dtype=torch.float64)
    z[0] = 1.0
    alone = LeaceFitter.fit(x, z, affine=False).eraser
    assert float((alone(text) - text).norm()) < 1e-9


def test_ascent_is_gradient_ascent_on_the_projection():
    """Against autograd on the whole matrix, two texts of one class and one of another."""
    h, w, own = normal(3, 8), normal(8, 6, seed=1), torch.tensor([0, 0, 2])
    names = torch.nn.functional.normalize(torch.cat([h @ w, normal(2, 6, seed=2)]), dim=1)
    names = names[[0, 3, 2, 4]]
    b = 0.1 * normal(6, seed=3)
    found = ascend(h, w, names, own, lr=1e-3, steps=4, limit=1e-12, bias=b)
    rate = 1e-3 * float((h @ w + b).square().sum() / h.square().sum())
    matrix = w.clone().requires_grad_()
    for _ in range(4):
        logits = LOGIT_SCALE * torch.nn.functional.normalize(h @ matrix + b, dim=1) @ names.T
        mine = torch.nn.functional.one_hot(own, 4).bool()
        odds = logits.masked_fill(mine, -torch.inf).logsumexp(dim=1) - logits[mine]
        (odds,) = torch.autograd.grad(odds.sum(), matrix)
        matrix = (matrix + rate * odds).detach().requires_grad_()
    assert found.steps == 4 and not found.reached
    assert torch.allclose(w + found.left @ found.right, matrix.detach(), atol=1e-9)


def test_ascent_stops_as_soon_as_every_text_is_below_the_limit():
    h, w = normal(2, 8), normal(8, 6, seed=1)
    names = torch.nn.functional.normalize(torch.cat([h @ w, normal(3, 6, seed=2)]), dim=1)
    problem = (h, w, names, torch.tensor([0, 1]), 1e-3)
    found = ascend(*problem, steps=500, limit=0.2)
    assert found.reached and (found.before > 0.2).all() and (found.after < 0.2).all()
    short = ascend(*problem, steps=found.steps - 1, limit=0.2)
    assert not short.reached and (short.after >= 0.2).any()
    still = ascend(*problem, steps=500, limit=1.1)
    assert still.steps == 0 and still.right.eq(0).all()
    # The first text has a target that it is not on, and rests while the second moves.
    resting = ascend(*problem[:3], torch.tensor([4, 1]), 1e-3, steps=3, limit=0.2)
    assert resting.right[0].eq(0).all() and resting.right[1].ne(0).any()
