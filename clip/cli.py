"""Command lines that answer a mistake with one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from engine.errors import UserError, unknown


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, with the nearest option for an unknown one."""

    def __init__(self, **settings: Any) -> None:
        # A prefix that happens to be unique today is a mistyped option tomorrow.
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        parsed, rest = self.parse_known_args(args, namespace)
        options = [text for action in self._actions for text in action.option_strings]
        for text in rest:
            if text.startswith("-"):
                raise unknown("option", text.split("=")[0], options)
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return parsed


def run(main: Callable[[], None]) -> int:
    """Exit status of `main`; what the user must know of a failure is one line on stderr."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or 'files'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
