"""What the classes of a results folder were forgotten from: bundles, and a way to encode texts.

No path is taken from the results folder, which may come from somebody else: the command line of
the audit says where everything is, and what is there is compared with what the results record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clip.bundle import FeatureBundle, load_bundles
from clip.cache import FeatureCache
from clip.features import build_bundle
from clip.source import ClipSource
from evaluation.results import SETTINGS, Logs
from forgetting.errors import ProblemError
from forgetting.settings import setting

Encode = Callable[[list[str]], Tensor]  # n texts -> hidden states (n, w)
RECORDED = ("backbone", "weights", "template", "split")  # settings that name a run's inputs


@dataclass(frozen=True)
class Places:
    """Where the inputs of a run are."""

    features: str = setting("", "folder of feature bundles; then no model and no images are read")
    root: str = setting("data", "folder of the image sets")
    images: str = setting("", "images of one's own, a folder or a CSV file")
    cache: str = setting("cache", "folder of what was encoded")
    backbone: str = setting("", "the model, where it is a folder or one of open_clip's")
    weights: str = setting("", "a checkpoint of the backbone; default: the published one")


@dataclass(frozen=True)
class Inputs:
    """What the classes of one data set were forgotten from.

    Attributes:
        bundle: of the set itself; others: of the sets that were evaluated beside it.
        encode: encodes further texts; None where there is no model.
    """

    bundle: FeatureBundle
    others: dict[str, FeatureBundle]
    encode: Encode | None


def labels_of(logs: Logs, dataset: str) -> list[str]:
    """The labels of a data set's results, in the order of the logs."""
    return [label for label in logs[dataset] if label != SETTINGS]


def load_inputs(folder: Path, logs: Logs, dataset: str, places: Places) -> Inputs:
    """The inputs of a data set's results.

    Raises:
        ProblemError: the results do not say what made them, or what is at `places` is something
            else.
    """
    settings = {"precision": "fp32"} | logs[dataset].get(SETTINGS, {})
    if not settings.keys() >= set(RECORDED):
        raise ProblemError(
            f"the results of {dataset} in {folder} do not say what model made them; an audit needs "
            "results of this repository's trainers"
        )
    results = [logs[dataset][label]["final_results"] for label in labels_of(logs, dataset)]
    names, encode = [dataset, *sorted(set().union(*results) - {dataset})], None
    backbone = places.backbone or settings["backbone"]
    if places.features:
        bundles = load_bundles(places.features, backbone, names)
    elif ":" in settings["backbone"] and not places.backbone:
        raise ProblemError(
            f"the results of {dataset} in {folder} were made with the model "
            f"{settings['backbone']!r}; say where it is: --backbone"
        )
    else:
        model = backbone, places.weights or None, places.cache
        source = ClipSource(*model, precision=settings["precision"])
        encode = FeatureCache(source).texts
        of_set = {key: settings[key] for key in ("template", "split")} | {"own": places.images}
        try:
            bundles = {
                name: build_bundle(name, source, places.root, **(of_set if name == dataset else {}))
                for name in names
            }
        except ProblemError as error:
            hint = "--features, --root or --images says where the run had its inputs"
            raise ProblemError(f"{error} ({hint})") from error
    bundle = bundles.pop(dataset)
    _compare(bundle, settings, folder)
    return Inputs(bundle, bundles, encode)


def _compare(bundle: FeatureBundle, settings: dict[str, Any], folder: Path) -> None:
    """ProblemError unless the bundle is of the model and split that the results were made with."""
    for key in ("weights", "template", "split", "model", "precision"):
        given = getattr(bundle, key)
        if settings.get(key, given) != given:
            raise ProblemError(
                f"the results in {folder} were made with {key} {settings[key]!r}, what is there "
                f"now for {bundle.dataset} has {given!r}; say where the former is: --features DIR, "
                "or --root DIR and --weights PATH"
            )
