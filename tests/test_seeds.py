"""Several results folders: seeds as mean and deviation, names, CSV and LaTeX, what came before."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

import utils
from engine.cli import run
from forgetting.errors import ProblemError
from tests.results_fixtures import SETTINGS, entry
from utils import compare_results, compute_avg_gain, create_results, summarise

ODD = r"a_b & 50% {\x} #1 ~^"


def results(folder: Path, after: float, name: str = "cat", **settings: object) -> Path:
    """Results of two classes in a folder."""
    logs = {"A": {"settings": SETTINGS | settings}}
    logs["A"] |= {label: entry(name=label, after=after) for label in (name, "dog")}
    logs["A"][f"{name}|dog"] = entry(name=name, after=after)
    own = logs["A"][f"{name}|dog"]
    for side, value in (("final_results", after / 2), ("zero_shot", 0.9)):
        own[side]["A"]["dog"] = {"cls_acc_test": value, "no_cls_acc": 0.7, "acc_train": None}
    folder.mkdir(parents=True)
    (folder / "logs.json").write_text(json.dumps(logs))
    return folder


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    return [results(tmp_path / f"results3/seed_{n}", 0.1 * n, seed=n) for n in range(3)]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    status = run(utils.main, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_seeds_are_mean_and_standard_deviation(seeds):
    df, args, logs = create_results(seeds, return_logs=True)
    assert len(args) == len(logs) == 3 and df.folders.tolist() == [3, 3]
    cat = df.set_index("name").loc["cat"]
    assert cat.cls_forget == pytest.approx(0.1) and cat.std_cls_forget == pytest.approx(0.1)
    assert cat.cls_Noforget == pytest.approx(0.9) and cat.std_res_B == 0
    gains = [compute_avg_gain(create_results(folder)[0]) for folder in seeds]
    assert compute_avg_gain(df) == pytest.approx(sum(gains) / 3)
    table = summarise(df)
    assert table["class ±"].tolist() == pytest.approx([10.0, 10.0])
    one, _ = create_results(seeds[:1])
    assert math.isnan(one.std_cls_forget[0]) and one.folders.tolist() == [1, 1]


def test_seeds_of_classes_at_once(seeds):
    df, _ = create_results(seeds, multiclass=True)
    assert df.cls_forget_all[0] == pytest.approx({"cat": 0.1, "dog": 0.05})
    assert df.cls_forget[0] == pytest.approx(0.075)


def test_a_class_that_one_seed_lacks_is_counted(seeds, tmp_path):
    more = results(tmp_path / "results3/seed_9", 0.4, name="owl", seed=9)
    df, _ = create_results([*seeds, more])
    assert dict(zip(df.name, df.folders, strict=True)) == {"cat": 3, "dog": 4, "owl": 1}


@pytest.mark.parametrize(("key", "value"), [("trainer", "ForgetExact"), ("weights", "other")])
def test_what_is_no_seed_is_refused(seeds, tmp_path, key, value):
    other = results(tmp_path / "other", 0.3, **{key: value})
    with pytest.raises(ProblemError, match=f"are not runs of one kind: {key} is"):
        create_results([seeds[0], other])
    path = seeds[1] / "logs.json"
    path.write_text(path.read_text().replace('"lamb_forget": 1.3', '"lamb_forget": 1.4'))
    with pytest.raises(ProblemError, match=r"of one kind: lamb_forget is 1\.3 and 1\.4"):
        create_results(seeds)
    with pytest.raises(ProblemError, match="is given twice"):
        create_results([seeds[0], f"{seeds[0]}/"])
    for wrong in ([], [3], ()):
        with pytest.raises(ProblemError, match="given by its path"):
            create_results(wrong)


def test_the_command_over_seeds_writes_nothing(seeds, tmp_path, capsys):
    before = tree(tmp_path)
    status, out, _ = command(capsys, *seeds)
    assert status == 0 and tree(tmp_path) == before
    assert "results3: average gain" in out and "± 0.0370 over 3" in out and "class ±" in out
    status, out, _ = command(capsys, seeds[0])
    assert status == 0 and tree(tmp_path) == before and "picture" not in out


def test_no_two_folders_get_one_name(seeds, tmp_path, capsys):
    a = results(tmp_path / "x/results3/seed_0", 0.3)
    b = results(tmp_path / "y/best", 0.4)
    c = results(tmp_path / "z/best", 0.5)
    status, out, _ = command(capsys, *seeds, a, b, c)
    assert status == 0
    for name in (f"{tmp_path.name}/results3", "x/results3", "y/best", "z/best"):
        assert f"\n{name}: average gain" in f"\n{out}" and f"class {name}" in out
    assert f"class ± {tmp_path.name}/results3" in out
    status, out, _ = command(capsys, f"best={a}", b, f"seeds={seeds[0]}", f"seeds={seeds[1]}")
    assert status == 0 and "best: average" in out and "y/best: average" in out
    assert "seeds: average gain" in out and "over 2" in out
    odd = results(tmp_path / "a=b", 0.2)
    assert "a=b: average gain" in command(capsys, odd)[1]
    table = compare_results({"s": seeds, "a": a})
    assert table["class s"].tolist() == pytest.approx([10, 10]) and "class ± a" not in table


def test_csv_and_latex(seeds, tmp_path, capsys):
    odd = results(tmp_path / "odd", 0.2, name=ODD)
    csv, latex = tmp_path / "t.csv", tmp_path / "t.tex"
    for folders in (seeds, [odd], [f"a={odd}", f"b={odd}"][:1]):
        status, out, _ = command(capsys, *folders, "--csv", csv, "--latex", latex)
        assert status == 0 and f"table: {csv}" in out, "ours are written again"
    table = pd.read_csv(csv)
    assert table["forgotten"].tolist() == [ODD, "dog"] and table["class after"][0] == 20
    text = latex.read_text()
    assert r"a\_b \& 50\% \{\textbackslash{}x\} \#1 \textasciitilde{}\textasciicircum{}" in text
    assert r"\toprule" in text and "20.0" in text
    command(capsys, *seeds, "--latex", latex)
    assert r"class $\pm$" in latex.read_text()
    latex.write_text("mine")
    status, _, err = command(capsys, *seeds, "--latex", latex)
    assert status == 2 and "was not written by this program" in err and latex.read_text() == "mine"
    picture = tmp_path / "p.png"
    for folders in (seeds, [seeds[0], odd]):
        assert command(capsys, *folders, "--draw", picture)[0] in (0, 2)
    assert command(capsys, *seeds, "--draw", picture)[0] == 0 and picture.stat().st_size > 5000


# Logs of the paper's public code


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """Logs without accuracies from before."""
    logs = {"A": {"cat": {"final_results": entry(after=0.2)["final_results"]}}}
    (tmp_path / "public").mkdir()
    (tmp_path / "public/logs.json").write_text(json.dumps(logs))
    return tmp_path / "public"


@pytest.mark.filterwarnings("ignore:.*holds no accuracies from before")
def test_an_average_gain_without_before_says_why_and_takes_it(public, tmp_path, capsys):
    df, _ = create_results(public)
    with pytest.raises(ProblemError, match="these results hold none") as caught:
        compute_avg_gain(df)
    assert "\n" not in str(caught.value)
    expected = (0.2 / 0.9 + (0.8 - 0.7) / 0.8 + (0.6 - 0.5) / 0.6) / 3
    ours = results(tmp_path / "ours", 0.0)
    assert compute_avg_gain(df, create_results(ours)[0]) == pytest.approx(expected)
    typed = {"cat": {"cls_Noforget": 0.9, "full_Noforget": 0.8, "full_B": 0.6}}
    assert compute_avg_gain(df, typed) == pytest.approx(expected)
    assert compute_avg_gain(df, {"cat": {"cls_Noforget": 0.9}}) == pytest.approx(0.2 / 0.9)
    for wrong, message in (
        ({"owl": {"cls_Noforget": 0.9}}, "holds none of the classes cat"),
        ({"cat": 0.9}, "before holds none"),
        (3, "before must be a frame"),
        (pd.DataFrame({"x": [1]}), "before must be a frame"),
    ):
        with pytest.raises(ProblemError, match=message):
            compute_avg_gain(df, wrong)
    status, out, _ = command(capsys, public)
    assert status == 0 and "public: no average gain: it is relative" in out and "20.0" in out
    status, out, _ = command(capsys, public, "--before", ours)
    assert status == 0 and f"{expected:.4f}" in out and "90.0" in out


@pytest.mark.filterwarnings("ignore:.*holds no accuracies from before")
def test_before_fills_what_is_missing_and_nothing_else(public, tmp_path, capsys):
    logs = json.loads((public / "logs.json").read_text())
    logs["A"]["owl"] = {"final_results": entry(name="owl", after=0.3)["final_results"]}
    logs["A"]["dog"] = entry(name="dog", before=0.5, after=0.2)
    (public / "logs.json").write_text(json.dumps(logs))
    ours = results(tmp_path / "ours", 0.0)
    with pytest.warns(UserWarning, match="before forgetting of 1 of 3 rows: owl"):
        df, _ = create_results(public, before=ours)
    before = df.set_index("name").cls_Noforget
    assert (before["cat"], before["dog"]) == (0.9, 0.5) and math.isnan(before["owl"])
    del logs["A"]["owl"]
    (public / "logs.json").write_text(json.dumps(logs))
    table = compare_results({"theirs": public, "ours": ours}, before=ours)
    assert table.set_index("forgotten")["class before"].to_dict() == {"cat": 90, "dog": 50}
    csv = tmp_path / "t.csv"
    assert command(capsys, f"a={public}", f"b={public}", "--before", ours, "--csv", csv)[0] == 0
    assert pd.read_csv(csv)["class before"].tolist() == [90, 50]
    with pytest.raises(ProblemError, match="before holds 90: accuracies are fractions"):
        compute_avg_gain(create_results(public)[0], {"cat": {"cls_Noforget": 90}})


@pytest.mark.filterwarnings("ignore:.*holds no accuracies from before")
@pytest.mark.parametrize("key", ["backbone", "weights", "template"])
def test_methods_of_two_models_are_not_compared(seeds, public, tmp_path, key, capsys):
    other = results(tmp_path / "other", 0.3, **{key: "another"})
    one, two = (results(tmp_path / n, 0.3, trainer=n, template="t") for n in ("one", "two"))
    assert len(compare_results({"one": one, "two": two})) == 2
    mixed = one if key == "template" else seeds[0]
    with pytest.raises(ProblemError, match=f"are not runs of one model: {key} is"):
        compare_results({"a": mixed, "b": other})
    status, out, err = command(capsys, mixed, "--before", other)
    assert (status, out) == (2, "") and f"one model: {key} is" in err
    (public / "args.txt").write_text("Namespace(backbone_arch='RN50')")
    with pytest.raises(ProblemError, match="one model: backbone is 'RN50' and 'mini'"):
        create_results(public, before=seeds[0])


def test_before_is_of_the_first_method_that_has_it(public, seeds):
    with pytest.warns(UserWarning, match="holds no accuracies"):
        table = compare_results({"theirs": public, "ours": seeds})
    assert table["class before"].tolist() == [90] and table["others before"].tolist() == [60]


@pytest.mark.parametrize("name", ["before", "± seeds"])
def test_no_method_has_the_name_of_another_column(seeds, tmp_path, name):
    other = results(tmp_path / "other", 0.3)
    with pytest.raises(ProblemError, match="no method can be called"):
        compare_results({"seeds": seeds, name: other})


def test_the_average_gain_of_seeds_is_one_number(seeds, tmp_path, capsys):
    """A loss of one seed is not made up for by the gain of another."""
    path = seeds[0] / "logs.json"
    path.write_text(path.read_text().replace('"all_ds": 0.5', '"all_ds": 0.9'))
    gains = pd.Series([compute_avg_gain(create_results(folder)[0]) for folder in seeds])
    df, _ = create_results(seeds)
    assert compute_avg_gain(df) == pytest.approx(gains.mean()) and len(df.gain) == 2
    assert f"{gains.mean():.4f} ± {gains.std():.4f} over 3" in command(capsys, *seeds)[1]
    with pytest.raises(ProblemError, match="create_results"):
        compute_avg_gain(df, create_results(seeds[0])[0])


def test_other_frames_are_refused(seeds, tmp_path):
    table = compare_results({"a": seeds})
    for wrong in (pd.DataFrame({"x": [1]}), table, 3):
        for take in (summarise, compute_avg_gain):
            with pytest.raises(ProblemError, match="not a frame of create_results"):
                take(wrong)
    with pytest.raises(ProblemError, match="not a frame of compare_results"):
        utils.plot_comparison(create_results(seeds)[0], tmp_path / "p.png")
    with pytest.raises(ProblemError, match="given by its path"):
        create_results([seeds[:1]])


def test_outputs_are_refused_before_anything_is_printed(seeds, tmp_path, capsys):
    mine, audit = tmp_path / "mine", tmp_path / "audit.csv"
    mine.write_text("mine")
    audit.write_text("data set,forgotten,class,before\n")
    good = ["--csv", tmp_path / "new.csv"]
    for options, told in (
        ([*good, "--draw", tmp_path / "p.jpg"], "must end in"),
        ([*good, "--latex", mine / "t.tex"], "cannot write"),
        ([*good, "--latex", tmp_path / "new.csv"], "a file of its own"),
        (["--csv", audit], "was not written by this program"),
    ):
        before = tree(tmp_path)
        status, out, err = command(capsys, *seeds, *options)
        assert (status, out) == (2, "") and told in err and tree(tmp_path) == before
