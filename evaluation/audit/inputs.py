"""From a results folder back to what its classes were forgotten from: bundles, texts, adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from clip.bundle import FeatureBundle, load_bundles
from clip.cache import FeatureCache
from clip.features import build_bundle
from clip.source import ClipSource
from evaluation.results import ARGS, PLACES, SETTINGS, Logs, no_results, run_places
from forgetting.errors import ProblemError, unknown

Encode = Callable[[list[str]], Tensor]  # n texts -> hidden states (n, w)


@dataclass(frozen=True)
class Inputs:
    """What the classes of one data set were forgotten from.

    Attributes:
        bundle: of the set itself; others: of the sets that were evaluated beside it.
        encode: reads further texts; None where there is no model.
    """

    bundle: FeatureBundle
    others: dict[str, FeatureBundle]
    encode: Encode | None


def labels_of(logs: Logs, dataset: str) -> list[str]:
    """The labels of a data set's results, in the order of the logs."""
    return [label for label in logs[dataset] if label != SETTINGS]


def recover(folder: Path, logs: Logs, dataset: str, given: Mapping[str, str | None]) -> Inputs:
    """The inputs of a data set's results, from the command lines kept beside the logs.

    Args:
        given: `PLACES` that replace the run's own, where they are there and not None: files may
            have moved since.

    Raises:
        ProblemError: no record of how the results were made, or what they were made from is gone or
            has changed.
    """
    settings = logs[dataset].get(SETTINGS, {})
    if not {"backbone", "weights", "template", "split"} <= settings.keys():
        raise ProblemError(
            f"the results of {dataset} in {folder} do not say what model made them; an audit needs "
            "results of this repository's trainers"
        )
    places = _places(folder, dataset, given)
    results = [logs[dataset][label]["final_results"] for label in labels_of(logs, dataset)]
    names, encode = [dataset, *sorted(set().union(*results) - {dataset})], None
    if places["features"]:
        try:
            bundles = load_bundles(places["features"], settings["backbone"], names)
        except ProblemError as error:
            raise ProblemError(f"{error} (--features DIR says where bundles are now)") from error
    else:
        precision = settings.get("precision", "fp32")
        model = settings["backbone"], places["weights"] or None, places["cache"]
        source = ClipSource(*model, precision=precision)
        own = {"template": settings["template"], "split": settings["split"]}
        encode = FeatureCache(source, places["cache"]).texts
        where = source, places["root"], places["cache"]
        own["own"] = places["images"]
        bundles = {
            name: build_bundle(name, *where, **(own if name == dataset else {})) for name in names
        }
    bundle = bundles.pop(dataset)
    _same(bundle, settings, folder)
    return Inputs(bundle, bundles, encode)


def _places(folder: Path, dataset: str, given: Mapping[str, str | None]) -> dict[str, str]:
    """Where the latest run of `dataset` into `folder` found its files."""
    run = run_places(folder, dataset)
    places = run or dict.fromkeys(PLACES, "")
    places |= {key: own for key, own in given.items() if own is not None}
    if given.get("root") is not None and given.get("features") is None:
        places["features"] = ""  # images instead of the bundles of the run
    if run is None and not (places["features"] or places["root"]):
        raise ProblemError(
            f"{folder / ARGS} has no command line of {dataset}; say where its features or images "
            "are: --features DIR, or --root DIR"
        )
    places["cache"] = places["cache"] or "cache"
    return places


def _same(bundle: FeatureBundle, settings: dict[str, Any], folder: Path) -> None:
    settings = {"precision": "fp32"} | settings
    for key in ("weights", "template", "split", "model", "precision"):
        now = getattr(bundle, key)
        if settings.get(key, now) != now:
            raise ProblemError(
                f"the results in {folder} were made with {key} {settings[key]!r}, what is there "
                f"now for {bundle.dataset} has {now!r}; say where the former is: "
                "--features DIR, or --root DIR and --weights PATH"
            )


def select(
    folder: Path, logs: Logs, datasets: Sequence[str], labels: Sequence[str]
) -> dict[str, list[str]]:
    """Data set -> labels to audit: those asked for, all where nothing is asked for.

    Raises:
        ProblemError: no results there, or none of a data set or label that was asked for.
    """
    if not logs:
        raise no_results(folder)
    for name in datasets:
        if name not in logs:
            raise unknown(f"data set in {folder}", name, list(logs))
    there = {name: labels_of(logs, name) for name in datasets or logs}
    known = {label: name for name, names in there.items() for label in names}
    for label in labels:
        if label not in known:
            raise unknown(f"label in {folder}", label, known)
    wanted = set(labels or known)
    chosen = {name: [label for label in names if label in wanted] for name, names in there.items()}
    return {name: names for name, names in chosen.items() if names}
