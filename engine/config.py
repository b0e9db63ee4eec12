"""The config of a run: dataclass fields declare its keys, YAML and the command line fill it.

A class here is a section; a key is a field's name in capitals behind the section's, with a dot for
two underscores (FORGET.RANK). A method's own constants are those of its `settings_type`
(TRAINER.FORGETLORA.LR). `python -m engine.config` prints docs/settings.md.
"""

import ast
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field, dataclass, fields
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from engine.files import read_text
from engine.log import logger
from forgetting.errors import ProblemError, nearest, shown, unknown
from forgetting.settings import allowed, check_value, kind_of, setting

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
WEIGHTS = "FORGET.WEIGHTS"  # backbone -> mode -> [lamb_preserve, lamb_forget]; not a single setting
AUTO = ("auto",)
UNLISTED = (0.3, "auto")  # of a backbone that is not named there
MODES = ("SINGLE", "MULTICLASS")
TERMS = ("forget", "preserve", "weight")  # of the paper's loss
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
NO_EFFECT = "without effect here, where no image trains anything"


@dataclass(frozen=True)
class RunSettings:
    output_dir: str = setting("output", "folder of the results", low=1)
    seed: int = setting(0, "seed (unused by ForgetExact); Dassl's -1 is refused", 0, 2**32 - 1)
    log: str = setting(
        "",
        "also send the numbers of logs.json, and a descent's objective, to tensorboard or wandb",
        choices=("", "tensorboard", "wandb"),
    )
    use_cuda: bool = setting(True, "use a GPU where there is one")
    trainer__name: str = setting("ForgetLoRA", "name of the method, such as ForgetExact")


@dataclass(frozen=True)
class DatasetSettings:
    name: str = setting("", "name of the data set")
    root: str = setting("data", "folder that holds the image sets", low=1)
    images: str = setting("", "your own images: a folder per class, or a CSV of path and class")
    template: str = setting("", "evaluation prompt, {} for the class; empty: the data set's own")


@dataclass(frozen=True)
class LoaderSettings:
    num_workers: int | None = setting(None, "processes that load images; none: by cores", 0, 128)
    test__batch_size: int | None = setting(
        None, "images that are encoded at once; none: 32 on a CPU, 256 on a GPU", 1, 65536
    )


@dataclass(frozen=True)
class ModelSettings:
    precision: str = setting(
        "fp32",
        "arithmetic of the image encoder; bf16 and fp16 are faster where the hardware has them, "
        "and change embeddings a little",
        choices=("fp32", "bf16", "fp16"),
    )
    init_weights: str = setting("", "checkpoint of the backbone; empty: download")
    backbone__name: str = setting(
        "RN50", "RN50, ViT-B/16, ViT-L/14, ..., mini, open_clip:NAME[/PRETRAINED] or hf:DIR", low=1
    )


@dataclass(frozen=True)
class FeatureSettings:
    dir: str = setting("", "folder of feature bundles: no model, no images")
    cache: str = setting("cache", "folder for weights and encoded features", low=1)


@dataclass(frozen=True)
class ForgetSettings:
    """What is forgotten, from which inputs, and the constants that methods share."""

    classes: tuple[str, ...] = setting(
        (), "class to forget (repeatable), or all; without one: the list of forget_cls.py"
    )
    multiclass: bool = setting(False, "forget all classes at once")
    part: str = setting("", "i/n: of the requests every n-th from the i-th on; empty: all")
    overwrite: bool = setting(False, "do classes again that are done")
    protect: tuple[str, ...] = setting(
        (), "name that must not be harmed (repeatable); beside those of protect in forget_cls.py"
    )
    prompts: str = setting("", "JSON file, class -> texts; empty: forget_prompts of forget_cls.py")
    retain_names: str = setting("", "file of names to retain; empty: the data set's vocabulary")
    target: str = setting(
        "", "where texts are sent: specific, opposite, orthogonal, empty, text:TEXT or vector:FILE"
    )
    beta: float = setting(
        0.1, "how far past 0 opposite and specific go; ForgetExact starts at 0", above=-1, high=1e6
    )
    similarity: float = setting(
        0.95, "cosine with a forgotten text from which on a name is not retained", above=0, high=1
    )
    terms: tuple[str, ...] = setting(
        TERMS, "terms of the paper's loss; leave one out to switch it off", low=1, choices=TERMS
    )
    lamb_preserve: float | None = setting(None, "weight of retained texts; none: WEIGHTS", 0, 1e6)
    lamb_forget: float | str | None = setting(
        None, "weight of the texts; auto: just enough for the target; none: WEIGHTS", 0, 1e6, AUTO
    )
    lamb_weight: float = setting(1.0, "weight of the size of the change", 0, 1e6)
    rank: int = setting(5, "rank of the adapter", 1, 1024)
    alpha: float = setting(1.0, "scale of the adapter: times alpha / rank", 1e-6, 1e6)
    noise_std: float = setting(0.5, "noise on an empty prompt near a class to forget", 0, 1e6)


SECTIONS = {
    "": RunSettings,
    "DATASET": DatasetSettings,
    "DATALOADER": LoaderSettings,
    "MODEL": ModelSettings,
    "FEATURES": FeatureSettings,
    "FORGET": ForgetSettings,
}


@cache
def declared() -> dict[str, Field]:
    """Every key of the config, and the dataclass field that declares it."""
    from trainers import METHODS  # above this package: each method declares its own constants

    types = {name: vars(method).get("settings_type") for name, method in METHODS.items()}
    own = {f"TRAINER.{name.upper()}": cls for name, cls in types.items() if cls is not None}
    return {
        f"{section}.{spec.name.upper()}".lstrip(".").replace("__", "."): spec
        for section, cls in (SECTIONS | own).items()
        for spec in fields(cls)
        if "help" in spec.metadata
    }


def extend_cfg(cfg: CfgNode) -> None:
    """Add every key of this project to a config, such as Dassl's `get_cfg_default()`, with its
    default; of keys that are Dassl's too (SEED, DATASET.ROOT, ...) the default becomes ours."""
    for key, spec in declared().items():
        _set(cfg, key.split("."), spec.default)
    cfg.FORGET.WEIGHTS = CfgNode(new_allowed=True)


def settings(
    trainer: str = "", dataset: str = "", backbone: str = "", opts: Sequence[str] = ()
) -> CfgNode:
    """The frozen config of a run with these names, or without one the default's."""
    names = {"TRAINER.NAME": trainer, "DATASET.NAME": dataset, "MODEL.BACKBONE.NAME": backbone}
    return load({key: name for key, name in names.items() if name}, opts)


def load(
    given: Mapping[str, Any],
    opts: Sequence[str] = (),
    config_file: str = "",
    dataset_config_file: str = "",
) -> CfgNode:
    """The frozen config of a run from options (key -> value), KEY VALUE pairs, and YAML files of
    the user's; ProblemError for what does not fit, with the nearest known key.

    Layers, each over the one before, in CoOp's order: defaults, `configs/datasets/DATASET.yaml`, a
    `dataset_config_file`, the method's own defaults, a `config_file`, options and pairs.
    """
    from engine import get_cfg_default  # Dassl's where it is installed
    from trainers import METHODS

    if len(opts) % 2:
        raise ProblemError(f"config keys and values come in pairs, the last has none: {opts[-1]!r}")
    line = [*given.items(), *zip(opts[::2], opts[1::2], strict=True)]
    of_set, of_user = _read(dataset_config_file), _read(config_file)
    # These two names decide which of our defaults hold.
    named = dict([*of_set, *of_user, *line])
    trainer = str(named.get("TRAINER.NAME", RunSettings().trainer__name))
    if trainer not in METHODS:
        raise unknown("trainer", trainer, METHODS)
    dataset = str(named.get("DATASET.NAME", ""))
    ours = {path.stem: path for path in CONFIGS.glob("datasets/*.yaml")}

    cfg = get_cfg_default()
    extend_cfg(cfg)
    _merge(cfg, _read(ours.get(dataset, ours["other"])))  # if it has none of its own
    _merge(cfg, of_set, dataset_config_file)
    _merge(cfg, METHODS[trainer].defaults.items())
    _merge(cfg, of_user, config_file)
    _merge(cfg, line)
    cfg.DATASET.NAME = dataset
    cfg.freeze()
    return cfg


def check(cfg: CfgNode) -> None:
    """Raise ProblemError unless every key of `cfg` has a value of its type and range."""
    for key, spec in declared().items():
        check_value(attrgetter(key)(cfg), spec, key)


def _set(cfg: CfgNode, path: Sequence[str], value: Any) -> None:
    *above, leaf = path
    for part in above:
        cfg = cfg.setdefault(part, CfgNode())
    cfg[leaf] = value


def _merge(cfg: CfgNode, pairs: Iterable[tuple[str, Any]], file: str = "") -> None:
    """Set keys of `cfg`; log which a `file` of the user's sets, and which have no effect."""
    keys, where = declared(), f" (in {file})" if file else ""
    idle = [key for key, _ in pairs if file and OF_DASSL.fullmatch(key)]
    pairs = [(key, value) for key, value in pairs if key not in idle]
    for key, value in pairs:
        if key in keys:
            value = _coerce(value, keys[key])
            try:
                check_value(value, keys[key], key)
            except ProblemError as error:
                raise ProblemError(f"{error}{where}") from error
            _set(cfg, key.split("."), value)
        elif key.startswith(f"{WEIGHTS}."):
            backbone, _, mode = key.removeprefix(f"{WEIGHTS}.").rpartition(".")
            if not backbone or mode not in MODES:
                raise ProblemError(f"{key} must be {WEIGHTS}.BACKBONE.SINGLE or MULTICLASS{where}")
            _set(cfg.FORGET.WEIGHTS, [backbone, mode], _literal(value))
        elif OF_DASSL.fullmatch(key):
            raise ProblemError(f"{key}, a key of Dassl's or CoOp's, is {NO_EFFECT}")
        elif value is not None or not any(one.startswith(f"{key}.") for one in (*keys, WEIGHTS)):
            close = nearest(key, [*keys, f"{WEIGHTS}.BACKBONE.SINGLE"])
            meant = f"; did you mean {' or '.join(close[:2])}?" if close else ""
            raise ProblemError(f"unknown config key {shown(key)}{meant} (docs/settings.md){where}")
    if file and pairs:
        logger.info(f"{file} sets {', '.join(dict(pairs))}")
    if idle:
        logger.warning(f"{file}: {NO_EFFECT}: {', '.join(idle)}")


def _literal(value: Any) -> Any:
    """A text of the command line as Python reads it; YAML's lists as tuples."""
    if isinstance(value, str):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(value)
    return tuple(value) if isinstance(value, list) else value


def _coerce(value: Any, spec: Field) -> Any:
    """`value` as the setting holds it: 1e-6, which YAML takes for text, texts of the line, ~."""
    kind = kind_of(spec)
    if kind is str and isinstance(value, str):
        return os.path.expanduser(value)
    value = _literal(value)
    if kind is tuple and isinstance(value, str):
        return (value,)
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 1e300 else float("inf")
    return value


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, and aliases, by which a small file may be huge."""

    def compose_node(self, parent: yaml.Node, index: int) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key} stands twice in one mapping")
        return node


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; {} if there is nothing but comments. ProblemError for a
    file of another name (yacs would execute a .py), or one that cannot be read."""
    path = Path(os.path.expanduser(path))
    if path.suffix not in (".yaml", ".yml"):
        raise ProblemError(f"config file {path}: only YAML is read, and its name ends in .yaml")
    text = read_text(path, "config file")
    try:
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


def paper_weights(cfg: CfgNode) -> dict[str, float | str]:
    """The paper's lamb_forget (or "auto"), lamb_preserve and lamb_weight: the command line's, else
    those of the data set for this backbone and mode, else those of a backbone that it does not
    name. A term that `FORGET.TERMS` leaves out has weight zero (the paper's ablation)."""
    mode, backbone = MODES[cfg.FORGET.MULTICLASS], cfg.MODEL.BACKBONE.NAME
    same = backbone.removesuffix("-quickgelu")  # OpenAI's models compute with that
    listed = cfg.FORGET.WEIGHTS.get(backbone, cfg.FORGET.WEIGHTS.get(same, {}))
    pair = listed.get(mode, UNLISTED)
    if not isinstance(pair, tuple | list) or len(pair) != 2:  # a list where yacs merged the file
        raise ProblemError(
            f"{WEIGHTS}.{backbone}.{mode} must be [lamb_preserve, lamb_forget], not {shown(pair)}"
        )
    weights = {"lamb_forget": pair[1], "lamb_preserve": pair[0], "lamb_weight": None}
    for (name, weight), term in zip(weights.items(), TERMS, strict=True):
        key = f"FORGET.{name.upper()}"
        spec, given = declared()[key], attrgetter(key)(cfg)
        weight = _coerce(weight if given is None else given, spec)
        check_value(weight, spec, key)
        weights[name] = weight if term in cfg.FORGET.TERMS else 0.0
    return weights


PAGE = """# Settings

Every key of a run and what it may hold, made by `python -m engine.config > docs/settings.md`.
Set a key by its option, by `KEY VALUE` after all options, or in a YAML file (`--config-file`).
`configs/datasets/` holds the loss weights of each data set, `[lamb_preserve, lamb_forget]`, under
`FORGET.WEIGHTS.BACKBONE.SINGLE` and `FORGET.WEIGHTS.BACKBONE.MULTICLASS`.

| key | option | default | values | meaning |
| --- | --- | --- | --- | --- |
"""


def page() -> str:
    """docs/settings.md: every key with its default, its values and its meaning."""
    from trainers import METHODS

    lines = [PAGE.rstrip()]
    options = {key: f"--{name.replace('_', '-')}" for name, key in OPTIONS.items()}
    for key, spec in declared().items():
        default = "none" if spec.default is None else spec.default
        default = ", ".join(default) if isinstance(default, tuple) else default
        cells = (f"`{key}`", options.get(key, ""), default, allowed(spec), spec.metadata["help"])
        lines.append(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in cells)} |")
    lines += ["", "Methods with other defaults:", ""]
    lines += ["| method | defaults |", "| --- | --- |"]
    for name, method in METHODS.items():
        others = [f"`{key} {value}`" for key, value in method.defaults.items()]
        lines += [f"| {name} | {', '.join(others)} |"] if others else []
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
