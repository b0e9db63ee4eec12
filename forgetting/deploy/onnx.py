"""The projection inside of somebody's `.onnx` file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetting.adapter import Adapter
from forgetting.errors import ProblemError, line
from forgetting.io import naming, need, write_bytes
from forgetting.models.checkpoint import find

USES = ("MatMul", "Gemm", "FusedMatMul")
PASSES = ("Transpose", "Cast", "Identity")  # what may stand between a weight and its product


def patch_graph(
    adapter: Adapter,
    path: Path,
    out: Path,
    original: Tensor | None = None,
    overwrite: bool = False,
) -> None:
    """Write an `.onnx` file in which the projection is changed and nothing else.

    It is found by its numbers, among initialisers and constants in float16, float32 or bfloat16;
    original: W (w, d), where the file holds it in another dtype than it was forgotten in.

    Raises:
        ProblemError: no readable file; no such projection (quantised, folded into something else,
            another one, changed already), or two; one that is used for anything but one product.
    """
    onnx = need("onnx", "clip-forgetting[onnx]")
    kinds = {
        onnx.TensorProto.FLOAT: torch.float32,
        onnx.TensorProto.FLOAT16: torch.float16,
        onnx.TensorProto.BFLOAT16: torch.bfloat16,
    }
    with naming(path):
        if not path.is_file():
            raise ProblemError("no such file")
        try:
            model = onnx.load(path)  # with what it keeps in files beside it
        except Exception as error:  # the reader raises whatever foreign bytes lead it to
            raise ProblemError(f"not a readable ONNX file ({line(error)})") from error
        nodes = list(_nodes(model.graph))
        protos = [(proto.name, proto) for proto in model.graph.initializer]
        for node in nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                protos.append((node.output[0], node.attribute[0].t))
        weights = {}
        for i, (_, proto) in enumerate(protos):
            if proto.data_type in kinds and len(proto.dims) == 2:
                array = onnx.numpy_helper.to_array(proto).astype("float32")
                weights[i] = torch.tensor(array).to(kinds[proto.data_type])
        found = find({f"{protos[i][0]} ({i})": x for i, x in weights.items()}, adapter, original)
        index = int(found.name.rpartition(" (")[2][:-1])
        name, proto = protos[index]
        _require_product(model.graph, nodes, name)
        changed = found.changed(adapter, weights[index].dtype)
        proto.raw_data = changed.view(torch.uint8).numpy().tobytes()
        for field in ("float_data", "int32_data"):
            proto.ClearField(field)
        try:
            data = model.SerializeToString()
        except ValueError as error:
            raise ProblemError(f"too large for one ONNX file ({line(error)})") from error
    write_bytes(data, out, overwrite)


def _nodes(graph: Any) -> Iterator[Any]:
    """All nodes of a graph, and of those within: branches and loops."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _require_product(graph: Any, nodes: list[Any], name: str) -> None:
    """Refuse a weight that is used for anything but one product."""
    if name in {output.name for output in graph.output}:
        raise ProblemError(f"{line(name)} is an output of the graph too")
    users = [node for node in nodes if name in node.input]
    while len(users) == 1 and users[0].op_type in PASSES:
        users = [node for node in nodes if users[0].output[0] in node.input]
    if len(users) != 1 or users[0].op_type not in USES:
        kinds = ", ".join(node.op_type for node in users) or "nothing in its graph"
        raise ProblemError(
            f"the projection {line(name)} is used by {line(kinds)}, not by one MatMul or Gemm"
        )
