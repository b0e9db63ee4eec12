"""The report's numbers: its sentence, rows, summaries, findings, and what its charts draw."""

from __future__ import annotations

import json
import random
import statistics

import pytest

from evaluation.report import charts as charts_module
from evaluation.report import read_runs
from evaluation.report.charts import charts
from evaluation.report.page import COLUMNS, flat, line
from evaluation.report.runs import methods
from evaluation.report.summary import Summary, findings, not_measured, points, sentence, span
from evaluation.results import LOGS
from evaluation.rules import Fate, fate
from tests.report_fixtures import ANIMALS, OTHERS, acc, log_entry, plant, write
from utils import create_results


def test_numbers_are_those_of_create_results(tmp_path):
    folder = plant(tmp_path, 5)
    frame = create_results(folder)[0].set_index("name")
    for row in read_runs(folder)[0].rows:
        told = frame.loc[row.name]
        assert row.own == (told.cls_Noforget, told.cls_forget)
        assert row.rest == (told.full_Noforget, told.full_forget)
        for other in OTHERS:
            assert row.others[other] == (told[f"full_{other}"], told[f"res_{other}"])


def test_harm_is_what_the_rest_and_the_mean_other_set_lose(tmp_path):
    entry = log_entry(random.Random(0), "A", ["x"], acc(0.9), acc(0.1), 0.0)
    entry["zero_shot"]["A"]["x"]["no_cls_acc"] = 0.9
    entry["final_results"]["A"]["x"]["no_cls_acc"] = 0.88
    for name, after in zip(OTHERS, (0.9, 0.8), strict=True):
        entry["zero_shot"][name]["all"]["all_ds"] = 0.9
        entry["final_results"][name]["all"]["all_ds"] = after
    write(tmp_path, {"A": {"settings": {}, "x": entry}})
    (row,) = read_runs(tmp_path)[0].rows
    assert row.harm == pytest.approx(2 + (0 + 10) / 2)


def test_intervals_are_shown_if_they_are_about_the_number_beside_them(tmp_path):
    folder = plant(tmp_path, 1)
    (row,) = read_runs(folder)[0].rows
    low, high = row.interval("before")
    assert low < row.own.before < high
    logs = json.loads((folder / LOGS).read_text())
    logs["ToyAnimals"][row.name]["zero_shot"]["ToyAnimals"][row.name]["cls_acc_test"] = 0.2
    (folder / LOGS).write_text(json.dumps(logs))
    assert read_runs(folder)[0].rows[0].interval("before") is None


def test_an_audit_of_another_adapter_is_not_shown(tmp_path):
    folder = plant(tmp_path, 2)
    logs = json.loads((folder / LOGS).read_text())
    first = next(name for name in logs["ToyAnimals"] if name != "settings")
    assert all(row.audit for row in read_runs(folder)[0].rows)  # no digest: nothing to say
    for digest, current in (("0" * 64, True), ("1" * 64, False)):
        logs["ToyAnimals"][first]["solver"]["adapter_sha256"] = digest
        (folder / LOGS).write_text(json.dumps(logs))
        assert all(row.audit for row in read_runs(folder)[0].rows) == current
    (one,) = read_runs(folder)
    assert {row.name for row in one.rows if not row.audit} == {first}
    assert one.outdated == [f"ToyAnimals: {first}"]
    assert any("earlier adapter" in reason for reason, _ in not_measured(one))


def test_bad_news_come_first(tmp_path):
    folder = plant(tmp_path, 8, left=0.3)
    (one,) = read_runs(folder)
    back = [row.comes_back for row in one.rows]
    assert back == sorted(back, reverse=True) and 0 < sum(back) < len(back)
    lines = findings(one)
    assert "not forgotten" in lines[0] or "by other words" in lines[0]
    assert "proved the best possible" in lines[-1]
    summary = Summary.of(one)
    assert summary.left.own.after == max(row.own.after for row in one.rows)
    assert summary.rest.worst == min(row.rest.points for row in one.rows)


def test_the_class_that_suffered_most_is_named(tmp_path):
    folder = plant(tmp_path, 3)
    audit = json.loads((folder / "audit.json").read_text())
    (found,) = audit["audits"]["ToyAnimals"][ANIMALS[1]]["classes"].values()
    found["examples"]["classes"][1] |= {"name": "puma", "after": acc(0.1)}
    (folder / "audit.json").write_text(json.dumps(audit))
    lines = findings(read_runs(folder)[0])
    assert f"Hit hardest: puma, from 90.0 to 10.0\u00a0%, once {ANIMALS[1]} is forgotten." in lines


def test_a_solution_without_proof_is_not_called_proved(tmp_path):
    folder = plant(tmp_path, 3)
    logs = json.loads((folder / LOGS).read_text())
    logs["ToyAnimals"][ANIMALS[1]]["solver"]["certificate"]["gap"] = 0.01
    (folder / LOGS).write_text(json.dumps(logs))
    text = " ".join(findings(read_runs(folder)[0]))
    assert f"Not proved the best possible: {ANIMALS[1]}." in text and "are proved" not in text


def test_what_was_not_measured_is_said_with_its_classes(tmp_path):
    folder = plant(tmp_path, 3)
    audits = json.loads((folder / "audit.json").read_text())
    first = next(iter(audits["audits"]["ToyAnimals"]))
    del audits["audits"]["ToyAnimals"][first]["classes"][first]["undo"]
    (folder / "audit.json").write_text(json.dumps(audits))
    told = dict(not_measured(read_runs(folder)[0]))
    assert told["undo: left out of the audit"] == [first]
    assert len(told["paraphrase: no model at hand: templates and synonyms were not read"]) == 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.04, "0.0"), (-0.04, "0.0"), (-0.06, "−0.1"), (12.34, "+12.3")],
)
def test_points_have_a_sign_and_no_minus_zero(value, text):
    assert points(value) == text


@pytest.mark.parametrize("second", [9, 6])
def test_the_sentence_tells_what_rows_and_rules_say(tmp_path, second):
    plant(tmp_path / "a" / "seed_0", 9, left=0.5, harm=0.02)
    plant(tmp_path / "b" / "seed_0", second, trainer="ForgetLoRA")
    runs = read_runs(tmp_path)
    text = sentence(runs)

    def told(words: str, counts: list[int]) -> None:
        counts = counts if second == 9 else [sum(counts)]  # ranges are of the same classes
        low, high = min(counts), max(counts)
        assert f" {low} to {high} {words}" in text if low < high else f" {low} {words}" in text

    times = "" if second == 9 else ", 15 times in all"
    assert text.startswith(f"ViT-B/32 was made to forget 9 classes by 2 methods{times}: ")
    gone = [[row for row in one.rows if fate(*row.own) is Fate.GONE] for one in runs]
    told("are gone,", [len(rows) for rows in gone])
    told("of them come back under other words", [sum(bool(r.back) for r in rows) for rows in gone])
    told("are still recognised", [sum(r.fate is Fate.STAYS for r in one.rows) for one in runs])
    losses = [-sum(r.rest.points for r in one.rows) / len(one.rows) for one in runs]
    low, high = (f"{max(0, loss):.1f}" for loss in sorted(losses))
    worst = max(-row.rest.points for one in runs for row in one.rows)
    rest = f"; the rest of their sets lost {low} to {high} points on average, {worst:.1f} at worst"
    assert f"{rest}, and other sets lost " in text
    harm = max(-row.others_mean.points for one in runs for row in one.rows)
    assert text.endswith(f" points on average, {harm:.1f} at worst.")
    assert low != high and len(gone[0]) != len(gone[1])  # else nothing was told apart


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ((0.9, 0.0), "1 is gone, whether they come back under other words was not tried"),
        ((0.9, 0.9), "0 are gone, 1 is still recognised"),
        ((0.0, 0.0), "0 are gone, 1 was never recognised to begin with"),
        ((None, None), "1 has no images to tell by"),
    ],
)
def test_the_sentence_of_one_class_without_an_audit(tmp_path, own, said):
    entry = log_entry(random.Random(0), "A", ["cat"], acc(0.9), acc(0.1), 0.0)
    for side, value in zip(("zero_shot", "final_results"), own, strict=True):
        entry[side]["A"]["cat"]["cls_acc_test"] = value
        entry[side]["A"]["cat"]["no_cls_acc"] = None
    write(tmp_path, {"A": {"settings": {"backbone": "mini"}, "cat": entry}})
    text = sentence(read_runs(tmp_path))
    assert text.startswith(f"mini was made to forget 1 class: {said}; ")
    assert "; what the rest of their sets lost was not measured" in text


def test_charts_draw_every_class_of_every_method(tmp_path, monkeypatch):
    for name, left in (("a", 0.0), ("b", 0.4)):
        plant(tmp_path / name / "seed_0", 6, left=left, harm=0.02 if name == "a" else 0.0)
    runs, specs = read_runs(tmp_path), []
    monkeypatch.setattr(charts_module, "drawing", lambda spec: specs.append(spec) or "")
    titles = [chart.title for chart in charts(runs)]
    assert len(titles) == len({*titles}) == 4
    left, *_, rest, others = specs
    for spec, value in (
        (left, lambda row: 100 * row.own.after),
        (rest, lambda row: -row.rest.points),
        (others, lambda row: -row.others_mean.points),
    ):
        dots, ticks = (layer["data"]["values"] for layer in spec["layer"][:2])
        for one in runs:
            mine = [dot["value"] for dot in dots if dot["method"] == one.label]
            assert mine == pytest.approx(sorted(map(value, one.rows)), abs=1e-3)
            (tick,) = (tick["value"] for tick in ticks if tick["method"] == one.label)
            assert tick == pytest.approx(sum(mine) / 6, abs=1e-3)
        low, high = spec["layer"][0]["encoding"]["x"]["scale"]["domain"]
        assert all(low <= dot["value"] <= high for dot in dots)
    assert left["layer"][0]["encoding"]["x"]["scale"]["domain"] == [0, 100]
    assert rest["layer"][0]["encoding"]["x"]["scale"]["domain"][1] < 10  # as far as the losses go


def test_seeds_are_one_method_with_means_and_deviations(tmp_path, monkeypatch):
    seeds = [plant(tmp_path / f"r/seed_{n}", 6, seed=n, left=0.3, harm=0.02) for n in range(3)]
    plant(tmp_path / "z", 6, trainer="ForgetLoRA")
    runs, specs = read_runs(tmp_path), []
    frame, _ = create_results(seeds)
    exact, other = methods(runs)
    assert [len(exact.runs), len(other.runs)] == [3, 1]
    for row in exact.runs[0].rows:
        told, found = frame.set_index("name").loc[row.name], exact.of(row)
        assert found["after"] == pytest.approx(told.cls_forget)
        assert found["std_after"] == pytest.approx(told.std_cls_forget)
        lost = told.full_forget - told.full_Noforget
        assert found["rest"] == pytest.approx(100 * lost)
        assert other.of(row)["std_after"] is None
    means = [sum(row.rest.points for row in run.rows) / 6 for run in exact.runs]
    mean, deviation = statistics.mean(means), statistics.stdev(means)
    assert exact.means["rest"] == pytest.approx(mean)
    assert exact.means["std_rest"] == pytest.approx(deviation) and deviation > 0.05
    cells = dict(zip(COLUMNS[1:], line(exact), strict=True))
    assert cells["Rest of their set, points"][0] == points(mean)
    assert cells["Rest of their set, points"][1].startswith(f"± {deviation:.1f}; ")
    gone = [sum(row.fate is Fate.GONE for row in run.rows) for run in exact.runs]
    assert cells["Gone"][0] == span(gone) and len({*gone}) > 1
    assert not any("±" in said for _, said in line(other))
    text = sentence(exact.runs)
    assert " was made to forget 6 classes with 3 seeds: " in text and f" {span(gone)} are" in text
    assert f"sets lost {-mean:.1f} points on average (± {deviation:.1f} between seeds)" in text
    assert " by 2 methods with 1 to 3 seeds each: " in sentence(runs)
    monkeypatch.setattr(charts_module, "drawing", lambda spec: specs.append(spec) or "")
    said = charts(runs)[2].about
    assert f"exact {-mean:.1f} ± {deviation:.1f}; paper " in said
    dots, _, _, bars = (layer["data"]["values"] for layer in specs[2]["layer"])
    assert len(dots) == 2 * 6
    ends = [one["to"] - one["from"] for one in bars]
    assert ends == pytest.approx([2 * deviation, 0])


def test_settings_become_lines():
    lines = flat({"a": {"b": 1, "c": {}}, "d": "x", "e": None})
    assert lines == [("a.b", "1"), ("a.c", "{}"), ("d", "x"), ("e", "null")]


def test_findings_count_attacks_and_what_was_not_tried(tmp_path):
    folder = plant(tmp_path, 4)
    audit = json.loads((folder / "audit.json").read_text())
    labels = audit["audits"]["ToyAnimals"]
    classes = [labels[name]["classes"][name] for name in labels]
    del classes[0]["paraphrase"], classes[1]["undo"]
    classes[2]["undo"]["attacks"]["original_known"]["place"] = 2
    for place, found in enumerate(classes):
        for method in found["relearning"]["methods"].values():
            method["needed"] = 4 if place == 3 else None
    (folder / "audit.json").write_text(json.dumps(audit))
    text = " ".join(findings(read_runs(folder)[0]))
    assert "1 class was not tried with other words" in text
    assert "with the changed weights and the original ones 2 of 3" in text
    assert "with the changed weights alone 0 of 3" in text
    assert "learns 1 of 4 classes at least half back" in text


def test_who_is_likely_to_fall_with_a_class_is_said(tmp_path):
    folder = plant(tmp_path, 3)
    logs = json.loads((folder / LOGS).read_text())
    felt = {"name": "puma", "displacement": 0.6, "cosine_loss": 0.04, "margin": 0.01}
    for place, (name, lost) in enumerate(zip(ANIMALS[:3], (0.04, 0.005, 0.0), strict=True)):
        solver = logs["ToyAnimals"][name]["solver"]
        solver["forecast"] = {"affected": [felt | {"cosine_loss": lost}], "margin": 0.3, "gap": 0.2}
        behind = {f"a kind of {name}": 0.2} if place == 1 else {}
        solver["paraphrases"] = {"checked": 3, "added": [], "lagging": behind}
    (folder / LOGS).write_text(json.dumps(logs))
    text = " ".join(findings(read_runs(folder)[0]))
    assert f"likely to fall with it: puma (with {ANIMALS[0]})." in text
    assert f"hardly follow their class: “a kind of {ANIMALS[1]}” of {ANIMALS[1]}." in text
