"""Many runs: in order or by Ray, in parts, with a worker killed; everywhere the same results."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
import utils
from clip import spread
from clip.bundle import bundle_path
from clip.cache import FeatureCache
from clip.features import build_bundle
from clip.source import ClipSource
from engine.cli import Parser
from engine.config import settings
from engine.files import sha256_file
from engine.launch import Run, add_launcher, launch, launcher, tree
from evaluation.report import read_runs
from evaluation.results import read_logs
from forgetting import load_adapter
from forgetting.errors import ProblemError
from tests.conftest import BACKBONE, TOY_CLASSES, toy_bundle
from tests.test_kills import no_leftovers, without_seconds
from utils import create_results

RAY = ["LAUNCHER.NAME", "ray"]
CLASSES = {"ToyAnimals": 6, "ToyTools": 4}
SLOW = ["TRAINER.FORGETASCENT.STEPS", "1500", "TRAINER.FORGETASCENT.LR", "1e-12"]


@pytest.fixture(scope="module")
def workers() -> Iterator[object]:
    """A Ray of two workers, started as the launcher does it."""
    pytest.importorskip("ray", reason="needs Ray: pip install -r requirements-ray.txt")
    from engine.cluster import cluster

    with cluster(cores=2) as ray:
        yield ray


@pytest.fixture
def command(features: Path, tmp_path: Path) -> list[str]:
    """Every class of a set of six and of one of four; append a method and an output folder."""
    return [
        *("--datasets", "ToyAnimals,ToyTools", "--features", str(features)),
        *("--backbone", BACKBONE, "--cache", str(tmp_path / "cache"), "--forget", "all"),
    ]


def how(*pairs: str):
    return settings(opts=pairs).LAUNCHER


def adapters(folder: Path) -> dict[str, str]:
    """Every adapter below a folder, and its SHA-256."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def accuracies(folder: Path) -> dict:
    return {
        dataset: {label: entry.get("final_results", entry) for label, entry in entries.items()}
        for dataset, entries in read_logs(folder).items()
    }


# One after the other


def told(argv: list[str]) -> int:
    print(f"ran {argv[0]}")
    return int(argv[1])


TOLD = f"{__name__}:told"


def runs(*statuses: int) -> list[Run]:
    return [Run(f"run-{i}", [f"{i}", f"{status}"], "") for i, status in enumerate(statuses)]


def test_runs_are_shown_and_those_that_fail_named(capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", iter([0.0, 61.0, 90.0]).__next__)
        failed = launch(TOLD, runs(0, 2, 0), how())
    assert [run.title for run in failed] == ["run-1"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0::2] == [
        "== run-0 (run 1 of 3)",
        "== run-1 (run 2 of 3, 2:02 left)",
        "== run-2 (run 3 of 3, 0:45 left)",
    ]
    assert lines[1::2] == ["ran 0", "ran 1", "ran 2"]
    launch(TOLD, runs(0), how())
    assert capsys.readouterr().out.splitlines()[0] == "== run-0"


def mistaken(argv: list[str]) -> int:
    return told(argv) if argv[0] == "1" else {}["nothing"]


def test_a_mistake_of_ours_is_shown_whole_and_stops_no_other(capsys):
    assert [run.title for run in launch(f"{__name__}:mistaken", runs(0, 0), how())] == ["run-0"]
    captured = capsys.readouterr()
    assert "KeyError: 'nothing'" in captured.err and "ran 1" in captured.out


def test_an_interrupted_run_is_the_last(capsys):
    with pytest.raises(SystemExit) as left:
        launch(TOLD, runs(0, 130, 0), how())
    assert left.value.code == 130 and "ran 2" not in capsys.readouterr().out


def test_without_ray_one_line_says_what_to_install(command, tmp_path, monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "ray", None)
    line = refused([*command, "--output-dir", str(tmp_path / "out"), *RAY])
    assert "pip install -r requirements-ray.txt" in line and not (tmp_path / "out").exists()
    parser = Parser()
    add_launcher(parser)  # as `clip.features` and `experiments sweep` do
    with pytest.raises(ProblemError, match=r"requirements-ray\.txt"):
        launcher(parser.parse_args(["--launcher", "ray"]))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["LAUNCHER.NAME", "slurm"], "LAUNCHER.NAME 'slurm'"),
        (["LAUNCHER.PARTS", "0"], "LAUNCHER.PARTS must be a whole number from 1"),
    ],
)
def test_a_launcher_that_is_none_is_refused(command, tmp_path, refused, pairs, message):
    line = refused([*command, "--output-dir", str(tmp_path / "out"), *pairs])
    assert message in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/2/3"])
def test_a_part_that_is_none_is_refused(toy_args, refused, part):
    line = refused([*toy_args, "--forget", "all", "FORGET.PART", part])
    assert "FORGET.PART must be i/n" in line


@pytest.mark.parametrize("trainer", ["ForgetExact", "ForgetLoRA", "ForgetUCE"])
def test_parts_of_a_set_have_the_ridge_and_the_results_of_all_of_it(command, tmp_path, trainer):
    """The ridge is part of the solver's settings, which every label of a folder must share."""
    steps = ["TRAINER.FORGETLORA.STEPS", "50", "TRAINER.FORGETLORA.MAX_TRIALS", "1"]
    command = [*command, "--trainer", trainer, *steps]
    train.main([*command, "--output-dir", str(tmp_path / "whole")])
    train.main([*command, "--output-dir", str(tmp_path / "parts"), "LAUNCHER.PARTS", "4"])
    whole, parts = (tmp_path / name / "seed_0" for name in ("whole", "parts"))
    assert accuracies(whole) == accuracies(parts)
    for dataset, entries in read_logs(whole).items():
        for label in entries.keys() - {"settings"}:
            own, other = (
                load_adapter(folder / entry["solver"]["adapter"])
                for folder, entry in ((f, read_logs(f)[dataset][label]) for f in (whole, parts))
            )
            assert own.solver["settings"] == other.solver["settings"]
            assert torch.allclose(own.delta(), other.delta(), rtol=0, atol=1e-6)


def test_the_tree_keeps_its_parts_in_order():
    shown = tree("abcde", str, lambda a, b: f"({a}{b})")
    assert shown == "((ab)(c(de)))" and tree(["a"], str, str.__add__) == "a"


def test_several_methods_and_backbones_have_a_folder_each(features, tmp_path, capsys):
    for name in TOY_CLASSES:
        other = replace(toy_bundle(name), backbone="RN50")
        other.save(bundle_path(features, "RN50", name))
    args = ["--features", str(features), "--dataset", "ToyTools", "--forget", "saw"]

    def run(out: str, *lists: str) -> dict[str, str]:
        train.main([*args, *lists, "--seeds", "0,1", "--output-dir", str(tmp_path / out)])
        return {p.rpartition("/ToyTools")[0]: sha for p, sha in adapters(tmp_path / out).items()}

    alone = {
        f"{backbone.replace('/', '-')}/{method}/{place}": sha
        for backbone in ("RN50", BACKBONE)
        for method in ("ForgetNoise", "ForgetExact")
        for place, sha in run(f"{method}{backbone}", *one(backbone, method)).items()
    }
    both = run("both", "--backbones", f"RN50, {BACKBONE}", "--trainers", "ForgetNoise,ForgetExact")
    assert both == alone and len(both) == 2 * 2 * 2
    out = capsys.readouterr().out
    assert f"== ToyTools, {BACKBONE}, ForgetExact, seed 1 (run 8 of 8" in out
    assert f'create_results("{tmp_path}/both/RN50/ForgetNoise/seed_0/", rn=True, mul' in out
    assert f'create_results("{tmp_path}/both/ViT-B-32/ForgetNoise/seed_0/", rn=False, mul' in out
    methods = run("methods", "--trainers", "ForgetNoise,ForgetExact", "--backbone", "RN50")
    assert methods == {p.removeprefix("RN50/"): s for p, s in both.items() if p.startswith("RN50")}
    # What reads results takes them for several folders.
    root = tmp_path / "both"
    assert {run.name for run in read_runs(root)} == set(both)
    for backbone in ("RN50", "ViT-B-32"):
        utils.main([str(root / place) for place in both if place.startswith(backbone)])
    assert capsys.readouterr().out.count(" over 2") == 4, "seeds of a method are one"
    with pytest.raises(ProblemError, match=r"did you mean .*/both/RN50/ForgetExact/seed_0 or"):
        create_results(root)


def one(backbone: str, method: str) -> list[str]:
    return ["--backbones", backbone, "--trainers", method]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--trainers", "ForgetNoise,ForgetExat"], "did you mean 'ForgetExact'"),
        (["--trainers", "ForgetNoise", "TRAINER.NAME", "x"], "TRAINER.NAME is set for each run"),
        (["--seeds", "0", "SEED", "2"], "SEED is set for each run and cannot be set beside that"),
        (["DATASET.NAME", "ToyTools"], "DATASET.NAME is set for each run"),
        (["OUTPUT_DIR", "x"], "OUTPUT_DIR is set for each run"),
        (["LAUNCHER.PARTS", "2", "FORGET.PART", "1/2"], "FORGET.PART is set for each run"),
        (["--seeds", "0,99999999999"], "SEED must be a whole number"),
        (["--datasets", "ToyAnimals,ToyTool"], "did you mean 'ToyTools'"),
        (["--features", "", "--datasets", "MiniDigits,MiniDigit"], "did you mean 'MiniDigits'"),
        (["--backbones", "RN50,mini", "--weights", "RN50.pt"], "--weights is of one backbone"),
        (["--features", "", "--backbones", "RN50,minni"], "did you mean 'mini'"),
    ],
)
def test_lists_that_cannot_be_run_are_refused_first(command, tmp_path, refused, extra, message):
    line = refused([*command, "--output-dir", str(tmp_path / "out"), *extra])
    assert message in line and not (tmp_path / "out").exists()


# By Ray


def test_ray_gives_the_results_of_one_process_bit_for_bit(workers, command, tmp_path, capsys):
    command = [*command, "--trainers", "ForgetExact,ForgetNoise", "--seeds", "0,1"]
    train.main([*command, "--output-dir", str(tmp_path / "here")])
    capsys.readouterr()
    train.main([*command, "--output-dir", str(tmp_path / "ray"), *RAY])
    assert adapters(tmp_path / "here") == adapters(tmp_path / "ray")
    for place in ("ForgetExact/seed_0", "ForgetNoise/seed_1"):
        here, ray = (without_seconds(read_logs(tmp_path / n / place)) for n in ("here", "ray"))
        assert here and here == ray
    out = capsys.readouterr().out
    assert "ray: 8 runs, 2 at once" in out and "(run 8 of 8)" in out
    assert "ToyTools / saw" in out and f"results: {tmp_path}/ray/ForgetExact/seed_1" in out


def test_one_run_that_fails_on_a_worker_stops_no_other(workers, command, tmp_path, capsys):
    argv = [*command, "--trainer", "ForgetUCE", "--output-dir", str(tmp_path / "out"), *RAY]
    argv[argv.index("--forget") + 1] = "saw"  # which the first set lacks
    assert train.cli(argv) == 2
    assert set(read_logs(tmp_path / "out/seed_0")) == {"ToyTools"}
    errors = capsys.readouterr().err.splitlines()
    assert "no class 'saw'" in errors[0]
    assert errors[1:] == [f"error: failed: ToyAnimals, {BACKBONE}, seed 0; see the messages above"]


def noted(argv: list[str]) -> int:
    """A run that leaves its process's number in the folder of its results."""
    folder, dataset = (Path(argv[argv.index(key) + 1]) for key in ("--output-dir", "--dataset"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"process-{dataset}-{os.getpid()}-{time.monotonic_ns()}").touch()
    return train.cli(argv)


def test_a_killed_worker_s_run_goes_on_at_its_class(workers, command, tmp_path, monkeypatch):
    """SIGKILL once the first class is written, to a run that is not at its end; with another worker
    at work beside it."""
    command = [*command, "--trainer", "ForgetAscent", *SLOW]
    train.main([*command, "--output-dir", str(tmp_path / "whole")])
    monkeypatch.setattr(train, "COMMAND", f"{__name__}:noted")
    folder, killed = tmp_path / "ray/seed_0", []

    def kill() -> None:
        while not killed:
            time.sleep(0.01)
            logs = read_logs(folder)
            begun = [path.name.split("-") for path in folder.glob("process-*")]
            for _, dataset, process, _ in begun if logs else ():
                if len(logs.get(dataset, ())) < 1 + CLASSES[dataset]:  # beside its settings
                    killed.extend(label for entries in logs.values() for label in entries)
                    return os.kill(int(process), signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    train.main([*command, "--output-dir", str(tmp_path / "ray"), *RAY])
    thread.join(timeout=1)
    assert 2 <= len(killed) < 11, "in the middle: settings and some of ten classes"
    assert len(list(folder.glob("process-*"))) == 3, "two runs, one of them begun again"
    assert adapters(tmp_path / "ray") == adapters(tmp_path / "whole")
    no_leftovers(folder)


def hopeless(argv: list[str]) -> int:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_run_whose_worker_always_dies_is_named(workers, capsys):
    failed = launch(f"{__name__}:hopeless", runs(0), how(*RAY, "LAUNCHER.TRIES", "1"))
    assert [run.title for run in failed] == ["run-0"]
    captured = capsys.readouterr()
    assert captured.err.startswith("error: run-0: ") and captured.err.count("\n") == 1


def test_more_than_any_machine_has_is_refused(workers, command, tmp_path, refused):
    line = refused([*command, "--output-dir", str(tmp_path / "out"), *RAY, "LAUNCHER.CPUS", "512"])
    assert "no machine of Ray has 512 CPU" in line and not (tmp_path / "out").exists()


class Dying(spread.Encoder):
    """A worker that dies once, after its shard is written and before it says so."""

    def __call__(self, batch):
        found = super().__call__(batch)
        mark = self.cache.root / "died"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return found


@pytest.mark.slow
def test_images_by_ray_are_those_of_one_process_and_a_lost_shard_is_done_again(
    workers, tmp_path, monkeypatch
):
    monkeypatch.setattr("clip.cache.SHARD", 64)
    monkeypatch.setattr(spread, "Encoder", Dying)

    def bundle(cache: str, *pairs: str):
        source = ClipSource("mini", cache=tmp_path / cache)
        return build_bundle(
            "MiniShapes",
            source,
            tmp_path / "data",
            tmp_path / cache,
            batch_size=32,
            how=how(*pairs),
        )

    here, ray = bundle("here"), bundle("ray", *RAY)
    assert (tmp_path / "ray/died").exists()
    assert torch.allclose(here.image_features, ray.image_features, rtol=0, atol=1e-6)
    assert torch.equal(here.class_hidden, ray.class_hidden)
    assert not list((tmp_path / "ray").rglob("*.parts"))
    no_leftovers(tmp_path / "ray")
    with monkeypatch.context() as patched:
        patched.setattr(FeatureCache, "encode", None)  # nothing is encoded again
        assert torch.equal(bundle("ray", *RAY).image_features, ray.image_features)
    broken = sorted((tmp_path / "data").rglob("test/*/*.png"))[0]
    broken.write_bytes(b"no image")
    with pytest.raises(ProblemError, match=f"image {broken} cannot be read"):
        bundle("broken", *RAY)
