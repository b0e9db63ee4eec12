"""What is retained beside a set's classes, from bundles: names and hidden states, in groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from yacs.config import CfgNode

import datasets
from clip.bundle import FeatureBundle
from forgetting import Group, RetainSet, Ridge
from forgetting.models.vocabulary import MAX_SIMILAR
from forgetting.ridge import best_ridge

GROUPS = ("own", "vocabulary", "others")
PROTECT = "protect"
GENERIC = "generic"  # common names, whatever the set is of
COMMON = ("vocabulary", GENERIC)  # they stand for the many names that nobody lists
Names = tuple[list[str], Tensor]  # names, and their hidden states (n, w)


def retain_set(
    bundle: FeatureBundle,
    others: Sequence[FeatureBundle],
    weights: Mapping[str, float | None],
    similarity: float,
    device: torch.device | str = "cpu",
    more: Mapping[str, Names] | None = None,
    prompts: bool = False,
) -> RetainSet:
    """The retained names of a set: its own classes, its vocabulary, the other sets' classes.

    Args:
        weights: of the groups that are retained; None: every name weighs 1.
        similarity: cosine of hidden states beyond which a name leaves with a forgotten text.
        more: names that no bundle holds: `keep`, which weigh more than their group, and `generic`.
        prompts: whether a class is retained by its evaluation prompt, by which images find it, as
            well as by its bare name.
    """

    def classes(*bundles: FeatureBundle) -> Names:
        names = [datasets.clean_name(name) for each in bundles for name in each.classnames]
        rows = [each.forget_hidden for each in bundles]
        if prompts:
            names, rows = 2 * names, rows + [each.class_hidden for each in bundles]
        return names, torch.cat([bundle.forget_hidden[:0], *rows])

    more = dict(more or {})
    kept = more.pop(PROTECT, None)
    groups = {
        "own": classes(bundle),
        "vocabulary": (bundle.retain_names, bundle.retain_hidden),
        "others": classes(*others),
        **more,
    }
    chosen = {
        group: Group(
            names,
            rows,
            weights[group],
            alike=group != "own",
            safe=group not in COMMON,
            twice=prompts and group not in COMMON,
        )
        for group, (names, rows) in groups.items()
        if group in weights
    }
    if kept is not None:
        chosen[PROTECT] = Group(*kept, weights[PROTECT], alike=False)
    return RetainSet(chosen, similarity, device, MAX_SIMILAR if GENERIC in chosen else None)


@dataclass(frozen=True)
class Retained:
    """What a run of ForgetExact retains.

    Attributes:
        names: all of them; mu: the ridge, in mean squared lengths of a hidden state.
        ridge: `G + mu I`; lam: ridge of the target `specific`.
    """

    names: RetainSet
    mu: float
    ridge: Ridge
    lam: float

    @cached_property
    def solved(self) -> Tensor:
        """The names' rows of `K_0^-1`, (n, w)."""
        return self.ridge.solve(self.names.rows)


def exact_weights(
    cfg: CfgNode, others: bool, more: Collection[str] = (), vocabulary: bool = True
) -> dict[str, float]:
    """Weights of the groups by the settings.

    Args:
        others: whether there are other sets; more: names of groups as in `retain_set`.
        vocabulary: whether the set has one of its own. Generic names take part of its weight, and
            all of it where there is none.
    """
    node = cfg.TRAINER.FORGETEXACT
    common = profile(cfg, others, "VOCABULARY")
    part = (node.GENERIC if vocabulary else float(node.GENERIC > 0)) * (GENERIC in more)
    weights = {"own": node.OWN, "vocabulary": (1 - part) * common, "others": node.OTHERS}
    further = {PROTECT: node.PROTECT, GENERIC: part * common}
    weights |= {name: further[name] for name in more}
    return {group: float(weight) for group, weight in weights.items()}


def profile(cfg: CfgNode, others: bool, key: str) -> float:
    """A setting whose default depends on whether the names of other sets are retained."""
    node = cfg.TRAINER.FORGETEXACT
    default = node[f"{key}_{'LISTED' if others and node.OTHERS > 0 else 'ALONE'}"]
    return default if node[key] is None else node[key]


def exact_names(
    cfg: CfgNode,
    bundle: FeatureBundle,
    others: Sequence[FeatureBundle],
    device: torch.device | str = "cpu",
    more: Mapping[str, Names] | None = None,
    off: str = "",
) -> RetainSet:
    """The names that a run of ForgetExact retains: the groups that have weight, less `off`.

    Classes are retained by name and prompt: on real features the rest of the set and other sets
    lose less by it, under templates that nobody listed as well (docs/exact.md).
    """
    weights = exact_weights(cfg, bool(others), more or (), bool(bundle.retain_names))
    weights = {name: weight for name, weight in weights.items() if weight > 0 and name != off}
    similarity = float(cfg.FORGET.SIMILARITY)
    return retain_set(bundle, others, weights, similarity, device, more, prompts=True)


def retained(
    cfg: CfgNode,
    bundle: FeatureBundle,
    others: Sequence[FeatureBundle],
    device: torch.device | str = "cpu",
    more: Mapping[str, Names] | None = None,
) -> Retained:
    """What a run of ForgetExact with these settings retains, and its ridges."""
    return settled(cfg, bundle, exact_names(cfg, bundle, others, device, more), bool(others))


def settled(cfg: CfgNode, bundle: FeatureBundle, names: RetainSet, others: bool) -> Retained:
    """The ridges of names that a run retains; `others`: whether there are other sets."""
    node = cfg.TRAINER.FORGETEXACT
    w, b, mu = bundle.text_projection, bundle.text_bias, node.MU
    if mu is None:
        listed = _listed(names)
        leaving = leaving_alone(bundle, listed)
        limit = profile(cfg, others, "MAX_DISPLACEMENT")
        mu = best_ridge(listed, w, bundle.forget_hidden, leaving, float(limit), b)
    lam = float(node.SPECIFIC_RIDGE) * names.squared_embedding(w, b)
    return Retained(names, mu, names.ridge(mu), lam)


def _listed(names: RetainSet) -> RetainSet:
    """The names by which the ridge is found: without generic ones, where there is a vocabulary.

    What is held still for their sake leaves listed names less room, so that by the same limit the
    ridge would be smaller, which costs unlisted names more than the generic ones save them.
    """
    groups = dict(names.groups)
    if not groups.keys() >= set(COMMON):
        return names
    weight = groups.pop(GENERIC).weight + groups["vocabulary"].weight
    groups["vocabulary"] = replace(groups["vocabulary"], weight=weight)
    return RetainSet(groups, names.similarity, names.rows.device, names.most)


def leaving_alone(bundle: FeatureBundle, names: RetainSet) -> Tensor:
    """(C, n) bool, which names leave with each class of a set, forgotten by its bare name."""
    same = [datasets.same_meaning([name], bundle.dataset) for name in bundle.classnames]
    return names.leaving(same, bundle.forget_hidden, torch.arange(len(same)))
