"""The exact solver: proved on every call, against an independent solver, and unable to lie."""

from __future__ import annotations

import warnings
from dataclasses import replace

import cvxpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip.bundle import load_bundle
from forgetting import ForgetProblem, LoraSettings, solve_lora
from forgetting.solvers.certificate import certify
from forgetting.solvers.exact import resolve_auto_weight, solve_exact, thresholds
from forgetting.solvers.spectrum import Reduced, Spectrum
from tests.conftest import REPOSITORY

REAL_CLIP = REPOSITORY.parent / "shared" / "real_clip"
GAP = 1e-9


def random_problem(k, m, w, d, seed, spoil="", **weights) -> ForgetProblem:
    """A problem with one of the edge cases that `spoil` names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h_f, h_r, projection, target = normal(k, w), normal(m, w), normal(w, d), normal(k, d)
    if "duplicate" in spoil and k > 1:
        h_f[1] = h_f[0]
    if "collinear" in spoil and k > 1:
        h_f[-1] = -2.5 * h_f[0]
    if "same target" in spoil:
        target = target[:1].expand(k, -1).clone()
    if "reachable" in spoil:
        target = h_f @ normal(w, d)
    if "retained" in spoil and m:
        h_r[0] = h_f[0]
    if "spanned" in spoil and m:
        h_f = normal(k, m) @ h_r
    if "graded" in spoil and weights.get("lamb_weight", 1.0) > 0:  # four decades
        h_r = h_r * torch.logspace(-2, 2, w, dtype=torch.float64)
    if "still" in spoil:
        target = h_f @ projection
    defaults = {"lamb_forget": 1.3, "lamb_preserve": 0.3, "lamb_weight": 1.0}
    return ForgetProblem(projection, h_f, h_r, target, **defaults | weights)


def tight(proof) -> bool:
    """Whether what is proved is as good as float64 allows."""
    return proof.primal - proof.bound <= GAP * proof.primal + proof.rounding


SPOILS = [
    *("", "duplicate", "collinear", "same target", "retained", "spanned", "graded", "still"),
    *("reachable", "duplicate reachable", "collinear reachable retained", "spanned reachable"),
    *("graded spanned", "same target collinear"),
]
WEIGHTS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(1e-2, 1e2))


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    k=st.integers(1, 6),
    m=st.integers(0, 12),
    w=st.integers(1, 8),
    d=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    spoil=st.sampled_from(SPOILS),
    lamb_forget=WEIGHTS,
    lamb_preserve=WEIGHTS,
    lamb_weight=WEIGHTS,
)
def test_every_answer_is_proved(k, m, w, d, seed, spoil, lamb_forget, lamb_preserve, lamb_weight):
    problem = random_problem(
        k,
        m,
        w,
        d,
        seed,
        spoil,
        lamb_forget=lamb_forget,
        lamb_preserve=lamb_preserve,
        lamb_weight=lamb_weight,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve_exact(problem)
    assert tight(solution.certificate)
    assert solution.left.shape[1] <= k and solution.branch in ("generic", "kernel", "none")
    primal = float(problem.objective(solution.delta))
    norm = torch.linalg.matrix_norm
    size = norm(solution.delta)
    lengths = lamb_forget * (norm(problem.displacement) + norm(problem.forget_hidden) * size)
    lengths += lamb_preserve * norm(problem.retain_hidden) * size
    rounding = 1e-13 * float(lengths)
    assert solution.certificate.primal == pytest.approx(primal, rel=1e-9, abs=rounding)


@pytest.mark.slow
@settings(max_examples=20_000, derandomize=False, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_many_more_answers_are_proved(data):
    """Fresh examples at every run, twenty times as many."""
    lamb_forget, lamb_preserve, lamb_weight = (data.draw(WEIGHTS) for _ in range(3))
    problem = random_problem(
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(0, 12)),
        data.draw(st.integers(1, 8)),
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(0, 2**31)),
        data.draw(st.sampled_from(SPOILS)),
        lamb_forget=lamb_forget,
        lamb_preserve=lamb_preserve,
        lamb_weight=lamb_weight,
    )
    assert tight(solve_exact(problem).certificate) or problem.lw == 0  # see docs/exact.md


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    k=st.integers(1, 4),
    m=st.integers(0, 6),
    w=st.integers(1, 6),
    d=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    spoil=st.sampled_from(SPOILS),
    lamb_forget=st.floats(0.1, 10),
    lamb_preserve=st.sampled_from([0.0, 0.1, 1.0]),
    lamb_weight=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_an_independent_solver_finds_the_same_value(
    k, m, w, d, seed, spoil, lamb_forget, lamb_preserve, lamb_weight
):
    weights = {
        "lamb_forget": lamb_forget,
        "lamb_preserve": lamb_preserve,
        "lamb_weight": lamb_weight,
    }
    problem = random_problem(k, m, w, d, seed, spoil, **weights)
    change = cvxpy.Variable((w, d))
    terms = lamb_forget * cvxpy.norm(problem.displacement - problem.forget_hidden @ change, "fro")
    if m and lamb_preserve:
        terms += lamb_preserve * cvxpy.norm(problem.retain_hidden @ change, "fro")
    if lamb_weight:
        terms += lamb_weight * 5 * cvxpy.norm(change, "fro")
    value = cvxpy.Problem(cvxpy.Minimize(terms)).solve(solver=cvxpy.CLARABEL)
    scale = lamb_forget * float(torch.linalg.matrix_norm(problem.displacement))
    found = solve_exact(problem).certificate.primal
    assert found == pytest.approx(value, rel=1e-6, abs=1e-6 * scale)


@pytest.fixture(params=["one text", "several, between", "several, on target", "kernel"])
def solved(request):
    """A solved problem of each kind, of the size of CLIP's text tower but for speed."""
    k = 1 if request.param == "one text" else 3
    m = 4 if request.param == "kernel" else 60
    problem = random_problem(k, m, 24, 16, 7, lamb_forget=1e3)
    if request.param == "several, between":
        limits = thresholds(problem)
        problem = replace(problem, lamb_forget=(limits.start * limits.reach) ** 0.5)
    if request.param == "kernel":  # dear to move what is retained, cheap to move at all
        problem = replace(problem, lamb_preserve=50.0, lamb_weight=0.05)
    solution = solve_exact(problem)
    assert tight(solution.certificate)
    assert (solution.branch == "kernel") == (request.param == "kernel")
    assert (solution.rho > 0) == (request.param == "several, between")
    return problem, solution


def gap_of(problem, solution, **changes) -> float:
    names = ("left", "right", "y", "u_left", "u_right")
    parts = {name: changes.get(name, getattr(solution, name)) for name in names}
    return certify(solution.problem, **parts).gap


def test_a_perturbed_answer_shows_a_gap(solved):
    problem, solution = solved
    noise = torch.randn(solution.right.shape, generator=torch.Generator().manual_seed(1)).double()
    noise *= torch.linalg.matrix_norm(solution.right) / torch.linalg.matrix_norm(noise)
    gaps = [gap_of(problem, solution, right=solution.right + s * noise) for s in (1e-3, 1e-2, 1e-1)]
    assert GAP < gaps[0] < gaps[1] < gaps[2]
    assert gap_of(problem, solution, right=1.1 * solution.right) > 1e-4


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_wrong_mu_shows_a_gap(solved, factor):
    """The multipliers of a mu that is 10% off, and the change that belongs to it."""
    problem, solution = solved
    if solution.branch == "kernel":
        pytest.skip("mu is 0 there")
    reduced = Reduced(problem, Spectrum(problem.retain_hidden, precise=True))
    mu = factor * solution.mu
    left = reduced.left_factor(mu)
    a = reduced.a(mu) + solution.rho * mu * torch.eye(len(left.T), dtype=torch.float64)
    z = torch.linalg.solve(a, reduced.d)
    y = reduced.rotation @ z * (reduced.lw / torch.linalg.matrix_norm(left @ z))
    basis = reduced.spectrum.vectors @ (reduced.inside / (reduced.e + mu)).T
    u_left = problem.retain_hidden @ basis
    assert certify(problem, left, z, y, u_left, reduced.rotation.T @ y).gap > 1e-5


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_multipliers_of_the_wrong_length_show_a_gap(solved, factor):
    problem, solution = solved
    assert gap_of(problem, solution, y=factor * solution.y) > 1e-3
    if factor < 1:
        shorter = {"y": factor * solution.y, "u_right": factor * solution.u_right}
        assert gap_of(problem, solution, **shorter) == pytest.approx(0.1, abs=1e-6)


def test_a_bound_without_v_would_be_no_bound(solved):
    """With Y stretched until U's and Y's limits alone bind, <Y, D> can exceed the optimum."""
    problem, solution = solved
    y = 3 * solution.y
    assert float((y * problem.displacement).sum()) > solution.certificate.primal
    assert certify(
        solution.problem, solution.left, solution.right, y, solution.u_left, solution.u_right
    ).bound <= solution.certificate.primal * (1 + 1e-12)


def test_nan_is_never_a_proof():
    problem = random_problem(2, 5, 4, 3, 0, lamb_forget=1e3)
    solution = solve_exact(problem)
    assert gap_of(problem, solution, right=solution.right * float("nan")) == 1.0


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 5), m=st.integers(0, 12), w=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_thresholds_are_where_the_answer_changes(k, m, w, seed):
    problem = random_problem(k, m, w, 4, seed)
    limits = thresholds(problem)
    assert limits.start <= limits.reach
    if k == 1:
        assert limits.start == pytest.approx(limits.reach, rel=1e-9)

    def at(lamb_forget):
        return solve_exact(replace(problem, lamb_forget=lamb_forget))

    assert at(0.999 * limits.start).branch == "none"
    assert at(1.001 * limits.start).branch != "none"
    if k > w:
        assert limits.reach == float("inf")
    else:
        assert at(1.001 * limits.reach).rho == 0
        if k > 1 and limits.reach > 1.01 * limits.start:
            assert at(0.999 * limits.reach).rho > 0
        auto = resolve_auto_weight(replace(problem, lamb_forget="auto")).lamb_forget
        assert limits.reach < auto < 1.01 * limits.reach
        assert problem.reduction(at(auto).delta) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_the_descent_agrees_on_both_sides_of_the_threshold(k):
    problem = random_problem(k, 40, 24, 16, 5, "same target")
    names = ("projection", "forget_hidden", "retain_hidden", "target")
    problem = replace(problem, **{name: getattr(problem, name).float() for name in names})
    limits = thresholds(problem)
    for factor, moves in ((0.9, False), (1.15, True)):
        tried = replace(problem, lamb_forget=factor * (limits.reach if moves else limits.start))
        descent = solve_lora(tried, LoraSettings(steps=1500, max_trials=1))
        exact = solve_exact(tried)
        assert exact.certificate.primal <= descent.objective * (1 + 1e-6)
        assert descent.objective <= 1.02 * exact.certificate.primal
        assert (descent.reduction > 0.7) == moves == (problem.reduction(exact.delta.float()) > 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_problems_are_solved_in_float64(dtype):
    problem = random_problem(2, 20, 12, 8, 1)
    names = ("projection", "forget_hidden", "retain_hidden", "target")
    problem = replace(problem, **{name: getattr(problem, name).to(dtype) for name in names})
    solution = solve_exact(problem)
    assert solution.left.dtype == torch.float64 and solution.certificate.gap <= GAP


@pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="needs bundles of real CLIP features")
@pytest.mark.parametrize("dataset", ["CaltechNature", "CaltechObjects", "StanfordCars"])
def test_every_class_of_real_clip_is_proved(dataset):
    bundle = load_bundle(REAL_CLIP, "ViT-B/32", dataset)
    spectrum = Spectrum(bundle.retain_hidden)
    empty = torch.nn.functional.normalize(bundle.neutral_hidden @ bundle.text_projection)
    groups = [[label] for label in range(min(30, len(bundle.classnames)))]
    for labels in [*groups, [0, 1, 2], list(range(12))]:
        for lamb_forget in (1.3, 2.5):
            problem = ForgetProblem(
                bundle.text_projection,
                bundle.forget_hidden[labels],
                bundle.retain_hidden,
                empty.expand(len(labels), -1).clone(),
                lamb_forget=lamb_forget,
                lamb_preserve=0.3,
            )
            assert solve_exact(problem, spectrum).certificate.gap <= 1e-12


@pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="needs bundles of real CLIP features")
def test_the_kernel_branch_of_real_clip():
    """The first 100 texts of ImageNetText retained, lp = 0.3, lw = 5: some classes take it."""
    bundle = load_bundle(REAL_CLIP, "ViT-B/16", "ImageNetText")
    target = torch.nn.functional.normalize(bundle.neutral_hidden @ bundle.text_projection)
    rows = bundle.forget_hidden
    spectrum, kernel = Spectrum(rows[:100]), 0
    for label in range(0, 1000, 40):
        problem = ForgetProblem(
            bundle.text_projection, rows[label : label + 1], rows[:100], target, 50.0, 0.3
        )
        solution = solve_exact(problem, spectrum)
        assert solution.certificate.gap <= GAP
        if solution.branch == "kernel":
            kernel += 1
            moved = torch.linalg.matrix_norm(problem.retain_hidden.double() @ solution.delta)
            assert moved < 1e-9 * torch.linalg.matrix_norm(solution.delta)
    assert 0 < kernel < 25
