"""Complete forgetting of planted texts, against arithmetic that shares no code with it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.context import BETAS, MAX_ADDED, Answer, ExactSettings, ForgetContext
from forgetting.displacement import ClassifierTexts
from forgetting.edited_texts import EmbeddedTexts
from forgetting.errors import ProblemError
from forgetting.problem import Batch, Paraphrases, Request
from forgetting.retain import Group, RetainSet
from forgetting.targets import TARGETS, TargetInputs, specific, targets
from tests.conftest import refuses
from tests.solver_fixtures import normal

W, D, CLASSES = 8, 6, 5
PLAIN = ExactSettings(beta=0.1, min_margin=0.0, min_displacement=0.0)


class Planted:
    """Five classes in two prompts, nine further names, a projection with or without a bias."""

    def __init__(self, seed: int = 0, bias: bool = False) -> None:
        names = [f"class {i}" for i in range(CLASSES)]
        self.bare = normal(CLASSES, W, seed=seed)
        self.prompts = self.bare + 0.2 * normal(CLASSES, W, seed=seed + 1)
        self.words = normal(9, W, seed=seed + 2)
        self.w, self.b = normal(W, D, seed=seed + 3), normal(D, seed=seed + 4) if bias else None
        both = torch.cat([self.bare, self.prompts])
        words = Group([f"word {i}" for i in range(9)], self.words, 0.3)
        own = Group(names * 2, both, 1.0, prompt_variants=True)
        self.retain = RetainSet({"own": own, "words": words})
        self.names, self.vector = names, normal(D, seed=seed + 5)

    def context(self, settings: ExactSettings = PLAIN, ridge: float = 0.01) -> ForgetContext:
        label = {name: i for i, name in enumerate(self.names)}
        inputs = TargetInputs(
            self.w,
            self.b,
            classes=self.prompts,
            label=label,
            empty=normal(1, W, seed=9),
            text=self.words[:1],
            named=torch.cat([self.bare, self.words]),
            retain=self.retain,
            lam=0.5 * self.retain.squared_embedding(self.w, self.b),
        )
        embedded = EmbeddedTexts(self.prompts, inputs.embed(self.prompts))
        texts = ClassifierTexts(self.names, embedded, label, CLASSES)
        return ForgetContext(self.retain, self.retain.ridge(ridge), inputs, texts, settings)

    def request(self, *classes: int, paraphrases: Tensor | None = None) -> Request:
        names = [self.names[i] for i in classes]
        rows = self.prompts[list(classes)][:, None] if paraphrases is None else paraphrases
        others = [
            Paraphrases([f"{name}, said {i}" for i in range(len(some))], some)
            for name, some in zip(names, rows, strict=True)
        ]
        same = [{name.upper()} for name in names]
        return Request(names, names, self.bare[list(classes)], [*range(len(names))], same, others)

    def embed(self, hidden: Tensor) -> Tensor:
        return hidden @ self.w + (0 if self.b is None else self.b)

    def answer(self, classes: tuple[int, ...], kind: str, beta: float, ridge: float) -> Tensor:
        """Delta by the formulas of the documentation."""
        own = torch.cat([self.bare, self.prompts])
        stays = [i % CLASSES not in classes for i in range(2 * CLASSES)]
        everything = [(h, 1.0 / len(own), s) for h, s in zip(own, stays, strict=True)]
        everything += [(h, 0.3 / len(self.words), True) for h in self.words]
        gram = sum(c * torch.outer(h, h) for h, c, _ in everything)
        mu = ridge * float(gram.trace()) / 1.3
        k = sum(c * torch.outer(h, h) for h, c, s in everything if s) + mu * torch.eye(W)
        hidden = self.bare[list(classes)]
        goal = []
        for i in classes:
            e = self.embed(self.bare[i])
            if kind == "opposite":
                goal.append(-beta * e)
            elif kind == "vector":
                goal.append(self.vector)
            elif kind == "text:word 0":
                goal.append(normalize(self.embed(self.words[0]), dim=0))
            elif kind == "specific":
                rows = [(self.embed(h), c) for h, c, _ in everything]
                lam = 0.5 * float(sum(c * x @ x for x, c in rows)) / 1.3
                del rows[i + CLASSES], rows[i]
                t = sum(c * torch.outer(x, x) for x, c in rows)
                r = torch.linalg.solve(t + lam * torch.eye(D), e)
                goal.append(e - (1 + beta) * (e @ r) / (r @ r) * r)
        way = torch.stack(goal) - self.embed(hidden)
        column = torch.linalg.solve(k, hidden.T)
        return column @ torch.linalg.solve(hidden @ column, way)


@given(
    seed=st.integers(0, 10**6),
    bias=st.booleans(),
    several=st.booleans(),
    kind=st.sampled_from(["specific", "opposite", "vector", "text:word 0"]),
    ridge=st.floats(1e-4, 1.0),
)
def test_an_answer_is_what_the_formulas_say(seed, bias, several, kind, ridge):
    planted = Planted(seed, bias)
    target = planted.vector if kind == "vector" else kind
    beta = 0.1 if kind in ("specific", "opposite") else 0.0
    settings = replace(PLAIN, target=target, beta=beta)
    classes = (1, 3) if several else (1,)
    alone, answer = planted.context(settings, ridge).forget(
        [planted.request(2), planted.request(*classes)]
    )
    expected = planted.answer(classes, kind, beta, ridge)
    assert torch.allclose(answer.edit.delta, expected, atol=1e-8 * float(expected.norm()))
    assert answer.edit.certificate.gap < 1e-8 and answer.excluded.sum() == 2 * len(classes)
    other = planted.answer((2,), kind, beta, ridge)
    assert torch.allclose(alone.edit.delta, other, atol=1e-8 * float(other.norm()))
    assert not torch.allclose(expected, other, atol=1e-3 * float(other.norm()))  # the control


def test_every_target_lands_where_its_name_says():
    planted = Planted(bias=True)
    context, batch = planted.context(), Batch([planted.request(0), planted.request(1, 2)])
    excluded = planted.retain.excluded(batch.same, batch.hidden, batch.owner)
    e, found = context.inputs.embed(batch.hidden), {}
    for kind in (*TARGETS, "text:x", planted.vector):
        name = kind if isinstance(kind, str) else "vector"
        found[name] = targets(kind, batch, context.inputs, 0.0, excluded)
    assert torch.equal(found["opposite"], 0 * e)
    betas = torch.tensor([0.0, 0.1, 0.3]).double()
    opposite = targets("opposite", batch, context.inputs, betas)
    assert torch.allclose(opposite, -betas[:, None] * e)
    assert torch.equal(found["vector"], planted.vector.expand(3, -1))
    assert torch.allclose(found["text:x"], normalize(context.inputs.embed(planted.words[:1])))
    names = context.inputs.embed(torch.cat([planted.bare, planted.words]))
    least = torch.linalg.svd(names).S[-1]
    assert torch.allclose((names @ found["orthogonal"].T).norm(dim=0), least.expand(3))
    for kind in ("orthogonal", "empty", "text:x"):
        assert torch.allclose(found[kind].norm(dim=1), torch.ones(3).double())
    both = found["empty"][1:]
    assert torch.equal(both[0], both[1])
    nearest = normalize(context.inputs.embed(planted.prompts), dim=1) @ both[0]
    assert int(nearest.argmax()) not in (1, 2)
    nothing = torch.zeros(2, D).double()  # of a text without an embedding nothing is specific
    found = specific(nothing, context.inputs, torch.full((2, 1), 0.1), excluded[:2])
    assert torch.equal(found, nothing)


def test_noise_is_drawn_by_the_request_and_away_from_what_is_forgotten():
    planted = Planted()
    context = planted.context()
    batch = Batch([planted.request(i) for i in range(CLASSES)])
    near = normalize(context.inputs.embed(planted.prompts), dim=1)
    empty = normalize(context.inputs.embed(context.inputs.empty), dim=1)
    nearest = int((empty @ near.T).argmax())
    found = targets("empty", batch, context.inputs)
    for i in range(CLASSES):
        assert torch.allclose(found[i], empty[0]) == (i != nearest)
        assert int((near @ found[i]).argmax()) != i

    def drawn(seed: int) -> Tensor:
        request = replace(planted.request(nearest), seed=seed)
        return targets("empty", Batch([request]), context.inputs)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    generator, draws = torch.Generator().manual_seed(1), 0
    found = empty
    while int((found @ near.T).argmax()) == nearest:
        noise = torch.randn(1, D, generator=generator)
        found = normalize(context.inputs.embed(context.inputs.empty) + 0.5 * noise, dim=1)
        draws += 1
    assert draws > 1 and torch.allclose(drawn(1), found)
    still = replace(context.inputs, noise_std=0.0)
    refuses(
        "target opposite or.* noise_std above 0",
        targets,
        "empty",
        Batch([planted.request(nearest)]),
        still,
    )


@pytest.mark.parametrize(
    ("target", "beta", "word"),
    [
        *(("mean", 0.0, "target"), ("text: ", 0.0, "target"), (None, 0.0, "target")),
        (torch.full((D,), torch.nan), 0.0, "target"),
        *(("opposite", -0.1, "beta"), ("specific", -1.0, "beta"), ("empty", 0.1, "beta")),
    ],
)
def test_what_is_no_target_or_no_beta_for_it_is_refused(target, beta, word):
    refuses(word, ExactSettings, target=target, beta=beta)
    if target == "mean":  # nor does it fall through to another one
        planted = Planted()
        with pytest.raises(ProblemError, match="unknown target 'mean'"):
            targets("mean", Batch([planted.request(0)]), planted.context().inputs)


def opposed(planted: Planted, count: int, *classes: int) -> Tensor:
    """(C, count, w) paraphrases that move against their class, each a little less than the last."""
    strength = torch.linspace(1.0, 0.5, count, dtype=torch.float64)[:, None]
    noise = 0.3 * normal(len(classes), count, W, seed=4)
    return torch.stack([-strength * planted.bare[i] for i in classes]) + noise


def test_a_lagging_paraphrase_is_forgotten_too():
    planted = Planted()
    request = planted.request(1, paraphrases=opposed(planted, 1, 1))
    (answer,) = planted.context(replace(PLAIN, min_displacement=0.5)).forget([request])
    assert answer.added == ["class 1, said 0"] and answer.edit.left.shape[1] == 2
    report = answer.report()["paraphrases"]
    assert report == {"checked": 1, "added": answer.added, "lagging": {}}
    assert answer.edit.residual < 1e-9
    assert any("class 1, said 0" in note for note in answer.notes())
    # A minimum of 0 checks none: a ratio may be negative, and so below 0.
    (answer,) = planted.context(PLAIN).forget([request])
    assert answer.added == [] and answer.report()["paraphrases"]["checked"] == 0


def test_at_most_a_few_paraphrases_of_each_class_are_added():
    """The one that lags most first; another class needs none. What still lags is said."""
    planted = Planted()
    rows = torch.cat([opposed(planted, 6, 1), planted.bare[[3]][:, None].expand(1, 6, W)])
    request = planted.request(1, 3, paraphrases=rows)
    (answer,) = planted.context(replace(PLAIN, min_displacement=0.999)).forget([request])
    owners = answer.request.owner[2:]
    assert owners == [0] * MAX_ADDED == [0] * len(answer.added)
    (first,) = planted.context(PLAIN).forget([request])
    direct = rows[0] @ first.edit.delta @ first.displacement[0]
    assert answer.added[0] == f"class 1, said {int(direct.argmin())}"
    assert answer.report()["paraphrases"]["lagging"].keys().isdisjoint(answer.added)


def test_beta_is_raised_for_the_class_whose_margin_is_too_small():
    planted = Planted()

    def betas(min_margin: float, *classes: int) -> Answer:
        settings = replace(PLAIN, beta=0.0, min_margin=min_margin)
        return planted.context(settings).forget([planted.request(*classes)])[0]

    low = [betas(0.0, i) for i in range(CLASSES)]
    ratios = [answer.margins[0].margin / answer.margins[0].gap for answer in low]
    middle = sorted(ratios)[2]
    found = [betas(middle, i) for i in range(CLASSES)]
    for ratio, answer in zip(ratios, found, strict=True):
        (beta,), (one,) = answer.betas, answer.margins
        assert (beta > 0) == (ratio < middle) and beta in (0.0, *BETAS)
        assert one.margin >= middle * one.gap or beta == BETAS[-1]
    weak, strong = ratios.index(min(ratios)), ratios.index(max(ratios))
    together = betas(middle, weak, strong)
    assert together.betas[0] > 0 == together.betas[1]
    assert low[0].report()["beta"] == 0.0


def test_nothing_goes_further_than_an_opposite_of_which_nothing_is_left():
    """There is no direction that has a margin."""
    planted = Planted()
    planted.prompts = planted.bare
    settings = ExactSettings(target="opposite", min_margin=1e3)
    (answer,) = planted.context(settings).forget([planted.request(2)])
    assert answer.betas == [0.0] and answer.report()["forecast"]["margin"] is None
    (answer,) = planted.context(replace(settings, beta=0.05)).forget([planted.request(2)])
    assert answer.betas == [BETAS[-1]] and answer.margins[0].margin is not None


def test_what_a_report_says():
    planted = Planted()
    (answer,) = planted.context(ExactSettings()).forget([planted.request(2)])
    report = answer.report()
    assert set(report["forecast"]["unlisted"]) == {"own", "words"}
    assert report["excluded"] == ["class 2"] and report["texts"][0] == "class 2"
    affected = report["forecast"]["affected"]
    assert "class 2" not in [one["name"] for one in affected] and len(affected) == CLASSES - 1
    assert report["notes"][0].startswith("proved optimal")
    assert not any("excluded" in note for note in report["notes"])  # but for the class itself


def test_defaults_depend_on_whether_other_sets_are_listed():
    def chosen(listed: bool, **changes) -> tuple[float, float]:
        settings = ExactSettings(**changes).chosen(listed)
        return settings.vocabulary, settings.max_displacement

    assert chosen(True) == (0.03, 0.045) and chosen(False) == (0.5, 0.1)
    assert chosen(True, others=0.0) == (0.5, 0.1)
    assert chosen(True, vocabulary=0.2, max_displacement=0.3) == (0.2, 0.3)


def test_a_generic_vocabulary_takes_part_of_the_vocabularys_weight():
    def weights(listed: bool, vocabulary: bool, generic: bool, part: float = 0.5) -> list[float]:
        found = ExactSettings(generic=part).group_weights(listed, vocabulary, generic)
        assert (found["own"], found["protect"], found["others"]) == (1.0, 0.1, 0.1 * listed)
        return [found["vocabulary"], found["generic"]]

    assert weights(True, True, True) == [0.015, 0.015]
    assert weights(False, True, True, 0.2) == pytest.approx([0.4, 0.1])
    assert weights(False, True, True, 0.0) == weights(False, True, False) == [0.5, 0.0]
    assert weights(False, False, True) == weights(False, False, True, 0.2) == [0.0, 0.5]
    assert weights(False, False, True, 0.0) == [0.0, 0.0]  # a set without a vocabulary


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("ridge", 0.0), ("own", 1e30), ("own", -1.0), ("similarity", 0.0), ("similarity", 1.5)),
        *(("protect", 0.0), ("beta", torch.nan), ("noise_std", -1.0), ("min_displacement", 1.5)),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    refuses(name, ExactSettings, **{name: value})
