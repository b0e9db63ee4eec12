"""Patched embeddings are those that the changed projection gives, to the error that is reported."""

import math
import os

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from forgetting.adapter import Adapter, projection_sha256, save_adapter
from forgetting.cli import cli
from forgetting.deploy.embeddings import condition, patch, patch_file, rounding
from forgetting.errors import ProblemError
from tests.conftest import refuses
from tests.solver_fixtures import normal as random

W, D, N = 24, 32, 40


def make_adapter(projection: Tensor, seed: int = 5, rank: int = 2) -> Adapter:
    """A change of (w, d) about a third as large as the projection."""
    generator = torch.Generator().manual_seed(seed)
    w, d = projection.shape
    left, right = (torch.randn(*shape, generator=generator) for shape in ((w, rank), (rank, d)))
    scale = 0.3 * projection.float().norm() / (left @ right).norm()
    return Adapter(
        left=left * scale,
        right=right,
        projection_sha256=projection_sha256(projection),
        backbone="tiny",
        weights="random",
        dataset="Set",
        classes=["cat"],
        trainer="ForgetExact",
    )


def case(w: int = W, d: int = D, seed: int = 0):
    """W, an adapter, hidden states, and embeddings before and after (unit norm, float64)."""
    weight = (random(w, d, seed=seed) / w**0.5).float()
    adapter = make_adapter(weight, seed=seed + 1)
    hidden = random(N, w, seed=seed + 2)
    delta = adapter.left.double() @ adapter.right.double()
    before = normalize(hidden @ weight.double(), dim=1)
    after = normalize(hidden @ (weight.double() + delta), dim=1)
    return weight, adapter, hidden, before, after


def farthest(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm(dim=1).max())


@given(
    st.integers(1, 12),
    st.integers(0, 8),
    st.integers(0, 2**16),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
def test_patch_is_recomputation_to_the_reported_error(w, more, seed, dtype):
    weight, adapter, _, before, after = case(w, w + more, seed)
    try:
        done, error = patch(before.to(dtype), weight, adapter.left, adapter.right)
    except ProblemError as refusal:  # rounding decides: only where there is reason to say so
        norm = torch.linalg.pinv(weight.double()) @ adapter.delta().double()
        norm = 1 + float(torch.linalg.matrix_norm(norm, 2))
        assert "rounding" in str(refusal) and rounding(dtype, w + more) * (norm + 1) > 1e-3
        return
    assert done.dtype == dtype and done.shape == before.shape
    assert farthest(done, after) <= error


def test_patch_of_a_large_change_of_nothing_and_of_none():
    weight, adapter, _, before, after = case()
    done, error = patch(before, weight, adapter.left, adapter.right)
    assert farthest(done, after) <= error < 1e-10 and farthest(before, after) > 0.1
    # Negative control: W's transpose in the place of its inverse is another map.
    wrong = normalize(before + before @ weight.double().T @ adapter.delta().double(), dim=1)
    assert farthest(wrong, after) > 0.05
    for some in (0 * before, before[:0]):
        assert torch.equal(patch(some, weight, adapter.left, adapter.right, None, False)[0], some)


def test_where_nearly_nothing_is_left_the_arithmetic_is_counted():
    """M nearly 0, in float64: the claimed error is that of W^+ and of the products."""
    for seed in range(20):
        weight, _, hidden, before, _ = case(W, W, seed)
        u, _, v = torch.linalg.svd(weight.double())
        weight = u @ torch.diag(torch.logspace(0, -4, W).double()) @ v
        before = normalize(hidden @ weight, dim=1)
        rest = 1e-6 * random(W, W, seed=seed + 9)
        done, error = patch(before, weight, weight, rest - torch.eye(W).double())
        exact = normalize(hidden @ weight @ rest, dim=1)
        assert 1e-10 < farthest(done, exact) <= error < 1e-2


def test_the_rank_condition():
    weight, adapter, _, before, _ = case()
    assert condition(weight) == pytest.approx(float(torch.linalg.cond(weight.double())))
    low = weight.clone()
    low[-1] = low[0] - low[1]  # two texts with one embedding that the change moves apart
    assert condition(low) == math.inf
    refuses("no full row rank", patch, before, low, adapter.left, adapter.right)
    # Full column rank is no help: w > d always has such texts.
    tall = random(D + 4, D).float()
    made = make_adapter(tall)
    assert torch.linalg.matrix_rank(tall) == D and condition(tall) == math.inf
    refuses(r"\(36, 32\) has no full row rank", patch, before, tall, made.left, made.right)


def test_a_text_of_which_nothing_is_left_is_named():
    weight, _, hidden, before, _ = case()
    h = hidden[3]
    # The change that sends text 3 to zero.
    left, right = (h / h.square().sum())[:, None], -(h @ weight.double())[None]
    refuses("row 3 keeps so little", patch, before.float(), weight, left, right)
    others = torch.cat([before[:3], before[4:]])
    patch(others.float(), weight, left, right)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("row 0 is no text embedding", lambda _: normalize(random(N, D, seed=9), dim=1)),
        ("row 0 is not of length 1", lambda e: 3 * e),
        ("any, 32", lambda e: e.T),
        ("NaN", lambda e: e * torch.nan),
    ],
)
def test_embeddings_of_something_else(words, change):
    weight, adapter, _, before, _ = case()
    refuses(words, patch, change(before), weight, adapter.left, adapter.right)


def test_unnormalised_and_a_bias():
    weight, adapter, hidden, _, _ = case()
    bias = random(D, seed=7)
    delta = adapter.left.double() @ adapter.right.double()
    x = hidden @ weight.double()
    run = (weight, adapter.left, adapter.right)
    done, _ = patch(x, *run, normalised=False)
    assert torch.allclose(done, x + hidden @ delta, atol=1e-10)
    done, _ = patch(x + bias, *run, bias=bias, normalised=False)
    assert torch.allclose(done, x + hidden @ delta + bias, atol=1e-10)
    unit = normalize(x + bias, dim=1)
    refuses("bias.*not normalised", patch, unit, *run, bias=bias)
    refuses("bias.*not normalised", patch, unit, *run, bias=bias, normalised=False)


# --- Files


def write(path, rows: Tensor) -> str | None:
    """A file of embeddings and other things; returns the key to name."""
    if path.suffix == ".npy":
        return numpy.save(path, rows.numpy())
    save_file({"text": rows, "ids": torch.arange(3)}, path, {"by": "me"})
    return "text"


def read(path) -> Tensor:
    if path.suffix == ".npy":
        return torch.from_numpy(numpy.load(path))
    held = load_file(path)
    assert torch.equal(held["ids"], torch.arange(3))
    with safe_open(path, "pt") as file:
        assert file.metadata()["by"] == "me"
    return held["text"]


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files(tmp_path, suffix, dtype):
    weight, adapter, _, before, after = case()
    path, out, other = (tmp_path / f"{name}{suffix}" for name in ("a", "out", "other"))
    key = write(path, before.to(dtype))
    report = patch_file(path, out, weight, adapter, key=key)
    done, kept = read(out), {x: x.read_bytes() for x in (path, out)}
    assert done.dtype == dtype
    assert farthest(done, after) < (1e-5 if dtype == torch.float32 else 5e-3)
    assert farthest(done, after) <= report["error"]
    assert report["rows"] == N and report["condition"] == condition(weight)
    for taken in (out, path):
        refuses("exists", patch_file, path, taken, weight, adapter, key=key)
    for projection in (weight + 1, weight.T, adapter.apply(weight)):  # or changed already
        refuses("projection", patch_file, path, other, projection, adapter, key=key)
    if suffix != ".npy":  # which cannot say it
        refuses("patched already", patch_file, out, other, weight, adapter, key=key)
    assert {x: x.read_bytes() for x in tmp_path.iterdir()} == kept
    patch_file(path, out, weight, make_adapter(weight, seed=77), key=key, overwrite=True)
    assert farthest(read(out), done) > 0.01


def test_files_that_are_refused(tmp_path):
    weight, adapter, _, before, _ = case()
    for name in ("bad.npy", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"nonsense")
    numpy.save(tmp_path / "objects.npy", numpy.array([{}], dtype=object), allow_pickle=True)
    numpy.save(tmp_path / "right.npy", before.numpy())
    save_file({"a": before, "b": before.clone()}, tmp_path / "two.safetensors")
    os.mkfifo(tmp_path / "pipe.npy")
    for words, name, key in (
        ("no such file", "a.npy", None),
        ("no such file", "pipe.npy", None),
        ("not a readable", "bad.npy", None),
        ("not a safetensors", "bad.safetensors", None),
        ("must both end in", "a.pt", None),
        ("not a readable", "objects.npy", None),
        ("--key", "right.npy", "a"),
        ("name the tensor.*'a', 'b'", "two.safetensors", None),
    ):
        out = (tmp_path / "out").with_suffix((tmp_path / name).suffix)
        refuses(words, patch_file, tmp_path / name, out, weight, adapter, key=key)
        assert not out.exists()
    refuses("must both end", patch_file, tmp_path / "a.npy", tmp_path / "b.st", weight, adapter)


def test_command(tmp_path, capsys, monkeypatch):
    """A projection with a bias, of embeddings that are not normalised."""
    weight, adapter, hidden, _, _ = case()
    bias = random(D, seed=4).float()
    monkeypatch.chdir(tmp_path)
    save_file({"last.weight": weight.T.contiguous(), "last.bias": bias}, "m.safetensors")
    save_adapter(adapter, "adapter.safetensors")
    x = hidden @ weight.double() + bias
    numpy.save("e.npy", x.float().numpy())
    words = ["patch", "adapter.safetensors", "e.npy", "--base", "m.safetensors", "--out", "o.npy"]
    assert cli(words) == 2 and "bias" in capsys.readouterr().err
    assert cli([*words, "--unnormalised"]) == 0
    said = capsys.readouterr().out
    assert f"{N} embeddings patched; condition of the projection" in said
    done = torch.from_numpy(numpy.load("o.npy"))
    assert torch.allclose(done.double(), x + hidden @ adapter.delta().double(), atol=1e-4)
