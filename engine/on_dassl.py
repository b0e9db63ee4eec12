"""The engine where Dassl is installed: Dassl's own objects, but for what fails on today's stack.

Not handed on: `setup_logger` (see `engine.log`), `Datum` and `DatasetBase` (see `engine.splits`;
both are subclasses of Dassl's). Dassl's warm-up schedulers, which fail on today's torch, are left
as they are: no trainer here uses a schedule, and WARMUP_EPOCH is -1 by default.
"""

# ruff: noqa: F401  (its imports are what this module offers; `engine.ENGINE_NAMES` lists them)
from __future__ import annotations

from dassl.config import get_cfg_default
from dassl.data import DataManager, DatasetWrapper
from dassl.data.data_manager import build_data_loader
from dassl.data.datasets import DATASET_REGISTRY, build_dataset
from dassl.data.datasets import DatasetBase as DasslDatasetBase
from dassl.data.datasets import Datum as DasslDatum
from dassl.data.transforms import build_transform
from dassl.engine import TRAINER_REGISTRY, SimpleTrainer, build_trainer
from dassl.utils import (
    Registry,
    collect_env_info,
    mkdir_if_missing,
    read_image,
    read_json,
    set_random_seed,
    write_json,
)

from engine import splits
from engine.log import setup_logger


class Datum(splits.Datum, DasslDatum):
    """Dassl's Datum, for files that need not be there."""


class DatasetBase(splits.DatasetBase, DasslDatasetBase):
    """Dassl's DatasetBase, with its classes from all splits together."""
