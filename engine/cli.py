"""Command lines that answer a mistake with one line on stderr."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import Field
from importlib import import_module
from typing import Any

from engine.log import quiet, screen
from forgetting import cli
from forgetting.errors import ProblemError, unknown
from forgetting.settings import check_value, kind_of


class Parser(cli.Parser):
    """The parser of `clip-forget`; `--quiet` leaves results, warnings and errors. Positional
    arguments may stand between options, as CoOp's KEY VALUE pairs do."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        parsed = self.parse_intermixed_args(args, namespace)
        if vars(parsed).pop("quiet"):  # it changes nothing that a command does
            screen.setLevel(logging.WARNING)
        return parsed


def about(spec: Field) -> str:
    """The help of an option for a field of a settings dataclass."""
    default = "" if spec.default in ("", None, (), False) else f" (default: {spec.default})"
    return spec.metadata["help"].replace("%", "%%") + default


def add_setting(
    parser: argparse.ArgumentParser, option: str, owner: type, name: str, **more: Any
) -> None:
    """Add an option for one field of a settings dataclass; the field says default and range."""
    spec = owner.__dataclass_fields__[name]

    def take(text: str) -> Any:
        value: Any = os.path.expanduser(text)
        with suppress(ValueError):  # which the check refuses
            value = kind_of(spec)(value)
        try:
            check_value(value, spec, option)
        except ProblemError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    parser.add_argument(option, type=take, default=spec.default, help=about(spec), **more)


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number from `low` to `high`."""

    def take(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,30}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low:,} to {high:,}")
        return int(text)

    return take


SEED = whole(0, 2**32 - 1)
COUNT = whole(1, 10**6)


def run(main: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None = None) -> int:
    """`forgetting.cli.run` for commands that log."""
    with quiet(False):  # restores the level that `--quiet` sets
        return cli.run(main, argv, "interrupted; the same command goes on where it stopped")


def commands(package: str, known: Mapping[str, str], argv: Sequence[str] | None = None) -> int:
    """`python -m PACKAGE NAME ...`: the exit status of `main` of the module PACKAGE.NAME. `known`:
    each name, and what it does in one line; listed without a name, or with --help."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]

    def main(_: object) -> None:
        if name in ("-h", "--help"):
            print(f"usage: python -m {package} NAME ... (NAME --help says more)\n")
            for key, text in known.items():
                print(f"  {key:<12}  {text}")
        elif name not in known:
            raise unknown(f"name for python -m {package}", name, known)
        else:
            import_module(f"{package}.{name}").main(rest)

    return run(main)
