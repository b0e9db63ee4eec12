"""What a run reads: the model or bundles of features, and the texts of its classes."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

import datasets
from clip.architectures import identity_sha256
from clip.bundle import FeatureBundle, load_bundles
from clip.cache import FeatureCache
from clip.features import build_bundle
from clip.source import ClipSource
from evaluation.zero_shot import Evaluator
from forgetting.errors import unknown
from trainers.plan import Plan
from trainers.requests import Texts, check_prompts


class RunInputs:
    """The inputs of a trainer, each read or encoded when it is first used."""

    cfg: CfgNode
    plan: Plan
    device: torch.device

    @cached_property
    def source(self) -> ClipSource | None:
        """The model; None where bundles of features are given."""
        cfg = self.cfg
        if cfg.FEATURES.DIR:
            return None
        weights, precision = cfg.MODEL.INIT_WEIGHTS or None, cfg.MODEL.PRECISION
        model = cfg.MODEL.BACKBONE.NAME, weights, cfg.FEATURES.CACHE
        return ClipSource(*model, self.device, precision)

    @cached_property
    def bundles(self) -> dict[str, FeatureBundle]:
        """Features of the set itself and of the sets beside it, by name."""
        cfg, plan = self.cfg, self.plan
        names = [plan.dataset, *plan.others]
        if self.source is None:
            bundles = load_bundles(cfg.FEATURES.DIR, cfg.MODEL.BACKBONE.NAME, names)
        else:
            bundles = {
                name: build_bundle(
                    name,
                    self.source,
                    cfg.DATASET.ROOT,
                    cfg.FEATURES.CACHE,
                    template=(cfg.DATASET.TEMPLATE or None) if name == plan.dataset else None,
                    batch_size=cfg.DATALOADER.TEST.BATCH_SIZE,
                    workers=cfg.DATALOADER.NUM_WORKERS,
                    own=cfg.DATASET.IMAGES if name == plan.dataset else "",
                )
                for name in names
            }
        own = bundles[plan.dataset]
        check_prompts(plan.prompts, own)
        if cfg.FORGET.RETAIN_NAMES:
            hidden = self._hidden_of_names(own, plan.vocabulary)
            own = replace(own, retain_names=plan.vocabulary, retain_hidden=hidden)
        return bundles | {plan.dataset: own}

    def _hidden_of_names(self, bundle: FeatureBundle, names: list[str]) -> Tensor:
        """Hidden states (n, w) of names: encoded, or without a model those of the bundle."""
        if self.source is not None:
            return FeatureCache(self.source, self.cfg.FEATURES.CACHE).texts(names)
        known = [*bundle.classnames, *bundle.retain_names]
        rows = torch.cat([bundle.forget_hidden, bundle.retain_hidden])
        row_of = {datasets.key(name): row for name, row in zip(known, rows, strict=True)}
        for name in names:
            if datasets.key(name) not in row_of:
                raise unknown("name to retain (--features has no model to encode it)", name, known)
        return torch.stack([row_of[datasets.key(name)] for name in names])

    @property
    def bundle(self) -> FeatureBundle:
        return self.bundles[self.plan.dataset]

    @property
    def others(self) -> dict[str, FeatureBundle]:
        return {name: self.bundles[name] for name in self.plan.others}

    @cached_property
    def texts(self) -> Texts:
        encode = self.source and FeatureCache(self.source, self.cfg.FEATURES.CACHE).texts
        return Texts(self.bundle, encode, self.plan.prompts, self.cfg.SEED)

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
