"""ONNX: the text encoder of a changed model, and the projection inside of somebody's `.onnx`
file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forgetting.adapter import Adapter
from forgetting.errors import ProblemError, line, reason
from forgetting.io import atomic_path, naming, need
from forgetting.models.checkpoint import find

EXTRA = "clip-forgetting[onnx]"
LARGEST = 2**31 - 2**20  # bytes of one protobuf
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

    The projection is found by its numbers, among initialisers and constants, in float16, float32,
    bfloat16 or float64, (w, d) or (d, w).

    Args:
        original: W (w, d), where the file holds it in another dtype than it was forgotten in.

    Raises:
        ProblemError: no readable file; no such projection (quantised, folded into something else,
            another one, changed already), or two; one that is used for anything but one product.
    """
    onnx = need("onnx", EXTRA)
    with naming(path):
        if not path.is_file():
            raise ProblemError("no such file")
        try:
            model = onnx.load(path)  # with what it keeps in files beside it
        except Exception as error:  # the reader raises whatever foreign bytes lead it to
            raise ProblemError(f"not a readable ONNX file ({line(error)})") from error
        held = {f"{name} ({i})": kept for i, (name, kept) in enumerate(_weights(onnx, model.graph))}
        found = find({name: value for name, (value, _, _) in held.items()}, adapter, original)
        value, proto, graph = held[found.name]
        _require_product(graph, found.name.rpartition(" (")[0])
        proto.raw_data = found.changed(adapter, value.dtype).view(torch.uint8).numpy().tobytes()
        for field in ("float_data", "double_data", "int32_data"):
            proto.ClearField(field)
        if model.ByteSize() > LARGEST:
            raise ProblemError("larger than 2 GiB, which one ONNX file cannot hold")
        with atomic_path(out, overwrite) as temporary:
            temporary.write_bytes(model.SerializeToString())


def _weights(onnx: Any, graph: Any) -> Iterator[tuple[str, tuple[Tensor, Any, Any]]]:
    """The matrices of a graph and of those within: name, value, where it is kept, its graph."""
    kinds = {
        onnx.TensorProto.FLOAT: torch.float32,
        onnx.TensorProto.FLOAT16: torch.float16,
        onnx.TensorProto.BFLOAT16: torch.bfloat16,
        onnx.TensorProto.DOUBLE: torch.float64,
    }
    protos = [(tensor.name, tensor) for tensor in graph.initializer]
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                protos.append((node.output[0], attribute.t))
        for inner in _inner(node):
            yield from _weights(onnx, inner)
    for name, proto in protos:
        if proto.data_type in kinds and len(proto.dims) == 2:
            array = onnx.numpy_helper.to_array(proto)
            dtype = kinds[proto.data_type]
            if dtype is torch.bfloat16:  # which numpy does not know
                array = array.astype("float32")
            yield name, (torch.tensor(array).to(dtype), proto, graph)


def _inner(node: Any) -> Iterator[Any]:
    """The graphs within a node: branches and loops."""
    for attribute in node.attribute:
        yield from (graph for graph in (attribute.g, *attribute.graphs) if graph.node)


def _nodes(graph: Any) -> Iterator[Any]:
    """All nodes of a graph and of those within."""
    for node in graph.node:
        yield node
        for inner in _inner(node):
            yield from _nodes(inner)


def _require_product(graph: Any, name: str) -> None:
    """Refuse a weight that is used for anything but one product."""
    if name in {output.name for output in graph.output}:
        raise ProblemError(f"{line(name)} is an output of the graph too")
    nodes = list(_nodes(graph))
    users = [node for node in nodes if name in node.input]
    while len(users) == 1 and users[0].op_type in PASSES:
        users = [node for node in nodes if users[0].output[0] in node.input]
    if len(users) != 1 or users[0].op_type not in USES:
        kinds = ", ".join(node.op_type for node in users) or "nothing in its graph"
        raise ProblemError(
            f"the projection {line(name)} is used by {line(kinds)}, not by one MatMul or Gemm"
        )


class _Hf(nn.Module):
    """The text encoder of transformers: tokens to embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.whole = hasattr(model, "get_text_features")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.whole:
            out = self.model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
        else:
            out = self.model(input_ids=input_ids, attention_mask=attention_mask)
        if isinstance(out, Tensor):
            return out
        kept = getattr(out, "text_embeds", None)
        return out.pooler_output if kept is None else kept


class _OpenClip(nn.Module):
    """The text encoder of open_clip: tokens to embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.encode_text(input_ids)


def export_text_encoder(model: nn.Module, out: Path, overwrite: bool = False) -> None:
    """Write the text encoder of a model: `input_ids` (n, l) (and `attention_mask` for transformers)
    to `text_embeds` (n, d), not normalised.

    Args:
        model: of transformers or of open_clip.

    Raises:
        ProblemError: torch cannot export it; `onnx` or `onnxscript` is missing.
    """
    need("onnx", EXTRA)
    need("onnxscript", EXTRA)
    batch = torch.export.Dim("batch", min=1, max=2**16)
    if hasattr(model, "encode_text"):
        length, last = int(model.context_length), int(model.vocab_size) - 1
        ids = torch.full((2, length), last, dtype=torch.int64)
        tower, args, shapes = _OpenClip(model), (ids,), {"input_ids": {0: batch}}
    else:
        text = getattr(model.config, "text_config", model.config)
        length, last = int(text.max_position_embeddings), int(text.vocab_size) - 1
        ids = torch.full((2, length), last, dtype=torch.int64)
        tower, args = _Hf(model), (ids, torch.ones_like(ids))
        shapes = {"input_ids": {0: batch}, "attention_mask": {0: batch}}
    with atomic_path(out, overwrite) as temporary:
        try:
            with _quiet(), torch.no_grad():
                torch.onnx.export(
                    tower.float().eval(),
                    args,
                    temporary,
                    input_names=list(shapes),
                    output_names=["text_embeds"],
                    dynamic_shapes=shapes,
                    external_data=False,
                    dynamo=True,
                    verbose=False,
                )
        except Exception as error:  # the exporter raises what any model leads it to
            raise ProblemError(
                f"torch cannot export this text encoder ({reason(error)})"
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of its own work."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
