"""How the exact solver's time and memory grow with names, classes and width."""

from __future__ import annotations

import statistics
import time
import weakref
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.workload import Workload, random_workload
from forgetting import AUTO, RetainStatistics, Spectrum, settle, solve_exact
from forgetting.retain import square_root

NAMES = (10**2, 10**3, 10**4, 10**5, 10**6)
CLASSES = (10, 30, 100, 300, 1000)
WIDTHS = (512, 768, 1024, 1280)
BATCH = 16_384  # names read at one time
REPEATS = 3


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors alive that were made inside; `peak` is the most at once.

    What LAPACK takes for itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak, self.owners = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage.data_ptr(), storage.nbytes()
                if key not in self.owners:
                    self.alive += size
                self.owners[key] = self.owners.get(key, 0) + 1  # views share a storage
                weakref.finalize(tensor, self._gone, key, size)
        self.peak = max(self.peak, self.alive)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.owners[key] -= 1
        if not self.owners[key]:
            del self.owners[key]
            self.alive -= size


def growth_names(work: Workload) -> list[dict[str, float]]:
    """One stream of names through `RetainStatistics`, and a class solved from them on the way.

    The names are mixtures of two of the retained texts. `read_seconds` is for all names so far,
    `solve_seconds` from the w x w matrix to the answer and its proof, median of three.
    """
    source, generator = work.retained[1:], torch.Generator().manual_seed(0)
    width = work.projection.shape[0]
    names = RetainStatistics(width)
    seconds, rows, read = 0.0, [], 0
    for count in NAMES:
        while read < count:
            size = min(BATCH, count - read)
            pick = torch.randint(len(source), (2, size), generator=generator)
            share = torch.rand(size, 1, generator=generator)
            batch = share * source[pick[0]] + (1 - share) * source[pick[1]]  # (size, w)
            started = time.perf_counter()
            names.update("names", batch)
            seconds += time.perf_counter() - started
            read += size
        gram = names.plain()
        root = square_root(gram)
        problem = settle(replace(work.alone(0, AUTO).double, retain_hidden=root))
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            root = square_root(gram)
            solution = solve_exact(replace(problem, retain_hidden=root), Spectrum(root))
            times.append(time.perf_counter() - started)
        rows.append(
            {
                "names": count,
                "read_seconds": seconds,
                "solve_seconds": statistics.median(times),
                "statistics_bytes": gram.nbytes,
                "branch": solution.branch,
                "gap": solution.certificate.gap,
            }
        )
    return rows


def growth_classes(work: Workload, lamb_forget: float) -> list[dict[str, float]]:
    """`solve_each` for the first 10 to 1,000 retained texts in turn, the same texts retained."""
    texts = work.retained
    target = work.target[:1].expand(len(texts), -1)
    everything = replace(work, classes=texts, vocabulary=texts[:0], target=target)
    return [
        {"classes": count, **_measure(everything, lamb_forget, count)}
        for count in CLASSES
        if count <= len(texts)
    ]


def growth_width() -> list[dict[str, float]]:
    """`solve_each` for 1,000 classes of random texts of each width, d = w."""
    rows = []
    for width in WIDTHS:
        work = random_workload(CLASSES[-1], width)
        rows.append({"w": width, **_measure(work, work.auto_lamb_forget(), CLASSES[-1])})
    return rows


def _measure(work: Workload, lamb_forget: float, count: int) -> dict[str, float]:
    """Median seconds of three runs, and the peak memory of one more, which counting slows down."""
    runs = [work.solve(lamb_forget, range(count)) for _ in range(REPEATS)]
    with PeakBytes() as memory:
        work.solve(lamb_forget, range(count))
    return {
        "solve_seconds": statistics.median(run.solve_seconds for run in runs),
        "certify_seconds": statistics.median(run.certify_seconds for run in runs),
        "peak_tensor_bytes": memory.peak,
        "max_relative_gap": float(runs[0].gap.max()),
    }
