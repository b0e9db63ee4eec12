"""What a run will do, worked out and checked from names alone before anything is encoded."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import datasets
from clip.bundle import list_bundles, load_bundle
from engine import UserError
from evaluation.results import SETTINGS

ALL = "all"


@dataclass(frozen=True)
class Plan:
    """One data set's run.

    Attributes:
        requests: lists of class names; each is forgotten at once, from the original model.
        others: the other sets to evaluate on.
        absent: sets of the group that cannot be evaluated, and why.
    """

    dataset: str
    requests: list[list[str]]
    others: list[str]
    absent: dict[str, str]


def make_plan(cfg) -> Plan:
    """Check the names of a config and list the work.

    Raises:
        UserError: an architecture, data set, folder or class that is not there, with the nearest.
    """
    dataset, backbone = cfg.DATASET.NAME, cfg.MODEL.BACKBONE.NAME
    lists = user_lists()
    if cfg.FEATURES.DIR:
        if cfg.FORGET.SAVE_MODEL or cfg.MODEL.INIT_WEIGHTS:
            raise UserError(
                "--save-model and --weights need a model, and --features runs without one; "
                "use `python -m clip.apply ADAPTER OUT` afterwards"
            )
        classnames = load_bundle(cfg.FEATURES.DIR, backbone, dataset).classnames
        others = [name for name in list_bundles(cfg.FEATURES.DIR, backbone) if name != dataset]
        absent: dict[str, str] = {}
    else:
        classnames = datasets.load(dataset, cfg.DATASET.ROOT).classnames
        group = lists.mini_ds if dataset in lists.mini_ds else lists.all_ds
        states = datasets.available(cfg.DATASET.ROOT)
        wanted = [datasets.spec(name).name for name in group if name != dataset]
        others = [name for name in wanted if states[name] is None]
        absent = {name: states[name] for name in wanted if states[name] is not None}
    classes = _classes(cfg, classnames, lists.forget_classes_all)
    requests = [classes] if cfg.FORGET.MULTICLASS else [[name] for name in classes]
    return Plan(dataset, requests, others, absent)


def user_lists() -> ModuleType:
    """The lists of forget_cls.py, which users edit by hand; UserError if it does not read."""
    try:
        import forget_cls

        for name, kind in {"all_ds": list, "mini_ds": list, "forget_classes_all": dict}.items():
            if not isinstance(getattr(forget_cls, name, None), kind):
                raise UserError(f"forget_cls.py: {name} must be a {kind.__name__}")
    except SyntaxError as error:
        raise UserError(f"forget_cls.py, line {error.lineno}: {error.msg}") from error
    except NameError as error:
        raise UserError(f"forget_cls.py: {error}; names of classes stand in quotes") from error
    return forget_cls


def _classes(cfg, classnames: list[str], listed: dict[str, list[str]]) -> list[str]:
    """The class names to forget, as the data set spells them."""
    dataset = cfg.DATASET.NAME
    asked = list(cfg.FORGET.CLASSES) or listed.get(dataset, [])
    if not asked:
        raise UserError(
            f"no class of {dataset} to forget: add it to forget_cls.py or use --forget NAME"
        )
    if ALL in asked and ALL not in classnames:
        if len(asked) > 1:
            raise UserError(f"--forget {ALL} stands for every class of {dataset}; name no other")
        asked = classnames
    classes = list(dict.fromkeys(datasets.match(name, classnames, dataset) for name in asked))
    if cfg.FORGET.MULTICLASS and set(classes) == set(classnames):
        raise UserError(f"all {len(classnames)} classes of {dataset} at once leave none to retain")
    for name in classes:
        if name == SETTINGS:
            raise UserError(f"a class called {SETTINGS!r} has no place in logs.json; rename it")
    return classes
