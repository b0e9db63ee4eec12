"""Forget classes of one data set with one backbone, method and seed.

    python train.py --dataset MiniDigits --backbone mini --trainer ForgetExact --forget "digit two"

`sh forget_clip.sh` loops over several of each. docs/settings.md lists every setting.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

import datasets
import trainers  # registers the methods
from engine import TRAINER_REGISTRY, choose
from engine.cli import Parser, about, run
from engine.config import OPTIONS, declared, load
from engine.log import environment, logger, run_log
from evaluation.results import add_args, place
from forgetting.errors import ProblemError
from forgetting.settings import kind_of
from forgetting.targets import TARGETS
from trainers.base import SINK

# Flags of CoOp and of the paper's public code, and what stands in for each here.
AGAIN = "every run evaluates, and the same command again goes on where it stopped"
DOMAIN = "a data set has one domain; choose it by --dataset"
INSTEAD = {
    **dict.fromkeys(("--eval-only", "--no-train", "--resume", "--model-dir"), AGAIN),
    **dict.fromkeys(("--source-domains", "--target-domains"), DOMAIN),
    "--load-epoch": "an adapter has no epochs",
    "--transforms": "a backbone brings its own preprocessing",
    "--head": "classes are classified by their texts; there is no head",
    "--run-ds": "--dataset NAME, or forget_clip.sh with several names",
    "--multiclass-forget": "--multiclass, without a value",
    "--backbone-arch": "--backbone NAME",
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: CoOp's flags and KEY VALUE pairs. An option that is not given is None."""
    argv = sys.argv[1:] if argv is None else list(argv)
    for word, value in pairwise([*argv, ""]):
        flag = word.partition("=")[0].replace("_", "-")
        if flag in INSTEAD:
            raise ProblemError(f"there is no {word} here: {INSTEAD[flag]}")
        if word == "--multiclass" and value in ("0", "1"):
            raise ProblemError("--multiclass takes no value: give it alone, or leave it out")
    known = ["methods, and their keys TRAINER.METHOD.KEY:"]
    for name in trainers.METHODS:
        own = [key.rpartition(".")[2] for key in declared() if f".{name.upper()}." in key]
        known += [f"  {name:<17} {' '.join(own)}".rstrip()]
    known += [f"targets: {', '.join(TARGETS)}, text:TEXT, vector:FILE"]
    parser = Parser(prog="train.py", description=__doc__, epilog="\n".join(known))
    kinds: dict[type, dict[str, Any]] = {
        bool: {"action": "store_true"},
        tuple: {"action": "append", "metavar": "NAME"},
        str: {"metavar": "TEXT"},
    }
    for name, key in OPTIONS.items():
        spec, flags = declared()[key], [f"--{name.replace('_', '-')}"]
        flags += ["--keep"] if name == "protect" else []
        kind = kinds.get(kind_of(spec), {"metavar": "NUMBER"})
        parser.add_argument(*flags, default=None, help=about(spec), **kind)
    for option, text in (
        ("--config-file", "YAML with settings of your own"),
        ("--dataset-config-file", "YAML over configs/datasets/DATASET.yaml, such as loss weights"),
    ):
        parser.add_argument(option, default="", metavar="FILE", help=text)
    text = "measure what is left of each class: audit.json"
    parser.add_argument("--audit", action="store_true", help=text)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")
    return parser.parse_args(argv)


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a command line, whose options are filled in: args.txt says what the run
    took. Raises ProblemError for a key or value that does not fit."""
    if args.images or args.dataset in datasets.NAMES:
        args.dataset = datasets.spec(args.dataset or "", args.images or "").name
    given = {key: x for name, key in OPTIONS.items() if (x := getattr(args, name)) is not None}
    cfg = load(given, args.opts, args.config_file, args.dataset_config_file)
    if not cfg.DATASET.NAME:
        raise ProblemError("no data set: pass --dataset NAME, or --images PATH")
    for option, key in OPTIONS.items():
        setattr(args, option, attrgetter(key)(cfg))
    return cfg


def build_trainer(cfg: CfgNode) -> Any:
    """The trainer of `cfg.TRAINER.NAME`; it encodes what is not cached. ProblemError for names,
    files and settings that cannot be run, before anything is written."""
    return TRAINER_REGISTRY.get(cfg.TRAINER.NAME)(cfg)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run one command line and return the folder of its results; ProblemError if it cannot."""
    args = parse(argv)
    with run_log() as keep:
        cfg = setup_cfg(args)
        torch.manual_seed(cfg.SEED)  # for a method of your own; ours draw from their generators
        logger.debug(f"arguments: {args}\nconfig:\n{cfg}\nenvironment:\n{environment()}")
        logger.debug(choose().description)
        trainer = build_trainer(cfg)
        folder = Path(cfg.OUTPUT_DIR)
        keep(folder / place(cfg.DATASET.NAME))
        add_args(folder, str(args))
        trainer.train()
        if args.audit:
            trainer.audit()
        if cfg.LOG:
            logger.info(f"numbers for {cfg.LOG}: {folder / place(cfg.DATASET.NAME) / SINK}")
    return folder


def cli(argv: Sequence[str] | None = None) -> int:
    """`main` for the shell: an error is one line on stderr, the exit status says whether it ran."""
    return run(main, argv)


if __name__ == "__main__":
    sys.exit(cli())
