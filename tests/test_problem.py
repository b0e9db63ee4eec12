"""The paper's objective, and requests stacked in a batch."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetting import ProblemError
from forgetting.problem import Batch, Request, equal_sizes, pad_indices, pad_rows
from tests.solver_fixtures import normal, random_problem


@settings(max_examples=30)
@given(
    k=st.integers(1, 4),
    m=st.integers(0, 6),
    seed=st.integers(0, 2**16),
    rank=st.integers(1, 6),
    alpha=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_objective_is_the_papers_formula(k, m, seed, rank, alpha):
    """Against an entry-by-entry recomputation in B and A, as the paper writes it."""
    problem = replace(random_problem(k, m, 7, 5, seed), rank=rank, alpha=alpha)
    a, b = normal(rank, 7, seed=seed + 1), normal(5, rank, seed=seed + 2)
    delta = (alpha / rank) * (b @ a).T
    adapted = problem.projection + delta

    def norm(rows):
        return math.sqrt(sum(float(x) ** 2 for row in rows for x in row))

    expected = (
        problem.lamb_forget * norm(problem.target - problem.forget_hidden @ adapted)
        + problem.lamb_preserve * norm(problem.retain_hidden @ delta)
        + problem.lamb_weight * norm(b @ a)
    )
    assert float(problem.objective(delta)) == pytest.approx(expected, rel=1e-12)
    # Negative control: without the factor r / alpha the weight term would be another one.
    if rank != alpha:
        other = expected + problem.lamb_weight * (norm(delta) - norm(b @ a))
        assert float(problem.objective(delta)) != pytest.approx(other, rel=1e-6)


def test_reduction_rule():
    problem = random_problem(2, 9, 8, 6, 0)
    exact = torch.linalg.pinv(problem.forget_hidden) @ problem.displacement
    # The paper takes the absolute value: moving away by half counts like moving nearer by half.
    for part, reduction in ((0.0, 0), (1.0, 1), (0.4, 0.4), (-0.5, 0.5)):
        assert problem.reduction(part * exact) == pytest.approx(reduction, abs=1e-9)
    still = replace(problem, target=problem.forget_hidden @ problem.projection)
    assert still.reduction(torch.zeros_like(exact)) == 1
    assert still.reduction(torch.ones_like(exact)) == 0


REFUSED = {
    "forget_hidden": [normal(0, 12), normal(1, 11)],
    "retain_hidden": [normal(3, 5)],
    "target": [normal(2, 8), normal(1, 8).half()],
    "projection": [normal(12, 0)],
    "lamb_forget": [-1.0, "much"],
    "lamb_preserve": [-1.0],
    "lamb_weight": [math.inf],
    "rank": [0],
    "alpha": [0.0],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_problem_is_refused(name):
    for value in REFUSED[name]:
        with pytest.raises(ProblemError, match=name):
            replace(random_problem(1, 20, 12, 8, 0), **{name: value})


def request(*owner: int, seed: int = 0) -> Request:
    """Of as many texts as owners; classes are numbered."""
    classes = [f"class {i}" for i in range(max(owner) + 1)]
    texts = [f"text {seed}.{i}" for i in range(len(owner))]
    same = [{name} for name in classes]
    return Request(classes, texts, normal(len(owner), 4, seed=seed), list(owner), same)


def test_a_batch_stacks_its_requests():
    one, two = request(0, 1, 1), request(0, seed=1)
    batch = Batch([one, two])
    assert len(batch) == 2 and list(batch) == [one, two] and batch.sizes == [3, 1]
    assert batch.classes == ["class 0", "class 1", "class 0"] and len(batch.same) == 3
    assert torch.equal(batch.hidden, torch.cat([one.hidden, two.hidden]))
    assert batch.of_class.tolist() == [0, 0, 1] and batch.of_text.tolist() == [0, 0, 0, 1]
    assert batch.owner.tolist() == [0, 1, 1, 2]  # of all classes, not of the request's
    masks = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]).bool()
    assert batch.of_requests(masks).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 0]]


def test_a_request_takes_more_texts():
    one, row = request(0, 1), normal(4, seed=9)
    more = one.with_texts([(1, "other", row)])
    assert more.texts == [*one.texts, "other"] and more.owner == [0, 1, 1]
    assert torch.equal(more.hidden[-1], row) and torch.equal(more.hidden[:2], one.hidden)
    assert more.classes == one.classes and len(one.texts) == 2 and more.added == 1


def test_batches_of_requests_with_the_same_number_of_texts():
    owner, excluded = torch.tensor([2, 0, 1, 0, 3]), torch.eye(4).bool()
    excluded[1] = True
    assert [len(requests) for requests, _ in equal_sizes(owner, excluded, 6)] == [1, 1, 1, 1]
    found = [(a.tolist(), b.tolist()) for a, b in equal_sizes(owner, excluded, 100)]
    assert found == [([2, 3, 1], [[0], [4], [2]]), ([0], [[1, 3]])]
    with pytest.raises(ProblemError, match="at least one text"):
        list(equal_sizes(torch.tensor([0, 2]), torch.zeros(3, 2).bool(), 5))


def test_padded_rows_are_those_of_the_mask():
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    rows, weights = normal(4, 3), torch.tensor([0.5, 0.25, 2.0, 3.0])
    indices, padded = pad_indices(mask, weights)
    assert indices.shape == (3, 2) and padded.tolist() == [[0.25, 3.0], [0, 0], [0.5, 0]]
    found = pad_rows(mask, rows)
    assert torch.equal(found[0], rows[[1, 3]]) and torch.equal(found[2, 0], rows[0])
    assert found[1].eq(0).all() and found[2, 1].eq(0).all()
