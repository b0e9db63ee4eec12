"""Where forgotten texts are sent: the only place that turns the name of a target into `P`.

    empty       the paper's: the embedding of the empty prompt, of norm 1
    opposite    -beta times the text's own embedding. beta = 0 removes it; 0.1 to 0.3 also carries
                over to other words for the text, which keep their direction under the paper's
                target; near 1 the larger change harms others two to four times as much
    specific    the same for the part of the embedding that retained names do not explain
    orthogonal  the direction that texts use least, of norm 1
    text:TEXT   the embedding of a text, of norm 1
    a vector    any embedding

All of them are functions of embeddings `e = h W + b`. The target decides whether other words for
a forgotten class keep it recognised (docs/exact.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.errors import ProblemError, number, shown, unknown
from forgetting.io import FLOATS, matrix, tensor
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
    """Hidden states (n, w) that targets are computed from; a target needs some of them only."""

    projection: Tensor  # `W`, (w, d)
    bias: Tensor | None = None  # `b`, (d,)
    classes: Tensor | None = None  # (C, w), the texts among which images are classified
    label: Mapping[str, int] = field(default_factory=dict)  # class -> its row
    empty: Tensor | None = None  # (1, w), the empty prompt
    text: Tensor | None = None  # (1, w), the TEXT of `text:TEXT`
    named: Tensor | None = None  # (n, w), all texts that are named anywhere, for `orthogonal`
    noise_std: float = 0.5  # of the noise that `empty` may draw
    retain: RetainSet | None = None  # the names that `specific` compares with
    lam: float = 1.0  # its ridge

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
    """Raise ProblemError if `kind` is no target for embeddings (d,), or `beta` no number for it: 0
    or more for `opposite`, above -1 (which changes nothing) for `specific`, 0 for the others."""
    if isinstance(kind, Tensor):
        matrix("target", tensor("target", kind, FLOATS, (d or kind.numel(),))[None])
    elif not isinstance(kind, str):
        raise ProblemError(f"no target {shown(kind)}; there are {', '.join(OPTIONS)}")
    elif kind not in TARGETS and not (kind.startswith("text:") and kind[5:].strip()):
        raise unknown("target", kind, OPTIONS)
    if kind == "opposite":
        number("beta of opposite", beta, low=0)
    elif number("beta", beta, above=-1) and kind != "specific":
        raise ProblemError(f"beta is for {' and '.join(WITH_BETA)}, not for other targets")


def targets(
    kind: str | Tensor,
    batch: Batch,
    inputs: TargetInputs,
    beta: float | Tensor = 0.0,
    excluded: Tensor | None = None,
) -> tuple[Tensor, list[int]]:
    """Where the texts of requests are sent, `P` (K, d) float64, and for each request how often
    noise was drawn (0 but for `empty`).

    Args:
        kind: one of `TARGETS`, `text:TEXT`, or a vector (d,).
        beta: of `opposite` and `specific`; one number, or one for each text, (K,).
        excluded: (C, n) bool, which retained names are excluded with each class; for `specific`.

    Raises ProblemError: an unknown target, or no draw of noise leads away from the forgotten
    classes.
    """
    e, draws = inputs.embed(batch.hidden), [0] * len(batch)  # (K, d)
    beyond = torch.as_tensor(beta, dtype=e.dtype).to(e.device).expand(len(e))[:, None]  # (K, 1)
    if isinstance(kind, Tensor):
        goal = kind.detach().to(e).reshape(1, -1)
    elif kind == "empty":
        classes, empty = inputs.embed(inputs.classes), inputs.embed(inputs.empty)
        drawn = []
        for request in batch:
            labels = [inputs.label[name] for name in request.classes]
            drawn.append(empty_target(empty, classes, labels, request.seed, inputs.noise_std))
        draws = [count for _, count in drawn]
        goal = torch.cat([target for target, _ in drawn])[batch.of_text]
    elif kind == "opposite":
        goal = -beyond * e
    elif kind == "specific":
        of_texts = excluded[batch.owner.to(excluded.device)]  # (K, n)
        goal = specific_target(e, inputs.specific, beyond, of_texts)
    elif kind == "orthogonal":
        # The direction that embeddings use least: orthogonal to them, where that is possible.
        goal = torch.linalg.svd(inputs.embed(inputs.named), full_matrices=True).Vh[-1:]
    elif kind.startswith("text:"):
        goal = normalize(inputs.embed(inputs.text), dim=1)
    else:
        raise unknown("target", kind, OPTIONS)
    return goal.expand(len(e), -1), draws


def empty_target(
    empty: Tensor, classes: Tensor, labels: list[int], seed: int, noise_std: float
) -> tuple[Tensor, int]:
    """The unit-norm embedding (1, d) of the empty prompt, and how often noise was drawn.

    If the class nearest to it is itself to be forgotten, Gaussian noise is added to the embedding,
    which is normalised again, until the nearest class is none of those (the paper's regeneration).

    Args:
        empty: (1, d), the embedding of the empty prompt, not normalised.
        classes: (C, d), embeddings of all classes; labels: the rows that are to be forgotten.
        seed: of the noise, which is drawn on the CPU, so that every device gets the same numbers.
        noise_std: in units of the embedding's coordinates.
    """
    if len(set(labels)) == len(classes):
        raise ProblemError("every class is to be forgotten: no class is left to send the texts to")
    candidate, generator = empty, torch.Generator().manual_seed(seed)
    for draws in range(MAX_DRAWS):
        unit = normalize(candidate, dim=1)
        if int((unit @ normalize(classes, dim=1).T).argmax()) not in labels:
            return unit, draws
        noise = torch.randn(empty.shape, generator=generator, dtype=torch.float32)
        candidate = empty + noise_std * noise.to(empty)
    raise ProblemError(f"{MAX_DRAWS} noisy empty prompts are near classes to forget: forget fewer")


def specific_target(e: Tensor, retained: Ridge, beta: Tensor, excluded: Tensor) -> Tensor:
    """`P = e - (1 + beta) (e r / r r) r`, (k, d): remove only what is specific to a text.

    With `T` the weighted Gram matrix of the retained embeddings, `r = lam (T + lam I)^-1 e` is the
    part of e that ridge regression on them does not explain. Only that direction is removed, and
    -beta times it is left (beta may be negative, down to -1). What the text shares with others, as
    all CLIP texts do, stays. A large `lam` gives the target `opposite`; docs/exact.md compares.

    Args:
        e: (k, d), embeddings; retained: n retained embeddings with `T + lam I`; beta: (k, 1).
        excluded: (k, n) bool, the embeddings that are not retained for each text.
    """
    r = torch.empty_like(e)
    for _, texts, columns, _ in request_batches(retained, e, torch.arange(len(e)), excluded):
        r[texts] = columns
    squared = (r * r).sum(dim=1, keepdim=True)
    ratio = (e * r).sum(dim=1, keepdim=True) / squared
    return e - (1 + beta) * ratio.where(squared > 0, 0.0) * r  # of a zero text: zero
