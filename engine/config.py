"""Settings: YAML is the only place of a default, of a range, and of what a setting means.

`configs/defaults.yaml` declares what all methods share, `configs/trainers/METHOD.yaml` what one
method has of its own. A declaration is a mapping:

    RANK: {default: 5, low: 1, high: 1024, about: "rank of the adapter"}

`low` and `high` belong to the range, `above` and `below` do not; of a text or a list they bound
the length. `choices` are the words that are allowed, of a number beside its range. The type is
that of the default; where that is null, `type` names it. A method's file may also give plain
values to shared keys, as a data set's file does.

A run's settings are merged in CoOp's order: declarations, the data set's file, the method's file,
a file of the user's, the command line. Audits and experiments ask for the same by `settings`.
"""

from __future__ import annotations

import ast
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from engine.errors import UserError, unknown

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where it can be had: faster
ANY_DATASET = "other"  # the config of a data set that has none of its own
AUTO = "auto"  # as FORGET.LAMB_FORGET: just above the weight from which texts reach their target
TYPES = {
    "bool": (bool, "True or False"),
    "int": (int, "a whole number"),
    "float": (float, "a number"),
    "str": (str, "text"),
    "list": (tuple, "a list of texts, written as \"('a', 'b')\" or \"('a',)\""),
    "dict": (dict, "a section"),  # of keys that nobody declares
}
# Options of the command line and the keys that they set.
OPTIONS = {
    "dataset": "DATASET.NAME",
    "root": "DATASET.ROOT",
    "features": "FEATURES.DIR",
    "cache": "FEATURES.CACHE",
    "output_dir": "OUTPUT_DIR",
    "seed": "SEED",
    "trainer": "TRAINER.NAME",
    "backbone": "MODEL.BACKBONE.NAME",
    "weights": "MODEL.INIT_WEIGHTS",
    "forget": "FORGET.CLASSES",
    "target": "FORGET.TARGET",
    "beta": "FORGET.BETA",
    "multiclass": "FORGET.MULTICLASS",
    "overwrite": "FORGET.OVERWRITE",
    "save_model": "FORGET.SAVE_MODEL",
}
Parts = tuple[str, ...]  # of a key


@dataclass(frozen=True)
class Setting:
    """A declared key; the parts of a declaration are explained above."""

    key: str
    default: Any
    type: str
    about: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()

    def take(self, value: Any) -> Any:
        """`value` as the config holds it: text that stands for something else is read as Python
        writes it, a whole number is a number too.

        Raises:
            UserError: of another type, or out of range; with the nearest word if few are allowed.
        """
        kind, _ = TYPES[self.type]
        value = _literal(value, kind)
        if (value is None and self.default is None) or (
            value in self.choices and kind is not tuple
        ):
            return value
        words = {str: [value], tuple: value}.get(kind, ())  # each of them one of the choices
        if isinstance(value, kind) and self.choices:
            for word in words:
                if word not in self.choices:
                    raise unknown(self.key, str(word), self.choices)
        size = len(value) if isinstance(value, str | tuple) else value
        good = (
            isinstance(value, kind)
            and isinstance(value, bool) == (kind is bool)
            and all(isinstance(word, str) and "\0" not in word for word in words)
            and (self.low is None or size >= self.low)
            and (self.high is None or size <= self.high)
            and (self.above is None or size > self.above)
            and (self.below is None or size < self.below)
        )
        if not good:
            raise UserError(f"{self.key} must be {self.wanted} ({self.about}), got {value!r}")
        return value

    @property
    def wanted(self) -> str:
        """What a value must be, in words."""
        kind, words = TYPES[self.type]
        if kind in (str, tuple):
            words = f"one or more of {', '.join(self.choices)}" if self.choices else words
            return f"{words}, not empty" if self.low else words
        low, high, above, below = (
            None if x is None else f"{x:,.12g}"
            for x in (self.low, self.high, self.above, self.below)
        )
        ends = [f"above {above}" if above else f"{low} or more" if low else ""]
        ends += [f"below {below}" if below else f"at most {high}" if high else ""]
        bounds = f"from {low} to {high}" if low and high else " and ".join(filter(None, ends))
        return " or ".join([f"{words} {bounds}".strip(), *self.choices])


def _literal(value: Any, kind: type) -> Any:
    """`value` as `kind` has it: texts of a command line, and 1e-6, which YAML takes for text."""
    if isinstance(value, str):
        try:
            read = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            read = value
        value = read if kind is not str or isinstance(read, str) else value
    if isinstance(value, list) and kind is tuple:
        return tuple(value)
    if type(value) is int and kind is float:
        return float(value) if abs(value) < 1e300 else float("inf")
    return value


# Reading


@cache
def declared() -> dict[str, Setting]:
    """Every declared key: those that all methods share, and each method's own."""
    found = {}
    for file in (CONFIGS / "defaults.yaml", *sorted((CONFIGS / "trainers").glob("*.yaml"))):
        for path, value in _flat(_read(file)):
            if isinstance(value, Mapping):
                key, parts = ".".join(path), dict(value)
                kind = parts.pop("type", None) or _type_name(parts["default"])
                parts["choices"] = tuple(parts.get("choices", ()))
                found[key] = Setting(key=key, type=kind, **parts)
    return found


def methods() -> list[str]:
    """The names of the methods that have a file."""
    return sorted(path.stem for path in (CONFIGS / "trainers").glob("*.yaml"))


def _type_name(value: Any) -> str:
    return "list" if isinstance(value, list) else type(value).__name__


def _read(path: Path) -> Mapping[str, Any]:
    """What a YAML file holds; {} if nothing but comments.

    Raises:
        UserError: no YAML file by its name (yacs would execute a .py), or none that can be read.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"config file {path}: only YAML is read, and its name ends in .yaml")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), LOADER)
    except OSError as error:
        raise UserError(f"cannot read config {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"config file {path}: {' '.join(str(error).split())}") from error
    if tree is not None and not isinstance(tree, Mapping):
        raise UserError(f"config file {path}: must hold keys and values, such as FORGET: ...")
    return tree or {}


def _flat(tree: Mapping[str, Any], above: Parts = ()) -> Iterator[tuple[Parts, Any]]:
    """The keys of a YAML tree as parts, with their values; a declaration is a value."""
    for name, value in tree.items():
        path = (*above, str(name))
        if isinstance(value, Mapping) and "default" not in value:
            yield from _flat(value, path)
        else:
            yield path, value


def _values(file: Path) -> Iterator[tuple[Parts, Any]]:
    """The keys of a file with their values: of a declaration its default."""
    for path, value in _flat(_read(file)):
        yield path, value["default"] if isinstance(value, Mapping) else value


# Merging


def settings(
    trainer: str = "", dataset: str = "", backbone: str = "", opts: Sequence[str] = ()
) -> CfgNode:
    """The frozen config of a run of train.py with these names and KEY VALUE pairs.

    A name that is left empty is the default's; without a data set the config is that of one that
    has no file of its own.

    Raises:
        UserError: a name, key or value that does not fit.
    """
    names = {"TRAINER.NAME": trainer, "DATASET.NAME": dataset, "MODEL.BACKBONE.NAME": backbone}
    return _merged({key: name for key, name in names.items() if name}, opts)


def setup(args: Namespace) -> CfgNode:
    """The frozen config of a command line: `OPTIONS` (None: not given), `opts` (KEY VALUE pairs),
    `config_file` and `dataset_config_file` (paths, or "").

    Raises:
        UserError: a file, key or value that does not fit, with the nearest known key.
    """
    options = {key: getattr(args, name) for name, key in OPTIONS.items()}
    given = {key: value for key, value in options.items() if value is not None}
    cfg = _merged(given, args.opts, args.config_file, args.dataset_config_file)
    if not cfg.DATASET.NAME:
        raise UserError("no data set: pass --dataset NAME")
    return cfg


def check(cfg: CfgNode) -> None:
    """UserError unless every declared key of `cfg` has a value of its type and range."""
    for key, setting in declared().items():
        setting.take(value(cfg, key))


def value(cfg: CfgNode, key: str) -> Any:
    """What `cfg` holds at a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _merged(
    given: Mapping[str, Any], opts: Sequence[str], config_file: str = "", dataset_file: str = ""
) -> CfgNode:
    if len(opts) % 2:
        raise UserError(f"config keys and values come in pairs, the last has none: {opts[-1]!r}")
    pairs = [*given.items(), *zip(opts[::2], opts[1::2], strict=True)]
    line = [(tuple(key.split(".")), value) for key, value in pairs]
    own = list(_values(Path(config_file))) if config_file else []
    names = dict([*own, *line])
    trainer = names.get(("TRAINER", "NAME"), declared()["TRAINER.NAME"].default)
    if trainer not in methods():
        raise unknown("trainer", str(trainer), methods())
    folder, dataset = CONFIGS / "datasets", names.get(("DATASET", "NAME"))
    known = {path.stem for path in folder.glob("*.yaml")}
    of_set = Path(dataset_file or folder / f"{dataset if dataset in known else ANY_DATASET}.yaml")
    of_method = CONFIGS / "trainers" / f"{trainer}.yaml"

    cfg = _defaults()
    for source, values in (
        (of_set, _values(of_set)),
        (of_method, _values(of_method)),
        (config_file, own),
        ("", line),
    ):
        for parts, value in values:
            try:
                _put(cfg, parts, value)
            except UserError as error:
                raise UserError(f"{error} (in {source})" if source else str(error)) from error
    cfg.freeze()
    return cfg


def _defaults() -> CfgNode:
    """A config of every declared key, among Dassl's own where Dassl runs."""
    from engine import get_cfg_default  # the choice of an engine, which settings do not depend on

    cfg = get_cfg_default()
    for key, setting in declared().items():
        node, (*path, leaf) = cfg, key.split(".")
        for part in path:
            node = node.setdefault(part, CfgNode())
        free = setting.type == "dict"
        node[leaf] = CfgNode(new_allowed=True) if free else setting.take(setting.default)
    return cfg


def _put(cfg: CfgNode, parts: Parts, value: Any) -> None:
    """Set a key that is there already, or any key below a section that nobody declares."""
    node, free, key = cfg, False, ".".join(parts)
    for number, part in enumerate(parts):
        setting = declared().get(".".join(parts[: number + 1]))
        free = free or (setting is not None and setting.type == "dict")
        last = number + 1 == len(parts)
        if part not in node:
            if not free:
                raise unknown("config key", key, _keys(cfg))
            node[part] = None if last else CfgNode(new_allowed=True)
        if not last:
            node = node[part]
            if not isinstance(node, CfgNode):
                raise unknown("config key", key, _keys(cfg))
    old = node[part]
    if isinstance(old, CfgNode):
        if value is not None:  # a section of which everything is commented out
            raise UserError(f"{key} is a section; its keys are {', '.join(_keys(old, f'{key}.'))}")
    elif setting is not None:
        node[part] = setting.take(value)
    elif free or old is None:
        node[part] = _literal(value, object)
    else:  # one of Dassl's own
        value = _literal(value, type(old))
        if type(value) is not type(old):
            raise UserError(f"{key} must be of type {type(old).__name__}, got {value!r}")
        node[part] = value


def _keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    """All keys of a config as dotted names, this repository's first: they are asked for most."""
    keys = []
    for name, value in cfg.items():
        full = f"{prefix}{name}"
        keys += _keys(value, f"{full}.") if isinstance(value, CfgNode) else [full]
    return sorted(keys, key=lambda key: not key.startswith(("FORGET", "TRAINER", "DATASET")))


# The paper's weights


def paper_weights(cfg: CfgNode) -> dict[str, float | str]:
    """lamb_forget (or "auto"), lamb_preserve and lamb_weight: the command line's, else those of the
    data set for this backbone and mode. A term that `FORGET.TERMS` leaves out has weight zero (the
    paper's ablation).

    Raises:
        UserError: no weight, or an impossible one.
    """
    mode = "MULTICLASS" if cfg.FORGET.MULTICLASS else "SINGLE"
    backbone, terms = cfg.MODEL.BACKBONE.NAME, declared()["FORGET.TERMS"].choices
    place = f"FORGET.WEIGHTS.{backbone}.{mode}"
    pair = (cfg.FORGET.WEIGHTS.get(backbone) or {}).get(mode) or (None, None)
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise UserError(f"{place} must be [lamb_preserve, lamb_forget], got {pair!r}")
    weights = {"LAMB_PRESERVE": pair[0], "LAMB_FORGET": pair[1], "LAMB_WEIGHT": None}
    weights |= {key: cfg.FORGET[key] for key in weights if cfg.FORGET[key] is not None}
    missing = sorted(key for key, weight in weights.items() if weight is None)
    if missing:
        raise UserError(
            f"no {' and '.join(missing)} for {backbone} ({mode}) in the config of "
            f"{cfg.DATASET.NAME} (FORGET.WEIGHTS); add them there or pass "
            + " ".join(f"FORGET.{key} NUMBER" for key in missing)
        )
    found = {}
    for term in terms:
        key = f"LAMB_{term.upper()}"
        weight = declared()[f"FORGET.{key}"].take(weights[key])
        found[key.lower()] = weight if term in cfg.FORGET.TERMS else 0.0
    return found
