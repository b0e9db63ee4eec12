"""The optimum of the paper's objective: proved on every call, and equal to an independent solver's;
many requests at once equal each alone."""

import math
from dataclasses import replace

import cvxpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip.bundle import load_bundle
from forgetting import ForgetProblem, ProblemError, solve_exact
from forgetting.solvers import exact
from forgetting.solvers.exact import solve_each, thresholds
from forgetting.solvers.spectrum import find_roots
from tests.audit_fixtures import REAL_CLIP, needs_real_clip
from tests.solver_fixtures import EVERY, GAP, SPOILS, class_set, random_problem, tight

WEIGHTS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(1e-2, 1e2))
SEEDS = st.integers(0, 2**31)
RANDOM = {
    "k": st.integers(1, 6),
    "m": st.integers(0, 12),
    "w": st.integers(1, 8),
    "d": st.integers(1, 6),
    "seed": SEEDS,
    "spoil": st.sampled_from(SPOILS),
    "lamb_forget": WEIGHTS,
    "lamb_preserve": WEIGHTS,
    "lamb_weight": WEIGHTS,
}
MODERATE = {
    "k": st.integers(1, 4),
    "lamb_forget": st.floats(0.1, 10),
    "lamb_preserve": st.sampled_from([0.0, 0.05, 1.0]),
    "lamb_weight": st.sampled_from([0.0, 0.05, 1.0]),
}
norm = torch.linalg.matrix_norm


@settings(max_examples=200, **EVERY)
@given(**RANDOM)
def test_every_answer_is_proved(**drawn):
    problem = random_problem(**drawn)
    solution = solve_exact(problem)
    assert tight(solution.certificate)
    assert solution.left.shape[1] <= min(drawn["k"], drawn["w"])
    assert solution.branch in ("generic", "kernel", "none")
    size = norm(solution.delta)
    lengths = problem.lamb_forget * norm(problem.displacement)
    lengths += problem.lamb_forget * norm(problem.forget_hidden) * size
    lengths += problem.lamb_preserve * norm(problem.retain_hidden) * size
    primal, rounding = float(problem.objective(solution.delta)), 1e-13 * float(lengths)
    assert solution.certificate.primal == pytest.approx(primal, rel=1e-9, abs=rounding)


@settings(max_examples=40, **EVERY)
@given(**RANDOM | MODERATE)
def test_an_independent_solver_finds_the_same_value(**drawn):
    """An interior-point method."""
    problem = random_problem(**drawn)
    change = cvxpy.Variable(problem.projection.shape)
    missed = problem.displacement - problem.forget_hidden @ change
    terms = problem.lamb_forget * cvxpy.norm(missed, "fro")
    if len(problem.retain_hidden) and problem.lamb_preserve:
        terms += problem.lamb_preserve * cvxpy.norm(problem.retain_hidden @ change, "fro")
    if problem.lw:
        terms += problem.lw * cvxpy.norm(change, "fro")
    value = cvxpy.Problem(cvxpy.Minimize(terms)).solve(solver=cvxpy.CLARABEL)
    scale = problem.lamb_forget * float(norm(problem.displacement))
    proof = solve_exact(problem).certificate
    assert proof.primal == pytest.approx(value, rel=1e-6, abs=1e-6 * scale)
    if norm(torch.as_tensor(change.value)) <= proof.radius:
        assert proof.bound <= value + 1e-7 * scale


@settings(max_examples=30)
@given(
    k=st.integers(1, 5),
    m=st.integers(0, 12),
    w=st.integers(2, 8),
    seed=SEEDS,
    lamb_preserve=st.sampled_from([0.3, 0.0]),
    lamb_weight=st.sampled_from([1.0, 0.0]),
    spoil=st.sampled_from(["", "spanned"]),
)
def test_thresholds_are_where_the_answer_changes(k, m, w, seed, lamb_preserve, lamb_weight, spoil):
    lamb_preserve = lamb_preserve if lamb_weight else 0.3
    weights = {"lamb_preserve": lamb_preserve, "lamb_weight": lamb_weight}
    problem = random_problem(k, m, w, 4, seed, spoil, **weights)
    limits = thresholds(problem)
    assert limits.start <= limits.reach
    if k == 1:
        assert limits.start == pytest.approx(limits.reach, rel=1e-9)

    def at(lamb_forget):
        solution = solve_exact(replace(problem, lamb_forget=lamb_forget))
        assert solution.thresholds.reach == pytest.approx(limits.reach, rel=1e-9, abs=1e-9)
        return solution

    # One float64 above the threshold nothing moves yet, to rounding.
    for lamb_forget in (limits.start, limits.start * (1 + 1e-15)):
        assert tight(at(lamb_forget).certificate)
    if limits.start > 1e-6:  # else it moves for free
        assert at(0.999 * limits.start).branch == "none"
    assert at(1.001 * limits.start + 1e-6).branch != "none"
    if limits.reach == math.inf:
        assert k > min(w, m if spoil and m else w)
        with pytest.raises(ProblemError, match="lamb_forget"):
            at("auto")
        return
    assert k <= w
    if limits.reach > 1e-6:
        assert at(1.001 * limits.reach).rho == 0
    if limits.reach > 1.01 * limits.start + 1e-6:
        assert at(0.999 * limits.reach).rho > 0
    auto = at("auto")
    assert auto.lamb_forget == pytest.approx(1.001 * limits.reach, rel=1e-12)
    if auto.lamb_forget > 1e-9:
        assert problem.reduction(auto.delta) == pytest.approx(1, abs=1e-6)


def test_roots_are_bracketed_from_the_first_step_and_found_in_a_few():
    """Of functions on [0, 5], outside of which they must not be called."""
    calls = []

    def function(x):
        calls.append(x)
        return torch.stack([x[0] ** 3 - 2, x[1].exp() - 10, x[2].sqrt() - 1.5, x[3] - 5])

    roots = find_roots(function, torch.zeros(4).double(), torch.full((4,), 5.0).double())
    expected = torch.tensor([2 ** (1 / 3), math.log(10), 2.25, 5.0], dtype=torch.float64)
    assert torch.allclose(roots, expected, rtol=1e-14, atol=0)
    x = torch.stack(calls)
    assert bool(((x >= 0) & (x <= 5)).all()) and len(calls) < 20


def test_very_many_retained_texts_are_seen_through_their_triangle():
    """Half of their singular values at 1e-8 of the largest; G alone would lose those."""
    problem = random_problem(2, 60, 12, 8, 4, lamb_forget=40.0, lamb_preserve=30.0)
    u, s, vh = torch.linalg.svd(problem.retain_hidden, full_matrices=False)
    s[6:] = 1e-8 * s[0]
    problem = replace(problem, retain_hidden=(u * s) @ vh)
    assert exact.Spectrum(problem.retain_hidden).rows.shape == (12, 12)
    solution = solve_exact(problem)
    primal = float(problem.objective(solution.delta))
    assert primal == pytest.approx(solution.certificate.primal, rel=1e-12)
    assert solution.certificate.gap < GAP


@settings(max_examples=50, **EVERY)
@given(owner=st.permutations([0, 1, 1, 2, 3, 3, 3]), auto=st.booleans(), **RANDOM | MODERATE)
def test_many_requests_are_as_each_alone(owner, auto, **drawn):
    drawn |= {"k": 7, "lamb_forget": "auto"} if auto else {"k": 7}
    problem, owner = random_problem(**drawn), torch.tensor(owner)
    m, w, seed = (drawn[name] for name in ("m", "w", "seed"))
    excluded = torch.rand(4, m, generator=torch.Generator().manual_seed(seed)) < 0.2
    parts = [problem.part(owner == i, ~excluded[i]) for i in range(4)]
    try:
        alone = [solve_exact(part) for part in parts]
    except ProblemError:  # "auto" for a target that is out of reach
        return
    for one, together, part in zip(alone, solve_each(problem, owner, excluded), parts, strict=True):
        assert tight(together.certificate)
        primal = pytest.approx(one.certificate.primal, rel=1e-9, abs=1e-12)
        assert together.certificate.primal == primal
        judged = replace(part, lamb_forget=together.lamb_forget)
        assert float(judged.objective(together.delta)) == primal
        assert together.lamb_forget == pytest.approx(one.lamb_forget, rel=1e-9, abs=1e-12)
        assert together.branch == one.branch and len(together.right) <= min(w, len(part.target))
        for name in ("start", "reach"):
            limits = (getattr(solution.thresholds, name) for solution in (together, one))
            assert next(limits) == pytest.approx(next(limits), rel=1e-9, abs=1e-9)
        if problem.lw > 0:  # else the minimiser is not unique
            assert norm(together.delta - one.delta) <= 1e-7 * norm(one.delta) + 1e-9


@settings(max_examples=30)
@given(
    further=st.integers(20, 60),
    w=st.integers(8, 16),
    seed=SEEDS,
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    lamb_forget=st.sampled_from([0.7, 5.0, "auto"]),
)
def test_ordinary_classes_need_no_fall_back(further, w, seed, scale, lamb_forget):
    """The shared factorisation is right by itself: more names than dimensions are retained."""
    problem, excluded = class_set(5, further, w, 6, seed, lamb_forget=lamb_forget)
    scaled = ("forget_hidden", "retain_hidden", "lamb_weight")
    problem = replace(problem, **{name: scale * getattr(problem, name) for name in scaled})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "solve_exact", lambda problem: pytest.fail("solved alone"))
        answers = solve_each(problem, torch.arange(5), excluded)
    assert max(answer.certificate.gap for answer in answers) <= 1e-10
    # Negative control of the downdate: without it the class's own row holds it back.
    retained = solve_each(problem, torch.arange(5), torch.zeros_like(excluded))
    costs = [(a.certificate.primal, b.certificate.primal) for a, b in zip(answers, retained)]  # noqa: B905
    if lamb_forget == 5.0:
        assert all(without < 0.9999 * beside for without, beside in costs[:4])
        assert costs[4][0] <= costs[4][1] * (1 + 1e-12)


@needs_real_clip
@pytest.mark.parametrize("lamb_forget", [0.4, 0.8, 1.3])
def test_a_thousand_classes_of_real_clip(lamb_forget):
    """0.4: none moves; 0.8: some do; 1.3: all do."""
    bundle = load_bundle(REAL_CLIP, "ViT-B/16", "ImageNetText")
    texts, w = bundle.forget_hidden, bundle.text_projection
    target = torch.nn.functional.normalize(bundle.neutral_hidden @ w).repeat(1000, 1)
    problem = ForgetProblem(w, texts, texts, target, lamb_forget, 0.3)
    excluded = torch.eye(1000, dtype=torch.bool)
    answers = solve_each(problem, torch.arange(1000), excluded)
    assert max(answer.certificate.gap for answer in answers) <= 1e-12
    moved = sum(answer.branch != "none" for answer in answers)
    assert {0.4: moved == 0, 0.8: 100 < moved < 900, 1.3: moved == 1000}[lamb_forget]
    for i in (0, 333, 999):
        one = solve_exact(problem.part(torch.tensor([i]), ~excluded[i]))
        primal = pytest.approx(one.certificate.primal, rel=1e-9)
        assert answers[i].certificate.primal == primal
        assert norm(answers[i].delta - one.delta) <= 1e-9 * norm(one.delta)
