"""FeatureBundle files: what is written comes back, and what is wrong is named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from clip.bundle import (
    FORMAT,
    SHAPES,
    FeatureBundle,
    bundle_path,
    list_bundles,
    load_bundle,
    load_bundles,
)
from forgetting.errors import ProblemError
from tests.conftest import one_line, refuses, toy_bundle

N, C, M, W, D = 72, 6, 30, 24, 16


def make() -> FeatureBundle:
    bundle = replace(toy_bundle("ToyAnimals"), dataset="Some", weights="ab" * 32)
    return replace(bundle, extra={"a": "{}"}, extra_tensors={"more": torch.arange(3)})


def same(one: FeatureBundle, other: FeatureBundle) -> bool:
    first, second = (vars(bundle) | bundle.extra_tensors for bundle in (one, other))
    return first.keys() == second.keys() and all(
        torch.equal(x, second[key]) if torch.is_tensor(x) else x == second[key]
        for key, x in first.items()
        if key != "extra_tensors"
    )


@pytest.mark.parametrize("images", [N, 0])
def test_a_saved_bundle_comes_back(tmp_path: Path, images: int) -> None:
    bundle = make()
    rows = {key: getattr(bundle, key)[:images] for key in ("image_features", "labels")}
    bundle = replace(bundle, **rows)
    path = bundle_path(tmp_path, "ViT-B/32", "Some")
    bundle.save(path)
    assert path == tmp_path / "ViT-B-32" / "Some.safetensors"
    assert same(load_bundle(tmp_path, "ViT-B/32", "Some"), bundle)
    assert not same(bundle, replace(bundle, split="val"))
    assert list_bundles(tmp_path, "ViT-B/32") == {"Some": path}
    assert list(path.parent.iterdir()) == [path]


def test_what_is_there_or_is_invalid_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(ProblemError, match="labels"):
        replace(make(), labels=torch.full((N,), C)).save(path)
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"mine")
    with pytest.raises(ProblemError, match="exists"):
        make().save(path)
    assert path.read_bytes() == b"mine"


def write(folder: Path, **changes: object) -> Path:
    """The file of `make()` with keys replaced, or left out where the value is None."""
    path = folder / "file.safetensors"
    make().save(path)
    with safe_open(path, framework="pt") as file:
        keys = file.keys()
        tensors = {key: file.get_tensor(key) for key in keys}
        metadata = dict(file.metadata())
    for key, value in changes.items():
        store = tensors if key in SHAPES else metadata
        store.pop(key, None)
        if value is not None:
            store[key] = value
    save_file(tensors, path, metadata=metadata)
    return path


def nan(shape: tuple[int, ...]) -> torch.Tensor:
    tensor = torch.zeros(shape)
    tensor[0, 0] = float("nan")
    return tensor


WRONG = [
    ("format", FORMAT[:-1] + "2", "not 'clip-forget-features/1'"),
    ("backbone", None, "is missing"),
    ("retain_hidden", None, "is missing"),
    ("classnames", '["a", ', "not valid JSON"),
    ("retain_names", '{"a": 1}', "not a JSON list of texts"),
    ("classnames", json.dumps(["a", "b"]), r"class_hidden has shape .*\(2, 24\)"),
    ("retain_names", json.dumps(["a"] * 6), r"retain_hidden has shape \(30, 24\)"),
    ("classnames", "[]", "is empty"),
    ("classnames", '["owl", "a b", "a_b", "c", "d", "e"]', "1 and 2 are both called 'a_b'"),
    ("classnames", '["owl", "_ ", "elk", "c", "d", "e"]', "label 1 has an empty name"),
    ("retain_names", "[" * 100_000, "not valid JSON"),
    ("classnames", "9" * 5000, "classnames"),
    ("retain_names", '["\\ud800"]', "retain_names"),
    ("template", "a photo", "must hold {} once"),
    ("template", "{} and {}", "must hold {} once"),
    ("image_features", torch.eye(N), r"\(72, 72\)"),
    ("labels", torch.zeros(N + 1, dtype=torch.int64), r"\(73,\)"),
    ("class_hidden", torch.zeros(C, W + 1), r"\(6, 25\)"),
    ("neutral_hidden", torch.zeros(2, W), r"\(2, 24\)"),
    ("retain_hidden", nan((M, W)), "NaN"),
    ("text_projection", torch.full((W, D), float("inf")), "infinite"),
    ("labels", torch.full((N,), C), "0 to 5"),
    ("labels", torch.full((N,), -1), "from -1"),
    ("labels", torch.zeros(N), "not integers"),
    ("class_hidden", torch.zeros(C, W, dtype=torch.int8), "int8"),
    ("image_features", 1.02 * make().image_features, "not L2-normalised"),
    ("identity", "[]", "identity does not say"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, key: str, value: object, message: str) -> None:
    path = write(tmp_path, **{key: value})
    with one_line(message, path, *([key] if "shape" not in message else [])):
        FeatureBundle.load(path)


def test_the_untouched_file_is_valid(tmp_path: Path) -> None:
    """Negative control of the cases above."""
    assert same(FeatureBundle.load(write(tmp_path)), make())
    FeatureBundle.load(write(tmp_path / "b", image_features=1.005 * make().image_features))
    # ImageNet has a dog "Cardigan" and a "cardigan"; prompts may be made by no template.
    case = {"classnames": json.dumps(["Cardigan", "cardigan", *"abcd"]), "template": "ensemble"}
    FeatureBundle.load(write(tmp_path / "c", **case))
    half = make().image_features.half()
    found = FeatureBundle.load(write(tmp_path / "d", image_features=half)).image_features
    assert torch.equal(found, half.float())


def test_a_folder_says_what_it_holds(tmp_path: Path) -> None:
    refuses("no folder", list_bundles, tmp_path / "none", "RN50")
    make().save(bundle_path(tmp_path, "ViT-B/32", "Some"))
    refuses("ViT-B-32", list_bundles, tmp_path, "RN50")
    for hidden in (".tmp-12", ".."):
        replace(make(), dataset=hidden).save(bundle_path(tmp_path, "ViT-B/32", hidden))
    assert list(list_bundles(tmp_path, "ViT-B/32")) == ["Some"]
    for name in ("Sone", ".."):
        refuses(f"no feature bundle of '{name}'", load_bundle, tmp_path, "ViT-B/32", name)
    refuses("data sets there: Some", load_bundle, tmp_path, "ViT-B/32", "Sone")
    make().save(bundle_path(tmp_path, "RN50", "Some"))
    refuses("backbone is 'ViT-B/32'", load_bundle, tmp_path, "RN50", "Some")


def test_bundles_of_a_run_are_of_one_model(tmp_path: Path) -> None:
    names = ["Some", "Half", "Other"]
    bundle = replace(make(), extra={"model": "gelu"})
    half = bundle.text_projection.half().float()  # rounded by whoever saved it
    others = {"Some": bundle, "Half": replace(bundle, dataset="Half", text_projection=half)}
    for name, each in others.items():
        each.save(bundle_path(tmp_path, "ViT-B/32", name))
    assert list(load_bundles(tmp_path, "ViT-B/32")) == ["Half", "Some"], "all of the folder"
    path = bundle_path(tmp_path, "ViT-B/32", "Other")
    wide = {key: torch.randn(len(getattr(bundle, key)), W + 1) for key in SHAPES if "hidden" in key}
    wide["text_projection"] = torch.randn(W + 1, D)
    for changes, message in (
        ({"weights": "cd" * 32}, "different weights"),
        ({"text_projection": bundle.text_projection.flip(0)}, "different projections"),
        (wide, "different projections"),
        ({"extra": {"model": "quick"}}, "different model configs"),
        ({"extra": {"precision": "bf16"}}, "different precisions"),
    ):
        path.unlink(missing_ok=True)
        replace(bundle, dataset="Other", **changes).save(path)
        with one_line(message, path, bundle_path(tmp_path, "ViT-B/32", "Some")):
            load_bundles(tmp_path, "ViT-B/32", names)
        load_bundles(tmp_path, "ViT-B/32", ["Other"])  # alone it is as good as any
    path.unlink()
    replace(bundle, dataset="Other").save(path)
    found = load_bundles(tmp_path, "ViT-B/32", names)
    assert list(found) == names and same(found["Some"], bundle)
