"""Images encoded on many workers at once by Ray Data, shard by shard into the same cache."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip.cache import FeatureCache
from clip.source import ClipSource
from engine.cluster import cluster, go_to, load, reason, share
from engine.log import progress
from forgetting.errors import ProblemError


class Encoder:
    """One worker: it loads the model once and encodes the shards that it is given.

    A shard is written whole or not at all, under a name that says what it is of; so one that is
    given out twice, after its worker died, is the same file, and is not encoded if it is there.
    """

    def __init__(self, place: str, source: dict[str, Any], cache: str, call: dict[str, Any]):
        go_to(place)
        self.cache, self.call = FeatureCache(ClipSource(**source), cache), call

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Rows with `part` (the path of a shard) and `images` (paths, NUL between) to rows with
        `count` (its images) and `error` (what is wrong with one of them, or "")."""
        counts, errors = [], []
        for part, images in zip(batch["part"], batch["images"], strict=True):
            paths, error = os.fsdecode(images).split("\0"), ""
            try:
                self.cache.encode(shards={Path(os.fsdecode(part)): paths}, **self.call)
            except ProblemError as refused:
                error = str(refused)
            counts.append(len(paths))
            errors.append(error)
        return {"count": counts, "error": errors}


def encode_by_ray(
    cache: FeatureCache,
    name: str,
    shards: Mapping[Path, Sequence[str]],
    batch_size: int | None,
) -> None:
    """Write every shard that is not there yet; arguments as those of `FeatureCache.encode`. A
    worker computes on one of the cores that it asks for, and loads images on the others.

    Raises:
        ProblemError: an image that cannot be read (the other shards are kept), no Ray, or a worker
            that died more than `LAUNCHER.TRIES` times.
    """
    missing = {part: paths for part, paths in shards.items() if not part.exists()}
    total, rest = (sum(map(len, some.values())) for some in (shards, missing))
    if not missing:
        return
    rows = [  # bytes: the name of a file need not be UTF-8
        {"part": os.fsencode(part), "images": os.fsencode("\0".join(paths))}
        for part, paths in missing.items()
    ]
    call = {"name": name, "batch_size": batch_size, "workers": max(0, int(cache.how.CPUS) - 1)}
    with cluster() as ray:
        data = load("ray.data")
        asked, room = share(ray, cache.how)
        tries = cache.how.TRIES
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        encoded = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Encoder,
            fn_constructor_args=(os.getcwd(), cache.source.recipe, str(cache.root), call),
            batch_size=1,
            concurrency=min(room, len(rows)),
            ray_remote_args_fn=lambda: {"max_restarts": tries, "max_task_retries": tries},
            **asked,
        )
        done = total - rest
        with progress(desc=f"ray: {name}", total=total, initial=done, unit="images") as bar:
            try:
                for row in encoded.iter_rows():
                    if row["error"]:
                        raise ProblemError(row["error"])
                    bar.update(row["count"])
            except ray.exceptions.RayError as error:
                raise ProblemError(f"encoding {name} by Ray failed ({reason(error)})") from error
