"""The optimum of the paper's objective: proved on every call, and equal to an independent solver's;
many classes at once equal class by class."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import cvxpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip.bundle import load_bundle
from forgetting import (
    ForgetProblem,
    LoraSettings,
    ProblemError,
    Spectrum,
    resolve_auto_weight,
    solve_each,
    solve_exact,
    solve_lora,
    solve_requests,
    thresholds,
)
from tests.solver_fixtures import (
    GAP,
    REAL_CLIP,
    SPOILS,
    TENSORS,
    class_set,
    random_problem,
    tight,
)

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
needs_clip = pytest.mark.skipif(
    not REAL_CLIP.is_dir(), reason="needs bundles of real CLIP features"
)


@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
@given(**RANDOM)
def test_every_answer_is_proved(**drawn):
    problem = random_problem(**drawn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve_exact(problem)
    assert tight(solution.certificate)
    assert solution.left.shape[1] <= drawn["k"]
    assert solution.branch in ("generic", "kernel", "none")
    norm = torch.linalg.matrix_norm
    size = norm(solution.delta)
    lengths = problem.lamb_forget * (
        norm(problem.displacement) + norm(problem.forget_hidden) * size
    )
    lengths += problem.lamb_preserve * norm(problem.retain_hidden) * size
    primal, rounding = float(problem.objective(solution.delta)), 1e-13 * float(lengths)
    assert solution.certificate.primal == pytest.approx(primal, rel=1e-9, abs=rounding)


@pytest.mark.slow
@settings(max_examples=20_000, derandomize=False, suppress_health_check=list(HealthCheck))
@given(**RANDOM)
def test_many_more_answers_are_proved(**drawn):
    """Fresh examples at every run, twenty times as many."""
    problem = random_problem(**drawn)
    assert tight(solve_exact(problem).certificate) or problem.lw == 0  # see docs/exact.md


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    k=st.integers(1, 4),
    m=st.integers(0, 6),
    w=st.integers(1, 6),
    d=st.integers(1, 4),
    seed=SEEDS,
    spoil=st.sampled_from(SPOILS),
    lamb_forget=st.floats(0.1, 10),
    lamb_preserve=st.sampled_from([0.0, 0.1, 1.0]),
    lamb_weight=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_an_independent_solver_finds_the_same_value(**drawn):
    problem = random_problem(**drawn)
    change = cvxpy.Variable(problem.projection.shape)
    missed = problem.displacement - problem.forget_hidden @ change
    terms = problem.lamb_forget * cvxpy.norm(missed, "fro")
    if len(problem.retain_hidden) and problem.lamb_preserve:
        terms += problem.lamb_preserve * cvxpy.norm(problem.retain_hidden @ change, "fro")
    if problem.lw:
        terms += problem.lw * cvxpy.norm(change, "fro")
    value = cvxpy.Problem(cvxpy.Minimize(terms)).solve(solver=cvxpy.CLARABEL)
    scale = problem.lamb_forget * float(torch.linalg.matrix_norm(problem.displacement))
    assert solve_exact(problem).certificate.primal == pytest.approx(
        value, rel=1e-6, abs=1e-6 * scale
    )


@settings(max_examples=50)
@given(
    k=st.integers(1, 5),
    m=st.integers(0, 12),
    w=st.integers(2, 8),
    seed=SEEDS,
    lamb_weight=st.sampled_from([1.0, 0.0]),
    spoil=st.sampled_from(["", "spanned"]),
)
def test_thresholds_are_where_the_answer_changes(k, m, w, seed, lamb_weight, spoil):
    problem = random_problem(k, m, w, 4, seed, spoil, lamb_weight=lamb_weight)
    limits = thresholds(problem)
    assert limits.start <= limits.reach
    if k == 1:
        assert limits.start == pytest.approx(limits.reach, rel=1e-9)

    def at(lamb_forget):
        return solve_exact(replace(problem, lamb_forget=lamb_forget))

    if limits.start > 1e-6:  # else it moves for free
        assert at(0.999 * limits.start).branch == "none"
    assert at(1.001 * limits.start + 1e-6).branch != "none"
    if limits.reach == math.inf:
        assert k > min(w, m if spoil and m else w)
        with pytest.raises(ProblemError, match="lamb_forget"):
            resolve_auto_weight(replace(problem, lamb_forget="auto"))
        return
    assert k <= w
    if limits.reach > 1e-6:
        assert at(1.001 * limits.reach).rho == 0
    if limits.reach > 1.01 * limits.start + 1e-6:
        assert at(0.999 * limits.reach).rho > 0
    auto = resolve_auto_weight(replace(problem, lamb_forget="auto")).lamb_forget
    assert limits.reach <= auto <= 1.01 * limits.reach
    if auto > 0:
        assert problem.reduction(at(auto).delta) == pytest.approx(1, abs=1e-6)


@settings(max_examples=60)
@given(
    k=st.integers(1, 4),
    m=st.integers(0, 5),
    w=st.integers(1, 6),
    seed=SEEDS,
    lamb_preserve=st.sampled_from([0.0, 0.3]),
)
def test_just_above_the_threshold_where_nobody_is_retained(k, m, w, seed, lamb_preserve):
    """One float64 above the threshold nothing moves yet, to rounding; without a preserve term, and
    without names."""
    m = 0 if lamb_preserve > 0 else m
    problem = random_problem(k, m, w, 3, seed, lamb_preserve=lamb_preserve)
    start = thresholds(problem).start
    for lamb_forget in (start, math.nextafter(start, math.inf), start * (1 + 1e-15)):
        assert tight(solve_exact(replace(problem, lamb_forget=lamb_forget)).certificate)


@pytest.mark.parametrize("lamb_forget", [0.5, 3.0, "auto"])
def test_retained_states_that_are_all_zero_hold_nothing(lamb_forget):
    """As if nobody were retained, by each of the solvers."""
    problem, excluded = class_set(3, 5, 6, 4, 0, lamb_forget=lamb_forget)
    zero = replace(problem, retain_hidden=torch.zeros_like(problem.retain_hidden))
    nobody = replace(problem, retain_hidden=problem.retain_hidden[:0])
    expected = solve_each(nobody)
    for each in (solve_each(zero), solve_each(zero, excluded)):
        assert torch.allclose(each.primal, expected.primal, rtol=1e-12)
        assert float(each.gap.max()) < GAP
    for found in solve_requests(zero, torch.tensor([0, 1, 1]), excluded[:2]):
        assert found.report["certificate"]["gap"] < GAP
    assert thresholds(zero).reach == pytest.approx(thresholds(nobody).reach, rel=1e-12)


@pytest.mark.parametrize("k", [1, 3])
def test_the_descent_agrees_on_both_sides_of_the_threshold(k):
    problem = random_problem(k, 40, 24, 16, 5, "same target")
    problem = replace(problem, **{name: getattr(problem, name).float() for name in TENSORS})
    limits = thresholds(problem)
    for factor, moves in ((0.9, False), (1.15, True)):
        tried = replace(problem, lamb_forget=factor * (limits.reach if moves else limits.start))
        descent = solve_lora(tried, LoraSettings(steps=1500, max_trials=1))
        exact = solve_exact(tried)
        assert exact.certificate.primal <= descent.objective * (1 + 1e-6)
        assert descent.objective <= 1.02 * exact.certificate.primal
        assert (descent.reduction > 0.7) == moves == (problem.reduction(exact.delta.float()) > 0.7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_problems_of_lower_precision_are_solved_in_float64(dtype):
    problem = random_problem(2, 20, 12, 8, 1)
    problem = replace(problem, **{name: getattr(problem, name).to(dtype) for name in TENSORS})
    solution = solve_exact(problem)
    assert solution.left.dtype == torch.float64 and solution.certificate.gap <= GAP


def test_very_many_retained_texts_are_seen_through_their_triangle():
    """Half of their singular values at 1e-8 of the largest; G alone would lose those."""
    problem = random_problem(2, 60, 12, 8, 4, lamb_forget=40.0, lamb_preserve=30.0)
    u, s, vh = torch.linalg.svd(problem.retain_hidden, full_matrices=False)
    s[6:] = 1e-8 * s[0]
    problem = replace(problem, retain_hidden=(u * s) @ vh)
    solution = solve_exact(problem)
    assert solution.problem.retain_hidden.shape == (12, 12)  # the triangle of 60 rows
    assert solution.certificate.gap < GAP
    primal = float(problem.objective(solution.delta))
    assert primal == pytest.approx(solution.certificate.primal, rel=1e-12)


@settings(max_examples=60)
@given(
    classes=st.integers(2, 7),
    further=st.integers(0, 12),
    w=st.integers(2, 10),
    seed=SEEDS,
    lamb_forget=st.floats(0.1, 10),
    lamb_preserve=st.sampled_from([0.0, 0.05, 1.0]),
    lamb_weight=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_all_classes_at_once_are_as_class_by_class(classes, further, w, seed, **weights):
    problem, excluded = class_set(classes, further, w, 5, seed, **weights)
    together = solve_each(problem, excluded)
    for i in range(classes):
        single = problem.part(torch.tensor([i]), ~excluded[i])
        one = solve_exact(single)
        primal = pytest.approx(one.certificate.primal, rel=1e-9, abs=1e-12)
        assert float(together.gap[i]) <= GAP or one.certificate.gap > 1e-10
        assert float(together.primal[i]) == primal
        delta = together.left[i][:, None] * together.right[i]
        assert float(single.objective(delta)) == primal
        if problem.lw > 0:  # else the minimiser is not unique
            size = float(torch.linalg.matrix_norm(one.delta)) + 1e-9
            assert float(torch.linalg.matrix_norm(delta - one.delta)) <= 1e-7 * size
            assert float(together.reach[i]) == pytest.approx(thresholds(single).reach, rel=1e-9)


@settings(max_examples=60)
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
    problem = replace(
        problem,
        forget_hidden=scale * problem.forget_hidden,
        retain_hidden=scale * problem.retain_hidden,
        lamb_weight=scale * problem.lamb_weight,
    )
    together = solve_each(problem, excluded)
    assert together.fallbacks == 0 and float(together.gap.max()) <= 1e-10


def test_fewer_names_than_dimensions():
    """Where they are dear to move, a class moves through their kernel, one by one; else not."""
    problem = random_problem(6, 4, 12, 5, 3, lamb_forget=50.0, lamb_weight=0.05)
    for lamb_preserve, branch, fallbacks in ((50.0, "kernel", 6), (0.01, "generic", 0)):
        together = solve_each(replace(problem, lamb_preserve=lamb_preserve))
        assert [together.branch(i) for i in range(6)] == [branch] * 6
        assert together.fallbacks == fallbacks and float(together.gap.max()) <= 1e-10


def test_auto_is_just_above_the_threshold_of_each_class():
    problem, excluded = class_set(4, 9, 8, 6, 0, lamb_forget="auto")
    together = solve_each(problem, excluded)
    assert (together.lamb_forget / together.reach).tolist() == pytest.approx([1.001] * 4)
    assert together.left.any(dim=1).all() and float(together.gap.max()) < GAP
    for i in range(4):
        one = solve_exact(problem.part(torch.tensor([i]), ~excluded[i]))
        assert float(together.primal[i]) == pytest.approx(one.certificate.primal, rel=1e-9)


def test_retaining_the_class_itself_would_be_another_answer():
    """Negative control of the downdate: without it the class's own row holds it back."""
    problem, excluded = class_set(4, 5, 8, 6, 0, lamb_forget=3.0, lamb_weight=0.2)
    retained, left_out = solve_each(problem), solve_each(problem, excluded)
    assert (retained.primal[:3] > left_out.primal[:3] * 1.001).all()
    assert retained.primal[3] == pytest.approx(float(left_out.primal[3]), rel=1e-12)


@settings(max_examples=30)
@given(seed=SEEDS, owner=st.permutations([0, 1, 1, 2, 3, 3]))
def test_requests_of_any_number_of_texts_are_as_each_alone(seed, owner):
    problem = random_problem(6, 14, 9, 5, seed, lamb_forget=4.0)
    owner = torch.tensor(owner)
    excluded = torch.rand(4, 14, generator=torch.Generator().manual_seed(seed)) < 0.2
    for request, (left, right, report) in enumerate(solve_requests(problem, owner, excluded)):
        single = problem.part(owner == request, ~excluded[request])
        one, limits = solve_exact(single), thresholds(single)
        assert report["certificate"]["primal"] == pytest.approx(one.certificate.primal, rel=1e-9)
        assert report["branch"] == one.branch and left.shape[1] == len(right)
        assert report["thresholds"]["reach"] == pytest.approx(limits.reach, rel=1e-9)
        assert torch.allclose(left @ right, one.delta, rtol=1e-6, atol=1e-7)


@needs_clip
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
                lamb_forget,
                0.3,
            )
            assert solve_exact(problem, spectrum).certificate.gap <= 1e-12


@needs_clip
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


@needs_clip
@pytest.mark.parametrize("lamb_forget", [0.4, 0.8, 1.3])
def test_a_thousand_classes_of_real_clip(lamb_forget):
    """0.4: none moves; 0.8: some do; 1.3: all do."""
    bundle = load_bundle(REAL_CLIP, "ViT-B/16", "ImageNetText")
    target = torch.nn.functional.normalize(bundle.neutral_hidden @ bundle.text_projection)
    rows = bundle.forget_hidden
    every = target.expand(1000, -1).clone()
    problem = ForgetProblem(bundle.text_projection, rows, rows, every, lamb_forget, 0.3)
    excluded = torch.eye(1000, dtype=torch.bool)
    together = solve_each(problem, excluded)
    assert float(together.gap.max()) <= 1e-12 and together.fallbacks == 0
    moved = int((together.left.abs().sum(dim=1) > 0).sum())
    assert {0.4: moved == 0, 0.8: 100 < moved < 900, 1.3: moved == 1000}[lamb_forget]
    for i in (0, 333, 999):
        one = solve_exact(problem.part(torch.tensor([i]), ~excluded[i]))
        assert float(together.primal[i]) == pytest.approx(one.certificate.primal, rel=1e-9)
        delta = together.left[i][:, None] * together.right[i]
        missed = torch.linalg.matrix_norm(delta - one.delta)
        assert missed <= 1e-9 * torch.linalg.matrix_norm(one.delta)
