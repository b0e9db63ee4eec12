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

from forgetting.errors import ProblemError, unknown

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where it can be had: faster
ANY_DATASET = "other"  # the config of a data set that has none of its own
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
    "keep": "FORGET.KEEP",
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
            ProblemError: of another type, or out of range; with the nearest word if few are allowed.
        """
        kind, _ = TYPES[self.type]
        value = _literal(value, kind)
        missing = value is None and self.default is None
        if missing or (isinstance(value, str) and value in self.choices and kind is not tuple):
            return value
        words = {str: [value], tuple: value}.get(kind, ())
        if self.choices and isinstance(value, kind):
            for word in words:
                if word not in self.choices:
                    raise unknown(self.key, str(word), list(filter(None, self.choices)))
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
            raise ProblemError(
                f"{self.key} must be {self.wanted} ({self.about}), got {value!r:.80}"
            )
        return value

    @property
    def wanted(self) -> str:
        """What a value must be, in words."""
        kind, words = TYPES[self.type]
        if kind in (str, tuple):
            if self.choices:
                some = "one of" if kind is str else "one or more of"
                return f"{some} {', '.join(filter(None, self.choices))}"
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
        for path, value in _flat(read_yaml(file)):
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


def read_yaml(path: Path) -> Mapping[str, Any]:
    """What a YAML file holds; {} if nothing but comments.

    Raises:
        ProblemError: no YAML file by its name (yacs would execute a .py), none that can be read, or a
            key that stands twice in one mapping, of which YAML would drop the first silently.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ProblemError(f"config file {path}: only YAML is read, and its name ends in .yaml")
    try:
        loader = LOADER(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        twice = _twice(loader, node)
        tree = None if node is None or twice else loader.construct_document(node)
    except OSError as error:
        raise ProblemError(f"cannot read config {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ProblemError(f"config file {path}: {' '.join(str(error).split())}") from error
    if twice:
        raise ProblemError(f"config file {path}: {twice}")
    if tree is not None and not isinstance(tree, Mapping):
        raise ProblemError(f"config file {path}: must hold keys and values, such as FORGET: ...")
    return tree or {}


def _twice(loader: yaml.SafeLoader, node: yaml.Node | None) -> str:
    """The first key that a mapping of a YAML tree holds twice, in words; "" if there is none."""
    found, nodes, seen = {}, [node], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        lines: dict[Any, int] = {}
        for pair in node.value if isinstance(node, yaml.MappingNode) else ():
            nodes += pair
            key, line = pair[0], pair[0].start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                merge = key.tag == "tag:yaml.org,2002:merge"  # <<, which stands for no value
                key = key.value if merge else loader.construct_object(key)
                if key in lines:
                    found[line] = f"line {line}: the key {key} stands in line {lines[key]} too"
                lines[key] = line
        nodes += node.value if isinstance(node, yaml.SequenceNode) else ()
    return found[min(found)] if found else ""


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
    for path, value in _flat(read_yaml(file)):
        yield path, value["default"] if isinstance(value, Mapping) else value


# Merging


def settings(
    trainer: str = "", dataset: str = "", backbone: str = "", opts: Sequence[str] = ()
) -> CfgNode:
    """The frozen config of a run of train.py with these names and KEY VALUE pairs.

    A name that is left empty is the default's; without a data set the config is that of one that
    has no file of its own.

    Raises:
        ProblemError: a name, key or value that does not fit.
    """
    names = {"TRAINER.NAME": trainer, "DATASET.NAME": dataset, "MODEL.BACKBONE.NAME": backbone}
    return _merged({key: name for key, name in names.items() if name}, opts)


def setup(args: Namespace) -> CfgNode:
    """The frozen config of a command line: `OPTIONS` (None: not given), `opts` (KEY VALUE pairs),
    `config_file` and `dataset_config_file` (paths, or "").

    Raises:
        ProblemError: a file, key or value that does not fit, with the nearest known key.
    """
    options = {key: getattr(args, name) for name, key in OPTIONS.items()}
    given = {key: value for key, value in options.items() if value is not None}
    cfg = _merged(given, args.opts, args.config_file, args.dataset_config_file)
    name = cfg.DATASET.NAME
    if not name:
        raise ProblemError("no data set: pass --dataset NAME, or --images PATH")
    if name in (".", "..") or "/" in name:
        raise ProblemError(f"a data set's results go to a folder of its name; {name!r} is none")
    return cfg


def check(cfg: CfgNode) -> None:
    """ProblemError unless every declared key of `cfg` has a value of its type and range."""
    for key, setting in declared().items():
        setting.take(value_of(cfg, key))


def value_of(cfg: CfgNode, key: str) -> Any:
    """What `cfg` holds at a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _merged(
    given: Mapping[str, Any], opts: Sequence[str], config_file: str = "", dataset_file: str = ""
) -> CfgNode:
    """The frozen config of options and pairs, which go before a user's file, and so on."""
    from engine import get_cfg_default  # the choice of an engine, which settings do not depend on

    if len(opts) % 2:
        raise ProblemError(f"config keys and values come in pairs, the last has none: {opts[-1]!r}")
    pairs = [*given.items(), *zip(opts[::2], opts[1::2], strict=True)]
    line = [(tuple(key.split(".")), value) for key, value in pairs]
    own = list(_values(Path(config_file))) if config_file else []
    named = dict([*own, *line])  # which decides what is read before it
    trainer = named.get(("TRAINER", "NAME"), declared()["TRAINER.NAME"].default)
    if trainer not in methods():
        raise unknown("trainer", str(trainer), methods())
    folder, dataset = CONFIGS / "datasets", named.get(("DATASET", "NAME"))
    known = [path.stem for path in folder.glob("*.yaml")]
    of_set = Path(dataset_file or folder / f"{dataset if dataset in known else ANY_DATASET}.yaml")
    of_method = CONFIGS / "trainers" / f"{trainer}.yaml"

    flat = dict(_flat(get_cfg_default()))
    for key, setting in declared().items():
        flat[tuple(key.split("."))] = setting.take(setting.default)
    for source, values in (
        (f" (in {of_set})", _values(of_set)),
        (f" (in {of_method})", _values(of_method)),
        (f" (in {config_file})", own),
        ("", line),
    ):
        for parts, value in values:
            if value is None and any(parts == key[: len(parts)] != key for key in flat):
                continue  # a section of which everything is commented out
            try:
                flat[parts] = _taken(flat, parts, value)
            except ProblemError as error:
                raise ProblemError(f"{error}{source}") from error
    return _nested(flat)


def _nested(flat: Mapping[Parts, Any]) -> CfgNode:
    cfg = CfgNode()
    for (*path, leaf), value in flat.items():
        node = cfg
        for part in path:
            if not isinstance(node.get(part), CfgNode):
                node[part] = CfgNode()
            node = node[part]
        node[leaf] = CfgNode() if isinstance(value, dict) else value
    cfg.freeze()
    return cfg


def _taken(known: Mapping[Parts, Any], parts: Parts, value: Any) -> Any:
    """`value` as the config holds it; ProblemError for an unknown key, or a value that it refuses."""
    key = ".".join(parts)
    if key in declared():
        value = declared()[key].take(value)
        if isinstance(value, dict) and value:  # of a command line: a file's is taken apart before
            below, inner = next(_flat(value), ((), value))
            raise ProblemError(
                f"{key} is a section: set what stands in it by its dotted name, such as "
                f"{'.'.join((key, *below))} {inner!r:.80}"
            )
        return value
    if parts in known:  # one of Dassl's own
        kind = type(known[parts])
        value = _literal(value, kind)
        if type(value) is not kind:
            raise ProblemError(f"{key} must be of type {kind.__name__}, got {value!r:.80}")
        return value
    above = (declared().get(".".join(parts[:end])) for end in range(1, len(parts)))
    if any(setting is not None and setting.type == "dict" for setting in above):
        return _literal(value, object)
    # This repository's keys first: they are asked for most.
    keys = sorted(map(".".join, known), key=lambda k: not k.startswith(("FORGET", "TRAINER")))
    raise unknown("config key", key, keys)


# The paper's weights


def paper_weights(cfg: CfgNode) -> dict[str, float | str]:
    """lamb_forget (or "auto"), lamb_preserve and lamb_weight: the command line's, else those of the
    data set for this backbone and mode, else those of a backbone that it does not name. A term that
    `FORGET.TERMS` leaves out has weight zero (the paper's ablation).

    Raises:
        ProblemError: an impossible weight.
    """
    mode = "MULTICLASS" if cfg.FORGET.MULTICLASS else "SINGLE"
    backbone = cfg.MODEL.BACKBONE.NAME
    unlisted = cfg.FORGET.UNLISTED.LAMB_PRESERVE, cfg.FORGET.UNLISTED.LAMB_FORGET
    same = backbone.removesuffix("-quickgelu")  # OpenAI's models compute with that
    pair = cfg.FORGET.WEIGHTS.get(backbone, cfg.FORGET.WEIGHTS.get(same, CfgNode()))
    pair = pair.get(mode, unlisted) if isinstance(pair, CfgNode) else pair
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise ProblemError(
            f"FORGET.WEIGHTS.{backbone}.{mode} must be [lamb_preserve, lamb_forget], got {pair!r}"
        )
    weights = {"LAMB_PRESERVE": pair[0], "LAMB_FORGET": pair[1], "LAMB_WEIGHT": None}
    weights |= {key: cfg.FORGET[key] for key in weights if cfg.FORGET[key] is not None}
    found = {}
    for term in declared()["FORGET.TERMS"].choices:
        key = f"LAMB_{term.upper()}"
        weight = declared()[f"FORGET.{key}"].take(weights[key])
        found[key.lower()] = weight if term in cfg.FORGET.TERMS else 0.0
    return found
