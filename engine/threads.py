"""One CPU thread for small matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def one_thread() -> Iterator[None]:
    """Work on one CPU thread, in torch and in the libraries behind numpy and scikit-learn.

    The matrices of a solve or an audit are small: a second thread gains little on an idle machine,
    waits in a spin on a busy one (tenfold times were seen), and would tie the last digits to the
    core count.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
