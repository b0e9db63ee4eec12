"""What every room stands on: settings, command lines, errors, files, the log, and Dassl.

Nobody else imports `dassl`: where it is installed, `SimpleTrainer`, the two registries and
`get_cfg_default` are its own, else `engine.dassl` has small equivalents. These names are resolved
when they are first asked for.
"""

from __future__ import annotations

from typing import Any

from yacs.config import CfgNode

from engine.files import atomic_path, inside, lock, write_json_atomic

OF_DASSL = ("DATASET_REGISTRY", "TRAINER_REGISTRY", "SimpleTrainer", "get_cfg_default")

__all__ = [
    "atomic_path",
    "engine_description",
    "extend_cfg",
    "inside",
    "lock",
    "write_json_atomic",
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
    """Resolve a name that is Dassl's; ProblemError if the engine that was asked for cannot be had."""
    if name not in OF_DASSL:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    from engine.dassl import choose

    return getattr(choose(), name)
