"""The methods, as Dassl trainers. Importing this package imports each module in its folder, so that
a file of your own needs no entry anywhere (docs/extend.md)."""

from importlib import import_module
from pkgutil import iter_modules

from trainers.base import METHODS  # noqa: F401

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
