"""A whole run of train.py, and the audit after it, for growing numbers of classes.

    python -m benchmarks driver [--classes 100 250 1000 4000] [--trainer ForgetExact]

Every class of a bundle of random texts is forgotten alone. Compare numbers of one run: seconds of a
machine that others use waver.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

import train
from benchmarks.solver import random_bundle
from clip.bundle import FeatureBundle, bundle_path
from engine.cli import Parser, whole
from engine.log import quiet
from evaluation.audit.inputs import Places
from evaluation.audit.run import audit_folder
from trainers import SETTINGS


def run(bundle: FeatureBundle, trainer: str) -> dict[str, float]:
    """Seconds of a run of train.py over all classes, and of the audit after it."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        out, features = f"{folder}/results", f"{folder}/features"
        bundle.save(bundle_path(features, bundle.backbone, bundle.dataset))
        argv = ["--features", features, "--backbone", bundle.backbone, "--trainer", trainer]
        argv += ["--dataset", bundle.dataset, "--forget", "all", "--output-dir", out]
        started = time.perf_counter()
        train.main(argv)
        trained = time.perf_counter()
        audit_folder(out, without=["relearning"], places=Places(features=features))
        audited = time.perf_counter() - trained
    classes = len(bundle.classnames)
    return {"classes": classes, "train.py": trained - started, "audit": audited}


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure and print; returns a row for every number of classes."""
    parser = Parser(prog="python -m benchmarks driver", description=__doc__.splitlines()[0])
    parser.add_argument("--trainer", default="ForgetExact", choices=SETTINGS)
    counts = {"type": whole(2, 10**6), "nargs": "+", "default": [100, 250, 1000, 4000]}
    parser.add_argument("--classes", help="of random texts", **counts)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", "import train"], check=True, cwd=root)
    print(f"{args.trainer}; seconds, start-up {time.perf_counter() - started:.1f} apart")
    rows = []
    for count in args.classes:
        rows.append(run(random_bundle(count), args.trainer))
        print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.2f"), flush=True)
    return pd.DataFrame(rows)
