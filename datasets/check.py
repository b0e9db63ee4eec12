"""`python -m datasets.check ROOT`, or `--images PATH`: which image sets are there, what is broken.

Opens every image that a set's split names. Writes nothing. Exit status 1 if something that is
present is broken, 2 if there is no such root; 0 otherwise, also where sets are absent.
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.cli import Parser, run
from engine.log import progress
from forgetting.errors import ProblemError

from .reader import absent, find_split, read_image
from .table import SETS, SetSpec, spec


def check(row: SetSpec, root: Path) -> tuple[str, list[str]]:
    """Look at one set, image by image: "present", "missing" or "broken", and lines: a summary, each
    broken thing by name, how to mend it."""
    if not (root / row.folder).is_dir():
        return "missing", [absent(row, root) or "not drawn yet; no download is needed"]
    hint = [f"-> DATASETS.md says where to get {row.name}"] if row.name in SETS else []
    try:
        split, comparable = find_split(row, root)
    except ProblemError as error:
        return "broken", [str(error).removeprefix(f"data set {row.name}: "), *hint]
    images, count = row.images(root / row.folder), len(split.classnames)
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
    total = len(files) + len(missing)
    lines = [f"{len(files)} of {total} images, {count} classes, {split.sizes()}", *problems]
    lines += hint if problems else []
    if not comparable:
        why = "numbers on another split are not comparable (DATASETS.md)"
        lines.append(f"-> put {row.split_file} into {row.folder}/: {why}")
    if row.classes and row.classes != count:
        lines.append(f"-> the published set has {row.classes} classes, not {count}")
    return "broken" if problems else "present", lines


def _unreadable(path: Path) -> str | None:
    """Why an image cannot be read, None if it can."""
    try:
        read_image(path)
    except ProblemError as error:
        return str(error)
    return None


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
    if not root.is_dir():
        raise ProblemError(f"no data root at {root}: make that folder, see DATASETS.md")
    rows = [spec("", images) for images in options.images]
    if options.root is not None:
        photographs = [name for name, row in SETS.items() if not row.rendered]
        rows += [spec(name) for name in options.names or photographs]
    return int("broken" in [report(row, root) for row in rows])


if __name__ == "__main__":
    sys.exit(run(main))
