"""Where forgotten texts are sent: the only place that turns the name of a target into `P`.

    empty       the paper's: the embedding of the empty prompt, of norm 1
    opposite    -beta times the text's own embedding. beta = 0 removes it; 0.1 to 0.3 also carries
                over to other words for the text, which keep their direction under `empty`
    specific    the same for the part of the embedding that retained names do not explain
    orthogonal  the direction that texts use least, of norm 1
    text:TEXT   the embedding of a text, of norm 1
    a vector    any embedding

The first four are functions in the table `TARGETS`; one of your own is one more (docs/extend.md).
All of them are functions of embeddings `e = h W + b`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature

import torch
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.errors import ProblemError, number, unknown
from forgetting.io import FLOATS, matrix, tensor
from forgetting.problem import Batch
from forgetting.retain import RetainSet
from forgetting.solvers.constrained import Ridge, request_batches

MAX_DRAWS = 10_000  # so many mean that no draw can help: one class, for example


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
    def ridge(self) -> Ridge:
        """The n retained embeddings with `T + lam I`, see `specific`."""
        retain = self.retain
        # Of `h W` a square root is known; a bias needs one of its own.
        root = None if self.bias is not None else retain.root @ self.projection.to(retain.root)
        return Ridge(self.embed(retain.rows), self.lam, retain.name_weights, root)


def empty(e: Tensor, inputs: TargetInputs, batch: Batch) -> Tensor:
    """The unit-norm embedding of the empty prompt.

    If the class nearest to it is itself to be forgotten, Gaussian noise is added to the embedding,
    which is normalised again, until the nearest class is none of those (the paper's regeneration).
    The seed is the request's; the noise is drawn on the CPU, the same for every device.
    """
    classes, prompt = normalize(inputs.embed(inputs.classes), dim=1), inputs.embed(inputs.empty)
    goals = []
    for request in batch:
        labels = {inputs.label[name] for name in request.classes}
        candidate, generator = prompt, torch.Generator().manual_seed(request.seed)
        for _ in range(MAX_DRAWS):
            goal = normalize(candidate, dim=1)
            if int((goal @ classes.T).argmax()) not in labels:
                break
            noise = torch.randn(prompt.shape, generator=generator, dtype=torch.float32)
            candidate = prompt + inputs.noise_std * noise.to(prompt)
        else:
            raise ProblemError(
                f"target empty: {MAX_DRAWS} draws of noise lie near a class to forget; use target "
                f"opposite or, if there are other classes, noise_std above {inputs.noise_std:g}"
            )
        goals.append(goal)
    return torch.cat(goals)[batch.of_text]


def opposite(e: Tensor, inputs: TargetInputs, beta: Tensor) -> Tensor:
    """`-beta e`."""
    return -beta * e


def orthogonal(e: Tensor, inputs: TargetInputs) -> Tensor:
    """The direction that embeddings use least: orthogonal to them, where that is possible."""
    return torch.linalg.svd(inputs.embed(inputs.named), full_matrices=True).Vh[-1:]


def specific(e: Tensor, inputs: TargetInputs, beta: Tensor, excluded: Tensor) -> Tensor:
    """`e - (1 + beta) (e r / r r) r`: remove only what is specific to a text.

    With `T` the weighted Gram matrix of the retained embeddings, `r = lam (T + lam I)^-1 e` is the
    part of e that ridge regression on them does not explain. Only that direction is removed, and
    -beta times it is left (beta may be negative, down to -1). What the text shares with others, as
    all CLIP texts do, stays. A large `lam` gives the target `opposite`; docs/method.md compares.
    """
    r = torch.empty_like(e)
    for _, texts, columns, _ in request_batches(inputs.ridge, e, torch.arange(len(e)), excluded):
        r[texts] = columns
    squared = (r * r).sum(dim=1, keepdim=True)
    ratio = (e * r).sum(dim=1, keepdim=True) / squared
    return e - (1 + beta) * ratio.where(squared > 0, 0.0) * r  # of a zero text: zero


# Name -> function (e, inputs, ...) -> goal: from embeddings (K, d) of texts to where they are sent,
# (K, d), or (1, d) for all of them. It may also have the parameters `beta`, (K, 1); `batch`, the
# requests; and `excluded`, (K, n) bool, the names that are not retained for each text.
TARGETS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (empty, opposite, orthogonal, specific)
}


def takes(kind: str | Tensor, parameter: str) -> bool:
    """Whether the function of a target has a parameter, such as `beta`; not if there is none."""
    function = TARGETS.get(kind) if isinstance(kind, str) else None
    return function is not None and parameter in signature(function).parameters


def check_target(kind: str | Tensor, beta: float = 0.0, d: int | None = None) -> None:
    """Raise ProblemError if `kind` is no target for embeddings (d,), or `beta` no number for it: 0
    or more for `opposite`, above -1 (which changes nothing) for `specific`, 0 for the others."""
    if isinstance(kind, Tensor):
        matrix("target", tensor("target", kind, FLOATS, (d or kind.numel(),))[None])
    elif str(kind) not in TARGETS and not re.match(r"text:\s*\S", str(kind)):
        raise unknown("target", str(kind), (*TARGETS, "text:TEXT", "a vector (d,)"))
    if kind == "opposite":
        number("beta of opposite", beta, low=0, high=1e6)
    elif number("beta", beta, above=-1, high=1e6) and not takes(kind, "beta"):
        raise ProblemError(f"beta must be 0, not {beta:g}: this target takes none")


def targets(
    kind: str | Tensor,
    batch: Batch,
    inputs: TargetInputs,
    beta: float | Tensor = 0.0,
    excluded: Tensor | None = None,
) -> Tensor:
    """Where the texts of requests are sent, `P` (K, d) float64.

    Args:
        kind: one of `TARGETS`, `text:TEXT`, or a vector (d,).
        beta: one number, or one for each text, (K,).
        excluded: (C, n) bool, which retained names are excluded with each class.

    Raises ProblemError: an unknown target, or no draw of noise leads away from the forgotten
    classes.
    """
    e = inputs.embed(batch.hidden)  # (K, d)
    if isinstance(kind, Tensor):
        goal = kind.detach().to(e).reshape(1, -1)
    elif kind in TARGETS:
        beyond = torch.as_tensor(beta, dtype=e.dtype).to(e.device).expand(len(e))[:, None]
        rows = excluded[batch.owner.to(excluded.device)] if takes(kind, "excluded") else None
        given = {"beta": beyond, "batch": batch, "excluded": rows}
        wanted = {name: given[name] for name in given if takes(kind, name)}
        goal = TARGETS[kind](e, inputs, **wanted)
    else:
        check_target(kind)
        goal = normalize(inputs.embed(inputs.text), dim=1)
    return goal.expand(len(e), -1)
