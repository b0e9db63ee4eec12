"""What a run will do, worked out and checked from names alone before anything is encoded."""

from __future__ import annotations

import ast
import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import datasets
from clip.bundle import list_bundles, load_bundle
from engine.schema import Lists, fault
from evaluation.results import SETTINGS
from forgetting.errors import ProblemError

ALL = "all"
LISTS = "forget_cls.py"


@dataclass(frozen=True)
class Plan:
    """One data set's run.

    Attributes:
        requests: lists of class names; each is forgotten at once, from the original model.
        others: the other sets to evaluate on.
        absent: sets of the group that cannot be evaluated, and why.
        protect: names that must not be harmed.
    """

    dataset: str
    requests: list[list[str]]
    others: list[str]
    absent: dict[str, str]
    protect: list[str]


def make_plan(cfg) -> Plan:
    """Check the names of a config and list the work.

    Raises:
        ProblemError: an architecture, data set, folder or class that is not there, with the nearest.
    """
    dataset, backbone = cfg.DATASET.NAME, cfg.MODEL.BACKBONE.NAME
    lists = user_lists()
    if cfg.FEATURES.DIR:
        if cfg.DATASET.IMAGES:
            raise ProblemError(
                "--images needs a model, and --features runs without one; leave one out"
            )
        if cfg.FORGET.SAVE_MODEL or cfg.MODEL.INIT_WEIGHTS or cfg.MODEL.PRECISION != "fp32":
            raise ProblemError(
                "--save-model, --weights and --precision need a model, and --features runs without "
                "one (a bundle has its precision); "
                "use `python -m clip.apply ADAPTER OUT` afterwards"
            )
        classnames = load_bundle(cfg.FEATURES.DIR, backbone, dataset).classnames
        others = [name for name in list_bundles(cfg.FEATURES.DIR, backbone) if name != dataset]
        absent: dict[str, str] = {}
    else:
        images = datasets.load(dataset, cfg.DATASET.ROOT, cfg.DATASET.IMAGES)
        classnames = images.classnames
        group = lists.mini_ds if dataset in lists.mini_ds else lists.all_ds
        states = datasets.available(cfg.DATASET.ROOT)
        wanted = [datasets.spec(name).name for name in group if name != dataset]
        others = [name for name in wanted if states[name] is None]
        listed = wanted if dataset in group else []  # nobody misses them beside a set of one's own
        absent = {name: states[name] for name in listed if states[name] is not None}
    classes = _classes(cfg, classnames, lists.forget_classes_all)
    requests = [classes] if cfg.FORGET.MULTICLASS else [[name] for name in classes]
    requests = _part(requests, cfg.FORGET.PART)
    protect = list(dict.fromkeys([*cfg.FORGET.PROTECT, *getattr(lists, "protect", [])]))
    asked = {datasets.key(name) for name in classes} if ALL not in cfg.FORGET.CLASSES else set()
    for name in protect:
        if datasets.key(name) in asked:
            raise ProblemError(
                f"{name!r} is to be forgotten and to be protected (FORGET.PROTECT); choose one"
            )
        if not name.strip():
            raise ProblemError("a name to protect (FORGET.PROTECT) is empty")
    return Plan(dataset, requests, others, absent, protect)


def _part(requests: list[list[str]], part: str) -> list[list[str]]:
    """Of requests those of a part "i/n", which may be none; all if that is empty."""
    if not part:
        return requests
    number, count = map(int, part.split("/")) if re.fullmatch(r"\d{1,6}/\d{1,6}", part) else (0, 0)
    if not 1 <= number <= count:
        raise ProblemError(
            f"FORGET.PART must be i/n with i from 1 to n, such as 2/4, got {part!r:.80}"
        )
    return requests[number - 1 :: count]


def user_lists() -> ModuleType:
    """The lists of forget_cls.py, which users edit by hand.

    Raises:
        ProblemError: whatever is wrong with it, and in which line.
    """
    try:
        import forget_cls
    except SyntaxError as error:
        if error.filename and Path(error.filename).name == LISTS:
            raise _wrong(error.lineno, error.msg) from error
        raise _wrong(_line_of(error), repr(error)) from error
    except NameError as error:
        raise _wrong(_line_of(error), f"{error}; names of classes stand in quotes") from error
    except (Exception, SystemExit) as error:  # it is a program, and may do anything
        raise _wrong(_line_of(error), repr(error)) from error
    found = fault(Lists, vars(forget_cls))
    if found is not None and not found.path:
        raise _wrong(None, found.wanted.replace("an object with", "it must define"))
    tree = ast.parse(Path(forget_cls.__file__).read_bytes())
    if found is not None:
        where, is_there = " / ".join(map(str, found.path)), type(found.found).__name__
        wanted = found.wanted.replace("an object", "a dict")
        raise _wrong(_place(tree, *found.path), f"{where} must be {wanted}, and is {is_there}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            for place, key in enumerate(keys):
                if key in keys[:place]:
                    raise _wrong(node.lineno, f"the key {key!r} stands twice in one dict")
    return forget_cls


def _wrong(line: int | None, problem: str) -> ProblemError:
    return ProblemError(f"{LISTS}{f', line {line}' if line else ''}: {problem}")


def _line_of(error: BaseException) -> int | None:
    """The line of forget_cls.py that led to an error."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).name == LISTS]
    return lines[-1] if lines else None


def _place(tree: ast.Module, name: str, *path: str | int) -> int | None:
    """The line where an element of a list of the file stands, as near as its text tells; None if
    it does more with the list than assign it."""
    nodes: list[ast.expr] = []
    assigned = 0
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value:
            targets = getattr(statement, "targets", None) or [statement.target]
            if name in [getattr(target, "id", "") for target in targets]:
                nodes = [statement.value]
                assigned += 1
    if assigned < sum(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree)):
        return None
    for key in path if nodes else ():
        node = nodes[-1]
        if isinstance(node, ast.Dict):
            nodes += [
                value
                for known, value in zip(node.keys, node.values, strict=True)
                if isinstance(known, ast.Constant) and known.value == key
            ]
        elif isinstance(node, ast.List) and isinstance(key, int) and key < len(node.elts):
            nodes.append(node.elts[key])
    return nodes[-1].lineno if nodes else None


def _classes(cfg, classnames: list[str], listed: dict[str, list[str]]) -> list[str]:
    """The class names to forget, as the data set spells them."""
    dataset = cfg.DATASET.NAME
    asked = list(cfg.FORGET.CLASSES) or listed.get(dataset, [])
    if not asked:
        raise ProblemError(
            f"no class of {dataset} to forget: add it to forget_cls.py or use --forget NAME"
        )
    if ALL in asked and ALL not in classnames:
        if len(asked) > 1:
            raise ProblemError(f"--forget {ALL} stands for every class of {dataset}; name no other")
        asked = classnames
    classes = list(dict.fromkeys(datasets.match(name, classnames, dataset) for name in asked))
    if cfg.FORGET.MULTICLASS and set(classes) == set(classnames):
        raise ProblemError(
            f"all {len(classnames)} classes of {dataset} at once leave none to retain"
        )
    for name in classes:
        if name == SETTINGS:
            raise ProblemError(f"a class called {SETTINGS!r} has no place in logs.json; rename it")
    return classes
