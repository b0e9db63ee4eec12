"""The report: what it says first, its numbers, its pictures, and that no name is markup."""

from __future__ import annotations

import json
import random
import re
import statistics
import tempfile
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from datasets.mini import MINI, TEST_IMAGES
from engine.cli import run
from evaluation.report import page as page_module
from evaluation.report import read_runs, write_report
from evaluation.report.__main__ import main
from evaluation.report.charts import charts
from evaluation.report.page import render
from evaluation.report.pictures import strips
from evaluation.report.runs import forgotten_classes, methods, tags
from evaluation.report.summary import COLUMNS, findings, headline, line, not_measured, points
from evaluation.results import LOGS
from evaluation.rules import Fate
from tests.report_fixtures import ANIMALS, NASTY, acc, log_entry, mini, plant, plant_sparse, write
from utils import create_results

SOURCES = Path(page_module.__file__).parent
VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """Elements as (tag, attributes) in their order, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text += data

    def all(self, tag: str, **wanted: str) -> list[dict]:
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]


def page_of(folder: Path, **options) -> Page:
    return Page(render(read_runs(folder, **options)))


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    return plant(tmp_path_factory.mktemp("planted"), [*ANIMALS[:6], *NASTY])


@pytest.fixture(scope="module")
def page(planted) -> Page:
    return page_of(planted)


def test_landmarks_and_headings_are_in_order(page):
    tags = [tag for tag, _ in page.elements]
    assert [tags.count(tag) for tag in ("html", "h1", "main", "nav", "footer")] == [1] * 5
    levels = [int(tag[1]) for tag in tags if tag in ("h1", "h2", "h3", "h4", "h5")]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.open == [] and page.all("html") == [{"lang": "en"}]
    links = [attributes["href"] for attributes in page.all("a")]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert links[0] == "#main" and len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)


def test_nothing_comes_from_elsewhere(page):
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'; ")
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form", "image")
        assert ("src" in attributes) == (tag == "img")
        assert attributes.get("src", "data:image/jpeg;").startswith("data:image/jpeg;")
        assert attributes.get("href", "#").startswith(("#", "data:,"))
        assert not any("://" in (value or "") for value in attributes.values())
    style = (SOURCES / "style.css").read_text(encoding="utf-8")
    assert "@import" not in style and "url(" not in style


def test_scripts_never_read_markup_or_code():
    (path,) = SOURCES.glob("*.js")
    text = path.read_text(encoding="utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", r"eval\(", r"document\.write"):
        assert not re.search(rf"\b{word}", text)
    assert "</" not in text and "{{" not in text  # nothing of the results is ever script


def test_every_class_stands_once_with_its_numbers(planted, page):
    (one,) = read_runs(planted)
    shown = page.all("details", **{"class": "class"})
    names = [attributes["data-name"] for attributes in shown]
    assert names == [row.name for row in one.rows] and set(names) == {*ANIMALS[:6], *NASTY}
    assert sum("data-back" in each for each in shown) == sum(r.comes_back for r in one.rows) > 0
    assert [float(a["data-left"]) for a in shown] == [row.own.after for row in one.rows]
    measures = [a["data-measure"] for a in page.all("section") if "data-measure" in a]
    assert len(measures) == 8 * len(shown)
    assert all("scope" in attributes for attributes in page.all("th"))


def test_names_are_text_everywhere(page):
    own = {"hide", "onload", "onmouseover", "onerror"}
    assert not any(own & attributes.keys() for _, attributes in page.elements)
    assert not page.all("img") and len(page.all("script")) == 1
    for name in NASTY:
        assert name in page.text


def test_a_name_of_a_method_is_text_in_charts_too(tmp_path):
    for name in NASTY[:4]:
        plant(tmp_path / name.replace("/", "|") / "seed_0", 2)
    page = page_of(tmp_path)
    assert len(page.all("script")) == 1 and not page.all("img")
    assert page.text.count("<script>alert(1)<|script>") > 4  # tables and every chart
    assert len(page.all("svg")) == 4
    assert all("viewbox" in a and "width" not in a for a in page.all("svg"))


@settings(max_examples=12, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")))
def test_any_name_is_one_row_and_no_element(name):
    def page(name):
        entry = log_entry(random.Random(0), "Set", [name], acc(0.9), acc(0.1), 0.0)
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), {"Set": {"settings": {}, "label": entry}})
            return page_of(Path(folder))

    found, harmless = page(name), page("cat")  # the second is the control
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in harmless.elements]
    assert name in found.text


def test_the_same_results_give_the_same_bytes(planted, tmp_path):
    pages = [write_report(read_runs(planted), tmp_path / name) for name in ("a.html", "b.html")]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_without_an_audit_the_report_says_how_to_make_one(tmp_path, capsys):
    folder = plant(tmp_path / "my results", 3, audit=False)
    assert run(main, [str(folder)]) == 0
    said = capsys.readouterr().out
    command = f"python -m evaluation.audit '{folder}'"
    assert command in said and str(folder / "report.html") in said
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert command in page.text and "no audit" in page.text
    assert " to 1" not in page.text  # no interval was measured


def test_the_head_is_one_sentence_and_one_line_per_method(tmp_path):
    """What was not measured is not counted as if it had been."""
    exact = plant(tmp_path / "a", 6)
    plant(tmp_path / "b", 6, trainer="ForgetLoRA", left=0.6, audit=False)
    record = json.loads((exact / "audit.json").read_text())
    labels = record["audits"]["ToyAnimals"]
    for name in list(labels)[1:]:
        del labels[name]
    (exact / "audit.json").write_text(json.dumps(record))
    runs = read_runs(tmp_path)
    compared = methods(runs)
    assert headline(runs, compared) == "ViT-B/32 was made to forget 6 classes by 2 methods."
    cells = [dict(zip(COLUMNS[1:], line(method), strict=True)) for method in compared]
    assert cells[0]["Gone"].value == "6 of 6"
    assert cells[0]["Come back under other words"].value.endswith(" of 1")
    assert cells[1]["Come back under other words"] == ("–", "not tried")
    stay = sum(row.fate is Fate.STAYS for row in compared[1].runs[0].rows)
    assert stay and cells[1]["Gone"] == (f"{6 - stay} of 6", f"{stay} still recognised")
    page = page_of(tmp_path)
    ids = [attributes.get("id") for attributes in page.all("section")]
    assert ids.index("methods") < ids.index("forgotten") < ids.index("missing")
    for one in runs:  # in the open, on paper too
        assert page.text.count(f"{one.label}: what to know, bad news first") == 1


def test_folders_of_a_sweep(tmp_path):
    for trainer in ("ForgetExact", "ForgetNoise"):
        for setting in ("mild", "strong"):
            for seed in (0, 1):
                plant(tmp_path / trainer / setting / f"seed_{seed}", 2, trainer=trainer, seed=seed)
    plant(tmp_path / "other", 2, trainer="ForgetZero")
    runs = read_runs(tmp_path, "ForgetNoise/mild/seed_1")
    assert runs[0].title == "noise (ForgetNoise/mild), seed 1"
    titles = {str(one.folder.relative_to(tmp_path)): one.title for one in runs}
    assert titles["other"] == "zero"
    assert titles["ForgetExact/strong/seed_0"] == "exact (ForgetExact/strong), seed 0"
    assert sorted(len(method.runs) for method in methods(runs)) == [1, 2, 2, 2, 2]
    assert page_of(tmp_path).text.count("mean of 2 seeds, ±") == 4


def test_seeds_of_other_settings_are_no_seeds(tmp_path):
    for seed in (0, 1):
        plant(tmp_path / f"seed_{seed}", 2, seed=seed, settings={"beta": 0.1 * seed})
    assert [one.title for one in read_runs(tmp_path)] == ["exact (seed_0)", "exact (seed_1)"]


def test_seeds_are_one_method_with_means_and_deviations(tmp_path):
    seeds = [plant(tmp_path / f"r/seed_{n}", 6, seed=n, left=0.3, harm=0.02) for n in range(3)]
    frame, _ = create_results(seeds)
    (exact,) = methods(read_runs(tmp_path))
    for row in exact.runs[0].rows:
        expected = frame.set_index("name").loc[row.name]
        after = expected.cls_forget, expected.std_cls_forget
        assert exact.of_class(row, "after") == pytest.approx(after)
        lost = expected.full_forget - expected.full_Noforget
        assert exact.of_class(row, "rest")[0] == pytest.approx(100 * lost)
    means = [statistics.mean(row.rest.points for row in run.rows) for run in exact.runs]
    mean, deviation = statistics.mean(means), statistics.stdev(means)
    assert exact.mean("rest") == pytest.approx((mean, deviation)) and deviation > 0.05
    cells = dict(zip(COLUMNS[1:], line(exact), strict=True))
    assert cells["Rest of their set, points"].value == points(mean)
    assert cells["Rest of their set, points"].note.startswith(f"± {deviation:.1f}; worst ")
    gone = sum(row.fate is Fate.GONE for run in exact.runs for row in run.rows)
    assert cells["Gone"].value == f"{gone} of 18"
    about = charts([exact])[2].about
    assert f"exact {points(mean)} ± {deviation:.1f}." in about


def test_what_happens_in_some_seeds_alone_is_said_so(tmp_path):
    for seed, left in ((0, 0.0), (1, 0.0), (4, 0.6)):
        plant(tmp_path / f"seed_{seed}", ["ant"], seed=seed, left=left, audit=False)
    (one,) = forgotten_classes(read_runs(tmp_path))
    assert tags(one.rows) == ["not forgotten in 1 of 3"]
    page = page_of(tmp_path)
    assert "not forgotten in 1 of 3" in page.text and "mean of 3 seeds" in page.text


def test_charts_draw_every_class_of_every_method(tmp_path):
    plant(tmp_path / "a", 7)
    plant(tmp_path / "b", 5, trainer="ForgetLoRA", left=0.5, audit=False)
    drawn = charts(methods(read_runs(tmp_path)))
    left, words = (len(re.findall("fill-opacity: 0.55", chart.svg)) for chart in drawn[:2])
    assert (left, words) == (7 + 5, 7)  # other words: of the audited folder alone
    assert all("var(--m0)" in chart.svg and "://" not in chart.svg for chart in drawn)


@pytest.mark.parametrize("joined", [False, True])
def test_logs_of_the_papers_public_code(tmp_path, joined):
    """No zero_shot, no solver, no settings; several classes as entries or as one entry."""
    accuracies = {"Pekinese": 0.1, "toy poodle": 0.3}
    if joined:
        own = {"Pekinese|toy poodle": {"cls_acc_test": accuracies, "no_cls_acc": 0.5}}
    else:
        own = {name: {"cls_acc_test": a, "no_cls_acc": 0.5} for name, a in accuracies.items()}
    results = {"StanfordDogs": own, "Caltech101": {"all": {"all_ds": 0.85}}}
    logs = {"StanfordDogs": {"Pekinese|toy poodle": {"final_results": results}}}
    tmp_path.joinpath(LOGS).write_text(json.dumps(logs))
    rows = {row.name: row for row in read_runs(tmp_path)[0].rows}
    assert {name: row.own for name, row in rows.items()} == {
        name: (None, a) for name, a in accuracies.items()
    }
    assert all(row.rest == (None, 0.5) and row.together == 2 for row in rows.values())
    page = page_of(tmp_path)
    assert len(page.all("svg")) == 1  # what is left
    assert "Accuracy before forgetting: not in the logs" in page.text


def test_any_measure_and_any_number_may_be_absent(tmp_path):
    names = plant_sparse(tmp_path)
    page = page_of(tmp_path)
    assert {a["data-name"] for a in page.all("details", **{"class": "class"})} == set(names)
    assert "undo: left out of the audit (2 classes: " in page.text
    assert not re.search(r"\b(None|nan|Undefined)\b", page.text)


def test_pictures_are_of_the_class_they_are_under(tmp_path):
    (one, *_) = forgotten_classes(read_runs(mini(tmp_path, list(range(20)))))
    own, harmed = strips(one)
    assert (own.name, own.by, harmed.name, harmed.by) == ("red circle", "", "red square", "exact")
    sizes = [len(picture.source) for strip in (own, harmed) for picture in strip.pictures]
    assert len(sizes) == 40 and min(sizes) > 400 and max(sizes) < 8_000
    page = page_of(mini(tmp_path, [0]))
    assert len(page.all("img")) == 2 * 2
    assert not (tmp_path / "gone").exists()  # drawn in code, and written nowhere


def shapes(folder: Path, count: int) -> Path:
    """Results of the first classes of MiniShapes, each with two of its pictures."""
    names = MINI["MiniShapes"][:count]
    plant(folder, names, "MiniShapes")
    record = json.loads((folder / "audit.json").read_text())
    for place, name in enumerate(names):
        found = record["audits"]["MiniShapes"][name]["classes"][name]["examples"]["classes"]
        rows = [{"row": TEST_IMAGES * place + number} for number in range(2)]
        found[:] = [found[0] | {"pictures": [found[0]["pictures"][0] | row for row in rows]}]
    (folder / "audit.json").write_text(json.dumps(record))
    (folder / "args.txt").write_text("Namespace(dataset='MiniShapes', root='nowhere')")
    return folder


@pytest.mark.parametrize("count", [12, 14])
def test_every_class_has_its_pictures_above_or_where_it_is_opened(tmp_path, count):
    page = page_of(shapes(tmp_path, count))
    names = {a["alt"].removeprefix("Test image of ") for a in page.all("img")}
    assert names == {*MINI["MiniShapes"][:count]} and len(page.all("img")) == 2 * count
    articles = page.all("article")
    assert len(articles) == 12 and page.text.count("Its images are above") == 12
    assert {a["id"] for a in articles} <= {a["href"][1:] for a in page.all("a")}
    assert ("the 12 classes with the worst news" in page.text) == (count == 14)


@pytest.mark.parametrize(
    ("rows", "places"),
    [([999_999], {}), ([-1], {}), ([40], {}), ([0], {"features": "bundles"})],
    ids=["no such row", "below the first", "another class", "bundles"],
)
def test_what_is_no_picture_of_the_class_is_not_shown(tmp_path, rows, places):
    for strip in strips(forgotten_classes(read_runs(mini(tmp_path, rows, **places)))[0]):
        assert [picture.source for picture in strip.pictures] == [""]
        assert strip.pictures[0].before and strip.pictures[0].after["exact"]
    page = page_of(tmp_path)
    assert not page.all("img") and "Image 1" in page.text


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
    assert any("replaced" in reason for reason, _ in not_measured(one))


def test_intervals_are_shown_if_they_are_about_the_number_beside_them(tmp_path):
    folder = plant(tmp_path, 1)
    (row,) = read_runs(folder)[0].rows
    low, high = row.interval("before")
    assert low < row.own.before < high
    logs = json.loads((folder / LOGS).read_text())
    logs["ToyAnimals"][row.name]["zero_shot"]["ToyAnimals"][row.name]["cls_acc_test"] = 0.2
    (folder / LOGS).write_text(json.dumps(logs))
    assert read_runs(folder)[0].rows[0].interval("before") is None


def changed(folder: Path, file: str, change) -> Path:
    """The results with their logs or audit changed in place."""
    record = json.loads((folder / file).read_text())
    change(record if file == LOGS else record["audits"])
    (folder / file).write_text(json.dumps(record))
    return folder


def test_bad_news_come_first(tmp_path):
    (one,) = read_runs(plant(tmp_path, 8, left=0.3))
    back = [row.comes_back for row in one.rows]
    assert back == sorted(back, reverse=True) and 0 < sum(back) < len(back)
    lines = findings(one)
    assert "Not forgotten" in lines[0] and "proved optimal" in lines[-1]


def test_findings_name_who_suffered_and_what_was_not_proved_or_tried(tmp_path):
    def audits(record) -> None:
        labels = record["ToyAnimals"]
        first, second, third, fourth = (labels[name]["classes"][name] for name in ANIMALS[:4])
        second["examples"]["classes"][1] |= {"name": "puma", "after": acc(0.1)}
        del first["paraphrase"], second["undo"]
        third["undo"]["attacks"]["original_known"]["place"] = 2
        for place, found in enumerate((first, second, third, fourth)):
            for method in found["relearning"]["methods"].values():
                method["needed"] = 4 if place == 3 else None

    def logs(record) -> None:
        first, second, third, _ = (record["ToyAnimals"][name]["solver"] for name in ANIMALS[:4])
        first["certificate"]["gap"] = 0.01
        puma = {"name": "puma", "displacement": 0.6, "cosine_loss": 0.04, "margin": 0.01}
        first["forecast"] = {"affected": [puma], "margin": 0.3, "gap": 0.2}
        third["forecast"] = {"affected": [puma | {"cosine_loss": 0.005}], "margin": 0.3, "gap": 0.2}
        second["paraphrases"] = {"checked": 3, "added": [], "lagging": {"a kind of ant": 0.2}}

    folder = changed(changed(plant(tmp_path, 4), "audit.json", audits), LOGS, logs)
    (one,) = read_runs(folder)
    text = " ".join(findings(one))
    assert f"Hit hardest: puma, 90.0 → 10.0\u00a0% with {ANIMALS[1]} forgotten." in text
    assert f"Not proved optimal: {ANIMALS[0]}." in text and "changes are proved" not in text
    assert f"puma (with {ANIMALS[0]})." in text and f"with {ANIMALS[2]})" not in text
    assert f"“a kind of ant” ({ANIMALS[1]})" in text
    assert "1 class was not tried with other words" in text
    assert "2 of 3 by who has the changed weights and the original" in text
    assert "teach the model 1 of 4 classes" in text
    missing = dict(not_measured(one))
    assert missing["undo: left out of the audit"] == [ANIMALS[1]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.04, "0.0"), (-0.04, "0.0"), (-0.06, "−0.1"), (12.34, "+12.3")],
)
def test_points_have_a_sign_and_no_minus_zero(value, text):
    assert points(value) == text


@pytest.mark.parametrize(
    ("files", "key"),
    [({}, "no results"), ({LOGS: "{"}, LOGS), ({LOGS: "{}"}, "no results")],
)
def test_a_folder_without_results_is_one_line(tmp_path, capsys, files, key):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert run(main, [str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert key in said and said.count("\n") == 1


def test_an_unknown_primary_names_the_nearest(tmp_path, capsys):
    plant(tmp_path / "results1" / "seed_0", 1)
    assert run(main, [str(tmp_path), "--primary", "result1/seed_0"]) == 2
    assert "'results1/seed_0'" in capsys.readouterr().err


def test_a_name_that_utf8_cannot_spell(tmp_path):
    folder = plant(tmp_path, ["\ud800 cat"])
    assert b"? cat" in write_report(read_runs(folder), folder / "report.html").read_bytes()
