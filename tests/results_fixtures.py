"""Results folders for tests, written as a run writes them."""

from __future__ import annotations

from typing import Any

import torch

from evaluation.results import Finished, merge_results, place, split_label
from forgetting import Adapter
from forgetting.adapter import adapter_bytes


def finished(dataset: str, label: str, entry: dict[str, Any], scale: float = 1.0) -> Finished:
    """A request that is done, with an adapter of its own."""
    adapter = Adapter(
        left=scale * torch.ones(4, 1),
        right=torch.ones(1, 3),
        projection_sha256="0" * 64,
        backbone="mini",
        weights="abc",
        dataset=dataset,
        classes=split_label(label),
        trainer="ForgetLoRA",
    )
    path = f"{place(dataset, label)}.safetensors"
    return Finished(label, entry, adapter, adapter_bytes(adapter), path)


def store(folder, dataset: str, settings: dict, label: str, entry: dict[str, Any], **more) -> None:
    """Add one label's results to a folder."""
    entry = {"solver": {"settings": {}}} | entry
    merge_results(folder, dataset, settings, [finished(dataset, label, entry)], **more)
