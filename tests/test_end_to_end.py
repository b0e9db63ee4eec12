"""The real command line, from `sh forget_clip.sh` to a DataFrame of its own results; then train.py
in process: results, skipping, resuming, options."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import forgetting.cli
import train
from clip.architectures import ARCHITECTURES
from clip.source import ClipSource
from evaluation.results import read_logs as logs_of
from forgetting import Forgotten
from forgetting.adapter import load_adapter
from forgetting.deploy.export import export
from tests.clip_fixtures import caltech, save_openai
from tests.conftest import BACKBONE, REPOSITORY, accuracies, refuses, toy_bundle, toy_line
from trainers import inputs
from utils import create_results


def run_driver(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    places = {"OUT": str(out), "DATA": str(out.parent / "data"), "CACHE": str(out.parent / "cache")}
    env = os.environ | {"PYTHON": sys.executable} | places | environment
    command = ["sh", str(REPOSITORY / "forget_clip.sh"), *arguments]
    return subprocess.run(command, env=env, text=True, capture_output=True)


def test_mini_from_the_shell_to_a_data_frame(tmp_path, monkeypatch):
    """From another working directory; the results are loaded by the line that the driver prints."""
    monkeypatch.chdir(tmp_path)
    arguments = ["7", "0", "MiniDigits, MiniShapes", "mini", "0"]
    done = run_driver(tmp_path / "out", *arguments)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("from utils"))
    namespace: dict = {}
    exec(line, namespace)
    df, args = namespace["df"], namespace["args"]
    assert set(df.ds) == {"MiniDigits", "MiniShapes"} and len(df) >= 6
    assert args.backbone == "mini" and args.multiclass is False
    assert (df.cls_Noforget >= 0.8).all() and (df.full_Noforget >= 0.9).all()
    assert df.cls_forget.mean() < 0.3 and (df.full_forget - df.full_Noforget).mean() > -0.1
    for other in ("MiniLetters", "MiniSymbols"):
        assert df[f"res_{other}"].notna().all()
    again = run_driver(tmp_path / "out", *arguments).stdout
    assert len(re.findall(r"done before, skipped: \w+, 3 of 3", again)) == len(df) / 3 == 2


def test_jpegs_and_a_random_rn50_checkpoint(tmp_path):
    """Caltech101's layout, OpenAI's checkpoint format, which the changed model is exported to."""
    weights = tmp_path / "RN50.pt"
    save_openai("RN50", weights)
    caltech(tmp_path / "data", 2, ["euphonium", "minaret", "platypus"])
    options = ["--weights", str(weights), "--forget", "minaret"]
    keys = ["TRAINER.FORGETLORA.STEPS", "40", "TRAINER.FORGETLORA.MAX_TRIALS", "2"]
    done = run_driver(tmp_path / "out", "1", "0", "Caltech101", "RN50", "0", *options, *keys)
    assert done.returncode == 0, done.stderr
    assert "not evaluated: StanfordDogs" in done.stdout
    folder = tmp_path / "out/results1/seed_0"
    df, _ = create_results(folder, rn=True)
    assert df.name.tolist() == ["minaret"] and list(df.columns)[-1] == "full_forget"
    adapter, out = load_adapter(folder / "Caltech101/minaret.safetensors"), tmp_path / "changed.pt"
    export(adapter, weights, "openai", out)
    assert adapter.left.shape == (512, 5) and adapter.right.shape == (5, 1024)
    changed = ClipSource("RN50-quickgelu", out, tmp_path / "cache")
    original = ClipSource("RN50", weights, tmp_path / "cache")
    assert torch.allclose(changed.projection, adapter.apply(original.projection), atol=1e-6)
    assert ARCHITECTURES["RN50"].sha256 != changed.weights_sha256


@pytest.fixture(scope="module")
def mini_args(tmp_path_factory) -> list[str]:
    """A quick command line on MiniDigits, whose images are encoded once; it lacks --output-dir."""
    folder = tmp_path_factory.mktemp("mini")
    places = ["--root", str(folder / "data"), "--cache", str(folder / "cache")]
    return ["--dataset", "MiniDigits", "--backbone", "mini", "--forget", "digit two", *places]


def test_a_finished_run_encodes_nothing_and_reads_no_features(mini_args, tmp_path, monkeypatch):
    argv = [*mini_args, "--trainer", "ForgetExact", "--output-dir", str(tmp_path)]
    assert train.cli(argv) == 0
    for name in ("build_bundle", "FeatureCache"):
        monkeypatch.setattr(inputs, name, None)
    assert train.cli(argv) == 0
    with pytest.raises(TypeError):  # negative control: a run that has work to do
        train.main([*argv, "--overwrite"])


def test_cards_quote_the_audit_of_this_very_adapter(mini_args, tmp_path):
    argv = [*mini_args, "--trainer", "ForgetExact", "--output-dir", str(tmp_path)]
    path = tmp_path / "MiniDigits/digit two.safetensors"
    audit, base = path.with_suffix(".audit.json"), ARCHITECTURES["mini"].weights
    command = ["export", str(path), "--base", str(base), "--config", str(base.with_suffix(".json"))]
    command += ["--to", "open_clip", "--overwrite", "--out", str(tmp_path / "out")]

    def cards() -> list[str]:
        assert forgetting.cli.cli(command) == 0
        Forgotten.load(path).save_pretrained(tmp_path / "to", overwrite=True)
        places = f"{path}.md", tmp_path / "out/README.md", tmp_path / "to/README.md"
        return [Path(place).read_text("utf-8") for place in places]

    assert train.cli([*argv, "--audit"]) == 0
    quoted = json.loads(audit.read_bytes())["classes"]["digit two"]["verdict"]
    assert all(f"audit of `digit two`: `{line}`" in card for line in quoted for card in cards())
    assert train.cli([*argv, "--overwrite"]) == 0 and audit.exists()
    assert all("100.0% right before" in card and "audit of" not in card for card in cards())
    audit.write_text("[1]")
    assert len(cards()) == 3


def test_names_of_ones_own_are_retained_instead_of_the_vocabulary(mini_args, tmp_path, features):
    names = tmp_path / "names.txt"
    names.write_text("# mine\nsecond hand of a clock\nhouse\nhouse\ndigit_two\n")
    argv = [*mini_args, "--trainer", "ForgetOptimum", "FORGET.RETAIN_NAMES", str(names)]
    folder = train.main([*argv, "--output-dir", str(tmp_path / "mini")])
    solver = json.loads((folder / "logs.json").read_text())["MiniDigits"]["digit two"]["solver"]
    assert solver["retained"] == 2 and solver["excluded"] == ["digit two"]
    names.write_text("house\n")
    refuses("vocabulary_sha256", train.main, [*argv, "--output-dir", str(tmp_path / "mini")])
    # Without a model the bundle's names can be chosen from.
    toy = toy_line(tmp_path, "--trainer", "ForgetOptimum", "--forget", "owl")
    refuses("house", train.main, [*toy, "FORGET.RETAIN_NAMES", str(names)])
    names.write_text("Thing 3\nsea horse\nowl\n")
    folder = train.main([*toy, "FORGET.RETAIN_NAMES", str(names)])
    solver = json.loads((folder / "logs.json").read_text())["ToyAnimals"]["owl"]["solver"]
    assert solver["retained"] == 2 and solver["excluded"] == ["owl"]
    names.write_text("# nothing\n")
    refuses("holds no name", train.main, [*toy, "FORGET.RETAIN_NAMES", str(names)])


def test_one_class_from_command_line_to_data_frame(toy_args, tmp_path, capsys):
    folder = train.main([*toy_args, "--forget", "dog"])
    entry = logs_of(folder)["ToyAnimals"]["Dog"]
    own = {side: entry[side]["ToyAnimals"]["Dog"] for side in ("zero_shot", "final_results")}
    assert own["zero_shot"]["cls_acc_test"] > 0.9 > 0.3 > own["final_results"]["cls_acc_test"]
    assert set(entry["final_results"]) == {"ToyAnimals", "ToyTools"}
    df, args = create_results(folder, rn=False)
    assert args.backbone == BACKBONE and df.cls_forget[0] == own["final_results"]["cls_acc_test"]
    out = capsys.readouterr().out
    assert "loss weights: lamb_forget 3.0, lamb_preserve 0.05" in out
    assert "ToyAnimals / Dog" in out and len(out.splitlines()) < 12
    log = (folder / "ToyAnimals" / "log.txt").read_text()
    assert "\n  BACKBONE:\n" in log and "engine: " in log


def test_a_run_needs_nothing_that_windows_lacks(toy_args):
    code = (
        "import os, sys; sys.modules |= dict.fromkeys(['fcntl', 'grp', 'pwd', 'resource'])\n"
        "import app, forgetting, train, utils; del os.fork, os.getuid, os.geteuid\n"
        "sys.exit(train.cli(sys.argv[1:]))"
    )
    run = [sys.executable, "-c", code, *toy_args, "--forget", "dog"]
    subprocess.run(run, cwd=REPOSITORY, check=True)


def test_the_seed_is_torchs_too(toy_args, monkeypatch, tmp_path):
    """For a method of one's own, which may draw from it."""
    drawn, build = [], train.build_trainer
    monkeypatch.setattr(train, "build_trainer", lambda x: drawn.append(torch.rand(9)) or build(x))
    for run, seed in enumerate("001"):
        train.main([*toy_args, "--forget=cat", "--seed", seed, f"--output-dir={tmp_path}/{run}"])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_forgotten_names_leave_the_retain_set_and_the_adapter_gives_what_is_logged(toy_args):
    """Forgotten names and their spellings are not retained."""
    folder = train.main([*toy_args, "--forget", "sea_horse"])
    entry = logs_of(folder)["ToyAnimals"]["sea_horse"]
    assert entry["solver"]["excluded"] == ["sea horse"] and entry["solver"]["retained"] == 29
    adapter = load_adapter(folder / entry["solver"]["adapter"])
    bundle = toy_bundle("ToyAnimals")
    assert accuracies(bundle, ["sea_horse"], adapter) == entry["final_results"]["ToyAnimals"]
    assert adapter.solver["objective"] == entry["solver"]["objective"]


def test_done_classes_are_skipped_and_overwrite_does_them_again(toy_args, capsys):
    folder = train.main([*toy_args, "--forget", "cat"])
    first = logs_of(folder)["ToyAnimals"]["cat"]
    train.main([*toy_args, "--forget", "cat", "--forget", "owl"])
    assert "done before, skipped: ToyAnimals, 1 of 2 (cat)" in capsys.readouterr().out
    second = logs_of(folder)["ToyAnimals"]
    assert second["cat"] == first and "owl" in second
    refuses(r"max_trials was 2.*--overwrite", train.main, [*toy_args[:-1], "3", "--forget", "cat"])
    train.main([*toy_args, "--forget", "cat", "--overwrite"])
    third = logs_of(folder)["ToyAnimals"]
    assert third["cat"]["solver"]["seconds"] != first["solver"]["seconds"] and "owl" in third
    assert third["cat"]["final_results"] == first["final_results"]


def test_seed_zero_is_a_seed_and_seeds_differ(toy_args, tmp_path):
    def factors(seed, name):
        out = tmp_path / name
        train.main([*toy_args, "--output-dir", str(out), "--seed", seed, "--forget", "cat"])
        return load_adapter(out / "ToyAnimals" / "cat.safetensors").left

    first = factors("0", "a")
    assert torch.equal(first, factors("0", "b"))
    assert not torch.equal(first, factors("1", "c"))
