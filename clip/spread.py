"""Images encoded by many workers at once, shard by shard into the same cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from clip.cache import FeatureCache
from clip.source import ClipSource
from engine.log import progress
from engine.ray import spread
from forgetting.errors import ProblemError


def encode_by_ray(
    cache: FeatureCache,
    name: str,
    shards: Mapping[Path, Sequence[str]],
    batch_size: int | None,
) -> None:
    """Write every shard that is not there yet; arguments as those of `FeatureCache.encode`. A
    worker computes on one of the cores that it requests, and loads images on the others.

    Raises:
        ProblemError: an image that cannot be read (the other shards are kept), or no Ray.
    """
    missing = [(part, list(paths)) for part, paths in shards.items() if not part.exists()]
    total, rest = (sum(map(len, some)) for some in (shards.values(), (x for _, x in missing)))
    workers = max(0, int(cache.how.cpus) - 1)
    task = partial(_encode, cache.source.recipe, str(cache.root), name, batch_size, workers)
    if not missing:
        return
    with progress(desc=f"ray: {name}", total=total, initial=total - rest, unit="images") as bar:
        for (_, paths), result in spread(task, missing, cache.how):
            if isinstance(result, ProblemError):
                raise result
            bar.update(len(paths))


def _encode(
    recipe: dict[str, Any],
    root: str,
    name: str,
    batch_size: int | None,
    workers: int,
    shard: tuple[Path, list[str]],
) -> None:
    """Write one shard: whole or not at all, under a name that says what it is of. So one that is
    begun again, after its worker died, is the same file."""
    part, paths = shard
    _cache(root, **recipe).encode(name, {part: paths}, batch_size, workers)


@lru_cache(maxsize=1)  # a worker encodes many shards with one model
def _cache(root: str, **recipe: Any) -> FeatureCache:
    return FeatureCache(ClipSource(**recipe), root)
