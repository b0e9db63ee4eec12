"""The report as a file: what stands in it, its pictures, that no name is markup, and what is
refused."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import sys
import tempfile
from base64 import b64decode
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from PIL import Image

from datasets.mini import MINI, TEST_IMAGES
from engine.cli import run
from evaluation.report import classes as classes_module
from evaluation.report import page as page_module
from evaluation.report import read_runs, write_report
from evaluation.report.__main__ import main
from evaluation.report.classes import BUDGET, forgotten, thumbnail
from evaluation.report.page import GENERATOR, render
from evaluation.report.runs import methods
from evaluation.results import LOGS
from tests.report_fixtures import (
    ANIMALS,
    NASTY,
    acc,
    log_entry,
    mini,
    plant,
    plant_sparse,
    riddle,
    write,
)

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
        assert tag not in ("iframe", "object", "embed", "base", "form", "image", "use")
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


def test_several_folders_side_by_side(tmp_path):
    for name in ("results10", "results3", "results2"):
        plant(tmp_path / name / "seed_0", 4, audit=name == "results3")
    runs = read_runs(tmp_path)
    assert [one.name for one in runs] == ["results3", "results2", "results10"]  # audited first
    assert read_runs(tmp_path, "results10")[0].name == "results10"
    assert [one.label for one in runs] == [f"exact ({one.name})" for one in runs]
    page = page_of(tmp_path)
    assert len(page.all("details", **{"class": "class"})) == 4  # each once, with all folders
    assert page.text.count("Everything about it after exact (results10)") == 4
    for one in runs:
        assert page.text.count(f"{one.label}: what to know, bad news first") == 1


def test_labels_hold_what_differs_and_no_more(tmp_path):
    """Folders as a sweep leaves them."""
    for trainer in ("ForgetExact", "ForgetNoise"):
        for setting in ("mild", "strong"):
            for seed in (0, 1):
                place = tmp_path / "ViT-B-32" / trainer / setting / f"seed_{seed}"
                plant(place, 2, trainer=trainer, seed=seed)
    plant(tmp_path / "ViT-B-32" / "ForgetNoise" / "mild" / "other", 2, trainer="ForgetZero")
    runs = read_runs(tmp_path)
    words = {"ForgetExact": "exact", "ForgetNoise": "noise"}
    assert {one.name: one.title for one in runs} == {
        f"{trainer}/{setting}/seed_{seed}": f"{word} ({setting}), seed {seed}"
        for trainer, word in words.items()
        for setting in ("mild", "strong")
        for seed in (0, 1)
    } | {"ForgetNoise/mild/other": "zero"}
    assert [len(method.runs) for method in methods(runs)] == [2, 2, 1, 2, 2]
    page = page_of(tmp_path)
    assert page.text.count("mean of 2 seeds, ±") == 4
    assert page.text.count("Everything about it after noise (mild), seed 1") == 2
    (one,) = read_runs(tmp_path / "ViT-B-32/ForgetExact/mild/seed_1")
    assert one.name == "mild/seed_1" and one.title == "exact"


def test_what_happens_in_some_seeds_alone_is_said_so(tmp_path):
    for seed, left in ((0, 0.0), (1, 0.0), (4, 0.6)):
        plant(tmp_path / f"seed_{seed}", ["ant"], seed=seed, left=left, audit=False)
    (one,) = forgotten(read_runs(tmp_path))
    (told,) = one.told
    left = [row.own.after for _, row in told.rows]
    assert told.tags == ["not forgotten in 1 of 3 seeds"]
    assert told.means["after"] == pytest.approx(sum(left) / 3)
    page = page_of(tmp_path)
    assert "not forgotten in 1 of 3 seeds" in page.text and "mean of 3 seeds" in page.text
    assert all(f"exact, seed {seed}" in page.text for seed in (0, 1, 4))


def test_seeds_of_other_settings_are_no_seeds(tmp_path):
    for seed in (0, 1):
        plant(tmp_path / f"seed_{seed}", 2, seed=seed, settings={"beta": 0.1 * seed})
    assert [one.title for one in read_runs(tmp_path)] == ["exact (seed_0)", "exact (seed_1)"]
    above, below = (plant(tmp_path / "x" / "a" / name, 2) for name in ("", "seed_7"))
    titles = {one.folder: one.title for one in read_runs(tmp_path / "x")}
    assert titles == {above: "exact (a)", below: "exact (a, seed_7)"}


def test_folders_that_share_every_word_keep_them_all(tmp_path):
    places = ("a/b", "b/a", "a")
    for place in places:
        plant(tmp_path / place, 1)
    assert {one.name for one in read_runs(tmp_path)} == {*places}
    labels = {"exact (a, b)", "exact (b, a)", "exact (a)"}
    assert {one.label for one in read_runs(tmp_path)} == labels


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
    assert "what the rest of their sets lost was not measured" in page.text
    assert len(page.all("svg")) == 1  # of what is left
    assert "Accuracy before forgetting: not in the logs" in page.text


def test_any_measure_and_any_number_may_be_absent(tmp_path):
    names = plant_sparse(tmp_path)
    page = page_of(tmp_path)
    assert {a["data-name"] for a in page.all("details", **{"class": "class"})} == set(names)
    assert "undo: left out of the audit (2 classes: " in page.text
    assert not re.search(r"\b(None|nan|Undefined)\b", page.text)


def test_pictures_of_a_class_fit_in_40_kb_and_are_of_that_class(tmp_path):
    classes = forgotten(read_runs(mini(tmp_path, list(range(20)))))
    own, harmed = classes[0].strips()
    assert (own.name, own.by, harmed.name, harmed.by) == ("red circle", "", "red square", "exact")
    sizes = [len(picture.source) for strip in (own, harmed) for picture in strip.pictures]
    assert len(sizes) == 40 and min(sizes) > 400 and sum(sizes) <= BUDGET == 40_000
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
    assert len(articles) == 12 and page.text.count("Its images stand above") == 12
    assert {a["id"] for a in articles} <= {a["href"][1:] for a in page.all("a")}
    assert ("Every forgotten class is here." in page.text) == (count == 12)
    told = "the 12 classes with the worst news; the images of 2 others stand in the list"
    assert (told in page.text) == (count == 14)


def test_pictures_of_many_classes_are_smaller(tmp_path, monkeypatch):
    def size() -> int:
        sources = [a["src"] for a in page_of(tmp_path).all("img")]
        assert len(sources) == 2 * 14
        return sum(map(len, sources))

    shapes(tmp_path, 14)
    assert size() > 18_000
    monkeypatch.setattr(page_module, "ALL", 18_000)
    assert 6_000 < size() <= 18_000


def test_a_thumbnail_takes_no_more_room_than_it_has():
    image = Image.effect_noise((400, 300), 80).convert("RGB")
    sizes = [len(thumbnail(image.copy(), room)) for room in (40_000, 5_000, 3_000, 300)]
    assert sizes[0] > 5_000 >= sizes[1] > 3_000 >= sizes[2] > sizes[3] == 0


@pytest.mark.parametrize(
    ("rows", "places"),
    [([999_999], {}), ([-1], {}), ([40], {}), ([0], {"features": "bundles"})],
    ids=["no such row", "below the first", "another class", "bundles"],
)
def test_what_is_no_picture_of_the_class_is_not_shown(tmp_path, rows, places):
    for strip in forgotten(read_runs(mini(tmp_path, rows, **places)))[0].strips():
        assert [picture.source for picture in strip.pictures] == [""]
        assert strip.pictures[0].before and strip.pictures[0].after["exact"]
    page = page_of(tmp_path)
    assert not page.all("img") and "Image 1" in page.text


def test_images_of_ones_own_are_read_where_they_are(tmp_path, capsys):
    """Photographs are larger than what may be embedded: together they take 40 KB, not more."""
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(8):
            noise = Image.effect_noise((300, 200), 90).convert("RGB")
            noise.save(tmp_path / "pets" / name / f"{number}.png")
    results = plant(tmp_path / "results", ["cat"], "pets")
    record = json.loads((results / "audit.json").read_text())
    (found,) = record["audits"]["pets"]["cat"]["classes"].values()
    del found["examples"]["classes"][1:]
    (mine,) = found["examples"]["classes"]
    mine["pictures"] = [mine["pictures"][0] | {"row": row} for row in range(8)]
    (results / "audit.json").write_text(json.dumps(record))
    line = f"Namespace(dataset='pets', images={str(tmp_path / 'pets')!r}, root='data')"
    (results / "args.txt").write_text(line)
    sources = [p.source for p in forgotten(read_runs(results))[0].strips()[0].pictures]
    assert BUDGET / 2 < sum(map(len, sources)) <= BUDGET and len({*sources}) == 8
    for source in sources:
        with Image.open(io.BytesIO(b64decode(source.partition(",")[2]))) as image:
            assert max(image.size) == 112
    shutil.rmtree(tmp_path / "pets")
    for kept in (classes_module.images_of, classes_module._read):
        kept.cache_clear()
    sources = [p.source for p in forgotten(read_runs(results))[0].strips()[0].pictures]
    assert sources == [""] * 8
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("report: no pictures of pets: ")


def test_audits_without_pictures_are_shown_without(tmp_path):
    folder = plant(tmp_path, 3)
    record = json.loads((folder / "audit.json").read_text())
    for name, audit in record["audits"]["ToyAnimals"].items():
        del audit["classes"][name]["examples"]
    (folder / "audit.json").write_text(json.dumps(record))
    page = page_of(folder)
    assert "In pictures" not in page.text and not page.all("figure", **{"class": "strip"})
    assert "examples: left out of the audit (3 classes: " in page.text


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


def test_without_what_draws_the_charts_it_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert run(main, [str(plant(tmp_path, 1))]) == 2
    assert "pip install" in capsys.readouterr().err and not (tmp_path / "report.html").exists()


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
