"""The engine where Dassl is not installed: small equivalents of what this repository uses of it.

Names, signatures, config keys and the keys of a batch are Dassl's (version 0.6.3), so that
trainers and data sets run unchanged under either. What is left out says so when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Where each name lives. Modules are imported when a name of theirs is first used: torchvision and
# scikit-learn, which loaders and evaluators need, take seconds that a run on features can save.
HOMES = {
    "get_cfg_default": "engine.builtin.config",
    "DatasetBase": "engine.builtin.dataset",
    **dict.fromkeys(
        ("DataManager", "DatasetWrapper", "build_data_loader"), "engine.builtin.loader"
    ),
    **dict.fromkeys(
        ("DATASET_REGISTRY", "TRAINER_REGISTRY", "Registry", "build_dataset", "build_trainer"),
        "engine.builtin.registry",
    ),
    **dict.fromkeys(
        (
            *("collect_env_info", "mkdir_if_missing", "read_image", "read_json"),
            *("set_random_seed", "write_json"),
        ),
        "engine.builtin.tools",
    ),
    "SimpleTrainer": "engine.builtin.trainer",
    "build_transform": "engine.builtin.transforms",
    "setup_logger": "engine.log",
    "Datum": "engine.splits",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'engine.builtin' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
