"""Several results folders: seeds as mean and deviation, methods side by side, the command line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pandas as pd
import pytest

import utils
from engine.cli import run
from forgetting.errors import ProblemError
from tests.results_fixtures import SETTINGS, entry
from utils import (
    compare_results,
    compute_avg_gain,
    create_results,
    plot_comparison,
    plot_results,
    summarise,
)


def results(folder: Path, after: float, name: str = "cat", **settings: object) -> Path:
    """Results of two classes in a folder, alone and together."""
    logs = {"A": {"settings": SETTINGS | settings}}
    logs["A"] |= {label: entry(name=label, after=after) for label in (name, "dog")}
    logs["A"][f"{name}|dog"] = entry(name=name, after=after)
    own = logs["A"][f"{name}|dog"]
    for side, value in (("final_results", after / 2), ("zero_shot", 0.9)):
        own[side]["A"]["dog"] = {"cls_acc_test": value, "no_cls_acc": 0.7, "acc_train": None}
    logs["A"][name]["solver"]["seconds"] = 2 * after
    folder.mkdir(parents=True)
    (folder / "logs.json").write_text(json.dumps(logs))
    return folder


@pytest.fixture
def seeds(tmp_path: Path) -> list[Path]:
    return [results(tmp_path / f"results3/seed_{n}", 0.1 * n, seed=n) for n in range(3)]


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """Logs as the paper's public code writes them: nothing from before forgetting."""
    logs = {"A": {"cat": {"final_results": entry(after=0.2)["final_results"]}}}
    (tmp_path / "public").mkdir()
    (tmp_path / "public/logs.json").write_text(json.dumps(logs))
    (tmp_path / "public/args.txt").write_text("Namespace(backbone_arch='mini', seed=0)")
    return tmp_path / "public"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(capsys, *arguments: object) -> tuple[int, str, str]:
    status = run(utils.main, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def gains(folder: Path) -> float:
    return compute_avg_gain(create_results(folder)[0]).mean()


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
    assert f"{each.mean():.4f} ± {each.std():.4f} over 3" in command(capsys, *seeds)[1]


@pytest.mark.parametrize(("key", "value"), [("trainer", "ForgetExact"), ("weights", "other")])
def test_what_is_no_seed_is_refused(seeds, tmp_path, key, value):
    other = results(tmp_path / "other", 0.3, **{key: value})
    with pytest.raises(ProblemError, match=f"not runs of one kind: {key} is"):
        create_results([seeds[0], other])
    path = seeds[1] / "logs.json"
    path.write_text(path.read_text().replace('"lamb_forget": 1.3', '"lamb_forget": 1.4'))
    with pytest.raises(ProblemError, match=r"lamb_forget is 1\.3 and 1\.4"):
        create_results(seeds)
    with pytest.raises(ProblemError, match="is given twice"):
        create_results([seeds[0], f"{seeds[0]}/"])
    for wrong in ([], [3], (), [seeds[:1]]):
        with pytest.raises(ProblemError, match="given by its path"):
            create_results(wrong)


# The paper's public code


def test_create_results_takes_and_gives_what_the_public_code_does(public, seeds):
    """Its positional order, its form with logs in memory, and a value per row for the gain."""
    logs = json.loads((public / "logs.json").read_text())
    with pytest.warns(UserWarning, match="before=FOLDER"):
        df, args = create_results(f"{public}/", False, False, "logs.json", False)
    assert df.name.tolist() == ["cat"] and df.cls_forget.tolist() == [0.2] and args.seed == 0
    with pytest.warns(UserWarning, match="before=FOLDER"):
        again, _ = create_results("", log_name=logs)
    assert again.equals(df)
    columns = ["ds", "name", "full_Noforget", "cls_Noforget", "cls_forget", "full_forget"]
    assert list(df.columns) == [*columns, "res_B", "full_B"]
    ours, _ = create_results(seeds[1])
    gain = compute_avg_gain(ours)
    expected = (0.1 / 0.9 + (0.8 - 0.7) / 0.8 + (0.6 - 0.5) / 0.6) / 3
    assert gain.tolist() == pytest.approx([expected] * 2) and gain.mean() == pytest.approx(expected)
    # It knows the settings in our logs by their key "kwargs".
    assert all("final_results" in entry or "kwargs" in entry for entry in logs["A"].values())


@pytest.mark.filterwarnings("ignore:.*holds no accuracies before")
def test_before_comes_from_other_results_of_the_same_model(public, seeds, tmp_path, capsys):
    with pytest.raises(ProblemError, match="no average gain") as caught:
        compute_avg_gain(create_results(public)[0])
    assert "\n" not in str(caught.value)
    expected = (0.2 / 0.9 + (0.8 - 0.7) / 0.8 + (0.6 - 0.5) / 0.6) / 3
    frame, _ = create_results(seeds[0])
    for before in (seeds[0], frame):
        df, _ = create_results(public, before=before)
        assert compute_avg_gain(df).tolist() == pytest.approx([expected])
    status, out, _ = command(capsys, public)
    assert status == 0 and "no average gain" in out and "20.0" in out
    status, out, _ = command(capsys, public, "--before", seeds[0])
    assert status == 0 and f"{expected:.4f}" in out and "90.0" in out
    # What the logs hold stays, and what nobody holds is said.
    logs = json.loads((public / "logs.json").read_text())
    logs["A"]["owl"] = {"final_results": entry(name="owl", after=0.3)["final_results"]}
    logs["A"]["dog"] = entry(name="dog", before=0.5, after=0.2)
    (public / "logs.json").write_text(json.dumps(logs))
    df, _ = create_results(public, before=seeds[0])
    before = df.set_index("name").cls_Noforget
    assert (before["cat"], before["dog"]) == (0.9, 0.5) and math.isnan(before["owl"])
    for wrong in (pd.DataFrame({"x": [1]}), {"cat": 0.9}):
        with pytest.raises(ProblemError):
            create_results(public, before=wrong)
    other = results(tmp_path / "other", 0.3, backbone="RN50")
    with pytest.raises(ProblemError, match="one model: backbone is 'mini' and 'RN50'"):
        create_results(public, before=other)


# Methods side by side


def test_methods_side_by_side(seeds, public, tmp_path, capsys):
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
        with pytest.raises(ProblemError, match="can be called"):
            compare_results({"s": seeds, name: other})
    for key in ("backbone", "weights", "template"):
        one = results(tmp_path / f"{key}1", 0.3, template="t")
        two = results(tmp_path / f"{key}2", 0.3, **{"template": "t"} | {key: "another"})
        with pytest.raises(ProblemError, match=f"one model: {key} is"):
            compare_results({"a": one, "b": two})
    for wrong in (pd.DataFrame({"x": [1]}), table, 3):
        for take in (summarise, compute_avg_gain):
            with pytest.raises(ProblemError, match="not a frame of create_results"):
                take(wrong)
    with pytest.raises(ProblemError, match="not a frame of compare_results"):
        plot_comparison(create_results(seeds)[0], tmp_path / "p.png")


def test_the_command_writes_what_is_named_and_nothing_else(seeds, tmp_path, capsys, monkeypatch):
    results(tmp_path / "a=b", 0.2, name=r"a_b & 50% {\x} #1")
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    folders = [f"results3/seed_{n}" for n in range(3)]
    status, out, _ = command(capsys, *folders)
    assert status == 0 and "results3: average gain" in out and "class ±" in out
    status, out, _ = command(capsys, f"seeds={seeds[0]}", f"seeds={seeds[1]}", "a=b")
    assert "seeds: average gain" in out and "over 2" in out and "a=b: average gain" in out
    assert tree(tmp_path) == before
    files = ["--csv", "t.csv", "--draw", "p.png"]
    for arguments in (folders, ["a=b"], [folders[0], "a=b"]):  # and again over what is there
        assert command(capsys, *arguments, *files)[0] == 0
        assert Path("p.png").read_bytes().startswith(b"\x89PNG")
    assert pd.read_csv("t.csv")["forgotten"].tolist() == ["dog"]


def test_outputs_are_regular_files_and_refused_before_anything_is_printed(seeds, tmp_path, capsys):
    """A pipe is neither replaced nor waited for."""
    os.mkfifo(tmp_path / "pipe.csv")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "mine").write_text("mine")
    for options in (
        ["--csv", tmp_path / "pipe.csv"],
        ["--draw", tmp_path / "pipe.png"],
        ["--draw", tmp_path / "p.jpg"],
        ["--csv", tmp_path / "mine/t.csv"],
    ):
        status, out, err = command(capsys, *seeds, *options)
        assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


# Pictures


def test_of_many_rows_the_worst_are_drawn_in_their_order(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

    drawn, titles = [], []
    monkeypatch.setattr(Axes, "set_yticks", lambda axis, places, names, **_: drawn.append(names))
    monkeypatch.setattr(Figure, "suptitle", lambda figure, text: titles.append(text))
    for count in (2500, 60):
        names = [f"class {number}" for number in range(count)]
        logs = {"A": {name: entry(name=name, after=0.0) for name in names}}
        for name, left, rest in ((names[-3], 0.0, 0.1), (names[-2], 0.2, 0.7), (names[-1], 0.3, 1)):
            accuracies = {"cls_acc_test": left, "no_cls_acc": rest}
            logs["A"][name]["final_results"]["A"][name] = accuracies
        df, _ = create_results("", log_name=logs)
        with Image.open(plot_results(df, tmp_path / "picture.png")) as image:
            assert image.width > 800 and image.height < 2500
    few, everything = drawn
    assert len(few) == 60 and list(few)[-3:] == [f"A: class {n}" for n in (2497, 2498, 2499)]
    assert list(few)[:2] == ["A: class 0", "A: class 1"]  # among equals the first
    assert list(everything) == [f"A: class {n}" for n in range(60)]
    assert len(titles) == 1 and titles[0].startswith("the 60 of 2,500 rows")


def test_equal_methods_do_not_hide_each_other_and_losses_fill_their_panels(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    for name in ("one", "other"):
        results(tmp_path / name, 0.1)
    table = compare_results({name: tmp_path / name for name in ("one", "other")})
    assert (table["class one"] == table["class other"]).all()
    dots, limits = [], []
    draw, limit = Axes.scatter, Axes.set_xlim

    def scatter(axis, x, y, **style):
        dots.extend([(id(axis), float(a), float(b)) for a, b in zip(x, y, strict=True)])
        return draw(axis, x, y, **style)

    def set_xlim(axis, *ends, **how):
        limits.extend([ends] * (len(ends) == 2))
        return limit(axis, *ends, **how)

    monkeypatch.setattr(Axes, "scatter", scatter)
    monkeypatch.setattr(Axes, "set_xlim", set_xlim)
    plot_comparison(table, tmp_path / "picture.png")
    assert len(dots) == len({*dots}) == 2 * (1 + 2) + 2 * 2 + 2 * 2
    ends, *losses = limits
    assert ends == (-3, 103)
    for (low, high), name in zip(losses, ("rest", "others"), strict=True):
        points = table[f"{name} before"] - table[f"{name} one"]
        assert low < min(0, points.min()) and points.max() < high < 1.1 * max(0.2, points.max())
