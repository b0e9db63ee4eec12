"""One call: forget names in anybody's CLIP, from text alone.

    answer = forget(model, tokenize, ["Acme Cola"], also={"Acme Cola": ["acme soda"]})
    answer.apply()                  # the model changes in place
    answer.save("acme.safetensors")

It is the same mechanism as the trainer `ForgetExact` (`forgetting.complete`): the name and its
other words land on their target, and what is retained, a generic vocabulary and the names that a
caller lists, moves as little as can be.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from forgetting.adapter import (
    Adapter,
    adapter_bytes,
    load_adapter,
    projection_sha256,
    save_adapter,
    with_recipe,
)
from forgetting.certificate import Certificate
from forgetting.checks import POSITIVE, WEIGHT, ProblemError, check, line, shown, tensor
from forgetting.complete import Answer, SpecificTargets, World, forget_completely
from forgetting.forecast import Felt, Forecast, Watch
from forgetting.generic import ALIKE, CACHE, generic_hidden
from forgetting.patch import patch as patch_embeddings
from forgetting.requests import Request, Requests, Wordings
from forgetting.retain import Group, RetainSet
from forgetting.ridge import best_ridge
from forgetting.targets import (
    TARGETS,
    check_beta,
    empty_target,
    opposite_target,
    orthogonal_target,
)
from forgetting.towers import SHORT, Tokenize, Tower, read_tower, tensor_sha256, tensors

TEMPLATES = ("{}", "a photo of a {}.")
# The defaults of ForgetExact where no other set is listed (configs/trainers/ForgetExact.yaml).
WEIGHTS = {"own": 1.0, "generic": 0.5, "keep": 0.1}
SIMILARITY, SHARED, PUSH, MARGIN, FOLLOW = 0.95, 0.5, 0.1, 1.0, 0.5
LOOKED_AT = 32  # of them, for the ridge
ENOUGH = 16  # names of a caller's list for which the ridge is looked for by that list alone
TRAINER, DATASET = "forget", "names"


_APPLIED: dict[str, list[str]] = {}  # SHA-256 of projections that were changed here -> by what


@dataclass(frozen=True, repr=False)
class Forgotten:
    """What was forgotten, as a change that can be put into a model and taken out again.

    Attributes:
        adapter: the change itself, and all that is stored of it.
        tower: the model that it belongs to; None where it was loaded without.
        original: the projection's tensor as it came in, bit for bit; None if that is not known.
        notes: what a reader should know, a line each.
    """

    adapter: Adapter
    tower: Tower | _Bare | None = None
    original: Tensor | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return "\n".join([f"{', '.join(self.names)} forgotten", *self.notes])

    @property
    def names(self) -> list[str]:
        """What was forgotten."""
        return self.adapter.classes

    @property
    def texts(self) -> list[str]:
        """By which texts: the names, their other words, and wordings that hardly followed."""
        return list(self.adapter.solver.get("texts", self.adapter.classes))

    @property
    def certificate(self) -> Certificate | None:
        """The proof that no smaller disturbance lands on the targets; None for a union."""
        found = self.adapter.solver.get("certificate")
        if found is None:
            return None
        known = {one.name for one in fields(Certificate)}
        numbers = {k: math.inf if v is None else v for k, v in found.items() if k in known}
        return Certificate(**numbers)

    @property
    def forecast(self) -> Forecast | None:
        """What other names will feel, by text alone; None for a union."""
        found = self.adapter.solver.get("forecast")
        if found is None:
            return None
        unlisted = {name: (part["rms"], part["max"]) for name, part in found["unlisted"].items()}
        felt = [Felt(**one) for one in found["felt"]]
        return Forecast(unlisted, felt, found["lead"], found["margin"])

    def apply(self) -> None:
        """Change the model in place; nothing happens if it is changed already.

        Raises:
            ProblemError: no model, or one whose projection is neither the original nor the changed.
        """
        tower = self._model("apply")
        if self._state(tower) == "original":
            tower.write(self.adapter.changed(tower.projection))
            _APPLIED[tensor_sha256(tower.weight)] = self.names

    def undo(self) -> None:
        """Make the model what it was, bit for bit; nothing happens if it is that already.

        Raises:
            ProblemError: no model; another change came since; or the original is not known, since
                the model was changed already when this was loaded.
        """
        tower = self._model("undo")
        if self._state(tower) == "original":
            return
        if self.original is None:
            raise ProblemError(
                "the original projection is not known: load the adapter with the original model, "
                "or give it (original=)"
            )
        tower.write(_bare_matrix(self.original, tower))

    def verify(self, model: nn.Module | None = None) -> bool:
        """True if a model is the original with exactly this change and nothing else.

        Args:
            model: None: that which this belongs to.

        Raises:
            ProblemError: a projection that is not the changed one, bit for bit, or any other tensor
                that is not what it was, is missing, or is new; the message names it.
        """
        model = self._model("verify").model if model is None else model
        known = self.adapter.settings.get("model")
        if not isinstance(known, dict) or not isinstance(known.get("hashes"), str):
            raise ProblemError("this adapter does not say what the rest of its model is")
        if self._changed is None:
            raise ProblemError(
                "this adapter does not say what its change makes of the projection: load it with "
                "the original model first"
            )
        there = tensors(model)
        name, kept = known["projection"], known["hashes"]
        others = sorted(key for key in there if key != name)
        if name not in there or _names_sha256(others) != known["names_sha256"]:
            raise ProblemError(
                f"the model has other tensors than the one that this was made for ({name} and "
                f"{len(kept) // SHORT} others)"
            )
        found = tensor_sha256(there[name])
        if found != self._changed:
            same = projection_sha256(_matrix(there[name], known)) == self.adapter.projection_sha256
            said = "is the original: nothing was applied" if same else "is neither changed by this"
            raise ProblemError(f"{name} {said}{'' if same else ' nor the original'}")
        wrong = [
            key
            for i, key in enumerate(others)
            if tensor_sha256(there[key])[:SHORT] != kept[i * SHORT : (i + 1) * SHORT]
        ]
        if wrong:
            more = f" and {len(wrong) - 1} others" if len(wrong) > 1 else ""
            raise ProblemError(f"{wrong[0]}{more}: not what it was")
        return True

    def patch(self, embeddings: Any, normalised: bool = True) -> Any:
        """Cached text embeddings (n, d) as the changed model would give them; without the model.

        Args:
            normalised: whether they are of unit norm.

        Raises:
            ProblemError: the original projection is not known, or `forgetting.patch` refuses.
        """
        if self.original is None:
            raise ProblemError("the original projection is not known, by which texts are patched")
        known = self.adapter.settings.get("model", {})
        bias = None if self.tower is None else self.tower.bias
        if known.get("bias") and bias is None:
            raise ProblemError(
                "the projection has a bias, which is in the model: load it with that"
            )
        w = _matrix(self.original, known)
        left, right = self.adapter.left, self.adapter.right
        return patch_embeddings(embeddings, w, left, right, bias, normalised)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the adapter; see `forgetting.save_adapter`. A file that holds just this adapter may
        be there already."""
        there = Path(path)
        if not (there.is_file() and there.read_bytes() == adapter_bytes(self.adapter)):
            save_adapter(self.adapter, path, overwrite)

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module | None = None, original: Tensor | None = None
    ) -> Forgotten:
        """Read what `save` wrote, or what `forgetting.compose` made of it.

        Args:
            model: to be changed; it may be changed already. None: only to read.
            original: (w, d) or as the model holds it, where the model is changed already.

        Raises:
            ProblemError: no adapter, a damaged one, or a model that has no such projection.
        """
        adapter = load_adapter(path)
        notes = tuple(adapter.solver.get("notes", ()))
        if model is None:
            return cls(adapter, None, original, notes)
        tower = _bare(model, adapter)
        found = cls(adapter, tower, None, notes)
        if original is not None:
            like = tower.weight.detach()
            original = original.T if original.shape != like.shape else original
            if projection_sha256(_bare_matrix(original, tower)) != adapter.projection_sha256:
                raise ProblemError("the original projection is not the one of the adapter")
            return cls(adapter, tower, original.to(like).clone(), notes)
        if found._state(tower) == "original":
            return cls(adapter, tower, _clone(tower.weight), notes)
        return found

    def _model(self, what: str) -> Tower | _Bare:
        if self.tower is None:
            raise ProblemError(f"no model to {what}: Forgotten.load(path, model) gives one")
        return self.tower

    @property
    def _changed(self) -> str | None:
        """SHA-256 of the changed projection's tensor; None if it cannot be known."""
        said = self.adapter.settings.get("changed_sha256")
        if said is None and self.original is not None:
            known = self.adapter.settings.get("model", {})
            made = self.adapter.changed(_matrix(self.original, known))
            return tensor_sha256(made.T if known.get("transposed") else made)
        return said

    def _state(self, tower: Tower | _Bare) -> str:
        """Whether the model's projection is the original or the changed one."""
        if projection_sha256(tower.projection) == self.adapter.projection_sha256:
            return "original"
        if tensor_sha256(tower.weight) == self._changed:
            return "changed"
        names = ", ".join(self.names)
        raise ProblemError(
            f"{tower.name} is neither the projection that {line(names)!r} was forgotten from nor "
            "what that made of it; another change came in between, or it is another model"
        )


@dataclass(frozen=True)
class _Bare(Tower):
    """A tower that is known by an adapter, and reads no text."""


def forget(
    model: nn.Module,
    tokenize: Tokenize,
    names: Sequence[str],
    also: Mapping[str, Sequence[str]] | None = None,
    retain: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    keep: Sequence[str] = (),
    *,
    target: str | Tensor = "specific",
    beta: float = 0.0,
    weights: Mapping[str, float] | None = None,
    ridge: float | None = None,
    push: float = PUSH,
    shared: float = SHARED,
    margin: float = MARGIN,
    follow: float = FOLLOW,
    similarity: float = SIMILARITY,
    generic: bool = True,
    cache: str | Path | None = CACHE,
    progress: bool = True,
) -> Forgotten:
    """Forget names in a CLIP from text alone. The model is read, and not changed until `apply`.

    Args:
        model, tokenize: see `forgetting.towers.read_tower`.
        names: what to forget, at once; also: name -> other words for it, forgotten as well.
        retain: names that stay what they are, as the other classes of a list do.
        templates: texts with {} for a name. By the first one names are forgotten; the others are
            looked at, and one that hardly follows is forgotten too. The last one stands for how
            images are classified.
        keep: names that must not be harmed, beside their place in `retain` or the vocabulary.
        target: `specific`, `opposite`, `orthogonal`, `empty`, `text:TEXT`, or a vector (d,).
        beta: how far beyond nothing the target goes; `specific` goes further by itself.
        weights: of the groups `own` (`retain`), `generic` and `keep`, where not the default.
        ridge: in mean squared lengths of a hidden state; None: found from text alone, with names
            pushed no further than `push` of the way to their nearest neighbour.
        shared: ridge of the target `specific`; margin, follow: see `forgetting.complete.World`.
        similarity: cosine from which a name of the generic vocabulary leaves with a forgotten text.
        generic: whether the generic vocabulary is retained; without it `retain` has to name all.
        cache: folder where the vocabulary's hidden states are kept, one file a model; None: none.
        progress: whether to show a bar where the vocabulary is encoded.

    Raises:
        ProblemError: one line: names that are none, a model that does not end in one linear map,
            settings out of range.
    """
    tower = read_tower(model, tokenize)
    if known := _APPLIED.get(tensor_sha256(tower.weight)):
        raise ProblemError(
            f"the model has forgotten {line(', '.join(known))} already, and changes do not add up: "
            "undo that, and forget all names at once or join the adapters (forgetting.compose)"
        )
    words = _Words.of(names, also, retain, templates, keep)
    _check_target(target, beta)
    if not generic and not words.retain:
        raise ProblemError("nothing to retain: name some, or retain the generic vocabulary")
    chosen = _weights(weights)
    here = tower.device if tower.device.type == "cuda" else torch.device("cpu")
    w = tower.projection.to(here)
    b = None if tower.bias is None else tower.bias.to(here)
    common, common_hidden = [], torch.empty(0, len(w))
    if generic and chosen["generic"] > 0:
        common, common_hidden = generic_hidden(tower, cache, progress)
    book = _Book(tower, words, target)

    # Before the request is read: a text differs in its last digits by what it is read with, and
    # what is retained must be the same for every request, so that they compose.
    forms = words.templates[:2]
    groups = {}
    if words.retain and chosen["own"] > 0:
        rows = torch.cat([book.rows([_fill(form, n) for n in words.retain]) for form in forms])
        own, twice = list(words.retain) * len(forms), len(forms) == 2
        groups["own"] = Group(own, rows, chosen["own"], alike=False, twice=twice)
    if common:
        safe = not groups
        groups["generic"] = Group(common, common_hidden, chosen["generic"], safe=safe)
    if words.keep and chosen["keep"] > 0:
        rows = torch.cat([book.rows([_fill(form, n) for n in words.keep]) for form in forms])
        kept = list(words.keep) * len(forms)
        groups["keep"] = Group(kept, rows, chosen["keep"], alike=False)
    if not groups:
        raise ProblemError("nothing to retain: every group that holds names has weight 0")
    request, wordings = book.request(), book.wordings()
    names_kept = RetainSet(groups, check(similarity, WEIGHT, "similarity"), here, ALIKE)

    def leaving(requests: Requests) -> Tensor:
        return names_kept.leaving(words.same(requests.classes), requests.hidden, requests.owner)

    mu = ridge
    if mu is None:
        like, same = _like(groups)
        gone = names_kept.leaving([{n} for n in same], like, torch.arange(len(like)))
        limit = check(push, POSITIVE, "push")
        mu = best_ridge(names_kept, w.double(), like.to(here), gone, limit, b)
    mu = check(mu, POSITIVE, "ridge")
    lam = check(shared, POSITIVE, "shared") * names_kept.squared_embedding(w, b)

    gone = leaving(Requests([request])).any(dim=0)
    last = book.rows([_fill(words.templates[-1], name) for name in (*words.names, *words.retain)])
    stay = [i for i, n in enumerate(common) if not gone[_start(names_kept, "generic") + i]]
    rivals = [i for i, name in enumerate(words.retain) if name not in words.gone]
    place = torch.tensor([*range(len(words.names)), *(len(words.names) + i for i in rivals)])
    watched = [*words.names, *(words.retain[i] for i in rivals), *(common[i] for i in stay)]
    seen = torch.cat([last[place], common_hidden[stay].to(last)]).to(here)
    count = len(place) if rivals else len(watched)
    watch = Watch(watched, seen, w, count, b)
    specific = SpecificTargets(w, names_kept, lam, b)

    def send(
        requests: Requests, gone: Tensor, numbers: Sequence[int], betas: Sequence[float]
    ) -> tuple[Tensor, list[int]]:
        if isinstance(target, str) and target == "specific":
            steps = torch.tensor(betas, dtype=torch.float64)[requests.of_text]
            return specific(requests, gone, steps), [0]
        return book.targets(requests, watch, names_kept.rows, beta)

    world = World(
        names_kept,
        names_kept.ridge(mu),
        w,
        watch,
        {name: i for i, name in enumerate(words.names)},
        leaving=leaving,
        send=send,
        dataset=DATASET,
        follow=check(follow, WEIGHT, "follow"),
        margin=check(margin, WEIGHT, "margin"),
        further=isinstance(target, str) and target == "specific",
        option="keep",
        bias=b,
    )
    answer = forget_completely(world, [request], wordings, beta)[0]
    settings = {
        "target": target if isinstance(target, str) else "vector",
        "templates": list(words.templates),
        "retain": list(words.retain),
        "keep": list(words.keep),
        "similarity": similarity,
        "ridge": mu,
        "shared": shared,
        "margin": margin,
        "follow": follow,
    }
    return _forgotten(tower, answer, settings, words.gone)


def _forgotten(
    tower: Tower, answer: Answer, settings: dict[str, Any], gone: Sequence[str]
) -> Forgotten:
    """The answer with what it belongs to; `gone`: names that cannot stay."""
    own = {text.casefold() for text in answer.request.classes}
    retained = [name for name in answer.left_retain_set if name.casefold() in own]
    notes = answer.notes(retained)
    if gone:
        notes.append(f"not retained, since forgotten: {', '.join(gone)}")
    solver = _finite({"name": "exact", **answer.report(), "notes": notes})
    others = tower.hashes()
    held = {
        "projection": tower.name,
        "transposed": tower.transposed,
        "bias": tower.bias_name,
        "names_sha256": _names_sha256(sorted(others)),
        "hashes": "".join(others[name][:SHORT] for name in sorted(others)),
    }
    adapter = Adapter(
        answer.solution.left.float().cpu(),
        answer.solution.right.float().cpu(),
        projection_sha256=projection_sha256(tower.projection),
        backbone=tower.kind,
        weights=tower.fingerprint,
        dataset=DATASET,
        classes=answer.request.classes,
        trainer=TRAINER,
        settings=settings,
        solver=solver,
    )
    if not (torch.isfinite(adapter.left).all() and torch.isfinite(adapter.right).all()):
        raise ProblemError("the change is not finite: a weight, ridge or beta is out of range")
    made = adapter.changed(tower.projection)
    changed = tensor_sha256(made.T if tower.transposed else made)
    adapter.settings.update({"model": held, "changed_sha256": changed})
    adapter = with_recipe(adapter, answer.recipe, answer.parts)
    return Forgotten(adapter, tower, _clone(tower.weight), tuple(notes))


@dataclass(frozen=True)
class _Words:
    """What a caller named, checked: every name once, none of them empty."""

    names: tuple[str, ...]
    also: dict[str, tuple[str, ...]]
    retain: tuple[str, ...]
    templates: tuple[str, ...]
    keep: tuple[str, ...]
    gone: tuple[str, ...]  # named to be retained, and forgotten

    @classmethod
    def of(cls, names: Any, also: Any, retain: Any, templates: Any, keep: Any) -> _Words:
        names = _texts("names", names)
        if not names:
            raise ProblemError("names is empty: name at least one thing to forget")
        templates = _texts("templates", templates)
        if not templates or not all("{}" in form for form in templates):
            raise ProblemError("templates must be texts with {} for the name, at least one")
        if also is not None and not isinstance(also, Mapping):
            raise ProblemError(f"also must map names to lists of words, not {shown(also)}")
        found = {}
        for name, more in (also or {}).items():
            if name not in names:
                near = get_close_matches(str(name), names)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                raise ProblemError(f"also: {shown(name)} is not among the names to forget{meant}")
            found[name] = _texts(f"also of {shown(name)}", more)
        owners: dict[str, str] = {}
        for name in names:
            for text in (name, *found.get(name, ())):
                other = owners.setdefault(text.casefold(), name)
                if other != name:
                    raise ProblemError(f"{text!r} stands for both {other!r} and {name!r}")
        keep = _texts("keep", keep)
        if both := [name for name in keep if name.casefold() in owners]:
            raise ProblemError(f"{both[0]!r} is to be forgotten and to be kept; choose one")
        retain = _texts("retain", retain or ())
        gone = tuple(name for name in retain if name.casefold() in owners)
        # Where some stay, those that are forgotten leave with their class, as in a list of which
        # several are forgotten in turn: the statistics are of the whole list, so requests compose.
        return cls(names, found, retain if len(gone) < len(retain) else (), templates, keep, gone)

    def same(self, names: Sequence[str]) -> list[set[str]]:
        """Of each name what means the same, in small letters."""
        return [{t.casefold() for t in (name, *self.also.get(name, ()))} for name in names]


class _Book:
    """Texts of a request, and their hidden states, each read once."""

    def __init__(self, tower: Tower, words: _Words, target: str | Tensor) -> None:
        self.tower, self.words, self.target = tower, words, target
        self._known: dict[str, Tensor] = {}

    def rows(self, texts: Sequence[str]) -> Tensor:
        """Hidden states (n, w), of the tower's precision, on the CPU."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known |= zip(new, self.tower.hidden(new), strict=True)
        if not texts:
            return self.tower.hidden([])
        return torch.stack([self._known[text] for text in texts])

    def request(self) -> Request:
        """The names and their other words in the first template."""
        texts, owner = [], []
        for number, name in enumerate(self.words.names):
            for word in (name, *self.words.also.get(name, ())):
                text = _fill(self.words.templates[0], word)
                if text not in texts:
                    texts.append(text)
                    owner.append(number)
        return Request(list(self.words.names), texts, self.rows(texts), owner)

    def wordings(self) -> dict[str, Wordings]:
        """The same in the other templates."""
        found = {}
        for name in self.words.names:
            words = (name, *self.words.also.get(name, ()))
            texts = [_fill(form, word) for form in self.words.templates[1:] for word in words]
            texts = list(dict.fromkeys(texts))
            found[name] = Wordings(texts, self.rows(texts))
        return found

    def targets(
        self, requests: Requests, watch: Watch, rows: Tensor, beta: float
    ) -> tuple[Tensor, list[int]]:
        """`P` (k, d) for every target but `specific`, and the draws of noise."""
        kind, here = self.target, watch.hidden.device
        w = watch.projection.double()
        eye = torch.eye(w.shape[1], dtype=torch.float64, device=here)

        def embedded(hidden: Tensor) -> Tensor:
            return watch.embedded(hidden.to(here).double(), w)

        e = embedded(requests.hidden)  # (k, d)
        if isinstance(kind, Tensor):
            vector = tensor("target", kind.reshape(-1), (kind.dtype,), (w.shape[1],))
            return vector.to(e).expand(len(e), -1), [0]
        if kind == "opposite":
            return opposite_target(e, eye, beta), [0]
        if kind == "orthogonal":
            return orthogonal_target(torch.cat([e, embedded(rows)]), len(e)), [0]
        if kind == "empty":
            generator, labels = torch.Generator().manual_seed(0), requests.owner.tolist()
            neutral, classes = embedded(self.rows([""])), embedded(watch.hidden)
            found, draws = empty_target(neutral, eye, classes, labels, generator)
            return found, [draws]
        text = kind.partition(":")[2]
        return normalize(embedded(self.rows([text])), dim=1).expand(len(e), -1), [0]


def _check_target(target: str | Tensor, beta: float) -> None:
    if isinstance(target, Tensor):
        return
    if target not in TARGETS and not (str(target).startswith("text:") and target[5:].strip()):
        options = ", ".join((*TARGETS, "text:TEXT"))
        raise ProblemError(f"no target {shown(target)}; there are {options}, or a vector (d,)")
    check_beta(target, beta)


def _weights(given: Mapping[str, float] | None) -> dict[str, float]:
    found = dict(WEIGHTS)
    for name, weight in (given or {}).items():
        if name not in found:
            raise ProblemError(f"no group {shown(name)} to weigh; there are {', '.join(found)}")
        found[name] = float(check(weight, WEIGHT, f"the weight of {name}"))
    return found


def _texts(what: str, value: Any) -> tuple[str, ...]:
    """A list of texts, each once, none empty."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ProblemError(f"{what} must be a list of texts, not {shown(value)}")
    for text in value:
        if not isinstance(text, str) or not text.strip():
            raise ProblemError(f"{what} must be texts that are not empty, not {shown(text)}")
    return tuple(dict.fromkeys(value))


def _fill(form: str, name: str) -> str:
    return form.replace("{}", name)


def _start(names: RetainSet, group: str) -> int:
    """The number of a group's first name."""
    start = 0
    for name, count in names.counts.items():
        if name == group:
            break
        start += count
    return start


def _like(groups: Mapping[str, Group]) -> tuple[Tensor, list[str]]:
    """Texts such as may be forgotten, by which the ridge is looked for: those of a caller's list,
    or common ones where it is short. Never a request's own, so that requests compose."""
    own, common = groups.get("own"), groups.get("generic")
    if own is not None and (common is None or len(set(own.names)) >= ENOUGH):
        common = own
    chosen = common if common is not None else groups["keep"]
    count = len(dict.fromkeys(chosen.names))
    some = range(0, count, max(1, count // LOOKED_AT))
    return chosen.rows[list(some)], [chosen.names[i].casefold() for i in some]


def _names_sha256(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _matrix(held: Tensor, known: Mapping[str, Any]) -> Tensor:
    """(w, d) of a projection's tensor as a model holds it."""
    return held.detach().mT if known.get("transposed") else held.detach()


def _bare_matrix(held: Tensor, tower: Tower) -> Tensor:
    return held.detach().T if tower.transposed else held.detach()


def _clone(weight: Tensor) -> Tensor:
    return weight.detach().clone()


def _bare(model: nn.Module, adapter: Adapter) -> _Bare:
    """The projection of an adapter within a model: by name, else by what it holds.

    Raises:
        ProblemError: a model without it.
    """
    if not isinstance(model, nn.Module):
        raise ProblemError(f"model must be a torch module, not {shown(model)}")
    model = getattr(model, "_orig_mod", model)
    there, known = tensors(model), adapter.settings.get("model", {})
    name, shape = known.get("projection"), (adapter.left.shape[0], adapter.right.shape[1])
    if name in there and _matrix(there[name], known).shape == shape:
        bias = there.get(known.get("bias"))
        bias = None if bias is None else bias.detach()
        return _Bare(model, _unread, name, there[name], bool(known.get("transposed")), bias, False)
    for name, x in there.items():
        for transposed in (False, True):
            fits = x.is_floating_point() and x.shape == (shape[::-1] if transposed else shape)
            turned = {"transposed": transposed}
            if fits and projection_sha256(_matrix(x, turned)) == adapter.projection_sha256:
                return _Bare(model, _unread, name, x, transposed, None, False)
    raise ProblemError(
        f"{type(model).__name__} does not hold the projection that the adapter was made for "
        f"({adapter.backbone})"
    )


def _unread(texts: list[str]) -> Any:
    raise ProblemError("this model was loaded without a tokenizer")


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
