"""Editing by ridge regression on the new values of all texts (UCE)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from engine import TRAINER_REGISTRY, UserError
from forgetting.baselines import UCE_LAMBDA, uce
from trainers.retained import EditTrainer
from trainers.texts import LARGEST


@TRAINER_REGISTRY.register()
class ForgetUCE(EditTrainer):
    """UCE (Gandikota et al., WACV 2024, equation 7) on the text projection.

    With the authors' weight for what is edited (ERASE 1) a text of CLIP goes about a quarter of its
    way, held by a thousand retained ones, and its images are recognised as before. The default
    lands it on its target; a larger one changes nothing any more.
    """

    name = "uce"
    defaults: ClassVar[dict[str, Any]] = {"ERASE": 1e3, "RIDGE": UCE_LAMBDA}

    @classmethod
    def check_settings(cls, cfg) -> None:
        super().check_settings(cfg)
        for key in cls.defaults:
            value = cfg.TRAINER.FORGETUCE[key]
            if not 0 < value <= LARGEST:
                raise UserError(
                    f"TRAINER.FORGETUCE.{key} must be above 0 and at most {LARGEST:g}, got {value}"
                )

    def left(self, hidden: Tensor, gram: Tensor, count: int) -> tuple[Tensor, dict[str, Any]]:
        node = self.cfg.TRAINER.FORGETUCE
        return uce(hidden, gram, node.ERASE, node.RIDGE), {}
