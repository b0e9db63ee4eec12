"""Command lines that answer a mistake with one line on stderr."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any

from engine.log import quiet, screen
from forgetting import cli
from forgetting.errors import ProblemError, shown, unknown
from forgetting.settings import check_value, kind_of


class Parser(cli.Parser):
    """The parser of `clip-forget`, for the log of `engine.log`: `--quiet` leaves results, warnings
    and errors. Positional arguments may stand between options, as CoOp's KEY VALUE pairs do."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        for text in args or ():
            if "\0" in text:  # no file has such a name, and no shell passes it on
                self.error(f"the argument {text!r:.80} holds a NUL character")
        parsed = self.parse_intermixed_args(args, namespace)
        if vars(parsed).pop("quiet"):  # it changes nothing that a command does
            screen.setLevel(logging.WARNING)
        return parsed


def add_setting(
    parser: argparse.ArgumentParser, option: str, owner: type, name: str, **more: Any
) -> None:
    """Add an option for one field of a settings dataclass; the field says default and range."""
    spec = {one.name: one for one in fields(owner)}[name]

    def take(text: str) -> Any:
        kind = kind_of(spec)
        try:
            value = kind(os.path.expanduser(text))
        except ValueError:
            value = text
        try:
            check_value(value, spec, option)
        except ProblemError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    about = spec.metadata["help"].replace("%", "%%")
    if spec.default not in ("", None):
        about += f" (default: {spec.default})"
    parser.add_argument(option, type=take, default=spec.default, help=about, **more)


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number from `low` to `high`."""

    def take(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,30}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low:,} to {high:,}, not {shown(text)}"
            )
        return int(text)

    return take


SEED = whole(0, 2**32 - 1)
COUNT = whole(1, 10**6)


def run(main: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None = None) -> int:
    """`forgetting.cli.run` for commands that log."""
    with quiet(False):  # restores the level that `--quiet` sets
        return cli.run(main, argv, "interrupted; the same command goes on where it stopped")


def commands(package: str, known: Mapping[str, str], argv: Sequence[str] | None = None) -> int:
    """`python -m PACKAGE NAME ...`: the exit status of `main` of the module PACKAGE.NAME.

    Without a name, or with --help, the names are listed.

    Args:
        known: each name, and what it does in one line.
    """
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ""]

    def main(_: object) -> None:
        if name in ("", "-h", "--help"):
            print(f"usage: python -m {package} NAME ... (NAME --help says more)\n")
            width = max(map(len, known))
            print("\n".join(f"  {key:<{width}}  {about}" for key, about in known.items()))
        elif name.startswith("-"):
            raise ProblemError(
                f"{name} comes before the name; first give one of {', '.join(known)}"
            )
        elif name not in known:
            raise unknown(f"name for python -m {package}", name, known)
        else:
            import_module(f"{package}.{name}").main(rest[:-1])

    return run(main)
