"""What every method must beat, as trainers of a few lines: the mathematics is in `forgetting`."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from clip.retain import GROUPS
from datasets import clean_name
from evaluation.zero_shot import class_embeddings
from forgetting.baselines import ascend, leace, noise, null_space, uce, zeroing
from forgetting.context import excluded_note
from forgetting.errors import ProblemError
from forgetting.io import need
from forgetting.problem import Batch, Request
from forgetting.settings import setting
from trainers.base import TARGETS, ForgetTrainer, Solved, register
from trainers.inputs import BARE
from trainers.methods import ForgetExact

BEYOND = 1e-5  # of the way to zero; float32 leaves a few 1e-7 of a text's length
ERASED = 0.5  # of the distance between the means; more than that left is no erasure


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
class ForgetZero(ForgetTrainer):
    """The least change after which nothing is left of the texts: `Delta = -H_f^+ H_f W`. Nothing is
    retained, on purpose.

    Cosines see no length, and float32 leaves a millionth of a zeroed text in a direction of chance.
    So the change goes a hundred-thousandth beyond zero, which decides this in the method's favour.
    """

    def solve_one(self, request: Request) -> Solved:
        hidden = request.hidden.double().to(self.device)
        left, right = zeroing(hidden, self.projection.double(), self.bias)
        return Solved(left.float(), (1 + BEYOND) * right.float())


@dataclass(frozen=True)
class AscentSettings:
    lr: float = setting(1e-4, "step; at 1e-4 0.01 of a text's length", above=0, high=1e6)
    steps: int = setting(1000, "steps at most; a hundred are enough", 1, 10**6)
    # Images know the class long after its text is at chance.
    below: float = setting(1.0, "part of chance at which ascent stops", above=0, high=1)


@register
class ForgetAscent(ForgetTrainer):
    """Fine-tuning of the projection by ascent on the texts' zero-shot cross-entropy, among the
    untouched embeddings of the set's evaluation prompts, until the probability of its own class is
    below chance. Nothing is retained, on purpose."""

    settings_type = AscentSettings

    def solve_one(self, request: Request) -> Solved:
        lr, steps = self.settings.lr, self.settings.steps
        names = class_embeddings(self.bundle).double().to(self.device)
        if len(names) < 2:
            raise ProblemError(f"{self.plan.dataset} has one class: ascent has no other to go to")
        own = [self.plan.classnames.index(request.classes[index]) for index in request.owner]
        own, limit = torch.tensor(own, device=self.device), self.settings.below / len(names)
        hidden, w = request.hidden.double().to(self.device), self.projection.double()
        answer = ascend(hidden, w, names, own, lr, steps, limit, self.bias)
        before, after = float(answer.before.max()), float(answer.after.max())
        notes = [f"{answer.steps} steps: largest probability {before:.3g} -> {after:.3g}"]
        if not answer.reached:
            notes.append(f"warning: not below {limit:.3g} after {steps} steps")
        report = {
            "steps": answer.steps,
            "reached": answer.reached,
            "probability_before": answer.before.tolist(),
            "probability_after": answer.after.tolist(),
        }
        return Solved(answer.left.float(), answer.right.float(), report, notes)


@register
class ForgetNoise(ForgetExact):
    """A random change of the norm and the rank of ForgetExact's answer: it moves a text of average
    length as far as full Gaussian noise (see `forgetting.baselines.noise`)."""

    def solve(self, requests: Batch) -> list[Solved]:
        answers = []
        for request, exact in zip(requests, super().solve(requests), strict=True):
            generator = torch.Generator().manual_seed(request.seed)
            size = float(torch.linalg.matrix_norm(exact.left @ exact.right))
            (w, rank), d = exact.left.shape, exact.right.shape[1]
            left, right = (x.float() for x in noise(w, d, rank, size, generator))
            report = {"norm": size, "texts": exact.report["texts"]}
            note = f"noise of rank {rank} and norm {size:.4g}, as the exact answer has"
            answers.append(Solved(left, right, report, [note]))  # chance does not compose
        return answers


class RetainingTrainer(ForgetTrainer):
    """A method that retains every name, each with the same weight."""

    retains = GROUPS

    def retained_beside(self, request: Request) -> tuple[Tensor, dict[str, Any], list[str]]:
        """Hidden states (m, w), float64, of the names that are retained while a request is
        forgotten; what to report of them, and lines for the reader."""
        owner = torch.tensor(request.owner)
        excluded = self.retain.excluded(request.same, request.hidden, owner).any(dim=0)
        rows, names = self.retain.rows[~excluded].double(), self.retain.named(excluded)
        if not len(rows):
            raise ProblemError(f"{type(self).__name__}: no name is left to retain")
        notes = excluded_note(names, request.classes)
        return rows, {"retained": len(rows), "excluded": names}, notes


class EditTrainer(RetainingTrainer):
    """A closed form `Delta = left @ D` that sees the retained names through `H_r^T H_r` alone.

    Its default target `opposite` needs nothing but the text itself and, unlike the empty prompt,
    is no reason of its own for other words to keep the class: compare ForgetExact with `opposite`.
    A method has `left(hidden, gram, count)`: from `H_f` (k, w) and `H_r^T H_r` (w, w) over `count`
    retained texts, float64, to the factor (w, k), what to report, and lines for the reader.
    """

    targets = TARGETS

    def solve_one(self, request: Request) -> Solved:
        target, draws = self.targets_without_bias(Batch([request]))
        retained, report, excluded_notes = self.retained_beside(request)
        hidden = request.hidden.double().to(self.device)
        displacement = target.to(hidden) - hidden @ self.projection.double()  # (k, d)
        left, more, notes = self.left(hidden, retained.T @ retained, len(retained))  # (w, k)
        missed = (hidden @ left) @ displacement - displacement  # (k, d)
        size = torch.linalg.matrix_norm(displacement)
        residual = float(torch.linalg.matrix_norm(missed) / size) if size > 0 else 0.0
        notes.append(f"the texts go {1 - residual:.1%} of their way to the target")
        report |= more | {"residual": residual, "target_draws": draws[0]}
        return Solved(left.float(), displacement.float(), report, notes + excluded_notes)


@dataclass(frozen=True)
class UceSettings:
    # With the authors' 1 a text goes a quarter of its way; from 100 on it reaches its target.
    erase: float = setting(1000.0, "weight of a forgotten text; retained: 1", above=0, high=1e6)
    ridge: float = setting(0.5, "the authors' lambda", above=0, high=1e6)


@register
class ForgetUCE(EditTrainer):
    """UCE (Gandikota et al., WACV 2024, equation 7) on the text projection."""

    settings_type = UceSettings

    def left(self, hidden: Tensor, gram: Tensor, count: int) -> tuple[Tensor, dict, list[str]]:
        return uce(hidden, gram, self.settings.erase, self.settings.ridge), {}, []


@dataclass(frozen=True)
class NullSpaceSettings:
    threshold: float = setting(
        0.5, "part of the mean eigenvalue of H^T H / m below which all is free", above=0, high=1e6
    )
    # With the authors' 10, for a language model, a text of CLIP goes a fifth of its way.
    damping: float = setting(0.0, "damping; the authors' is 10", 0, 1e6)


@register
class ForgetNullSpace(EditTrainer):
    """AlphaEdit's idea (Fang et al., ICLR 2025) on the text projection: the change is confined to
    the eigenvectors of `H_r^T H_r / m` below a threshold."""

    settings_type = NullSpaceSettings

    def left(self, hidden: Tensor, gram: Tensor, count: int) -> tuple[Tensor, dict, list[str]]:
        threshold = self.settings.threshold * float(gram.trace()) / (count * len(gram))
        left = null_space(hidden, gram, count, self.settings.damping, threshold)
        free = int((torch.linalg.eigvalsh(gram / count) < threshold).sum())
        note = f"{free} of {len(gram)} directions lie below the threshold {threshold:.3g}"
        return left, {"free": free}, [note]


@register
class ForgetLEACE(RetainingTrainer):
    """LEACE (Belrose et al. 2023, arXiv 2306.03819): no linear classifier tells the class's texts
    from the retained ones any more, at the least change of the retained hidden states. The class's
    texts are those of the request and its evaluation prompt, which no other method sees."""

    def check_settings(self, cfg: CfgNode) -> None:
        need("concept_erasure", "concept-erasure")

    def solve_one(self, request: Request) -> Solved:
        retained, report, excluded_notes = self.retained_beside(request)
        texts, prompts = [], []
        for index, name in enumerate(request.classes):
            prompt = self.bundle.class_hidden[[self.plan.classnames.index(name)]]
            prompts.append(self.bundle.template.replace(BARE, clean_name(name)))
            mine = [row for row, owner in enumerate(request.owner) if owner == index]
            texts.append(torch.cat([request.hidden[mine], prompt]).double().to(self.device))
        left, right, apart = leace(texts, retained, self.projection.double())
        notes = [f"{apart:.1%} of the distance between the class's texts and the retained is left"]
        if apart > ERASED:
            notes.append("warning: little was erased: the class's texts hardly correlate with it")
        report |= {"apart": apart, "texts": list(dict.fromkeys([*request.texts, *prompts]))}
        return Solved(left.float(), right.float(), report, notes + excluded_notes)
