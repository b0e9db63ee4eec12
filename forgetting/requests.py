"""What is to be forgotten, as texts and their hidden states: plain names and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """Classes to forget at once, as texts.

    Attributes:
        classes: names; texts: what stands for each of them, in the same order as the rows of
            hidden (k, w); owner: (k,) index into `classes`.
    """

    classes: list[str]
    texts: list[str]
    hidden: Tensor
    owner: list[int]

    def joined(self, more: Sequence[tuple[int, str, Tensor]]) -> Request:
        """The same with more texts: the class (by number), text and hidden state (w,) of each."""
        owners, texts, rows = zip(*more, strict=True)
        hidden = torch.cat([self.hidden, torch.stack(rows)])
        return replace(
            self,
            texts=[*self.texts, *texts],
            hidden=hidden,
            owner=[*self.owner, *owners],
        )


class Wordings(NamedTuple):
    """Texts that mean a class, and their hidden states (n, w)."""

    texts: list[str]
    hidden: Tensor


class Requests(Sequence[Request]):
    """Requests that are solved together, each from the original model, their tensors stacked.

    Attributes:
        classes: C names, request by request; hidden: (K, w), all texts.
        of_class: (C,) int64, the request of each class; of_text: (K,), that of each text;
            owner: (K,), the class (0 .. C - 1) of each text; sizes: texts of each request.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = list(requests)
        self.classes = [name for request in requests for name in request.classes]
        self.hidden = torch.cat([request.hidden for request in requests])
        sizes = torch.tensor([len(request.classes) for request in requests])
        first = sizes.cumsum(0) - sizes
        number = torch.arange(len(requests))
        self.of_class = number.repeat_interleave(sizes)
        self.sizes = [len(request.texts) for request in requests]
        self.of_text = number.repeat_interleave(torch.tensor(self.sizes))
        owner = [index for request in requests for index in request.owner]
        self.owner = torch.tensor(owner) + first[self.of_text]

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: int) -> Request:
        return self._requests[index]

    def any_of(self, mask: Tensor) -> Tensor:
        """What is marked for one of a request's classes: (C, n) bool -> (R, n) bool."""
        found = torch.zeros(len(self), mask.shape[1], dtype=torch.bool, device=mask.device)
        for row, request in zip(mask, self.of_class.tolist(), strict=True):
            found[request] |= row
        return found
