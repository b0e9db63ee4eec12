"""Results as data frames: a folder, seeds, methods side by side, pictures, the command line."""

import json
import math
import warnings
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from PIL import Image

import utils
from engine.cli import run
from evaluation.tables import summarise
from forgetting.errors import ProblemError
from tests.conftest import refuses
from tests.results_fixtures import SETTINGS, entry
from utils import compare_results, compute_avg_gain, create_results, plot_comparison

COLUMNS = ["ds", "name", "full_Noforget", "cls_Noforget", "cls_forget", "full_forget"]


def write(folder: Path, logs: dict, args: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "logs.json").write_text(json.dumps(logs))
    (folder / "args.txt").write_text(args)
    return folder


def results(folder: Path, after: float, name: str = "cat", **settings: object) -> Path:
    """Results of two classes of A in a folder, alone and together."""
    logs = {"A": {"settings": SETTINGS | settings}}
    logs["A"] |= {label: entry(name=label, after=after) for label in (name, "dog")}
    logs["A"][f"{name}|dog"] = entry(name=name, after=after)
    own = logs["A"][f"{name}|dog"]
    for side, value in (("final_results", after / 2), ("zero_shot", 0.7)):
        own[side]["A"]["dog"] = {"cls_acc_test": value, "no_cls_acc": 0.7, "acc_train": None}
    logs["A"][name]["solver"]["seconds"] = 2 * after
    return write(folder, logs, "Namespace(backbone='mini', seed=0, forget=['a', 'b'])")


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    return [results(tmp_path / f"results3/seed_{n}", 0.1 * n, seed=n) for n in range(3)]


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """Logs as the paper's public code writes them: nothing from before forgetting."""
    logs = {"A": {"cat": {"final_results": entry(after=0.2)["final_results"]}}}
    return write(tmp_path / "public", logs, "Namespace(backbone_arch='mini', seed=0)")


def command(capsys, *arguments: object) -> str:
    assert run(utils.main, [str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def gains(folder: Path) -> float:
    return compute_avg_gain(create_results(folder)[0]).mean()


def test_columns_and_values_of_one_folder(tmp_path, monkeypatch):
    folder = results(tmp_path / "one", 0.1)
    logs = json.loads((folder / "logs.json").read_text())
    logs["B"] = {"x": entry("B", "x", 1.0, 0.0, others=("A",))}
    write(folder, logs, (folder / "args.txt").read_text())
    df, args = create_results(folder)
    assert list(df.columns) == [*COLUMNS, "res_B", "full_B", "res_A", "full_A"]
    row = df.set_index("name").loc["cat"]
    assert row.tolist()[:5] == ["A", 0.8, 0.9, 0.1, 0.7]
    assert (row.res_B, row.full_B) == (0.5, 0.6) and math.isnan(row.res_A)
    assert args.backbone == "mini" and args.seed == 0 and args.forget == ["a", "b"]
    several, _, read = create_results(folder, multiclass=True, return_logs=True)
    assert several.name.tolist() == ["cat|dog"] and read == logs
    assert several.cls_forget[0] == pytest.approx(0.075)
    assert several.cls_Noforget[0] == pytest.approx(0.8)
    assert several.cls_forget_all[0] == {"cat": 0.1, "dog": 0.05}
    monkeypatch.chdir(tmp_path)
    for spelling in (f"{folder}/", str(folder), "one", "./one/"):
        assert create_results(spelling)[0].equals(df)
    with pytest.warns(UserWarning, match="rn=False is right"):
        create_results(folder, rn=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_results(folder, rn=False)


def test_a_folder_without_such_results_is_one_line(tmp_path):
    refuses(r"run forget_clip\.sh", create_results, tmp_path)
    one = {"A": {"cat": {"final_results": {"A": {"cat": {}}}}}}
    for logs, word in ((one, "multiclass"), ({"A": {"settings": {}}}, "single-class")):
        with pytest.raises(ProblemError, match=f"no {word} results"):
            create_results(write(tmp_path, logs), multiclass=word == "multiclass")


def test_args_are_read_and_never_run(seeds):
    (seeds[0] / "args.txt").write_text("Namespace(a=__import__('os').system('touch owned'))")
    refuses(r"args\.txt", create_results, seeds[0])
    assert not Path("owned").exists()
    refuses(f"did you mean {seeds[0]} or ", create_results, seeds[0].parent)


def test_seeds_are_mean_and_standard_deviation(seeds, tmp_path, capsys):
    df, args, logs = create_results(seeds, return_logs=True)
    assert len(args) == len(logs) == 3 and df.folders.tolist() == [3, 3]
    cat = df.set_index("name").loc["cat"]
    assert cat.cls_forget == pytest.approx(0.1) and cat.std_cls_forget == pytest.approx(0.1)
    assert cat.cls_Noforget == pytest.approx(0.9) and cat.std_res_B == 0
    assert summarise(df)["class ±"].tolist() == pytest.approx([10.0, 10.0])
    one, _ = create_results(seeds[:1])
    assert math.isnan(one.std_cls_forget[0]) and one.folders.tolist() == [1, 1]
    several, _ = create_results(seeds, multiclass=True)
    assert several.cls_forget_all[0] == pytest.approx({"cat": 0.1, "dog": 0.05})
    more = results(tmp_path / "results3/seed_9", 0.4, name="owl", seed=9)
    df, _ = create_results([*seeds, more])
    assert dict(zip(df.name, df.folders, strict=True)) == {"cat": 3, "dog": 4, "owl": 1}
    # A loss of one seed is not made up for by the gain of another.
    path = seeds[0] / "logs.json"
    path.write_text(path.read_text().replace('"all_ds": 0.5', '"all_ds": 0.9'))
    each = pd.Series([gains(folder) for folder in seeds])
    assert compute_avg_gain(create_results(seeds)[0]).mean() == pytest.approx(each.mean())
    assert f"{each.mean():.4f} ± {each.std():.4f} over 3" in command(capsys, *seeds)


def test_a_class_that_was_not_recognised_before_has_no_average_gain(tmp_path, capsys):
    names, folder = {"cat": 0.9, "dog": 0.0}, tmp_path / "r"
    write(folder, {"A": {x: entry(name=x, before=v, after=0) for x, v in names.items()}})
    with pytest.warns(UserWarning, match="not recognised .*: 1 of 2"):
        gain, none = compute_avg_gain(create_results(folder)[0])
    assert gain == pytest.approx((0 + (0.8 - 0.7) / 0.8 + (0.6 - 0.5) / 0.6) / 3)
    out = command(capsys, folder)
    assert math.isnan(none) and f"{gain:.4f}; left out" in out and "1 of 2" in out
    write(folder, {"A": {"dog": entry(name="dog", before=0.0, after=0.0)}})
    assert "no average gain; left out" in command(capsys, folder)


def test_what_is_no_seed_is_refused(seeds, tmp_path):
    other = results(tmp_path / "other", 0.3, trainer="ForgetExact")
    refuses("belong together: trainer is.*compare_results", create_results, [seeds[0], other])
    path = seeds[1] / "logs.json"
    path.write_text(path.read_text().replace('"lamb_forget": 1.3', '"lamb_forget": 1.4'))
    refuses(r"lamb_forget is 1\.3 and 1\.4", create_results, seeds)
    refuses("given twice", create_results, [seeds[0], f"{seeds[0]}/"])
    for wrong in ([], [3], (), [seeds[:1]], 3, None, {}):
        refuses("given by its path", create_results, wrong)


def test_create_results_takes_and_gives_what_the_public_code_does(public):
    """Its positional order, logs in memory, several classes under one label."""
    logs = json.loads((public / "logs.json").read_text())
    with pytest.warns(UserWarning, match="before=FOLDER"):
        df, args = create_results(f"{public}/", False, False, "logs.json", False)
    assert df.cls_forget.tolist() == [0.2] and args.seed == 0
    assert df[["full_Noforget", "cls_Noforget", "full_B"]].isna().all().all()
    assert list(df.columns) == [*COLUMNS, "res_B", "full_B"]
    both = {"final_results": {"A": {x: {"cls_acc_test": 0.1, "no_cls_acc": 0.5} for x in "xy"}}}
    logs["A"]["x|y"] = both
    with pytest.warns(UserWarning, match="before=FOLDER"):
        assert create_results("", log_name=logs)[0].equals(df)
        several, _ = create_results("", log_name=logs, multiclass=True)
    assert several.cls_forget_all[0] == {"x": 0.1, "y": 0.1} and several.full_forget[0] == 0.5


@pytest.mark.filterwarnings("ignore:.*holds no accuracies before")
def test_before_comes_from_other_results_of_the_same_model(public, seeds, tmp_path, capsys):
    refuses("no average gain", compute_avg_gain, create_results(public)[0])
    expected = (0.2 / 0.9 + (0.8 - 0.7) / 0.8 + (0.6 - 0.5) / 0.6) / 3
    frame, _ = create_results(seeds[0])
    for before in (seeds[0], frame):
        df, _ = create_results(public, before=before)
        assert compute_avg_gain(df).tolist() == pytest.approx([expected])
    out = command(capsys, public)
    assert "no average gain" in out and "20.0" in out
    out = command(capsys, public, "--before", seeds[0])
    assert f"{expected:.4f}" in out and "90.0" in out
    # What the logs hold stays, and what nobody holds is not made up.
    logs = json.loads((public / "logs.json").read_text())
    logs["A"]["owl"] = {"final_results": entry(name="owl", after=None)["final_results"]}
    logs["A"]["dog"] = entry(name="dog", before=0.5, after=None)
    (public / "logs.json").write_text(json.dumps(logs))
    df = create_results(public, before=seeds[0])[0].set_index("name")
    assert (df.cls_Noforget["cat"], df.cls_Noforget["dog"]) == (0.9, 0.5)
    assert math.isnan(df.cls_Noforget["owl"]) and math.isnan(df.cls_forget["dog"])
    for wrong in (pd.DataFrame({"x": [1]}), {"cat": 0.9}):
        with pytest.raises(ProblemError):
            create_results(public, before=wrong)
    other = results(tmp_path / "other", 0.3, backbone="RN50")
    refuses("backbone is 'mini' and 'RN50'", create_results, public, before=other)


def test_methods_side_by_side(seeds, public, tmp_path):
    other = results(tmp_path / "other", 0.4, name="cat", trainer="ForgetExact")
    table = compare_results({"s": seeds, "a": other})
    row = table.set_index("forgotten").loc["cat"]
    assert (row["class before"], row["class a"]) == (90, 40)
    assert row["class s"] == pytest.approx(10) and row["class ± s"] == pytest.approx(10)
    assert row["seconds a"] == pytest.approx(0.8) and "class ± a" not in table
    with pytest.warns(UserWarning, match="no accuracies before"):
        first = compare_results({"theirs": public, "ours": seeds})
    assert first["class before"].tolist() == [90]  # of the first method that has it
    for name in ("before", "± s"):
        refuses("can be called", compare_results, {"s": seeds, name: other})
    for wrong in ({}, seeds):
        refuses("must map names", compare_results, wrong)
    elsewhere = write(tmp_path / "x", {"B": {"x": entry("B", "x", others=())}})
    refuses("no class is in all", compare_results, {"s": elsewhere, "a": other})
    one = results(tmp_path / "one", 0.3, template="t")
    for key in ("backbone", "weights", "template"):
        two = results(tmp_path / key, 0.3, **{"template": "t"} | {key: "another"})
        refuses(f"belong together: {key} is", compare_results, {"a": one, "b": two})
    for wrong in (pd.DataFrame({"x": [1]}), table, 3):
        for take in (summarise, compute_avg_gain):
            refuses("not a frame of create_results", take, wrong)
    with pytest.raises(ProblemError, match="not a frame of compare_results"):
        plot_comparison(create_results(seeds)[0], tmp_path / "p.png")
    refuses("jpg", plot_comparison, table, tmp_path / "p.jpg")


def test_the_command_writes_what_is_named_and_nothing_else(seeds, tmp_path, capsys, monkeypatch):
    results(tmp_path / "a=b", 0.2, name=r"a_b & 50% {\x} #1")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    folders = [f"results3/seed_{n}" for n in range(3)]
    out = command(capsys, *folders)
    assert "results3: average gain" in out and "class ± after" in out
    assert " seconds\n" in out and "seconds after" not in out
    out = command(capsys, f"seeds={seeds[0]}", f"seeds={seeds[1]}", "a=b")
    assert "seeds: average gain" in out and "over 2" in out and "a=b: average gain" in out
    assert "class ± a=b" not in out
    assert sorted(tmp_path.rglob("*")) == before
    for arguments in (folders, ["a=b"], [folders[0], "a=b"]):  # and again over what is there
        command(capsys, *arguments, "--csv", "t.csv", "--draw", "p.png")
        assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    assert pd.read_csv("t.csv")["forgotten"].tolist() == ["dog"]


def test_of_many_rows_the_worst_are_drawn_in_their_order(tmp_path, figures):
    for count in (2500, 60):
        logs = {f"class {n}": entry(name=f"class {n}", after=0.0) for n in range(count)}
        for n in range(count - 3, count):
            logs[f"class {n}"] = entry(name=f"class {n}", after=0.1)
        df, _ = create_results("", log_name={"A": logs})
        with Image.open(utils.plot_results(df, tmp_path / "picture.png")) as image:
            assert image.width > 800 and image.height < 2500
    few, everything = ([x.get_text() for x in f.axes[0].get_yticklabels()] for f in figures)
    # Among equals the first.
    assert few == [f"A: class {n}" for n in (*range(57), 2497, 2498, 2499)]
    assert everything == [f"A: class {n}" for n in range(60)]
    titles = [figure.get_suptitle() for figure in figures]
    assert titles[0].startswith("the 60 of 2,500 rows") and not titles[1]


def test_equal_methods_do_not_hide_each_other(tmp_path, figures):
    table = compare_results({name: results(tmp_path / name, 0.1) for name in ("one", "other")})
    assert (table["class one"] == table["class other"]).all()
    plot_comparison(table, tmp_path / "picture.png")
    for axis, count in zip(figures[0].axes, (3, 2, 2), strict=True):  # before, and each method
        dots = [c for c in axis.collections if isinstance(c, PathCollection)]
        places = [tuple(place) for each in dots for place in each.get_offsets()]
        assert len(places) == len({*places}) == 2 * count
