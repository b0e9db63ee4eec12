"""The projection inside of somebody's `.onnx` file. One of more than 2 GB keeps its weights beside
it, as external data: so does the changed one, in OUT.data, and they are never all in memory."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forgetting.adapter import Adapter
from forgetting.errors import ProblemError, line
from forgetting.io import atomic_path, foreign, naming, need, raw, refuse_outside
from forgetting.models.checkpoint import find

USES = ("MatMul", "Gemm", "FusedMatMul")
PASSES = ("Transpose", "Cast", "Identity")  # what may stand between a weight and its product


def patch_graph(
    adapter: Adapter, path: Path, out: Path, original: Tensor | None = None, overwrite: bool = False
) -> None:
    """Write an `.onnx` file in which the projection is changed and nothing else.

    It is found by its numbers, among initialisers and constants in float16, float32 or bfloat16;
    original: W (w, d), where the file holds it in another dtype than it was forgotten in.
    ProblemError for none (quantised, folded into something else, changed already), or two, or one
    that is used for anything but one product; for external data outside of the folder.
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
        with foreign("not a readable ONNX file"):
            model = onnx.load(path, load_external_data=False)
            graphs = list(_graphs(model.graph))
            nodes = [node for graph in graphs for node in graph.node]
            protos = {proto.name: proto for graph in graphs for proto in graph.initializer}
            for node in nodes:
                if node.op_type == "Constant" and node.attribute[0].name == "value":
                    protos[node.output[0]] = node.attribute[0].t
            weights, shape = {}, sorted((adapter.left.shape[0], adapter.right.shape[1]))
            for name, proto in protos.items():
                if proto.data_type in kinds and sorted(proto.dims) == shape:
                    inline = proto
                    if proto.data_location == proto.EXTERNAL:
                        inline = onnx.TensorProto(data_type=proto.data_type, dims=proto.dims)
                        inline.raw_data = _stored(proto, path.parent).tobytes()
                    array = onnx.numpy_helper.to_array(inline).astype("float32")
                    weights[name] = torch.tensor(array).to(kinds[proto.data_type])
        found = find(weights, adapter, original)
        _require_product(model.graph, nodes, found.name)
        changed = found.changed(adapter, weights[found.name].dtype)
        proto = protos[found.name]
        same = {"name": proto.name, "dims": proto.dims, "data_type": proto.data_type}
        proto.CopyFrom(onnx.TensorProto(**same, raw_data=raw(changed).tobytes()))
        held = onnx.external_data_helper._get_all_tensors(model)
        external = [proto for proto in held if proto.data_location == proto.EXTERNAL]
    beside = out.with_name(f"{out.name}.data")
    place = atomic_path(beside, overwrite) if external else nullcontext()
    with atomic_path(out, overwrite) as graph, naming(path), place as data:
        if external:
            _copy(external, path.parent, data, beside.name)
        graph.write_bytes(model.SerializeToString())


def _copy(external: list[Any], folder: Path, data: Path, name: str) -> None:
    """Copy the bytes of tensors, which are in `folder`, to a file that is to be called `name`."""
    with data.open("wb") as file:
        for proto in external:
            stored = _stored(proto, folder)
            file.write(bytes(-file.tell() % 4096))  # what starts at a page can be mapped to memory
            place = {"location": name, "offset": file.tell(), "length": len(stored)}
            file.write(stored)
            del proto.external_data[:]
            for key, value in place.items():
                proto.external_data.add(key=key, value=str(value))


def _stored(proto: Any, folder: Path) -> np.ndarray:
    """The bytes of a tensor of external data, (n,) uint8, mapped to memory."""
    place = {entry.key: entry.value for entry in proto.external_data}
    file = folder / place.get("location", "")
    refuse_outside(file, folder)
    with foreign(f"external data {line(file)} cannot be read"):
        start = int(place.get("offset", 0))
        count = int(place.get("length", file.stat().st_size - start))
        return np.memmap(file, np.uint8, "r", start, (count,)) if count else np.empty(0, np.uint8)


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph, and all within: branches and loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _graphs(inner)


def _require_product(graph: Any, nodes: list[Any], name: str) -> None:
    """Refuse a weight that is used for anything but one product."""
    users = [node for node in nodes if name in node.input]
    while len(users) == 1 and users[0].op_type in PASSES:
        users = [node for node in nodes if users[0].output[0] in node.input]
    is_output = name in {output.name for output in graph.output}
    if is_output or len(users) != 1 or users[0].op_type not in USES:
        kinds = ", ".join(node.op_type for node in users) or "nothing in its graph"
        kinds = "the output" if is_output else kinds
        raise ProblemError(
            f"the projection {line(name)} is used by {line(kinds)}, not by one MatMul or Gemm"
        )
