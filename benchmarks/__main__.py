"""python -m benchmarks NAME ...: what is timed. Without a name: the list of names."""

import sys
from functools import partial

from engine.cli import commands

BENCHMARKS = {
    "driver": "a whole run of train.py and its audit, for 100 to 4,000 classes, by part",
    "solver": "the solvers: many requests together, against descents, in growth",
}
cli = partial(commands, "benchmarks", BENCHMARKS)  # of arguments: the exit status, 2 if refused

if __name__ == "__main__":
    sys.exit(cli())
