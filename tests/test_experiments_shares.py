"""`python -m experiments shares`: how much of a class's change other texts feel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experiments.alone import Alone
from experiments.shares import main, shares
from tests.paraphrase_fixtures import CLASSES, unit, world

WORDS = torch.tensor([0.8, 0.1])  # of the class's own name, in two other words for it


@pytest.fixture
def bundles():
    rows = [("newt", "synonym", f"eft {i}", w * unit(0) + unit(12)) for i, w in enumerate(WORDS)]
    other = replace(
        world(),
        dataset="Others",
        classnames=["red", "blue", "green", "grey"],
        forget_hidden=torch.stack([unit(4), unit(5), unit(6), unit(7)]),
        retain_hidden=torch.stack([unit(0, 13), unit(13), unit(9)]),
        retain_names=["Toad", "violet", "half a newt"],
    )
    return world(rows=rows), other


@pytest.mark.parametrize("opts", [(), ("TRAINER.FORGETEXACT.OTHERS", "0")])
def test_shares_are_those_of_the_formula(bundles, opts):
    bundle, other = bundles
    found = {kind: rest for _, kind, *rest in shares(bundle, [other], opts)}
    alone = Alone(bundle, [other], opts)
    retain, mu = alone.retain, alone.retained.ridge.mu
    rows = retain.rows.double()

    def share(label, h):
        stays = retain.shares * ~alone.leaving[label]
        k = (rows.T * stays) @ rows + mu * torch.eye(len(h))
        own = torch.linalg.solve(k, bundle.forget_hidden[label].double())
        return h.double() @ own / (bundle.forget_hidden[label].double() @ own)

    words = torch.stack([share(0, w * unit(0) + unit(12)) for w in WORDS])
    assert found["synonym"][:2] == [2, pytest.approx(words.mean())]
    unlisted = [unit(13), unit(9), *(other.forget_hidden if opts else [])]  # "toad" is retained
    expected = torch.stack([share(i, h) for i in range(len(CLASSES)) for h in unlisted])
    assert found["unlisted names"][0] == len(expected)
    assert found["unlisted names"][2] == pytest.approx(expected.square().mean().sqrt())
    assert found["unlisted names"][4] == pytest.approx(expected.max())


def test_the_command_prints_every_set(bundles, tmp_path, capsys):
    for bundle in bundles:
        bundle.save(tmp_path / "mini" / f"{bundle.dataset}.safetensors")
    table = main(["--features", str(tmp_path), "--backbone", "mini"])
    assert set(table["set"]) == {"Planted", "Others"}
    printed = capsys.readouterr().out
    assert "unlisted names" in printed and len(printed.splitlines()) == len(table) + 1
