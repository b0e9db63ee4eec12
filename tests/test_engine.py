"""engine/: Dassl or the slice of it that is called, the log, and what makes numbers come again.

Tests of both engines run on Dassl where it imports (make test-dassl DASSL=PATH).
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

import pytest
import torch

import engine
from engine import choose
from engine.config import declared, settings
from engine.determinism import one_thread
from engine.log import environment, logger, run_log
from forgetting.adapter import load_adapter
from forgetting.errors import ProblemError
from tests.conftest import REPOSITORY

HAS_DASSL = find_spec("dassl") is not None
needs_dassl = pytest.mark.skipif(not HAS_DASSL, reason="needs Dassl: make test-dassl DASSL=PATH")


@pytest.fixture(params=["builtin", "dassl"])
def kit(request, monkeypatch):
    """An engine's names; what a test registers there is forgotten after it."""
    if request.param == "dassl" and not HAS_DASSL:
        if os.environ.get("CLIP_FORGET_ENGINE") == "dassl":
            pytest.fail("this run is meant to have Dassl, and it is not there")
        pytest.skip("Dassl is not installed (make test-dassl DASSL=PATH)")
    monkeypatch.setenv("CLIP_FORGET_ENGINE", request.param)
    names = choose.__wrapped__()
    for registry in (names.TRAINER_REGISTRY, names.DATASET_REGISTRY):
        for name, known in vars(registry).items():
            if isinstance(known, dict):
                monkeypatch.setattr(registry, name, dict(known))
    return names


REPORT = "import sys, engine; print(engine.SimpleTrainer.__module__, engine.choose().description)"
HIDDEN = f"import sys; sys.modules['dassl'] = None; {REPORT}"


def python(code: str, path: Path = REPOSITORY, wanted: str = "") -> subprocess.CompletedProcess:
    """Run `code` in a process of its own; `path` comes before the repository on sys.path."""
    paths = os.pathsep.join([str(path), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "CLIP_FORGET_ENGINE": wanted}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_an_engine_that_cannot_be_had_is_one_line(tmp_path):
    (tmp_path / "dassl").mkdir()
    (tmp_path / "dassl" / "__init__.py").write_text("import no_such_requirement\n")
    for code, path, wanted, message in (
        (REPORT, REPOSITORY, "dasl", "unknown engine 'dasl'; did you mean 'dassl'"),
        (HIDDEN, REPOSITORY, "dassl", "CLIP_FORGET_ENGINE=dassl, but Dassl is not installed; put"),
        (REPORT, tmp_path, "dassl", "No module named 'no_such_requirement'"),
    ):
        ended = python(code, path, wanted)
        assert ended.returncode == 1 and ended.stderr.startswith("error: CLIP_FORGET_ENGINE")
        assert message in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr


def test_builtin_runs_where_dassl_is_missing_or_a_bare_folder(tmp_path):
    (tmp_path / "dassl").mkdir()
    expected = "engine engine: builtin (Dassl is not installed)\n"
    assert python(HIDDEN).stdout == expected
    out = python(f"{REPORT}; print(sys.modules['dassl'].__file__)", tmp_path).stdout
    if out.endswith("None\n"):  # where Dassl itself is installed it is found behind the folder
        assert out.startswith(expected)
    wanted = os.environ.get("CLIP_FORGET_ENGINE") or ("dassl" if HAS_DASSL else "builtin")
    name = {"dassl": "Dassl 0", "builtin": "builtin ("}[wanted]
    assert choose().description.startswith(f"engine: {name}")


@needs_dassl
def test_our_sets_are_dassls(tmp_path):
    """Dassl finds a set by its name and makes batches of its images."""
    import datasets

    data = import_module("dassl.data")
    opts = ["DATASET.ROOT", str(tmp_path), "DATALOADER.NUM_WORKERS", "0"]
    opts += ["DATALOADER.TEST.BATCH_SIZE", "3"]
    cfg = settings(dataset="MiniShapes", opts=opts)
    manager = data.DataManager(cfg)
    batch = next(iter(manager.test_loader))
    assert batch["img"].shape == (3, 3, 224, 224) and batch["domain"].tolist() == [0, 0, 0]
    assert manager.lab2cname == datasets.load("MiniShapes", tmp_path).lab2cname


@needs_dassl
def test_settings_stand_among_dassls_own():
    dassl = import_module("dassl.engine")
    assert choose().SimpleTrainer is dassl.SimpleTrainer
    theirs = import_module("dassl.config").get_cfg_default()
    ours = settings(opts=["FORGET.RANK", "3"])
    assert ours.FORGET.RANK == 3 and ours.INPUT == theirs.INPUT
    assert set(theirs) < set(ours)
    added = ("FORGET", "FEATURES", "LOG", "TRAINER.FORGET")
    added += ("DATASET.IMAGES", "DATASET.TEMPLATE", "MODEL.PRECISION")
    for key in (key for key in declared() if not key.startswith(added)):
        attrgetter(key)(theirs)  # AttributeError: not spelled as Dassl's
    with pytest.raises(ProblemError, match=r"INPUT\.SIZE.*without effect"):
        settings(opts=["INPUT.SIZE", "(3, 3)"])


def test_a_registry_and_a_trainer_are_as_dassls(kit):
    class Records(kit.SimpleTrainer):
        def check_cfg(self, cfg):
            self.order = ["check_cfg"]

        def build_data_loader(self):
            assert self.device == torch.device("cpu")
            self.order.append("build_data_loader")
            self.lab2cname = {0: "a"}

        def build_model(self):
            self.order.append("build_model")

    for _ in range(2):  # the second time one of that name is there
        kit.TRAINER_REGISTRY.register(force=True)(Records)
    cfg = settings(dataset="A", opts=["USE_CUDA", "False"])
    trainer = kit.TRAINER_REGISTRY.get("Records")(cfg)
    assert trainer.order == ["check_cfg", "build_data_loader", "build_model"]
    assert trainer.cfg is cfg
    for name in engine.OF_DASSL:
        assert getattr(kit, name) is not None and getattr(engine, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = engine.no_such_name


def test_a_log_goes_on_and_is_not_made_before_it_has_a_place(tmp_path):
    for text in ("first", "second"):
        with run_log() as keep:
            logger.debug(text)
            assert not any(tmp_path.iterdir()) or text == "second"
            keep(tmp_path / "a")
            logger.info("more")
            lines = (tmp_path / "a" / "log.txt").read_text().splitlines()  # before any exit
            assert [line.split(" ", 2)[2] for line in lines[-2:]] == [text, "more"]
            with pytest.raises(ProblemError, match="cannot write the log"):
                keep(tmp_path / "a" / "log.txt" / "b")
    assert len(lines) == 4
    with pytest.raises(ZeroDivisionError), run_log() as keep:
        keep(tmp_path / "b")
        logger.debug(environment())
        raise ZeroDivisionError
    log = (tmp_path / "b" / "log.txt").read_text()
    assert "ZeroDivisionError" in log and "Python: " in log
    assert f"\ntorch: {torch.__version__.split('+')[0]}" in log


def test_one_thread_is_given_back():
    torch.set_num_threads(2)
    with pytest.raises(ValueError), one_thread():
        assert torch.get_num_threads() == 1
        raise ValueError
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def run_under(engine: str, argv: list[str], out) -> tuple[dict, torch.Tensor]:
    """The logs of a run, without what differs between two runs, and its change."""
    command = [sys.executable, str(REPOSITORY / "train.py"), *argv, "--output-dir", str(out)]
    env = os.environ | {"CLIP_FORGET_ENGINE": engine}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = (out / "ToyAnimals" / "log.txt").read_text()
    assert f"engine: {engine}".lower() in log.lower()
    logs = json.loads((out / "logs.json").read_text())
    solver = logs["ToyAnimals"]["cat"]["solver"]
    assert solver.pop("seconds") > 0 and solver.pop("adapter_sha256")
    return logs, load_adapter(out / solver["adapter"]).delta()


# The control: two runs of one engine agree.
@pytest.mark.parametrize("engine", ["builtin", pytest.param("dassl", marks=needs_dassl)])
def test_both_engines_give_the_same(engine, toy_args, tmp_path):
    argv = [*toy_args, "--forget", "cat"]
    logs, delta = run_under("builtin", argv, tmp_path / "a")
    others, other = run_under(engine, argv, tmp_path / "b")
    assert logs == others and torch.equal(delta, other)
