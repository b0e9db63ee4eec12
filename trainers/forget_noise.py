"""Noise as large as an exact answer: is it the size of a change that forgets?"""

from __future__ import annotations

import torch

from engine import TRAINER_REGISTRY
from forgetting import Adapter
from forgetting.baselines import noise
from trainers.base import Solved
from trainers.forget_exact import ForgetExact


@TRAINER_REGISTRY.register()
class ForgetNoise(ForgetExact):
    """A random change of the Frobenius norm and the rank that ForgetExact's answer has.

    Size, rank and bytes are those of the exact answer with the same settings; only the direction is
    chance. Of that size a text of average length is moved as far as by full Gaussian noise on the
    projection (see `forgetting.closed_forms.noise`), so low rank is no favour.
    """

    name = "noise"

    def solve(self, classes: list[str], generator: torch.Generator) -> Solved:
        exact, _ = self.answer(classes, generator)
        norm = float(torch.linalg.matrix_norm(exact.left @ exact.right))
        (w, rank), d = exact.left.shape, exact.right.shape[1]
        left, right = (x.to(self.device) for x in noise(w, d, rank, norm, generator))
        print(f"  noise of rank {rank} and norm {norm:.4g}, as the exact answer has")
        report = {"norm": norm, "texts": exact.report["texts"]}
        return Solved(left.float(), right.float(), report)

    def with_recipe(self, adapter: Adapter) -> Adapter:
        """Chance does not compose: no recipe."""
        return adapter
