"""The walk that every forgetting trainer shares: requests in blocks, one solve, evaluation, logs.

A method is one small subclass: what it retains and where it sends texts by default, what its solver
depends on, and `solve` from requests to low-rank changes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import datasets
from clip.apply import save_full_model
from clip.architectures import architecture
from clip.bundle import load_bundles
from clip.cache import FeatureCache
from clip.features import build_bundle
from clip.retain import retain_set
from clip.source import ClipSource
from engine import SimpleTrainer
from engine.config import ForgetSettings, check
from engine.determinism import one_thread, seeded
from engine.files import Batch as FileBatch
from engine.files import sweep
from engine.log import logger, progress
from engine.sink import Sink, require
from evaluation.results import (
    Finished,
    check_folder,
    is_done,
    join_label,
    merge_results,
    place,
    read_logs,
)
from evaluation.rows import mean, rows_of
from evaluation.rules import Fate, fate
from evaluation.zero_shot import Evaluator, accuracy
from forgetting import Adapter, RetainSet, projection_sha256
from forgetting.adapter import Part, adapter_bytes, recipe_fields
from forgetting.errors import ProblemError
from forgetting.io import finite
from forgetting.problem import Batch, Request
from trainers.plan import Plan, make_plan
from trainers.requests import Texts, check_prompts, check_target, read_prompts

NAMED = 200  # characters of names that were done before, on the screen
SINK = "numbers"  # the folder of --log, beside a data set's adapters


@dataclass(frozen=True)
class Solved:
    """What a method found for one request: `Delta = left @ right`.

    Attributes:
        report: of JSON values, for the logs; notes: lines for the reader.
        removed: class names that leave the deployed list (`ZeroShot.predict`).
        recipe: what composing needs beside the classes' parts; empty if the answer does not
            compose. parts: one a class of the request.
        curves: what changed from step to step of a descent, for `--log`.
    """

    left: Tensor  # (w, r)
    right: Tensor  # (r, d)
    report: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    removed: tuple[str, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)
    curves: dict[str, Tensor] = field(default_factory=dict)


class AdaptedProjection(nn.Module):
    """CLIP's text projection, frozen, with the low-rank adapter of the class in hand beside it."""

    def __init__(self, projection: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        w, d = projection.shape
        self.register_buffer("projection", projection)  # (w, d), never written to
        self.register_buffer("bias", bias)  # (d,), or None
        self.register_buffer("left", projection.new_zeros(w, 0))
        self.register_buffer("right", projection.new_zeros(0, d))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, w) to text embeddings (n, d)."""
        embedded = hidden @ self.projection + (hidden @ self.left) @ self.right
        return embedded if self.bias is None else embedded + self.bias


class ForgetTrainer(SimpleTrainer):
    """Forgets the classes of one data set with one backbone and one seed.

    Images never train anything, so there are no training loaders: `build_data_loader` brings the
    feature bundles (made by CLIP, cached, or given), and `train` walks over the requests.
    """

    name: str
    block: ClassVar[int] = 1  # requests that are solved together
    sends: ClassVar[bool] = True  # whether the method sends texts to a target
    specific: ClassVar[bool] = False  # whether it knows the target of that name
    terms: ClassVar[bool] = False  # whether it minimises the paper's loss (FORGET.TERMS)
    weighs: ClassVar[bool] = False  # whether names may weigh more than others (FORGET.PROTECT)

    @classmethod
    def preflight(cls, cfg) -> Plan:
        """Refuse, from names and settings alone, what cannot run; nothing is written or encoded."""
        check(cfg)
        require(cfg.LOG)
        if not cfg.FEATURES.DIR:  # unknown names, before any file of theirs is looked at
            architecture(cfg.MODEL.BACKBONE.NAME)
            datasets.spec(cfg.DATASET.NAME, cfg.DATASET.IMAGES)
        cls.check_target(cfg)
        read_prompts(cfg)
        cls.check_settings(cfg)
        plan = make_plan(cfg)
        if plan.protect and not cls.weighs:
            raise ProblemError(f"{cls.__name__} weighs no names: FORGET.PROTECT is for ForgetExact")
        if not cls.terms and set(cfg.FORGET.TERMS) != set(ForgetSettings().terms):
            raise ProblemError(
                f"FORGET.TERMS is for the paper's loss, which {cls.__name__} has not"
            )
        identity = {"trainer": cfg.TRAINER.NAME, "backbone": cfg.MODEL.BACKBONE.NAME}
        if not cfg.FEATURES.DIR:  # a bundle says its own, once it is read
            identity["precision"] = cfg.MODEL.PRECISION
        check_folder(cfg.OUTPUT_DIR, plan.dataset, identity)
        return plan

    @classmethod
    def check_settings(cls, cfg) -> None:
        """What no range of a single key says; raises ProblemError for impossible settings."""

    @classmethod
    def check_target(cls, cfg) -> None:
        """Refuse a target that is none, or that the method has no use for."""
        kind, name = cfg.FORGET.TARGET, cls.__name__
        if not cls.sends and kind:
            raise ProblemError(
                f"{name} sends texts nowhere: leave FORGET.TARGET empty, not {kind!r}"
            )
        if cls.sends:
            check_target(kind, cfg.FORGET.BETA)
        if kind == "specific" and not cls.specific:
            raise ProblemError(
                f"FORGET.TARGET specific needs the weighted retain set of ForgetExact; for {name} "
                "choose empty, opposite, orthogonal, text:TEXT or vector:FILE"
            )

    def check_cfg(self, cfg) -> None:
        """Dassl's hook, called before anything is built."""
        self.plan = self.preflight(cfg)
        self.prompts = read_prompts(cfg)

    def build_data_loader(self) -> None:
        """The bundle of the set, those of the other sets, and Dassl's names for the classes."""
        cfg = self.cfg
        backbone = cfg.MODEL.BACKBONE.NAME
        names = [self.plan.dataset, *self.plan.others]
        if cfg.FEATURES.DIR:
            self.source = encode = None
            bundles = load_bundles(cfg.FEATURES.DIR, backbone, names)
        else:
            weights, precision = cfg.MODEL.INIT_WEIGHTS or None, cfg.MODEL.PRECISION
            self.source = ClipSource(backbone, weights, cfg.FEATURES.CACHE, self.device, precision)
            encode = FeatureCache(self.source, cfg.FEATURES.CACHE).texts
            bundles = {
                name: build_bundle(
                    name,
                    self.source,
                    cfg.DATASET.ROOT,
                    cfg.FEATURES.CACHE,
                    template=(cfg.DATASET.TEMPLATE or None) if name == names[0] else None,
                    batch_size=cfg.DATALOADER.TEST.BATCH_SIZE,
                    workers=cfg.DATALOADER.NUM_WORKERS,
                    own=cfg.DATASET.IMAGES if name == names[0] else "",
                )
                for name in names
            }
        for name, reason in self.plan.absent.items():
            logger.info(f"not evaluated: {name} ({reason})")
        self.bundle = bundles.pop(self.plan.dataset)
        self.others = bundles
        check_prompts(self.prompts, self.bundle)
        self.texts = Texts(self.bundle, encode, self.prompts)
        self.train_loader_x = self.train_loader_u = self.val_loader = self.test_loader = None
        self.num_classes = len(self.bundle.classnames)
        self.num_source_domains = 0
        self.lab2cname = dict(enumerate(self.bundle.classnames))

    def build_model(self) -> None:
        """The text projection with an adapter: all of CLIP that forgetting changes."""
        self.model = AdaptedProjection(self.bundle.text_projection, self.bundle.text_bias)
        self.model.to(self.device)
        self.register_model("text_projection", self.model)
        bundle = self.bundle
        logger.info(
            f"{bundle.dataset}: {len(bundle.classnames)} classes, {len(bundle.labels)} images, "
            f"{len(bundle.retain_names)} retained names, projection "
            f"{tuple(bundle.text_projection.shape)}, solving on {self.device}"
        )
        self.pending = self._pending()

    def group_weights(self) -> dict[str, float | None]:
        """Weights of the groups of names that the method retains; none by default."""
        return {}

    @cached_property
    def retain(self) -> RetainSet:
        """What may be retained, made once for all requests."""
        retain = self.retained_names()
        shown = [
            f"{count} {group} (each text weighs {retain.weights[group] / count:.3g})"
            for group, count in retain.counts.items()
        ]
        logger.info(f"retained: {', '.join(shown) or 'nothing'}")
        return retain

    def retained_names(self) -> RetainSet:
        """The names by the method's weights."""
        others, similarity = list(self.others.values()), float(self.cfg.FORGET.SIMILARITY)
        return retain_set(self.bundle, others, self.group_weights(), similarity, self.device)

    def solver_settings(self) -> dict[str, Any]:
        """The constants that make two solves the same, JSON values only; kept in the logs."""
        kind = self.cfg.FORGET.TARGET
        settings: dict[str, Any] = {"target": kind} if kind else {}
        if kind == "empty":
            settings["noise_std"] = float(self.cfg.FORGET.NOISE_STD)
        if kind in ("opposite", "specific"):
            settings["beta"] = float(self.cfg.FORGET.BETA)
        if self.prompts:
            settings["prompts"] = self.prompts
        if self.plan.protect:
            settings["protect"] = self.plan.protect
        if self.group_weights():
            settings["similarity"] = float(self.cfg.FORGET.SIMILARITY)
            settings["statistics"] = self.retain.statistics.sha256
        return settings | self.constants()

    def constants(self) -> dict[str, Any]:
        """The method's own: by default those of its node in the config."""
        node = self.cfg.TRAINER.get(type(self).__name__.upper(), {})
        return {key.lower(): value for key, value in node.items()}

    def read(self, requests: Batch) -> None:
        """Have the model read what a solve looks at beside its texts, so that encoding is not timed
        as solving; nothing by default."""

    def solve(self, requests: Batch, generators: Sequence[torch.Generator]) -> list[Solved]:
        """Forget each request from the original model; a method that has nothing to share between
        them says `solve_one` instead."""
        pairs = zip(requests, generators, strict=True)
        return [self.solve_one(request, generator) for request, generator in pairs]

    def solve_one(self, request: Request, generator: torch.Generator) -> Solved:
        """Forget one request, from the original model."""
        raise NotImplementedError(f"{type(self).__name__} must solve")

    def targets(
        self, requests: Batch, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, list[int]]:
        """Where the texts are sent: (K, d), and how often noise was drawn for each request. Less
        the model's bias, which nothing moves, so that `target - hidden @ projection` is the way."""
        target, draws = self.embedded_targets(requests, generators)
        bias = self.bundle.text_bias
        return target if bias is None else target - bias.to(target), draws

    def embedded_targets(
        self, requests: Batch, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, list[int]]:
        """The same as embeddings."""
        forget = self.cfg.FORGET
        return self.texts.targets(
            forget.TARGET, float(forget.BETA), float(forget.NOISE_STD), requests, generators
        )

    def run_settings(self) -> dict[str, Any]:
        """What all results of one data set in one folder must share."""
        known = {"model": self.bundle.model} if self.bundle.model else {}
        return known | {
            "trainer": self.cfg.TRAINER.NAME,
            "backbone": self.bundle.backbone,
            "weights": self.bundle.weights,
            "precision": self.bundle.precision,
            "template": self.bundle.template,
            "split": self.bundle.split,
            "seed": self.cfg.SEED,
        }

    def _pending(self) -> list[list[str]]:
        """The requests that are not done yet.

        Raises:
            ProblemError: the output folder holds results of another kind; before anything is written.
        """
        folder, dataset = Path(self.cfg.OUTPUT_DIR), self.plan.dataset
        logs, settings = check_folder(folder, dataset, self.run_settings()), self.solver_settings()
        done, pending = [], []
        for classes in self.plan.requests:
            label = join_label(classes)
            if not self.cfg.FORGET.OVERWRITE and is_done(folder, logs, dataset, label, settings):
                done.append(label)
            else:
                pending.append(classes)
        if done:
            names = shorten(", ".join(done), NAMED, placeholder=" ...")
            total = len(self.plan.requests)
            logger.info(f"done before, skipped: {dataset}, {len(done)} of {total} ({names})")
        return pending

    def train(self) -> None:
        """Forget every request of the plan that is not done yet, each from the original model.

        Requests are taken in blocks; what is done is written about once a second, so that a killed
        run loses little and never consistency.
        """
        dataset = self.plan.dataset
        folder, overwrite = Path(self.cfg.OUTPUT_DIR), self.cfg.FORGET.OVERWRITE
        settings, solver_settings = self.run_settings(), self.solver_settings()
        pending = self.pending
        sweep(folder, again=True)
        if pending:
            self.write_shared(folder)

        def write(finished: list[Finished]) -> None:
            merge_results(folder, dataset, settings, finished, overwrite)
            if self.cfg.FORGET.SAVE_MODEL:
                for one in finished:
                    place_of_it = folder / one.entry["solver"]["model"]
                    save_full_model(self.source, one.adapter, place_of_it)

        self.bar = progress(desc=dataset, total=len(pending))
        self.sink = Sink(self.cfg.LOG, folder / place(dataset) / SINK)
        with self.sink, self.bar, FileBatch(write) as batch:
            for start in range(0, len(pending), self.block):
                block = pending[start : start + self.block]
                for finished in self.forget(block, settings, solver_settings):
                    batch.add(finished)
                self.bar.update(len(block))

    def write_shared(self, folder: Path) -> None:
        """Write what all adapters of a run refer to; nothing by default."""

    def forget(
        self, block: list[list[str]], settings: dict[str, Any], solver_settings: dict[str, Any]
    ) -> list[Finished]:
        """Solve a block of requests and evaluate each answer, before and after."""
        dataset = self.plan.dataset
        requests = Batch([self.texts.request(classes) for classes in block])
        labels = [join_label(classes) for classes in block]
        # Random numbers of one request: the same in a resumed run, whatever ran before.
        generators = [seeded(self.cfg.SEED, dataset, label) for label in labels]
        self.read(requests)
        started = time.perf_counter()
        with one_thread():
            solved = self.solve(requests, generators)
        seconds = (time.perf_counter() - started) / len(block)
        for label, answer in zip(labels, solved, strict=True):
            if not (torch.isfinite(answer.left).all() and torch.isfinite(answer.right).all()):
                raise ProblemError(
                    f"the change for {label!r} of {dataset} is not finite: a weight, ridge or beta "
                    "is out of range; nothing was saved for it"
                )
        self.model.left, self.model.right = solved[-1].left, solved[-1].right
        factors = [(answer.left.cpu(), answer.right.cpu()) for answer in solved]
        with one_thread():
            accuracies = self.evaluator.after(block, solved, [answer.removed for answer in solved])
        finished = []
        for classes, label, answer, change, after in zip(
            block, labels, solved, factors, accuracies, strict=True
        ):
            path = place(dataset, label)
            report = {
                "name": self.name,
                "settings": solver_settings,
                **finite(answer.report),
                **({"removed_names": list(answer.removed)} if answer.removed else {}),
                "device": str(self.device),
            }
            adapter = Adapter(
                *change,
                projection_sha256=self.projection_sha256,
                classes=classes,
                dataset=dataset,
                solver=report,
                **{key: settings[key] for key in ("backbone", "weights", "trainer")},
                settings=settings,
                **(recipe_fields(answer.recipe, answer.parts) if answer.recipe else {}),
            )
            if self.cfg.FORGET.SAVE_MODEL:
                report["model"] = f"{path}.pt"
            # Not in the adapter: the same run makes the same file.
            report = report | {"seconds": seconds}
            before = self.evaluator.before(classes)
            entry = {"final_results": after, "zero_shot": before, "solver": report}
            stored = adapter_bytes(adapter), f"{path}.safetensors"
            finished.append(Finished(label, entry, adapter, *stored))
            self.show(finished[-1], answer)
        return finished

    def show(self, finished: Finished, answer: Solved) -> None:
        """Say what became of a request."""
        dataset, label, entry = self.plan.dataset, finished.label, finished.entry
        seconds = entry["solver"]["seconds"]
        before, after = (entry[side][dataset] for side in ("zero_shot", "final_results"))
        lines = [f"  {line}" for line in [*answer.notes, *outcomes(before, after)]]
        logger.info("\n".join([f"{dataset} / {label} ({seconds:.3f} s)", *lines]))
        if self.cfg.LOG:
            self.pass_on(label, entry, answer.curves)

    def pass_on(self, label: str, entry: dict[str, Any], curves: dict[str, Tensor]) -> None:
        """Give the numbers of a request to `--log`, under its place in the plan."""
        rows = rows_of({self.plan.dataset: {label: entry}})
        sides = {"forgotten": [row.own for row in rows], "rest": [rows[0].rest]}
        sides |= {name: [change] for name, change in rows[0].others.items()}
        numbers = {
            f"{name}/{when}": mean(getattr(change, when) for change in changes)
            for name, changes in sides.items()
            for when in ("before", "after")
        }
        found = entry["solver"]
        numbers |= {f"solver/{k}": v for k, v in found.items() if isinstance(v, int | float)}
        numbers |= {"solver/gap": found.get("certificate", {}).get("gap")}
        step = [join_label(classes) for classes in self.plan.requests].index(label)
        self.sink.row(label, numbers, step)
        for name, values in curves.items():
            self.sink.curve(f"{name}/{label}", values)

    @cached_property
    def projection_sha256(self) -> str:
        return projection_sha256(self.bundle.text_projection)

    @cached_property
    def evaluator(self) -> Evaluator:
        return Evaluator(self.bundle, self.others)

    def test(self, split: str | None = None) -> float | None:
        """Zero-shot accuracy of the set as the projection stands; Dassl's entry point."""
        return accuracy(self.evaluator.own.correct([self.model])[0])

    def audit(self) -> None:
        """Measure what is left of the classes of this run: audit.json beside the logs."""
        from evaluation.audit.inputs import Inputs
        from evaluation.audit.run import audit_dataset  # scikit-learn: only where it is used
        from evaluation.tables import report_audit

        folder, dataset = Path(self.cfg.OUTPUT_DIR), self.plan.dataset
        inputs = Inputs(self.bundle, self.others, self.texts.encode)
        labels = [join_label(classes) for classes in self.plan.requests]
        audit_dataset(folder, read_logs(folder), dataset, labels, inputs, self.cfg.SEED)
        report_audit(folder, [dataset])


def outcomes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What became of each class of a request, and of the rest of its set."""
    for name, was in before.items():
        now = after[name]
        shown = ", ".join(
            f"{what} {_percent(was[key])} -> {_percent(now[key])}"
            for what, key in (("forgotten", "cls_acc_test"), ("rest", "no_cls_acc"))
        )
        yield f"{name}: {shown}"
        if fate(was["cls_acc_test"], now["cls_acc_test"]) == Fate.STAYS:
            yield f"{name}: half of its accuracy or more is left: not forgotten"


def _percent(fraction: float | None) -> str:
    return "no images" if fraction is None else f"{fraction:.1%}"
