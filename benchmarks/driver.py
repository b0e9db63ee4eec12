"""A whole run of train.py, and the audit after it, for growing numbers of classes.

    python -m benchmarks driver [--classes 100 250 1000 4000] [--trainer ForgetExact]

Every class of a bundle of random texts is forgotten alone. Compare numbers of one run: seconds of a
machine that others use waver.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import train
from benchmarks import timed
from benchmarks.solver import arguments, random_bundle
from engine.cli import Parser, whole
from engine.log import quiet
from evaluation.audit.inputs import Places
from evaluation.audit.run import audit_folder
from trainers import METHODS


def run(classes: int, trainer: str) -> dict[str, float]:
    """Seconds of a run of train.py over all of so many classes, and of the audit after it."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        trained, out = timed(train.main, arguments(random_bundle(classes), folder, trainer))
        without, places = ["relearning"], Places(features=folder)
        audited, _ = timed(audit_folder, out, without=without, places=places)
    return {"classes": classes, "train.py": trained, "audit": audited}


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure and print; returns a row for every number of classes."""
    parser = Parser(prog="python -m benchmarks driver", description=__doc__.splitlines()[0])
    parser.add_argument("--trainer", default="ForgetExact", choices=METHODS)
    counts = {"type": whole(2, 10**6), "nargs": "+", "default": [100, 250, 1000, 4000]}
    parser.add_argument("--classes", help="of random texts", **counts)
    args = parser.parse_args(argv)
    command, root = [sys.executable, "-c", "import train"], Path(__file__).parents[1]
    seconds, _ = timed(subprocess.run, command, check=True, cwd=root)
    print(f"{args.trainer}; seconds, start-up {seconds:.1f} apart")
    rows = []
    for count in args.classes:
        rows.append(run(count, args.trainer))
        print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.2f"), flush=True)
    return pd.DataFrame(rows)
