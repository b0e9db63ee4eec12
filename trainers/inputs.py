"""What a run reads: a plan from names alone, checked before anything is encoded; then the model or
bundles of features."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from yacs.config import CfgNode

import datasets
from clip.architectures import identity_sha256
from clip.bundle import FeatureBundle, list_bundles, load_bundle, load_bundles
from clip.cache import FeatureCache
from clip.features import build_bundle
from clip.source import ClipSource
from datasets.names import entries
from engine.files import TEXT, check, read_json
from evaluation.results import SETTINGS
from evaluation.zero_shot import Evaluator
from forgetting.errors import ProblemError, reason, shown
from trainers.requests import Encode, Texts

ALL = "all"
LISTS = "forget_cls.py"
PROMPTS = {str: [TEXT, ...]}  # class name -> its texts
LISTS_SHAPE = {
    "all_ds": [TEXT],
    "mini_ds": [TEXT],
    "forget_classes_all": {str: [TEXT]},
    "forget_prompts?": {str: PROMPTS},
    "protect?": [TEXT],
}


@dataclass(frozen=True)
class Plan:
    """One data set's run.

    Attributes:
        requests: lists of class names; each is forgotten at once, from the original model.
        others: the other sets to evaluate on; absent: sets of the group that cannot be, and why.
        protect: names that must not be harmed.
        prompts: class name -> texts by which it is forgotten, in place of its bare name.
        vocabulary: names to retain beside the classes.
    """

    dataset: str
    classnames: list[str]
    requests: list[list[str]]
    others: list[str]
    absent: dict[str, str]
    protect: list[str]
    prompts: dict[str, list[str]]
    vocabulary: list[str]

    @cached_property
    def vocabulary_sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.vocabulary).encode()).hexdigest()[:16]


def make_plan(cfg: CfgNode) -> Plan:
    """Check the names of a config and list the work; ProblemError for one that is not there."""
    dataset, backbone, forget = cfg.DATASET.NAME, cfg.MODEL.BACKBONE.NAME, cfg.FORGET
    lists = user_lists()
    absent: dict[str, str] = {}
    if cfg.FEATURES.DIR:
        model_options = forget.SAVE_MODEL, cfg.MODEL.INIT_WEIGHTS, cfg.DATASET.IMAGES
        if any(model_options) or cfg.MODEL.PRECISION != "fp32":
            raise ProblemError(
                "--images, --save-model, --weights and --precision need a model, and --features "
                "runs without one; leave them out, or use `python -m clip.apply` afterwards"
            )
        bundle = load_bundle(cfg.FEATURES.DIR, backbone, dataset)
        classnames, vocabulary = bundle.classnames, bundle.retain_names
        others = [name for name in list_bundles(cfg.FEATURES.DIR, backbone) if name != dataset]
    else:
        classnames = datasets.load(dataset, cfg.DATASET.ROOT, cfg.DATASET.IMAGES).classnames
        vocabulary = datasets.retain_vocabulary(dataset)
        group = lists.mini_ds if dataset in lists.mini_ds else lists.all_ds
        states = datasets.available(cfg.DATASET.ROOT)
        wanted = [datasets.spec(name).name for name in group if name != dataset]
        others = [name for name in wanted if states[name] is None]
        if dataset in group:  # nobody misses them beside a set of one's own
            absent = {name: states[name] for name in wanted if states[name] is not None}
    if forget.RETAIN_NAMES:
        what = "names to retain (FORGET.RETAIN_NAMES)"
        names = [text for _, text in entries(Path(forget.RETAIN_NAMES), what)]
        vocabulary = list({datasets.key(n): datasets.clean_name(n) for n in names}.values())
        if not vocabulary:
            raise ProblemError(f"{what}: {forget.RETAIN_NAMES} holds no name")
    classes = _classes(cfg, classnames, lists.forget_classes_all.get(dataset, []))
    requests = [classes] if forget.MULTICLASS else [[name] for name in classes]
    if forget.PART:
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", forget.PART)
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count:
            raise ProblemError(f"FORGET.PART must be i/n such as 2/4, not {shown(forget.PART)}")
        requests = requests[number - 1 :: count]
    protect = list(dict.fromkeys([*forget.PROTECT, *getattr(lists, "protect", [])]))
    forgotten = {datasets.key(name) for name in classes} if ALL not in forget.CLASSES else set()
    for name in protect:
        if not name.strip():
            raise ProblemError("a name to protect (FORGET.PROTECT) is empty")
        if datasets.key(name) in forgotten:
            raise ProblemError(
                f"{name!r} is to be forgotten and to be protected (FORGET.PROTECT); choose one"
            )
    prompts = _prompts(cfg, classnames, getattr(lists, "forget_prompts", {}).get(dataset, {}))
    return Plan(dataset, classnames, requests, others, absent, protect, prompts, vocabulary)


def _classes(cfg: CfgNode, classnames: list[str], listed: list[str]) -> list[str]:
    """The class names to forget, as the data set spells them."""
    dataset, names = cfg.DATASET.NAME, list(cfg.FORGET.CLASSES) or listed
    if not names:
        raise ProblemError(f"no class of {dataset} to forget: add it to {LISTS} or use --forget")
    if ALL in names and ALL not in classnames:
        if len(names) > 1:
            raise ProblemError(f"--forget {ALL} stands for every class of {dataset}; name no other")
        names = classnames
    classes = list(dict.fromkeys(datasets.match(name, classnames, dataset) for name in names))
    if cfg.FORGET.MULTICLASS and set(classes) == set(classnames):
        raise ProblemError(f"all classes of {dataset} at once leave none to retain")
    if SETTINGS in classes:
        raise ProblemError(f"a class {SETTINGS!r} would hide the settings in logs.json; rename it")
    return classes


def _prompts(
    cfg: CfgNode, classnames: list[str], listed: dict[str, list[str]]
) -> dict[str, list[str]]:
    """The texts by which classes are forgotten: those of the file `FORGET.PROMPTS`, else those that
    forget_cls.py lists."""
    path, prompts = cfg.FORGET.PROMPTS, {}
    if path:
        listed = read_json(path, "file of prompts")
        check(listed, PROMPTS, f"file of prompts {path}")
    for given, texts in listed.items():
        name = datasets.match(given, classnames, f"{cfg.DATASET.NAME} (prompts)")
        if name in prompts:
            raise ProblemError(f"prompts: two entries name {name!r}, one of them {given!r}")
        if not all(text.strip() for text in texts):
            raise ProblemError(f"prompts: a text of {given!r} is empty")
        prompts[name] = texts
    return prompts


def user_lists() -> ModuleType:
    """The lists of forget_cls.py, which users edit by hand; ProblemError if they do not fit."""
    try:
        import forget_cls
    except (Exception, SystemExit) as error:  # it is a program, and may do anything
        hint = "; names of classes need quotes" if isinstance(error, NameError) else ""
        raise ProblemError(f"{LISTS}: {reason(error)}{hint}") from error
    check(vars(forget_cls), LISTS_SHAPE, LISTS)
    return forget_cls


class RunInputs:
    """The inputs of a trainer, each read or encoded when it is first used."""

    cfg: CfgNode
    plan: Plan
    device: torch.device

    @cached_property
    def source(self) -> ClipSource | None:
        """The model; None where bundles of features are given."""
        cfg = self.cfg
        model = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.INIT_WEIGHTS or None, cfg.FEATURES.CACHE
        return None if cfg.FEATURES.DIR else ClipSource(*model, self.device, cfg.MODEL.PRECISION)

    @cached_property
    def encode(self) -> Encode | None:
        """From texts to hidden states; None without a model."""
        return self.source and FeatureCache(self.source).texts

    @cached_property
    def bundles(self) -> dict[str, FeatureBundle]:
        """Features of the set itself and of the sets beside it, by name."""
        cfg, plan, dataset = self.cfg, self.plan, self.plan.dataset
        if self.source is None:
            names = [dataset, *plan.others]
            bundles = load_bundles(cfg.FEATURES.DIR, cfg.MODEL.BACKBONE.NAME, names)
        else:
            where = self.source, cfg.DATASET.ROOT
            how = {"batch_size": cfg.DATALOADER.TEST.BATCH_SIZE}
            how["workers"] = cfg.DATALOADER.NUM_WORKERS
            own = {"template": cfg.DATASET.TEMPLATE or None, "own": cfg.DATASET.IMAGES}
            bundles = {dataset: build_bundle(dataset, *where, **how, **own)}
            bundles |= {name: build_bundle(name, *where, **how) for name in plan.others}
        if cfg.FORGET.RETAIN_NAMES:
            hidden = Texts(bundles[dataset], self.encode).hidden(plan.vocabulary, "name to retain")
            own_names = {"retain_names": plan.vocabulary, "retain_hidden": hidden}
            bundles[dataset] = replace(bundles[dataset], **own_names)
        return bundles

    @property
    def bundle(self) -> FeatureBundle:
        return self.bundles[self.plan.dataset]

    @property
    def others(self) -> dict[str, FeatureBundle]:
        return {name: self.bundles[name] for name in self.plan.others}

    @cached_property
    def texts(self) -> Texts:
        return Texts(self.bundle, self.encode, self.plan.prompts, self.cfg.SEED)

    @cached_property
    def accuracies(self) -> Evaluator:  # SimpleTrainer of Dassl has an `evaluator`
        return Evaluator(self.bundle, self.others)

    def model_settings(self) -> dict[str, Any]:
        """What says which model, prompts and images results are of; nothing is encoded for it."""
        if self.source is None:
            b = self.bundle
            values = b.backbone, b.weights, b.precision, b.template, b.split, b.model
        else:
            s, data = self.source, datasets.spec(self.plan.dataset, self.cfg.DATASET.IMAGES)
            template = self.cfg.DATASET.TEMPLATE or data.template
            identity = identity_sha256(s.architecture)
            values = s.arch, s.weights_sha256, s.precision, template, "test", identity
        keys = ("backbone", "weights", "precision", "template", "split", "model")
        return {key: value for key, value in zip(keys, values, strict=True) if value}
