"""Rounding what is forgotten: formats by hand, a table by the command line."""

import pandas as pd
import pytest
import torch

from clip.source import ClipSource
from experiments import rounding
from experiments.__main__ import cli
from forgetting.displacement import Forecast, Margin, rounding_error


def test_formats_change_no_number_by_more_than_they_say():
    x = torch.randn(40, 30, dtype=torch.float64) * torch.logspace(-2, 1, 30).double()
    largest = x.abs().amax(dim=0)
    limits = {"float16": x.abs() / 2**11, "bfloat16": x.abs() / 2**8}
    for name, most in (limits | {"int8": largest / 254, "4 bits": largest / 14}).items():
        after = rounding.FORMATS[name](x)
        assert ((after - x).abs() <= most + 1e-7).all() and ((after - x).abs() > most / 2).any()
        assert torch.equal(rounding.FORMATS[name](after), after)
    assert len(rounding.FORMATS["4 bits"](x)[:, 0].unique()) <= 15


def test_a_margin_above_the_error_survives_it():
    """The error bounds every difference of cosines, and is reached within a factor of two."""
    exact = torch.randn(6, 5, dtype=torch.float64)
    rounded = exact + 0.1 * torch.randn_like(exact)
    a, b = (torch.nn.functional.normalize(x) for x in (exact, rounded))
    image = torch.nn.functional.normalize(b - a)[(b - a).norm(dim=1).argmax()]
    changes = (b - a) @ image
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
