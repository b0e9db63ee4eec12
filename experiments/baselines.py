"""Every method on the same classes, side by side: ours, the paper's, and what they must beat.

    python -m experiments baselines --features DIR --dataset NAME --out FOLDER
        [--methods NAME,NAME] [--backbone ViT-B/32] [options of train.py, such as --forget, --audit]

DIR is a folder of feature bundles. It is the sweep of baselines.yaml into FOLDER/METHOD/seed_SEED,
of all classes without --forget. The same command resumes.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from engine.config import read_yaml
from experiments import sweep

FILE = Path(__file__).with_suffix(".yaml")
METHODS = read_yaml(FILE)["methods"]  # name -> trainer, config keys


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Run the methods; returns their table."""
    return sweep.main(argv, FILE)
