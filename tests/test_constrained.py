"""The constrained form: on target, least disturbance, proved, and with what left taken out."""

from __future__ import annotations

import cvxpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetting.errors import ProblemError
from forgetting.solvers.certificate import certify_constrained
from forgetting.solvers.constrained import Ridge, solve_constrained, solve_constrained_each
from forgetting.targets import opposite_target, orthogonal_target, specific_target


def world(k, m, w, d, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(k, w), normal(m, w), normal(k, d)


@settings(max_examples=200, deadline=None)
@given(
    k=st.integers(1, 4),
    m=st.integers(0, 15),
    w=st.integers(4, 10),
    d=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    mu=st.floats(1e-4, 10),
)
def test_on_target_and_proved(k, m, w, d, seed, mu):
    h_f, h_r, displacement = world(k, m, w, d, seed)
    solution = solve_constrained(Ridge(h_r.T @ h_r, mu), h_f, displacement)
    proof = solution.certificate
    assert solution.residual < 1e-9
    assert proof.primal - proof.bound <= 1e-9 * proof.primal + proof.rounding


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 3))
def test_an_independent_solver_finds_the_same_change(seed, k):
    h_f, h_r, displacement = world(k, 8, 6, 3, seed)
    solution = solve_constrained(Ridge(h_r.T @ h_r, 0.1), h_f, displacement)
    change = cvxpy.Variable((6, 3))
    cost = cvxpy.sum_squares(h_r @ change) + 0.1 * cvxpy.sum_squares(change)
    value = cvxpy.Problem(cvxpy.Minimize(cost), [h_f @ change == displacement]).solve(
        solver=cvxpy.CLARABEL
    )
    assert solution.certificate.primal == pytest.approx(value, rel=1e-6)
    assert change.value == pytest.approx(solution.delta.numpy(), rel=1e-3, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 3), leaving=st.integers(1, 4))
def test_what_leaves_is_as_if_it_had_never_been_there(seed, k, leaving):
    """Woodbury's downdate against statistics made without the rows."""
    h_f, h_r, displacement = world(k, 12, 8, 5, seed)
    shares = torch.linspace(0.2, 1.0, 12, dtype=torch.float64)
    everything = Ridge((h_r.T * shares) @ h_r, 0.05)
    fewer = Ridge((h_r[leaving:].T * shares[leaving:]) @ h_r[leaving:], 0.05)
    one = solve_constrained(everything, h_f, displacement, h_r[:leaving], shares[:leaving])
    other = solve_constrained(fewer, h_f, displacement)
    assert torch.allclose(one.delta, other.delta, rtol=1e-8, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), requests=st.integers(1, 6))
def test_many_requests_are_solved_as_each_alone(seed, requests):
    """Requests of one to three texts from which different names leave, some without weight."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.arange(requests), torch.randint(requests, (5,), generator=generator)])
    hidden, rows, displacement = world(len(owner), 14, 8, 5, seed)
    shares = torch.rand(14, generator=generator, dtype=torch.float64)
    shares[::5] = 0.0
    leaving = torch.rand(requests, 14, generator=generator) < 0.3
    ridge = Ridge((rows.T * shares) @ rows, 0.05)
    together = solve_constrained_each(ridge, hidden, displacement, owner, rows, shares, leaving)
    for request, answer in enumerate(together):
        stay = ~leaving[request]
        fewer = Ridge((rows[stay].T * shares[stay]) @ rows[stay], 0.05)
        mine = owner == request
        alone = solve_constrained(fewer, hidden[mine], displacement[mine])
        assert torch.allclose(answer.delta, alone.delta, rtol=1e-8, atol=1e-8)
        proof = answer.certificate
        assert proof.primal - proof.bound <= 1e-9 * proof.primal + proof.rounding
        assert answer.certificate.primal == pytest.approx(alone.certificate.primal, rel=1e-8)


def test_specific_targets_of_many_classes_are_those_of_each_alone():
    hidden, rows, _ = world(6, 14, 8, 5, 0)
    shares = torch.linspace(0.2, 1.0, 14, dtype=torch.float64)
    leaving = torch.rand(6, 14, generator=torch.Generator().manual_seed(2)) < 0.3
    leaving[0] = False
    gram = (rows.T * shares) @ rows
    together = specific_target(hidden, gram, 0.3, 0.1, rows, shares, leaving)
    for i, gone in enumerate(leaving):
        fewer = gram - (rows[gone].T * shares[gone]) @ rows[gone]
        alone = specific_target(hidden[i : i + 1], fewer, 0.3, 0.1)
        assert torch.allclose(together[i], alone[0], rtol=1e-9, atol=1e-9)
        if gone.any():  # negative control
            kept = specific_target(hidden[i : i + 1], gram, 0.3, 0.1)
            assert not torch.allclose(together[i], kept[0], rtol=1e-3)


def test_staying_would_be_another_answer():
    """Negative control of the downdate: the forgotten text itself, retained, holds it back."""
    h_f, h_r, displacement = world(1, 12, 8, 5, 0)
    ridge = Ridge(torch.cat([h_r, h_f]).T @ torch.cat([h_r, h_f]), 0.05)
    shares = torch.ones(1, dtype=torch.float64)
    gone = solve_constrained(ridge, h_f, displacement, h_f, shares)
    assert (
        gone.certificate.primal
        < 0.9 * solve_constrained(ridge, h_f, displacement).certificate.primal
    )


def certified(ridge, h_f, d, left, right):
    """The certificate of one answer from whose statistics nothing left."""
    nothing = h_f.new_zeros(1, 0, h_f.shape[1]), h_f.new_zeros(1, 0)
    batched = (x[None] for x in (h_f, d, left, right))
    return certify_constrained(ridge.gram, ridge.mu, *nothing, *batched)[0]


def test_a_worse_change_shows_a_gap():
    h_f, h_r, displacement = world(2, 12, 8, 5, 0)
    ridge = Ridge(h_r.T @ h_r, 0.05)
    good = solve_constrained(ridge, h_f, displacement)
    # On target as well, by the pseudo-inverse, which disturbs more; and a miss of 1%.
    plain, z = torch.linalg.pinv(h_f), displacement
    assert certified(ridge, h_f, displacement, plain, z).gap > 0.01
    missed = certified(ridge, h_f, displacement, good.left, 0.99 * good.right)
    assert missed.gap > 1e-3


def test_nan_is_never_a_proof():
    h_f, h_r, displacement = world(1, 12, 8, 5, 0)
    nan = torch.full((8, 1), float("nan"), dtype=torch.float64)
    assert certified(Ridge(h_r.T @ h_r, 0.05), h_f, displacement, nan, displacement).gap == 1.0


def test_duplicate_texts_share_one_constraint():
    h_f, h_r, displacement = world(2, 12, 8, 5, 0)
    twice = torch.cat([h_f, h_f[:1]])
    ridge = Ridge(h_r.T @ h_r, 0.05)
    same = solve_constrained(ridge, twice, torch.cat([displacement, displacement[:1]]))
    expected = solve_constrained(ridge, h_f, displacement)
    assert same.residual < 1e-9 and torch.allclose(same.delta, expected.delta, atol=1e-9)
    conflict = solve_constrained(ridge, twice, torch.cat([displacement, -displacement[:1]]))
    assert conflict.residual > 0.1  # says so instead of pretending


def test_refused():
    h_f, h_r, displacement = world(1, 4, 6, 3, 0)
    with pytest.raises(ProblemError, match="mu must be a number above 0"):
        Ridge(h_r.T @ h_r, 0.0)
    with pytest.raises(ProblemError, match="not positive definite"):
        Ridge(-h_r.T @ h_r, 1e-3)
    ridge = Ridge(h_r.T @ h_r, 0.1)
    with pytest.raises(ProblemError, match="displacement must be"):
        solve_constrained(ridge, h_f, displacement[:0])
    with pytest.raises(ProblemError, match="not part"):
        solve_constrained(ridge, h_f, displacement, 9 * h_f, torch.ones(1))


def test_targets():
    hidden, texts, _ = world(3, 20, 8, 8, 0)
    assert torch.equal(opposite_target(hidden, 0.0), torch.zeros(3, 8))
    assert torch.allclose(opposite_target(hidden, 0.3), -0.3 * hidden)
    with pytest.raises(ProblemError, match="beta"):
        opposite_target(hidden, -0.1)
    flat = texts.clone()
    flat[:, 5] = 0  # nothing uses this direction
    found = orthogonal_target(flat)
    assert found.shape == (1, 8)
    assert found[0].abs().argmax() == 5 and found.norm(dim=1) == pytest.approx(1)
    assert (flat @ found.T).abs().max() < 1e-12
