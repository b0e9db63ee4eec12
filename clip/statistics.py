"""The statistics of a list of names, however long, for solves that read them as a stream.

python -m clip.statistics NAMES.txt ARCH --out FILE [--group vocabulary] [--weights PATH]
                          [--cache cache] [--launcher ray] [KEY VALUE ...]

NAMES.txt has a name a line; each is encoded bare and forgotten again. What stays is a triangle and
8 bytes a name (`forgetting.RetainStatistics`), so that a million names need no more memory than a
thousand. Parts of the list are made on their own, by Ray on many workers, and merged two by two.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
from clip.source import ClipSource
from engine.cli import Parser, add_setting, run
from engine.config import FeatureSettings
from engine.determinism import one_thread
from engine.files import refuse_existing
from engine.launch import add_launcher, launcher, tree
from engine.log import logger
from forgetting import RetainStatistics
from forgetting.errors import ProblemError

PART = 8192  # names of a part: a factorisation costs as much as some thousand of them


def read_names(path: str | Path) -> list[str]:
    """The names of a file, a line each, cleaned, each once, in the order of the file.

    Raises:
        ProblemError: no such file, not in UTF-8, or no names in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ProblemError(f"names {path} cannot be read: {error}") from error
    names = list(dict.fromkeys(datasets.clean_name(line.strip()) for line in lines if line.strip()))
    if not names:
        raise ProblemError(f"names {path}: no name in it; it must hold one a line")
    return names


def statistics(
    names: Sequence[str], source: ClipSource, group: str, how: Any = None, part: int = PART
) -> RetainStatistics:
    """The statistics of `names` as one group.

    Args:
        how: the section `LAUNCHER` of the settings; None: here. part: names that are encoded
            together. Parts and their order decide the rounding, not who makes them.

    Raises:
        ProblemError: weights that cannot be had, no Ray.
    """
    source.weights_path  # noqa: B018  downloaded here, once
    parts = [names[start : start + part] for start in range(0, len(names), part)]
    make = partial(_part, source.recipe, group)
    if how is not None and how.NAME == "ray":
        from engine.cluster import tree_by_ray

        return tree_by_ray(parts, make, _merged, how)
    return tree(parts, make, _merged)


def _part(recipe: dict[str, Any], group: str, names: Sequence[str]) -> RetainStatistics:
    rows = _source(**recipe).encode_hidden(list(names))
    found = RetainStatistics(rows.shape[1])
    with one_thread():  # the last digits are the same wherever it is done
        found.update(group, rows)
    return found


def _merged(one: RetainStatistics, other: RetainStatistics) -> RetainStatistics:
    with one_thread():
        return one.merge(other)


@lru_cache(maxsize=1)  # a worker makes many parts with one model
def _source(**recipe: Any) -> ClipSource:
    return ClipSource(**recipe)


def main(argv: list[str] | None = None) -> None:
    """Encode a list of names and keep its statistics alone."""
    parser = Parser(prog="python -m clip.statistics", description=main.__doc__)
    parser.add_argument("names", metavar="NAMES", help="a text file, a name a line")
    parser.add_argument("arch", metavar="ARCH", help="architecture, for example ViT-B/16")
    parser.add_argument("--out", required=True, metavar="FILE", help="where they are written")
    parser.add_argument("--group", default="vocabulary", help="what to call the names")
    parser.add_argument("--weights", help="a checkpoint of ARCH; default: the published one")
    add_setting(parser, "--cache", FeatureSettings, "cache")
    add_launcher(parser)
    args = parser.parse_args(argv)
    refuse_existing(args.out, "choose another --out")
    names, how = read_names(args.names), launcher(args)
    found = statistics(names, ClipSource(args.arch, args.weights, args.cache), args.group, how)
    found.save(args.out)
    logger.info(f"clip: statistics of {len(names):,} names, width {found.width}, in {args.out}")
    logger.info(f"clip: they are known by {found.sha256}")


if __name__ == "__main__":
    from clip.statistics import main  # by the name under which workers find it

    sys.exit(run(main))
