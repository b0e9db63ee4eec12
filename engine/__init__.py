"""The harness: settings, command lines, files, the log, Ray, and Dassl or the slice of it that is
used.

`SimpleTrainer`, the two registries and `get_cfg_default` are Dassl's where Dassl is installed, else
those of `engine.dassl`. They are resolved on first use.
"""

from __future__ import annotations

from typing import Any

from yacs.config import CfgNode

OF_DASSL = ("DATASET_REGISTRY", "TRAINER_REGISTRY", "SimpleTrainer", "get_cfg_default")

__all__ = [
    "engine_description",
    "extend_cfg",
    *OF_DASSL,
]


def extend_cfg(cfg: CfgNode) -> None:
    """Add this project's keys to a config, as CoOp's `train.py` does to Dassl's."""
    from engine.config import extend_cfg

    extend_cfg(cfg)


def engine_description() -> str:
    """A line for the log: which engine runs and why; ProblemError if none can."""
    from engine.dassl import choose

    return choose().description


def __getattr__(name: str) -> Any:
    """Resolve a name that is Dassl's; ProblemError if the wanted engine is missing."""
    if name not in OF_DASSL:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    from engine.dassl import choose

    return getattr(choose(), name)
