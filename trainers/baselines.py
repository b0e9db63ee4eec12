"""What every method must beat, as trainers. The mathematics is in `forgetting`: a closed form is a
function there and a row of the table at the end of this file."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clip.retain import GROUPS
from datasets import clean_name
from forgetting import baselines, erasers
from forgetting.baselines import Edit, EditInputs
from forgetting.context import excluded_note
from forgetting.errors import ProblemError
from forgetting.problem import Batch, Request
from trainers.base import ForgetTrainer, Solved, register
from trainers.inputs import BARE
from trainers.methods import ForgetExact


@register
class ForgetNothing(ForgetTrainer):
    """`Delta = 0`, as factors of rank 0: the untouched model in a row of its own."""

    def solve_one(self, request: Request) -> Solved:
        return Solved.none(self.projection)


@register
class ForgetName(ForgetNothing):
    """The class's name leaves the list that images are classified by; the model stays as it was.
    Any other word for the class still finds its images: nothing was forgotten."""

    def solve_one(self, request: Request) -> Solved:
        notes = ["the name leaves the list of classes; the projection stays as it was"]
        return replace(super().solve_one(request), notes=notes, removed=tuple(request.classes))


@register
class ForgetNoise(ForgetExact):
    """A random change of the norm and the rank of ForgetExact's answer. Whatever the rank, the mean
    of `||h Delta||^2` is that of full Gaussian noise of this norm."""

    def solve(self, requests: Batch) -> list[Solved]:
        answers = []
        for request, exact in zip(requests, super().solve(requests), strict=True):
            generator = torch.Generator().manual_seed(request.seed)
            size = float(torch.linalg.matrix_norm(exact.left @ exact.right))
            left, right = (
                torch.randn(x.shape, generator=generator, dtype=torch.float64)
                for x in (exact.left, exact.right)
            )
            norm = torch.linalg.matrix_norm(left @ right)
            left = (left * (size / norm if norm > 0 else 0.0)).float()
            rank = left.shape[1]
            report = {"norm": size, "texts": exact.report["texts"]}
            note = f"noise of rank {rank} and norm {size:.4g}, as the exact answer has"
            answers.append(Solved(left, right.float(), report, [note]))  # chance does not compose
        return answers


class ClosedForm(ForgetTrainer):
    """Runs a closed form on each request. Every name is retained with the same weight.

    Where a method has a target it is `opposite` by default: that needs nothing but the text itself
    and, unlike the empty prompt, is no reason of its own for other words to keep the class.
    """

    edit: Callable[[EditInputs, Any], Edit]
    retains = GROUPS
    prompts = False  # whether the method sees the evaluation prompts of the classes

    def solve_one(self, request: Request) -> Solved:
        retained, report, excluded_notes = self.retained_beside(request)
        own = [self.plan.classnames.index(name) for name in request.classes]
        if self.prompts:
            texts = [self.bundle.template.replace(BARE, clean_name(x)) for x in request.classes]
            rows = self.bundle.class_hidden[own]
            request = request.with_texts(list(zip(range(len(own)), texts, rows, strict=True)))
        hidden, w = request.hidden.double().to(self.device), self.projection.double()
        target = w.new_zeros(1) if self.bias is None else -self.bias
        if self.cfg.FORGET.TARGET:
            target = self.targets_without_bias(Batch([request]))
        inputs = EditInputs(
            hidden=hidden,
            projection=w,
            retained=retained,
            displacement=target.to(w) - hidden @ w,  # (k, d)
            labels=torch.tensor(own, device=self.device)[request.owner],
            neutral=self.bundle.neutral_hidden.to(w),
            seed=request.seed,
        )
        edit = self.edit(inputs, self.settings if self.settings_type else None)
        report |= edit.report | {"texts": list(dict.fromkeys(request.texts))}
        notes = list(edit.notes)
        if self.cfg.FORGET.TARGET:
            size = torch.linalg.matrix_norm(inputs.displacement)
            missed = torch.linalg.matrix_norm(hidden @ edit.delta - inputs.displacement)
            residual = float(missed / size) if size > 0 else 0.0
            report |= {"residual": residual}
            notes.append(f"the texts go {1 - residual:.1%} of their way to the target")
        return Solved(edit.left.float(), edit.right.float(), report, notes + excluded_notes)

    def retained_beside(self, request: Request) -> tuple[Tensor, dict[str, Any], list[str]]:
        """Hidden states (m, w), float64, of the names that are retained while a request is
        forgotten; what to report of them, and lines for the reader."""
        if not self.retains:
            return request.hidden[:0].double().to(self.device), {}, []
        owner = torch.tensor(request.owner)
        excluded = self.retain.excluded(request.same, request.hidden, owner).any(dim=0)
        rows, names = self.retain.rows[~excluded].double(), self.retain.named(excluded)
        if not len(rows):
            raise ProblemError(f"{type(self).__name__}: no name is left to retain")
        notes = excluded_note(names, request.classes)
        return rows, {"retained": len(rows), "excluded": names}, notes


def closed_form(
    name: str,
    edit: Callable[[EditInputs, Any], Edit],
    settings: type | None = None,
    **attributes: Any,
) -> None:
    """Register a closed form, with the dataclass of its settings, as the trainer `name`. Attributes
    are those of `ClosedForm` in which it differs, such as `defaults` for one with a target."""
    attributes |= {"__doc__": edit.__doc__, "edit": staticmethod(edit), "settings_type": settings}
    register(type(name, (ClosedForm,), attributes))


OPPOSITE = {"FORGET.TARGET": "opposite"}  # it needs nothing but the text
closed_form("ForgetZero", baselines.zero, retains=())
closed_form("ForgetUCE", baselines.uce, baselines.UceSettings, defaults=OPPOSITE)
closed_form("ForgetNullSpace", baselines.null_space, baselines.NullSpaceSettings, defaults=OPPOSITE)
closed_form("ForgetLEACE", erasers.leace, prompts=True)
closed_form("ForgetSPLINCE", erasers.splince, erasers.SplinceSettings, prompts=True)
closed_form("ForgetCCUP", erasers.ccup, erasers.ProjectionSettings, retains=())
closed_form("ForgetPOUR", erasers.pour, erasers.ProjectionSettings)
closed_form("ForgetDP", erasers.double_projection, erasers.DoubleProjectionSettings)
closed_form("ForgetOCE", erasers.oce, erasers.OceSettings)
closed_form("ForgetSPEED", erasers.speed, erasers.SpeedSettings, defaults=OPPOSITE)
