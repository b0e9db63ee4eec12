"""Command line: one HTML file from a results folder, or from a folder that holds several."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from engine.cli import Parser, run
from engine.log import logger
from evaluation.report import REPORT, read_runs, write_report


def main(argv: Sequence[str] | None = None) -> None:
    """Write a report of what was forgotten: a file that any browser opens, without a network."""
    parser = Parser(prog="python -m evaluation.report", description=main.__doc__)
    parser.add_argument(
        "folder",
        metavar="RUN_FOLDER",
        help="results/resultsATTEMPT/seed_SEED, or a folder with several such below it",
    )
    parser.add_argument("--out", metavar="FILE", help=f"default: RUN_FOLDER/{REPORT}")
    args = parser.parse_args(argv)
    runs = read_runs(args.folder)
    path = write_report(runs, args.out or Path(args.folder) / REPORT)
    classes = sum(len(one.rows) for one in runs)
    audited = sum(bool(row.audit) for one in runs for row in one.rows)
    logger.info(f"report: {path} ({len(runs)} folders, {classes} rows, {audited} of them audited)")
    for one in runs:
        if not any(row.audit for row in one.rows):
            logger.info(f"no audit in {one.folder}; to make it: {one.audit_command}")


if __name__ == "__main__":
    sys.exit(run(main))
