"""Logs and audits as rows, one per forgotten class: the only place that reads numbers from them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.audit.record import Audits, read_audits
from evaluation.results import SETTINGS, Logs, read_logs
from evaluation.rules import Fate, fate


class Change(NamedTuple):
    """An accuracy before and after forgetting: fractions, None where nothing was measured."""

    before: float | None
    after: float | None

    @property
    def points(self) -> float | None:
        """After less before, in percentage points."""
        if self.before is None or self.after is None:
            return None
        return 100 * (self.after - self.before)


@dataclass(frozen=True)
class Row:
    """One forgotten class of one request."""

    dataset: str
    label: str  # what the logs call the request
    name: str
    together: int  # how many classes the request forgot at once
    own: Change
    rest: Change  # on the classes of the set that the request did not forget
    others: dict[str, Change]  # on each other set
    solver: dict[str, Any] = field(default_factory=dict)  # what it recorded; empty: nothing
    audit: dict[str, Any] = field(default_factory=dict)  # what it measured; empty: nothing

    @property
    def others_mean(self) -> Change:
        """The mean over the other sets, of those measured before and after."""
        both = [change for change in self.others.values() if change.points is not None]
        if not both:
            return Change(None, mean(change.after for change in self.others.values()))
        return Change(mean(c.before for c in both), mean(c.after for c in both))

    @property
    def harm(self) -> float | None:
        """Points lost on the rest of the set and (mean) on other sets; negative if gained."""
        losses = [c.points for c in (self.rest, self.others_mean) if c.points is not None]
        return -sum(losses) if losses else None

    @property
    def fate(self) -> Fate:
        """What became of the class under the evaluation prompt."""
        return fate(*self.own)

    @property
    def comes_back(self) -> bool:
        """The class stays, or other words bring it back."""
        return self.fate is Fate.STAYS or bool(self.back)

    @property
    def tag(self) -> str:
        """What is wrong with it, in two words; "" if nothing is."""
        bad = {Fate.STAYS: "not forgotten", Fate.NEVER: "never recognised"}
        return bad.get(self.fate, "comes back" if self.back else "")

    @property
    def gap(self) -> float | None:
        """The relative gap of the solution's certificate."""
        return self.solver.get("certificate", {}).get("gap")

    @property
    def likely_misclassified(self) -> list[str]:
        """Names that by text alone lose more cosine than their margin over their neighbours."""
        affected = self.solver.get("forecast", {}).get("affected", [])
        return [name["name"] for name in affected if name["cosine_loss"] > name["margin"]]

    @property
    def back(self) -> list[str]:
        """Other words by which the class comes back."""
        return self.measured("paraphrase", "back") or []

    @property
    def worst(self) -> float | None:
        """Accuracy after forgetting, by the other words that find most of the class."""
        return self.measured("paraphrase", "worst", "after", "value")

    @property
    def harmed(self) -> list[dict[str, Any]]:
        """The measured classes that lost most by it: `name`, `before`, `after`, `pictures`."""
        others = (self.measured("examples", "classes") or [])[1:]
        return [x for x in others if None not in (x["before"]["value"], x["after"]["value"])]

    def measured(self, *path: str) -> Any:
        """A value of the audit by the keys that lead to it; None where it was not measured."""
        value: Any = self.audit
        for key in path:
            value = None if value is None else value.get(key)
        return value


def read_rows(folder: str | Path) -> list[Row]:
    """The rows of a results folder, with the audits that are of its present adapters."""
    logs = read_logs(folder)
    return rows_of(logs, current_audits(folder, logs)[0])


def rows_of(logs: Logs, audits: Audits | None = None) -> list[Row]:
    """A row for every class of every request of the logs, in their order."""
    rows = []
    for dataset, entries in logs.items():
        for label, entry in entries.items():
            if label != SETTINGS:
                audit = (audits or {}).get(dataset, {}).get(label, {})
                rows += _rows_of_request(dataset, label, entry, audit.get("classes", {}))
    return rows


def current_audits(folder: str | Path, logs: Logs) -> tuple[Audits, list[str]]:
    """The audits of a results folder that are of the adapters of the logs, and "DATASET: LABEL" for
    each that is left out, since its adapter was replaced."""
    current: Audits = {}
    outdated = []
    for dataset, labels in read_audits(folder).items():
        for label, audit in labels.items():
            solver = logs.get(dataset, {}).get(label, {}).get("solver", {})
            if solver.get("adapter_sha256", audit["adapter_sha256"]) == audit["adapter_sha256"]:
                current.setdefault(dataset, {})[label] = audit
            else:
                outdated.append(f"{dataset}: {label}")
    return current, outdated


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what was measured; None if nothing was."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _rows_of_request(dataset: str, label: str, entry: dict, audits: dict) -> list[Row]:
    sides = [entry.get("zero_shot", {}), entry["final_results"]]  # before, after
    own, rest = (
        [_by_class(side.get(dataset, {}), key) for side in sides]
        for key in ("cls_acc_test", "no_cls_acc")
    )
    before, after = (
        {name: x["all"]["all_ds"] for name, x in side.items() if name != dataset} for side in sides
    )
    others = {name: Change(before.get(name), value) for name, value in after.items()}
    rows = []
    for name in own[1]:
        changes = [Change(*(side.get(name) for side in sides)) for sides in (own, rest)]
        records = entry.get("solver", {}), audits.get(name, {})
        rows.append(Row(dataset, label, name, len(own[1]), *changes, others, *records))
    return rows


def _by_class(results: dict[str, Any], key: str) -> dict[str, float | None]:
    """`key` of every class. Logs of the paper's code may hold several classes under one name, with
    an object by class for what differs between them and a number for what they share."""
    values: dict[str, float | None] = {}
    for name, numbers in results.items():
        parts = [part for part in numbers.values() if isinstance(part, dict)]
        value = numbers.get(key)
        for class_name in parts[0] if parts else [name]:
            values[class_name] = value.get(class_name) if isinstance(value, dict) else value
    return values
