"""Compose and undo: unions from adapters alone equal the union solved at once, and nothing else."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetting.adapter import Adapter, load_adapter, projection_sha256, save_adapter
from forgetting.cli import cli
from forgetting.compose import compose, make_recipe, solve
from forgetting.errors import ProblemError
from forgetting.problem import Request
from forgetting.retain import Group, RetainSet
from forgetting.solvers.constrained import (
    Excluded,
    Ridge,
    downdate,
    solve_constrained,
    solve_constraints,
)
from tests.conftest import refuses

EQUAL = 1e-6
W, D = 24, 16
NAMES = ["cat", "dog", "owl", "newt"]
WORDS = [*NAMES, "pet", "kitty", "kitty ", *(f"word {i}" for i in range(33))]
# "pet" means the same as "cat" and as "dog". "kitty" and "kitty " have one hidden state.
SYNONYMS = {"cat": {"cat", "pet", "kitty"}, "dog": {"dog", "pet", "kitty "}}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    a, b = a.double(), b.double()
    return float(torch.linalg.matrix_norm(a - b) / torch.linalg.matrix_norm(b))


class Animals:
    """Four classes with two prompts each, and a vocabulary that names them again.

    Args:
        noise: relative error of all hidden states, as another machine makes it; mu: the ridge;
            order: in which the vocabulary is listed.
    """

    def __init__(self, noise=0.0, seed=0, mu=1e-2, order=None):
        self.mu, self.projection = mu, normal(W, D, seed=1) / W**0.5
        own = normal(len(NAMES), W, seed=2) * 4
        prompts = own + normal(len(NAMES), W, seed=3) * 0.3
        words = normal(len(WORDS), W, seed=4) * 4
        words[:4] = own
        # Not in the span of what is forgotten: such a text moves with it, retained or not.
        words[4] = (own[0] + own[1]) / 2 + normal(W, seed=6)
        words[5] = words[6] = own[0] * 0.9 + normal(W, seed=5)
        rows = [torch.cat([own, prompts]), words]
        for i, part in enumerate(rows):
            rows[i] = part * (1 + noise * normal(*part.shape, seed=seed + i))
        self.texts = dict(zip([*NAMES, *(f"a {n}" for n in NAMES)], rows[0], strict=True))
        order = list(range(len(WORDS))) if order is None else order
        groups = {
            "own": Group([*NAMES, *NAMES], rows[0], 1.0, exclude_similar=False),
            "vocabulary": Group([WORDS[i] for i in order], rows[1][order], 0.1),
        }
        self.retain = RetainSet(groups)
        self.ridge = Ridge(self.retain.rows, mu, self.retain.name_weights)

    def request(self, names, shared=()):
        """Two prompts of each name; `shared`: a text that the first name has as well."""
        texts = [t for name in names for t in (name, f"a {name}")] + list(shared)
        owner = [i for i, _ in enumerate(names) for _ in range(2)] + [0] * len(shared)
        same = [SYNONYMS.get(name, {name}) for name in names]
        hidden = torch.stack([self.texts[text] for text in texts])
        return Request(list(names), texts, hidden, owner, same)

    def answer(self, request):
        excluded = torch.zeros(len(request.classes), len(self.retain.names), dtype=torch.bool)
        for row, same in zip(excluded, request.same, strict=True):
            row |= torch.tensor([name in same for name in self.retain.names])
        displacement = -1.2 * (request.hidden.double() @ self.projection.double())
        return SimpleNamespace(request=request, excluded=excluded, displacement=displacement)

    def at_once(self, *names, shared=()):
        """The reference, straight from the solver and the retained names."""
        answer = self.answer(self.request(names, shared))
        hidden, d = answer.request.hidden, answer.displacement
        return solve_constrained(self.ridge, hidden, d, answer.excluded.any(dim=0)).delta

    def adapter(self, *names, shared=(), scale=1.0, encoder="tower", **fields):
        """What is stored of one request."""
        answer = self.answer(self.request(names, shared))
        answer.displacement *= scale
        context = SimpleNamespace(retain=self.retain, ridge=self.ridge)
        adapter = Adapter(
            left=torch.zeros(W, 1),
            right=torch.zeros(1, D),
            projection_sha256=projection_sha256(self.projection),
            backbone="RN50",
            weights="abc",
            dataset="Animals",
            classes=list(names),
            trainer="ForgetExact",
            settings={"seed": 0, "template": "{}"},
            record={"solver": {"texts": answer.request.texts}},
            recipe=make_recipe(context, answer, "Animals", encoder),
        )
        return replace(adapter, **fields)


@pytest.fixture(scope="module")
def animals() -> Animals:
    return Animals()


@pytest.fixture
def files(animals, tmp_path):
    """Writes adapters; `files("cat")` is the path of one that forgets "cat"."""

    def write(*names, file=None, **fields) -> str:
        path = tmp_path / f"{file or '+'.join(names)}.safetensors"
        save_adapter(animals.adapter(*names, **fields), path)
        return str(path)

    return write


def composed(*argv) -> Adapter:
    assert cli(["compose", *map(str, argv), "--overwrite"]) == 0
    return load_adapter(argv[-1])


def test_unions_and_rests_of_files(animals, files, tmp_path):
    """The property below, by the command; what was composed composes further."""
    cat, dog, owl = (files(name) for name in NAMES[:3])
    pair, three, out = (tmp_path / f"{name}.st" for name in ("pair", "three", "out"))
    made = composed(dog, cat, "--out", pair)
    assert relative(made.delta(), animals.at_once("dog", "cat")) < EQUAL
    assert made.classes == ["dog", "cat"] and made.dataset == "Animals"
    assert made.solver["residual"] < 1e-9 and made.texts == ["dog", "a dog", "cat", "a cat"]
    assert made.settings == {"seed": 0, "template": "{}"}
    # Negative control: two changes do not add up.
    added = animals.at_once("cat") + animals.at_once("dog")
    assert relative(added, animals.at_once("cat", "dog")) > 0.01
    composed(pair, owl, "--out", three)
    made = composed(three, "--without", cat, "--out", out)
    assert relative(made.delta(), animals.at_once("dog", "owl")) < EQUAL
    assert made.classes == ["dog", "owl"] and made.texts == ["dog", "a dog", "owl", "a owl"]


def test_a_text_of_two_classes_is_kept_for_the_other(animals):
    """What is left after giving one back is forgotten by all of its texts."""
    a, b = animals.adapter("cat", shared=["newt"]), animals.adapter("dog", shared=["newt"])
    both = compose({"a": a, "b": b})
    assert both.texts.count("newt") == 1
    left = compose({"both": both}, {"a": a})
    assert left.texts == b.texts == ["dog", "a dog", "newt"]
    assert relative(left.delta(), animals.at_once("dog", shared=["newt"])) < EQUAL


def test_a_name_of_both_is_excluded_once_and_two_names_of_one_hidden_state_stay_two(animals):
    """Negative controls: each of the other countings gives another answer."""
    parts = [*animals.adapter("cat").recipe.parts, *animals.adapter("dog").recipe.parts]
    assert relative(torch.matmul(*solve(parts)[:2]), animals.at_once("cat", "dog")) < EQUAL
    answer = animals.answer(animals.request(["cat", "dog"]))
    gone = answer.excluded.any(dim=0).nonzero()[:, 0].tolist()
    names = [animals.retain.names[i] for i in gone]
    assert names.count("pet") == 1 and {"kitty", "kitty "} <= set(names)
    pet, kitty = gone[names.index("pet")], gone[names.index("kitty ")]
    for others in ([*gone, pet], [i for i in gone if i != kitty]):
        h, rows = answer.request.hidden.double(), animals.retain.rows[others].double()
        excluded = rows, animals.ridge.solve(rows), animals.retain.name_weights[others]
        known = h[None], animals.ridge.solve(h)[None], Excluded(*(x[None] for x in excluded))
        left, right = solve_constraints(h[None], downdate(*known), answer.displacement[None])
        assert relative(left[0] @ right[0], animals.at_once("cat", "dog")) > 1e-4


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(NAMES), min_size=1, unique=True), min_size=1, max_size=4),
    st.data(),
)
def test_any_union_and_any_rest(animals, requests, data):
    """Random requests: their union is the answer at once, and so is what some leave behind."""
    adapters = {f"{i} {'+'.join(r)}": animals.adapter(*r) for i, r in enumerate(requests)}
    everything = list(dict.fromkeys(name for request in requests for name in request))
    made = compose(adapters)
    assert relative(made.delta(), animals.at_once(*everything)) < EQUAL
    again = compose(dict(reversed(adapters.items())))  # the same bytes in any order
    assert torch.equal(again.left, made.left) and torch.equal(again.right, made.right)
    given = data.draw(st.lists(st.sampled_from(sorted(adapters)), unique=True))
    kept = [r for where, r in zip(adapters, requests, strict=True) if where not in given]
    back = {f"back {where}": adapters[where] for where in given}
    if not kept:
        refuses("nothing is left", compose, {"all": made}, back)
        return
    rest = list(dict.fromkeys(name for request in kept for name in request))
    left = compose({"all": made}, back)
    assert relative(left.delta(), animals.at_once(*rest)) < EQUAL
    assert set(left.classes) == set(rest)


@pytest.mark.parametrize("noise", [2e-6, 1e-5])
def test_adapters_of_two_machines_compose(animals, noise):
    """Hidden states, targets and ridge that differ in their last digits, names in another order."""
    order = torch.randperm(len(WORDS), generator=torch.Generator().manual_seed(0)).tolist()
    other = Animals(noise, seed=7, mu=animals.mu * (1 + noise), order=order)
    a, b, cat = animals.adapter("cat", "dog"), other.adapter("dog", "owl"), other.adapter("cat")
    assert not torch.equal(a.recipe.parts[1].hidden, b.recipe.parts[0].hidden)
    for pair in ({"a": a, "b": b}, {"b": b, "a": a}):
        both = compose(pair)
        assert relative(both.delta(), animals.at_once("cat", "dog", "owl")) < 300 * noise
        assert both.solver["residual"] < 1e-9
        rest = compose({"both": both}, {"cat": cat})
        assert relative(rest.delta(), animals.at_once("dog", "owl")) < 300 * noise


@pytest.mark.parametrize("field", ["projection_sha256", "backbone", "encoder", "retain", "mu"])
def test_what_does_not_belong_together_is_refused(animals, field):
    cat, dog = animals.adapter("cat"), animals.adapter("dog")
    if field in ("encoder", "retain", "mu"):
        dog = replace(dog, recipe=replace(dog.recipe, **{field: 0.02 if field == "mu" else "x"}))
    else:
        dog = replace(dog, **{field: "x"})
    for sides in ([{"a": cat, "b": dog}], [{"b": dog, "a": cat}], [{"a": cat}, {"b": dog}]):
        refuses(r" differs: .* in [ab], .* in [ab];", compose, *sides)


def test_mistakes_are_one_line_and_write_nothing(animals, files, tmp_path, refused):
    cat, dog, out = files("cat"), files("dog"), tmp_path / "out.st"
    copy, lora = files("cat", file="copy"), tmp_path / "lora.st"
    save_adapter(replace(animals.adapter("owl"), trainer="ForgetLoRA", recipe=None), lora)

    def refusal(*argv) -> str:
        return refused(["compose", *map(str, argv)], cli)

    for argv, word in (
        ([cat, lora], "ForgetExact"),
        ([cat], "nothing to compose"),
        ([cat, "--without", copy], "nothing is left"),
        ([cat, "--without", dog], "forgets 'dog', and what is composed forgets 'cat'"),
        ([cat, dog, "--outt", "x"], "'--out'"),
    ):
        assert word in refusal(*argv, "--out", out)
    assert "--out" in refusal(cat, dog)
    assert not out.exists()
    before = (tmp_path / "dog.safetensors").read_bytes()
    assert "--overwrite" in refusal(cat, dog, "--out", dog)
    assert (tmp_path / "dog.safetensors").read_bytes() == before


def test_one_text_with_two_targets_is_refused(animals):
    a, b = animals.adapter("cat"), animals.adapter("cat", scale=1.5)
    refuses("'cat' is sent to different targets", compose, {"a": a, "b": b})
    for other in (b, animals.adapter("cat", shared=["newt"])):
        refuses(r"b: forgets 'cat', and .* in another way", compose, {"a": a}, {"b": other})


def test_an_answer_that_misses_its_targets_is_refused(animals):
    (part,) = animals.adapter("cat").recipe.parts
    zeros = replace(part, base=part.base * 0, excluded_base=part.excluded_base * 0)
    refuses(r"misses its targets by 1\.0e\+00", solve, [zeros])
    hidden, base = (torch.cat([x[:1]] * 2) for x in (part.hidden, part.base))
    with pytest.raises(ProblemError, match="nearly equal texts"):
        solve([replace(part, hidden=hidden, base=base)])  # one hidden state with two targets
