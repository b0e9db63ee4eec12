"""Nothing at all, and the trivial answer: what every method must beat."""

from __future__ import annotations

from typing import Any

import torch

from engine import TRAINER_REGISTRY
from trainers.base import ForgetTrainer, Solved


@TRAINER_REGISTRY.register()
class ForgetNothing(ForgetTrainer):
    """`Delta = 0`, as factors of rank 0: the untouched model in a row of its own."""

    name = "nothing"
    default_target = None

    def solver_settings(self) -> dict[str, Any]:
        return self.text_settings()

    def solve(self, classes: list[str], generator: torch.Generator) -> Solved:
        w = self.model.projection
        report = {"texts": self.request(classes).texts}
        return Solved(w.new_zeros(len(w), 0), w.new_zeros(0, w.shape[1]), report)


@TRAINER_REGISTRY.register()
class ForgetName(ForgetNothing):
    """The class's name leaves the list that images are classified by; the model stays as it was.

    No image is given that name any more, which is all that an accuracy on the list sees. Any other
    word for the class still finds its images: nothing was forgotten.
    """

    name = "name"

    def solve(self, classes: list[str], generator: torch.Generator) -> Solved:
        unchanged = super().solve(classes, generator)
        print("  the name leaves the list of classes; the projection stays as it was")
        return Solved(unchanged.left, unchanged.right, unchanged.report, tuple(classes))
