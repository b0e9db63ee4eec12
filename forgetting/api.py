"""One call: forget names in anybody's CLIP, from text alone.

    answer = forget(model, tokenize, ["Acme Cola"], also={"Acme Cola": ["acme soda"]})
    answer.apply()                  # the model changes in place
    answer.save("acme.safetensors")

It is the same mechanism as the trainer `ForgetExact` (`forgetting.context`): the name and its
other words land on their target, and what is retained, a generic vocabulary and the names that a
caller lists, moves as little as can be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forgetting.adapter import Adapter, projection_sha256, recipe_fields
from forgetting.asked import Asked, Book, check_target, fill
from forgetting.context import Answer, SpecificTargets, World, forget_completely
from forgetting.displacement import Watch
from forgetting.errors import ProblemError, line, number, shown
from forgetting.forgotten import APPLIED, Forgotten
from forgetting.io import finite
from forgetting.models.encoder import Encoder, read_encoder, truncation_warning
from forgetting.models.identity import changed_sha256, describe
from forgetting.models.modules import tensor_sha256
from forgetting.models.reading import Tokenize
from forgetting.models.vocabulary import CACHE, MAX_SIMILAR, generic_hidden
from forgetting.problem import Batch
from forgetting.retain import Group, RetainSet
from forgetting.ridge import best_ridge
from forgetting.targets import FURTHER

TEMPLATES = ("{}", "a photo of a {}.")
# The defaults of ForgetExact where no other set is listed (configs/trainers/ForgetExact.yaml).
WEIGHTS = {"own": 1.0, "generic": 0.5, "keep": 0.1}
SIMILARITY, SHARED, PUSH, MARGIN, FOLLOW = 0.95, 0.5, 0.1, 1.0, 0.5
LOOKED_AT = 32  # of them, for the ridge
ENOUGH = 16  # names of a caller's list for which the ridge is looked for by that list alone
TRAINER, DATASET = "forget", "names"


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
        model, tokenize: see `forgetting.models.encoder.read_encoder`.
        names: what to forget, at once; also: name -> other words for it, forgotten as well.
        retain: names that stay what they are, as the other classes of a list do.
        templates: texts with {} for a name. By the first one names are forgotten; the others are
            looked at, and one that hardly follows is forgotten too. The last one stands for how
            images are classified.
        keep: names that must not be harmed, beside their place in `retain` or the vocabulary.
        target: `specific`, `opposite`, `orthogonal`, `empty`, `text:TEXT`, or a vector (d,).
        beta: how far beyond nothing the target goes; `specific` and `opposite` go further by
            themselves, but for an `opposite` at 0, which leaves nothing that could be looked at.
        weights: of the groups `own` (`retain`), `generic` and `keep`, where not the default.
        ridge: in mean squared lengths of a hidden state; None: found from text alone, with names
            pushed no further than `push` of the way to their nearest neighbour.
        shared: ridge of the target `specific`; margin, follow: see `forgetting.context.World`.
        similarity: cosine from which a name of the generic vocabulary leaves with a forgotten text.
        generic: whether the generic vocabulary is retained; without it `retain` has to name all.
        cache: folder where the vocabulary's hidden states are kept, one file a model; None: none.
        progress: whether to show a bar where the vocabulary is encoded.

    Raises:
        ProblemError: one line: names that are none, a model that does not end in one linear map,
            settings out of range.
    """
    tower = read_encoder(model, tokenize)
    if known := APPLIED.get(tensor_sha256(tower.weight)):
        raise ProblemError(
            f"the model has forgotten {line(', '.join(known))} already, and changes do not add up: "
            "undo that, and forget all names at once or join the adapters (forgetting.compose)"
        )
    words = Asked.of(names, also, retain, templates, keep)
    check_target(target, beta, tower.projection.shape[1])
    for name, value in (("generic", generic), ("progress", progress)):
        if not isinstance(value, bool):
            raise ProblemError(f"{name} must be true or false, not {shown(value)}")
    if cache is not None and not isinstance(cache, str | Path):
        raise ProblemError(f"cache must be a folder or None, not {shown(cache)}")
    if not (generic or words.retain or words.keep):
        raise ProblemError("nothing to retain: name some, or retain the generic vocabulary")
    chosen = _weights(weights)
    here = tower.device if tower.device.type == "cuda" else torch.device("cpu")
    w = tower.projection.to(here)
    b = None if tower.bias is None else tower.bias.to(here)
    common, common_hidden = [], torch.empty(0, len(w))
    if generic and chosen["generic"] > 0:
        common, common_hidden = generic_hidden(tower, cache, progress)
    book = Book(tower, words, target)

    # Before the request is read: a text differs in its last digits by what it is read with, and
    # what is retained must be the same for every request, so that they compose.
    forms, groups = words.templates[:2], {}

    def named(names: Sequence[str], weight: float, twice: bool = False) -> Group:
        rows = torch.cat([book.rows([fill(form, name) for name in names]) for form in forms])
        return Group(list(names) * len(forms), rows, weight, alike=False, twice=twice)

    if words.retain and chosen["own"] > 0:
        groups["own"] = named(words.retain, chosen["own"], twice=len(forms) == 2)
    if common:
        safe = not groups
        groups["generic"] = Group(common, common_hidden, chosen["generic"], safe=safe)
    if words.keep and chosen["keep"] > 0:
        groups["keep"] = named(words.keep, chosen["keep"])
    if not groups:
        raise ProblemError("nothing to retain: every group that holds names has weight 0")
    request, wordings = book.request(), book.wordings()
    names_kept = RetainSet(groups, number("similarity", similarity, low=0), here, MAX_SIMILAR)

    def leaving(requests: Batch) -> Tensor:
        return names_kept.leaving(words.same(requests.classes), requests.hidden, requests.owner)

    mu = ridge
    if mu is None:
        like, same = _like(groups)
        gone = names_kept.leaving([{n} for n in same], like, torch.arange(len(like)))
        limit = number("push", push, above=0)
        mu = best_ridge(names_kept, w.double(), like.to(here), gone, limit, b)
    mu = number("ridge", mu, above=0)
    lam = number("shared", shared, above=0) * names_kept.squared_embedding(w, b)

    gone = leaving(Batch([request])).any(dim=0)
    last = book.rows([fill(words.templates[-1], name) for name in (*words.names, *words.retain)])
    stay = [i for i, n in enumerate(common) if not gone[_start(names_kept, "generic") + i]]
    rivals = [i for i, name in enumerate(words.retain) if name not in words.gone]
    place = torch.tensor([*range(len(words.names)), *(len(words.names) + i for i in rivals)])
    watched = [*words.names, *(words.retain[i] for i in rivals), *(common[i] for i in stay)]
    seen = torch.cat([last[place], common_hidden[stay].to(last)]).to(here)
    count = len(place) if rivals else len(watched)
    watch = Watch(watched, seen, w, count, b)
    specific = SpecificTargets(w, names_kept, lam, b)

    def send(
        requests: Batch, gone: Tensor, numbers: Sequence[int], betas: Tensor
    ) -> tuple[Tensor, list[int]]:
        if isinstance(target, str) and target == "specific":
            return specific(requests, gone, betas), [0]
        return book.targets(requests, watch, names_kept.rows, betas)

    world = World(
        names_kept,
        names_kept.ridge(mu),
        w,
        watch,
        {name: i for i, name in enumerate(words.names)},
        leaving=leaving,
        send=send,
        dataset=DATASET,
        follow=number("follow", follow, low=0),
        margin=number("margin", margin, low=0),
        further=isinstance(target, str) and target in FURTHER,
        option="keep or --keep",
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
    notes = []
    if words.gone:
        notes.append(f"not retained, since forgotten: {', '.join(words.gone)}")
    if book.cut:
        notes.append(truncation_warning(book.cut))
    return _forgotten(tower, answer, settings, notes)


def _forgotten(
    tower: Encoder, answer: Answer, settings: dict[str, Any], notes: Sequence[str]
) -> Forgotten:
    """The answer with what it belongs to; `notes`: beside its own."""
    own = {text.casefold() for text in answer.request.classes}
    retained = [name for name in answer.left_retain_set if name.casefold() in own]
    notes = [*answer.notes(retained), *notes]
    solver = finite({"name": "exact", **answer.report(), "notes": notes})
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
        **recipe_fields(answer.recipe, answer.parts),
    )
    if not (torch.isfinite(adapter.left).all() and torch.isfinite(adapter.right).all()):
        raise ProblemError("the change is not finite: a weight, ridge or beta is out of range")
    made = changed_sha256(adapter, tower.projection, tower.transposed)
    adapter.settings.update({"model": describe(tower), "changed_sha256": made})
    return Forgotten(adapter, tower, tower.weight.detach().clone(), tuple(notes))


def _weights(given: Mapping[str, float] | None) -> dict[str, float]:
    found = dict(WEIGHTS)
    if given is not None and not isinstance(given, Mapping):
        raise ProblemError(f"weights must map groups to numbers, not {shown(given)}")
    for name, weight in (given or {}).items():
        if name not in found:
            raise ProblemError(f"no group {shown(name)} to weigh; there are {', '.join(found)}")
        found[name] = float(number(f"the weight of {name}", weight, low=0))
    return found


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
