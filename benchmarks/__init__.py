"""What is timed: `python -m benchmarks NAME ...`. What was found out stands in experiments/."""

import time
from collections.abc import Callable
from typing import Any


def timed(work: Callable[..., Any], *args: Any, **options: Any) -> tuple[float, Any]:
    """The seconds that a call takes, and what it returns."""
    started = time.perf_counter()
    result = work(*args, **options)
    return time.perf_counter() - started, result
