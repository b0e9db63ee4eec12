"""Command line: one data set, one seed, one backbone, one process.

What may be set, with defaults and ranges, stands in configs/; trailing KEY VALUE pairs change any
key. Anything that is wrong is refused in one line before work starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

import datasets
import trainers  # noqa: F401  registers the methods
from engine import TRAINER_REGISTRY, engine_description
from engine.cli import Parser, run
from engine.config import OPTIONS, declared, setup, value_of
from engine.determinism import set_random_seed
from engine.log import environment, logged, note, say
from evaluation.results import merge_args, place
from forgetting import ProblemError


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; CoOp's flags and trailing KEY VALUE pairs. None stands for not given."""
    parser = Parser(prog="train.py", description=__doc__)
    for name, key in OPTIONS.items():
        setting = declared()[key]
        kinds = {
            "bool": {"action": "store_true"},
            "list": {"action": "append", "metavar": "NAME"},
        }
        text = setting.about.replace("%", "%%")
        if setting.type in ("str", "int", "float"):
            kinds[setting.type] = {"metavar": "TEXT" if setting.type == "str" else "NUMBER"}
            text += f" (default: {setting.default})" if setting.default != "" else ""
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, default=None, help=text, **kinds[setting.type])
    parser.add_argument(
        "--audit", action="store_true", help="measure what is left of each class: audit.json"
    )
    for name, text in {
        "config": "YAML with settings of your own; options go before it",
        "dataset-config": "YAML with the loss weights (default: configs/datasets/DATASET.yaml)",
    }.items():
        parser.add_argument(f"--{name}-file", default="", metavar="FILE", help=text)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> Path:
    """Run one command line and return the folder of its results.

    Raises:
        UserError, ProblemError: input that cannot be run; one line.
    """
    args = parse(argv)
    if args.images or args.dataset in datasets.NAMES:
        args.dataset = datasets.spec(args.dataset or "", args.images or "").name
    cfg = setup(args)
    for name, key in OPTIONS.items():
        setattr(args, name, value_of(cfg, key))  # args.txt says what the run took
    set_random_seed(cfg.SEED)
    method = TRAINER_REGISTRY.get(cfg.TRAINER.NAME)
    method.preflight(cfg)
    folder = Path(cfg.OUTPUT_DIR)
    with logged() as keep:  # input that only encoding finds broken must leave no file either
        for what in (f"arguments: {args}", f"config:\n{cfg}", f"environment:\n{environment()}"):
            note(what)
        note(engine_description())
        trainer = method(cfg)
        keep(folder / place(cfg.DATASET.NAME))
        merge_args(folder, str(args))
        trainer.train()
        if args.audit:
            trainer.audit()
        say(f"results: {folder / 'logs.json'}")
    return folder


def cli(argv: Sequence[str] | None = None) -> int:
    """`main` for the shell: an error is one line on stderr, the exit status says whether it ran."""
    return run(main, argv, refusals=(ProblemError, SafetensorError))


if __name__ == "__main__":
    sys.exit(cli())
