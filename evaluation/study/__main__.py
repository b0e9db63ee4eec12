"""python -m evaluation.study NAME --features DIR: the paper's studies on feature bundles.

Writes OUT/BACKBONE/DATASET/NAME.csv and NAME.png. Rows that are in the CSV already, made from the
same constants and bundles, are not made again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from engine.cli import Parser, run
from engine.determinism import one_thread
from engine.errors import UserError, unknown
from evaluation.study.run import make_jobs, perform, table_of
from evaluation.study.solvers import SOLVERS
from evaluation.study.studies import STUDIES
from forgetting import ProblemError

ALL = "all"


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Run studies; returns the CSV files.

    Raises:
        UserError: a name, folder or number that does not fit, before any work.
        ProblemError: numbers that no solver can work on.
    """
    parser = Parser(prog="python -m evaluation.study", description=__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(STUDIES)} or {ALL}")
    parser.add_argument("--features", required=True, help="folder of feature bundles")
    parser.add_argument("--backbone", default="ViT-B/32", help="backbone of the bundles")
    parser.add_argument("--dataset", help="the set to forget from; default: each in turn")
    parser.add_argument("--classes", type=int, default=5, help="how many random classes")
    parser.add_argument(
        "--forget",
        action="append",
        default=[],
        metavar="NAME",
        help="a class instead of random ones (repeatable), or all",
    )
    parser.add_argument(
        "--solver",
        action="append",
        default=[],
        metavar="SOLVER",
        help=f"only this one of {', '.join(SOLVERS)} (repeatable)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of classes, names and descents")
    parser.add_argument("--out", type=Path, default=Path("studies"), help="folder of the tables")
    args = parser.parse_args(argv)
    if args.name not in (*STUDIES, ALL):
        raise unknown("study", args.name, [*STUDIES, ALL])
    for solver in args.solver:
        if solver not in SOLVERS:
            raise unknown("solver", solver, SOLVERS)
    if args.seed < 0 or args.classes < 1:
        raise UserError("--seed must be 0 or more and --classes 1 or more")
    jobs = make_jobs(args)
    names = list(STUDIES) if args.name == ALL else [args.name]
    work = [(name, job, table_of(args.out, name, job)) for job in jobs for name in names]
    for _, _, table in work:
        table.read()  # a file that is no table is refused before work
    with one_thread():
        for name, job, table in work:
            perform(name, job, table, args.solver or list(SOLVERS))
    return [table.path for _, _, table in work]


def cli(argv: Sequence[str] | None = None) -> int:
    """`main` for the shell."""
    return run(main, argv, refusals=(ProblemError,))


if __name__ == "__main__":
    sys.exit(cli())
