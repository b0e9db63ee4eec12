"""The evaluator that `SimpleTrainer.test` feeds."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor
from yacs.config import CfgNode

from engine.builtin.registry import EVALUATOR_REGISTRY
from engine.errors import UserError


@EVALUATOR_REGISTRY.register()
class Classification:
    """Accuracy, error rate and macro F1, in percent, over all batches since `reset`."""

    def __init__(self, cfg: CfgNode, lab2cname: dict[int, str] | None = None) -> None:
        for key in ("PER_CLASS_RESULT", "COMPUTE_CMAT"):
            if cfg.TEST[key]:
                raise UserError(f"TEST.{key} needs Dassl; the builtin engine does not have it")
        self.lab2cname = lab2cname
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self.predicted: list[Tensor] = []
        self.true: list[Tensor] = []

    def process(self, mo: Tensor, gt: Tensor) -> None:
        """Add a batch: model output (b, num_classes), labels (b,)."""
        self.predicted.append(mo.argmax(dim=1).cpu())  # (b,)
        self.true.append(gt.cpu())

    def evaluate(self) -> OrderedDict[str, float]:
        """The results by name, accuracy first; they are printed too."""
        predicted, true = torch.cat(self.predicted), torch.cat(self.true)  # (N,), (N,)
        accuracy = 100.0 * int((predicted == true).sum()) / len(true)
        from sklearn.metrics import f1_score  # seconds that a run without evaluator saves

        macro_f1 = 100.0 * f1_score(true, predicted, average="macro", labels=true.unique())
        results = OrderedDict(
            accuracy=accuracy, error_rate=100.0 - accuracy, macro_f1=float(macro_f1)
        )
        print(f"=> result\n* total: {len(true):,}")
        for name, value in results.items():
            print(f"* {name}: {value:.1f}%")
        return results
