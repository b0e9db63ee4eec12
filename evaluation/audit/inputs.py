"""What the classes of a results folder were forgotten from: bundles, and a way to encode texts.

No path is taken from the results folder, which may come from somebody else: the command line of
the audit says where everything is, and what is there is compared with what the results record.
"""

from dataclasses import dataclass
from pathlib import Path

from clip.bundle import load_bundles
from clip.cache import FeatureCache
from clip.features import build_bundle
from clip.source import ClipSource
from evaluation.audit.case import AuditData
from evaluation.results import SETTINGS, Logs
from forgetting.errors import ProblemError
from forgetting.settings import setting

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


def load_inputs(folder: Path, logs: Logs, dataset: str, places: Places, seed: int) -> AuditData:
    """What the classes of a data set's results were forgotten from. Raises ProblemError: the
    results do not say what made them, or something else is at `places`."""
    settings = {"precision": "fp32"} | logs[dataset].get(SETTINGS, {})
    if not settings.keys() >= set(RECORDED):
        raise ProblemError(f"the results of {dataset} in {folder} do not say what made them")
    results = [one["final_results"] for key, one in logs[dataset].items() if key != SETTINGS]
    names, encode = [dataset, *sorted(set().union(*results) - {dataset})], None
    backbone = places.backbone or settings["backbone"]
    if places.features:
        bundles = load_bundles(places.features, backbone, names)
    elif ":" in settings["backbone"] and not places.backbone:
        model = settings["backbone"]
        raise ProblemError(f"{folder} was made with {model!r}; say where it is: --backbone")
    else:
        weights, precision = places.weights or None, settings["precision"]
        source = ClipSource(backbone, weights, places.cache, precision=precision)
        encode = FeatureCache(source).texts
        own = {"template": settings["template"], "own": places.images}
        try:
            bundles = {dataset: build_bundle(dataset, source, places.root, **own)}
            bundles |= {name: build_bundle(name, source, places.root) for name in names[1:]}
        except ProblemError as error:
            hint = "--features, --root or --images says where the run had its inputs"
            raise ProblemError(f"{error} ({hint})") from error
    bundle = bundles.pop(dataset)
    for key in (*RECORDED[1:], "model", "precision"):
        given = getattr(bundle, key)
        if settings.get(key, given) != given:
            raise ProblemError(
                f"{folder} was made with {key} {settings[key]!r}, but {dataset} now has {given!r}; "
                f"say where the former is: --features, or --root and --weights"
            )
    return AuditData(bundle, bundles, seed, encode)
