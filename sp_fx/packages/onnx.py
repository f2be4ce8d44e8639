"""Packages for ONNX Runtime: a program's graph in standard ONNX ops, in an `.onnx` file.

The manifest is its last property, under `sp_fx`, with the digest of the bytes before it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..program.program import Program
from ..program.signature import Run, Shape
from .errors import PackageError
from .exporting import blamed, export_graph
from .manifest import sealed, verified

OPSET = 20


def write(program: Program, path: Path, manifest: dict[str, Any]) -> None:
    """Exports, and appends the manifest, which has the digest of the bytes before it: two protocol buffers in a row are one."""
    import onnx

    graph = means_by_axis(program.graph if program.device.type == "cpu" else moved_to_cpu(program.graph))
    finite_attention(graph)
    example = [x.cpu() for x in program.example]
    try:
        with torch.inference_mode(False), torch.no_grad():
            exported = export_graph(program, graph, example)
            converted = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                input_names=manifest["arguments_of_the_graph"],
                output_names=manifest["results_of_the_graph"],
                verbose=False,
            )
        model = converted.model_proto  # type: ignore[union-attr]
        name_sizes(model, program.signature.layouts)
    except Exception as error:  # the exporter's and onnx's, which share no base
        raise PackageError(f"ONNX does not take this program: {blamed(error, program)}") from error
    custom = sorted({f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain not in ("", "ai.onnx")})
    if custom:
        raise PackageError(f"ONNX has no standard op for {', '.join(custom)}")
    if (size := model.ByteSize()) >= 1 << 31:
        raise PackageError(f"an .onnx file holds less than 2 GiB, and this one has {size / 2**30:.1f}: save it as .pt2")
    body = model.SerializeToString()
    complete = sealed({**manifest, "digest": {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}})
    tail = onnx.ModelProto()
    entry = tail.metadata_props.add()
    entry.key, entry.value = "sp_fx", json.dumps(complete)
    path.write_bytes(body + tail.SerializeToString())


def name_sizes(model: Any, layouts: Sequence[Shape]) -> None:
    """Gives the sizes that vary the names that `layouts` have: `["batch", "length"]` in place of `["s67", "s32"]`."""
    names: dict[str, str] = {}
    for value, layout in zip(model.graph.input, layouts):
        for dim, name in zip(value.type.tensor_type.shape.dim, layout):
            if dim.dim_param and isinstance(name, str):
                names[dim.dim_param] = name
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), dim.dim_param)


def load_graph(path: Path, device: str | None, threads: int | None) -> tuple[dict[str, Any], Run]:
    """Returns the manifest, and what runs the graph on the tensors that it says."""
    import onnxruntime

    body = path.read_bytes()
    manifest = manifest_in(body, path)
    if device is not None and torch.device(device).type != "cpu":
        raise PackageError(f"an .onnx package runs on the CPU here, got device={device!r}: save a .pt2 on that device")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(body, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own, which share no base
        raise PackageError(f"ONNX Runtime {onnxruntime.__version__} does not load {path}: {str(error)[:400]}") from error
    names = [i.name for i in session.get_inputs()]

    def run(*tensors: Tensor) -> list[Tensor]:
        by_name = {name: t.numpy() for name, t in zip(manifest["arguments_of_the_graph"], tensors) if name in names}
        return [torch.from_numpy(np.asarray(result)) for result in session.run(None, by_name)]

    return manifest, run


def read_manifest(path: Path) -> dict[str, Any]:
    return manifest_in(path.read_bytes(), path)


def manifest_in(body: bytes, path: Path) -> dict[str, Any]:
    """Returns the manifest that is appended to `body`, read by hand: field 14 of a ModelProto, whose key is `sp_fx`."""
    start = body.rfind(b"\x0a\x05sp_fx\x12")
    try:
        if start < 0:
            raise ValueError("it has no manifest")
        text = body[start:]
        manifest = json.loads(text[text.index(b"{") :].decode())
        digest = manifest["digest"]
        # The tag of the field, and its length in groups of seven bits: nothing stands between the graph and the manifest.
        if body[digest["bytes"] : start] != b"\x72" + varint(len(text)):
            raise ValueError("its manifest does not follow its graph")
    except (ValueError, KeyError, TypeError) as error:
        raise PackageError(f"{path} is not a whole package of this library: {type(error).__name__}: {error}") from error
    if hashlib.sha256(body[: digest["bytes"]]).hexdigest() != digest["sha256"]:
        raise PackageError(f"{path} was altered after it was written: its graph has another digest than its manifest says")
    return verified(manifest, path)


def varint(number: int) -> bytes:
    """Returns `number` as protocol buffers write it, in groups of seven bits."""
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def means_by_axis(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Returns the same graph, sharing its buffers, with each mean taken over one axis after the other.

    ONNX Runtime adds the numbers up in a row: over [64, 112, 112] at once the mean of squares is 1.7e-5 off, by which
    SqueezeNet's map was 2.8e-4 off; axis by axis it is 2e-8 off, in the same time.
    """
    graph = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mean.dim):
        x, axes, *keep = node.args
        rank = node.args[0].meta["val"].dim()
        with graph.graph.inserting_before(node):
            for axis in sorted((a % rank for a in axes), reverse=True):
                x = graph.graph.call_function(node.target, (x, [axis], *keep), node.kwargs)
        x.meta = dict(node.meta)  # the next mean may be of this one, and asks for its rank
        node.replace_all_uses_with(x)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def finite_attention(graph: torch.fx.GraphModule) -> None:
    """Writes each fused attention out, with 0 for what all keys are masked of, as PyTorch has it: ONNX's softmax of a row of -inf
    is NaN."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    tracer = torch.fx.proxy.GraphAppendingTracer(graph.graph)
    for node in graph.graph.find_nodes(op="call_function", target=attention):
        arguments: dict[str, Any] = dict(zip(("query", "key", "value", "dropout_p", "is_causal"), node.args)) | dict(node.kwargs)
        width = arguments["query"].meta["val"].shape[-1]
        outputs = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
        if len(outputs) < len(node.users):  # somebody reads the logarithm of its sums
            continue
        with graph.graph.inserting_before(node):
            query, key, value = (cast(Any, torch.fx.Proxy(arguments[name], tracer)) for name in ("query", "key", "value"))
            scale = arguments.get("scale")
            scores = torch.matmul(query * (width**-0.5 if scale is None else scale), torch.transpose(key, -2, -1))
            if (mask := arguments.get("attn_mask")) is not None:
                added = cast(Any, torch.fx.Proxy(mask, tracer))
                is_bool = mask.meta["val"].dtype == torch.bool
                scores = torch.where(added, scores, -math.inf) if is_bool else scores + added
            if arguments.get("is_causal"):
                one = scores[:1, :1]  # of any length
                scores = torch.where(torch.tril(torch.ones_like(one)) > 0, scores, -math.inf)
            some = torch.amax(scores, -1, True) > -math.inf
            mixed = torch.matmul(torch.where(some, torch.softmax(scores, -1), 0.0), value)
            mixed = cast(Any, mixed.transpose(1, 2).contiguous().transpose(1, 2)).node  # as the fused one lies in memory
        mixed.meta = dict(outputs[0].meta)
        for user in outputs:
            user.replace_all_uses_with(mixed)
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
    graph.recompile()


def moved_to_cpu(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Returns a copy of the graph on the CPU, tensors that it makes itself included."""
    moved = copy.deepcopy(graph).cpu()
    for node in moved.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    moved.recompile()
    return moved
