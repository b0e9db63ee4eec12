"""What all methods share: the walk over the requests, and what is kept of each.

A method is a subclass of `ForgetTrainer` that says what its settings are, what it retains and which
targets it takes, and that solves requests: from class texts to low-rank edits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from statistics import fmean
from textwrap import shorten
from typing import Any, ClassVar

from torch import Tensor
from yacs.config import CfgNode

from clip.retain import retain_set, target_inputs
from datasets import clean_name
from engine import TRAINER_REGISTRY, SimpleTrainer
from engine.config import TERMS, check
from engine.determinism import one_thread
from engine.log import logger, progress
from engine.sink import TENSORBOARD, Sink
from evaluation.results import LOGS, Results, join_label, place
from evaluation.rules import Fate, fate
from forgetting.adapter import Adapter, Recipe, adapter_bytes, projection_sha256
from forgetting.errors import ProblemError
from forgetting.io import finite, need, remove_stale
from forgetting.problem import Batch, LowRankEdit, Request
from forgetting.retain import RetainSet
from forgetting.targets import check_target, takes, targets
from trainers.inputs import RunInputs, make_plan, read_target

SHOWN = 200  # characters of names in a line on the screen
SINK = "numbers"  # the folder of --log, beside a data set's adapters
REMARKS = {
    Fate.STAYS: "half of its accuracy or more is left: not forgotten",
    Fate.NEVER: "was not recognised before: nothing to measure",
}

METHODS: dict[str, type[ForgetTrainer]] = {}  # by their names


def register(method: type[ForgetTrainer]) -> type[ForgetTrainer]:
    """Enter a method in `METHODS` and in Dassl's registry of trainers."""
    METHODS[method.__name__] = method
    return TRAINER_REGISTRY.register()(method)


@dataclass(frozen=True)
class Solved(LowRankEdit):
    """What a method found for one request."""

    report: dict[str, Any] = field(default_factory=dict)  # JSON values for the logs
    notes: list[str] = field(default_factory=list)  # lines for the reader
    removed: tuple[str, ...] = ()  # class names that leave the deployed list (`ZeroShot.predict`)
    recipe: Recipe | None = None  # what composing needs; None if the edit does not compose
    curves: dict[str, Tensor] = field(default_factory=dict)  # a descent's, for `--log`


class ForgetTrainer(RunInputs, SimpleTrainer):
    """Forgets classes of one data set with one backbone and one seed.

    No image trains anything: the feature bundles (made by CLIP, cached, or given) are read when the
    first request is solved, and `train` walks over the requests. A method has `solve`, of a batch
    of requests, or `solve_one`, of one of them.
    """

    settings_type: type | None = None  # dataclass of its own settings, TRAINER.METHOD.FIELD
    # Config keys with a default of the method's own. It has a target if FORGET.TARGET is one.
    defaults: ClassVar[Mapping[str, Any]] = {}
    weighted = False  # whether what it retains has weights, which the target `specific` needs
    retains: tuple[str, ...] = ()  # groups of names that it retains, each name with weight 1
    options: tuple[str, ...] = ()  # keys of FORGET that have an effect on some methods alone
    batch_size = 1  # number of requests that are solved together

    # Dassl's hooks, in its order

    def check_cfg(self, cfg: CfgNode) -> None:
        """Make the plan of a run. Whatever cannot run is refused from names and settings alone;
        nothing is written or encoded."""
        check(cfg)
        if cfg.LOG:
            need(TENSORBOARD, "tensorboard")
            need(cfg.LOG)
        kind, name = cfg.FORGET.TARGET, type(self).__name__
        has_target = "FORGET.TARGET" in self.defaults
        if kind and not has_target:
            raise ProblemError(f"{name} has no target; leave FORGET.TARGET empty")
        if takes(kind, "excluded") and not self.weighted:
            raise ProblemError(f"target {kind} needs ForgetExact's weights; {name} has none")
        if has_target:
            check_target(read_target(kind), cfg.FORGET.BETA if takes(kind, "beta") else 0.0)
        self.check_settings(cfg)
        self.plan = make_plan(cfg)
        used = {"PROTECT": bool(self.plan.protect), "TERMS": set(cfg.FORGET.TERMS) != set(TERMS)}
        for option in used:
            if used[option] and option not in self.options:
                raise ProblemError(f"FORGET.{option} has no effect on {name}; leave it out")

    def check_settings(self, cfg: CfgNode) -> None:
        """Refuse settings that are impossible together."""

    def build_data_loader(self) -> None:
        """Find out which requests are not done yet; read features only if there are some."""
        cfg, plan, forget = self.cfg, self.plan, self.cfg.FORGET
        self.lab2cname = dict(enumerate(plan.classnames))
        self.results = Results(cfg.OUTPUT_DIR)
        identity = {"trainer": cfg.TRAINER.NAME, "backbone": cfg.MODEL.BACKBONE.NAME}
        self.results.check(plan.dataset, identity)  # before weights are looked for
        self.run_settings = {"trainer": cfg.TRAINER.NAME, "seed": cfg.SEED} | self.model_settings()
        self.results.check(plan.dataset, self.run_settings)
        self.pending, done = [], []
        for classes in plan.requests:
            label, chosen = join_label(classes), self.chosen_settings(classes)
            if not forget.OVERWRITE and self.results.is_done(plan.dataset, label, chosen):
                done.append(label)
            else:
                self.pending.append(classes)
        if done:
            names = shorten(", ".join(done), SHOWN, placeholder=" ...")
            count = f"{len(done)} of {len(plan.requests)}"
            logger.info(f"done before, skipped: {plan.dataset}, {count} ({names})")

    def build_model(self) -> None:
        """All of CLIP that forgetting changes is its text projection."""
        self.model = None
        if self.pending:
            b = self.bundle
            self.projection_sha256 = projection_sha256(b.text_projection)
            self.projection = b.text_projection.to(self.device)  # (w, d), never written to
            self.bias = None if b.text_bias is None else b.text_bias.to(self.device)
            logger.info(
                f"{b.dataset}: {len(b.classnames)} classes, {len(b.labels)} images, "
                f"{len(b.retain_names)} retained names, projection "
                f"{tuple(self.projection.shape)}, solving on {self.device}"
            )

    # What a method solves from

    @cached_property
    def settings(self) -> Any:
        node = self.cfg.TRAINER[type(self).__name__.upper()]
        return self.settings_type(**{key.lower(): value for key, value in node.items()})

    @cached_property
    def retain(self) -> RetainSet:
        """The names that may be retained, the same for all requests."""
        retain = self.retained_names()
        counts = [
            f"{count} {group} (each text weighs {retain.weights[group] / count:.3g})"
            for group, count in retain.counts.items()
        ]
        logger.info(f"retained: {', '.join(counts) or 'nothing; --retain-names FILE names some'}")
        return retain

    def retained_names(self) -> RetainSet:
        weights, similarity = dict.fromkeys(self.retains), float(self.cfg.FORGET.SIMILARITY)
        others = list(self.others.values())
        return retain_set(self.bundle, others, weights, similarity, self.device)

    def targets_without_bias(self, requests: Batch) -> Tensor:
        """Where the texts are sent, (K, d), less the model's bias, which no edit moves."""
        forget = self.cfg.FORGET
        kind = read_target(forget.TARGET, self.projection.shape[1])
        text, noise_std = self.target_text(kind), float(forget.NOISE_STD)
        inputs = target_inputs(self.bundle, noise_std=noise_std, text=text)
        target = targets(kind, requests, inputs, float(forget.BETA))
        return target if inputs.bias is None else target - inputs.bias.to(target)

    def chosen_settings(self, classes: Sequence[str]) -> dict[str, Any]:
        """The settings that were chosen for a request, by which its result is known: JSON values,
        there before anything is encoded. What a method computes from them is in its report."""
        forget, plan = self.cfg.FORGET, self.plan
        chosen: dict[str, Any] = {
            "target": forget.TARGET,
            "noise_std": float(forget.NOISE_STD) if forget.TARGET == "empty" else None,
            "beta": float(forget.BETA) if takes(forget.TARGET, "beta") else None,
            "prompts": {name: plan.prompts[name] for name in classes if name in plan.prompts},
            "protect_names": plan.protect,
            "similarity": float(forget.SIMILARITY) if self.retains else None,
            "vocabulary_sha256": plan.vocabulary_sha256 if "vocabulary" in self.retains else "",
        }
        chosen = {key: value for key, value in chosen.items() if value not in (None, "", [], {})}
        if "others" in self.retains:
            chosen["other_sets"] = plan.others
        return chosen | self.method_settings()

    def method_settings(self) -> dict[str, Any]:
        """The settings of the method alone."""
        return asdict(self.settings) if self.settings_type else {}

    def requests(self, block: list[list[str]]) -> list[Request]:
        """What a solve needs, so that encoding is not timed as solving."""
        return [self.request(classes) for classes in block]

    def solve(self, requests: Batch) -> list[Solved]:
        """Forget each request from the original model."""
        return [self.solve_one(request) for request in requests]

    # The walk

    def train(self) -> None:
        """Forget every request of the plan that is not done yet, each from the original model. A
        killed run loses the requests that are solved together at that moment."""
        dataset, folder, pending = self.plan.dataset, self.results.folder, self.pending
        remove_stale(folder)
        self.results.compile()
        self.sink = Sink(self.cfg.LOG, folder / place(dataset) / SINK) if self.cfg.LOG else None
        self.bar = progress(desc=dataset, total=len(pending))
        try:
            with self.sink or nullcontext(), self.bar:
                for start in range(0, len(pending), self.batch_size):
                    self.forget(pending[start : start + self.batch_size])
        finally:  # what is done is done, also on Ctrl-C
            self.results.compile()
        rn = self.run_settings["backbone"].startswith("RN")
        options = f"rn={rn}, multiclass={self.cfg.FORGET.MULTICLASS}"
        logger.info(f"results: {folder / LOGS}")
        logger.info(
            f'from utils import create_results; df, args = create_results("{folder}/", {options})'
        )

    def forget(self, block: list[list[str]]) -> None:
        """Solve a block of requests together, evaluate the answers, and keep them."""
        requests = Batch(self.requests(block))
        started = time.perf_counter()
        with one_thread():
            answers = self.solve(requests)
            seconds = (time.perf_counter() - started) / len(block)
            removed = [answer.removed for answer in answers]
            accuracies = self.accuracies.after(block, answers, removed)
        for request, answer, after in zip(requests, answers, accuracies, strict=True):
            self.keep(request, answer, after, seconds)
            self.bar.update()

    def keep(self, request: Request, answer: Solved, after: dict[str, Any], seconds: float) -> None:
        """Write the adapter of a request with its log entry, and show what became of it."""
        classes, dataset, forget = request.classes, self.plan.dataset, self.cfg.FORGET
        label, settings = join_label(classes), self.run_settings
        solver = {
            "name": type(self).__name__.removeprefix("Forget").lower(),
            "settings": self.chosen_settings(classes),
            "texts": request.texts,
            **finite(answer.report),
            "device": str(self.device),
            "seconds": seconds,
        }
        if answer.removed:
            solver["removed_names"] = list(answer.removed)
        before = self.accuracies.before(classes)
        entry = {"final_results": after, "zero_shot": before, "solver": solver}
        adapter = Adapter(
            answer.left.cpu(),
            answer.right.cpu(),
            projection_sha256=self.projection_sha256,
            classes=classes,
            dataset=dataset,
            record=entry | {"indices": [self.plan.classnames.index(name) for name in classes]},
            **{key: settings[key] for key in ("backbone", "weights", "trainer")},
            settings=settings,
            recipe=answer.recipe,
            model=self.bundle.identity,
        )
        mine = None if forget.OVERWRITE else solver["settings"]
        self.results.add(adapter_bytes(adapter), dataset, label, mine)
        lines = [*answer.notes, *outcomes(before[dataset], after[dataset])]
        title = f"{dataset} / {clean_name(label)} ({seconds:.3f} s)"
        logger.info("\n  ".join([title, *lines]))
        if self.sink:
            self.sink.row(label, numbers_of(dataset, entry), self.plan.requests.index(classes))
            for name, values in answer.curves.items():
                self.sink.curve(f"{name}/{label}", values)

    def audit(self) -> None:
        """Measure what is left of the classes of this run: audit.json beside the logs."""
        from evaluation.audit.case import AuditData
        from evaluation.audit.run import audit_dataset  # scikit-learn: only where it is used
        from evaluation.tables import report_audit

        data = AuditData(self.bundle, self.others, self.cfg.SEED, self.encode)
        labels = [join_label(classes) for classes in self.plan.requests]
        audit_dataset(self.results.folder, labels, data)
        report_audit(self.results.folder, [self.plan.dataset])


def outcomes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What became of each class of a request, and of the rest of its set."""

    def percent(fraction: float | None) -> str:
        return "no images" if fraction is None else f"{fraction:.1%}"

    for name, was in before.items():
        sides = [
            f"{what} {percent(was[key])} -> {percent(after[name][key])}"
            for what, key in (("forgotten", "cls_acc_test"), ("rest", "no_cls_acc"))
        ]
        yield f"{clean_name(name)}: {', '.join(sides)}"
        if remark := REMARKS.get(fate(was["cls_acc_test"], after[name]["cls_acc_test"])):
            yield f"{clean_name(name)}: {remark}"


def numbers_of(dataset: str, entry: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of a log entry for `--log`; of several classes the mean."""
    numbers = {f"solver/{k}": x for k, x in entry["solver"].items() if isinstance(x, int | float)}
    for when, side in (("before", "zero_shot"), ("after", "final_results")):
        own = list(entry[side][dataset].values())
        forgotten = [x["cls_acc_test"] for x in own if x["cls_acc_test"] is not None]
        numbers[f"forgotten/{when}"] = fmean(forgotten) if forgotten else None
        numbers[f"rest/{when}"] = own[0]["no_cls_acc"]
        for name in entry[side].keys() - {dataset}:
            numbers[f"{name}/{when}"] = entry[side][name]["all"]["all_ds"]
    return numbers
