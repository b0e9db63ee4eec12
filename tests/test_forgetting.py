"""Targets and adapters on plain tensors."""

from __future__ import annotations

import pytest
import torch

from forgetting import Adapter, empty_target, load_adapter, projection_sha256, save_adapter
from forgetting.errors import ProblemError


def target_inputs(nearest_class: int):
    """Three classes in 4 dimensions; the empty prompt points at `nearest_class`."""
    classes = torch.eye(4)[:3]
    neutral = 0.1 * torch.ones(1, 4) + torch.eye(4)[nearest_class]
    return neutral, classes


def test_target_is_the_unit_norm_empty_prompt():
    neutral, classes = target_inputs(nearest_class=2)
    target, draws = empty_target(neutral, classes, [0, 1], torch.Generator())
    assert draws == 0 and target.shape == (1, 4)
    assert torch.allclose(target, neutral / neutral.norm())


def test_target_is_drawn_again_while_it_is_a_class_to_forget():
    neutral, classes = target_inputs(nearest_class=1)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return empty_target(neutral, classes, [1], generator)

    target, draws = draw(0)
    assert draws > 0
    assert int((target[0] @ classes.T).argmax()) != 1
    assert target.norm(dim=1) == pytest.approx(1, abs=1e-5)
    assert torch.equal(target, draw(0)[0]) and not torch.equal(target, draw(1)[0])


def test_target_without_a_class_left_is_refused():
    neutral, classes = target_inputs(nearest_class=1)
    with pytest.raises(ProblemError, match="every class is to be forgotten"):
        empty_target(neutral, classes, [0, 1, 2], torch.Generator())


def make_adapter(projection) -> Adapter:
    generator = torch.Generator().manual_seed(5)
    return Adapter(
        left=torch.randn(12, 2, generator=generator),
        right=torch.randn(2, 8, generator=generator),
        projection_sha256=projection_sha256(projection),
        backbone="RN50",
        weights="abc",
        dataset="Set",
        classes=["C/V", "naïve"],
        trainer="ForgetLoRA",
        settings={"seed": 0},
        record={"solver": {"objective": 0.1, "trials": [1, 2]}},
    )


def test_adapter_round_trip(tmp_path):
    projection = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    adapter = make_adapter(projection)
    save_adapter(adapter, tmp_path / "sub" / "a.safetensors")
    loaded = load_adapter(tmp_path / "sub" / "a.safetensors")
    assert torch.equal(loaded.delta(), adapter.delta())
    exact = projection.double() + adapter.left.double() @ adapter.right.double()
    assert torch.equal(loaded.apply(projection), exact.float())  # rounded once
    for name in ("backbone", "weights", "dataset", "classes", "trainer", "settings", "record"):
        assert getattr(loaded, name) == getattr(adapter, name)
    assert list((tmp_path / "sub").iterdir()) == [tmp_path / "sub" / "a.safetensors"]


def test_adapter_refuses_another_projection():
    projection = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    adapter = make_adapter(projection)
    other = projection.clone()
    other[0, 0] += 1e-3
    with pytest.raises(ProblemError, match="another text projection"):
        adapter.apply(other)


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_file_that_is_no_adapter_is_one_line(tmp_path, content):
    path = tmp_path / "a.safetensors"
    if content is None:  # another safetensors file
        from safetensors.torch import save_file

        save_file({"left": torch.ones(2, 2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ProblemError, match=r"a\.safetensors: not a") as caught:
        load_adapter(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ProblemError):
        load_adapter(tmp_path / "missing.safetensors")
