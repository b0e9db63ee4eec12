"""Every method on the same classes, side by side: ours, the paper's, and what they must beat.

    python -m experiments baselines --features DIR --dataset NAME --out FOLDER
        [--backbone ViT-B/32] [--forget NAME ...] [--methods NAME ...] [--multiclass] [--audit]

DIR is a folder of feature bundles. Each method is a trainer and its config keys (`METHODS`), run by
train.py into FOLDER/METHOD/seed_SEED, where its log is. What is done is skipped: a run that was
killed goes on with the same command. All solves run on one CPU thread.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pandas as pd

import train
from engine.cli import SEED, Parser
from engine.log import logger, progress
from evaluation.results import LOGS
from evaluation.tables import CSV, method_table
from forgetting.errors import unknown

# Name -> trainer and KEY VALUE pairs. "published" has the constants of the authors' code: 0.1 of
# the mean eigenvalue is their 0.02 for hidden states of width 512 and squared length 100.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "nothing": ("ForgetNothing", ()),
    "name": ("ForgetName", ()),
    "noise": ("ForgetNoise", ()),
    "zero": ("ForgetZero", ()),
    "ascent": ("ForgetAscent", ()),
    "leace": ("ForgetLEACE", ()),
    "null-space": ("ForgetNullSpace", ()),
    "null-space-empty": ("ForgetNullSpace", ("FORGET.TARGET", "empty")),
    "null-space-published": (
        "ForgetNullSpace",
        ("TRAINER.FORGETNULLSPACE.THRESHOLD", "0.1", "TRAINER.FORGETNULLSPACE.DAMPING", "10"),
    ),
    "uce": ("ForgetUCE", ()),
    "uce-empty": ("ForgetUCE", ("FORGET.TARGET", "empty")),
    "uce-published": ("ForgetUCE", ("TRAINER.FORGETUCE.ERASE", "1")),
    "lora": ("ForgetLoRA", ()),
    "optimum": ("ForgetOptimum", ()),
    "exact-empty": ("ForgetExact", ("FORGET.TARGET", "empty")),
    "exact-orthogonal": ("ForgetExact", ("FORGET.TARGET", "orthogonal")),
    "exact-opposite": ("ForgetExact", ("FORGET.TARGET", "opposite")),
    "exact-specific": ("ForgetExact", ("FORGET.TARGET", "specific")),
}


def run_methods(
    methods: Sequence[str], out: Path, arguments: Sequence[str], seed: int = 0
) -> dict[str, Path]:
    """Run methods of `METHODS` by train.py; what it prints goes to its log alone.

    Args:
        out: the folder above the methods' results; arguments: of train.py, what they share.

    Returns:
        Method -> folder of its results.

    Raises:
        ProblemError, ProblemError: train.py refuses; methods that came before it are done.
    """
    folders = {}
    bar = progress(methods, "methods")
    for method in bar:
        bar.set_postfix_str(method)
        trainer, keys = METHODS[method]
        folder = out / method / f"seed_{seed}"
        places = ["--trainer", trainer, "--output-dir", str(folder), "--seed", str(seed)]
        with redirect_stdout(io.StringIO()):
            folders[method] = train.main([*arguments, *places, *keys])
    return folders


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Run the methods, print their table, and say where their results are."""
    parser = Parser(prog="python -m experiments baselines", description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, help="folder of feature bundles")
    parser.add_argument("--backbone", default="ViT-B/32")
    parser.add_argument("--dataset", required=True, help="name of a bundle there")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument(
        "--forget", nargs="+", default=["all"], metavar="NAME", help="classes, or all (default)"
    )
    parser.add_argument("--multiclass", action="store_true", help="forget all of them at once")
    every = {"default": list(METHODS), "help": ", ".join(METHODS)}
    parser.add_argument("--methods", nargs="+", metavar="NAME", **every)
    parser.add_argument("--audit", action="store_true", help="audit each method as well")
    args = parser.parse_args(argv)
    for method in args.methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    shared = ["--features", args.features, "--backbone", args.backbone, "--dataset", args.dataset]
    for name in args.forget:
        shared += ["--forget", name]
    shared += [f"--{flag}" for flag in ("multiclass", "audit") if getattr(args, flag)]
    folders = run_methods(args.methods, args.out, shared, args.seed)
    table = method_table(folders, args.multiclass)
    # The same for every method that ran on the same classes.
    before = [column for column in table if column.endswith(" before")]
    first = table.iloc[0]
    print(", ".join(f"{column} {first[column]:.2f}" for column in before))
    shown = table.drop(columns=before)
    digits = {"classes": 0, "words back": 0, "bytes": 0, "seconds": 3, "avg_gain": 4}
    print(shown.to_string(formatters={c: f"{{:.{digits.get(c, 2)}f}}".format for c in shown}))
    if table["classes"].nunique() > 1:
        logger.info(
            "note: the methods ran on different numbers of classes; means are not of one set"
        )
    where = args.out / "METHOD" / f"seed_{args.seed}"
    logger.info(f"results: {where / LOGS}")
    if args.audit:
        logger.info(f"audits: {where / CSV}")
    return table
