"""Text embeddings as a space of their own, for an index of images and for hosted encoders.

What is solved for is `x (I + Delta)`, where x is a unit-norm text embedding: hidden states are the
embeddings, and the projection is the identity. Nothing inside of the encoder has to be known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from forgetting.adapter import projection_sha256
from forgetting.errors import ProblemError
from forgetting.io import FLOATS, foreign, tensor
from forgetting.models.encoder import BATCH, PROBES, Encoder, read_encoder
from forgetting.models.identity import refuse_applied
from forgetting.models.reading import Tokenize

T = TypeVar("T")


@dataclass(frozen=True)
class TextEmbeddings:
    """An encoder of texts of which only its embeddings are known. `forget` takes it as a model."""

    encode: Callable[[list[str]], Any]  # from texts to embeddings (n, d), a tensor or an array
    name: str  # of the encoder, with its version: adapters compose where names are the same
    encoder: Encoder | None = None  # of the model that the texts are read by, if it is here
    _memory: dict[Any, Any] = field(default_factory=dict, repr=False)

    bias = None

    def __post_init__(self) -> None:
        if not callable(self.encode) or not isinstance(self.name, str) or not self.name.strip():
            raise ProblemError("TextEmbeddings takes a function of texts, and a name for it")

    @classmethod
    def of(cls, model: Any, tokenize: Tokenize | None = None) -> TextEmbeddings:
        """Those of a CLIP; model, tokenize: see `forgetting.models.encoder.read_encoder`."""
        encoder = read_encoder(model, tokenize)
        refuse_applied(encoder)
        parts = encoder.fingerprint, projection_sha256(encoder.projection)
        digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()
        return cls(encoder.embeddings, f"{encoder.kind} {digest[:16]}", encoder)

    @cached_property
    def projection(self) -> Tensor:
        """The identity, (d, d)."""
        return torch.eye(self.hidden(PROBES[1:2]).shape[1])

    @property
    def kind(self) -> str:
        """The encoder in words."""
        return f"embeddings of {self.name}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the encoder's name."""
        return hashlib.sha256(self.kind.encode()).hexdigest()

    def tokens_sha256(self, texts: Sequence[str]) -> str:
        """Nothing: what an encoder makes of texts before it embeds them is its own."""
        return ""

    def truncated(self, texts: Sequence[str]) -> list[str]:
        """The texts of which the encoder does not read the end, where that can be known."""
        return [] if self.encoder is None else self.encoder.truncated(texts)

    def remembered(self, key: Any, compute: Callable[[], T]) -> T:
        """What `compute` gives, once for this object."""
        if key not in self._memory:
            self._memory[key] = compute()
        return self._memory[key]

    def hidden(self, texts: Sequence[str], progress: str = "") -> Tensor:
        """Unit-norm embeddings (n, d), float32, on the CPU. `progress` stands beside a progress
        bar; there is none without. ProblemError if `encode` gives something else."""
        texts, parts = list(texts), []
        with tqdm(total=len(texts), desc=progress, unit="text", disable=not progress) as bar:
            for start in range(0, len(texts), BATCH):
                some = texts[start : start + BATCH]
                given = self.encode(some)
                with foreign("encode gave no numbers"):
                    given = given if isinstance(given, Tensor) else torch.tensor(np.asarray(given))
                rows = tensor("what encode gave", given.detach().cpu(), FLOATS, (len(some), None))
                if not rows.any(dim=1).all():
                    raise ProblemError("encode gave a vector of zeros, which has no direction")
                parts.append(normalize(rows.double(), dim=1).float())
                bar.update(len(some))
        return torch.cat(parts) if parts else torch.empty(0, len(self.projection))
