"""The walk that every forgetting trainer shares: inputs, one solve a request, evaluation, logs.

A method is one small subclass: its settings, and `solve` from a bundle and class names to factors.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import datasets
from clip.apply import save_full_model
from clip.bundle import FeatureBundle, load_bundle
from clip.features import build_bundle
from clip.source import ClipSource
from engine import SimpleTrainer, UserError
from engine.config import check
from engine.determinism import one_thread, seeded
from evaluation.results import (
    check_folder,
    is_done,
    join_label,
    label_file,
    merge_entry,
    read_logs,
)
from evaluation.zero_shot import evaluate_classes, evaluate_set
from forgetting import Adapter, projection_sha256, save_adapter
from trainers.plan import Plan, check_names, make_plan
from trainers.texts import (
    Request,
    check_prompts,
    check_target,
    make_request,
    make_target,
    read_prompts,
)


@dataclass(frozen=True)
class Solved:
    """What a method found: `Delta = left @ right`, and a report of JSON values for the logs.

    Attributes:
        removed: class names that leave the deployed list (`evaluation.zero_shot.predict`).
    """

    left: Tensor  # (w, r)
    right: Tensor  # (r, d)
    report: dict[str, Any]
    removed: tuple[str, ...] = ()


class AdaptedProjection(nn.Module):
    """CLIP's text projection, frozen, with the low-rank adapter of the class in hand beside it."""

    def __init__(self, projection: Tensor) -> None:
        super().__init__()
        w, d = projection.shape
        self.register_buffer("projection", projection)  # (w, d), never written to
        self.register_buffer("left", projection.new_zeros(w, 0))
        self.register_buffer("right", projection.new_zeros(0, d))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, w) to text embeddings (n, d)."""
        return hidden @ self.projection + (hidden @ self.left) @ self.right


class ForgetTrainer(SimpleTrainer):
    """Forgets the classes of one data set with one backbone and one seed.

    Images never train anything, so there are no training loaders: `build_data_loader` brings the
    feature bundles (made by CLIP, cached, or given), and `train` walks over the classes.
    """

    name: str
    # FORGET.TARGET if it is empty; None for a method that sends texts nowhere.
    default_target: ClassVar[str | None] = "empty"

    @classmethod
    def preflight(cls, cfg) -> Plan:
        """Refuse, from names and settings alone, what cannot run; nothing is written or encoded."""
        check(cfg)
        check_names(cfg)
        cls.check_target(cfg)
        read_prompts(cfg)
        cls.check_settings(cfg)
        plan = make_plan(cfg)
        identity = {"trainer": cfg.TRAINER.NAME, "backbone": cfg.MODEL.BACKBONE.NAME}
        check_folder(cfg.OUTPUT_DIR, plan.dataset, identity)
        return plan

    @classmethod
    def check_settings(cls, cfg) -> None:
        """What ranges of single keys do not say; raises UserError."""

    @classmethod
    def check_target(cls, cfg) -> None:
        """Refuse a target that is none, or that the method has no use for."""
        kind, name = cls.target_kind(cfg), cls.__name__
        if cls.default_target is None and kind:
            raise UserError(f"{name} sends texts nowhere: leave FORGET.TARGET empty, not {kind!r}")
        if cls.default_target is not None:
            check_target(kind, cfg.FORGET.BETA)
        if kind == "specific" and cls.default_target != "specific":
            raise UserError(
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
        if cfg.FEATURES.DIR:
            self.source = None

            def load(name: str) -> FeatureBundle:
                return load_bundle(cfg.FEATURES.DIR, backbone, name)
        else:
            self.source = ClipSource(
                backbone, cfg.MODEL.INIT_WEIGHTS or None, cfg.FEATURES.CACHE, self.device
            )

            def load(name: str) -> FeatureBundle:
                own = name == cfg.DATASET.NAME
                return build_bundle(
                    name,
                    self.source,
                    cfg.DATASET.ROOT,
                    cfg.FEATURES.CACHE,
                    template=(cfg.DATASET.TEMPLATE or None) if own else None,
                    batch_size=cfg.DATALOADER.TEST.BATCH_SIZE,
                    workers=cfg.DATALOADER.NUM_WORKERS,
                )

        for name, reason in self.plan.absent.items():
            print(f"not evaluated: {name} ({reason})")
        self.bundle = load(self.plan.dataset)
        check_prompts(self.prompts, self.bundle)
        self.others = {name: load(name) for name in self.plan.others}
        self.train_loader_x = self.train_loader_u = self.val_loader = self.test_loader = None
        self.num_classes = len(self.bundle.classnames)
        self.num_source_domains = 0
        self.lab2cname = dict(enumerate(self.bundle.classnames))

    def build_model(self) -> None:
        """The text projection with an adapter: all of CLIP that forgetting changes."""
        self.model = AdaptedProjection(self.bundle.text_projection.to(self.device))
        self.register_model("text_projection", self.model)
        bundle = self.bundle
        print(
            f"{bundle.dataset}: {len(bundle.classnames)} classes, {len(bundle.labels)} images, "
            f"{len(bundle.retain_names)} retained names, projection "
            f"{tuple(bundle.text_projection.shape)}, solving on {self.device} in float32"
        )

    def solver_settings(self) -> dict[str, Any]:
        """The constants that make two solves the same, JSON values only; kept in the logs."""
        raise NotImplementedError(f"{type(self).__name__} must say what its solver depends on")

    def with_recipe(self, adapter: Adapter) -> Adapter:
        """The adapter with what composing needs, for methods whose answers compose."""
        return adapter

    def solve(self, classes: list[str], generator: torch.Generator) -> Solved:
        """Forget `classes` at once, from the original model."""
        raise NotImplementedError(f"{type(self).__name__} must solve")

    def run_settings(self) -> dict[str, Any]:
        """What all results of one data set in one folder must share."""
        return {
            "trainer": self.cfg.TRAINER.NAME,
            "backbone": self.bundle.backbone,
            "weights": self.bundle.weights,
            "template": self.bundle.template,
            "split": self.bundle.split,
            "seed": self.cfg.SEED,
        }

    def train(self) -> None:
        """Forget every request of the plan that is not done yet, each from the original model."""
        folder = Path(self.cfg.OUTPUT_DIR)
        settings, solver_settings = self.run_settings(), self.solver_settings()
        logs = check_folder(folder, self.plan.dataset, settings)
        pending = []
        for classes in self.plan.requests:
            label = join_label(classes)
            if not self.cfg.FORGET.OVERWRITE and is_done(
                logs, self.plan.dataset, label, solver_settings
            ):
                print(f"done before, skipped: {self.plan.dataset} / {label}")
            else:
                pending.append(classes)
        for classes in pending:
            self.forget(classes, folder, settings, solver_settings)

    def forget(
        self,
        classes: list[str],
        folder: Path,
        settings: dict[str, Any],
        solver_settings: dict[str, Any],
    ) -> None:
        """One request: solve, evaluate before and after, write the adapter, merge the logs.

        The logs come last: a run killed on the way counts the classes as not done.
        """
        dataset, label = self.plan.dataset, join_label(classes)
        print(f"forgetting {dataset} / {label}")
        started = time.perf_counter()
        with one_thread():
            solved = self.solve(classes, self._generator(label))
        seconds = time.perf_counter() - started
        if not (torch.isfinite(solved.left).all() and torch.isfinite(solved.right).all()):
            raise UserError(
                f"the change for {label!r} of {dataset} is not finite: a weight, ridge or beta is "
                "out of range; nothing was saved for it"
            )
        self.model.left, self.model.right = solved.left, solved.right
        factors = (solved.left.cpu(), solved.right.cpu())
        report = {
            "name": self.name,
            "settings": solver_settings,
            **_finite(solved.report),
            **({"removed_names": list(solved.removed)} if solved.removed else {}),
            "seconds": seconds,
            "device": str(self.device),
        }
        path = folder / dataset / f"{label_file(label)}.safetensors"
        adapter = Adapter(
            left=factors[0],
            right=factors[1],
            projection_sha256=projection_sha256(self.bundle.text_projection),
            classes=classes,
            dataset=dataset,
            solver=report,
            **{key: settings[key] for key in ("backbone", "weights", "trainer")},
            settings=settings,
        )
        save_adapter(self.with_recipe(adapter), path)
        report["adapter"] = str(path.relative_to(folder))
        model_path = path.with_suffix(".pt")
        if model_path.exists():  # of the adapter that --overwrite just replaced
            model_path.unlink()
            print(f"  removed {model_path}: it belonged to the adapter that was replaced")
        if self.cfg.FORGET.SAVE_MODEL:
            save_full_model(self.source, adapter.delta(), model_path)
        entry = {
            "final_results": self._accuracies(classes, factors, solved.removed),
            "zero_shot": self._accuracies(classes, None),
            "solver": report,
        }
        merge_entry(folder, dataset, settings, label, entry)
        self._print_entry(entry, classes, seconds)

    def test(self, split: str | None = None) -> float | None:
        """Zero-shot accuracy of the set as the projection stands; Dassl's entry point."""
        return evaluate_set(self.bundle, (self.model.left.cpu(), self.model.right.cpu()))

    def audit(self) -> None:
        """Measure what is left of the classes of this run: audit.json beside the logs."""
        from evaluation.audit.inputs import Inputs, encoder  # scikit-learn: only where it is used
        from evaluation.audit.run import audit_dataset
        from evaluation.audit.table import report_table

        folder, dataset = Path(self.cfg.OUTPUT_DIR), self.plan.dataset
        inputs = Inputs(self.bundle, self.others, encoder(self.source, self.cfg.FEATURES.CACHE))
        labels = [join_label(classes) for classes in self.plan.requests]
        audit_dataset(folder, read_logs(folder), dataset, labels, inputs, self.cfg.SEED)
        report_table(folder, [dataset])

    def retained(self, classes: list[str]) -> tuple[Tensor, list[str]]:
        """Hidden states (m, w) of the vocabulary less what is to be forgotten, and what left it.

        A name leaves if it is a forgotten class's name or is marked as its synonym.
        """
        leaving = datasets.same_meaning(classes, self.plan.dataset)
        names = self.bundle.retain_names
        stay = torch.tensor([datasets.key(name) not in leaving for name in names], dtype=torch.bool)
        dropped = [name for name in names if datasets.key(name) in leaving]
        return self.bundle.retain_hidden[stay].to(self.device), dropped

    def text_settings(self) -> dict[str, Any]:
        """What the texts and targets of a request depend on, for `solver_settings`."""
        kind = self.target_kind(self.cfg)
        settings: dict[str, Any] = {"target": kind} if kind else {}
        if kind == "empty":
            settings["noise_std"] = float(self.cfg.FORGET.NOISE_STD)
        if kind in ("opposite", "specific"):
            settings["beta"] = float(self.cfg.FORGET.BETA)
        if self.prompts:
            settings["prompts"] = self.prompts
        return settings

    def request(self, classes: list[str]) -> Request:
        """The texts that stand for `classes`."""
        return make_request(self.cfg, self.bundle, self.source, classes, self.prompts)

    def target(self, request: Request, generator: torch.Generator) -> tuple[Tensor, int]:
        """Where they are sent: (k, d), and how often noise was drawn for it."""
        kind = self.target_kind(self.cfg)
        return make_target(self.cfg, kind, self.bundle, self.source, request, generator)

    @classmethod
    def target_kind(cls, cfg) -> str:
        """`FORGET.TARGET`, or what the method takes if it is empty; "" if it takes none."""
        return cfg.FORGET.TARGET or cls.default_target or ""

    def _generator(self, label: str) -> torch.Generator:
        """Random numbers of one request: the same in a resumed run, whatever ran before."""
        return seeded(self.cfg.SEED, self.plan.dataset, label)

    def _accuracies(
        self,
        classes: list[str],
        factors: tuple[Tensor, Tensor] | None,
        removed: tuple[str, ...] = (),
    ) -> dict:
        """One side of a log entry: the set's own classes, then every other set."""
        own = {self.plan.dataset: evaluate_classes(self.bundle, classes, factors, removed)}
        return own | {
            name: {"all": {"all_ds": evaluate_set(bundle, factors)}}
            for name, bundle in self.others.items()
        }

    def _print_entry(self, entry: dict[str, Any], classes: list[str], seconds: float) -> None:
        before, after = (entry[side][self.plan.dataset] for side in ("zero_shot", "final_results"))
        for name in classes:
            shown = ", ".join(
                f"{what} {_percent(before[name][key])} -> {_percent(after[name][key])}"
                for what, key in (("forgotten", "cls_acc_test"), ("rest", "no_cls_acc"))
            )
            print(f"  {name}: {shown} ({seconds:.2f} s)")
            left, had = after[name]["cls_acc_test"], before[name]["cls_acc_test"]
            if left and left > had / 2:
                print(f"  {name}: more than half of its accuracy is left: not forgotten")


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for (an unreachable threshold)."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _percent(fraction: float | None) -> str:
    return "no images" if fraction is None else f"{fraction:.1%}"
