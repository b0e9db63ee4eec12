"""The trainer of the exact method, in process on toy bundles."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import train
from clip.bundle import bundle_path
from clip.retain import exact_context
from forgetting.adapter import load_adapter
from forgetting.context import ExactSettings
from tests.conftest import BACKBONE, refuses, toy_bundle, toy_line
from trainers.inputs import RunInputs
from utils import create_results

NODE = "TRAINER.FORGETEXACT."


@pytest.fixture
def exact_args(features, tmp_path):
    return toy_line(tmp_path, "--trainer", "ForgetExact")


def solver_of(folder, label):
    """What logs say of a solve; they are strict JSON."""
    text = (folder / "logs.json").read_text()
    logs = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    return logs["ToyAnimals"][label]["solver"]


def test_every_class_is_gone_and_the_rest_stays(exact_args):
    folder = train.main([*exact_args, "--forget", "all"])
    df, _ = create_results(folder)
    assert len(df) == 6 and (df.cls_Noforget > 0.9).all() and (df.cls_forget == 0).all()
    assert (df.full_forget - df.full_Noforget).min() > -0.05
    assert (df.res_ToyTools - df.full_ToyTools).min() > -0.05
    for name in df.name:
        solver = solver_of(folder, name)
        assert solver["certificate"]["gap"] <= 1e-9 and solver["certificate"]["primal"] > 0
        assert set(solver["forecast"]["unlisted"]) == {"own", "vocabulary", "others"}


def test_generic_names_do_not_decide_on_the_ridge():
    """But where they are the only vocabulary."""
    animals = toy_bundle("ToyAnimals")
    bare = replace(animals, retain_names=[], retain_hidden=animals.retain_hidden[:0])
    rows = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))
    names = {"generic": ([f"name {i}" for i in range(200)], rows)}
    settings = ExactSettings(max_displacement=0.001)
    without, beside, alone = (
        exact_context(settings, bundle, more=more)
        for bundle, more in ((animals, {}), (animals, names), (bare, names))
    )
    assert without.settings.ridge == beside.settings.ridge != alone.settings.ridge
    assert "generic" not in without.retain.counts and beside.retain.counts["generic"] == 200


def test_what_is_retained_of_bundles():
    """Own classes are exempt from similarity: they are different things, however similar."""
    animals, tools = toy_bundle("ToyAnimals"), toy_bundle("ToyTools")
    hidden = animals.forget_hidden.clone()
    hidden[1] = 1.001 * hidden[0]  # a dog as like a cat as can be
    words = torch.cat([hidden[:1], animals.retain_hidden[1:]])
    animals = replace(animals, forget_hidden=hidden, retain_hidden=words)
    retain = exact_context(ExactSettings(), animals, [tools]).retain
    assert retain.counts == {"own": 12, "vocabulary": 30, "others": 8}
    mask = retain.excluded([()], hidden[:1], torch.zeros(1, dtype=torch.int64))[0]
    assert retain.named(mask) == ["cat"] and int(mask.nonzero()) == 12  # the vocabulary's first
    without = exact_context(ExactSettings(others=0.0), animals, [tools]).retain
    assert set(without.counts) == {"own", "vocabulary"}


def test_an_evaluation_template_that_is_the_bare_name(exact_args, features):
    path = bundle_path(features, BACKBONE, "ToyAnimals")
    path.unlink()
    replace(toy_bundle("ToyAnimals"), template="{}").save(path)
    assert (create_results(train.main([*exact_args, "--forget", "all"]))[0].cls_forget == 0).all()


@pytest.mark.parametrize("weight", [0.1, 0.0])
def test_other_sets_may_be_affected_where_they_are_listed(weight):
    animals, tools = toy_bundle("ToyAnimals"), toy_bundle("ToyTools")
    texts = exact_context(ExactSettings(others=weight), animals, [tools]).classifier
    assert ("hammer" in texts.names) == (weight > 0) and texts.n_classes == 6
    assert texts.label["sea_horse"] == 2 and texts.names[2] == "sea horse"


def test_targets_of_ones_own(exact_args, tmp_path):
    bundle = toy_bundle("ToyAnimals")
    row = bundle.retain_hidden[bundle.retain_names.index("thing 3")] @ bundle.text_projection
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))
    save_file({"target": vector}, tmp_path / "v.safetensors")
    goals = {"text:thing 3": row / row.norm(), f"vector:{tmp_path / 'v.safetensors'}": vector}
    for target, goal in goals.items():
        options = ["--forget", "owl", "--target", target, "--beta", "0.1", "--overwrite"]
        adapter = load_adapter(train.main([*exact_args, *options]) / "ToyAnimals/owl.safetensors")
        h = bundle.forget_hidden[4]
        landed = h @ bundle.text_projection + (h @ adapter.left) @ adapter.right
        assert landed == pytest.approx(goal.tolist(), abs=1e-4)
        assert adapter.solver["beta"] == 0


def test_the_papers_objective_at_its_optimum_beats_the_descent(toy_args):
    descent = solver_of(train.main([*toy_args, "--forget", "cat"]), "cat")
    options = ["--trainer", "ForgetOptimum", "--overwrite"]
    keys = toy_args[: toy_args.index("TRAINER.FORGETLORA.STEPS")]
    keys[keys.index("--output-dir") + 1] += "-optimum"
    exact = solver_of(train.main([*keys, "--forget", "cat", *options]), "cat")
    assert exact["certificate"]["gap"] <= 1e-9 and exact["branch"] == "generic"
    assert exact["certificate"]["primal"] <= descent["objective"] * (1 + 1e-6)
    assert exact["thresholds"]["reach"] < 3.0 == exact["lamb_forget"]
    auto = train.main([*keys, "--forget", "cat", *options, "FORGET.LAMB_FORGET", "auto"])
    auto, reach = solver_of(auto, "cat"), exact["thresholds"]["reach"]
    assert auto["lamb_forget"] == pytest.approx(1.001 * reach) and auto["reduction"] > 0.999


def test_settings_reach_the_context(exact_args):
    def solver(*options):
        folder = train.main([*exact_args, "--forget", "owl", "--overwrite", *options])
        return solver_of(folder, "owl")

    assert solver(NODE + "MIN_MARGIN", "0")["beta"] == 0
    assert solver(NODE + "MIN_MARGIN", "1.2")["beta"] > 0
    assert solver(NODE + "MIN_MARGIN", "0", "--beta", "0.3")["beta"] == 0.3
    excluded = solver("FORGET.SIMILARITY", "0.2")["excluded"]
    assert len(excluded) > 3 and not {"cat", "Dog"} & {*excluded}  # classes of the set are exempt
    affected = {x["name"]: x["cosine_loss"] for x in solver()["forecast"]["affected"]}
    name = max(affected, key=affected.__getitem__)
    protected = solver("--protect", name, NODE + "PROTECT", "10")["forecast"]["affected"]
    after = {x["name"]: x["cosine_loss"] for x in protected}
    assert after.get(name, 0) < affected[name]
    other = [*exact_args, "--forget", "owl", NODE + "PROTECT", "10"]
    refuses("protect_names", train.main, other)


@pytest.mark.parametrize(("name", "close"), [("catt", "cat"), ("sea horse", None), ("kiwi", None)])
def test_a_mistyped_name_to_protect_is_said(name, close, capsys):
    """With a model any name can be protected, so it is not refused."""
    inputs = RunInputs()
    inputs.plan = SimpleNamespace(dataset="ToyAnimals")
    inputs.bundles = {"ToyAnimals": toy_bundle("ToyAnimals")}
    inputs.encode = lambda names: torch.randn(len(names), 24)
    names, rows = inputs.protected([name])
    assert names == [name] * len(rows)
    output = capsys.readouterr().out
    assert (output == "") == (close is None) and (close is None or repr(close) in output)


def test_a_paraphrase_that_lags_is_forgotten_too(exact_args, features):
    """The evaluation prompt of a class is made of another name: the bare name moves alone."""
    bundle = toy_bundle("ToyAnimals")
    prompts = bundle.class_hidden.clone()
    prompts[4] = 0.2 * bundle.forget_hidden[4] + bundle.retain_hidden[3]
    path = bundle_path(features, BACKBONE, "ToyAnimals")
    path.unlink()
    replace(bundle, class_hidden=prompts).save(path)
    for limit, added in (("0", []), ("0.5", ["a photo of a owl."])):
        keys = [NODE + "MIN_MARGIN", "0", NODE + "MIN_DISPLACEMENT", limit, "--overwrite"]
        solver = solver_of(train.main([*exact_args, "--forget", "owl", *keys]), "owl")
        assert solver["texts"] == ["owl", *added] and solver["paraphrases"]["added"] == added


ROWS = {
    "key": ([NODE + "TARGET", "opposite"], "unknown config key"),
    "no weight": (
        [f"{NODE}{x}" for x in ("OWN 0", "VOCABULARY 0", "OTHERS 0")],
        "must be above 0",
    ),
    "ridge": ([NODE + "RIDGE", "0.0"], "RIDGE"),
    "prompt file": (["FORGET.PROMPTS", "nowhere.json"], "nowhere.json"),
    "vector file": (["FORGET.TARGET", "vector:nowhere"], "target vector nowhere"),
    "target text": (["FORGET.TARGET", "text:zebra"], "target text 'zebra'"),
    "protect": (["--protect", "unicorn"], "(FORGET.PROTECT) 'unicorn'"),
    "protect both": (["--protect", "CAT"], "'CAT' is to be forgotten and to be protected"),
    "protect nothing": (["--protect", ""], "is empty"),
}


@pytest.mark.parametrize("row", ROWS)
def test_bad_input(row, exact_args, refused):
    options, token = ROWS[row]
    options = [word for option in options for word in option.split(" ")]
    assert token in refused([*exact_args, "--forget", "cat", *options])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"ct": ["{}"]}, "no class 'ct'; nearest: 'cat'"),
        ({"cat": ["{}"], "CAT": ["{}"]}, "two entries name 'cat'"),
        ({"cat": [" "]}, "a text of 'cat' is empty"),
        ({"cat": ["a furry {}"]}, "'a furry cat'"),  # without a model
    ],
)
def test_mistakes_in_prompts(table, message, exact_args, refused, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(table))
    assert message in refused([*exact_args, "--forget", "cat", "FORGET.PROMPTS", str(prompts)])
