"""Editing within the directions that retained texts hardly use (AlphaEdit)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine import TRAINER_REGISTRY
from forgetting.baselines import null_space
from trainers.retained import EditTrainer


@TRAINER_REGISTRY.register()
class ForgetNullSpace(EditTrainer):
    """AlphaEdit's idea (Fang et al., ICLR 2025) on the text projection.

    The change lives on the eigenvectors of `H_r^T H_r / m` below a threshold. The authors'
    constants (threshold 0.02, damping 10) belong to the hidden states of their language models: on
    CLIP's, with that damping a text goes about a fifth of its way and its images are recognised as
    before. By default there is none, so that the texts land, and the threshold is a share of the
    mean eigenvalue.
    """

    name = "null space"

    def left(self, hidden: Tensor, gram: Tensor, count: int) -> tuple[Tensor, dict[str, Any]]:
        node = self.cfg.TRAINER.FORGETNULLSPACE
        threshold = node.THRESHOLD * float(gram.trace()) / (count * len(gram))
        left = null_space(hidden, gram, count, node.DAMPING, threshold)
        free = int((torch.linalg.eigvalsh(gram / count) < threshold).sum())
        print(f"  {free} of {len(gram)} directions lie below the threshold {threshold:.3g}")
        return left, {"free": free}
