"""All classes at once give the answers of class by class."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip.bundle import load_bundle
from forgetting import ForgetProblem
from forgetting.errors import ProblemError
from forgetting.solvers.batched import solve_each
from forgetting.solvers.exact import solve_exact, thresholds
from tests.conftest import REPOSITORY

REAL_CLIP = REPOSITORY.parent / "shared" / "real_clip"


def a_set(classes, further, w, d, seed, **weights) -> tuple[ForgetProblem, torch.Tensor]:
    """A set whose classes are retained beside `further` names; the last class is not retained. With
    each class its own text leaves, and with every second one a further name too."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h_f = normal(classes, w)
    h_r = torch.cat([normal(further, w), h_f[:-1]])
    leaving = torch.zeros(classes, len(h_r), dtype=torch.bool)
    leaving[: classes - 1, further:] = torch.eye(classes - 1, dtype=torch.bool)
    leaving[::2, : min(1, further)] = True
    defaults = {"lamb_forget": 3.0, "lamb_preserve": 0.3, "lamb_weight": 0.2}
    problem = ForgetProblem(normal(w, d), h_f, h_r, normal(classes, d), **defaults | weights)
    return problem, leaving


def alone(problem, leaving, i):
    return problem.part(torch.tensor([i]), ~leaving[i])


@settings(max_examples=60, deadline=None)
@given(
    classes=st.integers(2, 7),
    further=st.integers(0, 12),
    w=st.integers(2, 10),
    seed=st.integers(0, 2**31),
    lamb_forget=st.floats(0.1, 10),
    lamb_preserve=st.sampled_from([0.0, 0.05, 1.0]),
    lamb_weight=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_the_answers_are_those_of_class_by_class(
    classes, further, w, seed, lamb_forget, lamb_preserve, lamb_weight
):
    weights = {
        "lamb_forget": lamb_forget,
        "lamb_preserve": lamb_preserve,
        "lamb_weight": lamb_weight,
    }
    problem, leaving = a_set(classes, further, w, 5, seed, **weights)
    together = solve_each(problem, leaving)
    for i in range(classes):
        single = alone(problem, leaving, i)
        one = solve_exact(single)
        assert float(together.gap[i]) <= 1e-9 or one.certificate.gap > 1e-10
        assert float(together.primal[i]) == pytest.approx(
            one.certificate.primal, rel=1e-9, abs=1e-12
        )
        delta = together.left[i][:, None] * together.right[i]
        assert float(single.objective(delta)) == pytest.approx(
            float(together.primal[i]), rel=1e-9, abs=1e-12
        )
        if lamb_weight > 0:  # else the minimiser is not unique
            size = float(torch.linalg.matrix_norm(one.delta)) + 1e-9
            assert float(torch.linalg.matrix_norm(delta - one.delta)) <= 1e-7 * size
            assert float(together.reach[i]) == pytest.approx(thresholds(single).reach, rel=1e-9)


@pytest.mark.parametrize("mask", [torch.zeros(3, 9).bool(), torch.zeros(4, 8)])
def test_a_mask_of_another_kind_is_refused(mask):
    problem, _ = a_set(4, 5, 8, 6, 0)
    with pytest.raises(ProblemError, match="excluded must be a"):
        solve_each(problem, mask)


def test_auto_is_just_above_the_threshold_of_each_class():
    problem, leaving = a_set(4, 9, 8, 6, 0, lamb_forget="auto")
    together = solve_each(problem, leaving)
    assert (together.lamb_forget / together.reach).tolist() == pytest.approx([1.001] * 4)
    assert together.left.any(dim=1).all() and float(together.gap.max()) < 1e-9
    for i in range(4):
        one = solve_exact(alone(problem, leaving, i))
        assert float(together.primal[i]) == pytest.approx(one.certificate.primal, rel=1e-9)


def test_retaining_the_class_itself_would_be_another_answer():
    """Negative control of the downdate: without it the class's own row holds it back."""
    problem, leaving = a_set(4, 5, 8, 6, 0)
    kept = solve_each(problem)
    left = solve_each(problem, leaving)
    assert (kept.primal[:3] > left.primal[:3] * 1.001).all()
    assert kept.primal[3] == pytest.approx(float(left.primal[3]), rel=1e-12)


@pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="needs bundles of real CLIP features")
@pytest.mark.parametrize("lamb_forget", [0.4, 0.8, 1.3])
def test_a_thousand_classes_of_real_clip(lamb_forget):
    """0.4: none moves; 0.8: some do; 1.3: all do."""
    bundle = load_bundle(REAL_CLIP, "ViT-B/16", "ImageNetText")
    target = torch.nn.functional.normalize(bundle.neutral_hidden @ bundle.text_projection)
    problem = ForgetProblem(
        bundle.text_projection,
        bundle.forget_hidden,
        bundle.forget_hidden,
        target.expand(1000, -1).clone(),
        lamb_forget,
        0.3,
    )
    leaving = torch.eye(1000, dtype=torch.bool)
    together = solve_each(problem, leaving)
    assert float(together.gap.max()) <= 1e-12 and together.fallbacks == 0
    moved = int((together.left.abs().sum(dim=1) > 0).sum())
    assert {0.4: moved == 0, 0.8: 100 < moved < 900, 1.3: moved == 1000}[lamb_forget]
    for i in (0, 333, 999):
        one = solve_exact(alone(problem, leaving, i))
        assert float(together.primal[i]) == pytest.approx(one.certificate.primal, rel=1e-9)
        delta = together.left[i][:, None] * together.right[i]
        missed = torch.linalg.matrix_norm(delta - one.delta)
        assert missed <= 1e-9 * torch.linalg.matrix_norm(one.delta)
