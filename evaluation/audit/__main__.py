"""python -m evaluation.audit RUN_FOLDER ...: is it gone?

Writes audit.json and audit.csv beside the logs of a results folder and prints the table. The
features or images of the run are found where the run had them (args.txt), or where an option says.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from engine.cli import SEED, Parser, run
from evaluation.audit.run import MEASURES, audit_folder
from evaluation.results import PLACES
from evaluation.tables import report_audit


def main(argv: Sequence[str] | None = None) -> None:
    """Audit results folders and print their tables."""
    parser = Parser(prog="python -m evaluation.audit", description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", nargs="+", metavar="RUN_FOLDER", help="results/resultsATTEMPT/seed_SEED"
    )
    for option, metavar, about in (
        ("dataset", "NAME", "only this set (repeatable)"),
        ("forget", "LABEL", "only this label of the logs"),
        ("without", "MEASURE", f"leave one out: {', '.join(MEASURES)}"),
    ):
        several = {"action": "append", "default": []}
        parser.add_argument(f"--{option}", metavar=metavar, help=about, **several)
    parser.add_argument("--seed", type=SEED, default=0, help="of the audit's random choices")
    for key, text in PLACES.items():
        parser.add_argument(f"--{key}", help=f"{text}; default: the run's own")
    args = parser.parse_args(argv)
    places = {key: getattr(args, key) for key in PLACES}
    for folder in map(Path, args.folders):
        found = audit_folder(folder, args.dataset, args.forget, args.without, args.seed, **places)
        report_audit(folder, list(found))


def cli(argv: Sequence[str] | None = None) -> int:
    """`main` for the shell."""
    return run(main, argv)


if __name__ == "__main__":
    sys.exit(cli())
