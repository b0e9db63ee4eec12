"""engine/config: declarations in YAML, ranges, layers, and what a run of train.py freezes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import yaml
from yacs.config import CfgNode

import train
from engine.config import (
    CONFIGS,
    OPTIONS,
    Setting,
    check,
    declared,
    methods,
    paper_weights,
    read_yaml,
    settings,
    setup,
    value_of,
)
from forgetting.errors import ProblemError
from tests.conftest import REPOSITORY

SHARED = yaml.safe_load((CONFIGS / "defaults.yaml").read_text())
RANGED = [
    (key, bound)
    for key, setting in declared().items()
    for bound in ("low", "high", "above", "below")
    if getattr(setting, bound) is not None
]


def outside(setting: Setting, bound: str):
    """The nearest value that a bound keeps out."""
    limit = getattr(setting, bound)
    if setting.type in ("str", "list"):
        return {"str": "", "list": ()}[setting.type]
    step = 1 if setting.type == "int" else 1e-6 * max(1.0, abs(limit))
    return limit + {"low": -step, "high": step}.get(bound, 0)


@pytest.mark.parametrize(("key", "bound"), RANGED)
def test_a_declared_range_keeps_out_what_lies_beyond_it(key, bound):
    setting = declared()[key]
    bad = outside(setting, bound)
    with pytest.raises(ProblemError) as caught:
        setting.take(bad)
    text = str(caught.value)
    assert text.startswith(f"{key} must be ") and text.endswith(f"got {bad!r}") and "\n" not in text
    assert setting.about in text
    if bound in ("low", "high") and setting.type in ("int", "float"):
        limit = getattr(setting, bound)
        assert setting.take(limit) == limit


@pytest.mark.parametrize("key", declared())
def test_a_declaration_is_complete_and_refuses_other_types(key):
    setting = declared()[key]
    assert setting.take(setting.default) == setting.default or setting.type == "list"
    assert setting.about and setting.about[0] != " " and "\n" not in setting.about
    others = {"bool": 1, "int": 0.5, "float": True, "str": 3, "list": "cat", "dict": 3}
    for bad in (others[setting.type], *([None] if setting.default is not None else [])):
        with pytest.raises(ProblemError, match=key):
            setting.take(bad)


def test_numbers_that_are_none_are_refused():
    for key, setting in declared().items():
        for bad in (float("nan"), float("inf"), float("-inf")) if setting.type == "float" else ():
            with pytest.raises(ProblemError, match=key):
                setting.take(bad)


def test_a_message_names_key_range_meaning_and_value():
    beta = "FORGET.BETA must be a number above -1 and at most 1,000,000 (how far beyond zero "
    with pytest.raises(ProblemError) as caught:
        settings(opts=["FORGET.BETA", "-2"])
    assert str(caught.value).startswith(beta) and str(caught.value).endswith("got -2.0")
    with pytest.raises(ProblemError, match=r"FORGET.TERMS 'forgot'; did you mean 'forget'\?"):
        settings(opts=["FORGET.TERMS", "('forgot',)"])


def test_text_becomes_what_the_key_holds():
    opts = ["FORGET.BETA", "1e-1", "FORGET.RANK", "3", "FORGET.MULTICLASS", "True"]
    opts += ["FORGET.CLASSES", "('a', 'b')", "DATASET.TEMPLATE", "7", "FORGET.LAMB_FORGET", "2"]
    cfg = settings(opts=opts).FORGET
    assert (cfg.BETA, cfg.RANK, cfg.MULTICLASS) == (0.1, 3, True)
    assert cfg.CLASSES == ("a", "b") and type(cfg.LAMB_FORGET) is float
    assert settings(opts=opts).DATASET.TEMPLATE == "7"
    assert settings(opts=["FORGET.LAMB_FORGET", "auto"]).FORGET.LAMB_FORGET == "auto"


# Layers


def config(*argv: str) -> CfgNode:
    return setup(train.parse(argv))


def test_settings_are_what_a_run_freezes():
    assert settings(dataset="StanfordDogs") == config("--dataset", "StanfordDogs")
    for trainer in methods():
        argv = ["--dataset", "StanfordCars", "--trainer", trainer, "--backbone", "ViT-B/16"]
        expected = config(*argv, "FORGET.RANK", "4")
        found = settings(trainer, "StanfordCars", "ViT-B/16", ["FORGET.RANK", "4"])
        assert found == expected and found.is_frozen()
        check(found)


def test_every_default_stands_in_yaml_once():
    cfg = settings()
    for key, setting in declared().items():
        if setting.type != "dict" and key not in ("FORGET.TARGET", "FORGET.SIMILARITY"):
            expected = setting.default
            assert value_of(cfg, key) == (tuple(expected) if setting.type == "list" else expected)
    for name in methods():
        tree = yaml.safe_load((CONFIGS / "trainers" / f"{name}.yaml").read_text())
        assert tree["TRAINER"]["NAME"] == name
        assert set(tree.get("FORGET", {})) <= {"TARGET", "BETA", "SIMILARITY"}
        for key, given in tree.get("FORGET", {}).items():
            assert given != SHARED["FORGET"][key]["default"] or not given, (name, key)
    parsed = vars(train.parse([]))
    assert {name: parsed[name] for name in OPTIONS} == dict.fromkeys(OPTIONS)


def test_the_methods_differ_where_they_mean_to():
    assert [settings(name).FORGET.SIMILARITY for name in ("ForgetLoRA", "ForgetOptimum")] == [1, 1]
    assert settings("ForgetExact").FORGET.SIMILARITY == settings("ForgetUCE").FORGET.SIMILARITY
    assert settings("ForgetUCE").FORGET.TARGET == "opposite"
    assert settings("ForgetLoRA").FORGET.TARGET == settings("ForgetOptimum").FORGET.TARGET


def test_later_layers_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "FORGET: {RANK: 7, ALPHA: 2, BETA: 3e-1}\nMODEL: {BACKBONE: {NAME: RN50}}\n"
        "TRAINER: {NAME: ForgetExact, FORGETEXACT: {MU: {default: 1.0e-3, about: copied}}}\n"
    )
    cfg = config("--dataset", "A", "--config-file", str(file), "--beta", "0.5", "FORGET.RANK", "9")
    assert (cfg.FORGET.RANK, cfg.FORGET.ALPHA, cfg.FORGET.BETA) == (9, 2.0, 0.5)
    assert cfg.TRAINER.NAME == "ForgetExact" and cfg.FORGET.SIMILARITY == 0.95
    assert cfg.TRAINER.FORGETEXACT.MU == 1e-3 and cfg.TRAINER.FORGETEXACT.OWN == 1.0
    assert config("--dataset", "A", "TRAINER.NAME", "ForgetUCE").FORGET.TARGET == "opposite"


@pytest.mark.parametrize("text", ["", "# nothing\n", "FORGET:\n  # RANK: 3\n", "FORGET: {}\n"])
def test_a_file_of_comments_changes_nothing(text, tmp_path):
    file = tmp_path / "mine.yml"
    file.write_text(text)
    argv = ["--dataset", "MiniDigits"]
    assert config(*argv, "--config-file", str(file)) == config(*argv)


def test_a_python_config_is_refused_and_not_executed(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    for option in ("--config-file", "--dataset-config-file"):
        with pytest.raises(ProblemError, match="only YAML is read"):
            config("--dataset", "A", option, str(file))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "text", ["\0", "a: !!python/object/apply:os.system [true]", "[" * 5000, "x: 1\n  y: 2"]
)
def test_broken_yaml_is_one_line(text, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ProblemError, match=r"mine\.yaml") as caught:
        config("--dataset", "A", "--config-file", str(file))
    assert "\n" not in str(caught.value)


# The paper's weights


def test_weights_may_be_given_for_a_backbone_and_are_checked(tmp_path):
    file = tmp_path / "mine.yaml"
    argv = ["--dataset", "StanfordDogs", "--config-file", str(file), "--backbone", "own/1"]
    file.write_text("FORGET: {WEIGHTS: {own/1: {SINGLE: [0.5, auto]}}}")
    expected = {"lamb_forget": "auto", "lamb_preserve": 0.5, "lamb_weight": 1.0}
    assert paper_weights(config(*argv)) == expected
    assert paper_weights(config(*argv[:-1], "RN50"))["lamb_forget"] == 1.3  # the set's own stay
    opts = ["FORGET.TERMS", "('forget',)"]
    assert paper_weights(config(*argv, *opts)) == expected | {"lamb_preserve": 0, "lamb_weight": 0}
    line = ["FORGET.WEIGHTS.own/1.SINGLE", "[1, 2]"]
    assert paper_weights(config(*argv, *line))["lamb_forget"] == 2.0
    with pytest.raises(
        ProblemError, match=r"dotted name, such as FORGET.WEIGHTS.mini.SINGLE .9, 8"
    ):
        config(*argv, "FORGET.WEIGHTS", "{'mini': {'SINGLE': [9, 8]}}")
    file.write_text("FORGET: {WEIGHTS: {own/1: 3}}")
    with pytest.raises(ProblemError, match=r"own/1.SINGLE must be .lamb_preserve, .*got 3"):
        paper_weights(config(*argv))
    file.write_text("")
    unlisted = {"lamb_forget": "auto", "lamb_preserve": 0.3, "lamb_weight": 1.0}
    assert paper_weights(config(*argv, "--multiclass")) == unlisted
    for pair, message in {
        "[1]": "must be .lamb_p",
        "[1, x]": "LAMB_FORGET",
        "[-1, 2]": "got -1",
    }.items():
        file.write_text(f"FORGET: {{WEIGHTS: {{own/1: {{SINGLE: {pair}}}}}}}")
        with pytest.raises(ProblemError, match=message):
            paper_weights(config(*argv))


# What asking costs


def test_settings_need_no_torch_and_little_time():
    code = (
        "import sys, engine.config as c; c.settings('ForgetExact'); print('torch' in sys.modules)"
    )
    environment = {"CLIP_FORGET_ENGINE": "builtin", "PATH": ""}
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert told.stdout == "False\n", told.stderr
    settings("ForgetExact")
    started = time.process_time()
    settings("ForgetLoRA", "StanfordDogs", "RN50")
    assert time.process_time() - started < 0.05


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("SEED: 1\nFORGET: {RANK: 2}\nFORGET:\n  BETA: 0.1", "line 3: the key FORGET stands in l"),
        ("# mine\nFORGET:\n  RANK: 1\n  BETA: 0\n  RANK: 2\n", "line 5: the key RANK stands in l"),
        ("FORGET: {RANK: 1, 'RANK': 2}", "line 1: the key RANK stands in line 1 too"),
        ("a: [{b: &x {1: 2, 1: 3}}, *x]", "line 1: the key 1 stands in line 1 too"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, refused, toy_args, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ProblemError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"config file {path}: {said}")
    assert said in refused([*toy_args, "--config-file", str(path)])
    assert not (tmp_path / "out").exists()


def test_keys_that_are_alike_or_merged_are_no_repetition(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("a: &a {x: 1, y: 3}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: {x: 4}}\n")
    assert read_yaml(path)["c"] == {"x": {"x": 4}, "y": 3}
    path.write_text("{1: a, '1': b, one: c}")
    assert len(read_yaml(path)) == 3
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}
