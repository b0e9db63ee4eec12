"""The config of a run: settings dataclasses declare its keys, YAML and the command line fill it.

`engine.settings` declares what all methods share, `trainers.SETTINGS` each method's own constants.

Layers, each over the one before, in CoOp's order: the defaults, `configs/datasets/DATASET.yaml`, a
`--dataset-config-file`, `configs/trainers/METHOD.yaml`, a `--config-file`, the options and KEY
VALUE pairs of the command line. `python -m engine.config` prints docs/settings.md.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from engine.files import read_text
from engine.log import logger
from engine.settings import SECTIONS, ForgetSettings, TrainerSettings
from forgetting.errors import ProblemError, nearest, shown, unknown
from forgetting.settings import allowed, check_value, kind_of

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
ANY_DATASET = "other"  # the config of a data set that has none of its own
WEIGHTS = "FORGET.WEIGHTS"  # backbone -> mode -> [lamb_preserve, lamb_forget]; not a single setting
MODES = ("SINGLE", "MULTICLASS")
PATHS = {  # where ~ is the user's home
    *("OUTPUT_DIR", "DATASET.ROOT", "DATASET.IMAGES", "MODEL.INIT_WEIGHTS", "FEATURES.DIR"),
    *("FEATURES.CACHE", "FORGET.PROMPTS", "FORGET.RETAIN_NAMES"),
}
# Options of train.py and the keys that they set.
OPTIONS = {
    "dataset": "DATASET.NAME",
    "root": "DATASET.ROOT",
    "images": "DATASET.IMAGES",
    "features": "FEATURES.DIR",
    "cache": "FEATURES.CACHE",
    "output_dir": "OUTPUT_DIR",
    "seed": "SEED",
    "log": "LOG",
    "trainer": "TRAINER.NAME",
    "backbone": "MODEL.BACKBONE.NAME",
    "weights": "MODEL.INIT_WEIGHTS",
    "precision": "MODEL.PRECISION",
    "forget": "FORGET.CLASSES",
    "protect": "FORGET.PROTECT",
    "retain_names": "FORGET.RETAIN_NAMES",
    "target": "FORGET.TARGET",
    "beta": "FORGET.BETA",
    "multiclass": "FORGET.MULTICLASS",
    "overwrite": "FORGET.OVERWRITE",
    "save_model": "FORGET.SAVE_MODEL",
}
# Keys of Dassl and CoOp that have no effect here, whether Dassl is installed or not: no image
# trains anything, a backbone brings its own preprocessing, and methods of theirs do not run.
OF_DASSL = re.compile(
    r"(INPUT|OPTIM|TRAIN|TEST|MODEL\.HEAD|DATALOADER\.TRAIN_[XU]|TRAINER\.(?!FORGET)\w+)\..+"
    r"|VERSION|RESUME|VERBOSE|MODEL\.BACKBONE\.PRETRAINED"
    r"|DATALOADER\.(K_TRANSFORMS|RETURN_IMG0|TEST\.SAMPLER)"
    r"|DATASET\.(\w+_DOMAINS|NUM_LABELED|NUM_SHOTS|VAL_PERCENT|STL10_FOLD|CIFAR_C_\w+"
    r"|ALL_AS_UNLABELED|SUBSAMPLE_CLASSES)"
)
INSTEAD = {
    "OPTIM.LR": "TRAINER.FORGETLORA.LR",
    "OPTIM.MAX_EPOCH": "TRAINER.FORGETLORA.STEPS",
    "DATASET.SUBSAMPLE_CLASSES": "--forget NAME",
}


@cache
def declared() -> dict[str, Field]:
    """Every key of the config, and the dataclass field that declares it."""
    from trainers import SETTINGS  # above this package: each method declares its own constants

    own = {f"TRAINER.{name.upper()}": cls for name, cls in SETTINGS.items() if cls is not None}
    return {
        ".".join(filter(None, (section, spec.name.upper()))): spec
        for section, cls in (SECTIONS | own).items()
        for spec in fields(cls)
        if "help" in spec.metadata
    }


def methods() -> list[str]:
    """The names of all methods."""
    from trainers import SETTINGS

    return sorted(SETTINGS)


def extend_cfg(cfg: CfgNode) -> None:
    """Add every key of this project to a config, such as Dassl's `get_cfg_default()`, with its
    default; of keys that are Dassl's too (SEED, OUTPUT_DIR, DATASET.ROOT, ...) the default becomes
    ours."""
    for key, spec in declared().items():
        _set(cfg, key.split("."), spec.default)
    cfg.FORGET.WEIGHTS = CfgNode(new_allowed=True)


def settings(
    trainer: str = "", dataset: str = "", backbone: str = "", opts: Sequence[str] = ()
) -> CfgNode:
    """The frozen config of a run with these names and KEY VALUE pairs; an empty name is the
    default's. Raises ProblemError for a name, key or value that does not fit."""
    names = {"TRAINER.NAME": trainer, "DATASET.NAME": dataset, "MODEL.BACKBONE.NAME": backbone}
    return load({key: name for key, name in names.items() if name}, opts)


def load(
    given: Mapping[str, Any],
    opts: Sequence[str] = (),
    config_file: str = "",
    dataset_config_file: str = "",
) -> CfgNode:
    """The frozen config of a run.

    Args:
        given: key -> value of the options.
        opts: KEY VALUE pairs.
        config_file, dataset_config_file: YAML files of the user's, or "".

    Raises:
        ProblemError: a file, key or value that does not fit, with the nearest known key.
    """
    from engine import get_cfg_default  # Dassl's where it is installed

    if len(opts) % 2:
        raise ProblemError(f"config keys and values come in pairs, the last has none: {opts[-1]!r}")
    line = [*given.items(), *zip(opts[::2], opts[1::2], strict=True)]
    of_user = _read(config_file)
    of_set = _read(dataset_config_file)
    # These two names decide which files of ours are read first.
    named = dict([*of_set, *of_user, *line])
    trainer = str(named.get("TRAINER.NAME", TrainerSettings().name))
    if trainer not in methods():
        raise unknown("trainer", trainer, methods())
    dataset = str(named.get("DATASET.NAME", ""))
    known = {path.stem: path for path in (CONFIGS / "datasets").glob("*.yaml")}
    our_set = known.get(dataset, known[ANY_DATASET])
    our_method = CONFIGS / "trainers" / f"{trainer}.yaml"  # where it departs from the defaults

    cfg = get_cfg_default()
    extend_cfg(cfg)
    _merge(cfg, _read(our_set), f" (in {our_set})")
    _merge_file(cfg, of_set, dataset_config_file)
    _merge(cfg, _read(our_method) if our_method.exists() else [], f" (in {our_method})")
    _merge_file(cfg, of_user, config_file)
    _merge(cfg, line, "")
    if dataset:
        cfg.DATASET.NAME = dataset
    cfg.freeze()
    return cfg


def check(cfg: CfgNode) -> None:
    """Raise ProblemError unless every key of `cfg` has a value of its type and range."""
    for key, spec in declared().items():
        check_value(value_of(cfg, key), spec, key)


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value of `cfg` at a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _set(cfg: CfgNode, path: Sequence[str], value: Any) -> None:
    *above, leaf = path
    for part in above:
        cfg = cfg.setdefault(part, CfgNode())
    cfg[leaf] = value


def _merge_file(cfg: CfgNode, pairs: Sequence[tuple[str, Any]], file: str) -> None:
    """Merge a file of the user's, and log what it sets and what has no effect."""
    idle = [key for key, _ in pairs if OF_DASSL.fullmatch(key)]
    pairs = [(key, value) for key, value in pairs if key not in idle]
    _merge(cfg, pairs, f" (in {file})")
    if pairs:
        logger.info(f"{file} sets {', '.join(dict.fromkeys(key for key, _ in pairs))}")
    if idle:
        logger.warning(
            f"{file}: without effect here, where no image trains anything: {', '.join(idle)}"
        )


def _merge(cfg: CfgNode, pairs: Iterable[tuple[str, Any]], source: str) -> None:
    """Set keys of `cfg`; `source` is named in refusals."""
    keys = declared()
    for key, value in pairs:
        if key in keys:
            value = _coerce(value, keys[key])
            if key in PATHS and isinstance(value, str):
                value = os.path.expanduser(value)
            try:
                check_value(value, keys[key], key)
            except ProblemError as error:
                raise ProblemError(f"{error}{source}") from error
            _set(cfg, key.split("."), value)
        elif key.startswith(f"{WEIGHTS}."):
            backbone, _, mode = key.removeprefix(f"{WEIGHTS}.").rpartition(".")
            if not backbone or mode not in MODES:
                raise ProblemError(
                    f"{key}: must be {WEIGHTS}.BACKBONE.SINGLE or .MULTICLASS{source}"
                )
            _set(cfg.FORGET.WEIGHTS, [backbone, mode], _literal(value))
        elif OF_DASSL.fullmatch(key):
            instead = f"; instead: {INSTEAD[key]}" if key in INSTEAD else ""
            raise ProblemError(
                f"{key} is a key of Dassl's or CoOp's without effect here, where no image trains "
                f"anything{instead}{source}"
            )
        elif value is not None or not any(one.startswith(f"{key}.") for one in (*keys, WEIGHTS)):
            close = nearest(key, [*keys, f"{WEIGHTS}.BACKBONE.SINGLE"])
            meant = f"; did you mean {' or '.join(close[:2])}?" if close else ""
            raise ProblemError(f"unknown config key {shown(key)}{meant} (docs/settings.md){source}")


def _literal(value: Any) -> Any:
    """A text of the command line as Python reads it; YAML's lists as tuples."""
    if isinstance(value, str):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
    return tuple(value) if isinstance(value, list) else value


def _coerce(value: Any, spec: Field) -> Any:
    """`value` as the setting holds it: 1e-6, which YAML takes for text, and texts of the line."""
    kind = kind_of(spec)
    if kind is str and isinstance(value, str):
        return value
    value = _literal(value)
    if kind is tuple and isinstance(value, str):
        return (value,)
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 1e300 else float("inf")
    return value


# YAML


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Refuses a key that stands twice in one mapping, of which YAML would drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep=True)
        if len(found) < len(node.value):
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next(key for key in keys if keys.count(key) > 1)
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"the key {twice} stands twice in the mapping of line {line}")
        return found


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; {} if there is nothing but comments.

    Raises:
        ProblemError: no YAML file by its name (yacs would execute a .py), none that can be read, a
            key that stands twice in one mapping, or an alias, by which a small file may be huge.
    """
    path = Path(os.path.expanduser(path))
    if path.suffix not in (".yaml", ".yml"):
        raise ProblemError(f"config file {path}: only YAML is read, and its name ends in .yaml")
    if not path.exists():
        folder = path.parent if path.parent.is_dir() else CONFIGS
        there = {str(one): one.stem for one in folder.rglob("*.y*ml")}
        close = nearest(path.stem, there.values(), n=1)
        meant = [one for one, stem in there.items() if stem in close][:1]
        raise ProblemError(
            f"no config file {path}" + (f"; did you mean {meant[0]}?" if meant else "")
        )
    text = read_text(path, "config file")
    try:
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.AliasEvent):
                raise yaml.YAMLError(f"line {event.start_mark.line + 1}: aliases are not read")
        tree = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ProblemError(f"config file {path}: {' '.join(str(error).split())}") from error
    if tree is not None and not isinstance(tree, dict):
        raise ProblemError(f"config file {path}: must hold keys and values, such as FORGET: ...")
    return tree or {}


def _read(file: str | Path) -> list[tuple[str, Any]]:
    """The keys and values of a file; none if it is ""."""
    return list(_flat(read_yaml(file))) if file else []


def _flat(tree: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


# The paper's weights


def paper_weights(cfg: CfgNode) -> dict[str, float | str]:
    """lamb_forget (or "auto"), lamb_preserve and lamb_weight: the command line's, else those of the
    data set for this backbone and mode, else those of a backbone that it does not name. A term that
    `FORGET.TERMS` leaves out has weight zero (the paper's ablation).

    Raises:
        ProblemError: an impossible weight.
    """
    mode = MODES[cfg.FORGET.MULTICLASS]
    backbone = cfg.MODEL.BACKBONE.NAME
    same = backbone.removesuffix("-quickgelu")  # OpenAI's models compute with that
    listed = cfg.FORGET.WEIGHTS.get(backbone, cfg.FORGET.WEIGHTS.get(same, {}))
    unlisted = cfg.FORGET.UNLISTED.LAMB_PRESERVE, cfg.FORGET.UNLISTED.LAMB_FORGET
    pair = listed.get(mode, unlisted)
    if not isinstance(pair, tuple | list) or len(pair) != 2:  # a list where yacs merged the file
        raise ProblemError(
            f"{WEIGHTS}.{backbone}.{mode} must be [lamb_preserve, lamb_forget], not {shown(pair)}"
        )
    values = {"LAMB_PRESERVE": pair[0], "LAMB_FORGET": pair[1], "LAMB_WEIGHT": None}
    values |= {key: cfg.FORGET[key] for key in values if cfg.FORGET[key] is not None}
    weights = {}
    for term in ForgetSettings().terms:
        key = f"LAMB_{term.upper()}"
        spec = declared()[f"FORGET.{key}"]
        value = _coerce(values[key], spec)
        check_value(value, spec, f"FORGET.{key}")
        weights[key.lower()] = value if term in cfg.FORGET.TERMS else 0.0
    return weights


# docs/settings.md


def page() -> str:
    """docs/settings.md: every key with its default, its values and its meaning."""
    lines = [
        "# Settings",
        "",
        "Every key of a run, as its code declares it (`python -m engine.config > docs/settings.md`"
        " makes this page).",
        "Set one by its option, by `KEY VALUE` behind the options, or in a YAML file"
        " (`--config-file`).",
        "`configs/datasets/` holds the loss weights of each data set (`FORGET.WEIGHTS`: backbone,"
        " then `SINGLE` or `MULTICLASS`, then `[lamb_preserve, lamb_forget]`),"
        " `configs/trainers/` where a method's default differs from the one below.",
    ]
    options = {key: f"--{name.replace('_', '-')}" for name, key in OPTIONS.items()}
    section = None
    for key, spec in declared().items():
        above = key.rpartition(".")[0]
        if above != section:
            section = above
            lines += ["", f"## {section or 'Run'}", ""]
            lines += ["| key | option | default | values | meaning |", "| --- " * 5 + "|"]
        default = "none" if spec.default is None else spec.default
        default = ", ".join(default) if isinstance(default, tuple) else default
        cells = (f"`{key}`", options.get(key, ""), default, allowed(spec), spec.metadata["help"])
        lines.append(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in cells)} |")
    departures = [
        (file.stem, *pair)
        for file in sorted((CONFIGS / "trainers").glob("*.yaml"))
        for pair in _read(file)
        if pair[0] != "TRAINER.NAME"
    ]
    lines += ["", "## Defaults that differ by method", "", "| method | key | default |"]
    lines += ["| --- " * 3 + "|"]
    lines += [f"| {method} | `{key}` | {value} |" for method, key, value in departures]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from engine.config import page  # the module under its own name

    print(page(), end="")
