"""`python -m forgetting` is the command `clip-forget`."""

import sys

from forgetting.cli import cli

sys.exit(cli())
