"""Gradient ascent on text: push a class's texts until they are no longer classified as it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from engine import TRAINER_REGISTRY, UserError
from evaluation.zero_shot import class_embeddings
from trainers.base import ForgetTrainer, Solved

LOGIT_SCALE = 100.0  # CLIP's, where its training ends


@TRAINER_REGISTRY.register()
class ForgetAscent(ForgetTrainer):
    """Fine-tuning of the projection by ascent on the texts' zero-shot cross-entropy.

    An adapted text is classified among the untouched embeddings of the set's evaluation prompts;
    steps are taken until the probability of its own class is below chance. Nothing is retained, on
    purpose, as in the plainest fine-tuning.
    """

    name = "ascent"
    default_target = None

    def solver_settings(self) -> dict[str, Any]:
        node = self.cfg.TRAINER.FORGETASCENT
        return self.text_settings() | {key.lower(): node[key] for key in node}

    def solve(self, classes: list[str], generator: torch.Generator) -> Solved:
        request = self.request(classes)
        node = self.cfg.TRAINER.FORGETASCENT
        names = class_embeddings(self.bundle).double().to(self.device)
        if len(names) < 2:
            raise UserError(f"{self.plan.dataset} has one class: no text can be taken for another")
        own = [self.bundle.classnames.index(request.classes[index]) for index in request.owner]
        found = ascend(
            request.hidden.double().to(self.device),
            self.model.projection.double(),
            names,
            torch.tensor(own, device=self.device),
            node.LR,
            node.STEPS,
            node.BELOW / len(names),
        )
        before, after = float(found.before.max()), float(found.after.max())
        print(
            f"  {found.steps} steps: probability {before:.3g} -> {after:.3g} (largest of its texts)"
        )
        if not found.reached:
            print(f"  warning: not below {node.BELOW / len(names):.3g} after {node.STEPS} steps")
        report = {
            "texts": request.texts,
            "steps": found.steps,
            "reached": found.reached,
            "probability_before": found.before.tolist(),
            "probability_after": found.after.tolist(),
        }
        return Solved(found.left.float(), found.right.float(), report)


@dataclass(frozen=True)
class Ascent:
    """`Delta = left @ right`, left (w, k) and right (k, d); how many steps it took and whether all
    texts got below the limit; each text's probability of its own class (k,) before and after."""

    left: Tensor
    right: Tensor
    steps: int
    reached: bool
    before: Tensor
    after: Tensor


def ascend(
    hidden: Tensor,
    projection: Tensor,
    names: Tensor,
    own: Tensor,
    lr: float,
    steps: int,
    limit: float,
) -> Ascent:
    """Gradient steps on the projection until every text's own class is below `limit`.

    With p a text's probability of its own class, the gradient of its cross-entropy `-log p` is
    1 - p times that of its log odds `log((1 - p) / p)`. At CLIP's scale 1 - p is 1e-3 to 1e-10
    before the first step, so steps along the former go nowhere (2,000 of them left p at 1). Steps
    along the latter have the same direction for every text and do not vanish; those are taken. A
    text below the limit rests while it stays there.

    In W the gradient is `H_f^T g` with g (k, d) the gradients in the texts' embeddings. So every
    step stays in the span of the texts, and summing g alone is exact: `Delta = H_f^T B`.

    Args:
        hidden: `H_f`, (k, w); projection: `W`, (w, d); names: (C, d), unit embeddings to classify
            among; own: (k,) int64, each text's class. float64.
        lr: of mean squared embedding length over mean squared hidden length, so that one number
            means the same for every backbone.

    Returns:
        See `Ascent`.
    """
    start = hidden @ projection  # (k, d)
    gram = hidden @ hidden.T  # (k, k)
    rate = lr * float(start.square().sum() / gram.trace())
    mine = torch.nn.functional.one_hot(own, len(names)).to(start)  # (k, C)
    total = torch.zeros_like(start)  # B, (k, d)
    before = None
    for step in range(steps + 1):
        embedding = start + gram @ total
        length = torch.linalg.vector_norm(embedding, dim=1, keepdim=True)
        unit = normalize(embedding, dim=1)
        p = (LOGIT_SCALE * unit @ names.T).softmax(dim=1)  # (k, C)
        probability = (p * mine).sum(dim=1)
        before = probability if before is None else before
        above = probability >= limit
        if step == steps or not above.any():
            break
        rivals = p * (1 - mine)
        rivals = rivals / rivals.sum(dim=1, keepdim=True)
        slope = LOGIT_SCALE * (rivals - mine) @ names  # of the log odds in `unit`, (k, d)
        slope = slope - (slope * unit).sum(dim=1, keepdim=True) * unit
        total = total + rate * above[:, None] * slope / length
    return Ascent(hidden.T, total, step, not bool(above.any()), before, probability)
