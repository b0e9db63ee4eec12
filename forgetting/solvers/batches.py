"""Many requests at once: which texts and which leaving rows belong to each, as rectangles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from forgetting.errors import ProblemError

BATCH_NUMBERS = 2**22  # float64 numbers of one kind that a batch may hold


def texts_each(owner: Tensor, requests: int) -> Tensor:
    """How many texts each request has, (R,), from the request (K,) of each text.

    Raises:
        ProblemError: a request without a text.
    """
    count = torch.bincount(owner, minlength=requests)
    if len(count) != requests or not count.all():
        raise ProblemError("each request needs at least one text, and each text one request")
    return count


def batches(owner: Tensor, leaving: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Requests in batches of equally many texts, those from which alike many names leave together.

    Args:
        owner: (K,), the request of each text; leaving: (R, n) bool; width: w.

    Yields:
        The requests (B,), and the rows (B, k) of their texts.
    """
    count = texts_each(owner, len(leaving))
    order = owner.argsort(stable=True)  # the texts, request by request
    first = count.cumsum(0) - count
    many = leaving.sum(dim=1)
    for k in count.unique().tolist():
        requests = torch.nonzero(count == k)[:, 0]
        requests = requests[many[requests].argsort(stable=True)]
        size = max(1, BATCH_NUMBERS // (width * (int(many[requests].max()) + k)))
        for batch in requests.split(size):
            yield batch, order[first[batch, None] + torch.arange(k, device=owner.device)]


def padded(leaving: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows leave in each request of a batch, all lists made equally long.

    Args:
        leaving: (B, n) bool; shares: (n,).

    Returns:
        places (B, n'), row numbers, and weights (B, n'), their shares; 0 where a list is padded.
    """
    request, place = leaving.nonzero(as_tuple=True)  # in order of the requests
    count = torch.bincount(request, minlength=len(leaving))  # (B,); a sum would copy the mask
    slot = torch.arange(len(place), device=place.device) - (count.cumsum(0) - count)[request]
    places = place.new_zeros(len(leaving), int(count.max()) if len(count) else 0)
    weights = shares.new_zeros(places.shape)
    places[request, slot], weights[request, slot] = place, shares[place]
    return places, weights


def padded_rows(leaving: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (B, n', w) of (n, w) that leave in each request, zero where a list is padded, and
    which are there, (B, n', 1)."""
    places, there = padded(leaving, rows.new_ones(len(rows)))
    return rows[places] * there[..., None], there[..., None]
