"""The harness, and Dassl where it is installed, else the slice of it that is called here.

Trainers are Dassl's SimpleTrainers, data sets and trainers stand in its registries, and settings
are added to its config. `CLIP_FORGET_ENGINE=dassl|builtin` forces one.
"""

import logging
import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from yacs.config import CfgNode

from forgetting.errors import reason, unknown

OF_DASSL = ("DATASET_REGISTRY", "TRAINER_REGISTRY", "SimpleTrainer", "get_cfg_default")
VARIABLE = "CLIP_FORGET_ENGINE"
ENGINES = ("dassl", "builtin")


def __getattr__(name: str) -> Any:
    if name not in OF_DASSL:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(choose(), name)


@cache
def choose() -> SimpleNamespace:
    """The engine of this process: `description`, a line for the log, and the names of `OF_DASSL`.
    SystemExit if it cannot be had: modules use it while they are imported, before any `main`."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in ENGINES:
        raise SystemExit(f"error: {VARIABLE}: {unknown('engine', wanted, ENGINES)}")
    why = f"{VARIABLE}=builtin"
    if wanted != "builtin":
        try:
            return _dassl()
        except Exception as error:  # its pinned requirements of 2019 fail in many ways
            why = f"Dassl does not import ({reason(error)})"
        spec = find_spec("dassl")
        if spec is None or spec.origin is None:  # or a folder of that name
            why = "Dassl is not installed"
        if wanted == "dassl":
            raise SystemExit(f"error: {VARIABLE}=dassl, but {why}; put Dassl on PYTHONPATH")
    builtin = dict(zip(OF_DASSL, (Registry(), Registry(), SimpleTrainer, CfgNode), strict=True))
    return SimpleNamespace(description=f"engine: builtin ({why})", **builtin)


def _dassl() -> SimpleNamespace:
    dassl, engine = import_module("dassl"), import_module("dassl.engine")
    logging.disable(logging.NOTSET)  # one of its data sets silences every logger on import
    return SimpleNamespace(
        description=f"engine: Dassl {dassl.__version__} ({os.path.dirname(dassl.__file__)})",
        DATASET_REGISTRY=import_module("dassl.data.datasets").DATASET_REGISTRY,
        TRAINER_REGISTRY=engine.TRAINER_REGISTRY,
        SimpleTrainer=engine.SimpleTrainer,
        get_cfg_default=import_module("dassl.config").get_cfg_default,
    )


class Registry(dict[str, type]):
    """Classes by their names."""

    def register(self, force: bool = False) -> Any:
        """A decorator that registers a class; in Dassl's only `force` replaces one of that name."""

        def add(thing: type) -> type:
            self[thing.__name__] = thing
            return thing

        return add


class SimpleTrainer:
    """Checks the config, then builds data and model, in Dassl's order."""

    def __init__(self, cfg: CfgNode) -> None:
        import torch  # reading settings needs none of it

        self.check_cfg(cfg)
        self.device = torch.device("cuda" if torch.cuda.is_available() and cfg.USE_CUDA else "cpu")
        self.cfg = cfg
        self.build_data_loader()
        self.build_model()
