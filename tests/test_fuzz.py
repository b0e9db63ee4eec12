"""The public functions of the library on whatever Python lets through: an answer or a ProblemError.

From arguments that work, one is replaced by each of many that may not: other types, kinds of
tensors, shapes, values.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from forgetting import ForgetProblem, forget, solve_exact, solve_lora
from forgetting.adapter import Adapter, projection_sha256
from forgetting.context import ExactSettings
from forgetting.deploy.embeddings import condition, patch
from forgetting.errors import ProblemError
from forgetting.retain import Group, RetainSet
from forgetting.solvers.constrained import Ridge, solve_constrained, solve_constrained_each
from forgetting.solvers.exact import solve_each, thresholds
from forgetting.solvers.lora import LoraSettings, solve_lora_each
from tests.encoder_fixtures import OUT, tiny
from tests.test_compose import normal

W, D, K, M, R = 6, 4, 3, 8, 2


def strange(value: Any) -> Iterator[tuple[str, Any]]:
    """What may stand in the place of a working argument."""
    yield "None", None
    yield "text", "text"
    yield "list", [[1.0, 2.0], [3.0]]
    if isinstance(value, Tensor):
        yield "numpy", value.numpy()
        yield "nested list", value.tolist()
        for dtype in (
            *(torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool),
            *(torch.complex64, torch.float8_e4m3fn),
        ):
            yield str(dtype), value.to(dtype)
        yield "requires grad", value.clone().float().requires_grad_()
        with torch.inference_mode():
            inference = value.clone()
        yield "inference", inference
        yield "not contiguous", torch.stack([value, value], dim=-1)[..., 0]
        yield "meta", value.to("meta")
        yield "one row more", torch.cat([value, value[:1]])
        yield "no rows", value[:0]
        yield "number", value.flatten()[0]
        yield "three dimensions", value[None]
        yield "flat", value.flatten()
        yield "negative", -value.float()
        if value.ndim == 2:
            yield "sparse", value.to_sparse()
            yield "no columns", value[:, :0]
            yield "one column less", value[:, 1:]
            yield "transposed", value.T
        for number in (math.nan, math.inf, 1e160, 1e-160, 1e30, 0.0):
            changed = value.double().clone() if value.dtype != torch.bool else value.double()
            changed.flatten()[0] = number
            yield f"holds {number}", changed
            yield f"all {number}", torch.full_like(value, number, dtype=torch.float64)
    else:
        for number in (0, -1, 1, 2.5, True, math.nan, math.inf, -math.inf, 1e308, 1e-308, 10**400):
            yield f"{str(number)[:9]}", number
        yield "numpy number", np.float64(0.5)
        yield "complex", 1j
        yield "tensor", torch.ones(2)


ROWS, H, E = normal(M, W, seed=2), normal(K, W, seed=1), normal(W, D)
FIELDS = {
    "projection": E, "forget_hidden": H, "retain_hidden": ROWS, "target": normal(K, D),
    "lamb_forget": 2.0, "lamb_preserve": 0.3, "lamb_weight": 0.1, "rank": 2, "alpha": 1.0,
}  # fmt: skip
PROBLEM, QUICK = ForgetProblem(**FIELDS), LoraSettings(steps=3, max_trials=2)
EXCLUDED = torch.arange(R * M).view(R, M) == 0
REQUESTS = {"owner": torch.tensor([0, 1, 1]), "excluded": EXCLUDED}


def everything(**fields: Any) -> None:
    """All solvers on one problem."""
    one = ForgetProblem(**fields)
    solution = solve_exact(one)
    assert torch.isfinite(solution.delta).all() and 0 <= solution.certificate.gap <= 1
    one.objective(solution.delta)
    thresholds(one)
    solve_lora(one, QUICK)


WEIGHTS = torch.full((M,), 1.0).double()
ADAPTER = Adapter(normal(W, 1), normal(1, D), projection_sha256(E), "b", "w", "d", ["c"], "t")
MODEL, WORDS = tiny("own")
CASES: dict[str, tuple[Callable, dict[str, Any]]] = {
    "problem": (everything, FIELDS),
    "solve_lora_each": (
        lambda **k: solve_lora_each(PROBLEM, settings=QUICK, **k),
        REQUESTS | {"generators": [torch.Generator()] * R},
    ),
    "settings": (
        lambda **k: LoraSettings(**k),
        {"steps": 3, "lr": 0.1, "reduction": 0.5, "lamb_forget_step": 0.1, "max_trials": 2},
    ),
    "solve_each": (lambda **k: solve_each(PROBLEM, **k), REQUESTS),
    "ridge": (
        lambda **k: solve_constrained(Ridge(**k), H, normal(K, D)),
        {"rows": ROWS, "mu": 0.1, "weights": WEIGHTS},
    ),
    "solve_constrained": (
        lambda **k: solve_constrained(Ridge(ROWS, 0.1), **k),
        {"hidden": H, "displacement": normal(K, D), "excluded": EXCLUDED[0]},
    ),
    "solve_constrained_each": (
        lambda **k: solve_constrained_each(Ridge(ROWS, 0.1, WEIGHTS), **k),
        REQUESTS | {"hidden": H, "displacement": normal(K, D)},
    ),
    "retain set": (
        lambda rows, weight, similarity, hidden, owner: RetainSet(
            {"a": Group([str(i) for i in range(M)], rows, weight)}, similarity
        ).excluded([{"0"}, {"1"}], hidden, owner),
        {"rows": ROWS, "weight": 1.0, "similarity": 0.9, "hidden": H, "owner": REQUESTS["owner"]},
    ),
    "forget": (
        lambda **k: forget(MODEL, WORDS, **k, progress=False),
        {
            "names": ["Acme Cola"], "also": {"Acme Cola": ["acme soda"]}, "retain": ["dog", "cat"],
            "templates": ["{}", "a {}."], "protect": ["Oslo"], "target": "specific", "beta": 0.1,
            "own": 1.0, "vocabulary": 0.5, "ridge": 1e-3, "specific_ridge": 0.5, "min_margin": 1.0,
            "min_displacement": 0.5, "max_displacement": 0.1, "similarity": 0.9, "generic": False,
            "cache": None, "settings": ExactSettings(),
        },
    ),
    "forget, to a vector": (
        lambda target: forget(
            MODEL, WORDS, ["Acme Cola"], retain=["dog"], target=target, generic=False, ridge=1e-3
        ),
        {"target": normal(OUT)},
    ),
    "apply": (ADAPTER.apply, {"projection": E}),
    "sha256": (projection_sha256, {"projection": E}),
    "condition": (condition, {"projection": E}),
    "patch": (
        lambda **k: patch(**k, normalised=False),
        {
            "embeddings": normal(M, D), "projection": E[:D], "left": normal(D, R),
            "right": normal(R, D, seed=1), "bias": normal(D),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_answer_or_a_problem_error(name):
    call, arguments = CASES[name]
    call(**arguments)  # what is replaced below does work
    wrong = []
    for key, value in arguments.items():
        for kind, other in strange(value):
            for mode in (torch.no_grad, torch.inference_mode):
                try:
                    with mode(), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        call(**arguments | {key: other})
                except ProblemError as error:
                    if "\n" in str(error):
                        wrong.append(f"{key} {kind}: several lines: {error}")
                except Exception as error:
                    wrong.append(f"{key} {kind}: {type(error).__name__}: {str(error)[:90]}")
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(dict.fromkeys(wrong))
