"""Features once against encoding every test image anew for every forgotten class.

    python -m benchmarks pipeline [DATASET] [ARCH] [--classes 3] [--root data] [--weights PATH]

Both ways give the evaluation its image embeddings; the second is that of the paper's public code.
Solving is left out: it is the same in both. The caches are temporary, so each run encodes anew.
"""

from __future__ import annotations

import argparse
import tempfile
import time

from clip.features import build_bundle
from clip.source import ClipSource
from engine.cli import COUNT, Parser
from evaluation.zero_shot import Evaluator


def bundle_and_seconds(args: argparse.Namespace, source: ClipSource, cache: str):
    """A bundle built with `cache`, and how long that took."""
    started = time.perf_counter()
    bundle = build_bundle(args.dataset, source, args.root, cache)
    return bundle, time.perf_counter() - started


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run both ways, print both, and return the seconds of each."""
    parser = Parser(prog="python -m benchmarks pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("dataset", nargs="?", default="MiniSymbols")
    parser.add_argument("arch", nargs="?", default="mini")
    parser.add_argument("--classes", type=COUNT, default=3, help="how many classes are forgotten")
    parser.add_argument("--root", default="data")
    parser.add_argument("--cache", default="cache", help="folder of downloaded weights")
    parser.add_argument("--weights")
    args = parser.parse_args(argv)
    source = ClipSource(args.arch, args.weights, args.cache)
    source.encode_hidden([""])  # loading the model is not what is compared

    once, again = 0.0, 0.0
    with tempfile.TemporaryDirectory() as shared:
        for number in range(args.classes):
            bundle, seconds = bundle_and_seconds(args, source, shared)
            name = bundle.classnames[number % len(bundle.classnames)]
            started = time.perf_counter()
            Evaluator(bundle, {}).before([name])
            evaluating = time.perf_counter() - started
            once += seconds + evaluating
            with tempfile.TemporaryDirectory() as fresh:
                again += bundle_and_seconds(args, source, fresh)[1] + evaluating
    images = len(bundle.labels)
    print(f"{args.dataset}, {args.arch}, {images} images, {args.classes} classes forgotten")
    print(f"  features once:            {once:8.2f} s")
    print(f"  encoding for every class: {again:8.2f} s  ({again / once:.1f} times as long)")
    return {"once": once, "again": again}
