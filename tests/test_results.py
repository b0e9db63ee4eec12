"""logs.json and args.txt: merged, atomic, guarded, and read by create_results."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings

import hypothesis.strategies as st
import pytest
from hypothesis import given

from engine.files import sha256_file
from evaluation.results import (
    check_folder,
    is_done,
    join_label,
    merge_args,
    merge_results,
    place,
    read_logs,
    split_label,
)
from forgetting.errors import ProblemError
from tests.results_fixtures import finished, store
from utils import (
    compare_results,
    compute_avg_gain,
    create_results,
    plot_comparison,
    plot_results,
    summarise,
)

SETTINGS = {"trainer": "ForgetLoRA", "backbone": "mini", "weights": "abc", "seed": 0}


def entry(dataset="A", name="cat", before=0.9, after=0.1, others=("B",), settings=None):
    def side(own, rest, other):
        own_results = {"cls_acc_test": own, "no_cls_acc": rest, "acc_train": None}
        return {dataset: {name: own_results}} | {o: {"all": {"all_ds": other}} for o in others}

    return {
        "final_results": side(after, 0.7, 0.5),
        "zero_shot": side(before, 0.8, 0.6),
        "solver": {"settings": settings or {"lamb_forget": 1.3}},
    }


def test_merging_keeps_what_is_there(tmp_path):
    store(tmp_path, "A", SETTINGS, "cat", entry())
    store(tmp_path, "A", SETTINGS, "cat|dog", entry(name="dog"))
    store(tmp_path, "B", SETTINGS, "x", entry("B", "x", others=("A",)))
    logs = read_logs(tmp_path)
    assert set(logs) == {"A", "B"} and set(logs["A"]) == {"settings", "cat", "cat|dog"}
    named = {
        "adapter": "A/cat.safetensors",
        "adapter_sha256": sha256_file(tmp_path / "A/cat.safetensors"),
    }
    assert logs["A"]["cat"] == entry() | {"solver": entry()["solver"] | named}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


def test_numbers_keep_full_precision(tmp_path):
    third = 1 / 3
    store(tmp_path, "A", SETTINGS, "cat", entry(before=third))
    assert read_logs(tmp_path)["A"]["cat"]["zero_shot"]["A"]["cat"]["cls_acc_test"] == third


WRITER = """
import sys
from tests.results_fixtures import store
folder, dataset = sys.argv[1:]
for number in range(25):
    entry = {"final_results": {dataset: {f"c{number}": {"cls_acc_test": 0.0, "no_cls_acc": 1.0}}}}
    store(folder, dataset, {"trainer": "T", "backbone": "b"}, f"c{number}", entry)
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in "AAB"
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    logs = read_logs(tmp_path)
    assert all(len(logs[name]) == 26 for name in "AB")


@pytest.mark.parametrize("key", ["trainer", "backbone"])
def test_results_of_another_kind_are_refused(tmp_path, key):
    store(tmp_path, "A", SETTINGS, "cat", entry())
    for dataset in ("A", "B"):
        with pytest.raises(ProblemError, match="another ATTEMPT"):
            check_folder(tmp_path, dataset, SETTINGS | {key: "other"})
        with pytest.raises(ProblemError, match="another ATTEMPT"):
            store(tmp_path, dataset, SETTINGS | {key: "other"}, "dog", entry())
    assert set(read_logs(tmp_path)) == {"A"}
    check_folder(tmp_path, "A", SETTINGS)


@pytest.mark.parametrize("name", ["logs.json", "args.txt", "audit.csv", "logs.json.lock"])
def test_no_set_is_called_as_a_file_of_the_folder(tmp_path, name):
    with pytest.raises(ProblemError, match=f"has a file {name}; call the data set otherwise"):
        check_folder(tmp_path, name, SETTINGS)


def test_other_weights_are_refused_for_the_same_data_set(tmp_path):
    store(tmp_path, "A", SETTINGS, "cat", entry())
    with pytest.raises(ProblemError, match="weights"):
        check_folder(tmp_path, "A", SETTINGS | {"weights": "def"})


def test_done_means_the_same_solver_settings_and_the_adapter_of_the_logs(tmp_path):
    store(tmp_path, "A", SETTINGS, "cat", entry())
    logs, same = read_logs(tmp_path), {"lamb_forget": 1.3}
    assert is_done(tmp_path, logs, "A", "cat", same)
    assert not is_done(tmp_path, logs, "A", "dog", same)
    with pytest.raises(ProblemError, match=r"lamb_forget 1\.3 -> 1\.1.*--overwrite"):
        is_done(tmp_path, logs, "A", "cat", {"lamb_forget": 1.1})
    path = tmp_path / "A" / "cat.safetensors"
    path.write_bytes(finished("A", "cat", entry(), scale=2.0).data)  # killed before the logs
    assert not is_done(tmp_path, logs, "A", "cat", same)
    path.unlink()
    assert not is_done(tmp_path, logs, "A", "cat", same)


def test_of_two_runs_with_other_settings_the_first_stays(tmp_path):
    store(tmp_path, "A", SETTINGS, "cat", entry())
    before = read_logs(tmp_path)
    other = entry(after=0.5, settings={"lamb_forget": 1.1})
    late = [finished("A", "cat", other, scale=2.0), finished("A", "dog", other, scale=3.0)]
    with pytest.raises(ProblemError, match="--overwrite"):
        merge_results(tmp_path, "A", SETTINGS, late)
    logs = read_logs(tmp_path)
    assert logs["A"]["cat"] == before["A"]["cat"] and "dog" in logs["A"]
    assert is_done(tmp_path, logs, "A", "cat", {"lamb_forget": 1.3})
    merge_results(tmp_path, "A", SETTINGS, late, overwrite=True)
    assert is_done(tmp_path, read_logs(tmp_path), "A", "cat", {"lamb_forget": 1.1})


@pytest.mark.parametrize("text", ['{"A": {"cat"', "", "[1, 2]", '{"A": 3}'])
def test_torn_logs_are_kept_aside(tmp_path, text):
    (tmp_path / "logs.json").write_text(text)
    with pytest.raises(ProblemError, match="is torn"):
        read_logs(tmp_path)
    assert (tmp_path / "logs.json").read_text() == text  # reading moves nothing
    with pytest.raises(ProblemError, match=r"kept as logs\.torn"):
        store(tmp_path, "A", SETTINGS, "cat", entry())
    (aside,) = tmp_path.glob("logs.torn-*.json")
    assert aside.read_text() == text
    store(tmp_path, "A", SETTINGS, "cat", entry())  # the next run starts anew
    assert aside.read_text() == text


def test_places_are_distinct_short_and_inside():
    names = ["C/V", "..", ".hidden", "a|b", r"a\|b", "x" * 400, "x" * 401, "CON", "naïve", "\ud800"]
    places = [place(name, name) for name in names]
    assert len(set(places)) == len(places)
    for name, text in zip(names, places, strict=True):
        folder, file = text.split("/")
        assert folder == file == place(name) and len(file) < 200 and not file.startswith(".")


@given(st.lists(st.text("ab|\\\n"), min_size=1))
def test_labels_tell_classes_apart(classes):
    assert split_label(join_label(classes)) == classes


def test_a_label_is_the_name_where_there_is_no_bar():
    assert join_label(["a", "b"]) == "a|b" and split_label("Pekinese|toy poodle")[1] == "toy poodle"
    assert join_label(["a|b"]) == r"a\|b" and split_label(r"x\y") == [r"x\y"]


def test_a_class_with_a_bar_and_two_classes_at_once(tmp_path):
    one, two = join_label(["a|b"]), join_label(["a", "b"])
    both = entry(name="a")
    for side in ("final_results", "zero_shot"):
        both[side]["A"]["b"] = both[side]["A"]["a"]
    store(tmp_path, "A", SETTINGS, one, entry(name="a|b"))
    store(tmp_path, "A", SETTINGS, two, both)
    logs, same = read_logs(tmp_path), {"lamb_forget": 1.3}
    assert len({logs["A"][label]["solver"]["adapter"] for label in (one, two)}) == 2
    assert all(is_done(tmp_path, logs, "A", label, same) for label in (one, two))
    assert create_results(tmp_path)[0].name.tolist() == [one]
    assert create_results(tmp_path, multiclass=True)[0].name.tolist() == [two]
    logs["A"][two] = logs["A"][one]  # as it was written before names with a bar were told apart
    with pytest.raises(ProblemError, match=r"classes \['a|b'\] -> \['a', 'b'\]"):
        is_done(tmp_path, logs, "A", two, same)


def test_args_keep_every_command_line_once(tmp_path):
    for line in ("Namespace(a=1)", "Namespace(a=2)", "Namespace(a=1)"):
        merge_args(tmp_path, line)
    assert (tmp_path / "args.txt").read_text().splitlines() == ["Namespace(a=2)", "Namespace(a=1)"]


@pytest.fixture
def folder(tmp_path):
    store(tmp_path, "A", SETTINGS, "cat", entry())
    store(tmp_path, "B", SETTINGS, "x", entry("B", "x", 1.0, 0.0, others=("A",)))
    both = entry()
    for side, value in (("final_results", 0.3), ("zero_shot", 0.5)):
        both[side]["A"]["dog"] = {"cls_acc_test": value, "no_cls_acc": 0.7, "acc_train": None}
    store(tmp_path, "A", SETTINGS, "cat|dog", both)
    merge_args(tmp_path, "Namespace(backbone='mini', seed=0, forget=['a', 'b'])")
    return tmp_path


def test_create_results_columns_and_values(folder):
    df, args = create_results(folder)
    assert list(df.columns) == [
        *("ds", "name", "full_Noforget", "cls_Noforget", "cls_forget", "full_forget"),
        *("res_B", "full_B", "res_A", "full_A"),
    ]
    row = df.set_index("name").loc["cat"]
    assert row.tolist()[:5] == ["A", 0.8, 0.9, 0.1, 0.7]
    assert (row.res_B, row.full_B) == (0.5, 0.6) and math.isnan(row.res_A)
    assert args.backbone == "mini" and args.seed == 0 and args.forget == ["a", "b"]


def test_create_results_of_multiclass(folder):
    df, _, logs = create_results(folder, multiclass=True, return_logs=True)
    assert df.name.tolist() == ["cat|dog"] and set(logs) == {"A", "B"}
    row = df.iloc[0]
    assert row.cls_forget == pytest.approx(0.2) and row.cls_Noforget == pytest.approx(0.7)
    assert row.cls_forget_all == {"cat": 0.1, "dog": 0.3}


def test_create_results_takes_any_spelling_of_the_folder(folder, monkeypatch):
    expected, _ = create_results(folder)
    monkeypatch.chdir(folder.parent)
    for spelling in (f"{folder}/", str(folder), folder.name, f"./{folder.name}/"):
        assert create_results(spelling)[0].equals(expected)


def test_wrong_rn_is_a_warning_with_the_right_one(folder):
    with pytest.warns(UserWarning, match="rn=False is right"):
        create_results(folder, rn=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_results(folder, rn=False)


@pytest.mark.parametrize("multiclass", [False, True])
def test_logs_of_the_papers_public_code(tmp_path, multiclass):
    """No zero_shot, no solver, no settings; args.txt is the text of a Namespace."""
    label = "Pekinese|toy poodle" if multiclass else "Pekinese"
    own = {
        name: {"cls_acc_test": acc, "no_cls_acc": 0.5, "acc_train": None}
        for name, acc in zip(label.split("|"), (0.1, 0.3), strict=False)
    }
    results = {"StanfordDogs": own, "Caltech101": {"all": {"all_ds": 0.85}}}
    logs = {"StanfordDogs": {label: {"final_results": results}}}
    (tmp_path / "logs.json").write_text(json.dumps(logs))
    (tmp_path / "args.txt").write_text("Namespace(backbone_arch='RN50', seed=0, lora_r=5)")
    with pytest.warns(UserWarning, match="before forgetting"):
        df, args = create_results(tmp_path, rn=True, multiclass=multiclass)
    assert df.cls_forget[0] == pytest.approx(0.2 if multiclass else 0.1)
    assert df.full_forget[0] == 0.5 and df.res_Caltech101[0] == 0.85
    assert df[["full_Noforget", "cls_Noforget", "full_Caltech101"]].isna().all().all()
    assert args.lora_r == 5


@pytest.mark.parametrize(
    ("content", "multiclass", "message"),
    [
        (None, False, "run forget_clip.sh"),
        (
            {"A": {"settings": {}, "cat": {"final_results": {"A": {"cat": {}}}}}},
            True,
            "no multiclass",
        ),
        ({"A": {"settings": {}}}, False, "no single-class"),
    ],
)
def test_a_folder_without_such_results_is_one_line(tmp_path, content, multiclass, message):
    if content is not None:
        (tmp_path / "logs.json").write_text(json.dumps(content))
    with pytest.raises(ProblemError, match=message):
        create_results(tmp_path, multiclass=multiclass)


def test_args_are_read_and_never_run(folder):
    (folder / "args.txt").write_text("Namespace(a=__import__('os').system('touch owned'))")
    with pytest.raises(ProblemError, match=r"args\.txt"):
        create_results(folder)
    assert not (folder / "owned").exists()


def test_avg_gain_is_the_mean_of_the_papers_five_numbers():
    import pandas as pd

    df = pd.DataFrame(
        {
            "ds": ["A"],
            "name": ["cat"],
            "full_Noforget": [0.8],
            "cls_Noforget": [0.5],
            "cls_forget": [0.1],  # a fifth is left
            "full_forget": [0.6],  # a quarter is lost
            "res_B": [0.5],
            "full_B": [0.4],  # a gain counts as 0
            "res_C": [0.45],
            "full_C": [0.5],  # a tenth is lost
            "res_D": [0.3],
            "full_D": [0.3],
        }
    )
    assert compute_avg_gain(df) == pytest.approx((0.2 + 0.25 + 0 + 0.1 + 0) / 5)


def test_avg_gain_works_for_any_sets(folder):
    df, _ = create_results(folder)
    cat = (0.1 / 0.9 + 0.1 / 0.8 + 0.1 / 0.6) / 3
    x = (0 + 0.1 / 0.8 + 0.1 / 0.6) / 3
    assert compute_avg_gain(df) == pytest.approx((cat + x) / 2)


def test_reading_results_loads_nothing_heavy():
    code = "import sys, utils; print({'torch', 'matplotlib', 'pandas'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'pandas'}"


def test_plot_and_summary(folder):
    from PIL import Image

    df, _ = create_results(folder)
    table = summarise(df)
    assert table["class after"].tolist() == [10.0, 0.0]
    assert table["others before"].tolist() == [60.0, 60.0]
    path = plot_results(df, folder / "picture.png")
    with Image.open(path) as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(1 << 20)) > 50


def many_logs(count):
    """Logs of that many classes; of the last two most is left, the third last harms most."""
    names = [f"class {number}" for number in range(count)]
    logs = {"A": {name: entry(name=name, after=0.0) for name in names}}
    for name, left, rest in ((names[-3], 0.0, 0.1), (names[-2], 0.2, 0.7), (names[-1], 0.3, 0.8)):
        logs["A"][name]["final_results"]["A"][name] = {"cls_acc_test": left, "no_cls_acc": rest}
    return logs


def test_of_many_rows_the_worst_are_drawn_in_their_order(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

    drawn, titles = [], []
    monkeypatch.setattr(Axes, "set_yticks", lambda axis, places, names, **_: drawn.append(names))
    monkeypatch.setattr(Figure, "suptitle", lambda figure, text: titles.append(text))
    for count in (2500, 60):
        (tmp_path / "logs.json").write_text(json.dumps(many_logs(count)))
        df, _ = create_results(tmp_path)
        with Image.open(plot_results(df, tmp_path / "picture.png")) as image:
            assert image.height < 2500
    few, everything = drawn
    assert len(few) == 60 and list(few)[-3:] == [f"A: class {n}" for n in (2497, 2498, 2499)]
    assert list(few)[:2] == ["A: class 0", "A: class 1"]  # among equals the first
    assert list(everything) == [f"A: class {n}" for n in range(60)]
    (title,) = titles  # nothing is left out of 60
    assert title.startswith("the 60 of 2,500 rows with most left")


def test_methods_side_by_side(tmp_path):
    for name, left in (("one", 0.1), ("other", 0.4)):
        logs = {"A": {"cat": entry(after=left), "dog": entry(name="dog")}}
        logs["A"]["cat"]["solver"]["seconds"] = 2 * left
        if name == "other":
            del logs["A"]["dog"]
        (tmp_path / name).mkdir()
        (tmp_path / name / "logs.json").write_text(json.dumps(logs))
    table = compare_results({name: tmp_path / name for name in ("one", "other")})
    assert table["forgotten"].tolist() == ["cat"]
    row = table.iloc[0]
    assert (row["class before"], row["class one"], row["class other"]) == (90.0, 10.0, 40.0)
    assert (row["seconds one"], row["seconds other"]) == (0.2, 0.8)
    assert plot_comparison(table, tmp_path / "picture.png").stat().st_size > 5000


def test_equal_methods_do_not_hide_each_other_and_losses_have_their_own_scale(
    tmp_path, monkeypatch
):
    from matplotlib.axes import Axes

    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        logs = {"A": {"cat": entry(), "dog": entry(name="dog")}}
        (tmp_path / name / "logs.json").write_text(json.dumps(logs))
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
    (low, high), *losses = limits
    assert (low, high) == (-3, 103)
    lost = [table["rest before"] - table["rest one"], table["others before"] - table["others one"]]
    for (low, high), points in zip(losses, lost, strict=True):
        assert low < min(0, points.min()) and max(1, points.max()) < high < 1.1 * max(
            1, points.max()
        )


def test_one_folder_holds_one_precision(tmp_path):
    """Embeddings of two precisions make no table, of whichever data sets."""
    kept = {"backbone": "mini", "trainer": "ForgetExact", "precision": "bf16"}
    (tmp_path / "logs.json").write_text(json.dumps({"MiniDigits": {"settings": kept}}))
    check_folder(tmp_path, "MiniShapes", kept)
    with pytest.raises(ProblemError, match="precision 'bf16', this run has 'fp32'"):
        check_folder(tmp_path, "MiniShapes", kept | {"precision": "fp32"})
