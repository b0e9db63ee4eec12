"""What makes a computation give the same numbers again: its own random numbers, and one thread."""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from threadpoolctl import ThreadpoolController


def seeded(*parts: object) -> torch.Generator:
    """A generator on the CPU seeded by a name, such as seed, data set and label: the same in a
    resumed run and on every machine."""
    text = "/".join(map(str, parts))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(number)


@contextmanager
def one_thread() -> Iterator[None]:
    """Work on one CPU thread, in torch and in the libraries behind numpy and scikit-learn: the
    matrices of a solve or an audit are small, and the last digits depend on the core count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _libraries(len(sys.modules)).limit(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _libraries(modules: int) -> ThreadpoolController:
    """The libraries with threads of their own; searched for anew where modules were imported."""
    return ThreadpoolController()
