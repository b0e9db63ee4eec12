"""Where forgotten texts are sent: the only place that turns the name of a target into `P`.

    empty       the paper's: the embedding of the empty prompt, of norm 1
    opposite    -beta times the text's own embedding
    specific    the same for the part of the embedding that retained names do not explain
    orthogonal  the direction that texts use least, of norm 1
    text:TEXT   the embedding of a text, of norm 1
    a vector    any embedding

All of them are functions of embeddings `e = h W + b`. The target decides whether other words for
a forgotten class keep it recognised (docs/exact.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.errors import ProblemError, number, shown, unknown
from forgetting.io import FLOATS, mask, matrix, tensor
from forgetting.problem import Batch
from forgetting.retain import RetainSet
from forgetting.solvers.constrained import Ridge, request_batches

TARGETS = ("empty", "opposite", "orthogonal", "specific")
WITH_BETA = ("specific", "opposite")
OPTIONS = (*TARGETS, "text:TEXT", "a vector (d,)")
# The noise is far larger than the differences between classes, so a draw rarely repeats. Ten
# thousand of them mean that no draw can help: one class, for example.
MAX_DRAWS = 10_000


@dataclass(frozen=True)
class TargetInputs:
    """Hidden states (n, w) that targets are computed from; a target needs some of them only.

    Attributes:
        projection: `W`, (w, d); bias: `b`, (d,), or None.
        classes: (C, w), the texts among which images are classified; label: class -> its row.
        empty: (1, w), the empty prompt; text: (1, w), the TEXT of `text:TEXT`.
        named: (n, w), all texts that are named anywhere, for `orthogonal`.
        noise_std: standard deviation of the noise that `empty` may draw.
        retain: the names that `specific` compares with; lam: its ridge.
    """

    projection: Tensor
    bias: Tensor | None = None
    classes: Tensor | None = None
    label: Mapping[str, int] = field(default_factory=dict)
    empty: Tensor | None = None
    text: Tensor | None = None
    named: Tensor | None = None
    noise_std: float = 0.5
    retain: RetainSet | None = None
    lam: float = 1.0

    def embed(self, hidden: Tensor) -> Tensor:
        """`h W + b`, (n, d) float64, of hidden states (n, w)."""
        w = self.projection.double()
        embeddings = hidden.to(w) @ w  # (n, w) @ (w, d)
        return embeddings if self.bias is None else embeddings + self.bias.to(w)

    @cached_property
    def specific(self) -> Ridge:
        """What `specific_target` compares with: the retained embeddings, with their ridge."""
        retain = self.retain
        # Of `h W` a square root is known; a bias needs one of its own.
        root = None if self.bias is not None else retain.root @ self.projection.to(retain.root)
        return Ridge(self.embed(retain.rows), self.lam, retain.name_weights, root)


def check_target(kind: str | Tensor, beta: float = 0.0, d: int | None = None) -> None:
    """Raise ProblemError if `kind` is no target for embeddings (d,), or `beta` no number for it."""
    if isinstance(kind, Tensor):
        matrix("target", tensor("target", kind, FLOATS, (d or kind.numel(),))[None])
    elif not isinstance(kind, str):
        raise ProblemError(f"no target {shown(kind)}; there are {', '.join(OPTIONS)}")
    elif kind not in TARGETS and not (kind.startswith("text:") and kind[5:].strip()):
        raise unknown("target", kind, OPTIONS)
    check_beta(kind, beta)


def check_beta(kind: str | Tensor, beta: float) -> None:
    """Raise ProblemError unless `beta` is 0 or more for `opposite`, above -1 for `specific` (-1
    changes nothing), and 0 for the targets that have none."""
    if kind in ("opposite", "specific"):
        least = {"low": 0} if kind == "opposite" else {"above": -1}
        number(f"beta of {kind}", beta, **least)
    elif number("beta", beta):
        raise ProblemError(f"beta is for {' and '.join(WITH_BETA)}, not for other targets")


def targets(
    kind: str | Tensor,
    batch: Batch,
    inputs: TargetInputs,
    beta: float | Tensor = 0.0,
    excluded: Tensor | None = None,
) -> tuple[Tensor, list[int]]:
    """Where the texts of requests are sent.

    Args:
        kind: one of `TARGETS`, `text:TEXT`, or a vector (d,).
        beta: of `opposite` and `specific`; one number, or one for each text, (K,).
        excluded: (C, n) bool, which retained names are excluded with each class; for `specific`.

    Returns:
        `P` (K, d) float64, and for each request how often noise was drawn (0 but for `empty`).

    Raises:
        ProblemError: an unknown target, or a beta that is no number for it.
    """
    e, no_draws = inputs.embed(batch.hidden), [0] * len(batch)  # (K, d)
    if isinstance(kind, Tensor):
        return kind.detach().to(e).reshape(1, -1).expand(len(e), -1), no_draws
    if kind == "empty":
        classes, empty = inputs.embed(inputs.classes), inputs.embed(inputs.empty)
        drawn = []
        for request in batch:
            labels = [inputs.label[name] for name in request.classes]
            generator = torch.Generator().manual_seed(request.seed)
            drawn.append(empty_target(empty, classes, labels, generator, inputs.noise_std))
        rows = [
            target.expand(len(r.texts), -1) for (target, _), r in zip(drawn, batch, strict=True)
        ]
        return torch.cat(rows), [draws for _, draws in drawn]
    if kind == "opposite":
        return opposite_target(e, beta), no_draws
    if kind == "specific":
        of_texts = excluded[batch.owner.to(excluded.device)]  # (K, n)
        return specific_target(e, inputs.specific, beta, of_texts), no_draws
    if kind == "orthogonal":
        return orthogonal_target(inputs.embed(inputs.named)).expand(len(e), -1), no_draws
    if kind.startswith("text:"):
        return normalize(inputs.embed(inputs.text), dim=1).expand(len(e), -1), no_draws
    raise unknown("target", kind, OPTIONS)


def empty_target(
    empty: Tensor,
    classes: Tensor,
    labels: list[int],
    generator: torch.Generator,
    noise_std: float = 0.5,
) -> tuple[Tensor, int]:
    """The unit-norm embedding of the empty prompt.

    If the class nearest to it is itself to be forgotten, Gaussian noise is added to the embedding,
    which is normalised again, until the nearest class is none of those (the paper's regeneration).

    Args:
        empty: (1, d), the embedding of the empty prompt, not normalised.
        classes: (C, d), embeddings of all classes, of any norm; labels: the rows that are to be
            forgotten.
        generator: draws the noise, on the CPU, so that every device gets the same numbers.
        noise_std: in units of the embedding's coordinates.

    Returns:
        (1, d), and the number of times that noise was drawn.

    Raises:
        ProblemError: no draw leads away from the forgotten classes.
    """
    empty = matrix("empty", empty, count=1)
    classes = normalize(matrix("classes", classes, empty.shape[1]).to(empty), dim=1)
    number("noise_std", noise_std, low=0)
    if not isinstance(labels, list | tuple):
        raise ProblemError(f"labels must be a list of rows, not {shown(labels)}")
    forgotten = {number("a label", label, 0, len(classes) - 1, whole=True) for label in labels}
    if forgotten >= set(range(len(classes))):
        raise ProblemError("every class is to be forgotten: no class is left to send the texts to")
    candidate = empty
    for draws in range(MAX_DRAWS):
        unit = normalize(candidate, dim=1)
        if int((unit @ classes.T).argmax()) not in forgotten:
            return unit, draws
        noise = torch.randn(empty.shape, generator=generator, dtype=torch.float32)
        candidate = empty + noise_std * noise.to(empty)
    raise ProblemError(
        f"{MAX_DRAWS} noisy empty prompts all lie nearest to a class to forget; "
        "forget fewer classes at once"
    )


def opposite_target(embeddings: Tensor, beta: float | Tensor) -> Tensor:
    """`P = -beta e`, (k, d), for embeddings (k, d).

    beta = 0 removes the embedding. 0.1 to 0.3 also carries over to other words for the text, which
    keep their direction under the paper's target (of norm 1 beside embeddings of norm 10). Near 1
    the larger change harms others two to four times as much.

    Raises:
        ProblemError: beta is not 0 or more.
    """
    e = matrix("embeddings", embeddings)
    return -_betas("opposite", beta, e) * e


def specific_target(
    embeddings: Tensor, retained: Ridge, beta: float | Tensor, excluded: Tensor | None = None
) -> Tensor:
    """`P = e - (1 + beta) (e r / r r) r`, (k, d): remove only what is specific to a text.

    With `T` the weighted Gram matrix of the retained embeddings, `r = lam (T + lam I)^-1 e` is the
    part of e that ridge regression on them does not explain. Only that direction is removed, and
    -beta times it is left (beta may be negative, down to -1). What the text shares with others, as
    all CLIP texts do, stays. A large `lam` gives `opposite_target`; docs/exact.md compares them.

    Args:
        embeddings: (k, d).
        retained: n retained embeddings with `T + lam I`.
        beta: one number, or one for each text, (k,).
        excluded: (k, n) bool, the embeddings that are not retained for each text. None: none.

    Raises:
        ProblemError: beta is not above -1, or tensors that do not fit.
    """
    e = matrix("embeddings", embeddings, len(retained.gram)).to(retained.gram)
    if excluded is None:
        excluded = torch.zeros(len(e), len(retained.rows), dtype=torch.bool)
    excluded = mask("excluded", excluded, len(retained.rows), len(e))
    beyond = _betas("specific", beta, e)
    r, alone = torch.empty_like(e), torch.arange(len(e))
    for _, texts, columns, _ in request_batches(retained, e, alone, excluded):
        r[texts] = columns
    squared = (r * r).sum(dim=1, keepdim=True)
    ratio = (e * r).sum(dim=1, keepdim=True) / squared
    return e - (1 + beyond) * ratio.where(squared > 0, 0.0) * r  # of a zero text: zero


def orthogonal_target(embeddings: Tensor) -> Tensor:
    """The direction that embeddings (n, d) use least, at norm 1, (1, d).

    It is orthogonal to their span where that leaves a dimension over. Other words for a forgotten
    class that move only part of the way keep part of their direction.
    """
    e = matrix("embeddings", embeddings)
    if e.shape[1] == 0:
        raise ProblemError("embeddings have at least one dimension")
    _, _, directions = torch.linalg.svd(e.double(), full_matrices=True)
    return directions[-1:].to(e)


def _betas(kind: str, beta: float | Tensor, rows: Tensor) -> Tensor:
    """One beta, or one for each of k rows, as (k, 1)."""
    if not isinstance(beta, Tensor):
        beta = torch.full((len(rows),), float(number("beta", beta)), dtype=torch.float64)
    beta = matrix("beta", beta[None], len(rows))[0].to(rows)
    if len(beta):
        check_beta(kind, float(beta.min()))
    return beta[:, None]
