"""train.py in process on toy bundles: results, skipping, resuming, options."""

import pytest
import torch

import train
from evaluation.results import read_logs as logs_of
from forgetting import load_adapter
from forgetting.errors import ProblemError
from tests.conftest import BACKBONE, accuracies, toy_bundle
from utils import create_results


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
    with pytest.raises(ProblemError, match=r"max_trials 2 -> 3.*--overwrite"):
        train.main([*toy_args[:-1], "3", "--forget", "cat"])
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
