"""A whole run of train.py, and the audit after it, for growing numbers of classes.

    python -m benchmarks driver [--features DIR] [--backbone ViT-B/16] [--dataset ImageNetText]
                                [--classes 100 250 1000 4000] [--trainer ForgetExact]

Every class of the bundle is forgotten alone (`--forget all`); without DIR of a bundle of random
texts. A number of classes beyond the bundle's is reached by repeating them under other names, a
little displaced. Compare numbers of one run: seconds of a machine that others use waver.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

import train
from benchmarks.solver import random_workload
from clip.bundle import FeatureBundle, bundle_path, load_bundle
from engine.cli import Parser, whole
from engine.log import quiet
from evaluation.audit.inputs import Places
from evaluation.audit.run import audit_folder

DISPLACED = 0.05  # of a text's length
CLASSES = (100, 250, 1000, 4000)
ROOT = Path(__file__).resolve().parents[1]


def enlarged(bundle: FeatureBundle, count: int) -> FeatureBundle:
    """The bundle with `count` classes: its first ones, or all of them several times."""
    known = len(bundle.classnames)
    rows = torch.arange(count) % known  # (count,)
    turn = torch.arange(count) // known
    generator = torch.Generator().manual_seed(0)

    def repeated(hidden: torch.Tensor) -> torch.Tensor:
        repeats = hidden[rows]
        noise = torch.randn(repeats.shape, generator=generator)
        noise *= DISPLACED * repeats.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
        return repeats + noise * (turn > 0)[:, None]

    kept = bundle.labels < count
    return replace(
        bundle,
        image_features=bundle.image_features[kept],
        labels=bundle.labels[kept],
        class_hidden=repeated(bundle.class_hidden),
        forget_hidden=repeated(bundle.forget_hidden),
        classnames=[
            bundle.classnames[row] + (f" {number + 1}" if number else "")
            for row, number in zip(rows.tolist(), turn.tolist(), strict=True)
        ],
        extra={},
        extra_tensors={},
    )


def random_bundle(backbone: str, dataset: str) -> FeatureBundle:
    """A thousand classes of random texts, which are their own vocabulary; no images."""
    work = random_workload().problem
    names = [f"thing {number}" for number in range(len(work.forget_hidden))]
    return FeatureBundle(
        image_features=torch.zeros(0, work.projection.shape[1]),
        labels=torch.zeros(0, dtype=torch.int64),
        class_hidden=work.forget_hidden,
        forget_hidden=work.forget_hidden,
        retain_hidden=work.forget_hidden,
        neutral_hidden=work.forget_hidden.mean(dim=0, keepdim=True),
        text_projection=work.projection,
        backbone=backbone,
        weights="random",
        dataset=dataset,
        split="none",
        template="a photo of a {}.",
        classnames=names,
        retain_names=names,
    )


def run(bundle: FeatureBundle, trainer: str, folder: Path) -> dict[str, float]:
    """Seconds of a run of train.py over all classes, and of the audit after it."""
    out, features = folder / "results", folder / "features"
    bundle.save(bundle_path(features, bundle.backbone, bundle.dataset))
    argv = ["--features", str(features), "--backbone", bundle.backbone, "--trainer", trainer]
    argv += ["--dataset", bundle.dataset, "--forget", "all", "--output-dir", str(out)]
    with quiet():
        started = time.perf_counter()
        train.main(argv)
        trained = time.perf_counter()
        audit_folder(out, without=["relearning"], places=Places(features=str(features)))
    audited = time.perf_counter() - trained
    return {
        "classes": len(bundle.classnames),
        "train.py": trained - started,
        "audit": audited,
    }


def start_up() -> float:
    """Seconds until a fresh process has imported what a run needs."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import train"], check=True, cwd=ROOT)
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure and print; returns a row for every number of classes."""
    parser = Parser(prog="python -m benchmarks driver", description=__doc__.splitlines()[0])
    parser.add_argument("--features", help="folder of feature bundles; default: random texts")
    parser.add_argument("--backbone", default="ViT-B/16", help="of the bundle")
    parser.add_argument("--dataset", default="ImageNetText", help="name of the bundle")
    parser.add_argument("--trainer", default="ForgetExact", help="name of the method")
    count = whole(2, 10**6)
    parser.add_argument("--classes", type=count, nargs="+", default=list(CLASSES))
    args = parser.parse_args(argv)
    bundle = random_bundle(args.backbone, args.dataset)
    if args.features:
        bundle = load_bundle(args.features, args.backbone, args.dataset)
    print(
        f"{bundle.dataset}, {bundle.backbone}, {args.trainer}: {len(bundle.labels)} images, "
        f"{len(bundle.retain_names)} retained names; seconds, start-up {start_up():.1f} apart"
    )
    rows = []
    for count in args.classes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run(enlarged(bundle, count), args.trainer, Path(folder)))
        print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="%.2f"), flush=True)
    return pd.DataFrame(rows)
