"""What a run will do, worked out and checked from names alone before anything is encoded."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import datasets
from clip.bundle import list_bundles, load_bundle
from datasets.names import entries
from engine.schema import TEXT, check
from evaluation.results import SETTINGS
from forgetting.errors import ProblemError, reason, shown

ALL = "all"
LISTS = "forget_cls.py"
PROMPTS = {str: [TEXT, ...]}  # class name -> its texts
LISTS_SHAPE = {
    "all_ds": [TEXT],
    "mini_ds": [TEXT],
    "forget_classes_all": {str: [TEXT]},
    "forget_prompts?": {str: PROMPTS},
    "protect?": [TEXT],
}


@dataclass(frozen=True)
class Plan:
    """One data set's run.

    Attributes:
        classnames: of the data set, by label.
        requests: lists of class names; each is forgotten at once, from the original model.
        others: the other sets to evaluate on; absent: sets of the group that cannot be, and why.
        protect: names that must not be harmed.
        prompts: class name -> texts by which it is forgotten, in place of its bare name.
        vocabulary: names to retain beside the classes.
    """

    dataset: str
    classnames: list[str]
    requests: list[list[str]]
    others: list[str]
    absent: dict[str, str]
    protect: list[str]
    prompts: dict[str, list[str]]
    vocabulary: list[str]

    @property
    def vocabulary_sha256(self) -> str:
        """A short checksum of the vocabulary."""
        return hashlib.sha256(json.dumps(self.vocabulary).encode()).hexdigest()[:16]


def make_plan(cfg, prompts: dict[str, list[str]]) -> Plan:
    """Check the names of a config and list the work.

    Raises:
        ProblemError: an architecture, data set, folder or class that is not there, with the
        nearest.
    """
    dataset, backbone, lists = cfg.DATASET.NAME, cfg.MODEL.BACKBONE.NAME, user_lists()
    absent: dict[str, str] = {}
    if cfg.FEATURES.DIR:
        model_options = cfg.FORGET.SAVE_MODEL, cfg.MODEL.INIT_WEIGHTS, cfg.DATASET.IMAGES
        if any(model_options) or cfg.MODEL.PRECISION != "fp32":
            raise ProblemError(
                "--images, --save-model, --weights and --precision need a model, and --features "
                "runs without one; leave them out, or use `python -m clip.apply` afterwards"
            )
        bundle = load_bundle(cfg.FEATURES.DIR, backbone, dataset)
        classnames, vocabulary = bundle.classnames, bundle.retain_names
        others = [name for name in list_bundles(cfg.FEATURES.DIR, backbone) if name != dataset]
    else:
        classnames = datasets.load(dataset, cfg.DATASET.ROOT, cfg.DATASET.IMAGES).classnames
        vocabulary = datasets.retain_vocabulary(dataset)
        group = lists.mini_ds if dataset in lists.mini_ds else lists.all_ds
        states = datasets.available(cfg.DATASET.ROOT)
        wanted = [datasets.spec(name).name for name in group if name != dataset]
        others = [name for name in wanted if states[name] is None]
        if dataset in group:  # nobody misses them beside a set of one's own
            absent = {name: states[name] for name in wanted if states[name] is not None}
    classes = _classes(cfg, classnames, lists.forget_classes_all)
    requests = [classes] if cfg.FORGET.MULTICLASS else [[name] for name in classes]
    protect = list(dict.fromkeys([*cfg.FORGET.PROTECT, *getattr(lists, "protect", [])]))
    forgotten = {datasets.key(name) for name in classes} if ALL not in cfg.FORGET.CLASSES else set()
    for name in protect:
        if not name.strip():
            raise ProblemError("a name to protect (FORGET.PROTECT) is empty")
        if datasets.key(name) in forgotten:
            raise ProblemError(
                f"{name!r} is to be forgotten and to be protected (FORGET.PROTECT); choose one"
            )
    requests = _part(requests, cfg.FORGET.PART)
    if cfg.FORGET.RETAIN_NAMES:
        vocabulary = _names_of(Path(cfg.FORGET.RETAIN_NAMES))
    return Plan(dataset, classnames, requests, others, absent, protect, prompts, vocabulary)


def _part(requests: list[list[str]], part: str) -> list[list[str]]:
    """Of requests those of a part "i/n", which may be none; all if that is empty."""
    if not part:
        return requests
    number, count = map(int, part.split("/")) if re.fullmatch(r"\d{1,6}/\d{1,6}", part) else (0, 0)
    if not 1 <= number <= count:
        raise ProblemError(
            f"FORGET.PART must be i/n with i from 1 to n, such as 2/4, got {shown(part)}"
        )
    return requests[number - 1 :: count]


def _names_of(path: Path) -> list[str]:
    """The names in a file, one per line, each once."""
    lines = entries(path, "names to retain (FORGET.RETAIN_NAMES)")
    names = {datasets.key(text): datasets.clean_name(text) for _, text in lines}
    if not names:
        raise ProblemError(f"names to retain (FORGET.RETAIN_NAMES): {path} holds no name")
    return list(names.values())


def _classes(cfg, classnames: list[str], listed: dict[str, list[str]]) -> list[str]:
    """The class names to forget, as the data set spells them."""
    dataset = cfg.DATASET.NAME
    names = list(cfg.FORGET.CLASSES) or listed.get(dataset, [])
    if not names:
        raise ProblemError(f"no class of {dataset} to forget: add it to {LISTS} or use --forget")
    if ALL in names and ALL not in classnames:
        if len(names) > 1:
            raise ProblemError(f"--forget {ALL} stands for every class of {dataset}; name no other")
        names = classnames
    classes = list(dict.fromkeys(datasets.match(name, classnames, dataset) for name in names))
    if cfg.FORGET.MULTICLASS and set(classes) == set(classnames):
        raise ProblemError(
            f"all {len(classnames)} classes of {dataset} at once leave none to retain"
        )
    if SETTINGS in classes:
        raise ProblemError(
            f"a class called {SETTINGS!r} would hide the settings in logs.json; rename it"
        )
    return classes


def user_lists() -> ModuleType:
    """The lists of forget_cls.py, which users edit by hand.

    Raises:
        ProblemError: the file cannot be run, or a list has another type.
    """
    try:
        import forget_cls
    except (Exception, SystemExit) as error:  # it is a program, and may do anything
        hint = "; names of classes need quotes" if isinstance(error, NameError) else ""
        raise ProblemError(f"{LISTS}: {reason(error)}{hint}") from error
    check(vars(forget_cls), LISTS_SHAPE, LISTS)
    return forget_cls
