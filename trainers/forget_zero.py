"""The forgotten texts' embeddings made zero, and nothing else asked."""

from __future__ import annotations

from typing import Any

import torch

from engine import TRAINER_REGISTRY
from forgetting.baselines import zeroing
from trainers.base import ForgetTrainer, Solved

BEYOND = 1e-5  # of the way; float32 leaves a few 1e-7 of a text's length


@TRAINER_REGISTRY.register()
class ForgetZero(ForgetTrainer):
    """The least change after which nothing is left of the texts: `Delta = -H_f^+ H_f W`.

    Nothing is retained, on purpose: what this costs the rest is what a retain set is for.

    Cosines see no length. What float32 leaves of a zeroed text is a millionth of it, in its own
    direction or in the opposite one as chance has it, and with the former its images are recognised
    as before. So the change goes a hundred-thousandth beyond zero, which decides this in the
    method's favour, and alike on every device.
    """

    name = "zero"
    default_target = None

    def solver_settings(self) -> dict[str, Any]:
        return self.text_settings()

    def solve(self, classes: list[str], generator: torch.Generator) -> Solved:
        request = self.request(classes)
        hidden = request.hidden.double().to(self.device)
        left, right = zeroing(hidden, self.model.projection.double())
        return Solved(left.float(), (1 + BEYOND) * right.float(), {"texts": request.texts})
