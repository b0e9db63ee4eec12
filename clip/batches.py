"""How many images are encoded at once, and the loop that encodes them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from clip.source import ClipSource
from forgetting.errors import ProblemError

# Images, from and to. On a CPU 32 was fastest, and a size found by the clock would give other last
# digits in every run.
RANGE = {"cpu": (32, 32), "cuda": (64, 512)}
TRIES = 2  # batches of a size, of which the faster counts: the first one warms up
GAIN = 1.05  # of images a second; less is noise


class BatchSize:
    """Twice as many images as long as that is faster, half as many where memory ends.

    Attributes:
        now: images of the next batch; settled: whether that stays.
    """

    def __init__(self, fixed: int | None, device: torch.device) -> None:
        low, self.most = RANGE.get(device.type, RANGE["cuda"])
        self.now = fixed or low
        self.settled = fixed is not None or low == self.most
        self._seconds: list[float] = []  # an image took, in batches of this size
        self._best, self._pace = self.now, float("inf")

    def took(self, count: int, seconds: float) -> None:
        """A batch of `count` images took so long."""
        if self.settled or count != self.now:
            return
        self._seconds.append(seconds / count)
        if len(self._seconds) < TRIES:
            return
        pace, self._seconds = min(self._seconds), []
        if pace * GAIN < self._pace:
            self._best, self._pace = self.now, pace
            self.settled = 2 * self.now > self.most
            self.now *= 1 if self.settled else 2
        else:
            self.now, self.settled = self._best, True

    def too_many(self) -> None:
        """Memory does not hold a batch; ProblemError if it was of one image."""
        if self.now == 1:
            raise ProblemError("out of memory: not even one image can be encoded")
        self.now, self.settled = self.now // 2, True


def encode(
    source: ClipSource, chunks: Iterator[Tensor], count: int, size: BatchSize
) -> Iterator[Tensor]:
    """Embeddings (b, d) of the next `count` images, batch by batch.

    Args:
        chunks: pictures (n, 3, side, side) uint8, no chunk with more than these images.
    """
    waiting: list[Tensor] = []
    while count:
        while sum(map(len, waiting)) < min(size.now, count):
            waiting.append(next(chunks).to(source.device, non_blocking=True))
        pictures = torch.cat(waiting)
        batch, rest = pictures[: size.now], pictures[size.now :]
        started = time.perf_counter()
        try:
            rows = source.encode_images(batch)
        except torch.OutOfMemoryError:
            size.too_many()
            waiting = [pictures]
            continue
        size.took(len(batch), time.perf_counter() - started)
        waiting, count = [rest] if len(rest) else [], count - len(batch)
        yield rows
