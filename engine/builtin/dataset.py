"""`DatasetBase`: the splits of a set, and few-shot samples of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from engine import splits
from engine.splits import Datum


class DatasetBase(splits.DatasetBase):
    """As `engine.splits.DatasetBase`, with the helpers of Dassl's that CoOp's data sets call."""

    def generate_fewshot_dataset(
        self, *data_sources: list[Datum], num_shots: int = -1, repeat: bool = False
    ) -> list[Datum] | list[list[Datum]]:
        """`num_shots` random images of each class, from each source; below 1 all of them.

        A class with fewer gives all it has, or with `repeat` some of them again. Returns a list
        for one source, else a list of lists.
        """

        def shots(items: list[Datum]) -> list[Datum]:
            if len(items) >= num_shots:
                return random.sample(items, num_shots)
            return random.choices(items, k=num_shots) if repeat else items

        def sample(source: list[Datum]) -> list[Datum]:
            groups = self.split_dataset_by_label(source)
            return [datum for items in groups.values() for datum in shots(items)]

        sampled = list(data_sources)
        if num_shots >= 1:
            print(f"Creating a {num_shots}-shot dataset")
            sampled = [sample(source) for source in data_sources]
        return sampled[0] if len(sampled) == 1 else sampled

    def split_dataset_by_label(self, data_source: Sequence[Datum]) -> dict[int, list[Datum]]:
        """The images of each label."""
        groups: dict[int, list[Datum]] = defaultdict(list)
        for datum in data_source:
            groups[datum.label].append(datum)
        return groups
