"""python -m evaluation.audit RUN_FOLDER ...: measure what is left of the forgotten classes.

Writes DATASET/LABEL.audit.json beside each adapter, audit.json and audit.csv of all, and prints the
table. An audit that was interrupted goes on where it was.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from engine.cli import SEED, Parser, add_setting, run
from evaluation.audit.inputs import Places
from evaluation.audit.record import MEASURES
from evaluation.tables import report_audit


def main(argv: Sequence[str] | None = None) -> None:
    """Audit results folders and print their tables."""
    parser = Parser(prog="python -m evaluation.audit", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="RUN_FOLDER", help="results/.../seed_SEED")
    several = {"action": "append", "default": []}
    parser.add_argument("--dataset", help="only this set (repeatable)", **several)
    parser.add_argument("--forget", metavar="LABEL", help="only this label (repeatable)", **several)
    parser.add_argument("--without", choices=MEASURES, help="leave this one out", **several)
    parser.add_argument("--seed", type=SEED, default=0, help="of the audit's random choices")
    names = [place.name for place in fields(Places)]
    for name in names:
        add_setting(parser, f"--{name}", Places, name)
    args = parser.parse_args(argv)
    from evaluation.audit.run import audit_folder  # scikit-learn: not for --help

    places = Places(**{name: getattr(args, name) for name in names})
    for folder in map(Path, args.folders):
        audits = audit_folder(folder, args.dataset, args.forget, args.without, args.seed, places)
        report_audit(folder, args.dataset or list(audits))


if __name__ == "__main__":
    sys.exit(run(main))
