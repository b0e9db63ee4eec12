"""The slice of Dassl's API that this repository uses, from Dassl where it is installed.

Two engines offer the same names, signatures and config keys: Dassl's own objects
(`engine.on_dassl`) and a small equivalent that needs nothing beyond `requirements.txt`
(`engine.builtin`). Every other room imports from `engine`, never from `dassl`.

`CLIP_FORGET_ENGINE=dassl|builtin` forces one; unset, Dassl runs if it imports. The choice is made
once a process, when the first name that depends on it is asked for. That is why `engine.errors`
and `engine.files` can be imported by a program that still has to report a wrong choice.

What depends on the choice (module attributes, resolved on first use, and `engine_description()`):
    ENGINE, Registry, TRAINER_REGISTRY, build_trainer, DATASET_REGISTRY,
    build_dataset, Datum, DatasetBase, DatasetWrapper, DataManager, build_data_loader,
    build_transform, SimpleTrainer, get_cfg_default, setup_logger, set_random_seed,
    collect_env_info, read_json, write_json, mkdir_if_missing, read_image
"""

from __future__ import annotations

from typing import Any

from engine.errors import UserError, nearest, unknown
from engine.files import (
    atomic_path,
    escape,
    inside,
    lock,
    sha256_file,
    unescape,
    write_json_atomic,
)

ENGINE_NAMES = (
    "DATASET_REGISTRY",
    "TRAINER_REGISTRY",
    "DataManager",
    "DatasetBase",
    "DatasetWrapper",
    "Datum",
    "Registry",
    "SimpleTrainer",
    "build_data_loader",
    "build_dataset",
    "build_trainer",
    "build_transform",
    "collect_env_info",
    "get_cfg_default",
    "mkdir_if_missing",
    "read_image",
    "read_json",
    "set_random_seed",
    "setup_logger",
    "write_json",
)

__all__ = [
    "ENGINE",
    "UserError",
    "atomic_path",
    "engine_description",
    "escape",
    "inside",
    "lock",
    "nearest",
    "sha256_file",
    "unescape",
    "unknown",
    "write_json_atomic",
    *ENGINE_NAMES,
]


def engine_description() -> str:
    """A line for the log: which engine runs and why; UserError if none can."""
    from engine.choice import choose

    return choose().description


def __getattr__(name: str) -> Any:
    """Resolve a name that depends on the engine; UserError if no engine can be had."""
    from engine.choice import choose

    if name == "ENGINE":
        return choose().name
    if name in ENGINE_NAMES:
        return getattr(choose().module, name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
