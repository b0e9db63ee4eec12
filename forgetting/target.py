"""Where forgotten texts are sent: the paper's empty prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.problem import ProblemError

# The noise is far larger than an embedding's differences between classes, so a redraw rarely
# repeats; a hundred thousand of them mean that no draw can help (one class, for example).
MAX_DRAWS = 100_000


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
    normalised again, until the nearest class is none of those to forget (METHOD: the paper's
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
    empty = neutral_hidden @ projection  # (1, w) @ (w, d) -> (1, d)
    classes = normalize(class_embeddings, dim=-1)
    forgotten = set(forget_labels)
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
