"""Results folders for tests, written as a run writes them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evaluation.results import Results, split_label
from forgetting.adapter import Adapter, adapter_bytes

SETTINGS = {"trainer": "ForgetLoRA", "backbone": "mini", "weights": "abc", "seed": 0}


def entry(
    dataset="A",
    name="cat",
    before=0.9,
    after=0.1,
    others=("B",),
    rest=(0.8, 0.7),
    other=(0.6, 0.5),
    **solver: Any,
) -> dict[str, Any]:
    """The log entry of one class; `rest` and `other` are before and after."""

    def side(own, rest, other):
        own_results = {"cls_acc_test": own, "no_cls_acc": rest, "acc_train": None}
        return {dataset: {name: own_results}} | {o: {"all": {"all_ds": other}} for o in others}

    return {
        "final_results": side(after, rest[1], other[1]),
        "zero_shot": side(before, rest[0], other[0]),
        "solver": {"settings": {"lamb_forget": 1.3}} | solver,
    }


def adapter(dataset: str, label: str, entry: dict[str, Any], settings=None, scale=1.0) -> bytes:
    """The file of a finished request."""
    record = {key: entry.get(key, {}) for key in ("final_results", "zero_shot")}
    record["solver"] = {"settings": {}} | entry.get("solver", {})
    classes = split_label(label)
    return adapter_bytes(
        Adapter(
            left=scale * torch.ones(4, 1),
            right=torch.ones(1, 3),
            projection_sha256="0" * 64,
            backbone="mini",
            weights="abc",
            dataset=dataset,
            classes=classes,
            trainer="ForgetLoRA",
            settings=settings or SETTINGS,
            record=record | {"indices": [ord(name[0]) for name in classes]},
        )
    )


def store(folder: str | Path, dataset: str, label: str, entry: dict, settings=None) -> None:
    """Add one label's results to a folder."""
    results = Results(folder)
    results.add(adapter(dataset, label, entry, settings), dataset, label, None)
    results.compile()


def fork(call: Callable[[], object]) -> int:
    """Start `call` in a child; its exit status is what the call gives, or 1."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        found = call()
        status = found if isinstance(found, int) else 0
    finally:
        os._exit(status)


def ended(pid: int) -> int:
    """Exit status of a child; negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
