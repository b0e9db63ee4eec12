"""What many tests start from: small feature bundles, and the command line in process."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
import torch
from torch.nn.functional import normalize

import train
from clip.bundle import FeatureBundle, bundle_path
from datasets import mini
from evaluation.live.look import Live
from evaluation.zero_shot import Evaluator, ZeroShot, accuracy
from forgetting.errors import ProblemError

# The same examples in every run: a test that fails must fail again. `make test-slow` draws anew.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(1)  # the tests' matrices are small: a second thread only waits

REPOSITORY = Path(__file__).resolve().parents[1]
BACKBONE = "ViT-B/32"
TOY_CLASSES = {
    "ToyAnimals": ["cat", "Dog", "sea_horse", "C/V", "owl", "newt"],
    "ToyTools": ["hammer", "saw", "file", "axe"],
}
W, D = 24, 16

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH")


def toy_bundle(dataset: str, images_per_class: int = 12) -> FeatureBundle:
    """Separable classes: images lie around the text embedding of their class."""
    names = TOY_CLASSES[dataset]
    generator = torch.Generator().manual_seed(sorted(TOY_CLASSES).index(dataset))
    projection = torch.randn(W, D, generator=torch.Generator().manual_seed(99)) / W**0.5
    hidden = torch.randn(len(names), W, generator=generator) * 4
    prompt_hidden = hidden + 0.2 * torch.randn(len(names), W, generator=generator)
    labels = torch.arange(len(names)).repeat_interleave(images_per_class)
    noise = 0.15 * torch.randn(len(labels), D, generator=generator)
    images = normalize(normalize(prompt_hidden @ projection, dim=1)[labels] + noise, dim=1)
    retain_names = ["cat", "sea horse", *(f"thing {number}" for number in range(28))]
    return FeatureBundle(
        image_features=images,
        labels=labels,
        class_hidden=prompt_hidden,
        forget_hidden=hidden,
        retain_hidden=torch.randn(len(retain_names), W, generator=generator) * 4,
        neutral_hidden=torch.randn(1, W, generator=generator),
        text_projection=projection,
        backbone=BACKBONE,
        weights="toy",
        dataset=dataset,
        split="test",
        template="a photo of a {}.",
        classnames=names,
        retain_names=retain_names,
    )


def accuracies(bundle: FeatureBundle, classes: list[str], edit=None, removed=()) -> dict:
    """The accuracies of `classes` of a set as logs have them, under an edit if there is one."""
    evaluator = Evaluator(bundle, {})
    if edit is None:
        return evaluator.before(classes)[bundle.dataset]
    return evaluator.after([classes], [edit], [removed])[0][bundle.dataset]


def whole_set(bundle: FeatureBundle, edit=None) -> float | None:
    """The accuracy over all images of a set, under an edit if there is one."""
    zero_shot = ZeroShot(bundle)
    return accuracy(zero_shot.correct_before if edit is None else zero_shot.correct([edit])[0])


@pytest.fixture
def features(tmp_path: Path) -> Path:
    for dataset in TOY_CLASSES:
        toy_bundle(dataset).save(bundle_path(tmp_path / "features", BACKBONE, dataset))
    return tmp_path / "features"


def toy_line(place: Path, *options: str) -> list[str]:
    """A command line on ToyAnimals; the features, the results and the cache lie in `place`."""
    return [
        *("--dataset", "ToyAnimals", "--features", str(place / "features"), "--backbone", BACKBONE),
        *("--output-dir", str(place / "out"), "--cache", str(place / "cache"), *options),
    ]


@pytest.fixture
def toy_args(features: Path, tmp_path: Path) -> list[str]:
    """A quick command line on ToyAnimals; append flags or KEY VALUE pairs."""
    return [
        *toy_line(tmp_path, "FORGET.LAMB_PRESERVE", "0.05", "FORGET.LAMB_FORGET", "3.0"),
        *("FORGET.LAMB_WEIGHT", "0.02"),
        *("TRAINER.FORGETLORA.STEPS", "100", "TRAINER.FORGETLORA.MAX_TRIALS", "2"),
    ]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A headless Chromium, for tests that skip where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Live:
    """`mini` with a few images of each class, as somebody sees it in the app."""
    folder = tmp_path_factory.mktemp("live")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini, "TEST_IMAGES", 3)
        patch.setattr(mini, "TRAIN_IMAGES", 1)
        return Live("mini", "", folder / "data", folder / "cache")


@contextmanager
def one_line(match: str | None, *parts: object) -> Iterator[None]:
    """A refusal of one line, in which a pattern and all `parts` stand."""
    with pytest.raises(ProblemError, match=match) as error:
        yield
    text = str(error.value)
    assert len(text.splitlines()) == 1 and all(str(part) in text for part in parts), text


def refuses(match: str | None, call: Callable, /, *args: object, **options: object) -> None:
    """A call that must be refused, in one line."""
    with one_line(match):
        call(*args, **options)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture):
    """Run a command line that must be refused; returns its one line on stderr."""

    def run(argv: list[str], cli: Callable = train.cli) -> str:
        assert cli(argv) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        lines = [line for line in lines if line.startswith("error:") or "Traceback" in line]
        assert len(lines) == 1 and lines[0].startswith("error:"), lines
        return lines[0]

    return run


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """What matplotlib draws into files, as its own objects."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: save(self, *a, **k) or saved.append(self)
    )
    return saved
