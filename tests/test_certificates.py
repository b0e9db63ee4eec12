"""A certificate never claims more than it proves: whoever looks for something better finds nothing.

Problems of all scales, weights and degenerate rows are solved; what is claimed is then attacked by
candidates that know nothing of the solver, and judged in extended precision.
"""

from __future__ import annotations

import math
import warnings

import cvxpy
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forgetting import ForgetProblem, solve_constrained, solve_each, solve_exact
from forgetting.solvers.constrained import Ridge

SCALES = st.sampled_from([1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e12])
WEIGHTS = st.one_of(st.just(0.0), st.just(1.0), SCALES, st.floats(1e-2, 1e2))
SPOILS = ("", "zero row", "repeated", "collinear", "mean of retained", "retained", "rank one")
QUIET = dict(deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def problems(draw) -> ForgetProblem:
    """Any problem that is none of those refused."""
    k, m, w, d = (draw(st.integers(*ends)) for ends in ((1, 6), (0, 10), (1, 7), (1, 5)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * draw(SCALES)

    h_f, h_r, projection, target = normal(k, w), normal(m, w), normal(w, d), normal(k, d)
    for spoil in draw(st.lists(st.sampled_from(SPOILS), max_size=2)):
        if spoil == "zero row":
            h_f[0] = 0
        if spoil == "repeated" and k > 1:
            h_f[1] = h_f[0]
        if spoil == "collinear" and k > 1:
            h_f[-1] = -2.5 * h_f[0]
        if spoil == "mean of retained" and m > 1:
            h_f[0] = (h_r[0] + h_r[1]) / 2
        if spoil == "retained" and m:
            h_r[0] = h_f[0]
        if spoil == "rank one" and m:
            h_r = h_r[:1] * torch.linspace(0.1, 1, m, dtype=torch.float64)[:, None]
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    tensors = (x.to(dtype) for x in (projection, h_f, h_r, target))
    return ForgetProblem(*tensors, *(draw(WEIGHTS) for _ in range(3)))


class Judge:
    """The objective in extended precision, straight from its definition."""

    def __init__(self, problem: ForgetProblem) -> None:
        exact = problem.double
        self.w, self.h_f, self.h_r, self.p = (
            x.numpy().astype(np.longdouble)
            for x in (exact.projection, exact.forget_hidden, exact.retain_hidden, exact.target)
        )
        self.weights = problem.lamb_forget, problem.lamb_preserve, problem.lw

    def __call__(self, delta: torch.Tensor | np.ndarray) -> float:
        delta = np.asarray(delta).astype(np.longdouble)
        forget = self.p - self.h_f @ (self.w + delta)
        norms = (np.sqrt((x * x).sum()) for x in (forget, self.h_r @ delta, delta))
        return sum(w * n for w, n in zip(self.weights, norms, strict=True) if w)


def candidates(problem: ForgetProblem, answer: torch.Tensor) -> list[torch.Tensor]:
    """Changes that may be better: none, those that land (also within what nobody retains), parts of
    the way, and the answer shaken."""
    exact, d = problem.double, problem.double.displacement
    h_f, h_r = exact.forget_hidden, exact.retain_hidden
    found = [torch.zeros_like(answer), torch.linalg.pinv(h_f) @ d]
    if len(h_r):
        for tolerance in (1e-14, 1e-7):
            _, s, v = torch.linalg.svd(h_r, full_matrices=True)
            rank = int((s > tolerance * s.max()).sum()) if s.numel() else 0
            kernel = v[rank:].T @ v[rank:]
            found.append(kernel @ torch.linalg.pinv(h_f @ kernel, rtol=1e-10) @ d)
        gram = h_r.T @ h_r
        for ridge in (1e-9, 1e-4, 1.0):
            matrix = gram + ridge * (gram.trace() + 1e-150) * torch.eye(len(gram)).double()
            base = torch.linalg.lstsq(matrix, h_f.T).solution
            found.append(base @ torch.linalg.pinv(h_f @ base) @ d)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-10, 1e-6, 1e-3):
        noise = torch.randn(answer.shape, generator=generator, dtype=torch.float64)
        found.append(answer + size * answer.norm() * noise / noise.norm())
    parts = [share * one for one in found[1:] for share in (0.5, 0.9)]
    return [one for one in [*found, *parts] if torch.isfinite(one).all()]


def descended(problem: ForgetProblem, start: torch.Tensor) -> torch.Tensor:
    """L-BFGS on the objective with smoothed norms, from a start."""
    exact = problem.double
    delta = start.clone().requires_grad_()
    size = float(problem.objective(start.double())) + 1e-300
    smooth = (1e-9 * size) ** 2

    def norm(x, weight):
        return (weight**2 * x.square().sum() + smooth).sqrt() if weight else 0 * x.sum()

    optimizer = torch.optim.LBFGS([delta], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (
            norm(exact.displacement - exact.forget_hidden @ delta, exact.lamb_forget)
            + norm(exact.retain_hidden @ delta, exact.lamb_preserve)
            + norm(delta, exact.lw)
        ) / size
        loss.backward()
        return loss

    optimizer.step(closure)
    return delta.detach()


def attack(problem: ForgetProblem, thorough: bool) -> None:
    """Solve, and fail if anything beats what is claimed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = solve_exact(problem)
    proof, judge, answer = solution.certificate, Judge(problem), solution.delta
    assert torch.isfinite(answer).all() and math.isfinite(proof.primal)
    nothing = judge(torch.zeros_like(answer))
    # Never worse than nothing, also as it is stored.
    stored = (
        solution.left.to(problem.projection.dtype).double()
        @ solution.right.to(problem.projection.dtype).double()
    )
    assert judge(stored) <= nothing * (1 + 1e-6) + proof.rounding
    assert abs(judge(answer) - proof.primal) <= proof.rounding + 1e-15 * proof.primal
    claimed = proof.primal * (1 - proof.gap)
    tries = candidates(problem, answer)
    if thorough:
        starts = sorted(tries, key=judge)[:2]
        tries += [one for one in (descended(problem, x) for x in starts) if one.isfinite().all()]
    for one in tries:
        if float(one.norm()) <= proof.radius:
            assert judge(one) >= claimed * (1 - 1e-15), (judge(one), proof)


@settings(max_examples=900, **QUIET)
@given(problems())
def test_nobody_finds_anything_better(problem):
    attack(problem, thorough=False)


@settings(max_examples=100, **QUIET)
@given(problems())
def test_no_descent_finds_anything_better(problem):
    attack(problem, thorough=True)


@pytest.mark.slow
@settings(max_examples=20_000, derandomize=False, **QUIET)
@given(problems(), st.integers(0, 9))
def test_nobody_finds_anything_better_in_twenty_thousand(problem, turn):
    attack(problem, thorough=turn == 0)


@settings(max_examples=200, **QUIET)
@given(problems())
def test_what_is_claimed_of_each_class_holds_too(problem):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = solve_each(problem)
    for i in range(len(problem.forget_hidden)):
        alone = problem.part(torch.tensor([i]))
        judge, answer = Judge(alone), each.left[i][:, None] * each.right[i]
        primal, gap = float(each.primal[i]), float(each.gap[i])
        assert math.isfinite(primal) and 0 <= gap <= 1
        if problem.lw == 0:
            continue  # within a radius only, see above
        for one in candidates(alone, answer):
            assert judge(one) >= primal * (1 - gap) * (1 - 1e-15)


@settings(max_examples=60, **QUIET)
@given(
    st.integers(0, 2**31),
    st.lists(st.sampled_from([0.0, 0.1, 1.0, 30.0]), min_size=3, max_size=3),
)
def test_an_interior_point_solver_finds_nothing_better(seed, weights):
    generator = torch.Generator().manual_seed(seed)
    tensors = (
        torch.randn(*shape, generator=generator).double()
        for shape in ((5, 3), (2, 5), (4, 5), (2, 3))
    )
    problem = ForgetProblem(*tensors, *weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = solve_exact(problem)
    delta = cvxpy.Variable((5, 3))
    terms = (
        problem.lamb_forget
        * cvxpy.norm(problem.displacement.numpy() - problem.forget_hidden.numpy() @ delta, "fro")
        + problem.lamb_preserve * cvxpy.norm(problem.retain_hidden.numpy() @ delta, "fro")
        + problem.lw * cvxpy.norm(delta, "fro")
    )
    cvxpy.Problem(cvxpy.Minimize(terms)).solve(solver=cvxpy.CLARABEL)
    proof = solution.certificate
    if delta.value is not None and np.linalg.norm(delta.value) <= proof.radius:
        assert Judge(problem)(delta.value) >= proof.primal * (1 - proof.gap) * (1 - 1e-12)


@settings(max_examples=300, **QUIET)
@given(st.integers(0, 2**31), SCALES, SCALES, st.floats(1e-9, 1e3), st.integers(1, 4))
def test_a_constrained_answer_is_as_cheap_as_is_claimed(seed, of_text, of_step, mu, k):
    """Any other change that lands costs at least what is claimed; extended precision judges."""
    generator = torch.Generator().manual_seed(seed)
    h_f = of_text * torch.randn(k, 6, generator=generator).double()
    h_r = of_text * torch.randn(5, 6, generator=generator).double()
    d = of_step * torch.randn(k, 4, generator=generator).double()
    mu = mu * of_text**2
    proof = solve_constrained(Ridge(h_r.T @ h_r, mu), h_f, d).certificate
    k_matrix = (h_r.T @ h_r + mu * torch.eye(6).double()).numpy().astype(np.longdouble)
    for tolerance in (1e-15, 1e-3):
        delta = (torch.linalg.pinv(h_f, rtol=tolerance) @ d).numpy().astype(np.longdouble)
        missed = h_f.numpy().astype(np.longdouble) @ delta - d.numpy()
        if np.abs(missed).max() <= 1e-12 * of_step:
            cost = (delta * (k_matrix @ delta)).sum()
            assert cost >= proof.primal * (1 - proof.gap) * (1 - 1e-10)


def test_the_counter_examples_of_the_first_release():
    """Each was called proved, and was not."""

    def normal(*shape, seed):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()

    for weight in (1e13, 1e30):
        problem = ForgetProblem(
            normal(16, 4, seed=4), normal(3, 16, seed=2), normal(60, 16, seed=1),
            normal(3, 4, seed=5), weight, 0.3, 0.2,
        )  # fmt: skip
        attack(problem, thorough=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert solve_exact(problem).certificate.gap == 1  # 1e30: rounding hides everything
    rows = normal(20, 64, seed=0).float()
    mean = ((rows[0] + rows[1]) / 2)[None]
    tensors = normal(64, 8, seed=1).float(), mean, rows, normal(1, 8, seed=2).float()
    attack(ForgetProblem(*tensors, 1.0, 0.3, 0.0), thorough=True)
    tensors = (normal(*shape, seed=9) for shape in ((6, 3), (2, 6), (4, 6), (2, 3)))
    zero = ForgetProblem(*tensors, 1.0, 0.3, 0.2)
    zero.forget_hidden[0] = 0
    each = solve_each(zero)
    assert torch.isfinite(each.primal).all() and float(each.left[0].norm()) == 0
