"""Where forgotten texts are sent: every target, as a function of tensors.

    empty       the paper's: the embedding of the empty prompt, of norm 1
    opposite    nothing of the text's own direction, or a little of its opposite
    specific    the same for that part of the text only that retained names do not explain
    orthogonal  the direction that texts use least

What decides whether a class is gone under other words is the target (docs/exact.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.errors import ProblemError, number, shown
from forgetting.io import mask, matrices, matrix, texts, vector
from forgetting.solvers.constrained import Ridge, downdate, request_batches

TARGETS = ("empty", "opposite", "orthogonal", "specific")
FURTHER = ("specific", "opposite")  # those that can go further, by beta
# The noise is far larger than an embedding's differences between classes, so a redraw rarely
# repeats; ten thousand of them mean that no draw can help (one class, for example).
MAX_DRAWS = 10_000


def empty_target(
    neutral_hidden: Tensor,
    projection: Tensor,
    class_embeddings: Tensor,
    forget_labels: list[int],
    generator: torch.Generator,
    noise_std: float = 0.5,
) -> tuple[Tensor, int]:
    """The unit-norm embedding of the empty prompt, repeated for every forgotten text.

    If the class nearest to the empty prompt is itself to be forgotten, sending texts there would
    leave it recognised. Then Gaussian noise is added to the unnormalised embedding, which is
    normalised again, until the nearest class is none of those to forget (the paper's
    regeneration).

    Args:
        neutral_hidden: (1, w), hidden state of the empty prompt.
        projection: `W`, (w, d).
        class_embeddings: (C, d), text embeddings of all classes of the data set, any norm.
        forget_labels: the k rows of `class_embeddings` that are to be forgotten.
        generator: draws the noise, on the CPU so that every device gets the same numbers.
        noise_std: standard deviation of the noise, in units of the embedding's coordinates.

    Returns:
        `P` (k, d), all rows equal, and the number of times that noise was drawn.

    Raises:
        ProblemError: no draw leads away from the forgotten classes.
    """
    neutral_hidden, projection = matrices(neutral_hidden=neutral_hidden, projection=projection)
    neutral_hidden = matrix("neutral_hidden", neutral_hidden, len(projection), 1)
    classes = matrix("class_embeddings", class_embeddings, projection.shape[1])
    classes = normalize(classes.to(projection), dim=-1)
    empty = neutral_hidden @ projection  # (1, w) @ (w, d) -> (1, d)
    number("noise_std", noise_std, low=0)
    if not isinstance(forget_labels, list | tuple) or not forget_labels:
        raise ProblemError(f"forget_labels must be a list of labels, not {shown(forget_labels)}")
    forgotten = {number("forget_labels", label, low=0, whole=True) for label in forget_labels}
    if max(forgotten) >= len(classes):
        raise ProblemError(f"label {max(forgotten)} to forget, of {len(classes)} classes")
    if forgotten >= set(range(len(classes))):
        raise ProblemError("every class is to be forgotten: no class is left to send the texts to")
    candidate = empty
    for draws in range(MAX_DRAWS):
        unit = normalize(candidate, dim=-1)
        if int((unit @ classes.T).argmax()) not in forgotten:
            return unit.expand(len(forget_labels), -1).clone(), draws  # (1, d) -> (k, d)
        noise = torch.randn(empty.shape, generator=generator, dtype=torch.float32)
        candidate = empty + noise_std * noise.to(empty)
    raise ProblemError(
        f"{MAX_DRAWS} noisy empty prompts all lie nearest to a class to forget; "
        "forget fewer classes at once"
    )


def opposite_target(forget_hidden: Tensor, projection: Tensor, beta: float | Tensor) -> Tensor:
    """`P = -beta H_f W`, (k, d): nothing of a text's own direction is left, or a little opposite.

    beta = 0 removes the text's embedding, 0.1 to 0.3 also carries over to other words for it (which
    keep their direction with the paper's target, of norm 1 beside embeddings of norm 10); near 1
    the larger change harms others two to four times as much.

    Raises:
        ProblemError: beta is not a number of 0 or more.
    """
    forget_hidden, projection = texts(
        "forget_hidden", forget_hidden, "projection", projection, least=0
    )
    beta = betas("opposite", beta, forget_hidden)
    return -beta * (forget_hidden @ projection)  # (k, w) @ (w, d) -> (k, d)


def specific_target(
    forget_hidden: Tensor,
    projection: Tensor,
    gram: Tensor,
    lam: float,
    beta: float | Tensor,
    rows: Tensor | None = None,
    shares: Tensor | None = None,
    leaving: Tensor | None = None,
) -> Tensor:
    """Turn round only what is specific to a text: `P = e - (1 + beta) (e r / r r) r`, (k, d).

    `e = h_f W` is split by ridge regression on what is retained: with `T = W^T G W`, the statistics
    of the retained embeddings, `r = lam (T + lam I)^-1 e` is what they do not explain. Only that
    direction goes, and a little of its opposite comes (beta; negative, down to -1, which is no
    change: some of the text's own direction stays). What the text shares with others, as all CLIP
    texts do, stays. A large `lam` gives `opposite_target`; docs/exact.md compares the two.

    Args:
        gram: `G`, (w, w), the weighted statistics of what is retained.
        beta: one number, or one a text, (k,).
        lam: in units of the squared length of an embedding times the weights' sum.
        rows: (n, w), retained texts, and shares: (n,), the weight of each in `gram`, of which
            `leaving` (k, n) bool says what leaves it for each forgotten text; None: nothing does.

    Raises:
        ProblemError: `lam` is not positive, or beta is no number above -1.
    """
    return Specific(projection, gram, lam)(forget_hidden, beta, rows, shares, leaving)


class Specific:
    """`specific_target` of one retain set, of which T is factorised once for all texts."""

    def __init__(self, projection: Tensor, gram: Tensor, lam: float) -> None:
        self._w = w = matrix("projection", projection).double()
        g = matrix("gram", gram, len(w), len(w)).double()
        self._ridge = Ridge(w.T @ g @ w, number("lam", lam, above=0))  # (d, d)

    def __call__(
        self,
        forget_hidden: Tensor,
        beta: float | Tensor,
        rows: Tensor | None = None,
        shares: Tensor | None = None,
        leaving: Tensor | None = None,
    ) -> Tensor:
        hidden = matrix("forget_hidden", forget_hidden).to(self._w)
        beyond = betas("specific", beta, hidden)
        hidden, w = texts("forget_hidden", hidden, "projection", self._w, least=0)
        e = hidden @ w  # (k, d)
        r = self._ridge.solve(e)
        if rows is not None:
            rows = matrix("rows", rows, len(w)).to(w)
            leaving = mask("leaving", leaving, len(rows), len(e)).to(w.device)
            some, alone = leaving.any(dim=0), torch.arange(len(e))
            away = rows[some] @ w, vector("shares", shares, len(rows))[some], leaving[:, some]
            for _, numbers, base, gone in request_batches(self._ridge, e, alone, *away):
                r[numbers] = downdate(e[numbers], base, *gone)
        length = (r * r).sum(1, keepdim=True)
        share = (e * r).sum(1, keepdim=True) / length
        share = share.where(length > 0, 0.0)  # of a zero text
        return e - (1 + beyond) * share * r


def orthogonal_target(texts: Tensor, count: int) -> Tensor:
    """The direction that texts use least, at unit norm, repeated `count` times: (count, d).

    It is orthogonal to the span of `texts` where that leaves a dimension over. Other words for a
    forgotten class that move only part of the way keep part of their direction.

    Args:
        texts: (n, d), text embeddings of all that is named: classes and retained names.
    """
    texts, count = matrix("texts", texts), number("count", count, low=0, whole=True)
    if texts.shape[1] == 0:
        raise ProblemError("texts have at least one dimension")
    _, _, directions = torch.linalg.svd(texts.double(), full_matrices=True)
    return directions[-1:].to(texts).expand(count, -1).clone()  # (1, d) -> (count, d)


def betas(kind: str, beta: float | Tensor, rows: Tensor) -> Tensor:
    """One beta, or one for each of the rows (k, w), checked, as (k, 1)."""
    if not isinstance(beta, Tensor):
        check_beta(kind, beta)
        beta = rows.new_full((len(rows),), beta)
    beta = matrix("beta", beta[None], len(rows))[0].to(rows)  # (k,), of either sign
    if len(beta):
        check_beta(kind, float(beta.min()))
    return beta[:, None]


def check_beta(kind: str, beta: float) -> None:
    """ProblemError if `beta` is no number for a target: 0 or more for `opposite`, above -1 for
    `specific` (-1 would be no change at all)."""
    if kind == "opposite":
        number("beta of opposite", beta, low=0)
    if kind == "specific":
        number("beta of specific", beta, above=-1)
