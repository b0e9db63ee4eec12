"""The numbers that a study starts from: those of configs/, as a run of train.py would take them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.config import settings
from engine.errors import UserError
from engine.files import sha256_file
from forgetting import LoraSettings

GROUPS = ("own", "vocabulary", "others")
FORMAT = 1  # of the rows; raise it where the same constants begin to mean another answer
MAX_TRIALS = 3  # of the descent's retry: a weight below c* is raised beforehand, so one is enough


@dataclass(frozen=True)
class Constants:
    """What every row of a study shares unless the study varies it.

    Attributes:
        single, several: (lamb_preserve, lamb_forget) of the data set for one class and for several
            at once; lamb_weight, rank, alpha, noise_std: the paper's.
        lora: the descent's constants.
        weights: of the retained groups own, vocabulary and others; mu, shared, similarity, beta:
            of the constrained form (configs/trainers/ForgetExact.yaml).
    """

    single: tuple[float, float]
    several: tuple[float, float]
    lamb_weight: float
    rank: int
    alpha: float
    noise_std: float
    lora: LoraSettings
    weights: dict[str, float]
    mu: float
    shared: float
    similarity: float
    beta: float

    def pair(self, count: int) -> tuple[float, float]:
        """(lamb_preserve, lamb_forget) for `count` classes at once."""
        return self.several if count > 1 else self.single

    def digest(self, bundles: Iterable[Path]) -> str:
        """Twelve hexadecimal digits: two rows with the same were made from the same numbers and
        the same bundle files, wherever these lie."""
        files = sorted((path.stem, sha256_file(path)) for path in bundles)
        text = json.dumps([FORMAT, asdict(self), files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_constants(dataset: str, backbone: str) -> Constants:
    """The constants of configs/ for a data set and backbone.

    Raises:
        UserError: no weights for that backbone, or a config that lacks a number.
    """
    paper, exact = (settings(name, dataset, backbone) for name in ("ForgetLoRA", "ForgetExact"))
    weights = exact.FORGET.WEIGHTS.get(backbone)
    if weights is None:
        raise UserError(
            f"no loss weights for {backbone} in the config of {dataset} (configs/datasets, "
            "FORGET.WEIGHTS); add SINGLE and MULTICLASS there"
        )
    try:
        descent = {key.lower(): value for key, value in paper.TRAINER.FORGETLORA.items()}
        node = exact.TRAINER.FORGETEXACT
        return Constants(
            single=tuple(map(float, weights.SINGLE)),
            several=tuple(map(float, weights.MULTICLASS)),
            lamb_weight=float(paper.FORGET.LAMB_WEIGHT),
            rank=int(paper.FORGET.RANK),
            alpha=float(paper.FORGET.ALPHA),
            noise_std=float(paper.FORGET.NOISE_STD),
            lora=LoraSettings(**descent | {"max_trials": min(MAX_TRIALS, descent["max_trials"])}),
            weights={group: float(node[group.upper()]) for group in GROUPS},
            mu=float(node.MU),
            shared=float(node.SHARED),
            similarity=float(exact.FORGET.SIMILARITY),
            beta=float(exact.FORGET.BETA),
        )
    except (KeyError, AttributeError, TypeError) as error:
        raise UserError(f"configs for {dataset} and {backbone}: {error} is missing") from error
