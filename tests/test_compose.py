"""Compose and undo: unions from adapters alone equal the union solved at once, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from safetensors import safe_open

from forgetting import Adapter, ForgetProblem, load_adapter, projection_sha256, save_adapter
from forgetting.adapter import read_parts, recipe_fields, recipe_parts
from forgetting.compose import cli, compose, solve_recipes
from forgetting.errors import ProblemError
from forgetting.solvers.constrained import Ridge, solve_constrained
from forgetting.solvers.exact import solve_exact
from forgetting.statistics import RetainStatistics
from tests.conftest import REPOSITORY

REAL_CLIP = REPOSITORY.parent / "shared" / "real_clip" / "ViT-B-32"
EQUAL = 1e-6
W, D = 24, 16
NAMES = ["cat", "dog", "owl", "newt"]
WEIGHTS = {"own": 1.0, "vocabulary": 0.1}
PAPER = {"lamb_forget": 12.0, "lamb_preserve": 0.2, "lamb_weight": 0.05, "rank": 5, "alpha": 1.0}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    a, b = a.double(), b.double()
    return float(torch.linalg.matrix_norm(a - b) / torch.linalg.matrix_norm(b))


def part_of(ridge, name, h_f, displacement, rows=None, shares=None):
    """The part of a recipe that one class is, all `rows` leaving with it."""
    rows = h_f[:0] if rows is None else rows
    shares = torch.zeros(0) if shares is None else shares
    owner, leaving = torch.zeros(len(h_f), dtype=torch.int64), torch.ones(1, len(rows)).bool()
    return recipe_parts(ridge, h_f, displacement, owner, [name], rows, shares, leaving)[0]


class World:
    """Four classes with two prompts each, a vocabulary with synonyms, and their statistics.

    Vocabulary rows 0 to 3 are the class names again, row 4 means the same as "cat" and as "dog",
    rows 5 and 6 hold one further synonym of "cat" twice.
    """

    mu = 1e-2

    def __init__(self) -> None:
        self.projection = normal(W, D, seed=1) / W**0.5
        self.own = normal(len(NAMES), W, seed=2) * 4
        self.prompts = self.own + normal(len(NAMES), W, seed=3) * 0.3
        self.vocabulary = normal(40, W, seed=4) * 4
        self.vocabulary[:4] = self.own
        # Not in the span of what is forgotten: such a text moves with it, retained or not.
        self.vocabulary[4] = (self.own[0] + self.own[1]) / 2 + normal(W, seed=6)
        self.vocabulary[6] = self.vocabulary[5] = self.own[0] * 0.9 + normal(W, seed=5)
        self.synonyms = {"cat": [0, 4, 5, 6], "dog": [1, 4], "owl": [2], "newt": [3]}
        self.statistics = RetainStatistics(W)
        self.statistics.update("own", self.own)
        self.statistics.update("vocabulary", self.vocabulary)
        self.ridge = Ridge(self.statistics.weighted(WEIGHTS), self.mu)

    def texts(self, names):
        labels = [NAMES.index(name) for name in names]
        rows = torch.stack([self.own[labels], self.prompts[labels]], dim=1).flatten(0, 1)
        return rows, -1.2 * (rows.double() @ self.projection.double())  # (2k, w), (2k, d)

    def leaving(self, names, plain=False):
        """Hidden states and shares of all that leaves, each member of the statistics once."""
        labels = [NAMES.index(name) for name in names]
        words = sorted({row for name in names for row in self.synonyms[name]})
        rows = torch.cat([self.own[labels], self.vocabulary[words]])
        shares = [1.0 if plain else self.statistics.share("own", WEIGHTS)] * len(labels)
        shares += [1.0 if plain else self.statistics.share("vocabulary", WEIGHTS)] * len(words)
        return rows, torch.tensor(shares, dtype=torch.float64)

    def at_once(self, names):
        """The reference, straight from the solver and the statistics."""
        return solve_constrained(self.ridge, *self.texts(names), *self.leaving(names)).delta

    def paper_at_once(self, names, lamb_forget=None):
        h_f, d = self.texts(names)
        rows, _ = self.leaving(names, plain=True)
        gone = {row.numpy().tobytes() for row in rows}
        everything = torch.cat([self.own, self.vocabulary])
        stay = torch.stack([row for row in everything if row.numpy().tobytes() not in gone])
        problem = ForgetProblem(
            torch.zeros(W, D, dtype=torch.float64),
            h_f.double(),
            stay.double(),
            d,
            **PAPER | {"lamb_forget": lamb_forget or "auto"},
        )
        return solve_exact(problem).delta

    def adapter(self, *names, objective="constrained", changed=None, **fields):
        """What a trainer stores of one request."""
        paper = objective == "paper"
        ridge = None if paper else self.ridge
        parts = [
            part_of(ridge, ("Animals", name), *self.texts([name]), *self.leaving([name], paper))
            for name in names
        ]
        shared = {"objective": objective, "statistics": self.statistics.sha256}
        shared |= PAPER | {"weights": None} if paper else {"weights": WEIGHTS, "mu": self.mu}
        shared |= changed or {}
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
        )
        return replace(adapter, **fields, **recipe_fields(shared, parts))


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture
def files(world, tmp_path):
    """Writes adapters; `files("cat")` is the path of one that forgets "cat"."""

    def write(*names, file=None, **fields) -> str:
        path = tmp_path / f"{file or '+'.join(names)}.safetensors"
        save_adapter(world.adapter(*names, **fields), path)
        return str(path)

    return write


def one_line(capsys, *argv) -> str:
    assert cli(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_either_order_and_three_equal_the_union_at_once(world, files, tmp_path):
    paths = {name: files(name) for name in ("cat", "dog", "owl")}
    for order in [*permutations(("cat", "dog")), *permutations(("cat", "dog", "owl"))]:
        out = tmp_path / f"out-{'-'.join(order)}.safetensors"
        assert cli([*(paths[name] for name in order), "--out", str(out)]) == 0
        result = load_adapter(out)
        assert relative(result.delta(), world.at_once(order)) < EQUAL
        assert result.classes == list(order) and result.dataset == "Animals"
        assert result.solver["residual"] < 1e-9
        assert result.settings == {"seed": 0, "template": "{}"}
    # Step by step: what was composed composes further, and with a request of several classes.
    pair, steps = tmp_path / "out-cat-dog.safetensors", tmp_path / "steps.safetensors"
    assert cli([str(pair), paths["owl"], "--out", str(steps)]) == 0
    assert relative(load_adapter(steps).delta(), world.at_once(["cat", "dog", "owl"])) < EQUAL
    assert cli([files("dog", "owl"), paths["cat"], "--out", str(tmp_path / "mixed.st")]) == 0
    mixed = load_adapter(tmp_path / "mixed.st")
    assert relative(mixed.delta(), world.at_once(["cat", "dog", "owl"])) < EQUAL


def test_giving_back_leaves_the_other_alone(world, files, tmp_path):
    cat, dog, owl = (files(name) for name in ("cat", "dog", "owl"))
    three = str(tmp_path / "three.st")
    assert cli([cat, dog, owl, "--out", three]) == 0
    for without, rest in (
        ([cat], ["dog", "owl"]),
        ([owl, cat], ["dog"]),
        ([files("owl", "cat")], ["dog"]),  # a request of two classes, forgotten one by one
    ):
        out = tmp_path / f"without-{len(without)}-{len(rest)}-{without[0][-12:]}.st"
        flags = [flag for path in without for flag in ("--without", path)]
        assert cli([three, *flags, "--out", str(out)]) == 0
        result = load_adapter(out)
        assert relative(result.delta(), world.at_once(rest)) < EQUAL
        assert result.classes == rest
    # A is part of a request that was solved at once, too.
    assert cli([files("cat", "dog"), "--without", cat, "--out", str(tmp_path / "b.st")]) == 0
    assert relative(load_adapter(tmp_path / "b.st").delta(), world.at_once(["dog"])) < EQUAL


def test_a_class_in_both_is_forgotten_once_and_stays_until_both_are_given_back(world):
    a, b = world.adapter("cat"), world.adapter("cat", "dog")
    both = compose({"a": a, "b": b})
    assert relative(both.delta(), world.at_once(["cat", "dog"])) < EQUAL
    assert both.classes == ["cat", "dog"]
    rest = compose({"both": both}, {"a": a})
    assert rest.classes == ["cat", "dog"]
    assert relative(rest.delta(), world.at_once(["cat", "dog"])) < EQUAL
    assert relative(compose({"rest": rest}, {"a": a}).delta(), world.at_once(["dog"])) < EQUAL


def test_a_synonym_of_both_leaves_the_statistics_once(world):
    """Negative control: with the shared synonym kept, or taken out twice, the answer is another."""
    parts = read_parts(world.adapter("cat", "dog"), "ab")
    shared = world.adapter("cat").recipe
    union = world.at_once(["cat", "dog"])
    assert relative(solve_recipes(shared, parts).delta, union) < EQUAL
    rows, shares = world.leaving(["cat", "dog"])
    index = [i for i, row in enumerate(rows) if torch.equal(row, world.vocabulary[4])]
    assert len(index) == 1
    kept = [i for i in range(len(rows)) if i not in index]
    texts = world.texts(["cat", "dog"])
    kept = solve_constrained(world.ridge, *texts, rows[kept], shares[kept]).delta
    assert relative(kept, union) > 1e-4
    rows, shares = torch.cat([rows, rows[index]]), torch.cat([shares, shares[index]])
    twice = solve_constrained(world.ridge, *texts, rows, shares).delta
    assert relative(twice, union) > 1e-4


def test_adding_two_changes_is_not_the_union(world):
    union = world.at_once(["cat", "dog"])
    assert relative(world.at_once(["cat"]) + world.at_once(["dog"]), union) > 0.01


def test_statistics_certify_the_union(world, files, tmp_path):
    path, out = tmp_path / "statistics.st", tmp_path / "ab.st"
    world.statistics.save(path)
    argv = [files("cat"), files("dog"), "--out", str(out), "--statistics", str(path)]
    assert cli(argv) == 0
    assert load_adapter(out).solver["gap"] < 1e-9


@pytest.mark.parametrize("lamb_forget", [12.0, "auto"])
def test_papers_objective_with_its_statistics(world, files, tmp_path, capsys, lamb_forget):
    fields = {"objective": "paper", "changed": {"lamb_forget": lamb_forget}}
    cat, dog = (files(name, **fields) for name in ("cat", "dog"))
    path, out, back = (str(tmp_path / name) for name in ("statistics.st", "ab.st", "b.st"))
    assert "pass --statistics FILE" in one_line(capsys, cat, dog, "--out", out)
    world.statistics.save(path)
    number = None if lamb_forget == "auto" else lamb_forget
    union = world.paper_at_once(["cat", "dog"], number)
    assert float(union.norm()) > 0.1
    assert cli([cat, dog, "--out", out, "--statistics", path]) == 0
    result = load_adapter(out)
    assert relative(result.delta(), union) < EQUAL and result.solver["gap"] < 1e-9
    assert cli([out, "--without", cat, "--out", back, "--statistics", path]) == 0
    alone = world.paper_at_once(["dog"], number)
    assert relative(load_adapter(back).delta(), alone) < EQUAL
    # Negative control.
    assert relative(world.paper_at_once(["cat"], number) + alone, union) > 0.01


def test_other_statistics_are_refused(world, files, tmp_path, capsys):
    other = RetainStatistics(W)
    other.update("own", world.own[1:])
    other.save(tmp_path / "other.st")
    argv = [files("cat"), files("dog"), "--out", str(tmp_path / "ab.st")]
    message = one_line(capsys, *argv, "--statistics", str(tmp_path / "other.st"))
    assert other.sha256[:12] in message and world.statistics.sha256[:12] in message


@pytest.mark.parametrize(
    ("fields", "values"),
    [
        ({"projection_sha256": "f" * 64}, ["text projection", "ffffffffffff"]),
        ({"backbone": "ViT-B/32"}, ["backbone", "'RN50'", "'ViT-B/32'"]),
        ({"trainer": "Other"}, ["trainer", "'ForgetExact'", "'Other'"]),
        ({"objective": "paper"}, ["objective", "'constrained'", "'paper'"]),
        ({"changed": {"statistics": "e" * 64}}, ["statistics", "eeeeeeeeeeee"]),
        ({"changed": {"mu": 0.5}}, ["mu", "0.01", "0.5"]),
        ({"changed": {"weights": {"own": 2.0}}}, ["weights.own", "2.0"]),
    ],
)
def test_what_does_not_belong_together_is_refused(files, tmp_path, capsys, fields, values):
    out = tmp_path / "out.st"
    for a, b in ((files("cat"), files("dog", **fields)), (files("dog", **fields), files("cat"))):
        message = one_line(capsys, a, b, "--out", str(out))
        for value in (*values, "cat.safetensors", "dog.safetensors"):
            assert value in message
        assert value in one_line(capsys, a, "--without", b, "--out", str(out))
    assert not out.exists()


def test_what_differs_of_two_models_is_named(files, tmp_path, capsys):
    """As `forget` describes them."""
    a, b = ({"settings": {"model": {"transposed": False, "bias": name}}} for name in (None, "b"))
    argv = [files("cat", **a), files("dog", **b), "--out", str(tmp_path / "out.st")]
    assert "model.bias differs: None in" in one_line(capsys, *argv)


def test_mistakes_are_one_line_and_write_nothing(world, files, tmp_path, capsys):
    cat, dog, out = files("cat"), files("dog"), str(tmp_path / "out.st")
    lora = str(tmp_path / "lora.st")
    nothing = {"recipe": {}, "tensors": {}}
    save_adapter(replace(world.adapter("owl"), trainer="ForgetLoRA", **nothing), lora)
    assert "TRAINER=ForgetExact" in one_line(capsys, cat, lora, "--out", out)
    assert "nothing to compose" in one_line(capsys, cat, "--out", out)
    assert "named twice" in one_line(capsys, cat, cat, "--out", out)
    assert "are the same adapter" in one_line(
        capsys, cat, dog, str(files("cat", file="copy")), "--out", out
    )
    assert "are the same adapter" in one_line(
        capsys, cat, files("cat", file="copied"), "--without", dog, "--out", out
    )
    assert "nothing is left" in one_line(
        capsys, cat, "--without", files("cat", file="again"), "--out", out
    )
    assert "forgets 'dog', but what is composed forgets 'cat'" in one_line(
        capsys, cat, "--without", dog, "--out", out
    )
    assert "missing.st" in one_line(capsys, cat, str(tmp_path / "missing.st"), "--out", out)
    assert "--out" in one_line(capsys, cat, dog)
    line = one_line(capsys, cat, dog, "--out", out, "--outt", "x")
    assert "unknown option '--outt'; did you mean '--out'" in line
    assert not (tmp_path / "out.st").exists()
    before = (tmp_path / "dog.safetensors").read_bytes()
    assert "not overwritten" in one_line(capsys, cat, dog, "--out", dog)
    assert (tmp_path / "dog.safetensors").read_bytes() == before


def encoded_again(adapter, by=1e-7, seed=0, ridge=None):
    """The adapter as another batch would have made it: every text off by `by`, relatively."""
    tensors = dict(adapter.tensors)
    for kind in ("forget", "leaving"):
        rows = tensors[f"{kind}_hidden"].double()
        noise = normal(*rows.shape, seed=seed).double()
        noise *= by * (rows.norm(dim=1) / noise.norm(dim=1))[:, None]
        tensors[f"{kind}_hidden"] = (rows + noise).float()
        if ridge is not None:
            tensors[f"{kind}_base"] = ridge.solve(tensors[f"{kind}_hidden"])
    return replace(adapter, tensors=tensors)


def by_bytes(parts, columns, name):
    """What `_first` would be if texts were the same only to the last bit."""
    first: dict[bytes, int] = {}
    found = [first.setdefault(row.numpy().tobytes(), j) for j, row in enumerate(columns[name])]
    return found, [i for i, part in enumerate(parts) for _ in part.tensors[name]]


@pytest.mark.parametrize("by", [1e-7, 3e-6])
def test_a_text_from_two_encodings_is_one_text(world, monkeypatch, by):
    """Negative control: matched by their bytes alone, shared texts leave the statistics twice."""
    union = world.at_once(["cat", "dog", "owl"])
    a, b = world.adapter("cat", "dog"), encoded_again(world.adapter("dog", "owl"), by)
    b = encoded_again(b, by=0, ridge=world.ridge)
    assert not torch.equal(a.tensors["leaving_hidden"][-1], b.tensors["leaving_hidden"][0])
    for pair in ({"a": a, "b": b}, {"b": b, "a": a}):
        for statistics in (None, world.statistics):
            both = compose(pair, statistics=statistics)
            assert relative(both.delta(), union) < 100 * by
            assert both.solver["proved"] == (statistics is not None)
    # Giving back goes by value too, from either encoding.
    rest = compose(
        {"ab": compose({"a": a, "b": b})}, {"c": encoded_again(world.adapter("cat"), by)}
    )
    assert relative(rest.delta(), world.at_once(["dog", "owl"])) < 100 * by
    # A synonym of both, counted twice, has the weight for that: nothing shows that it is wrong.
    a, b = world.adapter("cat"), encoded_again(world.adapter("dog"), by)
    b = encoded_again(b, by=0, ridge=world.ridge)
    pair, union = {"a": a, "b": b}, world.at_once(["cat", "dog"])
    assert relative(compose(pair, statistics=world.statistics).delta(), union) < 100 * by
    monkeypatch.setattr("forgetting.compose._first", by_bytes)
    assert relative(compose(pair, statistics=world.statistics).delta(), union) > 0.05


def test_the_papers_objective_from_two_encodings(world, monkeypatch):
    a = world.adapter("cat", "dog", objective="paper")
    b = encoded_again(world.adapter("dog", "owl", objective="paper"))
    union = world.paper_at_once(["cat", "dog", "owl"], 12.0)
    both = compose({"a": a, "b": b}, statistics=world.statistics)
    assert relative(both.delta(), union) < 1e-5
    assert both.solver["proved"] and both.solver["gap"] < 1e-9
    monkeypatch.setattr("forgetting.compose._first", by_bytes)
    assert relative(compose({"a": a, "b": b}, statistics=world.statistics).delta(), union) > 1e-2


def test_copies_of_one_text_stay_as_many_as_they_are(world):
    """Rows 5 and 6 of the vocabulary are one text that is retained twice, so it leaves twice."""
    a, b = world.adapter("cat"), encoded_again(world.adapter("cat", "owl"), ridge=world.ridge)
    rows = compose({"a": a, "b": b}).tensors["leaving_hidden"]  # what is kept: of all parts
    assert sum(torch.allclose(row, world.vocabulary[5], rtol=1e-5) for row in rows) == 4
    assert relative(compose({"a": a, "b": b}).delta(), world.at_once(["cat", "owl"])) < 1e-5


def test_requests_from_which_nothing_leaves(world):
    texts = {name: world.texts([name]) for name in ("cat", "dog")}
    shared = world.adapter("cat").recipe
    parts = [part_of(world.ridge, ("Animals", name), *texts[name]) for name in texts]
    union = solve_constrained(world.ridge, *map(torch.cat, zip(*texts.values(), strict=True)))
    assert relative(solve_recipes(shared, parts).delta, union.delta) < EQUAL


def test_texts_neither_the_same_nor_different_are_refused(world):
    a, b = world.adapter("cat"), encoded_again(world.adapter("cat", "owl"), 2e-4, ridge=world.ridge)
    with pytest.raises(ProblemError, match="'cat' and 'cat' have a text that differs by 2e-04"):
        compose({"a": a, "b": b})


def test_an_answer_that_is_none_is_not_written(world, files, tmp_path, capsys):
    """Recipes that were bent and sealed anew: what the numbers show is refused."""
    world.statistics.save(tmp_path / "s.st")
    proof, out = ["--statistics", str(tmp_path / "s.st")], tmp_path / "out.st"
    cat, dog = files("cat"), files("dog")

    def bend(words, *options, objective="constrained", **columns):
        adapter = world.adapter("cat", objective=objective)
        bent = {name: change(adapter.tensors[name].clone()) for name, change in columns.items()}
        path = tmp_path / "bent.st"
        save_adapter(replace(adapter, tensors=adapter.tensors | bent), path)
        other = dog if objective == "constrained" else files("dog", objective=objective, file="p")
        line = one_line(capsys, str(path), other, "--out", str(out), *options)
        assert words in line and not out.exists()

    def one_row(tensor):
        tensor[0] *= 3
        return tensor

    bend("not of their texts and of one K_0", forget_base=one_row)
    bend("not of their texts and of one K_0", leaving_base=lambda x: x * 0)
    bend("texts and of one K_0", *proof, forget_base=lambda x: x * 2, leaving_base=lambda x: x * 2)
    bend("not part of the Gram", leaving_hidden=lambda x: x * 100, leaving_base=lambda x: x * 100)
    nothing = {}
    for name in ("cat", "dog"):
        columns = world.adapter(name).tensors
        zeros = {x: columns[x] * 0 for x in ("forget_base", "leaving_base")}
        nothing[name] = replace(world.adapter(name), tensors=columns | zeros)
    with pytest.raises(ProblemError, match=r"misses its targets by 1\.0e\+00"):
        compose(nothing)
    bend("error: ", displacement=lambda x: x * 1e200)
    bend("right holds NaN or infinite", displacement=lambda x: x * 1e50)
    bend("error: ", *proof, objective="paper", displacement=lambda x: x * 1e200)
    bend("error: ", *proof, objective="paper", displacement=lambda x: x * 1e50)
    other_mu = [files(name, file=f"mu-{name}", changed={"mu": 0.02}) for name in ("cat", "dog")]
    assert "is proved only to" in one_line(capsys, *other_mu, "--out", str(out), *proof)
    assert cli([cat, dog, "--out", str(out), *proof]) == 0
    assert "gap" in capsys.readouterr().out
    assert cli([cat, dog, "--out", str(tmp_path / "unproved.st")]) == 0
    assert "not proved to be the least disturbance" in capsys.readouterr().out


def test_out_is_taken_meanwhile(world, files, tmp_path, monkeypatch, capsys):
    """Whoever comes second is refused, and what is there stays."""
    out, solve = tmp_path / "out.st", solve_recipes

    def slow(*args):
        out.write_text("mine")
        return solve(*args)

    monkeypatch.setattr("forgetting.compose.solve_recipes", slow)
    cat, dog = files("cat"), files("dog")
    assert "not overwritten" in one_line(capsys, cat, dog, "--out", str(out))
    assert out.read_text() == "mine" and not list(tmp_path.glob(".tmp*"))


def test_one_text_with_two_targets_is_refused(world):
    a, b = world.adapter("cat"), world.adapter("cat")
    b = replace(b, tensors=b.tensors | {"displacement": b.tensors["displacement"] * 1.5})
    with pytest.raises(ProblemError, match="'cat' and 'cat' send the same text to different"):
        compose({"a": a, "b": b})
    with pytest.raises(ProblemError, match="b: 'cat' was forgotten in another way"):
        compose({"a": a}, {"b": b})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda recipe, tensors: recipe.pop("mu"),
        lambda recipe, tensors: recipe.pop("objective"),
        lambda recipe, tensors: recipe.update(objective="another"),
        lambda recipe, tensors: recipe.update(parts=[]),
        lambda recipe, tensors: recipe["parts"][0].update(forget=1),
        lambda recipe, tensors: recipe["parts"][0].update(forget="x"),
        lambda recipe, tensors: recipe["parts"][0].pop("class"),
        lambda recipe, tensors: tensors.pop("leaving_base"),
        lambda recipe, tensors: tensors.update(displacement=torch.zeros(2, D + 1)),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_line(world, spoil):
    adapter = world.adapter("cat")
    spoil(adapter.recipe, adapter.tensors)
    with pytest.raises(ProblemError, match="x: a recipe that does not fit together") as caught:
        compose({"x": adapter, "y": world.adapter("dog")})
    assert "\n" not in str(caught.value)


def test_texts_without_displacements_make_no_recipe(world):
    with pytest.raises(ProblemError, match="make no recipe"):
        part_of(world.ridge, ("Animals", "cat"), world.own[:1], torch.zeros(2, D))


def test_module_command(files, tmp_path):
    argv = [sys.executable, "-m", "forgetting.compose", files("cat"), files("dog")]
    run = subprocess.run(
        [*argv, "--out", str(tmp_path / "ab.st")], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert run.returncode == 0 and "forgets cat, dog of Animals" in run.stdout and not run.stderr


class RealWorld:
    """A set with its own classes and its vocabulary retained, two prompts a class."""

    mu = 1e-3

    def __init__(self, dataset: str) -> None:
        with safe_open(str(REAL_CLIP / f"{dataset}.safetensors"), "pt") as file:
            names = ("forget_hidden", "class_hidden", "retain_hidden", "text_projection")
            self.own, self.prompts, vocabulary, self.projection = (
                file.get_tensor(name).float() for name in names
            )
        self.statistics = RetainStatistics(self.own.shape[1])
        self.statistics.update("own", self.own)
        self.statistics.update("vocabulary", vocabulary)
        weights = {"own": 1.0, "vocabulary": 0.01}
        self.share = self.statistics.share("own", weights)
        self.ridge = Ridge(self.statistics.weighted(weights), self.mu)

    def inputs(self, labels):
        h_f = torch.cat([self.own[labels], self.prompts[labels]])
        shares = torch.full((len(labels),), self.share, dtype=torch.float64)
        displacement = -1.2 * (h_f.double() @ self.projection.double())
        return h_f, displacement, self.own[labels], shares

    def at_once(self, labels):
        return solve_constrained(self.ridge, *self.inputs(labels)).delta


@pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="real CLIP features are not here")
@pytest.mark.parametrize("dataset", ["CaltechObjects", "StanfordCars"])
def test_real_features(dataset):
    real = RealWorld(dataset)
    shared = {"objective": "constrained", "mu": real.mu, "statistics": ""}
    parts = [
        part_of(real.ridge, (dataset, str(label)), *real.inputs([label])) for label in range(8)
    ]
    union = real.at_once(list(range(8)))
    assert relative(solve_recipes(shared, parts).delta, union) < EQUAL
    assert relative(solve_recipes(shared, parts[::-1]).delta, union) < EQUAL
    size = sum(tensor.nbytes for tensor in parts[0].tensors.values())
    assert size < 40_000
    # Negative control: adding the changes is off by far more than rounding, by how much depends
    # on how near the classes are to each other.
    added = sum(real.at_once([label]) for label in range(8))
    assert relative(added, union) > 1e-3
