"""The engine where Dassl is not installed: small equivalents of what this repository uses of it.

Names, signatures, config keys and the keys of a batch are Dassl's (version 0.6.3), so that
trainers and data sets run unchanged under either. What is left out says so when it is asked for.
"""

# ruff: noqa: F401  (its imports are what this module offers; `engine.ENGINE_NAMES` lists them)
from __future__ import annotations

from engine.builtin.config import get_cfg_default
from engine.builtin.dataset import DatasetBase
from engine.builtin.loader import DataManager, DatasetWrapper, build_data_loader
from engine.builtin.registry import (
    DATASET_REGISTRY,
    TRAINER_REGISTRY,
    Registry,
    build_dataset,
    build_trainer,
)
from engine.builtin.tools import (
    collect_env_info,
    mkdir_if_missing,
    read_image,
    read_json,
    set_random_seed,
    write_json,
)
from engine.builtin.trainer import SimpleTrainer
from engine.builtin.transforms import build_transform
from engine.log import setup_logger
from engine.splits import Datum
