"""Complete forgetting as a trainer: the constrained form, solved exactly and proved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import datasets
from clip.retain import Retained, exact_weights, retained
from engine import TRAINER_REGISTRY, UserError
from engine.determinism import one_thread
from forgetting import RetainSet, solve_constrained_each
from forgetting.forecast import Felt, Watch, follow, shares_each
from forgetting.problem import Change
from trainers.base import ForgetTrainer, Solved
from trainers.paper import POOR, proof
from trainers.requests import Request, Requests, Wordings, specific_targets

JOIN = 3  # wordings of a class that may join its texts: each harms the others a little more
ROUNDS = 8  # times that a request is solved again, at most
SHOWN = 3  # names that are said to feel it
BETAS = (0.05, 0.1, 0.2, 0.4)  # steps of a target that goes further


@TRAINER_REGISTRY.register()
class ForgetExact(ForgetTrainer):
    """Least disturbance of everything that is retained, with the forgotten texts on their target.

    Retained are three weighted groups of names: the other classes of the set, the vocabulary, and
    the classes of the other sets.
    """

    name = "exact"
    block = 256
    specific = True
    weighs = True

    @classmethod
    def check_settings(cls, cfg) -> None:
        node = cfg.TRAINER.FORGETEXACT
        if not any(exact_weights(cfg, bool(node.OTHERS)).values()):
            raise UserError("TRAINER.FORGETEXACT: one of OWN, VOCABULARY, OTHERS must be above 0")

    def group_weights(self) -> dict[str, float | None]:
        return dict(exact_weights(self.cfg, bool(self.others), bool(self.plan.keep)))

    def constants(self) -> dict[str, Any]:
        node = self.cfg.TRAINER.FORGETEXACT
        numbers = {"mu": self.retained.mu, "shared": node.SHARED, "follow": node.FOLLOW}
        numbers["margin"] = node.MARGIN
        return {"objective": "constrained", "weights": self.retain.weights} | numbers

    @cached_property
    def retained(self) -> Retained:
        """What is retained, factorised once for all requests."""
        keep = self.texts.held(self.plan.keep, self.others) if self.plan.keep else None
        with one_thread():
            return retained(self.cfg, self.bundle, list(self.others.values()), self.device, keep)

    def retained_names(self) -> RetainSet:
        print(f"ridge {self.retained.mu:.2g} of a hidden state's mean squared length")
        return self.retained.names

    def solve(self, requests: Requests, generators: Sequence[torch.Generator]) -> list[Solved]:
        """Solve all, then look at what text alone says. Where a wording of a class hardly follows
        its texts, the one that follows least joins them; where the margin is small, the target goes
        further; and those requests are solved again."""
        first, current = list(requests), list(requests)
        betas = [float(self.cfg.FORGET.BETA)] * len(first)
        answers = self._solve(requests, generators, betas)
        wordings = self.texts.wordings(requests.classes)
        for _ in range(ROUNDS):
            again = []
            for i, (request, answer) in enumerate(zip(current, answers, strict=True)):
                more = len(request.texts) - len(first[i].texts) < JOIN * len(request.classes)
                if more and (behind := self._behind(request, answer, wordings)):
                    current[i] = request.joined(behind)
                elif further := self._further(answer, betas[i]):
                    betas[i] = further
                else:
                    continue
                again.append(i)
                generators[i].manual_seed(generators[i].initial_seed())  # the target's noise again
            if not again:
                break
            some = ([part[i] for i in again] for part in (current, generators, betas))
            texts, noise, steps = some
            for i, answer in zip(again, self._solve(Requests(texts), noise, steps), strict=True):
                answers[i] = answer
        unlisted = self._unlisted(Requests(current), answers)
        rows = zip(first, current, answers, unlisted, strict=True)
        return [self._told(*row, wordings) for row in rows]

    def _further(self, answer: Solved, beta: float) -> float | None:
        """The next beta for a class whose text shows too small a margin; None: it is good, or there
        is none."""
        margin, lead = (answer.report["forecast"][key] for key in ("margin", "lead"))
        wanted = self.cfg.TRAINER.FORGETEXACT.MARGIN
        if self.cfg.FORGET.TARGET != "specific" or not wanted or margin is None:
            return None
        if margin >= wanted * lead:
            return None
        return next((step for step in BETAS if step > beta), None)

    def _behind(
        self, request: Request, answer: Solved, wordings: Mapping[str, Wordings]
    ) -> list[tuple[int, str, Tensor]]:
        """Of each class (by number) the wording that follows its texts least, if it hardly does."""
        found = []
        for number, name in enumerate(request.classes):
            texts, hidden = wordings[name]
            shares = self._follow(request, answer, number, hidden).tolist()
            free = [i for i, text in enumerate(texts) if text not in request.texts]
            least = min(free, key=shares.__getitem__, default=None)
            if least is not None and shares[least] < self.cfg.TRAINER.FORGETEXACT.FOLLOW:
                found.append((number, texts[least], hidden[least]))
        return found

    def _follow(self, request: Request, answer: Solved, number: int, hidden: Tensor) -> Tensor:
        """How far wordings (n, w) of a class follow its first text, (n,)."""
        text = request.hidden[request.owner.index(number)]
        return follow(answer.left, answer.right, text.to(self.device), hidden.to(self.device))

    def _told(
        self,
        first: Request,
        request: Request,
        answer: Solved,
        unlisted: dict[str, Any],
        wordings: Mapping[str, Wordings],
    ) -> Solved:
        """The answer, with what text alone says of it: who feels it, the wordings that joined, and
        those that still do not follow."""
        joined = request.texts[len(first.texts) :]
        shares = {
            text: share
            for number, name in enumerate(request.classes)
            for text, share in zip(
                wordings[name].texts,
                self._follow(request, answer, number, wordings[name].hidden).tolist(),
                strict=True,
            )
        }
        limit = self.cfg.TRAINER.FORGETEXACT.FOLLOW
        free = {text: share for text, share in shares.items() if text not in request.texts}
        behind = {text: share for text, share in free.items() if share < limit}
        notes = [*answer.notes]
        if joined:
            notes.append(f"forgotten as well, since they hardly followed: {', '.join(joined)}")
        if behind:
            least = min(behind, key=behind.__getitem__)
            notes.append(
                f"warning: {len(behind)} of {len(shares)} wordings hardly follow, least "
                f"{least!r} ({behind[least]:.2f} of the way)"
            )
        forecast = {"unlisted": unlisted} | answer.report["forecast"]
        felt = [Felt(**one) for one in forecast["felt"]]
        if felt:
            shown = ", ".join(f"{one.name} (-{one.lost:.3f} of cosine)" for one in felt[:SHOWN])
            notes.append(f"by text alone these feel it most: {shown}")
        if falling := [one.name for one in felt if one.falls]:
            notes.append(f"warning: likely to fall with it: {', '.join(falling)} (FORGET.KEEP)")
        found = {"looked_at": len(shares), "joined": joined, "behind": behind}
        report = answer.report | {"wordings": found, "forecast": forecast}
        return replace(answer, report=report, notes=notes)

    def _felt(
        self, requests: Requests, solutions: Sequence[Change]
    ) -> list[tuple[list[Felt], float | None, float | None]]:
        """Who feels each request, its margin and its lead; see `forgetting.forecast`."""
        label = self.texts.label
        return self.watch.each(
            solutions, [[label[name] for name in request.classes] for request in requests]
        )

    def _unlisted(self, requests: Requests, answers: Sequence[Solved]) -> list[dict[str, Any]]:
        """Group -> what names like those of the group would feel that nobody listed."""
        retain, rows = self.retain, requests.hidden.double().to(self.device)
        gone = requests.any_of(self.texts.leaving(retain, requests))
        moved = torch.cat(
            [
                (part @ answer.left.to(part)) @ answer.right.to(part)
                for part, answer in zip(rows.split(requests.sizes), answers, strict=True)
            ]
        )
        of_names = retain.rows, retain.shares, gone, retain.twin
        _, shares = shares_each(self.retained.ridge, rows, moved, requests.of_text, *of_names)
        groups = retain.spread(shares.masked_fill(gone, torch.nan))
        return [
            {
                name: {"rms": rms[i].item(), "max": most[i].item()}
                for name, (rms, most) in groups.items()
            }
            for i in range(len(answers))
        ]

    @cached_property
    def watch(self) -> Watch:
        """The evaluation prompts of the set, then those of the other sets that are listed."""
        listed = self.cfg.TRAINER.FORGETEXACT.OTHERS > 0
        bundles = [self.bundle, *(self.others.values() if listed else ())]
        names = [datasets.plain(name) for bundle in bundles for name in bundle.classnames]
        hidden = torch.cat([bundle.class_hidden for bundle in bundles])
        rivals = len(self.bundle.classnames)
        return Watch(names, hidden.to(self.device), self.model.projection, rivals)

    def _solve(
        self, requests: Requests, generators: Sequence[torch.Generator], betas: Sequence[float]
    ) -> list[Solved]:
        retain, ridge = self.retain, self.retained.ridge
        leaving = self.texts.leaving(retain, requests)  # (C, n)
        target, draws = self._targets(requests, leaving, generators, betas)
        hidden = requests.hidden.double().to(self.device)
        displacement = self.displacement(hidden, target)
        # A name that leaves with two classes of one request leaves once.
        gone = requests.any_of(leaving)
        solutions = solve_constrained_each(
            ridge, hidden, displacement, requests.of_text, retain.rows, retain.shares, gone
        )
        felt = self._felt(requests, solutions)
        parts = self.parts(requests, displacement, leaving, ridge)
        recipe = {
            "objective": "constrained",
            "statistics": retain.statistics.sha256,
            "weights": retain.weights,
            "mu": ridge.mu,
        }
        answers = []
        for i, (request, solution) in enumerate(zip(requests, solutions, strict=True)):
            names = retain.named(gone[i])
            notes = [proof(solution.certificate.gap), *self.left_notes(request.classes, names)]
            if solution.residual > POOR:
                notes.append(
                    f"warning: texts end {solution.residual:.1e} of their way beside their "
                    "targets; texts that repeat each other have different ones"
                )
            report = {
                "certificate": asdict(solution.certificate),
                "residual": solution.residual,
                "texts": request.texts,
                "left_retain_set": names,
                "target_draws": draws[i],
                "mu": ridge.mu,
                "beta": betas[i],
                "forecast": {
                    "felt": [one._asdict() for one in felt[i][0]],
                    "margin": felt[i][1],
                    "lead": felt[i][2],
                },
            }
            left, right = solution.left.float(), solution.right.float()
            answers.append(Solved(left, right, report, notes, recipe=recipe, parts=parts[i]))
        return answers

    def _targets(
        self,
        requests: Requests,
        leaving: Tensor,
        generators: Sequence[torch.Generator],
        betas: Sequence[float],
    ) -> tuple[Tensor, list[int]]:
        """`P` (K, d), and the draws of noise for each request."""
        if self.cfg.FORGET.TARGET != "specific":
            return self.targets(requests, generators)
        w, lam = self.model.projection, self.retained.lam
        beta = torch.tensor(betas, dtype=torch.float64)[requests.of_text]
        target = specific_targets(requests, w, self.retain, leaving, lam, beta)
        return target, [0] * len(requests)
