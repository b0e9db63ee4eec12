"""A flag from names alone: which images show what a text names, at a rate of false alarms.

How much more an image x agrees with a text t than with common names v, all of unit length, is

    s = log( exp(scale x t) / mean over v of exp(scale x v) )

By texts alone, s of other things is about logistic(-SPREAD, SPREAD). Images at hand that are below
its 1 % point are taken for other things, beside PRIOR scores of it, and an exponential tail goes
through their 80 and 95 % points. SPREAD and PRIOR were fitted to OpenAI's ViT-B/32.
"""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.errors import ProblemError, number
from forgetting.io import matrix

SCALE = 50.0  # half of CLIP's logit scale
SPREAD = 0.85
PRIOR = 30  # scores
HEAVIEST = 1.2  # how far 95 % may lie beyond 80 %, in distances of 80 % from 50 %
CUT = SPREAD * (math.log(99) - 1)  # by texts alone, 1 % of other things score higher
FEW = 100  # images, with fewer of which mostly the prior decides
MANY = 0.2  # of the images, with more of which above CUT they hardly show other things
ROWS = 1024  # vectors that are computed at once

Vectors = Tensor | np.ndarray


def flag(
    vectors: Vectors,
    text: Vectors,
    vocabulary: Vectors,
    false_alarms: float = 0.005,
    reference: Vectors | None = None,
    scale: float = SCALE,
) -> tuple[Tensor, Tensor]:
    """Which images show what a text names. All are embeddings of one model, of any length.

    Args:
        vectors: (n, d) of images; text: (d,), or (m, d) of several that mean the same.
        vocabulary: (v, d) of common names in the template of the text, a hundred or more.
        false_alarms: the share of images of other things that may be flagged, within (0, 1).
        reference: (k, d) of images of many kinds, which tell what other things look like; None:
            `vectors` do. For a few vectors, or where most of them show what is named.
        scale: half of the model's logit scale.

    Returns:
        Scores (n,), 1 less the share of images of other things that would score as high, which is
        no probability of the class; and flags (n,), where that share is at most `false_alarms`.
        A warning says where the rate may not hold.
    """
    shares, none = none_of_these(vectors, [text], vocabulary, false_alarms, reference, scale)
    return 1 - shares, ~none


def none_of_these(
    vectors: Vectors,
    texts: Sequence[Vectors] | Vectors,
    vocabulary: Vectors,
    false_alarms: float = 0.005,
    reference: Vectors | None = None,
    scale: float = SCALE,
) -> tuple[Tensor, Tensor]:
    """Which images show none of what K texts name, those of a zero-shot head for one: as `flag`,
    with the share of images of other things that score as high for any of the texts (n,), and
    flags (n,) where that is above `false_alarms`."""
    number("scale", scale, above=0.0)
    if number("false_alarms", false_alarms, above=0.0) >= 1:
        raise ProblemError(f"false_alarms must be a share of images below 1, not {false_alarms}")
    names = _unit("vocabulary", vocabulary)
    if not len(texts) or not len(names):
        raise ProblemError("there must be a text, and a vocabulary of common names beside it")
    known = vectors if reference is None else reference
    common = _agreement(vectors, names, scale)
    common_known = common if reference is None else _agreement(reference, names, scale)
    shares, crowd = torch.ones(len(vectors), dtype=torch.float64), 0.0
    for text in texts:
        words = _unit("text", text[None] if text.ndim == 1 else text, names.shape[1])
        others = _agreement(known, words, scale) - common_known
        share = _share(_agreement(vectors, words, scale) - common, others)
        shares = torch.minimum(shares, len(texts) * share)
        crowd = max(crowd, float((others > CUT).sum()) / max(1, len(others)))
    few = len(others) < max(FEW, 1 / false_alarms)
    if few or crowd > MANY:
        why = f"{len(others)} images are few" if few else f"{crowd:.0%} look like what is named"
        warnings.warn(f"the rate may not hold: {why} (reference= takes others)", stacklevel=2)
    return shares, shares > false_alarms


def _share(scores: Tensor, others: Tensor) -> Tensor:
    """The share of other things above each of `scores` (n,), estimated from the prior and `others`
    (k,), in which what is sought may be too."""
    quantiles = (np.arange(PRIOR) + 0.5) / PRIOR
    prior = SPREAD * (np.log(quantiles / (1 - quantiles)) - 1)
    pool = others.numpy()

    def points(cut: float) -> np.ndarray:
        return np.quantile(np.concatenate([pool[pool <= cut], prior]), (0.5, 0.8, 0.95))

    # Where most images are of its like, the cut moves up with them.
    middle, low, high = points(max(CUT, points(CUT)[0] + SPREAD * math.log(99)))
    fall = max(min(high - low, HEAVIEST * (low - middle)) / math.log(4), 1e-6)
    return 0.2 * torch.exp((low - scores) / fall)


def _unit(name: str, rows: Vectors, d: int | None = None) -> Tensor:
    """Rows (n, d) of unit length, float32, on the CPU."""
    rows = torch.tensor(rows) if isinstance(rows, np.ndarray) else rows
    return normalize(matrix(name, rows, d).cpu().float(), dim=1)


def _agreement(vectors: Vectors, names: Tensor, scale: float) -> Tensor:
    """log of the mean of exp(scale cos) over unit-norm names (m, d), of each vector, (n,)."""
    found = torch.empty(len(vectors), dtype=torch.float64)
    for start in range(0, len(vectors), ROWS):
        block = _unit("vectors", vectors[start : start + ROWS], names.shape[1])
        found[start : start + ROWS] = torch.logsumexp(scale * block @ names.T, dim=1)
    return found - math.log(len(names))
