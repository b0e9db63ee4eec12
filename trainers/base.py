"""What all forgetting trainers share: inputs, the walk over the requests, and what is kept of each.

A method is a subclass of `ForgetTrainer` that says what its settings are, what it retains and which
targets it takes, and that solves requests: from class texts to low-rank edits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

import datasets
from clip.apply import save_full_model
from clip.retain import retain_set, target_inputs
from engine import TRAINER_REGISTRY, SimpleTrainer
from engine.config import check
from engine.determinism import one_thread
from engine.log import logger, progress
from engine.settings import ForgetSettings
from engine.sink import Sink, require
from evaluation.results import Results, join_label, model_files, place, read_logs
from evaluation.rows import mean, rows_of
from evaluation.rules import Fate, fate
from evaluation.zero_shot import accuracy
from forgetting import Adapter, RetainSet, projection_sha256
from forgetting.adapter import adapter_bytes
from forgetting.errors import ProblemError
from forgetting.io import finite, remove_stale
from forgetting.problem import Batch, LowRankEdit, Request
from forgetting.recipe import Recipe
from forgetting.targets import WITH_BETA, targets
from trainers.inputs import RunInputs
from trainers.plan import Plan, make_plan
from trainers.requests import check_target, read_prompts, read_target

SHOWN = 200  # characters of names in a line on the screen
SINK = "numbers"  # the folder of --log, beside a data set's adapters
ALL_TERMS = ForgetSettings().terms
TARGETS = ("empty", "opposite", "orthogonal", "text:TEXT", "vector:FILE")

# Each method and the dataclass of its own settings, TRAINER.METHOD.FIELD in capitals; None: it has
# none. `register` enters them.
SETTINGS: dict[str, type | None] = {}


def register(method: type[ForgetTrainer]) -> type[ForgetTrainer]:
    """Enter a method in Dassl's registry of trainers, and its settings in `SETTINGS`."""
    SETTINGS[method.__name__] = vars(method).get("settings_type")
    return TRAINER_REGISTRY.register()(method)


@dataclass(frozen=True)
class Solved(LowRankEdit):
    """What a method found for one request.

    Attributes:
        report: JSON values for the logs; notes: lines for the reader.
        removed: class names that leave the deployed list (`ZeroShot.predict`).
        recipe: what composing needs; None if the edit does not compose.
        curves: what changed from step to step of a descent, for `--log`.
    """

    report: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    removed: tuple[str, ...] = ()
    recipe: Recipe | None = None
    curves: dict[str, Tensor] = field(default_factory=dict)


class AdaptedProjection(nn.Module):
    """CLIP's text projection, frozen, with the low-rank edit of the class in hand beside it."""

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


class ForgetTrainer(RunInputs, SimpleTrainer):
    """Forgets classes of one data set with one backbone and one seed.

    Images never train anything, so there are no training loaders: the feature bundles (made by
    CLIP, cached, or given) are read when the first request is solved, and `train` walks over the
    requests.

    Attributes of a method:
        name: in logs.
        settings_type: dataclass of its own settings; None: it has none.
        targets: where it can send texts; empty: it sends them nowhere.
        retains: groups of names that it retains, each name with weight 1.
        options: keys of FORGET that have an effect on some methods alone, and on this one.
        batch_size: number of requests that are solved together.
    """

    name: str
    settings_type: type | None = None
    targets: tuple[str, ...] = TARGETS
    retains: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    batch_size = 1

    # What is refused before anything is read

    @classmethod
    def preflight(cls, cfg) -> Plan:
        """The plan of a run. Whatever cannot run is refused from names and settings alone; nothing
        is written or encoded."""
        check(cfg)
        require(cfg.LOG)
        cls.check_target(cfg.FORGET.TARGET, cfg.FORGET.BETA)
        cls.check_settings(cfg)
        plan = make_plan(cfg, read_prompts(cfg))
        used = {"PROTECT": bool(plan.protect), "TERMS": set(cfg.FORGET.TERMS) != set(ALL_TERMS)}
        for option in used:
            if used[option] and option not in cls.options:
                raise ProblemError(f"FORGET.{option} has no effect on {cls.__name__}; leave it out")
        return plan

    @classmethod
    def check_target(cls, kind: str, beta: float) -> None:
        """Refuse a target that is none, or that the method cannot use."""
        if cls.targets:
            check_target(kind, beta)
        elif kind:
            raise ProblemError(f"{cls.__name__} has no target; leave FORGET.TARGET empty")
        if kind == "specific" and kind not in cls.targets:
            raise ProblemError(
                f"FORGET.TARGET specific needs the weighted retain set of ForgetExact; "
                f"{cls.__name__} takes {', '.join(cls.targets)}"
            )

    @classmethod
    def check_settings(cls, cfg) -> None:
        """Refuse settings that are impossible together."""

    # Dassl's hooks

    def check_cfg(self, cfg) -> None:
        """Make the plan; called before anything is built."""
        self.plan = self.preflight(cfg)

    def build_data_loader(self) -> None:
        """Find out which requests are not done yet; read features only if there are some."""
        cfg, plan = self.cfg, self.plan
        for name, reason in plan.absent.items():
            logger.info(f"not evaluated: {name} ({reason})")
        self.train_loader_x = self.train_loader_u = self.val_loader = self.test_loader = None
        self.num_classes = len(plan.classnames)
        self.num_source_domains = 0
        self.lab2cname = dict(enumerate(plan.classnames))
        self.results = Results(cfg.OUTPUT_DIR)
        identity = {"trainer": cfg.TRAINER.NAME, "backbone": cfg.MODEL.BACKBONE.NAME}
        self.results.check(plan.dataset, identity)  # before weights are looked for
        self.run_settings = {"trainer": cfg.TRAINER.NAME, "seed": cfg.SEED} | self.model_settings()
        self.results.check(plan.dataset, self.run_settings)
        self.pending = self._pending()

    def build_model(self) -> None:
        """The text projection with an edit: all of CLIP that forgetting changes."""
        self.model = None
        if not self.pending:
            return
        bundle = self.bundle
        self.model = AdaptedProjection(bundle.text_projection, bundle.text_bias).to(self.device)
        self.register_model("text_projection", self.model)
        logger.info(
            f"{bundle.dataset}: {len(bundle.classnames)} classes, {len(bundle.labels)} images, "
            f"{len(bundle.retain_names)} retained names, projection "
            f"{tuple(bundle.text_projection.shape)}, solving on {self.device}"
        )

    def test(self, split: str | None = None) -> float | None:
        """Zero-shot accuracy of the set with the projection as it is."""
        own = self.accuracies.own
        return accuracy(own.correct_before if self.model is None else own.correct([self.model])[0])

    @cached_property
    def projection_sha256(self) -> str:
        return projection_sha256(self.bundle.text_projection)

    @cached_property
    def settings(self) -> Any:
        """The method's own settings."""
        node = self.cfg.TRAINER.get(type(self).__name__.upper(), {})
        return self.settings_type(**{key.lower(): value for key, value in node.items()})

    @cached_property
    def retain(self) -> RetainSet:
        """The names that may be retained, the same for all requests."""
        retain = self.retained_names()
        counts = [
            f"{count} {group} (each text weighs {retain.weights[group] / count:.3g})"
            for group, count in retain.counts.items()
        ]
        logger.info(f"retained: {', '.join(counts) or 'nothing'}")
        return retain

    def retained_names(self) -> RetainSet:
        """The names of the groups that the method retains."""
        others, similarity = list(self.others.values()), float(self.cfg.FORGET.SIMILARITY)
        weights = dict.fromkeys(self.retains)
        return retain_set(self.bundle, others, weights, similarity, self.device)

    # Settings, by which results are known

    def chosen_settings(self, classes: Sequence[str]) -> dict[str, Any]:
        """The settings that were chosen for a request, JSON values, known before anything is
        encoded. What a method computes from them is in its report."""
        forget, kind = self.cfg.FORGET, self.cfg.FORGET.TARGET
        chosen: dict[str, Any] = {"target": kind} if kind else {}
        if kind == "empty":
            chosen["noise_std"] = float(forget.NOISE_STD)
        if kind in WITH_BETA:
            chosen["beta"] = float(forget.BETA)
        own = {datasets.key(name) for name in classes}
        prompts = {name: x for name, x in self.plan.prompts.items() if datasets.key(name) in own}
        if prompts:
            chosen["prompts"] = prompts
        if self.plan.protect:
            chosen["protect"] = self.plan.protect
        if self.retains:
            chosen["similarity"] = float(forget.SIMILARITY)
            if "vocabulary" in self.retains:
                chosen["vocabulary_sha256"] = self.plan.vocabulary_sha256
            if "others" in self.retains:
                chosen["other_sets"] = self.plan.others
        return chosen | self.method_settings()

    def method_settings(self) -> dict[str, Any]:
        """The settings of the method alone."""
        return asdict(self.settings) if self.settings_type else {}

    def _pending(self) -> list[list[str]]:
        """The requests that are not done yet."""
        forget, dataset, done, pending = self.cfg.FORGET, self.plan.dataset, [], []
        for classes in self.plan.requests:
            label, chosen = join_label(classes), self.chosen_settings(classes)
            if not forget.OVERWRITE and self.results.is_done(
                dataset, label, chosen, forget.SAVE_MODEL
            ):
                done.append(label)
            else:
                pending.append(classes)
        if done:
            names = shorten(", ".join(done), SHOWN, placeholder=" ...")
            total = len(self.plan.requests)
            logger.info(f"done before, skipped: {dataset}, {len(done)} of {total} ({names})")
        return pending

    # The walk

    def train(self) -> None:
        """Forget every request of the plan that is not done yet, each from the original model.

        Each adapter is written as soon as it is evaluated: a killed run loses the requests that
        are solved together at that moment.
        """
        dataset, pending = self.plan.dataset, self.pending
        remove_stale(self.results.folder)
        self.results.compile()
        self.bar = progress(desc=dataset, total=len(pending))
        self.sink = Sink(self.cfg.LOG, self.results.folder / place(dataset) / SINK)
        try:
            with self.sink, self.bar:
                for start in range(0, len(pending), self.batch_size):
                    self.forget(pending[start : start + self.batch_size])
        except BaseException:  # what is done is done, also on Ctrl-C
            with suppress(Exception):
                self.results.compile()
            raise
        self.results.compile()
        for line in next_commands(self.results.folder, self.run_settings, self.cfg):
            logger.info(line)

    def forget(self, block: list[list[str]]) -> None:
        """Solve a block of requests together, evaluate the answers, and write an adapter of
        each."""
        requests = self.read(Batch([self.texts.request(classes) for classes in block]))
        started = time.perf_counter()
        with one_thread():
            answers = self.solve(requests)
            seconds = (time.perf_counter() - started) / len(block)
            accuracies = self.evaluate(block, answers)
        self.model.left, self.model.right = answers[-1].left, answers[-1].right
        for classes, answer, after in zip(block, answers, accuracies, strict=True):
            entry = self.to_entry(classes, answer, after, seconds)
            self.write(self.to_adapter(classes, answer, entry))
            self.show(join_label(classes), answer, entry)
            self.bar.update()

    def read(self, requests: Batch) -> Batch:
        """The requests with what a solve needs beside their texts, so that encoding is not timed as
        solving; nothing by default."""
        return requests

    def solve(self, requests: Batch) -> list[Solved]:
        """Forget each request from the original model. A method that has nothing to share between
        requests overrides `solve_one` instead."""
        return [self.solve_one(request) for request in requests]

    def solve_one(self, request: Request) -> Solved:
        """Forget one request from the original model."""
        raise NotImplementedError(f"{type(self).__name__} must override solve or solve_one")

    def targets_without_bias(self, requests: Batch) -> tuple[Tensor, list[int]]:
        """Where the texts are sent, (K, d), less the model's bias, which no edit moves; and how
        often noise was drawn for each request."""
        forget, bias = self.cfg.FORGET, self.bundle.text_bias
        kind = read_target(forget.TARGET, self.bundle.text_projection.shape[1])
        text, noise_std = self.texts.target_text(kind), float(forget.NOISE_STD)
        inputs = target_inputs(self.bundle, noise_std=noise_std, text=text)
        target, draws = targets(kind, requests, inputs, float(forget.BETA))
        return target if bias is None else target - bias.to(target), draws

    def evaluate(self, block: list[list[str]], answers: Sequence[Solved]) -> list[dict[str, Any]]:
        """The accuracies after each answer; ProblemError for one that is not finite."""
        for classes, answer in zip(block, answers, strict=True):
            if not (torch.isfinite(answer.left).all() and torch.isfinite(answer.right).all()):
                raise ProblemError(
                    f"the change for {join_label(classes)!r} of {self.plan.dataset} is not finite: "
                    "a weight, ridge or beta is out of range; nothing was saved for it"
                )
        return self.accuracies.after(block, answers, [answer.removed for answer in answers])

    # What is kept of a request

    def to_entry(
        self, classes: list[str], answer: Solved, after: dict[str, Any], seconds: float
    ) -> dict[str, Any]:
        """The entry of logs.json, but for the adapter's place."""
        solver = {
            "name": self.name,
            "settings": self.chosen_settings(classes),
            **finite(answer.report),
            "device": str(self.device),
            "seconds": seconds,
        }
        if answer.removed:
            solver["removed_names"] = list(answer.removed)
        if self.cfg.FORGET.SAVE_MODEL:
            adapter_path = self.results.path(self.plan.dataset, join_label(classes))
            solver["model"] = str(model_files(adapter_path)[0].relative_to(self.results.folder))
        before = self.accuracies.before(classes)
        return {"final_results": after, "zero_shot": before, "solver": solver}

    def to_adapter(self, classes: list[str], answer: Solved, entry: dict[str, Any]) -> Adapter:
        """The adapter of a request, with its log entry."""
        settings, names = self.run_settings, self.plan.classnames
        return Adapter(
            answer.left.cpu(),
            answer.right.cpu(),
            projection_sha256=self.projection_sha256,
            classes=classes,
            dataset=self.plan.dataset,
            record=entry | {"indices": [names.index(name) for name in classes]},
            **{key: settings[key] for key in ("backbone", "weights", "trainer")},
            settings=settings,
            recipe=answer.recipe,
            model=self.bundle.identity,
        )

    def write(self, adapter: Adapter) -> None:
        """Write the full model, if it is wanted, and then the adapter, which says that it is
        done."""
        forget, label = self.cfg.FORGET, join_label(adapter.classes)
        path = self.results.path(adapter.dataset, label)
        replaced = self.results.record(adapter.dataset, label)
        if forget.SAVE_MODEL or (replaced and "model" in replaced.entry["solver"]):
            for file in model_files(path):  # of the adapter that is replaced
                file.unlink(missing_ok=True)
        if forget.SAVE_MODEL:
            save_full_model(self.source, adapter, model_files(path)[0])
        settings = None if forget.OVERWRITE else adapter.solver["settings"]
        self.results.add(adapter_bytes(adapter), adapter.dataset, label, settings)

    def show(self, label: str, answer: Solved, entry: dict[str, Any]) -> None:
        """Say what became of a request, on the screen and to `--log`."""
        dataset, seconds = self.plan.dataset, entry["solver"]["seconds"]
        before, after = (entry[side][dataset] for side in ("zero_shot", "final_results"))
        lines = [f"  {line}" for line in [*answer.notes, *outcomes(before, after)]]
        logger.info("\n".join([f"{dataset} / {label} ({seconds:.3f} s)", *lines]))
        if self.cfg.LOG:
            step = [join_label(classes) for classes in self.plan.requests].index(label)
            self.sink.row(label, numbers_of(rows_of({dataset: {label: entry}})), step)
            for name, values in answer.curves.items():
                self.sink.curve(f"{name}/{label}", values)

    def audit(self) -> None:
        """Measure what is left of the classes of this run: audit.json beside the logs."""
        from evaluation.audit.inputs import Inputs
        from evaluation.audit.run import audit_dataset  # scikit-learn: only where it is used
        from evaluation.tables import report_audit

        folder, dataset = self.results.folder, self.plan.dataset
        inputs = Inputs(self.bundle, self.others, self.texts.encode)
        labels = [join_label(classes) for classes in self.plan.requests]
        audit_dataset(folder, read_logs(folder), dataset, labels, inputs, self.cfg.SEED)
        report_audit(folder, [dataset])


def outcomes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What became of each class of a request, and of the rest of its set."""

    def percent(fraction: float | None) -> str:
        return "no images" if fraction is None else f"{fraction:.1%}"

    for name, was in before.items():
        sides = [
            f"{what} {percent(was[key])} -> {percent(after[name][key])}"
            for what, key in (("forgotten", "cls_acc_test"), ("rest", "no_cls_acc"))
        ]
        yield f"{name}: {', '.join(sides)}"
        if fate(was["cls_acc_test"], after[name]["cls_acc_test"]) == Fate.STAYS:
            yield f"{name}: half of its accuracy or more is left: not forgotten"


def numbers_of(rows: Sequence[Any]) -> dict[str, float | None]:
    """The numbers of a request for `--log`, from its rows (one per class)."""
    sides = {"forgotten": [row.own for row in rows], "rest": [rows[0].rest]}
    sides |= {name: [change] for name, change in rows[0].others.items()}
    numbers = {
        f"{name}/{when}": mean(getattr(change, when) for change in changes)
        for name, changes in sides.items()
        for when in ("before", "after")
    }
    solver = rows[0].solver
    numbers |= {f"solver/{key}": x for key, x in solver.items() if isinstance(x, int | float)}
    return numbers | {"solver/gap": rows[0].gap}


def next_commands(folder: Path, settings: dict[str, Any], cfg) -> Iterable[str]:
    """Where the results are, and the lines of Python that load them: of the run, of all seeds."""
    options = f"rn={settings['backbone'].startswith('RN')}, multiclass={cfg.FORGET.MULTICLASS}"
    yield f"results: {folder / 'logs.json'}"
    yield f'from utils import create_results; df, args = create_results("{folder}/", {options})'
    seeds = sorted(str(path.parent) for path in folder.parent.glob("seed_*/logs.json"))
    if folder.name.startswith("seed_") and len(seeds) > 1:
        yield f"all seeds: df, args = create_results({seeds}, {options})"
