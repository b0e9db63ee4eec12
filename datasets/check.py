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

from .reader import absent, find, read_image
from .table import SETS, SetSpec, own, spec

PHOTOGRAPHS = [name for name, row in SETS.items() if not row.rendered]


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
        found = find(row, root)
    except ProblemError as error:
        reason = str(error).removeprefix(f"data set {row.name}: ")
        return "broken", [reason, *get_images, *get_split]
    lost = set(found.split.missing(found.images))
    files = [found.images / path for path in found.split.paths() if path not in lost]
    problems = [f"missing: {found.images / path}" for path in sorted(lost)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = pool.map(_unreadable, files)
        pairs = zip(files, reasons, strict=True)
        bar = progress(pairs, row.name, len(files), unit="images")
        problems += [f"unreadable: {file} ({reason})" for file, reason in bar if reason]
    source = found.source.name if found.source else "no split file (one is made at the first run)"
    count = len(found.split.classnames)
    parts = ", ".join(f"{len(items)} {part}" for part, items in found.split.parts.items() if items)
    summary = f"{len(files)} of {len(files) + len(lost)} images, {count} classes, "
    summary += source if row.split_file else f"{parts}, from {found.images}"
    mend = get_images * bool(problems) + get_split * (not found.comparable)
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
    """How to get a set's images, and its split file: a line each, or none."""
    if row.rendered:
        return [f"-> move {row.folder}/ away if it is there: the set is drawn at its next use"], []
    if not row.address:
        return [], []
    images = f"-> images: extract them (again) from {row.address}; tree and mirrors in DATASETS.md"
    fetch = f"-> or: python -m datasets.download {row.name} --root ROOT"
    return [images, *([fetch] if row.torchvision else [])], [
        f"-> split: put {row.split_file} into {row.folder}/, from {row.split_address}; "
        "numbers on any other are not comparable with published ones"
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what `check` finds for each set; returns the exit status."""
    parser = Parser(prog="python -m datasets.check", description=__doc__)
    parser.add_argument(
        "root", metavar="ROOT", nargs="?", help="the folder that holds the sets' folders"
    )
    parser.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="PATH",
        help="images of your own: a folder with a folder a class, or a CSV file (repeatable)",
    )
    parser.add_argument(
        "--set",
        action="append",
        dest="names",
        metavar="NAME",
        help="only this set (repeatable); all sets of photographs otherwise",
    )
    options = parser.parse_args(arguments)
    if options.root is None and not options.images:
        parser.error("give ROOT, or --images PATH")
    root = Path(os.path.expanduser(options.root or "."))
    rows = [own(images) for images in options.images]
    if options.root is not None:
        rows += [spec(name) for name in options.names or PHOTOGRAPHS]
    if not root.is_dir():
        raise ProblemError(
            f"no data root at {root}: make that folder and fill it as DATASETS.md says "
            "(the Mini sets need nothing, they are drawn)"
        )
    broken = False
    for row in rows:
        state, (summary, *lines) = check(row, root)
        broken |= state == "broken"
        print("\n    ".join([f"{row.name}: {state}, {summary}", *lines]), flush=True)
    return int(broken)


if __name__ == "__main__":
    sys.exit(run(main))
