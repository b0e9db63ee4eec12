"""What is retained while classes of a set are forgotten, from feature bundles."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import datasets
from clip.bundle import FeatureBundle
from forgetting.context import ExactSettings, ForgetContext
from forgetting.displacement import ClassifierTexts
from forgetting.edited_texts import EmbeddedTexts
from forgetting.models.vocabulary import MAX_SIMILAR
from forgetting.retain import Group, RetainSet
from forgetting.ridge import choose_ridge
from forgetting.targets import TargetInputs

GROUPS = ("own", "vocabulary", "others")
PROTECT = "protect"
GENERIC = "generic"  # common names, whatever the set is of
COMMON = ("vocabulary", GENERIC)  # groups that stand for the many names that nobody lists
Names = tuple[list[str], Tensor]  # names, and their hidden states (n, w)


def retain_set(
    bundle: FeatureBundle,
    others: Sequence[FeatureBundle],
    weights: Mapping[str, float | None],  # of the retained groups; None: each name weighs 1
    similarity: float,  # cosine of hidden states above which a name is excluded with a text
    device: torch.device | str = "cpu",
    more: Mapping[str, Names] | None = None,  # names of no bundle: `protect` and `generic`
    prompts: bool = False,
) -> RetainSet:
    """The retained names of a set: its own classes, its vocabulary, the other sets' classes. With
    `prompts` a class is retained by its evaluation prompt too, by which images find it."""

    def classes(*bundles: FeatureBundle) -> Names:
        names = [datasets.clean_name(name) for each in bundles for name in each.classnames]
        rows = [each.forget_hidden for each in bundles]
        if prompts:
            names, rows = 2 * names, rows + [each.class_hidden for each in bundles]
        return names, torch.cat([bundle.forget_hidden[:0], *rows])

    groups = {
        "own": classes(bundle),
        "vocabulary": (bundle.retain_names, bundle.retain_hidden),
        "others": classes(*others),
        **(more or {}),
    }
    chosen = {
        group: Group(
            names,
            rows,
            weights[group],
            exclude_similar=group not in ("own", PROTECT),
            limit_displacement=group not in COMMON,
            prompt_variants=prompts and group in ("own", "others"),
        )
        for group, (names, rows) in groups.items()
        if group in weights
    }
    return RetainSet(chosen, similarity, device, MAX_SIMILAR if GENERIC in chosen else None)


def exact_context(
    settings: ExactSettings,
    bundle: FeatureBundle,
    others: Sequence[FeatureBundle] = (),  # of other sets, whose names are listed
    device: torch.device | str = "cpu",
    more: Mapping[str, Names] | None = None,  # see `retain_set`
    text: Tensor | None = None,  # (1, w), hidden state of the TEXT of a target `text:TEXT`
) -> ForgetContext:
    """What classes of a bundle are forgotten in.

    Classes are retained by name and prompt: on real features the rest of the set and other sets
    lose less by it, under templates that nobody listed as well (docs/method.md).
    """
    settings, more = settings.chosen(bool(others)), more or {}
    weights = settings.group_weights(bool(others), bool(bundle.retain_names), GENERIC in more)
    weights = {k: x for k, x in weights.items() if k in (*GROUPS, *more) and x > 0}
    retain = retain_set(bundle, others, weights, settings.similarity, device, more, prompts=True)
    if settings.ridge is None:
        settings = replace(settings, ridge=_choose_ridge(settings, bundle, retain))
    inputs = target_inputs(bundle, device, settings.noise_std, text)
    length = retain.squared_embedding(inputs.projection, inputs.bias)
    inputs = replace(inputs, retain=retain, lam=settings.specific_ridge * length)
    bundles = [bundle, *(others if settings.others > 0 else ())]
    hidden = torch.cat([each.class_hidden for each in bundles]).to(device)
    classifier = ClassifierTexts(
        [datasets.clean_name(name) for each in bundles for name in each.classnames],
        EmbeddedTexts(hidden, inputs.embed(hidden)),
        inputs.label,
        len(bundle.classnames),
    )
    return ForgetContext(retain, retain.ridge(settings.ridge), inputs, classifier, settings)


def target_inputs(
    bundle: FeatureBundle,
    device: torch.device | str = "cpu",
    noise_std: float = 0.5,
    text: Tensor | None = None,
) -> TargetInputs:
    """What targets of a bundle's classes are computed from."""
    return TargetInputs(
        projection=bundle.text_projection.to(device),
        bias=None if bundle.text_bias is None else bundle.text_bias.to(device),
        classes=bundle.class_hidden,
        label={name: label for label, name in enumerate(bundle.classnames)},
        empty=bundle.neutral_hidden,
        text=text,
        named=torch.cat([bundle.class_hidden, bundle.forget_hidden, bundle.retain_hidden]),
        noise_std=noise_std,
    )


def _choose_ridge(settings: ExactSettings, bundle: FeatureBundle, retain: RetainSet) -> float:
    """By the listed names alone: generic ones are left out where there is a vocabulary.

    With them the same limit gives a smaller ridge, and that costs unlisted names more than the
    generic ones save them.
    """
    groups = dict(retain.groups)
    if groups.keys() >= set(COMMON):
        weight = groups.pop(GENERIC).weight + groups["vocabulary"].weight
        groups["vocabulary"] = replace(groups["vocabulary"], weight=weight)
        retain = RetainSet(groups, retain.similarity, retain.rows.device, retain.max_similar)
    same = [datasets.same_meaning([name], bundle.dataset) for name in bundle.classnames]
    excluded = retain.excluded(same, bundle.forget_hidden, torch.arange(len(same)))
    return choose_ridge(
        retain,
        bundle.text_projection,
        bundle.forget_hidden,
        excluded,
        settings.max_displacement,
        bundle.text_bias,
    )
