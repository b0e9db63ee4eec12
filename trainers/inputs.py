"""What a run reads: a plan from names alone, checked before anything is encoded; then the model or
bundles of features, and from class names the requests: their texts and hidden states."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from yacs.config import CfgNode

import datasets
from clip.architectures import identity_sha256
from clip.audit_texts import audit_rows
from clip.bundle import FeatureBundle, list_bundles, load_bundle, load_bundles
from clip.cache import FeatureCache
from clip.features import build_bundle
from clip.source import ClipSource
from datasets import clean_name, key, same_meaning
from datasets.names import entries
from datasets.words.lexicon import words_of
from engine.determinism import seeded
from engine.files import TEXT, check, read_json
from engine.log import logger
from evaluation.results import SETTINGS, join_label
from evaluation.zero_shot import Evaluator, class_embeddings
from forgetting.errors import ProblemError, reason, shown, unknown
from forgetting.io import read_bytes
from forgetting.problem import Paraphrases, Request
from forgetting.targets import check_target

BARE = "{}"
TEMPLATES = ("a photo of a {}.", "a {}", "the {}", "a picture of a {}.")  # none is an audit's
SAME_CLASS = ("template", "synonym", "plural")  # kinds of an audit's texts that mean the class
MISTYPED = 0.85  # similarity to a class from which an unknown name to protect is a likely typo
ALL = "all"
LISTS = "forget_cls.py"
PROMPTS = {str: [TEXT, ...]}  # class name -> its texts
LISTS_SHAPE = {
    "all_ds": [TEXT],
    "mini_ds": [TEXT],
    "forget_classes_all": {str: [TEXT]},
    "forget_prompts?": {str: PROMPTS},
    "protect?": [TEXT],
}


@dataclass(frozen=True)
class Plan:
    """One data set's run."""

    dataset: str
    classnames: list[str]
    requests: list[list[str]]  # class names; each is forgotten at once, from the original model
    others: list[str]  # the other sets to evaluate on
    protect: list[str]  # names that must not be harmed
    prompts: dict[str, list[str]]  # class -> texts by which it is forgotten, not its bare name
    vocabulary: list[str]  # names to retain beside the classes

    @cached_property
    def vocabulary_sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.vocabulary).encode()).hexdigest()[:16]


def make_plan(cfg: CfgNode) -> Plan:
    """Check the names of a config and list the work; ProblemError for one that is not there."""
    dataset, backbone, forget = cfg.DATASET.NAME, cfg.MODEL.BACKBONE.NAME, cfg.FORGET
    lists = user_lists()
    if cfg.FEATURES.DIR:
        if cfg.MODEL.INIT_WEIGHTS or cfg.DATASET.IMAGES or cfg.MODEL.PRECISION != "fp32":
            raise ProblemError(
                "--images, --weights and --precision need a model, and --features has none; leave "
                "them out"
            )
        bundle = load_bundle(cfg.FEATURES.DIR, backbone, dataset)
        classnames, vocabulary = bundle.classnames, bundle.retain_names
        others = [name for name in list_bundles(cfg.FEATURES.DIR, backbone) if name != dataset]
    else:
        classnames = datasets.load(dataset, cfg.DATASET.ROOT, cfg.DATASET.IMAGES).classnames
        vocabulary = datasets.retain_vocabulary(dataset)
        group = lists.mini_ds if dataset in lists.mini_ds else lists.all_ds
        root = Path(cfg.DATASET.ROOT).expanduser()
        wanted = [datasets.spec(name) for name in group if name != dataset]
        absent = {row.name: datasets.absent(row, root) for row in wanted}
        others = [name for name, why in absent.items() if why is None]
        for name, why in absent.items() if dataset in group else ():  # none is missed by one's own
            if why is not None:
                logger.info(f"not evaluated: {name} ({why})")
    if forget.RETAIN_NAMES:
        what = "names to retain (FORGET.RETAIN_NAMES)"
        names = [text for _, text in entries(Path(forget.RETAIN_NAMES), what)]
        vocabulary = list({key(n): clean_name(n) for n in names}.values())
        if not vocabulary:
            raise ProblemError(f"{what}: {forget.RETAIN_NAMES} holds no name")
    classes = _classes(cfg, classnames, lists.forget_classes_all.get(dataset, []))
    requests = [classes] if forget.MULTICLASS else [[name] for name in classes]
    if forget.PART:
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", forget.PART)
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count:
            raise ProblemError(f"FORGET.PART must be i/n such as 2/4, not {shown(forget.PART)}")
        requests = requests[number - 1 :: count]
    protect = list(dict.fromkeys([*forget.PROTECT, *getattr(lists, "protect", [])]))
    forgotten = {key(name) for name in classes} if ALL not in forget.CLASSES else set()
    for name in protect:
        if not name.strip():
            raise ProblemError("a name to protect (FORGET.PROTECT) is empty")
        if key(name) in forgotten:
            raise ProblemError(f"{name!r} is to be forgotten and to be protected; choose one")
    prompts = _prompts(cfg, classnames, getattr(lists, "forget_prompts", {}).get(dataset, {}))
    return Plan(dataset, classnames, requests, others, protect, prompts, vocabulary)


def _classes(cfg: CfgNode, classnames: list[str], listed: list[str]) -> list[str]:
    """The class names to forget, as the data set spells them."""
    dataset, names = cfg.DATASET.NAME, list(cfg.FORGET.CLASSES) or listed
    if not names:
        raise ProblemError(f"no class of {dataset} to forget: add it to {LISTS} or use --forget")
    if ALL in names and ALL not in classnames:
        if len(names) > 1:
            raise ProblemError(f"--forget {ALL} stands for every class of {dataset}; name no other")
        names = classnames
    classes = list(dict.fromkeys(datasets.match(name, classnames, dataset) for name in names))
    if cfg.FORGET.MULTICLASS and set(classes) == set(classnames):
        raise ProblemError(f"all classes of {dataset} at once leave none to retain")
    if SETTINGS in classes:
        raise ProblemError(f"a class {SETTINGS!r} would hide the settings in logs.json; rename it")
    return classes


def _prompts(
    cfg: CfgNode, classnames: list[str], listed: dict[str, list[str]]
) -> dict[str, list[str]]:
    """The texts by which classes are forgotten: of the file `FORGET.PROMPTS`, or forget_cls.py."""
    path, prompts = cfg.FORGET.PROMPTS, {}
    if path:
        listed = read_json(path, "file of prompts")
        check(listed, PROMPTS, f"file of prompts {path}")
    for given, texts in listed.items():
        name = datasets.match(given, classnames, f"{cfg.DATASET.NAME} (prompts)")
        if name in prompts:
            raise ProblemError(f"prompts: two entries name {name!r}, one of them {given!r}")
        if not all(text.strip() for text in texts):
            raise ProblemError(f"prompts: a text of {given!r} is empty")
        prompts[name] = texts
    return prompts


def user_lists() -> ModuleType:
    """The lists of forget_cls.py, which users edit by hand; ProblemError if they do not fit."""
    try:
        import forget_cls
    except (Exception, SystemExit) as error:  # it is a program, and may do anything
        hint = "; names of classes need quotes" if isinstance(error, NameError) else ""
        raise ProblemError(f"{LISTS}: {reason(error)}{hint}") from error
    check(vars(forget_cls), LISTS_SHAPE, LISTS)
    return forget_cls


def read_target(kind: str, d: int | None = None) -> str | Tensor:
    """A target as the library takes it: of `vector:FILE` the tensor `target`, (d,) or (1, d), of a
    safetensors file; any other stays what it is. ProblemError if it is none."""
    name, _, path = kind.partition(":")
    if name != "vector":
        check_target(kind)
        return kind
    try:
        vector = load(read_bytes(path))["target"].float().flatten()
        check_target(vector, d=d)
    except (ProblemError, KeyError, SafetensorError) as error:
        raise ProblemError(f"target vector {path}: no tensor 'target' there ({error})") from error
    return vector


class RunInputs:
    """The inputs of a trainer, each read or encoded when it is first used."""

    cfg: CfgNode
    plan: Plan
    device: torch.device

    @cached_property
    def source(self) -> ClipSource | None:
        """The model; None where bundles of features are given."""
        cfg = self.cfg
        model = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.INIT_WEIGHTS or None, cfg.FEATURES.CACHE
        return None if cfg.FEATURES.DIR else ClipSource(*model, self.device, cfg.MODEL.PRECISION)

    @cached_property
    def encode(self) -> Callable[[list[str]], Tensor] | None:
        """From n texts to hidden states (n, w); None without a model."""
        return self.source and FeatureCache(self.source).texts

    @cached_property
    def bundles(self) -> dict[str, FeatureBundle]:
        """Features of the set itself and of the sets beside it, by name."""
        cfg, plan, dataset = self.cfg, self.plan, self.plan.dataset
        if self.source is None:
            names = [dataset, *plan.others]
            bundles = load_bundles(cfg.FEATURES.DIR, cfg.MODEL.BACKBONE.NAME, names)
        else:
            where = self.source, cfg.DATASET.ROOT
            how = {"batch_size": cfg.DATALOADER.TEST.BATCH_SIZE}
            how["workers"] = cfg.DATALOADER.NUM_WORKERS
            mine = {"template": cfg.DATASET.TEMPLATE or None, "own": cfg.DATASET.IMAGES}
            bundles = {dataset: build_bundle(dataset, *where, **how, **mine)}
            bundles |= {name: build_bundle(name, *where, **how) for name in plan.others}
        if cfg.FORGET.RETAIN_NAMES:
            own = bundles[dataset]
            hidden = self.hidden(own, plan.vocabulary, "name to retain")
            bundles[dataset] = replace(own, retain_names=plan.vocabulary, retain_hidden=hidden)
        return bundles

    @property
    def bundle(self) -> FeatureBundle:
        return self.bundles[self.plan.dataset]

    @property
    def others(self) -> dict[str, FeatureBundle]:
        return {name: self.bundles[name] for name in self.plan.others}

    @cached_property
    def accuracies(self) -> Evaluator:  # SimpleTrainer of Dassl has an `evaluator`
        return Evaluator(self.bundle, self.others)

    def model_settings(self) -> dict[str, Any]:
        """What says which model, prompts and images results are of; nothing is encoded for it."""
        if self.source is None:
            b = self.bundle
            values = b.backbone, b.weights, b.precision, b.template, b.split, b.model
        else:
            s, data = self.source, datasets.spec(self.plan.dataset, self.cfg.DATASET.IMAGES)
            template = self.cfg.DATASET.TEMPLATE or data.template
            identity = identity_sha256(s.architecture)
            values = s.arch, s.weights_sha256, s.precision, template, "test", identity
        keys = ("backbone", "weights", "precision", "template", "split", "model")
        return {key: value for key, value in zip(keys, values, strict=True) if value}

    def hidden(self, bundle: FeatureBundle, texts: Sequence[str], what: str) -> Tensor:
        """Hidden states (n, w) of texts: encoded, or without a model those of the bundle's names.
        ProblemError if it lacks one; `what` says what it is."""
        if self.encode is not None:
            return self.encode(list(map(clean_name, texts)))
        names = [*bundle.retain_names, *bundle.classnames]
        row = {key(name): i for i, name in enumerate(names)}
        for text in texts:
            if key(text) not in row:
                raise _no_model(what, text, names)
        rows = torch.cat([bundle.retain_hidden, bundle.forget_hidden])
        return rows[[row[key(text)] for text in texts]]

    def request(self, classes: list[str]) -> Request:
        """The texts by which `classes` are forgotten, and what means the same as each; ProblemError
        without a model for a text that the bundle does not hold."""
        dataset = self.plan.dataset
        texts: dict[str, tuple[int, Tensor]] = {}  # text -> its class and hidden state
        for index, name in enumerate(classes):
            held = self._held(name)
            for template in self.plan.prompts.get(name, [BARE]):
                text = template.replace(BARE, clean_name(name))
                if text not in held and self.encode is None:
                    raise _no_model(f"text of the bundle of {dataset}", text, list(held))
                if text not in texts:
                    texts[text] = index, held[text] if text in held else self.encode([text])[0]
        return Request(
            classes,
            list(texts),
            torch.stack([hidden for _, hidden in texts.values()]),
            [owner for owner, _ in texts.values()],
            same=[same_meaning([name], dataset) for name in classes],
            seed=seeded(self.cfg.SEED, dataset, join_label(classes)).initial_seed(),
        )

    def _held(self, name: str) -> dict[str, Tensor]:
        """Hidden states (w,) that the bundle holds: of the bare name and the evaluation prompt."""
        bundle, plain = self.bundle, clean_name(name)
        label = bundle.classnames.index(name)
        return {
            plain: bundle.forget_hidden[label],
            bundle.template.replace(BARE, plain): bundle.class_hidden[label],
        }

    def with_paraphrases(self, requests: Sequence[Request]) -> list[Request]:
        """Requests with other texts for each of their classes; new ones are encoded at once.

        They are the evaluation prompt; with a model a few templates and the class's other names
        (names of the vocabulary that mean the same, and the synonyms that `datasets` lists);
        without one what the bundle brought for an audit. A text that the model takes for another
        class of the set is left out.
        """
        brought = audit_rows(self.bundle) if self.encode is None else {}
        known: dict[str, dict[str, Tensor]] = {}  # of each class: text -> hidden state
        new: dict[str, list[str]] = {}  # of each class: texts to encode
        for name in dict.fromkeys(name for request in requests for name in request.classes):
            *_, prompt = self._held(name).items()
            rows = [row for row in brought.get(name, ()) if row[1] in SAME_CLASS]
            known[name] = dict([prompt]) | {text: hidden for text, _, hidden in rows}
            others = self._other_texts(name) if self.encode is not None else []
            new[name] = [text for text in others if text not in known[name]]
        every = [text for texts in new.values() for text in texts]
        encoded = iter(self.encode(every) if every else ())
        classes, found = class_embeddings(self.bundle), {}
        for name, rows in known.items():
            rows |= zip(new[name], encoded, strict=False)
            hidden = torch.stack(list(rows.values()))
            nearest = (self.bundle.embed(hidden) @ classes.T).argmax(dim=1)
            mine = nearest == self.plan.classnames.index(name)
            texts = [text for text, own in zip(rows, mine.tolist(), strict=True) if own]
            found[name] = Paraphrases(texts, hidden[mine])
        return [replace(r, paraphrases=[found[name] for name in r.classes]) for r in requests]

    def _other_texts(self, name: str) -> list[str]:
        """A class in a few templates, and under other names."""
        plain, dataset, classnames = clean_name(name), self.plan.dataset, self.plan.classnames
        same = sorted(same_meaning([name], dataset) - set(map(key, classnames)))
        others = [other for other in classnames if other != name]
        same += words_of(name, dataset, others).synonyms
        return [*dict.fromkeys([*(form.replace(BARE, plain) for form in TEMPLATES), *same])]

    def protected(self, names: Sequence[str]) -> tuple[list[str], Tensor]:
        """Texts of names to protect, and their hidden states (n, w): of a class the bare name and
        the evaluation prompt, of any other name that name."""
        classes: dict[str, list[Tensor]] = {}
        for bundle in self.bundles.values():
            for label, name in enumerate(bundle.classnames):
                rows = bundle.forget_hidden[label], bundle.class_hidden[label]
                classes.setdefault(key(name), []).extend(rows)
        known = {*classes, *map(key, self.bundle.retain_names)}
        found: list[tuple[str, Tensor]] = []
        for name in names:
            rows = classes.get(key(name))
            if rows is None:
                rows = self.hidden(self.bundle, [name], "name to protect (FORGET.PROTECT)")
                close = get_close_matches(key(name), known, 1, MISTYPED)
                if close and key(name) not in known:
                    logger.warning(f"protected as it is: {name!r}; did you mean {close[0]!r}?")
            found += [(clean_name(name), row) for row in rows]
        texts, rows = zip(*found, strict=True)
        return list(texts), torch.stack(rows)

    def target_text(self, kind: str | Tensor) -> Tensor | None:
        """Hidden state (1, w) of the TEXT of a target `text:TEXT`; None for other targets."""
        if not isinstance(kind, str) or not kind.startswith("text:"):
            return None
        return self.hidden(self.bundle, [kind.partition(":")[2]], "target text")


def _no_model(what: str, text: str, known: list[str]) -> ProblemError:
    return ProblemError(f"{unknown(what, text, known)}; --features has no model to encode it")
