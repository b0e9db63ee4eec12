"""Files of the library: what was changed since it was written is refused, in one line."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from forgetting import Adapter, RetainStatistics, load_adapter, projection_sha256, save_adapter
from forgetting.adapter import FIELDS, read_parts, recipe_fields, recipe_parts
from forgetting.compose import cli
from forgetting.errors import ProblemError
from forgetting.io import digest, write_bytes
from forgetting.solvers.constrained import Ridge

W, D = 6, 4
DEEP = "[" * 100_000 + "]" * 100_000
WORDS = ["null", "true", "-1", "1.5", '"x"', "[]", "{}", "[1]", '{"a": 1}', "NaN", "1e999", "{"]
TEXTS = [*WORDS, "9" * 5000, DEEP, "[" * 500 + "]" * 500, '"\\ud800"', '"a\\nb"', "", "\u2028"]
PAPER = {"lamb_forget": "auto", "lamb_preserve": 0.2, "lamb_weight": 0.05, "rank": 5, "alpha": 1.0}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STATISTICS = RetainStatistics(W)
STATISTICS.update("own", normal(3, W))
STATISTICS.update("vocabulary", normal(20, W, seed=1))
STATISTICS.remove("vocabulary", normal(20, W, seed=1)[:2])
WEIGHTS = {"own": 1.0, "vocabulary": 0.1}


def make(objective="constrained") -> Adapter:
    """An adapter with a recipe of two classes."""
    constrained = objective == "constrained"
    ridge = Ridge(STATISTICS.weighted(WEIGHTS), 0.1) if constrained else None
    projection, hidden = normal(W, D, seed=2), normal(3, W)
    owner, names = torch.tensor([0, 0, 1]), [("Set", "cat"), ("Set", "dog")]
    leaving = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    parts = recipe_parts(
        ridge, hidden, -hidden @ projection, owner, names, hidden, torch.full((3,), 0.3), leaving
    )
    shared = {"objective": objective, "statistics": STATISTICS.sha256}
    shared |= {"weights": WEIGHTS, "mu": 0.1} if constrained else {"weights": None, **PAPER}
    adapter = Adapter(
        left=normal(W, 2, seed=4),
        right=normal(2, D, seed=5),
        projection_sha256=projection_sha256(projection),
        backbone="RN50",
        weights="abc",
        dataset="Set",
        classes=["cat", "dog"],
        trainer="ForgetExact",
        settings={"seed": 0},
        solver={"gap": 1e-12, "texts": ["cat", "dog"]},
    )
    return replace(adapter, **recipe_fields(shared, parts))


def equal(a: Adapter, b: Adapter) -> bool:
    same = torch.equal(a.left, b.left) and torch.equal(a.right, b.right)
    same &= all(getattr(a, name) == getattr(b, name) for name in FIELDS)
    return same and all(torch.equal(a.tensors[name], b.tensors[name]) for name in b.tensors)


def contents(path):
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata()), load_file(path)


def write(path, metadata, tensors, sealed):
    """Write a file by hand; `sealed` makes its digest anew, as somebody who knows how could."""
    tensors = {name: x.clone().contiguous() for name, x in tensors.items()}
    if sealed:
        rest = {key: value for key, value in metadata.items() if key != "sha256"}
        metadata = rest | {"sha256": digest(rest, tensors)}
    save_file(tensors, path, metadata=metadata)


def refused(path, load) -> str:
    with pytest.raises(ProblemError) as caught:
        load(path)
    line = str(caught.value)
    assert path.name in line and len(line.splitlines()) == 1 and len(line) < 600
    return line


def bent(tensor):
    """A tensor in kinds and shapes that it should not have, and with other numbers."""
    yield from (tensor.to(kind) for kind in (torch.int64, torch.bool, torch.float16))
    yield from (tensor.to(torch.float8_e4m3fn), tensor.to(torch.complex64))
    yield from (tensor.double() if tensor.dtype == torch.float32 else tensor.float(),)
    yield from (tensor[:0], tensor[:-1], tensor[None], tensor.flatten()[0], torch.cat([tensor] * 2))
    if tensor.is_floating_point():
        yield from (tensor * torch.nan, tensor * torch.inf)
    changed = tensor.clone()
    changed.view(-1)[0] += 1
    yield changed


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Path of each kind of file, how it is read, and whether what was read is what was written."""
    folder = tmp_path_factory.mktemp("written")
    kinds = {}
    for name in ("constrained", "paper"):
        adapter, path = make(name), folder / f"{name}.safetensors"
        save_adapter(adapter, path)
        kinds[name] = path, load_adapter, lambda found, adapter=adapter: equal(found, adapter)
    path = folder / "statistics.safetensors"
    STATISTICS.save(path)
    kinds["statistics"] = (
        path,
        RetainStatistics.load,
        lambda found: (
            found.sha256 == STATISTICS.sha256
            and found.counts == STATISTICS.counts
            and torch.equal(found.weighted(None), STATISTICS.weighted(None))
        ),
    )
    return kinds


KINDS = pytest.mark.parametrize("kind", ["constrained", "paper", "statistics"])


@KINDS
def test_what_was_written_is_read(written, kind):
    path, load, same = written[kind]
    assert same(load(path))


@KINDS
@pytest.mark.parametrize("sealed", [False], ids=["as it was"])
def test_every_metadata_field(written, kind, sealed, tmp_path):
    """With its digest made anew, a field may only hold what its schema allows."""
    path, load, _ = written[kind]
    metadata, tensors = contents(path)
    count = 0
    for name in metadata:
        for text in [None, *TEXTS]:
            changed = {k: v for k, v in metadata.items() if k != name}
            changed |= {} if text is None else {name: text}
            target = tmp_path / f"{count}.safetensors"
            write(target, changed, tensors, sealed)
            count += 1
            if not sealed:
                refused(target, load)
                continue
            try:
                found = load(target)
            except ProblemError:
                refused(target, load)
                continue
            if name in ("sha256",):
                continue  # made anew: the file is as it was
            # The field says something else, of the right kind; it is read as it stands.
            assert kind != "statistics" and getattr(found, name) == json.loads(text)
            assert name != "recipe" or text == "{}"
    extra = tmp_path / "extra.safetensors"
    write(extra, metadata | {"more": "1"}, tensors, sealed)
    refused(extra, load)
    assert count >= 60


@KINDS
@pytest.mark.parametrize("sealed", [False], ids=["as it was"])
def test_every_tensor(written, kind, sealed, tmp_path):
    path, load, _ = written[kind]
    metadata, tensors = contents(path)
    accepted, count = set(), 0
    for name, tensor in tensors.items():
        others = {key: value for key, value in tensors.items() if key != name}
        variants = [others, *(others | {name: other} for other in bent(tensor))]
        for variant in [*variants, others | {f"{name}.more": tensor}]:
            if variant.keys() == tensors.keys() and (
                variant[name].dtype == tensor.dtype and torch.equal(variant[name], tensor)
            ):
                continue  # such as int64 made int64
            target = tmp_path / f"{count}.safetensors"
            write(target, metadata, variant, sealed)
            count += 1
            if not sealed:
                refused(target, load)
                continue
            try:
                load(target)
                accepted.add(name)
            except ProblemError:
                refused(target, load)
    assert count >= 50
    # Any triangle is one of some rows.
    assert kind != "statistics" or accepted == ({"root.0", "root.1"} if sealed else set())


RECIPE = {
    "objective": [None, 1, "other", [], {}],
    "statistics": [None, "x", "F" * 64, 3],
    "weights": [None, [], {"own": -1}, {"own": "1"}, {"own": True}, 1.0],
    "mu": [None, 0, -1.0, "1", True, [], 10**400],
    "parts": [None, [], {}, [1], [None], "cat", [{}]],
}
PART = {
    "dataset": [None, 1, []],
    "class": [None, 1, {}],
    "forget": [None, 0, -1, 1.0, "1", True, 10**30, 3],
    "leaving": [None, -1, 2.0, "2", False, 10**30, 3],
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(((key,), value) for key, values in RECIPE.items() for value in [*values, ...]),
        *((("parts", 1, key), value) for key, values in PART.items() for value in [*values, ...]),
        (("more",), 1),
        (("parts", 0, "more"), 1),
    ],
)
def test_every_field_of_a_recipe(path, value):
    """In memory too: no adapter exists that does not fit together."""
    adapter = make()
    recipe = json.loads(json.dumps(adapter.recipe))
    at = recipe
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    with pytest.raises(ProblemError) as caught:
        replace(adapter, recipe=recipe)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "tensor",
    [
        None,
        [[1.0]],
        normal(W, 2).numpy(),
        normal(W, 2).to_sparse(),
        normal(W, 2).to("meta"),
        torch.quantize_per_tensor(normal(W, 2), 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([normal(2), normal(2)]),
        normal(W, 2) * 1e38 * 1e38,
        torch.full((W, 2), 1e30, dtype=torch.float64) * 1e20,
        normal(W),
        normal(W, 3),
    ],
    ids=lambda x: type(x).__name__,
)
def test_factors_that_are_none(tensor):
    with pytest.raises(ProblemError, match=r"left|factors|right"):
        replace(make(), left=tensor)


def test_factors_whose_product_overflows():
    big = torch.full((W, 2), 1e30)
    with pytest.raises(ProblemError, match="overflows"):
        replace(make(), left=big, right=torch.full((2, D), 1e30))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_byte(written, data):
    """One byte changed, cut out or put in anywhere: refused, or read as it was written."""
    kind = data.draw(st.sampled_from(sorted(written)))
    path, load, same = written[kind]
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    byte = bytes([data.draw(st.integers(0, 255))])
    cut = data.draw(st.sampled_from(["change", "cut", "put in", "end here"]))
    rest = {"change": content[at + 1 :], "cut": content[at + 1 :], "end here": b""}
    middle = b"" if cut in ("cut", "end here") else byte
    target = path.with_name("bent.safetensors")
    target.write_bytes(content[:at] + middle + rest.get(cut, content[at:]))
    try:
        found = load(target)
    except ProblemError:
        refused(target, load)
    else:
        assert same(found)


def older(metadata, tensors):
    """The file as format 2 had it: Gram matrices in the place of triangles."""
    grams = {f"gram.{name[5:]}": x.T @ x for name, x in tensors.items() if name.startswith("root.")}
    keys = {name: x for name, x in tensors.items() if name.startswith("keys.")}
    return metadata | {"format": "clip-forget-statistics/2"}, grams | keys


@pytest.mark.parametrize("load", [load_adapter, RetainStatistics.load])
def test_what_is_no_file(tmp_path, load):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe, tmp_path / "missing", tmp_path / ("x" * 5000)):
        with pytest.raises(ProblemError):
            load(path)
    broken = tmp_path / "a\nb"
    broken.write_bytes(b"x")
    for path in ("a\0b", broken):
        with pytest.raises(ProblemError) as caught:
            load(path)
        assert len(str(caught.value).splitlines()) == 1


def test_what_is_there_stays(tmp_path):
    path = tmp_path / "a"
    write_bytes(b"1", path, overwrite=False)
    with pytest.raises(ProblemError, match="exists and is not overwritten"):
        write_bytes(b"2", path, overwrite=False)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ProblemError, match="exists"):
        write_bytes(b"2", tmp_path / "link", overwrite=False)
    for bad in (path / "below", tmp_path / "a\0b", ""):
        with pytest.raises(ProblemError, match="cannot write"):
            write_bytes(b"2", bad)
    assert path.read_bytes() == b"1" and {p.name for p in tmp_path.iterdir()} == {"a", "link"}


def test_a_name_that_cannot_be_shown(tmp_path, capsys):
    """A class whose name is no UTF-8 is stored, composed and shown."""
    adapter = make()
    recipe = json.loads(json.dumps(adapter.recipe))
    recipe["parts"][1]["class"] = "caf\udce9\n\x1b[31m"
    path, out = tmp_path / "a.st", tmp_path / "b.st"
    save_adapter(replace(adapter, recipe=recipe, classes=["cat", "caf\udce9\n\x1b[31m"]), path)
    cat, tensors = recipe | {"parts": recipe["parts"][:1]}, read_parts(adapter, "x")[0].tensors
    save_adapter(
        replace(adapter, recipe=cat, tensors=tensors, classes=["cat"]), tmp_path / "cat.st"
    )
    assert cli([str(path), "--without", str(tmp_path / "cat.st"), "--out", str(out)]) == 0
    shown_as = capsys.readouterr().out
    assert "caf\\udce9\\n\\x1b[31m" in shown_as and shown_as.count("\n") == 1
    assert load_adapter(out).classes == ["caf\udce9\n\x1b[31m"]
