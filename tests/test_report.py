"""The report: what it says first, its numbers, its pictures, and that no name is markup."""

import json
import re
import statistics
import tempfile
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from engine.cli import run
from evaluation.report import page as page_module
from evaluation.report.__main__ import main
from evaluation.report.charts import DRAWN, charts
from evaluation.report.measures import sentences, tables
from evaluation.report.page import render, write_report
from evaluation.report.pictures import strips
from evaluation.report.runs import forgotten_classes, read_methods
from evaluation.report.summary import cell, cells, findings, headline, number
from evaluation.results import ARGS, AUDIT, LOGS
from evaluation.rules import Fate
from tests.report_fixtures import ANIMALS, NASTY, changed, plant, plant_shapes, plant_sparse
from utils import create_results

SOURCES = Path(page_module.__file__).parent
VOID = {"meta", "input", "img"}


class Page(HTMLParser):
    """Elements as (tag, attributes) in their order, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if not {"script", "style"} & {*self.open}:
            self.text += data

    def all(self, tag: str, **wanted: str) -> list[dict]:
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]


def page_of(folder: Path) -> Page:
    return Page(render(read_methods(folder)))


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """Two methods; classes, and the folder of one, have names that look like code."""
    root = tmp_path_factory.mktemp("planted")
    plant(root / NASTY[0].replace("/", "|"), ["hammer"], "Tools", audit=False)
    plant(root / "x", [*ANIMALS[:6], *NASTY])
    return root


@pytest.fixture(scope="module")
def page(planted) -> Page:
    return page_of(planted)


def test_landmarks_and_headings_are_in_order(page):
    tags = [tag for tag, _ in page.elements]
    assert [tags.count(tag) for tag in ("html", "h1", "main", "nav", "footer")] == [1] * 5
    levels = [0, *(int(tag[1]) for tag in tags if tag in ("h1", "h2", "h3", "h4", "h5"))]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.open == [] and page.all("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for a in page.all("a")} <= set(ids)
    assert all("scope" in attributes for attributes in page.all("th"))


def test_nothing_comes_from_elsewhere(page):
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'; ")
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form", "image")
        assert ("src" in attributes) == (tag == "img")
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith("#")
        assert not any("://" in (value or "") for value in attributes.values())
    style = (SOURCES / "style.css").read_text(encoding="utf-8")
    assert "@import" not in style and "url(" not in style
    script = (SOURCES / "search.js").read_text(encoding="utf-8")
    assert not re.search(r"(inner|outer|Adjacent)HTML|\beval\(|document\.write|</|{{", script)


def test_every_class_stands_once_with_its_numbers_and_its_name_is_text(planted, page):
    one, _ = read_methods(planted)
    assert page.text.count("exact (<script>alert(1)<|script>)") > 3
    drawn = page.all("svg")
    assert len(drawn) == 7 and "exact (<script>alert(1)<|script>)" in drawn[1]["aria-label"]
    shown = [a for a in page.all("details", **{"class": "class"}) if a["data-name"] != "hammer"]
    names = [attributes["data-name"] for attributes in shown]
    assert names == [row.name for row in one.rows] and set(names) == {*ANIMALS[:6], *NASTY}
    assert sum("data-back" in each for each in shown) == sum(r.comes_back for r in one.rows) > 0
    assert [float(a["data-after"]) for a in shown] == [row.own.after for row in one.rows]
    assert [float(a["data-harm"]) for a in shown] == [max(0, row.harm) for row in one.rows]
    own = {"hide", "onload", "onmouseover", "onerror"}
    assert not any(own & attributes.keys() for _, attributes in page.elements)
    assert page.all("img") == [] and len(page.all("script")) == 1
    assert all(name in page.text for name in NASTY)


def test_the_tables_of_a_class_say_what_its_audit_measured(planted):
    one, bare = read_methods(planted)
    (row,) = (row for row in one.rows if row.name == ANIMALS[0])
    audit = row.audit
    words, near, taken, images, search, learnt = tables(audit).values()
    prompts = audit["paraphrase"]["prompts"]
    assert {line[0] for line in words} == {f"{x['text']} ({x['kind']})" for x in prompts}
    assert [line[2] for line in words] == sorted((line[2] for line in words), reverse=True)
    assert [line[0] for line in near] == [x["name"] for x in audit["neighbours"]["classes"]]
    assert sum(line[2] for line in taken) == pytest.approx(1)
    assert ("zero shot", *row.own) in images
    assert ("image to text, forgotten, first 1", 1.0, 0.0) in search and len(search) == 8
    curve = audit["relearning"]["methods"]["refit"]
    refit = [line[1:] for line in learnt if line[0].endswith("its name learnt anew")]
    assert refit == list(zip(curve["no_text"], curve["forgotten"], strict=True))
    said = {*audit["verdict"], "not retained, since they mean the same: panther"}
    assert said < set(sentences(row))
    assert not any(tables(bare.rows[0].audit).values())  # it has none


@settings(max_examples=6, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")))
def test_any_name_is_one_row_and_no_element(name):
    """In logs of the paper's public code: no zero_shot, no solver, no settings."""

    def page(name):
        own = {each: {"cls_acc_test": 0.1, "no_cls_acc": 0.5} for each in (name, "toy poodle")}
        results = {"Set": own, "Caltech101": {"all": {"all_ds": 0.85}}}
        with tempfile.TemporaryDirectory() as folder:
            logs = {"Set": {"label": {"final_results": results}}}
            (Path(folder) / LOGS).write_text(json.dumps(logs))
            return page_of(Path(folder))

    found, harmless = page(name), page("cat")  # the second is the control
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in harmless.elements]
    assert len(found.all("svg")) == 1  # what is left
    assert all(text in found.text for text in (name, "one of 2 at once", "– → 85.0"))


def test_the_same_results_give_the_same_bytes(tmp_path):
    plant(tmp_path, ["cat", "\ud800 cat"])  # a name that UTF-8 cannot spell
    pages = [write_report(read_methods(tmp_path), tmp_path / name) for name in ("a.html", "b.html")]
    assert pages[0].read_bytes() == pages[1].read_bytes() and b"? cat" in pages[0].read_bytes()


def test_the_head_is_one_sentence_and_one_line_per_method(tmp_path, capsys):
    """What was not measured is not counted as if it had been."""

    def audit_first(audits) -> None:
        audits["ToyAnimals"] = {ANIMALS[0]: audits["ToyAnimals"][ANIMALS[0]]}

    changed(plant(tmp_path / "a", 6), AUDIT, audit_first)
    plant(tmp_path / "no audit", 6, trainer="ForgetLoRA", left=0.6, audit=False)
    compared = read_methods(tmp_path)
    assert headline(compared) == "ViT-B/32 was made to forget 6 classes by 2 methods."
    exact, paper = map(cells, compared)
    gone, back = "Below half", "Found by other words"
    assert exact[gone] == ["6 of 6"] and exact[back][0].endswith(" of 1") and paper[back] == ["–"]
    stay = sum(row.fate is Fate.STAYS for row in compared[1].rows)
    assert stay and paper[gone] == [f"{6 - stay} of 6"]
    assert run(main, [str(tmp_path)]) == 0
    path = tmp_path / "report.html"
    assert f"{path} (exact, paper)" in capsys.readouterr().out
    text = Page(path.read_text(encoding="utf-8")).text
    assert "Class forgetting: exact, paper" in text
    for one in compared:
        assert text.count(f"{one.label}: what to know, bad news first") == 1
    assert f"python -m evaluation.audit '{tmp_path / 'no audit'}'" in text


def test_folders_of_a_sweep(tmp_path):
    varied = ("ForgetExact", "ForgetNoise"), ("mild", "strong"), (0, 1)
    for trainer, setting, seed in product(*varied):
        plant(tmp_path / trainer / setting / f"seed_{seed}", 2, trainer=trainer, seed=seed)
    plant(tmp_path / "other", 3, trainer="ForgetZero")
    for seed in (0, 1):  # not of one setting, so no seeds
        folder = tmp_path / f"apart/seed_{seed}"
        plant(folder, 2, trainer="ForgetUCE", seed=seed, settings={"beta": 0.1 * seed})
    found = read_methods(tmp_path)
    assert {method.label: len(method.runs) for method in found} == {
        **{f"exact (ForgetExact/{setting})": 2 for setting in ("mild", "strong")},
        **{f"noise (ForgetNoise/{setting})": 2 for setting in ("mild", "strong")},
        **{"zero": 1, "uce (apart/seed_0)": 1, "uce (apart/seed_1)": 1},
    }
    only = {(tmp_path / name).resolve() for name in ("other", "apart/seed_1")}
    # Those with most audits come first.
    assert [method.label for method in read_methods(tmp_path, only)] == ["zero", "uce"]
    assert page_of(tmp_path).text.count("mean of 2 seeds, ±") == 4


def test_seeds_are_one_method_with_means_and_deviations(tmp_path):
    seeds = [plant(tmp_path / f"r/seed_{n}", 6, seed=n, left=0.3, harm=0.02) for n in range(3)]
    frame, _ = create_results(seeds)
    (exact,) = read_methods(tmp_path)
    row = exact.runs[0].rows[0]
    expected = 100 * frame.set_index("name").loc[row.name]
    (narrowed,) = forgotten_classes([exact])[row.dataset, row.name]
    expected = expected.cls_forget, expected.std_cls_forget
    assert narrowed.mean("after") == pytest.approx(expected)
    means = [statistics.mean(row.rest.points for row in run.rows) for run in exact.runs]
    mean, deviation = statistics.mean(means), statistics.stdev(means)
    assert exact.mean("rest") == pytest.approx((mean, deviation))
    shown = cells(exact)["Rest of its set, points"]
    assert shown[:2] == [number(mean, "+"), f"± {deviation:.1f}"]
    assert shown[2].startswith("90.0 → 8")  # planted
    assert "seed" not in exact.about.partition("mean of 3 seeds")[0]  # they differ in it
    text = page_of(tmp_path).text
    assert text.count("mean of 3 seeds") == 1 + 6 and text.count("seed 2") == 6
    gone = sum(run.rows[0].fate is Fate.GONE for run in narrowed.runs)
    assert cells(narrowed)["Below half"] == [f"{gone} of 3"]


def test_charts_draw_every_class_on_one_axis(tmp_path):
    plant(tmp_path / "a", 7, harm=0.1)
    plant(tmp_path / "b", 5, left=0.5, audit=False)
    methods = {method.label: method for method in read_methods(tmp_path)}
    drawn = charts(list(methods.values()))
    dots = [path.count("M") for *_, lines in drawn for *_, path in lines]
    assert dots == [7, 5, 7, 7, 5, 7, 5]  # other words: of the audited folder alone
    for quantity, (_, (low, high, zero), lines) in zip(DRAWN, drawn, strict=True):
        assert low <= 0 <= high and low + zero / 100 * (high - low) == pytest.approx(0)
        for label, text, mean, path in lines:
            places = [float(place) for place in re.findall(r"M([\d.]+) 0\.\d\dh0", path)]
            values = [low + place / 100 * (high - low) for place in places]
            assert values == pytest.approx(sorted(methods[label].values(quantity)), abs=0.1)
            assert min(places) <= mean <= max(places)
            assert text == cell(methods[label], quantity)[0]


def test_any_measure_and_any_number_may_be_absent(tmp_path):
    names = plant_sparse(tmp_path)
    page = page_of(tmp_path)
    assert {a["data-name"] for a in page.all("details", **{"class": "class"})} == set(names)
    assert "not measured: residue: the probe needs two images" in page.text
    assert not re.search(r"\b(None|nan|Undefined)\b", page.text)


def strips_of(folder: Path) -> list:
    """Those of the only class of a folder."""
    (results,) = forgotten_classes(read_methods(folder)).values()
    return strips("MiniShapes", results)


def test_pictures_are_of_the_class_they_are_under(tmp_path):
    own, *harmed = strips_of(plant_shapes(tmp_path, 1, range(20)))
    assert own[0] == "red circle" and [x[0] for x in harmed] == ["red square", "red triangle"]
    sources = [source for *_, pictures in (own, *harmed) for source, _ in pictures]
    assert len(set(sources)) == 60
    assert min(map(len, sources)) > 200 and max(map(len, sources)) < 8_000


def test_pictures_have_the_guesses_of_every_method_and_the_most_harmed_come_first(tmp_path):
    for folder, rows, left in (("a", [3, 4], (0.6, 0.1)), ("b", [3], (0.2, 0.9))):

        def lose(record, left=left) -> None:
            (audit,) = record["MiniShapes"].values()
            harmed = audit["classes"]["red circle"]["examples"]["classes"][1:]
            for one, value in zip(harmed, left, strict=True):
                one["before"]["value"], one["after"]["value"] = 0.9, value

        changed(plant_shapes(tmp_path / folder, 1, rows), AUDIT, lose)
    own, *harmed = strips_of(tmp_path)
    assert [name for name, *_ in harmed] == ["red triangle", "red square"]
    assert harmed[0][1] == [("exact (a)", 0.9, 0.1), ("exact (b)", 0.9, 0.9)]
    both = {"before", "after, exact (a)", "after, exact (b)"}
    assert [set(guesses) for _, guesses in own[2]] == [both, both - {"after, exact (b)"}]


def test_every_detailed_class_has_its_pictures_and_the_worst_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(page_module, "DETAILED", 4)
    page = page_of(plant_shapes(tmp_path, 5, [0, 1]))
    assert len(page.all("img")) == 3 * 2 * 4
    classes = page.all("details", **{"class": "class"})
    assert ["open" in attributes for attributes in classes] == [True] * 3 + [False] * 2
    assert page.text.count("All that was measured: exact") == 4


@pytest.mark.parametrize(
    ("rows", "features"),
    [([999_999], None), ([-1], None), ([40], None), ([0], "bundles")],  # 40: of another class
)
def test_what_is_no_picture_of_the_class_is_not_shown(tmp_path, rows, features):
    folder = plant_shapes(tmp_path, 1, rows)
    (folder / ARGS).write_text(f"Namespace(dataset='MiniShapes', features={features!r})")
    for *_, ((source, guesses),) in strips_of(folder):
        assert source == "" and guesses["before"] and guesses["after, exact"]
    assert "Image 1" in page_of(folder).text


def test_an_audit_of_another_adapter_is_not_shown(tmp_path):
    folder = plant(tmp_path, 2)
    assert all(row.audit for row in read_methods(folder)[0].rows)  # no digest
    for digest, outdated in (("0" * 64, []), ("1" * 64, [ANIMALS[0]])):
        solver = {"adapter_sha256": digest}
        changed(folder, LOGS, lambda x, s=solver: x["ToyAnimals"][ANIMALS[0]]["solver"].update(s))
        (one,) = read_methods(folder)
        assert [row.name for row in one.rows if not row.audit] == outdated
    assert f"ToyAnimals: {ANIMALS[0]} were replaced" in page_of(folder).text


def test_findings_say_of_how_many_classes_and_which_bad_news_first(tmp_path):
    def audits(record) -> None:
        first, second, third, last = (record["ToyAnimals"][x]["classes"][x] for x in ANIMALS[:4])
        del second["paraphrase"], second["undo"], second["residue"]
        third["undo"]["attacks"]["original_known"]["place"] = 2
        third["examples"]["classes"] = third["examples"]["classes"][::2]
        for found in (second, third):
            for method in found["relearning"]["methods"].values():
                method["needed"] = None
        first["paraphrase"]["back"] = last["paraphrase"]["back"] = ["a spotted cat"]

    def logs(record) -> None:
        first, second, third, fourth = (record["ToyAnimals"][name] for name in ANIMALS[:4])
        first["solver"]["certificate"]["gap"] = 0.01
        puma = {"name": "puma", "cosine_loss": 0.04, "margin": 0.01}
        second["solver"]["forecast"] = {"affected": [puma]}
        third["solver"]["forecast"] = {"affected": [puma | {"cosine_loss": 0.005}]}
        fourth["final_results"]["ToyAnimals"][ANIMALS[3]]["cls_acc_test"] = 0.9

    folder = changed(changed(plant(tmp_path, 4), AUDIT, audits), LOGS, logs)
    (one,) = read_methods(folder)
    back = [row.comes_back for row in one.rows]
    assert back == sorted(back, reverse=True) and 0 < sum(back) < len(back)
    lines = findings(one)
    assert lines[0] == f"Not forgotten (1 of 4): {ANIMALS[3]}."
    count = len(lines[1].partition("): ")[2].split(", "))  # it has that of the table
    assert lines[1].startswith(f"Found by other words ({count} of 4)")
    assert cells(one)["Found by other words"] == [f"{count} of 3"]  # the second was not tried
    said = dict(text.removesuffix(".").split("): ") for text in lines)
    named = {
        title.rpartition(" (")[0]: {ANIMALS.index(name) for name in names.split(", ")}
        for title, names in said.items()
    }
    assert {0, 3} <= named["Found by other words"]
    assert 2 not in named["Another class loses more than half of its images"]
    attacker = "Named first by an attacker who has the changed weights"
    expected = {
        "Not tried with other words": {1},
        "Other names are likely to be lost, by texts alone": {1},
        "Still found by a linear probe on images, which do not change": {0, 2, 3},
        "Learnt again from a few images": {0, 3},
        f"{attacker} and the original": {0, 3},
        f"{attacker} alone": {0, 2, 3},
        "Not proved optimal": {0},
        "Proved optimal": {1, 2, 3},
    }
    assert expected.items() <= named.items()
    assert "likely to be recognised less, by their names alone: puma" in page_of(folder).text


def test_numbers_have_no_minus_before_a_zero():
    values = {None: "–", 0.04: "0.0", -0.04: "0.0", -0.06: "−0.1", 12.34: "12.3"}
    assert {value: number(value) for value in values} == values and (
        number(0.04, "+"),
        number(0.1, "+"),
    ) == ("0.0", "+0.1")


@pytest.mark.parametrize("text", [None, "{}"])
def test_a_folder_without_results_is_one_line(tmp_path, refused, text):
    if text:
        (tmp_path / LOGS).write_text(text)
    assert "no results" in refused([str(tmp_path)], lambda argv: run(main, argv))
