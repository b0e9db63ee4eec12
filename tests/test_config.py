"""engine/config: settings as dataclass fields, the layers of a run's config, and YAML as it is
read."""

from dataclasses import dataclass

import pytest
from yacs.config import CfgNode

import train
from engine.config import (
    CONFIGS,
    check,
    declared,
    extend_cfg,
    page,
    paper_weights,
    read_yaml,
    settings,
)
from forgetting.errors import ProblemError
from forgetting.settings import check_value, is_optional, kind_of, setting, validate
from tests.conftest import REPOSITORY, refuses
from trainers import METHODS


def config(*argv: str) -> CfgNode:
    return train.setup_cfg(train.parse(argv))


@pytest.mark.parametrize("key", declared())
def test_a_setting_takes_its_default_and_refuses_other_types(key):
    spec = declared()[key]
    check_value(spec.default, spec, key)
    about = spec.metadata["help"]
    assert about and about == about.strip().rstrip(".") and "\n" not in about
    others = {bool: [1], int: [0.5, True], float: [True, "x", float("nan"), float("inf")]}
    others |= {str: [3], tuple: [3, (1,), ["list"]]}
    for bad in (*others[kind_of(spec)], *([] if is_optional(spec) else [None])):
        refuses(key, check_value, bad, spec, key)


def test_ranges_include_their_ends_and_exclude_above():
    @dataclass(frozen=True)
    class Example:
        part: float = setting(0.5, "a part", above=0, high=1)
        count: int | None = setting(None, "a count", low=1, high=9)
        names: tuple[str, ...] = setting(("a",), "names", low=1, choices=("a", "b"))
        weight: float | str = setting("auto", "a weight", low=0, choices=("auto",))

    good = {"part": [1], "count": [1, 9, None], "names": [("b", "a")], "weight": [0, "auto"]}
    bad = {"part": [0, 1.1, None], "count": [0, 10], "names": [()], "weight": [-1, "no"]}
    for name, values in good.items():
        for value in values:
            validate(Example(**{name: value}))
        for value in bad[name]:
            refuses(name, validate, Example(**{name: value}))


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["FORGET.BETA", "-2"], "FORGET.BETA.*above -1.*how far.*-2.0"),
        (["FORGET.TERMS", "('forgot',)"], "FORGET.TERMS.*did you mean 'forget'"),
        (["FORGET.BETTA", "1"], "'FORGET.BETTA'; did you mean FORGET.BETA"),
        (["TRAINER.FORGETLORRA.LR", "1"], "did you mean TRAINER.FORGETLORA.LR"),
        (["FORGET.RANK", "3.5"], "FORGET.RANK.*whole number"),
        (["FORGET.RANK", "0x" + "f" * 100_000], "FORGET.RANK"),
        (["FORGET.WEIGHTS.RN50", "1"], "FORGET.WEIGHTS.BACKBONE.SINGLE"),
        (["SEED", "-1"], "SEED.*Dassl"),
        (["FEATURES.CACHE", ""], "FEATURES.CACHE.*not empty"),
        (["FORGET.BETA"], "pairs"),
        (["OPTIM.LR", "0.1"], "OPTIM.LR.*without effect"),
        (["TRAINER.COOP.N_CTX", "4"], "TRAINER.COOP.N_CTX.*without effect"),
    ],
)
def test_a_wrong_pair_is_refused_in_a_short_line(opts, words):
    with pytest.raises(ProblemError, match=words) as caught:
        settings(opts=opts)
    assert len(str(caught.value)) < 300


def test_text_becomes_what_the_key_holds():
    opts = ["FORGET.BETA", "1e-1", "FORGET.RANK", "3", "FORGET.MULTICLASS", "True"]
    opts += ["FORGET.CLASSES", "('a', 'b')", "DATASET.TEMPLATE", "7", "FORGET.LAMB_FORGET", "2"]
    opts += ["DATASET.ROOT", "~/images", "FORGET.PROTECT", "a name"]
    opts += ["FEATURES.CACHE", "c", "OUTPUT_DIR", "o", "MODEL.BACKBONE.NAME", "m"]
    cfg = settings(opts=opts)
    assert (cfg.FORGET.BETA, cfg.FORGET.RANK, cfg.FORGET.MULTICLASS) == (0.1, 3, True)
    assert cfg.FORGET.CLASSES == ("a", "b") and cfg.FORGET.PROTECT == ("a name",)
    assert type(cfg.FORGET.LAMB_FORGET) is float and cfg.DATASET.TEMPLATE == "7"
    assert "~" not in cfg.DATASET.ROOT and cfg.FEATURES.CACHE == "c"
    assert settings(opts=["FORGET.LAMB_FORGET", "auto"]).FORGET.LAMB_FORGET == "auto"


def test_settings_are_what_a_run_freezes():
    assert settings(dataset="StanfordDogs") == config("--dataset", "StanfordDogs")
    for trainer in METHODS:
        argv = ["--dataset", "StanfordCars", "--trainer", trainer, "--backbone", "ViT-B/16"]
        expected = config(*argv, "FORGET.RANK", "4")
        found = settings(trainer, "StanfordCars", "ViT-B/16", ["FORGET.RANK", "4"])
        assert found == expected and found.is_frozen()
        check(found)


def test_methods_have_their_own_defaults():
    lora, exact, uce = (settings(f"Forget{name}").FORGET for name in ("LoRA", "Exact", "UCE"))
    assert (lora.TARGET, lora.SIMILARITY) == ("empty", 1.0)
    assert (exact.TARGET, exact.BETA, exact.SIMILARITY) == ("specific", 0.0, 0.95)
    assert (uce.TARGET, uce.BETA) == ("opposite", 0.1)


def test_later_layers_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "FORGET: {RANK: 7, ALPHA: 2, BETA: 3e-1}\nMODEL: {BACKBONE: {NAME: RN50}}\n"
        "TRAINER: {NAME: ForgetExact, FORGETEXACT: {RIDGE: 1.0e-3}}\n"
    )
    cfg = config("--dataset", "A", "--config-file", str(file), "--beta", "0.5", "FORGET.RANK", "9")
    assert (cfg.FORGET.RANK, cfg.FORGET.ALPHA, cfg.FORGET.BETA) == (9, 2.0, 0.5)
    assert cfg.TRAINER.NAME == "ForgetExact" and cfg.FORGET.SIMILARITY == 0.95
    assert cfg.TRAINER.FORGETEXACT.RIDGE == 1e-3 and cfg.TRAINER.FORGETEXACT.OWN == 1.0
    assert config("--dataset", "A", "TRAINER.NAME", "ForgetUCE").FORGET.TARGET == "opposite"


def test_a_data_set_file_keeps_the_papers_weights_and_says_what_it_sets(tmp_path, capsys):
    """CoOp's scripts give a file that names only the data set."""
    file = tmp_path / "caltech101.yaml"
    file.write_text('DATASET:\n  NAME: "Caltech101"\n')
    cfg = config("--dataset-config-file", str(file))
    assert paper_weights(cfg)["lamb_forget"] == 1.3
    assert f"{file} sets DATASET.NAME" in capsys.readouterr().out
    file.write_text("FORGET: {WEIGHTS: {RN50: {SINGLE: [0.1, 9]}}}")
    cfg = config("--dataset", "Caltech101", "--dataset-config-file", str(file))
    assert paper_weights(cfg) == {"lamb_forget": 9.0, "lamb_preserve": 0.1, "lamb_weight": 1.0}
    assert cfg.FORGET.WEIGHTS.RN50.MULTICLASS == (0.3, 1.1)


def test_keys_of_dassl_in_a_file_are_named_and_ignored(tmp_path, capsys):
    file = tmp_path / "coop.yaml"
    file.write_text(
        "DATALOADER: {TRAIN_X: {BATCH_SIZE: 32}, TEST: {BATCH_SIZE: 100}, NUM_WORKERS: 8}\n"
        "INPUT: {SIZE: '(224, 224)'}\nOPTIM: {LR: 0.002}\nTRAINER: {COOP: {N_CTX: 4}}\n"
    )
    cfg = config("--dataset", "A", "--config-file", str(file))
    assert cfg.DATALOADER.TEST.BATCH_SIZE == 100
    line = capsys.readouterr().out.splitlines()[-1]
    ignored = ("DATALOADER.TRAIN_X.BATCH_SIZE", "INPUT.SIZE", "OPTIM.LR", "TRAINER.COOP.N_CTX")
    assert "without effect" in line and all(key in line for key in ignored)
    assert "TEST.BATCH_SIZE" not in line
    file.write_text("DATASET: {TEMPLAT: a}")
    with pytest.raises(ProblemError, match=r"TEMPLAT.*DATASET.TEMPLATE.*coop\.yaml"):
        config("--dataset", "A", "--config-file", str(file))


def test_dassls_config_is_extended_as_in_coop(tmp_path):
    cfg = CfgNode({"SEED": -1, "OUTPUT_DIR": "./output", "DATASET": {"ROOT": "", "NAME": ""}})
    cfg.TRAINER = CfgNode({"NAME": "", "COOP": {"N_CTX": 16}})
    extend_cfg(cfg)
    cfg.merge_from_file(CONFIGS / "datasets" / "Caltech101.yaml")
    cfg.merge_from_list(["FORGET.TARGET", "specific", "FORGET.RANK", "3", "SEED", "2"])
    check(cfg)
    assert paper_weights(cfg)["lamb_forget"] == 1.3
    assert cfg.TRAINER.COOP.N_CTX == 16 and cfg.FORGET.TARGET == "specific" and cfg.SEED == 2


def test_a_file_of_comments_changes_nothing_and_a_missing_one_is_refused(tmp_path):
    file = tmp_path / "mine.yml"
    for text in ("", "# nothing\n", "FORGET:\n  # RANK: 3\n", "FORGET: {}\n"):
        file.write_text(text)
        assert config("--dataset", "A", "--config-file", str(file)) == config("--dataset", "A")
    refuses("mine.yaml cannot be read: No such file", read_yaml, tmp_path / "mine.yaml")


BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 10}]\n" for n in range(1, 9))


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("mine.py", "raise SystemExit", "only YAML"),
        ("mine.yaml", "a: !!python/object/apply:os.system [true]", "constructor"),
        ("mine.yaml", "[" * 5000, "mine.yaml"),
        ("mine.yaml", "- a", "keys and values"),
        ("mine.yaml", BOMB, "alias"),
        ("mine.yaml", "FORGET: &a {b: *a}", "alias"),
        ("mine.yaml", "SEED: 1\nFORGET: {RANK: 2}\nFORGET:\n  BETA: 0.1", "FORGET stands twice"),
    ],
)
def test_a_broken_file_is_one_line(name, text, word, tmp_path):
    file = tmp_path / name
    file.write_text(text)
    refuses(word, config, "--dataset", "A", "--config-file", str(file))


def test_weights_may_be_given_for_a_backbone_and_are_checked(tmp_path):
    file = tmp_path / "mine.yaml"
    argv = ["--dataset", "StanfordDogs", "--config-file", str(file), "--backbone", "own/1.5"]

    def weights(*more: str) -> list:
        found = paper_weights(config(*argv, *more))
        return [found[f"lamb_{term}"] for term in ("forget", "preserve", "weight")]

    file.write_text("FORGET: {WEIGHTS: {own/1.5: {SINGLE: [0.5, auto]}}}")
    assert weights() == ["auto", 0.5, 1.0]
    assert weights("--backbone", "RN50")[0] == 1.3  # the set's own stay
    assert weights("FORGET.TERMS", "('forget',)") == ["auto", 0, 0]
    line = ["FORGET.WEIGHTS.own/1.5.SINGLE", "[1, 2]"]
    assert weights(*line, "FORGET.LAMB_FORGET", "3")[0] == 3.0
    assert weights("--multiclass") == ["auto", 0.3, 1.0]
    for pair, word in (("[1]", "must be"), ("[1, x]", "LAMB_FORGET"), ("[-1, 2]", "-1")):
        file.write_text(f"FORGET: {{WEIGHTS: {{own/1.5: {{SINGLE: {pair}}}}}}}")
        refuses(word, weights)


def test_the_page_of_settings_is_what_the_fields_say():
    read = (REPOSITORY / "docs" / "settings.md").read_text()
    assert read == page(), "python -m engine.config > docs/settings.md"
    assert all(f"| `{key}` |" in page() for key in declared())
