"""Runs of studies: rows that are never made twice, mistakes refused before work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO

import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clip.bundle import bundle_path
from engine.config import paper_weights
from experiments import studies
from experiments.__main__ import cli
from experiments.rows_file import KEY, RowsFile
from experiments.solvers import SOLVERS
from experiments.studies import main
from experiments.study_report import plot
from experiments.varied import STUDIES
from experiments.world import World
from forgetting.errors import ProblemError
from tests.conftest import BACKBONE, REPOSITORY, toy_bundle
from tests.test_experiments_studies import EXACT, command, quick, rows_of, with_audit

__all__ = ["quick"]  # the fixture, which every test here uses


# Rows


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The settings of every solve from now on."""
    calls: list[str] = []
    for name, solve in list(SOLVERS.items()):

        def counting(world, group, solve=solve):
            calls.extend(here.setting for here in group)
            return solve(world, group)

        monkeypatch.setitem(studies.SOLVERS, name, counting)
    return calls


def test_rows_that_exist_are_not_made_again(features, tmp_path, monkeypatch, capsys):
    calls = counted(monkeypatch)
    main(command(features, tmp_path, "targets", *EXACT))
    path = tmp_path / "ViT-B-32" / "ToyAnimals" / "targets.csv"
    before = path.read_bytes()
    assert len(calls) == 2 * 2 * 7
    main(command(features, tmp_path, "targets", *EXACT))
    assert len(calls) == 28 and path.read_bytes() == before
    assert "0 of 28 rows are new" in capsys.readouterr().out
    lines = before.decode().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]))  # a run that ended early
    main(command(features, tmp_path, "targets", *EXACT))
    assert len(calls) == 31
    old, new = (
        pd.read_csv(StringIO(text)).set_index(KEY).drop(columns=["seconds", "gap"]).sort_index()
        for text in (before.decode(), path.read_text())
    )  # a gap is rounding
    pd.testing.assert_frame_equal(new, old, rtol=1e-9)
    main(command(features, tmp_path, "targets", *EXACT, "--seed", "1"))
    assert set(rows_of(tmp_path, "targets")["seed"]) == {0, 1}


def test_other_bundles_make_other_rows(features, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    main(command(features, tmp_path, "spectrum", *EXACT))
    path = bundle_path(features, BACKBONE, "ToyTools")
    path.unlink()
    bundle = toy_bundle("ToyTools")
    replace(bundle, forget_hidden=bundle.forget_hidden * 1.1).save(path)
    main(command(features, tmp_path, "spectrum", *EXACT))
    assert len(calls) == 12 and rows_of(tmp_path, "spectrum")["constants"].nunique() == 2


def test_a_killed_run_leaves_whole_rows(features, tmp_path, monkeypatch):
    """SIGKILL once rows are written; the second call makes only the rest."""
    argv = command(features, tmp_path / "out", "targets", *EXACT, "--classes", "4")
    at_once = "from engine.files import Batch; Batch.INTERVAL = 0.0; Batch.SHARE = 0"
    start = "import sys; from experiments.studies import main; main(sys.argv[1:])"
    line = [sys.executable, "-c", f"{at_once}; {start}", *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, cwd=REPOSITORY, env=env, stderr=subprocess.DEVNULL)
    path = tmp_path / "out" / "ViT-B-32" / "ToyAnimals" / "targets.csv"
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = RowsFile(path).read()
    assert 1 <= len(rows) < 4 * 14
    assert (rows[["norm", "seconds"]] != "").all(axis=None)
    calls = counted(monkeypatch)
    main(argv)
    assert len(calls) == 4 * 14 - len(rows)
    pd.testing.assert_frame_equal(RowsFile(path).read()[: len(rows)], rows)


def test_names_that_look_like_numbers_or_nothing_stay_names(tmp_path):
    table = RowsFile(tmp_path / "a.csv")
    names = ["NA", "2012", "a, b", 'the "best"', "two\nlines", "nan", "", "None"]
    more = {"norm": 0.1 + 0.2, "auto": True, "trials": 1}
    for some in (names[:3], names[3:]):
        table.add([dict.fromkeys(KEY, "x") | {"classes": name} | more for name in some])
    keys = [("x", "x", name, "x", "x", "x", "x") for name in names]
    frame = table.frame(keys)
    assert frame["classes"].tolist() == names and (frame["norm"] == 0.1 + 0.2).all()
    assert set(table.read()["trials"]) == {"1"} and set(table.read()["auto"]) == {"True"}
    table.add([dict.fromkeys(KEY, "x") | {"classes": "NA", "norm": 9.0}])  # the first stays
    assert len(table.read()) == len(names) and table.read()["norm"][0] == repr(0.1 + 0.2)


@pytest.mark.parametrize("whole", [0, 1])
@pytest.mark.parametrize("damage", ["too,few\n", "x," * 9 + "y\n", '"open\n', "\x00\n"])
def test_a_damaged_table_is_refused(whole, damage, tmp_path):
    table = RowsFile(tmp_path / "a.csv")
    table.path.write_text(f"{','.join(KEY)}\n" + f"{'x,' * 6}x\n" * whole)
    assert len(table.read()) == whole
    with table.path.open("a") as file:
        file.write(damage)
    with pytest.raises(ProblemError, match="move it aside"):
        table.read()


# What a user sees


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_from_the_command_line(name, features, tmp_path, capsys, monkeypatch):
    pictured = name in ("terms", "spectrum")
    if pictured:
        monkeypatch.setattr(studies, "plot", plot)
    assert cli(["studies", *command(features, tmp_path, name, *EXACT)]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "ViT-B-32" / "ToyAnimals"
    assert f"{name} on ToyAnimals" in out and str(folder / f"{name}.csv") in out
    if pictured:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(tmp_path, name)
    assert rows["forgotten_before"].min() > 0.9 and rows["seconds"].min() > 0
    assert (rows["gap"].astype(float) < 1e-9).all()
    assert set(rows["solver"]) == {"optimum", "constrained"}


def test_sets_without_images_are_studied_all_the_same(tmp_path):
    """Text only, no other set: accuracies stay empty, the rest is measured."""
    bundle = toy_bundle("ToyAnimals", images_per_class=0)
    bundle.save(bundle_path(tmp_path / "texts", BACKBONE, "ToyAnimals"))
    for name in ("rank", "templates", "spectrum", "targets"):
        main(command(tmp_path / "texts", tmp_path, name, *EXACT))
    rows = rows_of(tmp_path, "targets")
    assert (rows["forgotten_after"] == "").all() and (rows["others_after"] == "").all()
    assert (rows["carry"].astype(float) > 0.5).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "retaind"}, "unknown study 'retaind'; did you mean 'retained'"),
        ({"--dataset": "ToyAnimal"}, "data sets there: ToyAnimals"),
        ({"--backbone": "RN5"}, "no feature bundle of RN5"),
        ({"--forget": "dgo"}, "nearest: 'Dog'"),
        ({"--solver": "optimal"}, "did you mean 'optimum'"),
        ({"--classes": "7"}, "ToyAnimals has 6 classes"),
        ({"--classes": "0"}, "--classes: must be a whole number from 1"),
        ({"--seed": "-1"}, "--seed: must be a whole number from 0"),
        ({"--features": "nowhere"}, "no folder of feature bundles at nowhere"),
        ({"--targets": "x"}, "unknown option '--targets'"),
    ],
)
def test_mistakes_are_refused_in_one_line_before_work(change, message, features, tmp_path, capsys):
    options = {"name": "terms", "--features": str(features), "--dataset": "ToyAnimals"} | change
    argv = [options.pop("name"), *(text for pair in options.items() for text in pair)]
    assert cli(["studies", *argv, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1 and error.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_table_is_left_alone(features, tmp_path, capsys):
    path = tmp_path / "ViT-B-32" / "ToyAnimals" / "terms.csv"
    path.parent.mkdir(parents=True)
    path.write_text("my,own,notes\n1,2,3\n")
    assert cli(["studies", *command(features, tmp_path, "all", *EXACT)]) == 2
    assert "is no table of a study (no column 'study')" in capsys.readouterr().err
    assert path.read_text() == "my,own,notes\n1,2,3\n" and len(list(path.parent.iterdir())) == 1


def test_audit_lists_that_do_not_fit_are_refused(tmp_path, capsys):
    path = bundle_path(tmp_path / "texts", BACKBONE, "ToyAnimals")
    with_audit().save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"audit_kinds": '["template"]'}
    save_file(load_file(path), path, metadata)
    assert cli(["studies", *command(tmp_path / "texts", tmp_path / "out", "templates")]) == 2
    error = capsys.readouterr().err
    assert "ToyAnimals.safetensors: audit_kinds has 1 entries" in error
    assert not (tmp_path / "out").exists()


def test_a_backbone_without_weights_of_its_own_takes_those_of_any():
    world = World(replace(toy_bundle("ToyAnimals"), backbone="mini"), {})
    unlisted = world.paper[False].FORGET.UNLISTED
    assert paper_weights(world.paper[False])["lamb_preserve"] == unlisted.LAMB_PRESERVE


def test_plots_of_descents_and_of_several_classes(tmp_path):
    """All solvers, several classes and cells that are empty draw without a complaint."""
    base = {"classes": "a", "auto": "", "others_worst": -0.1} | {
        f"{name}_{side}": 0.5
        for name in ("forgotten", "rest", "others")
        for side in ("before", "after")
    }
    rows = [
        base | {"solver": solver, "setting": f"rank {n}", "place": n, "carry": 0.9, "classes": c}
        for solver in SOLVERS
        for n in (1.0, 5.0)
        for c in ("a", "b", "a|b")
    ]
    for name in ("rank", "targets"):
        plot(name, STUDIES[name], pd.DataFrame(rows), tmp_path / f"{name}.png")
        assert 1_000 < (tmp_path / f"{name}.png").stat().st_size < 60_000


def test_numbers_of_an_axis_do_not_touch(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    columns = ("forgotten", "rest", "others")
    base = {f"{name}_{side}": 0.5 for name in columns for side in ("before", "after")}
    base |= {"classes": "a", "auto": "", "others_worst": -0.1, "carry": 0.9, "solver": "optimum"}
    places = [0.0, 10.0, 30.0, 1000.0, 1386.0]
    rows = [base | {"setting": f"{place:g}", "place": place} for place in places]
    ticks = []
    draw = Axes.set_xticks
    monkeypatch.setattr(
        Axes,
        "set_xticks",
        lambda axis, at, names: ticks.append(sorted(at)) or draw(axis, at, names),
    )
    plot("count", STUDIES["count"], pd.DataFrame(rows), tmp_path / "count.png")
    assert ticks == [[0.0, 10.0, 30.0, 1386.0]] * 4
