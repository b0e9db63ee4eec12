"""The image sets: class names, test images and retain vocabularies.

Importing this package registers every set of the table, so that Dassl's `build_dataset(cfg)` finds
them by name; `load(name, root)` reads one without a config.
"""

from __future__ import annotations

from engine import DATASET_REGISTRY

from .names import clean_name, key, match
from .reader import CLASSES, ImageSet, available, load
from .table import NAMES, SETS, SetSpec, spec
from .vocabulary import retain_vocabulary, same_meaning

for _class in CLASSES.values():
    DATASET_REGISTRY.register(force=True)(_class)  # Dassl has sets of its own, such as a CIFAR10

__all__ = [
    "NAMES",
    "SETS",
    "ImageSet",
    "SetSpec",
    "available",
    "clean_name",
    "key",
    "load",
    "match",
    "retain_vocabulary",
    "same_meaning",
    "spec",
]
