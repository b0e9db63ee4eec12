"""From class names to tensors: which texts are forgotten and where they are sent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

import datasets
from clip.bundle import FeatureBundle
from clip.cache import FeatureCache
from clip.source import ClipSource
from engine import UserError, unknown
from evaluation.zero_shot import class_embeddings
from forgetting import empty_target
from forgetting.targets import opposite_target, orthogonal_target
from trainers.plan import user_lists

BARE = "{}"
TARGETS = ("empty", "opposite", "orthogonal", "specific", "text:TEXT", "vector:FILE")


@dataclass(frozen=True)
class Request:
    """Classes to forget at once, as texts.

    Attributes:
        classes: names; texts: what stands for each of them, in the same order as the rows of
            hidden (k, w); owner: (k,) index into `classes`.
    """

    classes: list[str]
    texts: list[str]
    hidden: Tensor
    owner: list[int]


def read_prompts(cfg) -> dict[str, list[str]]:
    """The texts by which each class is forgotten: `FORGET.PROMPTS` (a JSON file), else those of
    `forget_prompts` in forget_cls.py; a class without an entry is forgotten by its bare name.

    Raises:
        UserError: not a dictionary from class names to lists of texts.
    """
    path = cfg.FORGET.PROMPTS
    where = path or "forget_cls.py: forget_prompts"
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the prompts in {path}: {error}") from error
    if table is None:
        table = getattr(user_lists(), "forget_prompts", {}).get(cfg.DATASET.NAME, {})
    good = isinstance(table, dict) and all(
        isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
        for texts in table.values()
    )
    if not good:
        raise UserError(
            f"{where} must map class names to lists of texts, such as {{'cat': ['{{}}']}}"
        )
    return table


def check_prompts(prompts: dict[str, list[str]], bundle: FeatureBundle) -> None:
    """UserError if a key names no class of the set, or two name the same, or a text is empty."""
    seen: dict[str, str] = {}
    for key, texts in prompts.items():
        name = datasets.match(key, bundle.classnames, f"{bundle.dataset} (prompts)")
        if name in seen:
            raise UserError(
                f"prompts: {seen[name]!r} and {key!r} name one class of {bundle.dataset}"
            )
        if not all(text.strip() for text in texts):
            raise UserError(f"prompts: a text of {key!r} is empty")
        seen[name] = key


def make_request(
    cfg,
    bundle: FeatureBundle,
    source: ClipSource | None,
    classes: list[str],
    prompts: dict[str, list[str]],
) -> Request:
    """The texts of `classes` and their hidden states.

    Raises:
        UserError: without a model, a text whose hidden state the bundle does not hold.
    """
    known = {datasets.plain(name).casefold(): texts for name, texts in prompts.items()}
    texts, owner, rows = [], [], []
    for index, name in enumerate(classes):
        plain = datasets.plain(name)
        label = bundle.classnames.index(name)
        held = {
            plain: bundle.forget_hidden[label],
            bundle.template.replace(BARE, plain): bundle.class_hidden[label],
        }
        for text in known.get(plain.casefold(), [BARE]):
            text = text.replace(BARE, plain)
            if text in texts:
                continue
            if text in held:
                rows.append(held[text])
            elif source is not None:
                rows.append(FeatureCache(source, cfg.FEATURES.CACHE).texts([text])[0])
            else:
                raise UserError(
                    f"no hidden state of {text!r} in the bundle of {bundle.dataset}, and no model "
                    f"to make one: with --features a class is forgotten by "
                    f"{' or '.join(map(repr, held))}"
                )
            texts.append(text)
            owner.append(index)
    return Request(classes, texts, torch.stack(rows), owner)


def check_target(kind: str, beta: float) -> None:
    """UserError if `kind` is no target, or `beta` no number for it."""
    if beta < 0 and kind != "specific":
        raise UserError(f"FORGET.BETA must be 0 or more for {kind}, got {beta}")
    name, _, value = kind.partition(":")
    if kind not in TARGETS[:4] and not (name in ("text", "vector") and value):
        raise unknown("target (FORGET.TARGET)", kind, TARGETS)
    if name == "vector" and not Path(value).is_file():
        raise UserError(f"target vector {value}: no such file (FORGET.TARGET vector:FILE)")


def make_target(
    cfg,
    kind: str,
    bundle: FeatureBundle,
    source: ClipSource | None,
    request: Request,
    generator: torch.Generator,
) -> tuple[Tensor, int]:
    """`P` (k, d) of a request and how often noise was drawn for it (0 but for `empty`).

    Raises:
        UserError: a target that is none, or a text or file that cannot be had.
    """
    name, _, value = kind.partition(":")
    count, w = len(request.texts), bundle.text_projection
    if kind == "empty":
        labels = [bundle.classnames.index(request.classes[index]) for index in request.owner]
        return empty_target(
            bundle.neutral_hidden,
            w,
            class_embeddings(bundle),
            labels,
            generator,
            cfg.FORGET.NOISE_STD,
        )
    if kind == "opposite":
        return opposite_target(request.hidden.double(), w.double(), cfg.FORGET.BETA), 0
    if kind == "orthogonal":
        texts = torch.cat([bundle.class_hidden, bundle.forget_hidden, bundle.retain_hidden])
        return orthogonal_target(texts @ w, count), 0
    if name == "text":
        return normalize(_hidden_of(cfg, bundle, source, value) @ w, dim=-1).expand(count, -1), 0
    return _vector(Path(value), w.shape[1]).expand(count, -1), 0


def _hidden_of(cfg, bundle: FeatureBundle, source: ClipSource | None, text: str) -> Tensor:
    """Hidden state (1, w) of a text: a name that the bundle holds, else encoded."""
    for names, rows in (
        (bundle.classnames, bundle.forget_hidden),
        (bundle.retain_names, bundle.retain_hidden),
    ):
        if text in names:
            return rows[names.index(text)][None]
    if source is None:
        raise UserError(
            f"target text {text!r} is no class and no retained name of the bundle of "
            f"{bundle.dataset}, and --features has no model to encode it"
        )
    return FeatureCache(source, cfg.FEATURES.CACHE).texts([text])


def _vector(path: Path, d: int) -> Tensor:
    """The tensor `target`, (d,) or (1, d), of a safetensors file, as (1, d)."""
    try:
        vector = load_file(path)["target"].float().reshape(1, -1)
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(
            f"target vector {path}: no safetensors file with a tensor 'target' ({error})"
        ) from error
    if vector.shape[1] != d or not torch.isfinite(vector).all():
        raise UserError(
            f"target vector {path}: {vector.shape[1]} numbers, expected {d} finite ones"
        )
    return vector
