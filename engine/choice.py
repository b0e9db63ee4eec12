"""Which engine runs: Dassl or the built-in one."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, TracebackType

from engine.errors import UserError, unknown

VARIABLE = "CLIP_FORGET_ENGINE"
ENGINES = ("dassl", "builtin")


@dataclass(frozen=True)
class Choice:
    """The engine that was chosen: its name, the module that offers its names, a log line."""

    name: str
    module: ModuleType
    description: str


@cache
def choose() -> Choice:
    """The engine of this process, by `CLIP_FORGET_ENGINE` or by what imports.

    Raises UserError if the variable has another value, or asks for a Dassl that does not import.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in ENGINES:
        raise _refusal(f"{VARIABLE}: {unknown('engine', wanted, ENGINES)}")
    if wanted == "builtin":
        return _builtin(f"{VARIABLE}=builtin")
    trouble = _trouble_with_dassl()
    if not trouble:
        dassl = import_module("dassl")
        where = os.path.dirname(dassl.__file__)
        description = f"engine: Dassl {dassl.__version__} ({where})"
        return Choice("dassl", import_module("engine.on_dassl"), description)
    if wanted == "dassl":
        raise _refusal(
            f"{VARIABLE}=dassl, but {trouble}; put Dassl on PYTHONPATH or unset the variable"
        )
    return _builtin(trouble)


def _builtin(reason: str) -> Choice:
    return Choice("builtin", import_module("engine.builtin"), f"engine: builtin ({reason})")


def _trouble_with_dassl() -> str:
    """Why Dassl cannot be used, in one line; empty if it can."""
    found = find_spec("dassl")
    if found is None or found.origin is None:  # a bare folder of that name has no origin
        return "Dassl is not installed"
    try:
        import_module("engine.on_dassl")
    except Exception as error:  # its pinned requirements of 2019 fail in many ways
        lines = str(error).splitlines() or [""]
        return f"Dassl does not import ({type(error).__name__}: {lines[0]})"
    return ""


def _refusal(message: str) -> UserError:
    """The error of a choice that cannot be met, which also prints as one line if nobody catches it.

    Modules import the engine's names at their top, before any `main` could catch it there.
    """
    usual = sys.excepthook

    def one_line(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            usual(kind, error, trace)

    sys.excepthook = one_line
    return UserError(message)
