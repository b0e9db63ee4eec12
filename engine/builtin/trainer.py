"""`SimpleTrainer`: what a trainer of this repository needs of Dassl's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from yacs.config import CfgNode

import engine.builtin.evaluator  # noqa: F401  registers Classification
from engine.builtin.registry import build_evaluator


class SimpleTrainer:
    """Checks the config, builds data, model and evaluator, in Dassl's order; `test` evaluates.

    A trainer overrides `build_model` (and registers what it builds) and `train`, and may override
    `check_cfg`, `build_data_loader`, `model_inference` and `parse_batch_test`. Dassl's epochs,
    schedules and checkpoints are not here: nothing in this repository trains by epochs.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self._models: dict[str, nn.Module] = {}
        self._optims: dict[str, torch.optim.Optimizer | None] = {}
        self._scheds: dict[str, Any] = {}
        self.check_cfg(cfg)
        self.device = torch.device("cuda" if torch.cuda.is_available() and cfg.USE_CUDA else "cpu")
        self.cfg = cfg
        self.output_dir = cfg.OUTPUT_DIR
        self.start_epoch = self.epoch = 0
        self.max_epoch = cfg.OPTIM.MAX_EPOCH
        self.build_data_loader()
        self.build_model()
        self.evaluator = build_evaluator(cfg, lab2cname=self.lab2cname)

    def check_cfg(self, cfg: CfgNode) -> None:
        """Refuse a config that this trainer cannot run with; by default none is."""

    def build_data_loader(self) -> None:
        """Set the loaders, `num_classes`, `num_source_domains` and `lab2cname`."""
        from engine.builtin.loader import DataManager  # torchvision: only if it is needed

        self.dm = DataManager(self.cfg)
        self.train_loader_x = self.dm.train_loader_x
        self.train_loader_u = self.dm.train_loader_u
        self.val_loader = self.dm.val_loader
        self.test_loader = self.dm.test_loader
        self.num_classes = self.dm.num_classes
        self.num_source_domains = self.dm.num_source_domains
        self.lab2cname = self.dm.lab2cname

    def build_model(self) -> None:
        """Build what this trainer trains and `register_model` it."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its model is built")

    def train(self) -> None:
        """Do the work of this trainer."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it trains")

    def register_model(
        self,
        name: str = "model",
        model: nn.Module | None = None,
        optim: torch.optim.Optimizer | None = None,
        sched: Any = None,
    ) -> None:
        """Make a model, its optimiser and schedule known by `name`, which must be new."""
        assert name not in self._models, f"model {name!r} is registered already"
        self._models[name] = model
        self._optims[name] = optim
        self._scheds[name] = sched

    def get_model_names(self, names: str | list[str] | None = None) -> list[str]:
        """The registered names, or `names` as a list after a check."""
        if names is None:
            return list(self._models)
        names = names if isinstance(names, list) else [names]
        assert set(names) <= set(self._models), f"{names}: only {list(self._models)} registered"
        return names

    def set_model_mode(self, mode: str = "train", names: str | list[str] | None = None) -> None:
        """Put models into "train", or into "test" or "eval" mode."""
        if mode not in ("train", "test", "eval"):
            raise KeyError(mode)
        for name in self.get_model_names(names):
            self._models[name].train(mode == "train")

    @torch.no_grad()
    def test(self, split: str | None = None) -> float:
        """Evaluate on "test", or on "val" if there is one; returns the accuracy in percent."""
        self.set_model_mode("eval")
        self.evaluator.reset()
        split = split or self.cfg.TEST.SPLIT
        if split != "val" or self.val_loader is None:
            split = "test"
        print(f"Evaluate on the *{split}* set")
        for batch in tqdm(self.val_loader if split == "val" else self.test_loader):
            images, labels = self.parse_batch_test(batch)
            self.evaluator.process(self.model_inference(images), labels)
        return next(iter(self.evaluator.evaluate().values()))

    def model_inference(self, input: Tensor) -> Tensor:
        """Logits (b, num_classes) of a batch of images."""
        return self.model(input)

    def parse_batch_test(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Images and labels of a batch, on the device."""
        return batch["img"].to(self.device), batch["label"].to(self.device)
