"""The methods, as Dassl trainers. Importing this package registers them, and their settings in
`SETTINGS`: method -> dataclass of its own settings, or None."""

from trainers import baselines, methods  # noqa: F401
from trainers.base import SETTINGS

__all__ = ["SETTINGS"]
