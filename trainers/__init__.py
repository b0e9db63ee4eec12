"""The methods, as Dassl trainers. Importing this package registers them by name."""

from trainers import baselines, exact, paper  # noqa: F401
