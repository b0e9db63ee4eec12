"""Retain statistics: a stream that forgets its order, its batches and, on request, a text."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from forgetting import ForgetProblem
from forgetting.errors import ProblemError
from forgetting.solvers.certificate import certify
from forgetting.solvers.exact import solve_exact
from forgetting.statistics import RetainStatistics, square_root
from tests.conftest import REPOSITORY

REAL_CLIP = REPOSITORY.parent / "shared" / "real_clip"
W = 12


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative(a, b):
    return float(torch.linalg.matrix_norm(a - b) / torch.linalg.matrix_norm(b))


def read(**groups) -> RetainStatistics:
    statistics = RetainStatistics(W)
    for name, rows in groups.items():
        statistics.update(name, rows)
    return statistics


@settings(max_examples=50, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 300), max_size=6),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 2**16),
)
def test_batches_order_and_merging_do_not_matter(cuts, order, seed):
    rows = normal(300, W, seed=seed) * 10
    whole = read(names=rows)
    edges = sorted({0, 300, *cuts})
    pieces = [rows[a:b] for a, b in pairwise(edges)]
    order.shuffle(pieces)
    batches, merged = RetainStatistics(W), RetainStatistics(W)
    for piece in pieces:
        batches.update("names", piece)
        merged = merged.merge(read(names=piece))
    for other in (batches, merged):
        assert relative(other.weighted(None), whole.weighted(None)) < 1e-12
        assert other.sha256 == whole.sha256 and other.counts == {"names": 300}
    # Negative control: one row less is another matrix and another name.
    less = read(names=rows[1:])
    assert (
        less.sha256 != whole.sha256 and relative(less.weighted(None), whole.weighted(None)) > 1e-4
    )


def test_weights_follow_the_formula():
    own, vocabulary = normal(5, W), normal(40, W, seed=1)
    statistics = read(own=own, vocabulary=vocabulary)
    weights = {"own": 1.0, "vocabulary": 0.01}
    expected = own.double().T @ own.double() / 5
    expected += 0.01 / 40 * vocabulary.double().T @ vocabulary.double()
    assert relative(statistics.weighted(weights), expected) < 1e-14
    assert statistics.share("vocabulary", weights) == 0.01 / 40
    both = torch.cat([own, vocabulary]).double()
    assert relative(statistics.weighted(None), both.T @ both) < 1e-14
    assert float(statistics.weighted({"own": 0.0, "vocabulary": 0.0}).abs().max()) == 0


def test_a_text_that_leaves_is_gone_and_the_others_weigh_what_they_did():
    rows = normal(40, W) * 10
    statistics = read(names=rows)
    statistics.remove("names", rows[3:5])
    rest = torch.cat([rows[:3], rows[5:]])
    fresh = read(names=rest)
    assert relative(statistics.weighted(None), fresh.weighted(None)) < 1e-12
    assert statistics.share("names", {"names": 1.0}) == 1 / 40 != fresh.share("names", {"names": 1})
    # The same two rows come back: everything is as before, the count included in the name.
    assert statistics.sha256 not in (read(names=rows).sha256, fresh.sha256)
    empty = read(names=rows)
    empty.remove("names", rows)
    assert float(empty.weighted(None).abs().max()) < 1e-10


@pytest.mark.parametrize("m", [8, 200])
def test_only_what_is_there_can_leave(m):
    """Also where a row is within the span of those that are there (m > w)."""
    rows = normal(m, W)
    statistics = read(names=rows)
    before, name = statistics.weighted(None), statistics.sha256
    absent = [normal(1, W, seed=seed) for seed in range(9, 29)]
    absent += [rows[:2].mean(dim=0)[None], rows[:1] * 0.5, rows[:1] * (1 + 1e-6)]
    for row in absent:
        with pytest.raises(ProblemError, match="was not part of it"):
            statistics.remove("names", torch.cat([rows[1:2], row]))
    with pytest.raises(ProblemError, match="was not part of it"):
        statistics.remove("names", rows[[0, 0]])  # it is there once
    with pytest.raises(ProblemError, match=f"{m + 1} rows cannot leave group 'names': it has {m}"):
        statistics.remove("names", torch.cat([rows, rows[:1]]))
    assert torch.equal(statistics.weighted(None), before) and statistics.sha256 == name
    statistics.remove("names", rows[:1])
    with pytest.raises(ProblemError, match="was not part of it"):
        statistics.remove("names", rows[:1])
    statistics.update("names", rows[[1, 1]])
    statistics.remove("names", rows[[1, 1, 1]].double())  # the same number in float64
    with pytest.raises(ProblemError, match="was not part of it"):
        statistics.remove("names", rows[1:2])


def test_what_rounding_would_swallow_stays():
    rows = normal(20, W)
    rows[0] *= 1e8
    statistics = read(names=rows)
    with pytest.raises(ProblemError, match="lost in rounding"):
        statistics.remove("names", rows[:1])
    statistics.remove("names", rows[1:])
    assert statistics.counts == {"names": 20}


def test_save_and_load(tmp_path):
    statistics = read(own=normal(5, W), vocabulary=normal(40, W, seed=1))
    statistics.remove("own", normal(5, W)[:1])
    path = tmp_path / "sub" / "statistics.safetensors"
    statistics.save(path)
    loaded = RetainStatistics.load(path)
    assert torch.equal(loaded.weighted(None), statistics.weighted(None))
    assert loaded.sha256 == statistics.sha256 and loaded.counts == statistics.counts
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it
    with pytest.raises(ProblemError, match="it has 4"):
        loaded.remove("own", normal(5, W))
    with pytest.raises(ProblemError, match="was not part of it"):
        loaded.remove("own", normal(5, W)[:1])  # it has left
    loaded.remove("own", normal(5, W)[1:2])
    loaded.update("own", normal(1, W, seed=7))
    assert loaded.sha256 != statistics.sha256


@pytest.mark.parametrize("content", [None, b"", b"no safetensors", {"left": torch.ones(2, 2)}])
def test_a_file_that_is_no_statistics_is_one_line(tmp_path, content):
    path = tmp_path / "s.safetensors"
    if isinstance(content, dict):
        save_file(content, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ProblemError, match=r"s\.safetensors: (not|cannot)") as caught:
        RetainStatistics.load(path)
    assert "\n" not in str(caught.value)


def test_damaged_statistics_are_noticed(tmp_path):
    path = tmp_path / "s.safetensors"
    read(names=normal(40, W)).save(path)
    with safe_open(str(path), framework="pt") as file:
        metadata, root, keys = file.metadata(), *map(file.get_tensor, ("root.0", "keys.0"))
    root[0, 0] += 1e-9
    save_file({"root.0": root, "keys.0": keys}, path, metadata=metadata)
    with pytest.raises(ProblemError, match="damaged, or changed since"):
        RetainStatistics.load(path)


@pytest.mark.parametrize(
    "rows",
    [
        torch.ones(2, W + 1),
        torch.ones(W),
        torch.ones(2, W, dtype=torch.int64),
        torch.full((2, W), torch.nan),
        torch.full((2, W), 1e200, dtype=torch.float64),  # no float32, and its square is infinite
        torch.ones(2, W).to_sparse(),
        torch.ones(2, W, dtype=torch.complex64),
        torch.ones(2, W).to(torch.float8_e4m3fn),
        torch.ones(2, W).numpy(),
        [[1.0] * W],
    ],
)
def test_rows_that_are_no_hidden_states_change_nothing(rows):
    statistics = read(names=normal(3, W))
    before = statistics.sha256
    for call in (statistics.update, statistics.remove):
        with pytest.raises(ProblemError, match="retained rows"):
            call("names", rows)
    assert statistics.sha256 == before


def test_mistakes_name_the_groups():
    statistics = read(own=normal(3, W), vocabulary=normal(4, W))
    statistics.update("nothing", normal(0, W))  # no rows, no group
    for call in (
        lambda: statistics.weighted({"own": 1.0}),
        lambda: statistics.weighted({"own": 1.0, "vocabulary": 1.0, "others": 1.0}),
        lambda: statistics.share("nothing", {"nothing": 1.0}),
        lambda: statistics.remove("others", normal(1, W)),
    ):
        with pytest.raises(ProblemError, match="'own', 'vocabulary'"):
            call()
    for weight in (-1.0, float("nan"), float("inf"), "1", None, True):
        with pytest.raises(ProblemError, match="weight of group 'own' must be"):
            statistics.weighted({"own": weight, "vocabulary": 1.0})
    with pytest.raises(ProblemError, match="two backbones"):
        statistics.merge(RetainStatistics(W + 1))
    with pytest.raises(ProblemError, match="at least one dimension"):
        RetainStatistics(0)


@pytest.mark.parametrize("m", [0, 1, 7, 12, 50])
def test_square_root(m):
    rows = normal(m, W, dtype=torch.float64)
    gram = rows.T @ rows
    root = square_root(gram)
    assert root.shape == (min(m, W), W)
    assert float((root.T @ root - gram).abs().max()) <= 1e-13 * max(1.0, float(gram.abs().max()))


def gathered(rows: torch.Tensor) -> RetainStatistics:
    """Statistics of rows that came in batches."""
    statistics = RetainStatistics(rows.shape[1])
    for batch in rows.split(7):
        statistics.update("names", batch)
    return statistics


def gaps(problem: ForgetProblem) -> tuple[float, float, float]:
    """Gap of the answer from `H_r`; from statistics, as certified there and judged with `H_r`."""
    blind = replace(problem, retain_hidden=gathered(problem.retain_hidden).root())
    seeing, answer = solve_exact(problem), solve_exact(blind)
    judged = certify(
        seeing.problem, answer.left, answer.right, seeing.y, seeing.u_left, seeing.u_right
    )
    return seeing.certificate.gap, answer.certificate.gap, judged.gap


def small(m, **weights):
    def make(*shape, seed):
        return normal(*shape, seed=seed, dtype=torch.float64)

    return ForgetProblem(
        make(W, 8, seed=1), make(2, W, seed=2), make(m, W, seed=3), make(2, 8, seed=4), **weights
    )


def test_certificate_from_statistics_alone():
    """As good as with `H_r`, in the generic and in the kernel branch."""
    generic = small(40, lamb_forget=9.0, lamb_preserve=0.3, lamb_weight=1.0)
    kernel = small(5, lamb_forget=40.0, lamb_preserve=30.0, lamb_weight=1.0)
    for problem, branch in ((generic, "generic"), (kernel, "kernel")):
        assert solve_exact(problem).branch == branch
        assert max(gaps(problem)) < 1e-10


@pytest.mark.parametrize("m", [9, 40, 200])
@pytest.mark.parametrize(("lamb_forget", "lamb_preserve"), [(40.0, 30.0), (9.0, 0.3), (400.0, 1e4)])
@pytest.mark.filterwarnings("ignore:the exact solver")
def test_the_statistics_see_what_the_rows_say(m, lamb_forget, lamb_preserve):
    """Half of the singular values at 1e-8 of the largest: a gap from statistics is that of H_r."""
    problem = small(m, lamb_forget=lamb_forget, lamb_preserve=lamb_preserve, lamb_weight=1.0)
    u, s, vh = torch.linalg.svd(problem.retain_hidden, full_matrices=False)
    s[len(s) // 2 :] = 1e-8 * s[0]
    problem = replace(problem, retain_hidden=(u * s) @ vh)
    h_r = problem.retain_hidden
    root = gathered(h_r).root()
    answer = solve_exact(replace(problem, retain_hidden=root))
    # The same multipliers, for H_r = Q R itself; R is unique but for the signs of its rows.
    q, r = torch.linalg.qr(h_r)
    u_left = q @ ((r.diagonal() * root.diagonal()).sign()[:, None] * answer.u_left)
    judged = certify(problem, answer.left, answer.right, answer.y, u_left, answer.u_right)
    assert abs(answer.certificate.gap - judged.gap) < 1e-12 and judged.gap < 1e-6
    # Negative control: the square root of G takes those singular values for zero.
    blind = square_root(h_r.T @ h_r)
    assert len(blind) == len(s) // 2 and torch.linalg.matrix_rank(h_r) == len(root) == len(s)
    answer = solve_exact(replace(problem, retain_hidden=blind))
    if lamb_preserve == 30:  # with others they hardly cost anything, or rounding costs as much
        cost = float(problem.objective(answer.delta))
        assert answer.certificate.gap < 1e-10 and cost > answer.certificate.primal * (1 + 1e-12)


@pytest.mark.skipif(not REAL_CLIP.is_dir(), reason="real CLIP features are not here")
@pytest.mark.parametrize(
    ("m", "lamb_weight", "branch"), [(999, 1.0, "generic"), (100, 0.2, "kernel")]
)
def test_certificate_from_statistics_of_real_features(m, lamb_weight, branch):
    with safe_open(str(REAL_CLIP / "ViT-B-16" / "ImageNetText.safetensors"), "pt") as file:
        tensors = {
            name: file.get_tensor(name).double()
            for name in ("forget_hidden", "text_projection", "neutral_hidden")
        }
    hidden, projection = tensors["forget_hidden"], tensors["text_projection"]
    target = torch.nn.functional.normalize(tensors["neutral_hidden"] @ projection, dim=1)
    problem = ForgetProblem(
        projection, hidden[-1:], hidden[:m], target, 50.0, 0.3, lamb_weight=lamb_weight
    )
    assert solve_exact(problem).branch == branch
    assert max(gaps(problem)) <= 1e-9


def test_memory_does_not_grow_with_the_stream():
    """20,000 rows: what is held stays one (w, w) matrix, and eight bytes a row."""
    statistics = RetainStatistics(W)
    for batch in range(2):
        statistics.update("names", normal(100, W, seed=batch))
    tracemalloc.start()
    for batch in range(200):
        statistics.update("names", normal(100, W, seed=batch))
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    held = [v for v in vars(statistics).values() if isinstance(v, dict)]
    tensors = [t for d in held for t in d.values() if isinstance(t, torch.Tensor)]
    assert [tuple(t.shape) for t in tensors] == [(W, W)]
    held = sum(keys.nbytes for keys in statistics._keys["names"])
    assert grown < 200_000 and held == 8 * 20_200 and statistics.counts["names"] == 20_200
