"""`python -m datasets.download NAME`: an image set from its public address, by torchvision.

torchvision knows the addresses and checksums. The images end up where the table looks for them,
beside CoOp's layout; its split files must still be fetched by hand (DATASETS.md). What is there
already is kept.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.cli import Parser, add_setting, run
from engine.config import DatasetSettings
from forgetting.errors import ProblemError
from forgetting.io import atomic_path

from .check import report
from .mini import render
from .table import NAMES, SETS, SetSpec, spec

BY_HAND = "get it by hand, as DATASETS.md says"


def download(row: SetSpec, root: Path) -> None:
    """Fetch a set to its folder under `root`; ProblemError says why torchvision cannot."""
    import torchvision.datasets  # a second, which no other reading of a set needs

    folder = root / row.folder
    folder.mkdir(parents=True, exist_ok=True)
    is_cifar = row.torchvision.startswith("CIFAR")
    # ImageNet's archives must be put there by hand: torchvision only unpacks them.
    how = {"split": "val"} if row.torchvision == "ImageNet" else {"download": True}
    try:
        images = getattr(torchvision.datasets, row.torchvision)(
            folder, **how, **({"train": False} if is_cifar else {})
        )
    except Exception as error:  # of the network, of archives, of Google Drive
        reason = " ".join((str(error) or type(error).__name__).split())
        raise ProblemError(f"{row.name} cannot be fetched ({reason:.300}); {BY_HAND}") from error
    if is_cifar and not row.images(folder).is_dir():
        with atomic_path(row.images(folder)) as whole:  # a folder for each class
            for number, (image, label) in enumerate(images):
                place = whole / images.classes[label]
                place.mkdir(parents=True, exist_ok=True)
                image.save(place / f"{number:05d}.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch the sets that are named, and print what `datasets.check` finds; the exit status."""
    parser = Parser(prog="python -m datasets.download", description=__doc__.splitlines()[0])
    fetched = [row.name for row in SETS.values() if row.torchvision]
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join([*fetched, *NAMES]))
    add_setting(parser, "--root", DatasetSettings, "root")
    options = parser.parse_args(arguments)
    rows = [spec(name) for name in options.names]
    for row in rows:
        if not row.torchvision and not row.rendered:
            raise ProblemError(f"{row.name} cannot be fetched; {BY_HAND}")
    root, states = Path(os.path.expanduser(options.root)), []
    for row in rows:
        render(row.name, root / row.folder) if row.rendered else download(row, root)
        states.append(report(row, root))
    return int(any(state != "present" for state in states))


if __name__ == "__main__":
    sys.exit(run(main))
