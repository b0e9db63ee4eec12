"""`python -m datasets.check ROOT`, or `--images PATH`: which image sets are there, what is broken.

Opens every image that a set's split names. Writes nothing. Exit status 1 if something that is
present is broken, 2 if there is no such root; 0 otherwise, also where sets are absent.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.cli import Parser, run
from engine.log import progress
from forgetting.errors import ProblemError

from .reader import absent, locate, read_image
from .table import SETS, SetSpec, own_images, spec


def check(row: SetSpec, root: Path) -> tuple[str, list[str]]:
    """Look at one set under `root`, image by image.

    Returns:
        "present", "missing" or "broken", and lines on it: a summary, then each broken thing by
        name, then how to mend it.
    """
    get_images, get_split = _advice(row)
    if not (root / row.folder).is_dir():
        return "missing", [absent(row, root) or "not drawn yet; no download is needed", *get_images]
    try:
        located = locate(row, root)
    except ProblemError as error:
        reason = str(error).removeprefix(f"data set {row.name}: ")
        return "broken", [reason, *get_images, *get_split]
    split, images = located.split, located.images
    missing = split.missing(images)
    files = [images / path for path in split.paths() if path not in set(missing)]
    problems = [f"missing: {images / path}" for path in sorted(missing)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = progress(pool.map(_unreadable, files), row.name, len(files), unit="images")
        problems += [
            f"unreadable: {file} ({reason})"
            for file, reason in zip(files, reasons, strict=True)
            if reason
        ]
    count = len(split.classnames)
    origin = f"{split.sizes(omit_empty=True)}, from {images}"
    if row.split_file:
        source = located.source
        origin = source.name if source else "no split file (one is made at the first run)"
    summary = f"{len(files)} of {len(files) + len(missing)} images, {count} classes, {origin}"
    mend = [*(get_images if problems else []), *(get_split if not located.comparable else [])]
    if row.classes and row.classes != count:
        mend.append(f"-> the published set has {row.classes} classes, not {count}")
    return "broken" if problems else "present", [summary, *problems, *mend]


def _unreadable(path: Path) -> str | None:
    """Why an image cannot be read, None if it can."""
    try:
        read_image(path)
    except ProblemError as error:
        return str(error)
    return None


def _advice(row: SetSpec) -> tuple[list[str], list[str]]:
    """How to get a set's images, and its split file: one line each, or none."""
    if row.rendered:
        return [f"-> move {row.folder}/ away if it is there: the set is drawn at its next use"], []
    if not row.address:
        return [], []
    images = [
        f"-> images: extract them (again) from {row.address}; tree and mirrors in DATASETS.md"
    ]
    if row.torchvision:
        images.append(f"-> or: python -m datasets.download {row.name} --root ROOT")
    return images, [
        f"-> split: put {row.split_file} into {row.folder}/, from {row.split_address}; "
        "numbers on any other are not comparable with published ones"
    ]


def report(row: SetSpec, root: Path) -> str:
    """Print what `check` finds for a set; returns its state."""
    state, (summary, *lines) = check(row, root)
    print("\n    ".join([f"{row.name}: {state}, {summary}", *lines]), flush=True)
    return state


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what `check` finds for each set; returns the exit status."""
    parser = Parser(prog="python -m datasets.check", description=__doc__)
    add = parser.add_argument
    add("root", metavar="ROOT", nargs="?", help="the folder that holds the sets' folders")
    about = "images of your own: a folder with a folder per class, or a CSV file (repeatable)"
    add("--images", action="append", default=[], metavar="PATH", help=about)
    about = "only this set (repeatable); all sets of photographs otherwise"
    add("--set", action="append", dest="names", metavar="NAME", help=about)
    options = parser.parse_args(arguments)
    if options.root is None and not options.images:
        parser.error("give ROOT, or --images PATH")
    root = Path(os.path.expanduser(options.root or "."))
    rows = [own_images(images) for images in options.images]
    if options.root is not None:
        photographs = [name for name, row in SETS.items() if not row.rendered]
        rows += [spec(name) for name in options.names or photographs]
    if not root.is_dir():
        raise ProblemError(
            f"no data root at {root}: make that folder and fill it as DATASETS.md says "
            "(the Mini sets need nothing, they are drawn)"
        )
    states = [report(row, root) for row in rows]
    return int("broken" in states)


if __name__ == "__main__":
    sys.exit(run(main))
