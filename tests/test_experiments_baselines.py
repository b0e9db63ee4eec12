"""Every method on the same classes: the command that fills the table of methods."""

from __future__ import annotations

import pytest

import train
from engine import TRAINER_REGISTRY
from engine.config import methods
from experiments import baselines
from forgetting.errors import ProblemError
from tests.conftest import REPOSITORY
from tests.test_baselines import arguments


def test_the_experiment_goes_on_where_it_stopped(features, tmp_path, capsys):
    argv = ["--features", str(features), "--dataset", "ToyAnimals", "--out", str(tmp_path / "out")]
    argv += ["--forget", "owl", "cat"]
    table = baselines.main([*argv, "--methods", "name", "exact-opposite"])
    out = capsys.readouterr().out
    assert "config:" not in out and "exact-opposite" in out and "logs.json" in out
    assert (table["forgotten after"] == 0).all() and (table["forgotten before"] > 90).all()
    assert table.loc["name", "bytes"] < table.loc["exact-opposite", "bytes"]
    log = tmp_path / "out/name/seed_0/ToyAnimals/log.txt"
    assert "config:" in log.read_text()
    more = baselines.main([*argv, "--methods", "name", "zero"])
    assert more.loc["name", "seconds"] == table.loc["name", "seconds"]
    assert list(more.index) == ["name", "zero"] and (more["classes"] == 2).all()


def test_the_experiment_runs_every_method_it_names(features, tmp_path):
    assert {trainer for trainer, _ in baselines.METHODS.values()} == set(methods())
    for name, (trainer, keys) in baselines.METHODS.items():
        argv = arguments(features, tmp_path / name, trainer, "--forget", "owl")
        cfg = train.setup_cfg(train.parse([*argv, *keys]))
        TRAINER_REGISTRY.get(trainer).preflight(cfg)


def test_an_unknown_method_is_refused(features, tmp_path):
    argv = ["--features", str(features), "--dataset", "ToyAnimals", "--out", str(tmp_path / "out")]
    with pytest.raises(ProblemError, match="unknown method 'uec'; did you mean 'uce'"):
        baselines.main([*argv, "--methods", "uec"])
    assert not (tmp_path / "out").exists()


REAL_CLIP = REPOSITORY.parent / "shared" / "real_clip"


@pytest.mark.slow
@pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="needs bundles of real CLIP features")
def test_real_features(tmp_path):
    """What each does to two classes of CLIP, whose evaluation prompts are the forgotten texts."""
    argv = ["--features", str(REAL_CLIP), "--dataset", "CaltechNature", "--out", str(tmp_path)]
    names = ["nothing", "name", "noise", "ascent", "leace", "null-space", "uce", "uce-published"]
    table = baselines.main([*argv, "--forget", "leopard", "ant", "--methods", *names])
    left, rest = table["forgotten after"], table["rest worst"]
    assert (left[["name", "null-space", "uce"]] == 0).all()
    assert (left[["nothing", "noise", "ascent", "uce-published"]] > 80).all()
    assert left["leace"] < 40 and rest["nothing"] == 0 and rest["uce"] < 2
