"""Every method on the same classes, side by side: ours, the paper's, and what they must beat.

    python -m experiments baselines --features DIR --dataset NAME --out FOLDER
        [--methods NAME,NAME] [--backbone ViT-B/32] [options of train.py, such as --forget, --audit]

DIR is a folder of feature bundles. It is the sweep of baselines.yaml into FOLDER/METHOD/seed_SEED,
of all classes without --forget; other methods go by their own names. The same command resumes.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import trainers
from engine.config import read_yaml
from experiments import sweep

SWEEP = read_yaml(Path(__file__).with_suffix(".yaml"))
METHODS = SWEEP["methods"]  # name -> trainer, config keys
LISTED = {keys["trainer"] for keys in METHODS.values()}
METHODS |= {name: {"trainer": name} for name in trainers.METHODS if name not in LISTED}


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Run the methods; returns their table."""
    return sweep.main(argv, SWEEP)
