"""Every method on the same classes, side by side: ours, the paper's, and what they must beat.

    python -m experiments baselines --features DIR --dataset NAME --out FOLDER
        [--methods NAME,NAME] [--backbone ViT-B/32] [options of train.py, such as --forget, --audit]

DIR is a folder of feature bundles. Each method of baselines.yaml is run by train.py into
FOLDER/METHOD/seed_SEED, where its log is. The same command resumes.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from engine.cli import SEED, Parser
from engine.config import read_yaml
from engine.log import logger
from engine.ray import LauncherSettings
from evaluation.tables import method_table
from experiments.runs import launch, plan_run, refuse_failed
from forgetting.errors import ProblemError, unknown

METHODS = read_yaml(Path(__file__).with_name("baselines.yaml"))  # name -> trainer, config keys


def main(argv: Sequence[str] | None = None) -> pd.DataFrame:
    """Run the methods, print their table, and say where their results are."""
    parser = Parser(prog="python -m experiments baselines", description=__doc__.splitlines()[0])
    parser.add_argument("--features", required=True, help="folder of feature bundles")
    parser.add_argument("--backbone", default="ViT-B/32")
    parser.add_argument("--dataset", required=True, help="name of a bundle there")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--methods", metavar="LIST", help=f"with commas: {', '.join(METHODS)}")
    args, options = parser.parse_known_args(argv)
    methods = args.methods.split(",") if args.methods else list(METHODS)
    for method in methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    if args.out.exists() and not args.out.is_dir():
        raise ProblemError(f"--out {args.out} is no folder")
    if not any(option.startswith("--forget") for option in options):
        options = ["--forget", "all", *options]
    mode = "at once" if "--multiclass" in options else "alone"
    options = [option for option in options if option != "--multiclass"]
    runs, folders = [], {}
    for method in methods:
        given = dict(METHODS[method])
        trainer = given.pop("trainer")
        pairs = [str(text) for pair in given.items() for text in pair]
        folders[method] = args.out / method / f"seed_{args.seed}"
        keys = args.backbone, trainer, method, mode, args.dataset
        argv = ["--features", args.features, "--quiet", *options, *pairs]
        runs.append(plan_run(keys, folders[method], argv, args.seed))
    refuse_failed(launch(runs, LauncherSettings()))
    table = method_table(folders, mode == "at once")
    # The same for every method that ran on the same classes.
    before = [column for column in table if column.endswith(" before")]
    print(", ".join(f"{column} {table.iloc[0][column]:.2f}" for column in before))
    shown = table.drop(columns=before)
    digits = {"classes": 0, "words back": 0, "bytes": 0, "seconds": 3, "avg_gain": 4}
    print(shown.to_string(formatters={c: f"{{:.{digits.get(c, 2)}f}}".format for c in shown}))
    logger.info(f"results: {args.out / 'METHOD' / f'seed_{args.seed}'}")
    return table
