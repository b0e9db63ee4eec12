"""Command line and config: one data set, one seed, one backbone, one process.

Settings are merged in CoOp's order: yacs defaults, the data set's file, the trainer's file, the
command line; then the config is frozen and printed with the environment. Anything that is wrong
is refused in one line before work starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from yacs.config import CfgNode

import trainers
from clip.features import default_workers
from engine import (
    TRAINER_REGISTRY,
    UserError,
    build_trainer,
    collect_env_info,
    engine_description,
    get_cfg_default,
    set_random_seed,
    setup_logger,
    unknown,
)
from engine.cli import Parser, run
from engine.log import hold_log
from evaluation.results import merge_args
from forgetting import ProblemError

CONFIGS = Path(__file__).resolve().parent / "configs"
ANY_DATASET = "other"  # the config of a data set that has none of its own


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; CoOp's flags and trailing KEY VALUE pairs."""
    parser = Parser(prog="train.py", description=__doc__)
    parser.add_argument("--dataset", default="", help="name of the data set")
    parser.add_argument("--root", default="data", help="folder that holds the image sets")
    parser.add_argument(
        "--features", default="", help="folder of feature bundles: no model, no images"
    )
    parser.add_argument("--cache", default="cache", help="folder for weights and encoded features")
    parser.add_argument("--output-dir", default="output", help="folder of the results")
    parser.add_argument("--seed", type=int, default=0, help="0 or more")
    parser.add_argument("--trainer", default="ForgetLoRA", help="name of the method")
    parser.add_argument("--backbone", default="RN50", help="RN50, ViT-B/16, ViT-B/32 or mini")
    parser.add_argument(
        "--weights", default="", help="checkpoint of the backbone; default: download"
    )
    parser.add_argument(
        "--forget",
        action="append",
        default=[],
        metavar="NAME",
        help="a class to forget (repeatable), or all; replaces the list of forget_cls.py",
    )
    parser.add_argument(
        "--target", help="FORGET.TARGET: where texts are sent (specific, opposite, empty...)"
    )
    parser.add_argument("--beta", type=float, help="FORGET.BETA, of opposite and specific")
    parser.add_argument("--multiclass", action="store_true", help="forget all classes at once")
    parser.add_argument("--overwrite", action="store_true", help="do classes again that are done")
    parser.add_argument(
        "--audit", action="store_true", help="measure what is left of each class: audit.json"
    )
    parser.add_argument(
        "--save-model", action="store_true", help="write the full state dict beside each adapter"
    )
    parser.add_argument("--config-file", default="", help="default: configs/trainers/TRAINER.yaml")
    parser.add_argument(
        "--dataset-config-file", default="", help="default: configs/datasets/DATASET.yaml"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to change")
    return parser.parse_args(argv)


def extend_cfg(cfg: CfgNode) -> None:
    """Add this repository's keys to Dassl's."""
    cfg.DATALOADER.NUM_WORKERS = default_workers()  # Dassl's 4 would crowd a small machine
    cfg.DATASET.TEMPLATE = ""  # evaluation prompt; empty: the data set's own
    cfg.FEATURES = CfgNode()
    cfg.FEATURES.DIR = ""  # bundles that somebody made: no model, no images
    cfg.FEATURES.CACHE = "cache"
    cfg.FORGET = CfgNode()
    cfg.FORGET.CLASSES = ()  # empty: the list of forget_cls.py
    cfg.FORGET.MULTICLASS = False
    cfg.FORGET.OVERWRITE = False
    cfg.FORGET.SAVE_MODEL = False
    cfg.FORGET.TERMS = ("forget", "preserve", "weight")  # leave one out to switch it off
    cfg.FORGET.WEIGHTS = CfgNode(new_allowed=True)  # by backbone and mode, see configs/datasets
    cfg.FORGET.LAMB_PRESERVE = None  # None: from WEIGHTS
    cfg.FORGET.LAMB_FORGET = None
    cfg.FORGET.LAMB_WEIGHT = 1.0
    cfg.FORGET.RANK = 5
    cfg.FORGET.ALPHA = 1.0
    cfg.FORGET.NOISE_STD = 0.5
    # empty, opposite, orthogonal, specific, text:TEXT or vector:FILE; "": the method's own
    cfg.FORGET.TARGET = ""
    cfg.FORGET.BETA = 0.1  # of the targets opposite and specific: how far beyond zero
    cfg.FORGET.PROMPTS = ""  # JSON file, class name -> texts; "": forget_prompts of forget_cls.py
    for method in trainers.METHODS:
        if method.defaults:
            cfg.TRAINER[method.__name__.upper()] = CfgNode(method.defaults)


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a command line.

    Raises:
        UserError: a file, key or value that does not fit, with the nearest known key.
    """
    cfg = get_cfg_default()
    extend_cfg(cfg)
    dataset_file = Path(args.dataset_config_file or CONFIGS / "datasets" / f"{args.dataset}.yaml")
    if not args.dataset_config_file and not dataset_file.is_file():
        dataset_file = CONFIGS / "datasets" / f"{ANY_DATASET}.yaml"
    methods = sorted(path.stem for path in (CONFIGS / "trainers").glob("*.yaml"))
    if args.trainer not in methods:
        raise unknown("trainer", args.trainer, methods)
    trainer_file = Path(args.config_file or CONFIGS / "trainers" / f"{args.trainer}.yaml")
    for file in (dataset_file, trainer_file):
        _merge(cfg, file, lambda file=file: cfg.merge_from_file(str(file)))

    if not 0 <= args.seed < 2**32:  # numpy's range
        raise UserError(f"--seed must be from 0 to {2**32 - 1}, got {args.seed}")
    flags = {
        "DATASET.ROOT": args.root,
        "FEATURES.DIR": args.features,
        "FEATURES.CACHE": args.cache,
        "OUTPUT_DIR": args.output_dir,
        "SEED": args.seed,
        "TRAINER.NAME": args.trainer,
        "MODEL.BACKBONE.NAME": args.backbone,
        "MODEL.INIT_WEIGHTS": args.weights,
        "FORGET.CLASSES": tuple(args.forget),
        "FORGET.MULTICLASS": args.multiclass,
        "FORGET.OVERWRITE": args.overwrite,
        "FORGET.SAVE_MODEL": args.save_model,
    }
    optional = {
        "DATASET.NAME": args.dataset or None,
        "FORGET.TARGET": args.target,
        "FORGET.BETA": args.beta,
    }
    flags |= {key: value for key, value in optional.items() if value is not None}
    for key, value in flags.items():
        node, leaf = _node(cfg, key)
        node[leaf] = value
    if len(args.opts) % 2:
        raise UserError(
            f"config keys and values come in pairs, the last has none: {args.opts[-1]!r}"
        )
    for key, value in zip(args.opts[::2], args.opts[1::2], strict=True):
        pair = [key, _float_where_float_stands(cfg, key, value)]
        _merge(cfg, "command line", lambda pair=pair: cfg.merge_from_list(pair))
    if not cfg.DATASET.NAME:
        raise UserError("no data set: pass --dataset NAME")
    cfg.freeze()
    return cfg


def _merge(cfg: CfgNode, source: str | Path, merge) -> None:
    """Run one of yacs's merges; its exceptions become one line that names the nearest key."""
    try:
        merge()
    except OSError as error:
        raise UserError(f"cannot read config {source}: {error.strerror}") from error
    except (KeyError, AssertionError) as error:
        key = str(error.args[0]).split(":")[-1].strip().strip("'")
        raise unknown(f"config key ({source})", key, _keys(cfg)) from error
    except Exception as error:  # YAML has many kinds of error, and yacs raises bare ValueErrors
        text = " ".join(str(error).split())
        if "tuple" in text:
            text += "; a tuple is written as \"('a', 'b')\" or \"('a',)\""
        raise UserError(f"config ({source}): {text}") from error


def _float_where_float_stands(cfg: CfgNode, key: str, value: str) -> str:
    """`value`, with 2 written as 2.0 for a key that holds a float: yacs refuses the integer."""
    try:
        node, leaf = _node(cfg, key)
        return str(float(int(value))) if isinstance(node[leaf], float) else value
    except (KeyError, TypeError, ValueError):  # no such key or no integer: for yacs to judge
        return value


def _node(cfg: CfgNode, key: str) -> tuple[CfgNode, str]:
    *path, leaf = key.split(".")
    for part in path:
        cfg = cfg[part]
    return cfg, leaf


def _keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    """All keys of a config as dotted names, this repository's first: they are asked for most."""
    keys = []
    for name, value in cfg.items():
        full = f"{prefix}{name}"
        keys += _keys(value, f"{full}.") if isinstance(value, CfgNode) else [full]
    return sorted(keys, key=lambda key: not key.startswith(("FORGET", "TRAINER", "DATASET")))


def main(argv: Sequence[str] | None = None) -> Path:
    """Run one command line and return the folder of its results.

    Raises:
        UserError, ProblemError: input that cannot be run; one line.
    """
    args = parse(argv)
    cfg = setup_cfg(args)
    set_random_seed(cfg.SEED)
    TRAINER_REGISTRY.get(cfg.TRAINER.NAME).preflight(cfg)
    folder = Path(cfg.OUTPUT_DIR)
    console = sys.stdout
    hold_log()  # input that only encoding finds broken must leave no file either
    try:
        print(f"arguments: {args}")
        print(f"config:\n{cfg}")
        print(f"environment:\n{collect_env_info()}")
        print(engine_description())
        trainer = build_trainer(cfg)
        setup_logger(str(folder / cfg.DATASET.NAME))
        merge_args(folder, str(args))
        trainer.train()
        if args.audit:
            trainer.audit()
        print(f"results: {folder / 'logs.json'}")
    finally:
        sys.stdout = console
    return folder


def cli(argv: Sequence[str] | None = None) -> int:
    """`main` for the shell: an error is one line on stderr, the exit status says whether it ran."""
    return run(main, argv, refusals=(ProblemError, SafetensorError))


if __name__ == "__main__":
    sys.exit(cli())
