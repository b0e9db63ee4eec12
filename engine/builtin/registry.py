"""Registries of trainers, data sets and evaluators by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from yacs.config import CfgNode

from engine.errors import UserError, unknown


class UnknownName(UserError, KeyError, ValueError):
    """No object of that name: a UserError, and what Dassl raises (KeyError from `Registry.get`,
    ValueError from `build_*`) for code written against Dassl."""

    __str__ = Exception.__str__  # KeyError's would put the message in quotes


class Registry:
    """Objects by their `__name__`. `register` works as a decorator and as a call."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._objects: dict[str, Any] = {}

    def register(self, obj: Any = None, force: bool = False) -> Any:
        """Register `obj`, or return a decorator; KeyError if the name is taken and not `force`."""

        def add(thing: Any) -> Any:
            name = thing.__name__
            if name in self._objects and not force:
                raise KeyError(f"{name!r} is already registered in {self._name}")
            self._objects[name] = thing
            return thing

        return add if obj is None else add(obj)

    def get(self, name: str) -> Any:
        """The object of that name; UnknownName with the nearest names if there is none."""
        if name not in self._objects:
            raise UnknownName(str(unknown(self._name.lower(), name, self._objects)))
        return self._objects[name]

    def registered_names(self) -> list[str]:
        """All names, in order of registration."""
        return list(self._objects)


TRAINER_REGISTRY = Registry("TRAINER")
DATASET_REGISTRY = Registry("DATASET")
EVALUATOR_REGISTRY = Registry("EVALUATOR")


def _builder(
    registry: Registry, kind: str, setting: Callable[[CfgNode], str]
) -> Callable[..., Any]:
    def build(cfg: CfgNode, **kwargs: Any) -> Any:
        name = setting(cfg)
        chosen = registry.get(name)
        if cfg.VERBOSE:
            print(f"Loading {kind}: {name}")
        return chosen(cfg, **kwargs)

    build.__name__ = f"build_{kind}"
    build.__doc__ = f"The {kind} that `cfg` names, made with `cfg`; UnknownName if there is none."
    return build


build_trainer = _builder(TRAINER_REGISTRY, "trainer", lambda cfg: cfg.TRAINER.NAME)
build_dataset = _builder(DATASET_REGISTRY, "dataset", lambda cfg: cfg.DATASET.NAME)
build_evaluator = _builder(EVALUATOR_REGISTRY, "evaluator", lambda cfg: cfg.TEST.EVALUATOR)
