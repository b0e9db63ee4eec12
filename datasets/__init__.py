"""The image sets: class names, test images and retain vocabularies.

Importing this package registers every set of the table, so that Dassl's `build_dataset(cfg)` finds
them by name; `load(name, root)` reads one without a config.
"""

from engine import DATASET_REGISTRY

from .names import clean_name, key, match  # noqa: F401
from .reader import CLASSES, ImageSet, absent, load  # noqa: F401
from .table import NAMES, SETS, SetSpec, spec  # noqa: F401
from .vocabulary import retain_vocabulary, same_meaning  # noqa: F401

for _class in CLASSES.values():
    DATASET_REGISTRY.register(force=True)(_class)  # Dassl has sets of its own, such as a CIFAR10
