"""Dassl where it is installed, else the slice of it that is called here.

Trainers are Dassl's SimpleTrainers in Dassl's registry, data sets are in another one, and settings
are added to Dassl's config. Where Dassl is missing, small equivalents take their place.
`CLIP_FORGET_ENGINE=dassl|builtin` forces one. The choice is made once per process, on first use.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

from yacs.config import CfgNode

from forgetting.errors import ProblemError, reason, unknown

VARIABLE = "CLIP_FORGET_ENGINE"
ENGINES = ("dassl", "builtin")


@cache
def choose() -> SimpleNamespace:
    """The engine of this process: `description`, a line for the log, and the names of
    `engine.OF_DASSL`.

    Raises:
        ProblemError: the variable has another value, or asks for a Dassl that does not import.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in ENGINES:
        raise _refusal(f"{VARIABLE}: {unknown('engine', wanted, ENGINES)}")
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
            raise _refusal(f"{VARIABLE}=dassl, but {why}; put Dassl on PYTHONPATH")
    return SimpleNamespace(
        description=f"engine: builtin ({why})",
        DATASET_REGISTRY=Registry(),
        TRAINER_REGISTRY=Registry(),
        SimpleTrainer=SimpleTrainer,
        get_cfg_default=CfgNode,
    )


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


def _refusal(message: str) -> ProblemError:
    """The error of a choice that cannot be met. It prints as one line where nobody catches it:
    modules use the engine's names while they are imported, before any `main`."""
    default = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, ProblemError):
            print(f"error: {error}", file=sys.stderr)
        else:
            default(kind, error, trace)

    sys.excepthook = show
    return ProblemError(message)


class Registry:
    """Classes by their names."""

    def __init__(self) -> None:
        self._classes: dict[str, type] = {}

    def register(self, force: bool = False) -> Any:
        """A decorator that registers a class; in Dassl's only `force` replaces one of that name."""

        def add(thing: type) -> type:
            self._classes[thing.__name__] = thing
            return thing

        return add

    def get(self, name: str) -> Any:
        """The class of that name; ProblemError with the nearest names if there is none."""
        if name not in self._classes:
            raise unknown("name", name, self._classes)
        return self._classes[name]


class SimpleTrainer:
    """Checks the config, then builds data and model, in Dassl's order.

    A trainer overrides `check_cfg`, `build_data_loader`, `build_model`, `train` and `test`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        import torch  # reading settings needs none of it

        self._models: dict[str, Any] = {}
        self.check_cfg(cfg)
        self.device = torch.device("cuda" if torch.cuda.is_available() and cfg.USE_CUDA else "cpu")
        self.cfg = cfg
        self.build_data_loader()
        self.build_model()

    def register_model(self, name: str, model: Any) -> None:
        """Make a model known by `name`."""
        self._models[name] = model
