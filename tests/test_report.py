"""The report: what it says first, its numbers, its pictures, and that no name is markup."""

import json
import re
import statistics
import tempfile
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from matplotlib.collections import PathCollection

from datasets.mini import MINI
from engine.cli import run
from evaluation.report import page as page_module
from evaluation.report.__main__ import main
from evaluation.report.charts import charts
from evaluation.report.page import render, write_report
from evaluation.report.pictures import strips
from evaluation.report.runs import forgotten_classes, read_methods
from evaluation.report.summary import findings, headline, line, points
from evaluation.results import ARGS, AUDIT, LOGS
from evaluation.rules import Fate
from tests.report_fixtures import ANIMALS, NASTY, changed, plant, plant_shapes, plant_sparse
from utils import create_results

SOURCES = Path(page_module.__file__).parent
VOID = {"meta", "link", "input", "br", "img"}


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
    links = [attributes["href"] for attributes in page.all("a")]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert links[0] == "#main" and len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    assert all("scope" in attributes for attributes in page.all("th"))


def test_nothing_comes_from_elsewhere(page):
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'; ")
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form", "image")
        assert ("src" in attributes) == (tag == "img")
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith(("#", "data:,"))
        assert not any("://" in (value or "") for value in attributes.values())
    style = (SOURCES / "style.css").read_text(encoding="utf-8")
    assert "@import" not in style and "url(" not in style
    (script,) = SOURCES.glob("*.js")
    text = script.read_text(encoding="utf-8")
    assert not re.search(r"(inner|outer|Adjacent)HTML|\beval\(|document\.write|</|{{", text)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme):
    """WCAG AA: 4.5 to 1 for texts; 3 to 1 for lines that carry meaning."""
    style = (SOURCES / "style.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]
    light = {}
    for name, *channels in re.findall(r"--([\w-]+): #(..)(..)(..)", block):
        linear = [((int(x, 16) / 255 + 0.055) / 1.055) ** 2.4 for x in channels]
        light[name] = sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    pairs = dict.fromkeys(product(("ink", "muted", "accent"), ("page", "quiet")), 4.5)
    pairs |= {("strong", "page"): 3, ("accent-ink", "accent"): 4.5}
    pairs |= {(f"m{number}", "page"): 3 for number in range(4)}
    for (one, other), least in pairs.items():
        low, high = sorted([light[one], light[other]])
        assert (high + 0.05) / (low + 0.05) >= least, (one, other)


def test_every_class_stands_once_with_its_numbers_and_its_name_is_text(planted, page):
    one, _ = read_methods(planted)
    assert page.text.count("exact (<script>alert(1)<|script>)") > 3
    assert "exact (<script>alert(1)<|script>)" in page.all("img")[0]["alt"]
    shown = [a for a in page.all("details", **{"class": "class"}) if a["data-name"] != "hammer"]
    names = [attributes["data-name"] for attributes in shown]
    assert names == [row.name for row in one.rows] and set(names) == {*ANIMALS[:6], *NASTY}
    assert sum("data-back" in each for each in shown) == sum(r.comes_back for r in one.rows) > 0
    assert [float(a["data-left"]) for a in shown] == [row.own.after for row in one.rows]
    assert [float(a["data-harm"]) for a in shown] == [row.harm for row in one.rows]
    assert sum("data-measure" in a for a in page.all("section")) == 8 * len(shown) + 1
    own = {"hide", "onload", "onmouseover", "onerror"}
    assert not any(own & attributes.keys() for _, attributes in page.elements)
    assert len(page.all("img")) == 4 and len(page.all("script")) == 1  # charts
    assert all(name in page.text for name in NASTY)
    interval = one.rows[0].audit["residue"]["zero_shot"]["before"]
    assert f"{100 * interval['low']:.1f} to {100 * interval['high']:.1f}" in page.text


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
    assert len(found.all("img")) == 1  # what is left
    assert all(text in found.text for text in (name, "with 1 other", "85.0"))


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
    cells = list(map(line, compared))
    assert cells[0]["Gone"] == ("6 of 6", "")
    back = "Come back under other words"
    assert cells[0][back][0].endswith(" of 1") and cells[1][back] == ("–", "not tried")
    stay = sum(row.fate is Fate.STAYS for row in compared[1].rows)
    assert stay and cells[1]["Gone"] == (f"{6 - stay} of 6", f"{stay} not forgotten")
    assert run(main, [str(tmp_path)]) == 0
    path = tmp_path / "report.html"
    assert f"{path} (2 methods, 12 rows, 1 of them audited)" in capsys.readouterr().out
    text = Page(path.read_text(encoding="utf-8")).text
    for one in compared:  # in the open, on paper too
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
    expected = frame.set_index("name").loc[row.name]
    after = expected.cls_forget, expected.std_cls_forget
    assert exact.of_class(row, "after") == pytest.approx(after)
    means = [statistics.mean(row.rest.points for row in run.rows) for run in exact.runs]
    mean, deviation = statistics.mean(means), statistics.stdev(means)
    assert exact.mean("rest") == pytest.approx((mean, deviation))
    worst = points(min(row.rest.points for row in exact.rows))
    value, remark = line(exact)["Rest of their set, points"]
    assert value == points(mean) and remark.startswith(f"± {deviation:.1f}; worst {worst}, ")
    assert f"exact {points(mean)} ± {deviation:.1f}." in charts([exact])[2][1]
    assert "seed" not in exact.about.partition("mean of 3 seeds")[0]  # they differ in it
    stay = Counter(row.name for row in exact.rows if row.tag == "not forgotten").values()
    said = re.findall(r"not forgotten in (\d) of 3", page_of(tmp_path).text)
    assert said and sorted(map(int, said)) == sorted(count for count in stay if count < 3)


def test_charts_draw_every_class_and_the_whole_names_of_methods(tmp_path, figures):
    names = ["a" * 70, "a setting of many words, each of them a part of its name"]
    plant(tmp_path / names[0], 7)
    plant(tmp_path / names[1], 5, left=0.5, audit=False)
    drawn = charts(read_methods(tmp_path))
    drawings = [x for figure in figures for axis in figure.axes for x in axis.collections]
    dots = [len(x.get_offsets()) for x in drawings if isinstance(x, PathCollection)]
    assert dots == [7, 5, 7, 7, 5, 7, 5]  # other words: of the audited folder alone
    assert all(f"exact ({name})" in drawn[0][1] for name in names)
    for figure in figures:
        box = figure.get_tightbbox()
        assert box.x0 >= 0 and box.x1 <= figure.get_figwidth()


def test_any_measure_and_any_number_may_be_absent(tmp_path):
    names = plant_sparse(tmp_path)
    page = page_of(tmp_path)
    assert {a["data-name"] for a in page.all("details", **{"class": "class"})} == set(names)
    assert "not measured: residue: the probes need two images" in page.text
    assert not re.search(r"\b(None|nan|Undefined)\b", page.text)


def test_pictures_are_of_the_class_they_are_under(tmp_path):
    (one,) = forgotten_classes(read_methods(plant_shapes(tmp_path, 1, range(20))))
    own, *harmed = strips(one)
    assert (own.name, own.by) == ("red circle", "")
    assert [(x.name, x.by) for x in harmed] == [("red square", "exact"), ("red triangle", "exact")]
    sources = [picture.source for strip in (own, *harmed) for picture in strip.pictures]
    assert len(set(sources)) == 60
    assert min(map(len, sources)) > 200 and max(map(len, sources)) < 8_000


@pytest.mark.parametrize("count", [12, 14])
def test_every_class_has_its_pictures_above_or_where_it_is_opened(tmp_path, count):
    page = page_of(plant_shapes(tmp_path, count, [0, 1]))
    shown = [a["alt"] for a in page.all("img") if a["alt"].startswith("Test image of ")]
    assert len(shown) == 3 * 2 * count
    names = {text.removeprefix("Test image of ") for text in shown}
    assert names == {*MINI["MiniShapes"][: count + 2]}
    articles = page.all("article")
    assert len(articles) == 12 and page.text.count("Its images are above") == 12
    assert {a["id"] for a in articles} <= {a["href"][1:] for a in page.all("a")}
    assert ("the 12 classes with the worst news" in page.text) == (count == 14)


@pytest.mark.parametrize(
    ("rows", "features"),
    [([999_999], None), ([-1], None), ([40], None), ([0], "bundles")],  # 40: of another class
)
def test_what_is_no_picture_of_the_class_is_not_shown(tmp_path, rows, features):
    folder = plant_shapes(tmp_path, 1, rows)
    (folder / ARGS).write_text(f"Namespace(dataset='MiniShapes', features={features!r})")
    for strip in strips(forgotten_classes(read_methods(folder))[0]):
        assert [picture.source for picture in strip.pictures] == [""]
        assert strip.pictures[0].before and strip.pictures[0].after["exact"]
    assert "Image 1" in page_of(folder).text


def test_an_audit_of_another_adapter_is_not_shown(tmp_path):
    folder = plant(tmp_path, 2)
    assert all(row.audit for row in read_methods(folder)[0].rows)  # no digest: nothing to say
    for digest, current in (("0" * 64, True), ("1" * 64, False)):
        solver = {"adapter_sha256": digest}
        changed(folder, LOGS, lambda x, s=solver: x["ToyAnimals"][ANIMALS[0]]["solver"].update(s))
        assert all(row.audit for row in read_methods(folder)[0].rows) == current
    (one,) = read_methods(folder)
    assert {row.name for row in one.rows if not row.audit} == {ANIMALS[0]}
    assert f"ToyAnimals: {ANIMALS[0]} were replaced" in page_of(folder).text


def test_findings_say_of_how_many_classes_and_which_bad_news_first(tmp_path):
    def audits(record) -> None:
        first, second, third, _ = (record["ToyAnimals"][x]["classes"][x] for x in ANIMALS[:4])
        del second["paraphrase"], second["undo"], second["residue"]
        third["undo"]["attacks"]["original_known"]["place"] = 2
        third["examples"]["classes"] = third["examples"]["classes"][::2]
        for found in (second, third):
            for method in found["relearning"]["methods"].values():
                method["needed"] = None
        first["paraphrase"]["back"] = ["a spotted cat"]

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
    said = dict(text.removesuffix(".").split("): ") for text in lines)
    named = {
        title.rpartition(" (")[0]: {ANIMALS.index(name) for name in names.split(", ")}
        for title, names in said.items()
    }
    assert 0 in named["Recognised again under other words"]
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
    assert "Likely to be recognised less, by their names alone: puma." in page_of(folder).text


def test_points_have_a_sign_and_no_minus_zero():
    values = {None: "–", 0.04: "0.0", -0.04: "0.0", -0.06: "−0.1", 12.34: "+12.3"}
    assert {value: points(value) for value in values} == values


@pytest.mark.parametrize("text", [None, "{}"])
def test_a_folder_without_results_is_one_line(tmp_path, refused, text):
    if text:
        (tmp_path / LOGS).write_text(text)
    assert "no results" in refused([str(tmp_path)], lambda argv: run(main, argv))
