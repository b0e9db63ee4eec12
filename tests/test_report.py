"""The report as a file: what stands in it, that no name is markup, and what is refused."""

from __future__ import annotations

import json
import math
import random
import re
import tempfile
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from engine.cli import run
from evaluation.report import page as page_module
from evaluation.report import read_runs, render, write_report
from evaluation.report.__main__ import main
from evaluation.report.page import GENERATOR, embedded
from evaluation.results import LOGS
from tests.report_fixtures import ANIMALS, NASTY, acc, log_entry, plant, plant_sparse, riddle, write

SOURCES = Path(page_module.__file__).parent
SCALARS = st.none() | st.booleans() | st.text() | st.integers(-(10**9), 10**9)
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
        assert tag not in ("img", "iframe", "object", "embed", "base", "form")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith(("#", "data:,"))
    style = (SOURCES / "style.css").read_text(encoding="utf-8")
    assert "@import" not in style and "url(" not in style


def test_scripts_never_read_markup_or_code():
    for path in SOURCES.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", r"eval\(", r"document\.write"):
            assert not re.search(rf"\b{word}", text), path.name
        assert "</" not in text and len(text.splitlines()) < 400


def test_every_class_is_a_row_with_its_numbers(planted, page):
    runs = read_runs(planted)
    rows = [a for a in page.all("tr") if a.get("id", "").startswith("r")]
    assert len(rows) == len(runs[0].rows) == len(ANIMALS[:6]) + len(NASTY)
    assert sum("data-back" in row for row in rows) == sum(r.comes_back for r in runs[0].rows) > 0
    values = [a["data-v"] for a in page.all("td", **{"class": "n"}) if "data-v" in a]
    assert values[:2] == [str(value) for value in runs[0].rows[0].own]
    assert all("scope" in attributes for attributes in page.all("th"))


def test_names_are_text_everywhere(page):
    own = {"hide", "onload", "onmouseover", "onerror"}
    assert not any(own & attributes.keys() for _, attributes in page.elements)
    assert not page.all("img")
    data = page.all("script", type="application/json")
    assert len(page.all("script")) == len(data) + 1
    names = {json.loads(text)["name"] for text in page.scripts[:-1]}
    assert set(NASTY) < names
    for name in NASTY:
        assert name in page.text


@settings(max_examples=60)
@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_embedded_json_is_inert_and_the_same(value):
    text = str(embedded(value))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


@settings(max_examples=40)
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


def test_embedded_numbers_are_short_and_finite():
    value = {"value": 1 / 3, "low": 0.0, "high": 1.0, "n": 40}
    assert embedded(value) == "[0.333333,0.0,1.0,40]"
    assert embedded([math.nan, math.inf, 3.53895e-15]) == "[null,null,3.53895e-15]"


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


def test_several_folders_side_by_side(tmp_path):
    for name in ("results10", "results3", "results2"):
        plant(tmp_path / name / "seed_0", 4, audit=name == "results3")
    runs = read_runs(tmp_path)
    assert [one.name for one in runs] == ["results3", "results2", "results10"]  # audited first
    assert read_runs(tmp_path, "results10")[0].name == "results10"
    page = page_of(tmp_path)
    rows = [a for a in page.all("tr") if a.get("id", "").startswith("r")]
    assert [row["data-run"] for row in rows] == [str(i // 4) for i in range(12)]
    assert len(page.all("g")) == 3
    assert len({a["class"] for a in page.all("g")}) == 3


def test_seeds_of_one_attempt_keep_their_names(tmp_path):
    for seed in range(2):
        plant(tmp_path / "results1" / f"seed_{seed}", 2)
    assert [one.name for one in read_runs(tmp_path)] == ["results1/seed_0", "results1/seed_1"]
    (one,) = read_runs(tmp_path / "results1" / "seed_1")
    assert one.name == "results1/seed_1"


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
    assert "so harm cannot be told" in page.text
    assert "Accuracy before forgetting: not in the logs" in page.text


def test_any_measure_and_any_number_may_be_absent(tmp_path):
    names = plant_sparse(tmp_path)
    page = page_of(tmp_path)
    data = {one["name"]: one for one in map(json.loads, page.scripts[:-1])}
    assert set(data) == set(names)
    assert data["nothing"]["audit"]["residue"]["zero_shot"]["before"] == [None, None, None, 0]
    assert "undo: left out of the audit (2 classes: " in page.text


@pytest.mark.parametrize("name", ["audit.json", LOGS])
def test_files_with_holes_are_shown_or_refused_in_one_line(tmp_path, capsys, name):
    folder = plant(tmp_path, 4)
    path, report = folder / name, folder / "report.html"
    whole = json.loads(path.read_text())
    part = "audits" if name == "audit.json" else "ToyAnimals"
    outcomes = set()
    for seed in range(16):
        holes = riddle(whole[part], random.Random(seed), (0.00005, 0.01)[seed % 2])
        path.write_text(json.dumps(whole | {part: holes}))
        outcomes.add(run(main, [str(folder)]))
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (not report.exists())
        for line in lines:
            assert str(path) in line and "ToyAnimals" in line and "must be " in line
        report.unlink(missing_ok=True)
    assert outcomes == {0, 2}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "there is no such folder"),
        ({}, r"no logs\.json there or below"),
        ({"logs.json": "{}"}, "hold no results"),
        ({"logs.json": '{"A": {"settings": {}}}'}, "hold no results"),
        ({"logs.json": '{"A": '}, "torn"),
        ({"logs.json": '{"A": {}}', "audit.json": "{"}, "is not JSON"),
        ({"logs.json": '{"A": {}}', "audit.json": '{"format": "other"}'}, "no audit of format"),
    ],
)
def test_a_folder_without_results_is_one_line(tmp_path, capsys, files, message):
    folder = tmp_path / "there"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    assert run(main, [str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(folder) in line
    assert re.search(message, line)
    assert not (folder / "report.html").exists()


def test_an_unknown_primary_names_the_nearest(tmp_path, capsys):
    for name in ("exact", "paper"):
        plant(tmp_path / name, 1)
    assert run(main, [str(tmp_path), "--primary", "exakt"]) == 2
    assert "did you mean 'exact'" in capsys.readouterr().err


def test_only_a_report_is_written_over(tmp_path, capsys):
    folder = plant(tmp_path, 1)
    before = (folder / LOGS).read_bytes()
    for out, why in (
        (folder / LOGS, "was not written by this program"),
        (folder, "Is a directory"),
    ):
        assert run(main, [str(folder), "--out", str(out)]) == 2
        assert why in capsys.readouterr().err
    assert (folder / LOGS).read_bytes() == before
    for _ in range(2):
        assert run(main, [str(folder), "--out", str(folder / "new" / "r.html")]) == 0
    assert GENERATOR in (folder / "new" / "r.html").read_text(encoding="utf-8")


def test_a_name_that_utf8_cannot_spell(tmp_path):
    entry = log_entry(random.Random(0), "A", ["x\ud800"], acc(0.9), acc(0.1), 0.0)
    write(tmp_path, {"A": {"settings": {}, "x": entry}})
    path = write_report(read_runs(tmp_path), tmp_path / "report.html")
    assert "x?" in Page(path.read_text(encoding="utf-8")).text
