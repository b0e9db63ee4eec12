"""`python -m experiments frontier`: the trainer driven over bundles, levers, rows and refusals."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

import train
from evaluation.results import read_logs
from evaluation.zero_shot import ZeroShot, class_embeddings
from experiments import frontier, levers
from experiments.alone import Alone
from experiments.levers import FIRST, NEW, VARIANTS
from forgetting import load_adapter
from tests.conftest import BACKBONE, toy_bundle

BY_NAME = {variant.name: variant for variant in VARIANTS}


@pytest.fixture(scope="module")
def animals():
    return toy_bundle("ToyAnimals")


@pytest.fixture(scope="module")
def tools():
    return toy_bundle("ToyTools")


@pytest.mark.parametrize("opts", [(), frontier.UNKNOWN])
def test_it_finds_what_a_run_finds_and_judges_as_a_run_judges(
    animals, tools, features, tmp_path, opts
):
    folder = train.main(
        [
            *("--dataset", "ToyAnimals", "--features", str(features), "--backbone", BACKBONE),
            *("--output-dir", str(tmp_path / "out"), "--trainer", "ForgetExact"),
            *("--forget", "all", *opts),
        ]
    )
    answers = Alone(animals, [tools], opts).answers()
    table = frontier.outcomes(ZeroShot(animals), [ZeroShot(tools)], frontier.factors(answers))
    logs = read_logs(folder)["ToyAnimals"]
    for name, answer, row in zip(animals.classnames, answers, table.itertuples(), strict=True):
        stored = load_adapter(folder / "ToyAnimals" / f"{name.replace('/', '%2F')}.safetensors")
        assert torch.equal(answer.left @ answer.right, stored.delta())
        after, before = logs[name]["final_results"], logs[name]["zero_shot"]
        own, was = after["ToyAnimals"][name], before["ToyAnimals"][name]
        assert row.left == own["cls_acc_test"]
        assert row.rest == own["no_cls_acc"] - was["no_cls_acc"]
        harm = after["ToyTools"]["all"]["all_ds"] - before["ToyTools"]["all"]["all_ds"]
        assert row[-1] == pytest.approx(harm)


def test_margins_and_the_worst_loss_are_those_of_their_words(animals):
    own = ZeroShot(animals)
    change = torch.randn(24, 2), torch.randn(2, 16)
    classes = class_embeddings(animals, change)
    mine = animals.labels == 2
    found = animals.image_features[mine] @ classes.T
    others = [label for label in range(6) if label != 2]
    expected = found[:, others].amax(dim=1) - found[:, 2]
    assert torch.allclose(frontier.margins(own, 2, change), expected, atol=1e-6)
    # A text that vanishes has no direction: it counts as cosine 0.
    h = animals.class_hidden[2]
    gone = (h / (h @ h))[:, None], -(h @ animals.text_projection)[None]
    kept = torch.cat([own.embeddings[:2], own.embeddings[3:]])
    rest = (
        kept + torch.cat([animals.class_hidden[:2], animals.class_hidden[3:]]) @ gone[0] @ gone[1]
    )
    nearest = (animals.image_features[mine] @ normalize(rest, dim=1).T).amax(dim=1)
    assert torch.allclose(frontier.margins(own, 2, gone), nearest, atol=1e-5)
    correct = own.before.clone()
    correct[(animals.labels == 4).nonzero()[:3, 0]] = False
    correct[mine] = False  # the forgotten class itself does not count
    before = own.before[animals.labels == 4].float().mean()
    after = correct[animals.labels == 4].float().mean()
    assert frontier.worst_loss(own, correct, 2) == pytest.approx(float(after - before))


def test_the_first_default_is_what_it_was(animals, tools):
    first, new = (
        Alone(animals, [tools], BY_NAME[name].opts, BY_NAME[name].lever) for name in (FIRST, NEW)
    )
    assert first.retain.counts == {"own": 6, "vocabulary": 30, "others": 4}
    assert first.retain.weights == {"own": 1, "vocabulary": 0.01, "others": 0.1}
    assert torch.equal(first.retain.groups["own"].rows, animals.forget_hidden)
    assert first.retained.mu == 5e-6
    reports = [answer.report for answer in first.answers()]
    assert {report["beta"] for report in reports} == {0.1}
    assert not any(report["wordings"]["joined"] for report in reports)
    assert new.retain.counts == {"own": 12, "vocabulary": 30, "others": 8}
    assert new.retained.mu != 5e-6


@pytest.mark.parametrize(("margin", "raised"), [(0, False), (1, True)])
def test_without_a_margin_no_target_goes_further(animals, tools, margin, raised):
    opts = ["FORGET.BETA", "-0.9", "TRAINER.FORGETEXACT.MARGIN", str(margin)]
    reports = [answer.report for answer in Alone(animals, [tools], opts).answers()]
    assert all((report["beta"] > -0.9) == raised for report in reports)
    assert raised or all(report["forecast"]["margin"] < 0 for report in reports)


def test_levers_do_to_the_statistics_what_they_say(animals, tools):
    alone = Alone(animals, [tools])
    kept = alone.retained
    like, leaving = animals.forget_hidden, alone.leaving
    for number, rows in enumerate((animals.forget_hidden, animals.class_hidden)):
        names = levers.half(number)(kept, like, leaving)
        assert torch.equal(names.groups["own"].rows, rows) and not names.groups["own"].twice
        assert names.counts["vocabulary"] == 30 and len(names.names) == 6 + 30 + 4
    parted = levers.parted(0.25)(kept, like, leaving)
    near, far = parted.groups["vocabulary"], parted.groups["generic"]
    whole = kept.names.groups["vocabulary"]
    assert (near.weight, far.weight) == (0.75 * whole.weight, 0.25 * whole.weight)
    assert sorted([*near.names, *far.names]) == sorted(whole.names) and len(near.names) == 15
    closest = [
        (normalize(group.rows, dim=1) @ normalize(like, dim=1).T).amax(dim=1)
        for group in (near, far)
    ]
    assert closest[0].min() >= closest[1].max()
    g, words = kept.names.gram, animals.retain_hidden.double()
    centred = words - words.mean(dim=0)
    c = centred.T @ centred
    shrunk = levers.shrunk(0.3)(kept, like, leaving).gram
    expected = 0.7 * g + 0.3 * c * (g.trace() / c.trace())
    assert torch.allclose(shrunk, expected, rtol=1e-5, atol=1e-5)


def test_who_is_moved_most_weighs_more(animals, tools):
    alone = Alone(animals, [tools])
    names = alone.retain
    score = torch.zeros(len(names.names))
    score[[1, 6 + 4]], score[0] = (
        1.0,
        0.5,
    )  # the second wording of the fifth class counts for both of its own
    heavy = levers.heavier(names, score)
    assert heavy.weights["own"] + heavy.weights["own, heavier"] == pytest.approx(1.0)
    assert list(heavy.groups["own, heavier"].names) == ["Dog", "owl"] * 2
    each = [heavy.weights[name] / heavy.counts[name] for name in ("own, heavier", "own")]
    assert each[0] == pytest.approx(levers.TIMES * each[1])
    assert sorted(heavy.names) == sorted(names.names)
    moved, unlisted = levers.felt(alone.retained, animals.forget_hidden, alone.leaving)
    label = 3  # brute force for one name: the others that do not leave with it
    left = alone.left()
    s = (left @ names.rows[label].double()).masked_fill(alone.leaving[:, label], torch.nan)
    assert moved[label] == pytest.approx(float(s.square().nanmean().sqrt()))
    assert (unlisted >= moved - 1e-9).all()


def test_rows_plot_and_table(animals, tools, features, tmp_path, capsys):
    table, picture = tmp_path / "table.csv", tmp_path / "picture.png"
    argv = ["--features", str(features), "--csv", str(table), "--plot", str(picture)]
    found = frontier.main([*argv, "--methods", FIRST, NEW, "push 0.2"])
    assert len(found) == 2 * 2 * 3 and picture.stat().st_size > 1000
    assert "new default" in capsys.readouterr().out
    assert pd.read_csv(table)["others_mean"].tolist() == pytest.approx(
        found["others_mean"].tolist()
    )
    new = found[(found["method"] == NEW) & (found["set"] == "ToyAnimals")]
    assert (new["kept"] == 0).all() and (new["margin_low"] > 0).all()
    assert set(found["names"]) == {"known", "unknown"}  # of two sets none is left to judge on


def test_a_set_that_is_left_out_is_the_only_one_judged(animals, tools):
    third = replace(tools, dataset="ToyThird")
    found = frontier.frontier([animals, tools, third], [BY_NAME[NEW], BY_NAME["push 0.2"]])
    mine = found[found["set"] == "ToyAnimals"]
    assert mine["names"].tolist() == [
        *("known", "unknown", "all but ToyTools", "all but ToyThird"),
        *("known", "unknown"),
    ]
    out = mine[mine["names"] == "all but ToyThird"].iloc[0]
    assert out["to ToyThird mean"] == pytest.approx(out["others_mean"])
    assert pd.isna(out["to ToyTools mean"])
    others = [ZeroShot(tools), ZeroShot(third)]
    *_, (_, listed, judged, _) = frontier.places(others, default=True)
    assert listed == others[:1] and judged == others[1:]


def test_more_names_are_measured_by_the_formula(animals, monkeypatch):
    monkeypatch.setattr(frontier, "COUNTS", (10, 40))
    monkeypatch.setattr(frontier, "JUDGED", 5)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(60, 24, generator=generator)
    names = [f"name {i}" for i in range(60)]
    bundle = replace(animals, forget_hidden=hidden, class_hidden=hidden + 0.1, classnames=names)
    found = frontier.more_names(bundle)
    assert found["retained"].tolist() == [10, 10, 40, 40]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    gone, free, rows = (hidden[part].double() for part in order.split([5, 5, 50]))
    rows = rows[:40]
    g = rows.T @ rows / 40
    k = g + 5e-6 * float(rows.square().sum() / 40) * torch.eye(24)
    way = torch.linalg.solve(k, gone.T)  # (w, 5)
    s = (free @ way) / (gone * way.T).sum(dim=1)
    assert found["unlisted_rms"][2] == pytest.approx(float(s.square().mean().sqrt()))
    words = ((gone + 0.1) * way.T).sum(dim=1) / (gone * way.T).sum(dim=1)
    assert found["other_words"][2] == pytest.approx(float(words.abs().mean()))


def test_what_is_no_method_is_refused(features, refused):
    line = ["--features", str(features), "--methods", "new defolt"]
    with pytest.raises(Exception, match="did you mean 'new default'"):
        frontier.main(line)
