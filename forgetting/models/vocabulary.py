"""The generic vocabulary: common names that are retained whatever somebody forgets.

The lists come with the package (`forgetting.models.words`). They are encoded once for a text tower and
tokenizer, and kept in a folder of files that say what they are of.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from forgetting.errors import ProblemError
from forgetting.io import pack, unpack, write_bytes
from forgetting.models.encoder import Encoder
from forgetting.models.words import generic

FORMAT = "clip-forget-hidden/1"
ALIKE = 16  # names that leave with a text for being similar, at most
CACHE = Path("~/.cache/clip-forget")
LOOKED_AT = 8  # texts of a file that are encoded again, to see that it is of this tower
SAME = 0.05  # relative distance of a hidden state in half precision from itself in another batch


def generic_names() -> list[str]:
    """All names of all kinds, each once."""
    return [name for names in generic().values() for name in names]


def generic_hidden(
    tower: Encoder, cache: str | Path | None = CACHE, progress: bool = True
) -> tuple[list[str], Tensor]:
    """The names, and their hidden states (n, w); encoded once a tower.

    Args:
        cache: the folder of files; None: nothing is kept, nor read.
        progress: whether to show a bar where they are encoded.

    Raises:
        ProblemError: as `Encoder.hidden`. A file that is damaged, or of another tower, is made anew,
            and a folder that cannot be written keeps nothing.
    """
    names = generic_names()
    path = key = None
    if cache is not None:
        parts = [tower.fingerprint, tower.tokens_sha256(names), names]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        path = Path(cache).expanduser() / f"generic-{key[:32]}.safetensors"
        if path.is_file() and (rows := _kept(path, key, names, tower)) is not None:
            return names, rows
    rows = tower.hidden(names, progress="generic vocabulary" if progress else "")
    if path is not None:
        with suppress(ProblemError):  # a disk that is full, or not ours
            write_bytes(pack(FORMAT, {"key": key, "texts": len(names)}, {"hidden": rows}), path)
    return names, rows


def _kept(path: Path, key: str, names: list[str], tower: Encoder) -> Tensor | None:
    """The rows of a file, if they are what the tower says."""
    try:
        fields, held = unpack(path, FORMAT)
    except ProblemError:
        return None
    rows = held.get("hidden")
    if fields != {"key": key, "texts": len(names)} or rows is None or len(rows) != len(names):
        return None
    every = max(1, len(names) // LOOKED_AT)
    fresh = tower.hidden(names[::every])
    if fresh.shape[1] != rows.shape[1]:
        return None
    apart = (rows[::every] - fresh).norm(dim=1)
    same = bool((apart <= SAME * fresh.norm(dim=1)).all()) and bool(torch.isfinite(rows).all())
    return rows if same else None
