"""The paper's problem, target, descent and adapter, on plain tensors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetting import (
    Adapter,
    ForgetProblem,
    LoraSettings,
    empty_target,
    load_adapter,
    projection_sha256,
    save_adapter,
    solve_lora,
    solve_lora_each,
)
from forgetting.errors import ProblemError

SHORT = LoraSettings(steps=300, max_trials=3)


def make_problem(k=1, m=20, w=12, d=8, seed=0, **weights) -> ForgetProblem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    target = torch.nn.functional.normalize(normal(1, d), dim=-1).expand(k, -1).clone()
    defaults = {"lamb_forget": 3.0, "lamb_preserve": 0.05, "lamb_weight": 0.02}
    return ForgetProblem(normal(w, d), normal(k, w), normal(m, w), target, **defaults | weights)


@settings(max_examples=30, deadline=None)
@given(
    k=st.integers(1, 4),
    m=st.integers(0, 6),
    seed=st.integers(0, 2**16),
    rank=st.integers(1, 6),
    alpha=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_objective_is_the_papers_formula(k, m, seed, rank, alpha):
    """Against an entry-by-entry recomputation in B and A, as the paper writes it."""
    problem = make_problem(k, m, seed=seed, rank=rank, alpha=alpha)
    generator = torch.Generator().manual_seed(seed + 1)
    w, d = problem.projection.shape
    a, b = torch.randn(rank, w, generator=generator), torch.randn(d, rank, generator=generator)
    delta = (alpha / rank) * (b @ a).T
    adapted = problem.projection + delta

    def norm(rows):
        return math.sqrt(sum(float(x) ** 2 for row in rows for x in row))

    expected = (
        problem.lamb_forget * norm(problem.target - problem.forget_hidden @ adapted)
        + problem.lamb_preserve * norm(problem.retain_hidden @ delta)
        + problem.lamb_weight * norm(b @ a)
    )
    assert float(problem.objective(delta)) == pytest.approx(expected, rel=1e-4)
    # Negative control: without the factor r / alpha the weight term would be another one.
    if rank != alpha:
        other = expected + problem.lamb_weight * (norm(delta) - norm(b @ a))
        assert float(problem.objective(delta)) != pytest.approx(other, rel=1e-6)


def test_reduction_rule():
    problem = make_problem()
    exact = torch.linalg.pinv(problem.forget_hidden) @ problem.displacement
    assert problem.reduction(torch.zeros_like(problem.projection)) == 0
    assert problem.reduction(exact) == pytest.approx(1, abs=1e-5)
    assert problem.reduction(0.4 * exact) == pytest.approx(0.4, abs=1e-5)
    # The paper takes the absolute value: moving away by half counts like moving nearer by half.
    assert problem.reduction(-0.5 * exact) == pytest.approx(0.5, abs=1e-5)


def test_reduction_of_a_text_that_starts_on_its_target():
    problem = make_problem()
    problem = replace(problem, target=problem.forget_hidden @ problem.projection)
    assert problem.reduction(torch.zeros_like(problem.projection)) == 1
    assert problem.reduction(torch.ones_like(problem.projection)) == 0


@pytest.mark.parametrize("k", [1, 3])
def test_descent_forgets_and_keeps_what_it_reports(k):
    problem = make_problem(k)
    solution = solve_lora(problem, replace(SHORT, steps=800))
    assert solution.reached and len(solution.trials) == 1
    assert solution.reduction >= 0.7
    assert solution.left.shape == (12, 5) and solution.right.shape == (5, 8)
    assert problem.reduction(solution.delta) == pytest.approx(solution.reduction, abs=1e-4)
    assert float(problem.objective(solution.delta)) == pytest.approx(solution.objective, rel=1e-4)


def test_the_lowest_objective_of_a_trial_is_kept_not_the_last():
    # A large step size makes the descent jump about, so that its last step is not its best.
    problem = make_problem()
    last = []
    for steps in (116, 117, 118, 119, 120):
        solution = solve_lora(problem, LoraSettings(steps=steps, lr=0.5, max_trials=1))
        trial = solution.trials[0]
        assert trial.objective == pytest.approx(float(trial.history.min()))
        last.append(float(trial.history[-1]) > trial.objective)
    assert any(last)
    assert float(problem.objective(solution.delta)) == pytest.approx(trial.objective, rel=1e-4)
    assert len(trial.history) == 121 and trial.step == int(trial.history.argmin())


def test_requests_descend_together_as_they_would_alone():
    """Texts, leaving names, random numbers and retries of each request are its own."""
    problem = make_problem(lamb_forget=1.0, lamb_preserve=0.05, lamb_weight=0.02)
    w, d = problem.projection.shape
    generator = torch.Generator().manual_seed(5)
    problem = replace(
        problem,
        forget_hidden=torch.randn(4, w, generator=generator),
        target=torch.randn(4, d, generator=generator) * torch.tensor([[1.0], [3], [1], [1]]),
    )
    owner = torch.tensor([0, 2, 2, 1])
    leaving = torch.zeros(3, len(problem.retain_hidden), dtype=torch.bool)
    leaving[0, :2] = leaving[1, 3] = True
    settings = LoraSettings(steps=300, lamb_forget_step=0.5, max_trials=4)

    def draws(i):
        return torch.Generator().manual_seed(i)

    together = solve_lora_each(problem, owner, leaving, [draws(i) for i in range(3)], settings)
    counts = set()
    for i, answer in enumerate(together):
        single = problem.part(owner == i, ~leaving[i])
        alone = solve_lora(single, settings, draws(i))
        assert answer.objective == pytest.approx(alone.objective, rel=2e-2)
        assert answer.reduction == pytest.approx(alone.reduction, abs=2e-2)
        assert len(answer.trials) == len(alone.trials)
        judged = float(replace(single, lamb_forget=answer.lamb_forget).objective(answer.delta))
        assert judged == pytest.approx(answer.objective, rel=1e-4)
        counts.add(len(answer.trials))
    # Negative control: with what leaves retained, the objective is another.
    kept = solve_lora(problem.part(owner == 0), settings, draws(0))
    assert kept.objective > 1.001 * together[0].objective or kept.trials != together[0].trials


def test_the_slopes_are_those_of_the_objective():
    """One step of plain descent on factors: the objective falls as autograd says."""
    problem = make_problem(lamb_forget=3.0, lamb_preserve=0.4)
    solution = solve_lora(problem, LoraSettings(steps=30, max_trials=1))
    w, r = problem.projection.shape[0], problem.rank
    bound = w**-0.5
    init = (torch.rand(r, w, generator=torch.Generator().manual_seed(0)) * 2 - 1) * bound
    a, b = init.requires_grad_(), torch.zeros(problem.projection.shape[1], r, requires_grad=True)
    optimizer, history = torch.optim.Adam([a, b], lr=0.01), []
    for _ in range(31):
        scale = problem.alpha / r
        moved = (problem.forget_hidden @ a.T) @ b.T * scale
        loss = problem.lamb_forget * (problem.displacement - moved).norm()
        loss = loss + problem.lamb_preserve * ((problem.retain_hidden @ a.T) @ b.T * scale).norm()
        loss = loss + problem.lamb_weight * (b @ a).norm()
        history.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert solution.trials[0].history.tolist() == pytest.approx(history, rel=1e-4)


def test_retry_raises_lamb_forget_until_the_reduction_is_reached():
    # Below the threshold nothing moves; each trial raises lamb_forget by the step.
    problem = make_problem(lamb_forget=0.02, lamb_preserve=0.05, lamb_weight=0.02)
    settings = LoraSettings(steps=400, lamb_forget_step=0.5, max_trials=6)
    solution = solve_lora(problem, settings)
    assert solution.reached and len(solution.trials) > 1
    assert solution.trials[0].reduction < 0.7 <= solution.trials[-1].reduction
    raised = [trial.lamb_forget for trial in solution.trials]
    assert raised == pytest.approx([0.02 + 0.5 * i for i in range(len(raised))])
    assert solution.lamb_forget == raised[-1]


def test_an_unreachable_reduction_ends_after_the_trials_and_keeps_the_best():
    # The same hidden state is retained at a high price, so it cannot move.
    problem = make_problem()
    problem = replace(
        problem, retain_hidden=problem.forget_hidden.repeat(50, 1), lamb_preserve=50.0
    )
    solution = solve_lora(problem, replace(SHORT, steps=60))
    assert not solution.reached and len(solution.trials) == 3
    assert solution.reduction == max(trial.reduction for trial in solution.trials) < 0.7
    assert problem.reduction(solution.delta) == pytest.approx(solution.reduction, abs=1e-3)


def test_empty_retain_set():
    solution = solve_lora(make_problem(m=0), SHORT)
    assert solution.reached and torch.isfinite(solution.delta).all()


@pytest.mark.parametrize("term", ["lamb_forget", "lamb_preserve", "lamb_weight"])
def test_every_term_can_be_switched_off(term):
    with_all, without = make_problem(), make_problem(**{term: 0.0})
    a, b = solve_lora(with_all, SHORT), solve_lora(without, SHORT)
    assert torch.isfinite(b.delta).all()
    if term == "lamb_forget":  # nothing pulls: the untouched model is optimal, and nothing retries
        assert len(b.trials) == 1 and b.reached and b.delta.abs().max() == 0
    else:  # what is free grows
        index = {"lamb_preserve": 1, "lamb_weight": 2}[term]
        assert without.terms(b.delta)[index] > with_all.terms(a.delta)[index]


def test_same_seed_same_factors_and_another_seed_others():
    def solve(seed):
        return solve_lora(make_problem(), SHORT, torch.Generator().manual_seed(seed))

    assert torch.equal(solve(0).left, solve(0).left)
    assert torch.equal(solve(0).right, solve(0).right)
    assert not torch.equal(solve(0).left, solve(1).left)
    assert torch.equal(solve_lora(make_problem(), SHORT).left, solve(0).left)  # 0 is the default


def test_the_base_projection_is_only_read():
    problem = make_problem()
    before = problem.projection.clone()
    solve_lora(problem, SHORT)
    assert torch.equal(problem.projection, before)


def test_more_retained_names_than_dimensions_give_the_same_descent():
    """The triangular factor that replaces a tall H_r has the same norms."""
    problem = make_problem(m=40)
    delta = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
    factor = torch.linalg.qr(problem.retain_hidden.double(), mode="r").R
    assert torch.linalg.matrix_norm(factor @ delta.double()) == pytest.approx(
        float(problem.terms(delta)[1]), rel=1e-6
    )
    solution = solve_lora(problem, SHORT)
    assert float(problem.objective(solution.delta)) == pytest.approx(solution.objective, rel=1e-4)


def test_progress_is_reported():
    seen = []
    solve_lora(
        make_problem(),
        LoraSettings(steps=5, max_trials=1),
        on_step=lambda *at: seen.append((*at[:2], at[2].shape)),
    )
    assert seen == [(0, step, (3, 1)) for step in range(1, 6)]


def target_inputs(nearest_class: int):
    """Three classes in 4 dimensions; the empty prompt points at `nearest_class`."""
    classes = torch.eye(4)[:3]
    neutral = 0.1 * torch.ones(1, 4) + torch.eye(4)[nearest_class]
    return neutral, torch.eye(4), classes


def test_target_is_the_unit_norm_empty_prompt():
    neutral, projection, classes = target_inputs(nearest_class=2)
    target, draws = empty_target(neutral, projection, classes, [0, 1], torch.Generator())
    assert draws == 0 and target.shape == (2, 4)
    assert torch.allclose(target, (neutral / neutral.norm()).expand(2, -1))


def test_target_is_drawn_again_while_it_is_a_class_to_forget():
    neutral, projection, classes = target_inputs(nearest_class=1)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return empty_target(neutral, projection, classes, [1], generator)

    target, draws = draw(0)
    assert draws > 0
    assert int((target[0] @ classes.T).argmax()) != 1
    assert target.norm(dim=1) == pytest.approx(1, abs=1e-5)
    assert torch.equal(target, draw(0)[0]) and not torch.equal(target, draw(1)[0])


def test_target_without_a_class_left_is_refused():
    neutral, projection, classes = target_inputs(nearest_class=1)
    with pytest.raises(ProblemError, match="every class is to be forgotten"):
        empty_target(neutral, projection, classes, [0, 1, 2], torch.Generator())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget_hidden": torch.ones(0, 12), "target": torch.ones(0, 8)}, "at least one text"),
        ({"forget_hidden": torch.ones(1, 11)}, r"forget_hidden has shape \(1, 11\)"),
        ({"retain_hidden": torch.ones(3, 5)}, r"retain_hidden has shape \(3, 5\)"),
        ({"target": torch.ones(2, 8)}, r"target has shape \(2, 8\)"),
        ({"target": torch.full((1, 8), math.nan)}, "target holds NaN"),
        ({"target": torch.ones(1, 8, dtype=torch.float64)}, "one dtype and device"),
        ({"projection": torch.ones(12, 8, dtype=torch.int64)}, "dense tensor"),
        ({"projection": torch.ones(12)}, "must be a matrix"),
        ({"lamb_forget": -1.0}, "lamb_forget must be"),
        ({"lamb_weight": math.inf}, "lamb_weight must be"),
        ({"rank": 0}, "rank must be"),
        ({"alpha": 0.0}, "alpha must be"),
    ],
)
def test_what_makes_no_problem_is_refused(change, message):
    with pytest.raises(ProblemError, match=message):
        replace(make_problem(), **change)


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0.0}, {"reduction": 1.5}])
def test_impossible_constants_are_refused(change):
    with pytest.raises(ProblemError):
        replace(LoraSettings(), **change)


def make_adapter(projection) -> Adapter:
    generator = torch.Generator().manual_seed(5)
    return Adapter(
        left=torch.randn(12, 2, generator=generator),
        right=torch.randn(2, 8, generator=generator),
        projection_sha256=projection_sha256(projection),
        backbone="RN50",
        weights="abc",
        dataset="Set",
        classes=["C/V", "naïve"],
        trainer="ForgetLoRA",
        settings={"seed": 0},
        solver={"objective": 0.1, "trials": [1, 2]},
    )


def test_adapter_round_trip(tmp_path):
    projection = make_problem().projection
    adapter = make_adapter(projection)
    save_adapter(adapter, tmp_path / "sub" / "a.safetensors")
    loaded = load_adapter(tmp_path / "sub" / "a.safetensors")
    assert torch.equal(loaded.delta(), adapter.delta())
    exact = projection.double() + adapter.left.double() @ adapter.right.double()
    assert torch.equal(loaded.apply(projection), exact.float())  # rounded once
    for name in ("backbone", "weights", "dataset", "classes", "trainer", "settings", "solver"):
        assert getattr(loaded, name) == getattr(adapter, name)
    assert list((tmp_path / "sub").iterdir()) == [tmp_path / "sub" / "a.safetensors"]


def test_adapter_refuses_another_projection():
    projection = make_problem().projection
    adapter = make_adapter(projection)
    other = projection.clone()
    other[0, 0] += 1e-3
    with pytest.raises(ProblemError, match="another text projection"):
        adapter.apply(other)


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_file_that_is_no_adapter_is_one_line(tmp_path, content):
    path = tmp_path / "a.safetensors"
    if content is None:  # another safetensors file
        from safetensors.torch import save_file

        save_file({"left": torch.ones(2, 2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ProblemError, match=r"a\.safetensors: not a") as caught:
        load_adapter(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ProblemError):
        load_adapter(tmp_path / "missing.safetensors")
