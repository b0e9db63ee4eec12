"""Command line: one HTML file from a results folder, or from a folder that holds several."""

import sys
from collections.abc import Sequence
from pathlib import Path

from engine.cli import Parser, run
from engine.log import logger
from evaluation.report.page import write_report
from evaluation.report.runs import read_methods
from evaluation.results import REPORT


def main(argv: Sequence[str] | None = None) -> None:
    """Write a report of what was forgotten: a file that any browser opens, without a network."""
    parser = Parser(prog="python -m evaluation.report", description=main.__doc__)
    about = "results/resultsATTEMPT/seed_SEED, or a folder with several such below it"
    parser.add_argument("folder", metavar="RUN_FOLDER", help=about)
    parser.add_argument("--out", metavar="FILE", help=f"default: RUN_FOLDER/{REPORT}")
    args = parser.parse_args(argv)
    methods = read_methods(args.folder)
    path = write_report(methods, args.out or Path(args.folder) / REPORT)
    logger.info(f"report: {path} ({', '.join(method.label for method in methods)})")


if __name__ == "__main__":
    sys.exit(run(main))
