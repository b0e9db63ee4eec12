"""engine/: both engines behave alike.

Every test that takes `kit` runs on the builtin engine and, where Dassl imports, on Dassl.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from yacs.config import CfgNode

import engine
from engine import UserError
from engine.log import Tee

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("INPUT", "DATASET", "DATALOADER", "MODEL", "OPTIM", "TRAIN", "TEST", "TRAINER")
SINGLE = ("OUTPUT_DIR", "RESUME", "SEED", "USE_CUDA", "VERBOSE", "VERSION")


def need_dassl():
    """Dassl's engine; a missing Dassl skips the test unless this run is meant to have one."""
    if find_spec("dassl") is None and os.environ.get("CLIP_FORGET_ENGINE") != "dassl":
        pytest.skip("Dassl is not installed (make test-dassl DASSL=PATH)")
    return import_module("engine.on_dassl")


@pytest.fixture(params=["builtin", "dassl"])
def kit(request, monkeypatch):
    """An engine's module; what a test registers there is forgotten after it."""
    module = need_dassl() if request.param == "dassl" else import_module("engine.builtin")
    for registry in (module.TRAINER_REGISTRY, module.DATASET_REGISTRY):
        for name, value in vars(registry).items():
            if isinstance(value, dict):
                monkeypatch.setattr(registry, name, dict(value))
    return module


def python(code: str, path: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run `code` in a process of its own; `path` comes before the repository on sys.path."""
    paths = f"{path}{os.pathsep}{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


# --- which engine ---------------------------------------------------------------------------

REPORT = """
import sys
HIDE
from engine.errors import UserError
try:
    import engine
    print(engine.ENGINE, engine.engine_description(), sep="|")
except UserError as error:
    print("UserError", error, sep="|")
"""
VISIBLE, HIDDEN = REPORT.replace("HIDE", ""), REPORT.replace("HIDE", "sys.modules['dassl'] = None")


def test_a_wrong_engine_is_one_line():
    told = python(VISIBLE, CLIP_FORGET_ENGINE="dasl").stdout
    assert told.startswith(
        "UserError|CLIP_FORGET_ENGINE: unknown engine 'dasl'; did you mean 'dassl'"
    )
    assert told.count("\n") == 1


def test_a_wrong_engine_that_nobody_catches_is_one_line_too():
    ended = python("from engine import SimpleTrainer", CLIP_FORGET_ENGINE="dasl")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: CLIP_FORGET_ENGINE: unknown engine 'dasl'; did you")
    assert ended.stderr.count("\n") == 1
    crash = "import engine\ntry: engine.ENGINE\nexcept engine.UserError: 1 / 0"
    assert "Traceback" in python(crash, CLIP_FORGET_ENGINE="dasl").stderr  # the control


def test_a_forced_dassl_that_is_missing_is_one_line():
    told = python(HIDDEN, CLIP_FORGET_ENGINE="dassl").stdout
    assert told.startswith("UserError|CLIP_FORGET_ENGINE=dassl, but Dassl is not installed; put")
    assert told.count("\n") == 1


def test_builtin_runs_where_dassl_is_missing():
    told = python(HIDDEN, CLIP_FORGET_ENGINE="").stdout
    assert told == "builtin|engine: builtin (Dassl is not installed)\n"


def test_a_broken_dassl_says_what_is_broken(tmp_path):
    (tmp_path / "dassl").mkdir()
    (tmp_path / "dassl" / "__init__.py").write_text("import no_such_requirement\n")
    told = python(VISIBLE, tmp_path, CLIP_FORGET_ENGINE="dassl").stdout
    assert "but Dassl does not import (ModuleNotFoundError: No module named 'no_such_req" in told
    assert told.startswith("UserError|") and told.count("\n") == 1


def test_the_engine_of_this_process_is_the_one_asked_for():
    wanted = os.environ.get("CLIP_FORGET_ENGINE") or engine.ENGINE
    assert wanted == engine.ENGINE
    name = {"dassl": "Dassl 0", "builtin": "builtin ("}[engine.ENGINE]
    assert engine.engine_description().startswith(f"engine: {name}")


def test_every_name_is_offered(kit):
    for name in engine.ENGINE_NAMES:
        assert hasattr(kit, name), name
    for name in engine.__all__:
        assert getattr(engine, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = engine.no_such_name


def test_dassls_own_objects_are_handed_on():
    kit = need_dassl()
    dassl_engine, dassl_data = import_module("dassl.engine"), import_module("dassl.data.datasets")
    assert kit.TRAINER_REGISTRY is dassl_engine.TRAINER_REGISTRY
    assert kit.SimpleTrainer is dassl_engine.SimpleTrainer
    assert kit.DATASET_REGISTRY is dassl_data.DATASET_REGISTRY
    assert issubclass(kit.DatasetBase, dassl_data.DatasetBase)
    assert isinstance(kit.Datum("a.png"), dassl_data.Datum)


# --- config ---------------------------------------------------------------------------------


def test_config_has_the_sections_and_every_copy_is_its_own(kit):
    cfg = kit.get_cfg_default()
    assert set(SECTIONS + SINGLE) <= set(cfg)
    cfg.INPUT.SIZE = (32, 32)
    cfg.DATALOADER.TRAIN_X.BATCH_SIZE = 7
    fresh = kit.get_cfg_default()
    assert fresh.INPUT.SIZE == (224, 224)
    assert fresh.DATALOADER.TRAIN_X.BATCH_SIZE == fresh.DATALOADER.TRAIN_U.BATCH_SIZE == 32


def test_config_keys_and_defaults_are_dassls():
    theirs = need_dassl().get_cfg_default()
    ours = import_module("engine.builtin").get_cfg_default()
    for key, value in list(theirs.TRAINER.items()):
        if isinstance(value, CfgNode):  # settings of Dassl's own trainers
            del theirs.TRAINER[key]
    for key in SECTIONS + SINGLE:
        assert ours[key] == theirs[key], key
        assert type(ours[key]) is type(theirs[key]), key
    assert set(ours) == set(theirs)


# --- registry -------------------------------------------------------------------------------


def test_registry(kit):
    registry = kit.Registry("THING")

    @registry.register()
    class First:
        pass

    class Second:
        pass

    registry.register(Second)
    assert registry.get("First") is First
    assert registry.registered_names() == ["First", "Second"]
    with pytest.raises(KeyError, match="First"):
        registry.register(First)
    registry.register(First, force=True)
    with pytest.raises(KeyError, match="Frist"):
        registry.get("Frist")


def test_a_mistyped_name_is_told_the_nearest(kit):
    @kit.TRAINER_REGISTRY.register()
    class ForgetSomethingElse:
        def __init__(self, cfg):
            self.cfg = cfg

    cfg = kit.get_cfg_default()
    cfg.TRAINER.NAME = "ForgetSomethingElse"
    assert kit.build_trainer(cfg).cfg is cfg
    cfg.TRAINER.NAME = "ForgetSomethingEsle"
    with pytest.raises(
        ValueError, match=r"did you mean 'ForgetSomethingElse'|do you mean .ForgetSomethingElse"
    ):
        kit.build_trainer(cfg)


def test_builtin_names_are_user_errors():
    kit = import_module("engine.builtin")
    cfg = kit.get_cfg_default()
    cfg.TRAINER.NAME = "NoSuchTrainer"
    with pytest.raises(UserError) as caught:
        kit.build_trainer(cfg)
    assert str(caught.value).startswith("unknown trainer 'NoSuchTrainer'")


# --- data -----------------------------------------------------------------------------------


def data(kit, *labels: int, folder: str = "nowhere"):
    return [
        kit.Datum(f"{folder}/{i}.png", label, 0, f"class {label}") for i, label in enumerate(labels)
    ]


def test_datum_of_a_missing_file(kit):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datum = kit.Datum(impath="no/such.png", label=3, domain=1, classname="toy poodle")
    assert (datum.impath, datum.label, datum.domain, datum.classname) == (
        "no/such.png",
        3,
        1,
        "toy poodle",
    )
    with pytest.raises(AttributeError):
        datum.label = 4


def test_classes_come_from_all_splits(kit):
    dataset = kit.DatasetBase(train_x=[], val=data(kit, 2), test=data(kit, 1, 0, 1))
    assert dataset.train_x == [] and dataset.train_u is None and len(dataset.test) == 3
    assert dataset.num_classes == 3
    assert dataset.classnames == ["class 0", "class 1", "class 2"]
    assert dataset.lab2cname == {0: "class 0", 1: "class 1", 2: "class 2"}
    assert kit.DatasetBase(train_x=data(kit, 0, 1), test=data(kit, 2)).num_classes == 3
    assert kit.DatasetBase(test=[]).num_classes == 0


def test_labels_that_cannot_index_the_class_names(kit):
    with pytest.raises(UserError, match="no image has label 1"):
        kit.DatasetBase(test=data(kit, 0, 2))
    twice = [*data(kit, 0), kit.Datum("b.png", 0, 0, "other")]
    with pytest.raises(UserError, match="two class names, 'class 0' and 'other'"):
        kit.DatasetBase(test=twice)


def test_few_shot(kit):
    dataset = kit.DatasetBase(test=data(kit, 0, 0, 0, 1))
    few = dataset.generate_fewshot_dataset(dataset.test, num_shots=2)
    assert sorted(datum.label for datum in few) == [0, 0, 1]
    repeated = dataset.generate_fewshot_dataset(dataset.test, num_shots=2, repeat=True)
    assert sorted(datum.label for datum in repeated) == [0, 0, 1, 1]
    assert list(dataset.generate_fewshot_dataset(dataset.test, [])) == [dataset.test, []]


@pytest.fixture
def images(tmp_path):
    """Six images of 40 x 32 pixels; image i is of colour 40 i, label i % 3."""
    for i in range(6):
        Image.new("RGB", (40, 32), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def small_config(kit) -> CfgNode:
    cfg = kit.get_cfg_default()
    cfg.INPUT.SIZE = (32, 32)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.USE_CUDA = False
    return cfg


def test_loader_yields_dassls_batches(kit, images):
    cfg = small_config(kit)
    source = data(kit, *[0, 1, 2] * 2, folder=str(images))
    transform = kit.build_transform(cfg, is_train=False)
    loader = kit.build_data_loader(
        cfg, data_source=source, batch_size=4, tfm=transform, is_train=False
    )
    first, second = loader
    assert set(first) == {"img", "label", "domain", "impath", "index"}
    assert first["img"].shape == (4, 3, 32, 32) and first["img"].dtype == torch.float32
    assert first["label"].tolist() == [0, 1, 2, 0] and second["index"].tolist() == [4, 5]
    assert first["impath"][1] == source[1].impath
    assert torch.allclose(first["img"][3, 0], torch.tensor(120 / 255))
    training = kit.build_data_loader(cfg, "RandomSampler", source, 4, tfm=transform, is_train=True)
    assert len(training) == 1  # the last, incomplete batch is dropped


def test_loader_takes_a_wrapper_and_refuses_what_it_cannot(kit, images):
    cfg = small_config(kit)

    class Labels(torch.utils.data.Dataset):
        def __init__(self, cfg, data_source, transform=None, is_train=False):
            self.labels = [datum.label for datum in data_source]

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            return {"label": self.labels[index]}

    source = data(kit, 0, 1, folder=str(images))
    loader = kit.build_data_loader(cfg, data_source=source, dataset_wrapper=Labels)
    assert [batch["label"].tolist() for batch in loader] == [[0, 1]]
    with pytest.raises((UserError, ValueError), match="NoSuchSampler"):
        kit.build_data_loader(cfg, "NoSuchSampler", source)
    with pytest.raises(AssertionError):
        kit.build_data_loader(cfg, data_source=[], is_train=False)


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("random_resized_crop", "random_flip", "normalize"),
        ("random_crop",),
        ("random_translation", "normalize"),
        ("center_crop", "normalize"),
    ],
)
def test_transforms(kit, names):
    cfg = small_config(kit)
    cfg.INPUT.TRANSFORMS = names
    image = Image.fromarray(np.arange(40 * 32 * 3, dtype=np.uint32).reshape(32, 40, 3).astype("u1"))
    for is_train in (True, False):
        out = kit.build_transform(cfg, is_train)(image)
        assert out.shape == (3, 32, 32) and out.dtype == torch.float32
        assert (out.min() < 0) == ("normalize" in names)


def test_transforms_of_the_test_set_are_equal_to_the_last_bit():
    """The encoder sees the same pixels under both engines."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (70, 50, 3), dtype=np.uint8))
    results = []
    for kit in (import_module("engine.builtin"), need_dassl()):
        cfg = small_config(kit)
        cfg.INPUT.TRANSFORMS = ("random_flip", "normalize")
        cfg.INPUT.INTERPOLATION = "bicubic"
        results.append(kit.build_transform(cfg, is_train=False)(image))
    assert torch.equal(*results)


def test_no_transform_and_an_unknown_one(kit):
    cfg = small_config(kit)
    with pytest.raises((UserError, AssertionError)):
        kit.build_transform(cfg, choices=["random_flop"])
    cfg.INPUT.NO_TRANSFORM = True
    assert kit.build_transform(cfg) is None


# --- trainer --------------------------------------------------------------------------------


def make_trainer(kit, images):
    """A trainer whose model knows labels 0 and 1 of the red images, but takes 2 for 0."""

    @kit.DATASET_REGISTRY.register()
    class ReadsRed(kit.DatasetBase):
        def __init__(self, cfg):
            source = data(kit, *[0, 1, 2] * 2, folder=cfg.DATASET.ROOT)
            super().__init__(train_x=source, val=source[:2], test=source)

    class Red(nn.Module):
        def forward(self, x):
            number = (x[:, 0].mean((1, 2)) * 255 / 40).round().long()  # (b, 3, h, w) -> (b,)
            label = torch.where(number % 3 == 2, 0, number % 3)
            return nn.functional.one_hot(label, 3).float()  # (b,) -> (b, 3)

    @kit.TRAINER_REGISTRY.register()
    class KnowsRed(kit.SimpleTrainer):
        def check_cfg(self, cfg):
            self.order = ["check_cfg"]

        def build_data_loader(self):
            self.order.append("build_data_loader")
            super().build_data_loader()

        def build_model(self):
            self.order.append("build_model")
            self.model = Red()
            self.register_model("red", self.model)

    cfg = small_config(kit)
    cfg.DATASET.ROOT = str(images)
    cfg.DATASET.NAME = "ReadsRed"
    cfg.TRAINER.NAME = "KnowsRed"
    cfg.DATALOADER.TRAIN_X.BATCH_SIZE = 2
    return kit.build_trainer(cfg)


def test_trainer_builds_in_dassls_order_and_tests(kit, images, capsys):
    trainer = make_trainer(kit, images)
    assert trainer.order == ["check_cfg", "build_data_loader", "build_model"]
    assert trainer.device == torch.device("cpu") and trainer.num_classes == 3
    assert trainer.lab2cname[2] == "class 2" and trainer.get_model_names() == ["red"]
    assert trainer.test() == pytest.approx(100 * 4 / 6)
    assert not trainer.model.training
    assert trainer.test(split="val") == 100.0
    assert "accuracy: 66.7%" in capsys.readouterr().out
    with pytest.raises(AssertionError):
        trainer.register_model("red", trainer.model)


# --- log ------------------------------------------------------------------------------------


def test_log_is_kept_and_the_console_stays_open(kit, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back at the end
    console = sys.stdout
    for text in ("first run", "second run", "third run"):
        kit.setup_logger(str(tmp_path))
        print(text)
    assert sys.stdout.isatty() is False
    kit.setup_logger(None)
    monkeypatch.undo()
    logs = sorted(tmp_path.iterdir())
    assert [log.read_text() for log in logs] == ["first run\n", "second run\n", "third run\n"]
    assert logs[0].name == "log.txt" and all(log.name.startswith("log.txt") for log in logs)
    assert not isinstance(console, Tee) and not console.closed
    print("console works")
    assert capsys.readouterr().out == "first run\nsecond run\nthird run\nconsole works\n"


def test_log_at_a_file_and_where_it_cannot_be(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    kit.setup_logger(str(tmp_path / "a" / "run.log"))
    print("here")
    assert (tmp_path / "a" / "run.log").read_text() == "here\n"  # before any flush or exit
    with pytest.raises(UserError, match="cannot write the log"):
        kit.setup_logger(str(tmp_path / "a" / "run.log" / "b"))


# --- tools ----------------------------------------------------------------------------------


def draw() -> tuple[float, float, float]:
    import random

    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_zero_is_a_seed(kit):
    kit.set_random_seed(0)
    first = draw()
    other = draw()
    kit.set_random_seed(0)
    assert draw() == first
    assert all(a != b for a, b in zip(first, other, strict=True))
    kit.set_random_seed(1)
    assert draw() != first


def test_small_tools(kit, tmp_path, images):
    kit.write_json({"ä": [1, 0.1]}, str(tmp_path / "new" / "a.json"))
    assert kit.read_json(str(tmp_path / "new" / "a.json")) == {"ä": [1, 0.1]}
    kit.mkdir_if_missing(str(tmp_path / "x" / "y"))
    kit.mkdir_if_missing(str(tmp_path / "x" / "y"))
    assert (tmp_path / "x" / "y").is_dir()
    assert kit.read_image(str(images / "1.png")).getpixel((0, 0)) == (40, 0, 0)
    (tmp_path / "broken.png").write_bytes(b"no image")
    for path in ("broken.png", "missing.png"):
        with pytest.raises(OSError, match=path):
            kit.read_image(str(tmp_path / path))


def test_environment_is_named(kit):
    assert torch.__version__.split("+")[0] in kit.collect_env_info()
