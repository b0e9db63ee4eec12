"""What every method must beat, as trainers of a few lines: the mathematics is in `forgetting`."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import datasets
from clip.retain import GROUPS
from engine import TRAINER_REGISTRY
from evaluation.zero_shot import class_embeddings
from forgetting.baselines import ascend, leace, noise, null_space, uce, zeroing
from forgetting.context import left_notes
from forgetting.errors import ProblemError
from forgetting.problem import Batch, Request
from forgetting.settings import setting
from trainers.base import ForgetTrainer, Solved
from trainers.exact import ForgetExact
from trainers.requests import BARE

BEYOND = 1e-5  # of the way to zero; float32 leaves a few 1e-7 of a text's length
ERASED = 0.5  # of the distance between the means; more than that left is no erasure


@dataclass(frozen=True)
class AscentSettings:
    lr: float = setting(
        1e-4, "step; 0.01 of a text's length at 1e-4 on any backbone", above=0, high=1e6
    )
    steps: int = setting(1000, "steps at most; a hundred are enough", 1, 10**6)
    # Images know the class long after its text is at chance.
    below: float = setting(1.0, "part of chance at which ascent stops", above=0, high=1)


@dataclass(frozen=True)
class NullSpaceSettings:
    threshold: float = setting(
        0.5,
        "part of the mean eigenvalue of H^T H / m; directions below it are free",
        above=0,
        high=1e6,
    )
    # With the authors' 10, for a language model, a text of CLIP goes a fifth of its way.
    damping: float = setting(0.0, "damping; the authors' is 10", 0, 1e6)


@dataclass(frozen=True)
class UceSettings:
    # With the authors' 1 a text goes a quarter of its way; from 100 on it reaches its target.
    erase: float = setting(
        1000.0, "weight of a forgotten text beside a retained one's 1", above=0, high=1e6
    )
    ridge: float = setting(0.5, "the authors' lambda", above=0, high=1e6)


@TRAINER_REGISTRY.register()
class ForgetNothing(ForgetTrainer):
    """`Delta = 0`, as factors of rank 0: the untouched model in a row of its own."""

    name = "nothing"
    sends = False

    def solve_one(self, request: Request, generator: torch.Generator) -> Solved:
        w = self.model.projection
        unchanged = w.new_zeros(len(w), 0), w.new_zeros(0, w.shape[1])
        return Solved(*unchanged, {"texts": request.texts})


@TRAINER_REGISTRY.register()
class ForgetName(ForgetNothing):
    """The class's name leaves the list that images are classified by; the model stays as it was.

    No image is given that name any more, which is all that an accuracy on the list sees. Any other
    word for the class still finds its images: nothing was forgotten.
    """

    name = "name"

    def solve_one(self, request: Request, generator: torch.Generator) -> Solved:
        note = "the name leaves the list of classes; the projection stays as it was"
        unchanged = super().solve_one(request, generator)
        return replace(unchanged, notes=[note], removed=tuple(request.classes))


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
    sends = False

    def solve_one(self, request: Request, generator: torch.Generator) -> Solved:
        hidden = request.hidden.double().to(self.device)
        left, right = zeroing(hidden, self.model.projection.double(), self.model.bias)
        return Solved(left.float(), (1 + BEYOND) * right.float(), {"texts": request.texts})


@TRAINER_REGISTRY.register()
class ForgetAscent(ForgetTrainer):
    """Fine-tuning of the projection by ascent on the texts' zero-shot cross-entropy.

    An adapted text is classified among the untouched embeddings of the set's evaluation prompts;
    steps are taken until the probability of its own class is below chance. Nothing is retained, on
    purpose, as in the plainest fine-tuning.
    """

    name = "ascent"
    sends = False

    def solve_one(self, request: Request, generator: torch.Generator) -> Solved:
        node = self.cfg.TRAINER.FORGETASCENT
        names = class_embeddings(self.bundle).double().to(self.device)
        if len(names) < 2:
            raise ProblemError(
                f"{self.plan.dataset} has one class: no text can be taken for another"
            )
        own = [self.texts.label[request.classes[index]] for index in request.owner]
        own, hidden = torch.tensor(own, device=self.device), request.hidden.double()
        limit, w = node.BELOW / len(names), self.model.projection.double()
        hidden, bias = hidden.to(self.device), self.model.bias
        found = ascend(hidden, w, names, own, node.LR, node.STEPS, limit, bias)
        before, after = float(found.before.max()), float(found.after.max())
        notes = [
            f"{found.steps} steps: probability {before:.3g} -> {after:.3g} (largest of its texts)"
        ]
        if not found.reached:
            notes.append(f"warning: not below {limit:.3g} after {node.STEPS} steps")
        report = {
            "texts": request.texts,
            "steps": found.steps,
            "reached": found.reached,
            "probability_before": found.before.tolist(),
            "probability_after": found.after.tolist(),
        }
        return Solved(found.left.float(), found.right.float(), report, notes)


@TRAINER_REGISTRY.register()
class ForgetNoise(ForgetExact):
    """A random change of the Frobenius norm and the rank that ForgetExact's answer has.

    Size, rank and bytes are those of the exact answer with the same settings; only the direction is
    chance. Of that size a text of average length is moved as far as by full Gaussian noise on the
    projection (see `forgetting.baselines.noise`), so low rank is no favour.
    """

    name = "noise"

    def solve(self, requests: Batch, generators: Sequence[torch.Generator]) -> list[Solved]:
        answers = []
        for exact, generator in zip(super().solve(requests, generators), generators, strict=True):
            size = float(torch.linalg.matrix_norm(exact.left @ exact.right))
            (w, rank), d = exact.left.shape, exact.right.shape[1]
            left, right = (x.float().to(self.device) for x in noise(w, d, rank, size, generator))
            note = f"noise of rank {rank} and norm {size:.4g}, as the exact answer has"
            report = {"norm": size, "texts": exact.report["texts"]}
            answers.append(Solved(left, right, report, [note]))  # chance does not compose
        return answers


class RetainingTrainer(ForgetTrainer):
    """A method that sees every retained name, each with the same weight."""

    def group_weights(self) -> dict[str, float | None]:
        return dict.fromkeys(GROUPS)

    def staying(self, request: Request) -> tuple[Tensor, list[str]]:
        """Hidden states (m, w), float64, of the names that stay, and the names that left."""
        left = self.texts.leaving(self.retain, Batch([request])).any(dim=0)
        rows = self.retain.rows[~left]
        if not len(rows):
            raise ProblemError(
                f"no name is left to retain beside {', '.join(request.classes)} of "
                f"{self.plan.dataset}: {type(self).__name__} needs some"
            )
        return rows.double(), self.retain.named(left)


class EditTrainer(RetainingTrainer):
    """A closed form `Delta = left @ D` that sees the retained names through `H_r^T H_r` alone.

    Its default target `opposite` needs nothing but the text itself and, unlike the empty prompt,
    is no reason of its own for other words to keep the class: compare ForgetExact with `opposite`.
    """

    def solve_one(self, request: Request, generator: torch.Generator) -> Solved:
        target, draws = self.targets(Batch([request]), [generator])
        staying, names = self.staying(request)
        hidden = request.hidden.double().to(self.device)
        displacement = target.to(hidden) - hidden @ self.model.projection.double()  # (k, d)
        left, report, notes = self.left(hidden, staying.T @ staying, len(staying))  # (w, k)
        missed = (hidden @ left) @ displacement - displacement  # (k, d)
        size = torch.linalg.matrix_norm(displacement)
        residual = float(torch.linalg.matrix_norm(missed) / size) if size > 0 else 0.0
        notes = [*notes, f"the texts go {1 - residual:.1%} of their way to the target"]
        report |= {"residual": residual, "texts": request.texts, "target_draws": draws[0]}
        report |= {"retained": len(staying), "excluded": names}
        notes += left_notes(names, [*map(datasets.clean_name, request.classes)])
        return Solved(left.float(), displacement.float(), report, notes)

    def left(
        self, hidden: Tensor, gram: Tensor, count: int
    ) -> tuple[Tensor, dict[str, Any], list[str]]:
        """The factor (w, k) of the change, what to report beside it, and lines for the reader.

        Args:
            hidden: `H_f`, (k, w) float64; gram: `H_r^T H_r`, (w, w), over `count` retained texts.
        """
        raise NotImplementedError(f"{type(self).__name__} must have a closed form")


@TRAINER_REGISTRY.register()
class ForgetUCE(EditTrainer):
    """UCE (Gandikota et al., WACV 2024, equation 7) on the text projection.

    With the authors' weight for what is edited (ERASE 1) a text of CLIP goes about a quarter of its
    way, held by a thousand retained ones, and its images are recognised as before. The default
    lands it on its target; a larger one changes nothing any more.
    """

    name = "uce"

    def left(self, hidden: Tensor, gram: Tensor, count: int) -> tuple[Tensor, dict, list[str]]:
        node = self.cfg.TRAINER.FORGETUCE
        return uce(hidden, gram, node.ERASE, node.RIDGE), {}, []


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

    def left(self, hidden: Tensor, gram: Tensor, count: int) -> tuple[Tensor, dict, list[str]]:
        node = self.cfg.TRAINER.FORGETNULLSPACE
        threshold = node.THRESHOLD * float(gram.trace()) / (count * len(gram))
        left = null_space(hidden, gram, count, node.DAMPING, threshold)
        free = int((torch.linalg.eigvalsh(gram / count) < threshold).sum())
        note = f"{free} of {len(gram)} directions lie below the threshold {threshold:.3g}"
        return left, {"free": free}, [note]


@TRAINER_REGISTRY.register()
class ForgetLEACE(RetainingTrainer):
    """LEACE (Belrose et al. 2023, arXiv 2306.03819): no linear classifier tells the class's texts
    from the retained ones any more, at the least change of the retained hidden states.

    The class's texts are those of the request and its evaluation prompt, which no other method
    sees. What it equals are means, so they end on the mean of the retained ones.
    """

    name = "leace"
    sends = False

    @classmethod
    def check_settings(cls, cfg) -> None:
        if importlib.util.find_spec("concept_erasure") is None:
            raise ProblemError(
                "ForgetLEACE needs the package concept-erasure: pip install -r requirements.txt"
            )

    def solve_one(self, request: Request, generator: torch.Generator) -> Solved:
        staying, names = self.staying(request)
        texts = []
        for index, name in enumerate(request.classes):
            prompt = self.bundle.class_hidden[[self.texts.label[name]]]
            mine = [row for row, owner in enumerate(request.owner) if owner == index]
            texts.append(torch.cat([request.hidden[mine], prompt]).double().to(self.device))
        left, right, apart = leace(texts, staying, self.model.projection.double())
        notes = [f"{apart:.1%} of the distance between the class's texts and the retained is left"]
        if apart > ERASED:
            notes.append("warning: little was erased: the class's texts hardly correlate with it")
        template = self.bundle.template
        prompts = [template.replace(BARE, datasets.clean_name(name)) for name in request.classes]
        report = {
            "apart": apart,
            "texts": list(dict.fromkeys([*request.texts, *prompts])),
            "retained": len(staying),
            "excluded": names,
        }
        notes += left_notes(names, [*map(datasets.clean_name, request.classes)])
        return Solved(left.float(), right.float(), report, notes)
