"""The paper's descent: its objective, its retry, and many requests at once."""

from dataclasses import replace

import pytest
import torch

from forgetting import ForgetProblem, ProblemError, solve_lora
from forgetting.solvers.lora import LoraSettings, _Objective, solve_lora_each
from tests.solver_fixtures import TENSORS, normal, random_problem

SHORT = LoraSettings(steps=300, max_trials=3)


def make_problem(k=1, m=20, w=12, d=8, seed=0, **weights) -> ForgetProblem:
    """A problem in float32 whose texts all go to one target."""
    defaults = {"lamb_forget": 3.0, "lamb_preserve": 0.05, "lamb_weight": 0.02}
    problem = random_problem(k, m, w, d, seed, "same target", **defaults | weights)
    return replace(problem, **{name: getattr(problem, name).float() for name in TENSORS})


@pytest.mark.parametrize("k", [1, 3])
def test_a_descent_forgets_and_reports_what_it_keeps(k):
    problem = make_problem(k)
    before = problem.projection.clone()
    solution = solve_lora(problem, replace(SHORT, steps=800))
    assert solution.reached and len(solution.trials) == 1 and solution.reduction >= 0.7
    assert solution.left.shape == (12, 5) and solution.right.shape == (5, 8)
    assert problem.reduction(solution.delta) == pytest.approx(solution.reduction, abs=1e-4)
    assert float(problem.objective(solution.delta)) == pytest.approx(solution.objective, rel=1e-4)
    assert torch.equal(problem.projection, before)


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


@pytest.mark.parametrize("weights", [(3.0, 0.4, 0.1), (0.0, 1.0, 0.0), (1.0, 0.0, 2.0)])
def test_the_gradient_is_that_of_the_objective(weights):
    """Against autograd on the problem's own norms, with names excluded."""
    names = ("lamb_forget", "lamb_preserve", "lamb_weight")
    problem = random_problem(3, 9, 7, 5, 0, **dict(zip(names, weights, strict=True)))
    problem = replace(problem, rank=4, alpha=2.0)
    excluded = torch.arange(9) % 4 == 0
    factors = torch.cat([normal(1, 4, 7, seed=1), normal(1, 4, 5, seed=2)], dim=2)
    gradient = torch.full_like(factors, torch.nan)
    lamb_forget = torch.tensor(weights[:1]).double()
    rows, h, d = problem.retain_hidden, problem.forget_hidden, problem.displacement
    objective = _Objective(problem, h[None], d[None], rows[None, excluded], rows.T @ rows)
    norms = objective.norms_and_gradient(factors, lamb_forget, gradient)

    factors.requires_grad_()
    a, b = factors[0, :, :7], factors[0, :, 7:]
    delta = (problem.alpha / problem.rank) * a.T @ b
    problem = problem.part(slice(None), ~excluded)
    expected = torch.stack(problem.terms(delta)).detach()
    assert torch.allclose(norms[:, 0], expected, rtol=1e-12)
    problem.objective(delta).backward()
    assert torch.allclose(gradient, factors.grad, rtol=1e-10, atol=1e-12)


def test_requests_descend_together_as_they_would_alone():
    """Texts, excluded names, random numbers and retries of each request are its own."""
    problem = make_problem(4, lamb_forget=1.0)
    problem = replace(problem, target=problem.target * torch.tensor([[1.0], [3], [1], [1]]))
    owner = torch.tensor([0, 2, 2, 1])
    excluded = torch.zeros(3, len(problem.retain_hidden), dtype=torch.bool)
    excluded[0, :2] = excluded[1, 3] = True
    settings = LoraSettings(steps=300, lamb_forget_step=0.5, max_trials=4)

    def draws(i):
        return torch.Generator().manual_seed(i)

    together = solve_lora_each(problem, owner, excluded, [draws(i) for i in range(3)], settings)
    for i, answer in enumerate(together):
        single = problem.part(owner == i, ~excluded[i])
        alone = solve_lora(single, settings, draws(i))
        assert answer.objective == pytest.approx(alone.objective, rel=2e-2)
        assert answer.reduction == pytest.approx(alone.reduction, abs=2e-2)
        assert len(answer.trials) == len(alone.trials)
        judged = float(replace(single, lamb_forget=answer.lamb_forget).objective(answer.delta))
        assert judged == pytest.approx(answer.objective, rel=1e-4)
    # Negative control: with what is excluded retained, the objective is another.
    retained = solve_lora(problem.part(owner == 0), settings, draws(0))
    assert retained.objective > 1.001 * together[0].objective or (
        len(retained.trials) != len(together[0].trials)
    )


def test_retry_raises_lamb_forget_until_the_reduction_is_reached():
    # Below the threshold nothing moves; each trial raises lamb_forget by the step.
    problem = make_problem(lamb_forget=0.02)
    settings = LoraSettings(steps=400, lamb_forget_step=0.5, max_trials=6)
    solution = solve_lora(problem, settings)
    assert solution.reached and len(solution.trials) > 1
    assert solution.trials[0].reduction < 0.7 <= solution.trials[-1].reduction
    raised = [trial.lamb_forget for trial in solution.trials]
    assert raised == pytest.approx([0.02 + 0.5 * i for i in range(len(raised))])
    assert solution.lamb_forget == raised[-1]


def test_auto_needs_no_retry():
    problem = make_problem(4, lamb_forget="auto")
    excluded = torch.zeros(2, len(problem.retain_hidden), dtype=torch.bool)
    excluded[0, 0] = True
    owner, generators = torch.tensor([0, 1, 1, 1]), [torch.Generator() for _ in range(2)]
    found = solve_lora_each(problem, owner, excluded, generators, LoraSettings(steps=2000))
    assert all(answer.reached and len(answer.trials) == 1 for answer in found)
    assert found[0].lamb_forget != found[1].lamb_forget


def test_an_unreachable_reduction_ends_after_the_trials_and_keeps_the_best():
    # The same hidden state is retained at a high price, so it cannot move.
    problem = make_problem()
    rows = problem.forget_hidden.repeat(50, 1)
    problem = replace(problem, retain_hidden=rows, lamb_preserve=50.0)
    solution = solve_lora(problem, replace(SHORT, steps=60))
    assert not solution.reached and len(solution.trials) == 3
    assert solution.reduction == max(trial.reduction for trial in solution.trials) < 0.7
    assert problem.reduction(solution.delta) == pytest.approx(solution.reduction, abs=1e-3)
    # Large steps: the last trial is not the best.
    jumpy = LoraSettings(steps=20, lr=1.0, reduction=1.0, lamb_forget_step=0.01, max_trials=4)
    solution = solve_lora(make_problem(), jumpy)
    reductions = [trial.reduction for trial in solution.trials]
    assert solution.reduction == max(reductions) > reductions[-1] and len(reductions) == 4


@pytest.mark.parametrize("term", ["lamb_forget", "lamb_preserve", "lamb_weight", "nobody"])
def test_every_term_can_be_switched_off(term):
    off = {} if term == "nobody" else {term: 0.0}
    with_all, without = make_problem(), make_problem(m=0 if term == "nobody" else 20, **off)
    a, b = solve_lora(with_all, SHORT), solve_lora(without, SHORT)
    assert torch.isfinite(b.delta).all() and b.reached
    if term == "lamb_forget":  # nothing pulls: the untouched model is optimal, and nothing retries
        assert len(b.trials) == 1 and b.delta.abs().max() == 0
    elif term != "nobody":  # what is free grows
        index = {"lamb_preserve": 1, "lamb_weight": 2}[term]
        assert without.terms(b.delta)[index] > with_all.terms(a.delta)[index]


def test_progress_is_reported_and_seeds_are_repeatable():
    problem, seen = make_problem(), []
    settings = LoraSettings(steps=5, max_trials=1)
    solution = solve_lora(problem, settings, on_step=lambda *step: seen.append(step))
    for seed in (0, 1):  # 0 is the default
        again = solve_lora(problem, settings, torch.Generator().manual_seed(seed))
        assert torch.equal(again.left, solution.left) == (seed == 0)
    assert [step[:2] for step in seen] == [(0, step) for step in range(1, 6)]
    weights = torch.tensor([problem.lamb_forget, problem.lamb_preserve, problem.lamb_weight])
    sums = [float(weights @ norms[:, 0]) for _, _, norms in seen]
    assert sums == pytest.approx(solution.trials[0].history[:5].tolist(), rel=1e-5)


@pytest.mark.parametrize("change", [{"steps": 0}, {"lr": 0.0}, {"reduction": 1.5}])
def test_impossible_constants_are_refused(change):
    with pytest.raises(ProblemError, match=next(iter(change))):
        replace(LoraSettings(), **change)
    with pytest.raises(ProblemError, match="generators"):
        owner, excluded = torch.zeros(1).long(), torch.zeros(1, 20).bool()
        solve_lora_each(make_problem(), owner, excluded, [], SHORT)
