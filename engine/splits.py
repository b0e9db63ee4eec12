"""`Datum` and `DatasetBase` as both engines offer them.

Under Dassl these stand in front of its own classes (see `engine.on_dassl`), because two things
there do not suit sets that are only evaluated: its `DatasetBase` takes the class names from
`train_x` alone and fails if that is empty, and its `Datum` asserts that the file exists, so a run
on precomputed features would need every image on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import UserError


class Datum:
    """An image of a set: its path, label, domain and class name. Does not touch the disk."""

    def __init__(
        self, impath: str = "", label: int = 0, domain: int = 0, classname: str = ""
    ) -> None:
        self._impath = impath
        self._label = label
        self._domain = domain
        self._classname = classname

    @property
    def impath(self) -> str:
        return self._impath

    @property
    def label(self) -> int:
        return self._label

    @property
    def domain(self) -> int:
        return self._domain

    @property
    def classname(self) -> str:
        return self._classname


class DatasetBase:
    """The splits of a set, and its classes taken from all splits together.

    Any split may be empty or None. `train_u` (unlabelled, optional) does not count for the
    classes. Labels must be 0 .. num_classes - 1, each with one class name, so that `classnames`
    can be indexed by label; otherwise UserError.
    """

    dataset_dir = ""  # folder of the set below DATASET.ROOT
    domains: Sequence[str] = ()

    def __init__(
        self,
        train_x: list[Datum] | None = None,
        train_u: list[Datum] | None = None,
        val: list[Datum] | None = None,
        test: list[Datum] | None = None,
    ) -> None:
        self._splits = {"train_x": train_x, "train_u": train_u, "val": val, "test": test}
        labelled = [datum for split in (train_x, val, test) for datum in split or ()]
        self._lab2cname, self._classnames = self.get_lab2cname(labelled)
        self._num_classes = self.get_num_classes(labelled)

    @property
    def train_x(self) -> list[Datum]:
        return self._splits["train_x"] or []

    @property
    def train_u(self) -> list[Datum] | None:
        return self._splits["train_u"]

    @property
    def val(self) -> list[Datum] | None:
        return self._splits["val"]

    @property
    def test(self) -> list[Datum]:
        return self._splits["test"] or []

    @property
    def lab2cname(self) -> dict[int, str]:
        return self._lab2cname

    @property
    def classnames(self) -> list[str]:
        return self._classnames

    @property
    def num_classes(self) -> int:
        return self._num_classes

    @staticmethod
    def get_num_classes(data_source: Sequence[Datum]) -> int:
        """The highest label plus one; 0 of nothing."""
        return max((datum.label for datum in data_source), default=-1) + 1

    @staticmethod
    def get_lab2cname(data_source: Sequence[Datum]) -> tuple[dict[int, str], list[str]]:
        """Class names by label, and the same in a list in label order."""
        mapping: dict[int, str] = {}
        for datum in data_source:
            name = mapping.setdefault(datum.label, datum.classname)
            if name != datum.classname:
                raise UserError(
                    f"label {datum.label} has two class names, {name!r} and {datum.classname!r} "
                    f"({datum.impath}); each label needs one"
                )
        labels = sorted(mapping)
        if labels != list(range(len(labels))):
            gap = next(i for i, label in enumerate(labels) if i != label)
            raise UserError(
                f"labels must run from 0 to {len(labels) - 1} for {len(labels)} classes, "
                f"but no image has label {gap} (highest: {labels[-1]})"
            )
        return {label: mapping[label] for label in labels}, [mapping[label] for label in labels]
