"""Other words for a class in an audit: encoded, kept in a bundle, and what they bring back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from clip.audit_texts import audit_rows, other_words, with_audit
from clip.bundle import AUDIT_HIDDEN as HIDDEN
from clip.bundle import FeatureBundle
from clip.features import main
from datasets.words.paraphrases import paraphrases
from evaluation.audit.case import AuditData, Case, Model, Prompt, accuracy
from evaluation.audit.paraphrase import measure
from evaluation.audit.prompts import prompts_for
from forgetting.problem import LowRankEdit
from tests import audit_fixtures
from tests.audit_fixtures import WIDTH
from tests.clip_fixtures import caltech, tiny
from tests.conftest import one_line, toy_bundle
from tests.test_features import Counting

OTHER_WAY = 12  # hidden direction that the projection sends to the first class too


def unit(*places: int) -> Tensor:
    """Sum of basis vectors of hidden states."""
    return torch.eye(WIDTH)[list(places)].sum(dim=0)


def four_animals(rows: list[tuple[str, str, str, Tensor]] = (), images: int = 10) -> FeatureBundle:
    """Four classes, whose texts are basis vectors 0 to 3.

    Args:
        rows: class, kind, text and hidden state of other words that the bundle brings along.
    """
    bundle = audit_fixtures.planted(classes=4, images=images, words=0)
    hidden = torch.stack([unit(i) for i in range(4)])
    projection = bundle.text_projection.clone()
    projection[OTHER_WAY] = projection[0]
    extra, tensors = {}, {}
    if rows:
        classes, kinds, texts, states = zip(*rows, strict=True)
        lists = {"audit_classes": classes, "audit_kinds": kinds, "audit_texts": texts}
        extra = {key: json.dumps(values) for key, values in lists.items()}
        tensors = {"audit_hidden": torch.stack(states)}
    return replace(
        bundle,
        class_hidden=hidden + 0.1 * unit(8),
        forget_hidden=hidden,
        retain_hidden=torch.stack([unit(9), unit(0, 10), unit(11)]),
        text_projection=projection,
        backbone="mini",
        template="a photo of a {}.",
        classnames=["newt", "owl", "hare", "elk"],
        retain_names=["toad", "Newt", "hare"],
        extra=extra,
        extra_tensors=tensors,
    )


def forget_first() -> LowRankEdit:
    """A change of the projection that sends hidden direction 0 to a little of its opposite."""
    return LowRankEdit(unit(0)[:, None], -1.2 * four_animals().text_projection[:1])


# All words for the newt here are moved by `forget_first`, but for what "eft" means.
GONE = [
    ("newt", "template", "a sketch of a newt", unit(0, 9)),
    ("newt", "hypernym", "salamander", unit(0, 10)),
    ("newt", "misspelling", "nwet", unit(0)),
]
EFT = ("newt", "synonym", "eft", unit(OTHER_WAY))
NONSENSE = ("newt", "description", "a wet thing", unit(1) - unit(OTHER_WAY))  # found nothing ever
NO_CHANGE = LowRankEdit(torch.zeros(WIDTH, 1), torch.zeros(1, WIDTH))


def audited(
    rows: list, edit: LowRankEdit | None = None, removed: tuple[int, ...] = (), **changes
) -> dict:
    data = AuditData(replace(four_animals(rows=rows), **changes))
    prompts = prompts_for(data, "newt", set())
    after = Model(data, edit or forget_first(), removed)
    found = measure(Case("newt", ["newt"], after, prompts))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def values(found: dict, key: str) -> dict[str, float]:
    return {entry["text"]: entry[key]["value"] for entry in found["prompts"]}


def test_a_class_that_is_gone_under_every_prompt_and_one_that_comes_back_under_a_synonym() -> None:
    found = audited(GONE)
    texts = ["newt", "a photo of a newt.", *(row[2] for row in GONE)]
    assert values(found, "before") == dict.fromkeys(texts, 1.0)
    assert values(found, "after") == dict.fromkeys(texts, 0.0)
    assert found["mean_before"] == 1.0 and found["mean_after"] == 0.0
    assert found["back"] == [] and found["worst"]["after"] == accuracy(0, 10)
    found = audited([*GONE, EFT, NONSENSE])
    assert values(found, "after")["eft"] == 1.0 and found["back"] == ["eft"]
    worst = found["worst"]
    assert (worst["text"], worst["kind"], worst["after"]["value"]) == ("eft", "synonym", 1.0)
    # Unseen: two of GONE ("nwet" is read as "newt"), eft, the nonsense; not the evaluation prompt.
    assert found["mean_after"] == pytest.approx(1 / 4)
    assert found["mean_before"] == pytest.approx(3 / 4)
    assert values(found, "before")["a wet thing"] == 0.0 and found["not_measured"] == []
    for removed in ((), (0,)):  # nothing changed; a removed name has other words
        found = audited([*GONE, EFT, NONSENSE], NO_CHANGE, removed)
        assert values(found, "before") == values(found, "after") != {}
        assert found["back"] == ["a sketch of a newt", "salamander", "eft"]


def test_what_could_not_be_measured_is_reported() -> None:
    found = audited([])
    assert [entry["kind"] for entry in found["prompts"]] == ["bare", "evaluation"]
    (line,) = found["not_measured"]
    assert "Planted" in line and "python -m clip.features" in line
    assert audited(GONE)["not_measured"] == ["no synonym and no description is known"]
    # Only forgotten texts: nothing shows how far forgetting carries.
    after = Model(AuditData(four_animals()), forget_first())
    seen = [Prompt("newt", kind, True, unit(0)) for kind in ("synonym", "hypernym", "description")]
    found = measure(Case("newt", ["newt"], after, seen))
    assert found["worst"] is None and found["mean_after"] is None and found["back"] == []
    assert "than its own prompt" in found["not_measured"][0]
    bundle = four_animals(images=0)
    found = audited([*GONE, EFT], image_features=bundle.image_features, labels=bundle.labels)
    assert found["back"] == [] and found["worst"] is None
    never = audited([*GONE, EFT], class_hidden=four_animals().class_hidden[[3, 0, 2, 3]])
    assert never["back"] == [] and never["worst"]["text"] == "eft"


@settings(max_examples=30)
@given(st.integers(0, 5), st.integers(0, 10**6), st.booleans())
def test_each_prompt_takes_the_place_of_the_class(label: int, seed: int, remove: bool) -> None:
    bundle = toy_bundle("ToyAnimals")
    generator = torch.Generator().manual_seed(seed)
    w, d = bundle.text_projection.shape
    left, right, noise = (torch.randn(*n, generator=generator) for n in ((w, 2), (2, d), (5, w)))
    own = bundle.class_hidden[label]
    hidden = torch.cat([own[None], own + 4 * noise, noise])
    prompts = [Prompt(str(i), "template", False, row) for i, row in enumerate(hidden)]
    name, other = bundle.classnames[label], (label + 1) % 6
    model = Model(AuditData(bundle), LowRankEdit(left, right), (other,) if remove else ())
    case = Case(name, [name], model, prompts=prompts)
    found = measure(case)
    for key, model in (("before", case.before), ("after", case.after)):
        for prompt, entry in zip(prompts, found["prompts"], strict=True):
            rows = model.classes.clone()
            rows[label] = normalize(prompt.hidden @ model.projection, dim=0)
            scores = case.data.images[case.images] @ rows.T
            if model.removed:  # another removed class is no rival
                scores[:, other] = -torch.inf
            expected = (scores.argmax(dim=1) == label).double().mean()
            assert entry[key]["value"] == pytest.approx(float(expected))


def test_prompts_of_a_class_in_order_and_each_once() -> None:
    rows = [*GONE, ("newt", "template", "NEWT", unit(0)), ("newt", "case", "NEWT", unit(0)), EFT]
    bundle = four_animals(rows=[*rows, ("owl", "synonym", "o", unit(1))])
    prompts = prompts_for(AuditData(bundle), "newt", set())
    assert [(prompt.text, prompt.kind) for prompt in prompts] == [
        ("newt", "bare"),
        ("a photo of a newt.", "evaluation"),
        ("a sketch of a newt", "template"),
        ("salamander", "hypernym"),
        ("nwet", "misspelling"),
        ("NEWT", "case"),
        ("eft", "synonym"),
    ]


def test_vocabulary_names_that_mean_the_same() -> None:
    bundle = replace(
        toy_bundle("ToyAnimals"),
        dataset="OxfordFlowers",
        classnames=["desert-rose", "trumpet_creeper", "c", "d", "e", "f"],
        retain_names=["Desert rose", "campsis", *(f"thing {i}" for i in range(26)), "owl", "newt"],
    )
    # The words of the set know the one, marks in its vocabulary the other.
    for name, word in (("desert-rose", "Desert rose"), ("trumpet_creeper", "campsis")):
        prompts = prompts_for(AuditData(bundle), name, set())
        (retained,) = [prompt for prompt in prompts if prompt.kind == "retained"]
        row = bundle.retain_hidden[bundle.retain_names.index(word)]
        assert retained.text == word and torch.equal(retained.hidden, row)
    texts = [prompt.text for prompt in prompts]
    assert texts[:2] == ["trumpet creeper", "a photo of a trumpet creeper."]


def test_which_prompts_forgetting_saw() -> None:
    data = AuditData(four_animals(rows=[*GONE, EFT]))
    for texts, seen in (
        (set(), {"newt", "nwet"}),  # read by this model as the bare name
        ({"newt", "owl"}, {"newt", "nwet"}),
        ({"a photo of a newt."}, {"a photo of a newt."}),
        ({"eft"}, {"eft"}),
        ({"something else"}, set()),
    ):
        prompts = prompts_for(data, "newt", texts)
        assert {prompt.text for prompt in prompts if prompt.seen} == seen


def test_a_model_stands_in_for_rows() -> None:
    encoded = []

    def encode(texts: list[str]) -> Tensor:
        encoded.extend(texts)
        return torch.arange(len(texts) * float(WIDTH)).reshape(-1, WIDTH)

    prompts = prompts_for(AuditData(four_animals(), encode=encode), "newt", set())
    words = paraphrases("newt", None, "a photo of a {}.")
    assert encoded == [entry.text for entry in words]
    assert [(p.text, p.kind) for p in prompts[2:]] == [(e.text, e.kind) for e in words]
    assert torch.equal(prompts[3].hidden, torch.arange(WIDTH, 2 * WIDTH))
    encoded.clear()
    prompts_for(AuditData(four_animals(rows=GONE), encode=encode), "newt", set())
    assert not encoded, "rows in the bundle come first"
    # A bundle may call its template anything.
    bundle = replace(four_animals(), template="ensemble")
    texts = [entry.text for entry in other_words(bundle, "newt")]
    assert "a photo of newts." in texts and "a photo of a NEWT." not in texts
    own = other_words(replace(bundle, template="a drawing of a {}."), "newt")
    assert "a drawing of newts." in [entry.text for entry in own]
    assert prompts_for(AuditData(bundle), "newt", set())[1].text == "ensemble"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("audit_texts", text) for text in (None, "[", '{"a": 1}')),
        *(("audit_kinds", text) for text in ('["template", 1, "case"]', '["template"]')),
        ("audit_classes", '["newt", "newt", "nwet"]'),
        *((HIDDEN, x) for x in (None, torch.zeros(2, WIDTH), torch.zeros(3, WIDTH).long())),
        *((HIDDEN, x) for x in (torch.zeros(3, 15), torch.full((3, WIDTH), torch.nan))),
    ],
)
def test_broken_rows_are_refused_in_one_line(key: str, value: object) -> None:
    bundle = four_animals(rows=GONE)
    bundle.check("whole")
    extra, tensors = dict(bundle.extra), dict(bundle.extra_tensors)
    where = tensors if key == HIDDEN else extra
    where.pop(key)
    if value is not None:
        where[key] = value
    with one_line(None, key, "mine.safetensors"):
        replace(bundle, extra=extra, extra_tensors=tensors).check("mine.safetensors")


def test_the_command_writes_what_the_model_says(tmp_path: Path, monkeypatch, capsys) -> None:
    tiny(monkeypatch, tmp_path / "weights")
    caltech(tmp_path / "data", images_per_class=2)
    options = ["--root", str(tmp_path / "data"), "--cache", str(tmp_path / "cache")]
    main(["Caltech101", "mini", *options, "--out", str(tmp_path / "out"), "--audit"])
    assert capsys.readouterr().err == "", "a log that is no terminal is not flooded"
    bundle = FeatureBundle.load(tmp_path / "out" / "mini" / "Caltech101.safetensors")
    rows, source = audit_rows(bundle), Counting("mini", cache=tmp_path / "cache", device="cpu")
    for name in bundle.classnames:
        words = paraphrases(name, "Caltech101", bundle.template, bundle.classnames)
        assert [row[:2] for row in rows[name]] == [(entry.text, entry.kind) for entry in words]
        hidden = torch.stack([row[2] for row in rows[name]])
        assert torch.equal(hidden, source.encode_hidden([entry.text for entry in words]))
    assert ("a photo of a seahorse.", "synonym") in [row[:2] for row in rows["sea_horse"]]
    prompts = prompts_for(AuditData(bundle), "sea_horse", set())
    assert len(prompts) == 2 + len(rows["sea_horse"])
    upper = next(prompt for prompt in prompts if prompt.text == "SEA HORSE")
    assert upper.kind == "case" and upper.seen, "CLIP reads small letters only"
    # Nothing is encoded twice; one class's other words encode that class alone.
    again = Counting("mini", cache=tmp_path / "cache", device="cpu")
    with_audit(bundle, again)
    assert again.texts == 0 and "model" not in vars(again)
    monkeypatch.setattr(
        "datasets.words.paraphrases.cases", lambda name: ["CRAB"] * (name == "crab")
    )
    with_audit(bundle, again)
    assert 0 < again.texts < source.texts
