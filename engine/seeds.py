"""Random numbers that belong to a piece of work and not to what ran before it."""

from __future__ import annotations

import hashlib

import torch


def seeded(*parts: object) -> torch.Generator:
    """A generator on the CPU seeded by a name, such as seed, data set and label: the same in a
    resumed run and on every machine."""
    text = "/".join(map(str, parts))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(number)
