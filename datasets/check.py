"""`python -m datasets.check ROOT`: which image sets are there, and what is broken in them.

Opens every image that a set's split names. Writes nothing. Exit status 1 if something that is
present is broken, 2 if there is no such root; 0 otherwise, also where sets are absent.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from engine import UserError
from engine.cli import Parser, run

from .reader import absent, find
from .split import missing_images
from .table import SETS, SetSpec, spec

_DRAWN = "not drawn yet; no download is needed"
PHOTOGRAPHS = [name for name, row in SETS.items() if not row.rendered]


@dataclass
class Finding:
    """What is known of one set: its state, one line of detail, and what to do about it."""

    name: str
    state: str  # "present", "missing" or "broken"
    detail: str
    problems: list[str] = field(default_factory=list)  # broken things by name, a line each
    mend: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        yield f"{self.name}: {self.state}, {self.detail}"
        yield from (f"    {problem}" for problem in self.problems)
        yield from (f"    -> {advice}" for advice in self.mend)


def check(row: SetSpec, root: Path) -> Finding:
    """Look at one set under `root`, image by image."""
    folder = root / row.folder
    if not folder.is_dir():
        return Finding(row.name, "missing", absent(row, root) or _DRAWN, mend=_fetch(row))
    try:
        found = find(row, root)
    except UserError as error:
        what = str(error).removeprefix(f"data set {row.name}: ")
        return Finding(row.name, "broken", what, mend=_fetch(row) + _fetch_split(row))
    lost = set(missing_images(found.split, found.images))
    there = [path for path in found.split.paths() if path not in lost]
    problems = [f"missing: {found.images / path}" for path in sorted(lost)]
    problems += [
        f"unreadable: {found.images / path} ({reason})"
        for path, reason in unreadable(there, found.images, row.name)
    ]
    source = found.source.name if found.source else "no split file (one is made at the first run)"
    detail = (
        f"{len(there)} of {len(there) + len(lost)} images, "
        f"{len(found.split.classnames)} classes, {source}"
    )
    mend = _fetch(row) if problems else []
    if not found.comparable:
        mend += _fetch_split(row)
    return Finding(row.name, "broken" if problems else "present", detail, problems, mend)


def unreadable(paths: Sequence[str], folder: Path, name: str) -> list[tuple[str, str]]:
    """The images that cannot be decoded to the last pixel, each with the reason, in order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = pool.map(lambda path: _reason(folder / path), paths)
        bar = tqdm(zip(paths, reasons, strict=True), total=len(paths), desc=name, unit="image")
        return [(path, reason) for path, reason in bar if reason]


def _reason(path: Path) -> str | None:
    """Why an image cannot be read, None if it can."""
    try:
        with Image.open(path) as image:
            image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
        text = f"{error or type(error).__name__}"
        return text.replace(f" {str(path)!r}", "")  # the path stands in front already
    return None


def _fetch(row: SetSpec) -> list[str]:
    if row.rendered:
        return [f"move {row.folder}/ away if it is there: the set is drawn at its next use"]
    return [f"images: extract them (again) from {row.address}; tree and mirrors in DATASETS.md"]


def _fetch_split(row: SetSpec) -> list[str]:
    if row.rendered:
        return []
    return [
        f"split: put {row.split_files[0]} into {row.folder}/, from {row.split_address}; "
        "numbers on any other are not comparable with published ones"
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what `check` finds for each set; returns the exit status."""
    parser = Parser(prog="python -m datasets.check", description=__doc__)
    parser.add_argument("root", metavar="ROOT", help="the folder that holds the sets' folders")
    parser.add_argument(
        "--set",
        action="append",
        dest="names",
        metavar="NAME",
        help="only this set (repeatable); all sets of photographs otherwise",
    )
    options = parser.parse_args(arguments)
    root = Path(options.root).expanduser()
    rows = [spec(name) for name in options.names or PHOTOGRAPHS]
    if not root.is_dir():
        raise UserError(
            f"no data root at {root}: make that folder and fill it as DATASETS.md says "
            "(the Mini sets need nothing, they are drawn)"
        )
    findings = []
    for row in rows:
        findings.append(check(row, root))
        print("\n".join(findings[-1].lines()), flush=True)
    return int(any(finding.state == "broken" for finding in findings))


if __name__ == "__main__":
    sys.exit(run(main))
