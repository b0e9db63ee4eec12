"""Rounding what is forgotten: formats by hand, a table by the command line."""

import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from clip.source import ClipSource
from experiments import rounding
from experiments.__main__ import cli
from forgetting.displacement import Forecast, Margin, rounding_error


def test_formats_keep_the_nearest_of_their_values():
    x = 2 * torch.rand(4000, 3, dtype=torch.float64) - 1
    rounded = {name: change(x) for name, change in rounding.FORMATS.items()}
    errors = [float((after - x).abs().mean()) for after in rounded.values()]
    assert errors[0] > 0 and errors == sorted(errors)  # from fine to coarse
    assert all(torch.equal(rounding.FORMATS[name](after), after) for name, after in rounded.items())
    assert ((rounded["4 bits"] - x).abs() <= x.abs().amax(dim=0) / 14 + 1e-12).all()
    assert len(rounded["4 bits"][:, 0].unique()) == 15


def test_a_margin_above_the_error_survives_it():
    """The error bounds every difference of cosines, and is reached within a factor of two."""
    exact = torch.randn(6, 5, dtype=torch.float64)
    rounded = exact + 0.1 * torch.randn_like(exact)
    moved = normalize(rounded) - normalize(exact)
    changes = moved @ normalize(moved)[moved.norm(dim=1).argmax()]
    error = rounding_error(7 * exact, rounded)
    assert error / 2 - 1e-12 < (changes[:, None] - changes).abs().max() <= error
    assert Margin(1.01 * error, 0.2).survives(error) and not Margin(error, 0.2).survives(error)
    assert Forecast({}, [], 2 * error, 0.2).survives(error)
    assert not Margin(None, None).survives(0.0)


@pytest.mark.parametrize("way", rounding.TOWERS)
def test_towers_are_rounded_and_left_as_they_were(way):
    if way == "int8 by ONNX":
        pytest.importorskip("onnxruntime.quantization")
    source = ClipSource("mini")
    tokens, w = source.architecture.tokenizer()(["a cat", "red square"]), source.projection
    exact = source.model.encode_text(tokens).double()
    assert 1e-4 < rounding_error(exact, rounding.encode(way, source.model, tokens, w)) < 0.9
    assert torch.equal(source.model.encode_text(tokens).double(), exact)
    zero = rounding.encode(way, source.model, tokens, 0 * w + w.mean())  # the projection is used
    assert zero.std(dim=1).max() < 1e-3 * exact.std(dim=1).min()


def test_a_table_by_the_command_line(features, monkeypatch):
    monkeypatch.chdir(features.parent)
    monkeypatch.setattr(rounding, "stores", lambda images: {"zero": torch.zeros_like})
    assert cli(["rounding", "--features", "features", "--classes", "2"]) == 0
    table = pd.read_csv("rounding/rounding.csv").set_index("way")
    assert len(table) == 2 * 2 * 6 and (table["left exact"] == 0).all()
    fine = table.loc[["projection in float16", "projection in bfloat16", "projection in int8"]]
    assert not fine[["at risk", "back", "rest", "rest untouched"]].any(axis=None)
    lost = table.loc["index in zero"]  # each image is taken for the first class
    assert lost["at risk"].all() and (lost["rest"] < -50).all() and lost["back"].any()
    assert (table.loc["projection in float16", "margin after"] > 0).all()
