"""python -m experiments NAME ...: what was found out. Without a name: the list of names."""

import sys
from functools import partial

from engine.cli import commands

EXPERIMENTS = {
    "sweep": "data sets x backbones x seeds x methods x settings of one file, and their table",
    "flag": "what a flag from names alone catches, and its false alarms, at stated rates",
    "reproduce": "the paper's experiments on your images, its numbers beside those measured",
    "baselines": "every method on the same classes, side by side",
    "requests": "what one to a thousand forgotten classes cost, at once and one after another",
    "gold": "how near each method comes to a model that was trained without the class",
    "attack": "which other words still find a forgotten class, at hand or searched out",
    "hide": "what still finds a class that is forgotten, hidden in an index, or filtered out",
}
cli = partial(commands, "experiments", EXPERIMENTS)  # of arguments: the exit status, 2 if refused

if __name__ == "__main__":
    sys.exit(cli())
