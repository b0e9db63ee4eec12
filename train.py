"""Command line: a data set, a seed, a backbone and a method; or several of each, a run for all.

What may be set, with defaults and ranges, stands in configs/; trailing KEY VALUE pairs change any
key. Anything that is wrong is refused in one line before work starts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from yacs.config import CfgNode

import datasets
import trainers  # noqa: F401  registers the methods
from clip.architectures import architecture
from clip.bundle import list_bundles
from engine import TRAINER_REGISTRY, engine_description
from engine.cli import Parser, run
from engine.config import OPTIONS, declared, load, value_of
from engine.determinism import set_random_seed
from engine.files import escape
from engine.launch import Run, launch
from engine.log import environment, logger, run_log
from evaluation.results import add_args, place
from forgetting.errors import ProblemError, unknown
from forgetting.settings import kind_of
from trainers.base import SINK
from trainers.plan import Plan

HERE = Path(__file__).resolve().parent
COMMAND = "train:cli"  # what runs are of
PART = "FORGET.PART"  # which runs of the parts of a set differ in
# Options for more than one run, and which option of a run each stands for. A seed's results go to a
# folder seed_SEED in that of the results, below one for each backbone and method if they are many.
LISTS = {
    "datasets": "dataset",
    "seeds": "seed",
    "backbones": "backbone",
    "trainers": "trainer",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; CoOp's flags and trailing KEY VALUE pairs. None stands for not given."""
    parser = Parser(prog="train.py", description=__doc__)
    for name, key in OPTIONS.items():
        spec, flags = declared()[key], [f"--{name.replace('_', '-')}"]
        if name == "protect":
            flags.append("--keep")
        kind: dict[str, Any] = {"metavar": "TEXT" if kind_of(spec) is str else "NUMBER"}
        if kind_of(spec) is bool:
            kind = {"action": "store_true"}
        elif kind_of(spec) is tuple:
            kind = {"action": "append", "metavar": "NAME"}
        text = spec.metadata["help"].replace("%", "%%")
        if spec.default not in ("", (), False):
            text += f" (default: {spec.default})"
        parser.add_argument(*flags, default=None, help=text, **kind)
    parser.add_argument(
        "--audit", action="store_true", help="measure what is left of each class: audit.json"
    )
    for many, one in LISTS.items():
        text = f"several with commas between, a run each; instead of --{one}"
        parser.add_argument(f"--{many}", default="", metavar="LIST", help=text)
    for name, text in {
        "config": "YAML with settings of your own; options go before it",
        "dataset-config": "YAML with the loss weights (default: configs/datasets/DATASET.yaml)",
    }.items():
        parser.add_argument(f"--{name}-file", default="", metavar="FILE", help=text)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")
    return parser.parse_args(argv)


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a command line."""
    given = {key: getattr(args, name) for name, key in OPTIONS.items()}
    given = {key: value for key, value in given.items() if value is not None}
    cfg = load(given, args.opts, args.config_file, args.dataset_config_file)
    name = cfg.DATASET.NAME
    if not name:
        raise ProblemError("no data set: pass --dataset NAME, or --images PATH")
    if name in (".", "..") or "/" in name:
        raise ProblemError(f"a data set's results go to a folder of its name; {name!r} is none")
    return cfg


def prepare(args: argparse.Namespace) -> tuple[CfgNode, Plan]:
    """The settings of one run, which also complete `args`, and what it will do.

    Raises:
        ProblemError: input that cannot be run, known from names alone; nothing is written.
    """
    if args.images or args.dataset in datasets.NAMES:
        args.dataset = datasets.spec(args.dataset or "", args.images or "").name
    cfg = setup_cfg(args)
    for name, key in OPTIONS.items():
        setattr(args, name, value_of(cfg, key))  # args.txt says what the run took
    return cfg, TRAINER_REGISTRY.get(cfg.TRAINER.NAME).preflight(cfg)


def refuse_keys(given: Iterable[str], own: Iterable[str], where: str = "") -> None:
    """ProblemError for a key of KEY VALUE pairs that the runs are given anyhow, each its own."""
    own = set(own)
    for key in given:
        if key in own:
            raise ProblemError(f"{key} is set for each run and cannot be set beside that{where}")


def main(argv: Sequence[str] | None = None) -> Path:
    """Run one command line and return the folder of its results.

    Raises:
        ProblemError, ProblemError: input that cannot be run; one line.
    """
    args = parse(argv)
    if any(getattr(args, many) for many in LISTS):
        return _several(args, sys.argv[1:] if argv is None else argv)
    with run_log() as keep:  # input that only encoding finds broken must leave no file either
        cfg, _ = prepare(args)
        set_random_seed(cfg.SEED)
        folder = Path(cfg.OUTPUT_DIR)
        for what in (f"arguments: {args}", f"config:\n{cfg}", f"environment:\n{environment()}"):
            logger.debug(what)
        logger.debug(engine_description())
        trainer = TRAINER_REGISTRY.get(cfg.TRAINER.NAME)(cfg)
        keep(folder / place(cfg.DATASET.NAME))
        add_args(folder, str(args))
        trainer.train()
        if args.audit:
            trainer.audit()
        if cfg.LOG:
            logger.info(f"numbers for {cfg.LOG}: {folder / place(cfg.DATASET.NAME) / SINK}")
    return folder


def place_below(folder: str | Path, backbone: str, trainer: str, setting: str = "") -> Path:
    """Where results lie that differ from others of `folder` in these; "" for what they share."""
    names = (backbone.replace("/", "-"), trainer, setting and escape(setting))
    return Path(folder, *filter(None, names))


def attempt(
    folder: str | Path,
    names: Sequence[str],
    seeds: Sequence[str],
    argv: Sequence[str],
    parts: int = 1,
    about: Sequence[str] = (),
) -> list[Run]:
    """The runs of one method and backbone: a data set, a seed and a part of the requests each.

    Args:
        folder: of the results, below which each seed has its own; argv: what all have in common;
            parts: of a set's requests; about: what all are called beside data set and seed.
    """
    runs = []
    for seed in seeds:
        for name in names:
            for part in range(1, parts + 1):
                out = f"{folder}/seed_{seed}"
                own = ["--dataset", name, "--seed", seed, "--output-dir", out]
                own += [PART, f"{part}/{parts}"] if parts > 1 else []
                title = [name, *about, f"seed {seed}"]
                title += [f"part {part} of {parts}"] if parts > 1 else []
                runs.append(Run(", ".join(title), [*argv, *own], out))
    return runs


def _several(args: argparse.Namespace, argv: Sequence[str]) -> Path:
    """Every data set with every seed, backbone and method; one that fails stops no other."""
    cfg, varied = _varied(args)
    front = Parser(add_help=False)
    for option in (*LISTS, "output-dir"):
        front.add_argument(f"--{option}")
    known, common = front.parse_known_args(argv)
    folder, common = Path(cfg.OUTPUT_DIR), common + ["--quiet"] * known.quiet
    multiclass = cfg.FORGET.MULTICLASS
    parts = 1 if multiclass else cfg.LAUNCHER.PARTS
    refuse_keys(args.opts[::2], ["OUTPUT_DIR"] + [PART] * (parts > 1))
    runs, backbones = [], {}
    for backbone, trainer in product(varied["backbone"], varied["trainer"]):
        named = {"backbone": backbone, "trainer": trainer}
        differ = {one: name if len(varied[one]) > 1 else "" for one, name in named.items()}
        line = [*common, "--backbone", backbone, "--trainer", trainer]
        about = list(filter(None, [backbone, differ["trainer"]]))
        place = place_below(folder, **differ)
        own = attempt(place, varied["dataset"], varied["seed"], line, parts, about)
        runs += own
        backbones |= dict.fromkeys((one.folder for one in own), backbone)
    failed = launch(COMMAND, runs, cfg.LAUNCHER)
    for done in dict.fromkeys(one.folder for one in runs if one not in failed):
        logger.info(f"results: {done}")
        logger.info(
            f"load them in {HERE}: from utils import create_results; df, args = create_results("
            f"{json.dumps(f'{done}/')}, rn={backbones[done].startswith('RN')}, "
            f"multiclass={multiclass})"
        )
    if failed:
        titles = "; ".join(one.title for one in failed)
        raise ProblemError(f"failed: {titles}; see the messages above")
    return folder


def _varied(args: argparse.Namespace) -> tuple[CfgNode, dict[str, list[str]]]:
    """The settings of the first of several runs, and for each option of a run its values.

    Raises:
        ProblemError: a data set, seed, backbone, method or setting that no run could be made with.
    """
    refuse_keys(
        args.opts[::2], [OPTIONS[one] for many, one in LISTS.items() if getattr(args, many)]
    )
    varied = {}
    for many, one in LISTS.items():
        named, only = getattr(args, many), getattr(args, one)
        words = named.split(",") if named else [only or ""]
        varied[one] = list(dict.fromkeys(filter(None, map(str.strip, words))))
    first = {one: next(iter(values), None) for one, values in varied.items()}
    cfg = setup_cfg(argparse.Namespace(**vars(args) | first))
    for one, values in varied.items():
        for value in values:
            setup_cfg(argparse.Namespace(**vars(args) | first | {one: value}))
    if len(varied["backbone"]) > 1 and cfg.MODEL.INIT_WEIGHTS:
        raise ProblemError(
            "--weights is of one backbone, and --backbones names several; "
            "python -m experiments sweep takes --weights ARCH=PATH for each"
        )
    if not cfg.FEATURES.DIR:
        for backbone in varied["backbone"]:
            architecture(backbone)
    for one, values in varied.items():
        values or values.append(str(value_of(cfg, OPTIONS[one])))
    for name, backbone in product(varied["dataset"], varied["backbone"]):
        if cfg.FEATURES.DIR:
            known = list_bundles(cfg.FEATURES.DIR, backbone)
            if name not in known:
                raise unknown(f"feature bundle of {backbone}", name, known)
        else:
            datasets.spec(name, cfg.DATASET.IMAGES)
    return cfg, varied


def cli(argv: Sequence[str] | None = None) -> int:
    """`main` for the shell: an error is one line on stderr, the exit status says whether it ran."""
    return run(main, argv, refusals=(SafetensorError,))


if __name__ == "__main__":
    sys.exit(cli())
