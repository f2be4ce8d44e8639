"""The manifest of a package, JSON: what was packaged, how it is called, and the expected answer to a probe, an input that anyone
can make from its formula (`probe.weyl`).

`describe` writes the signature of a program into it, `program_from` reads it back.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..containers import Slot, items
from ..figures.records import rules_record
from ..methods.ascent import Ascent
from ..program.program import Program
from ..program.signature import Run, Signature
from ..version import __version__
from .errors import PackageError
from .probe import answer, probe_batch, probe_integers, probe_sizes

FORMAT = 5
# 2 had no norm of an ascent's steps; 3 no preprocessing, and called the target's dtype the output's; 4 no sizes that vary.
READ = (2, 3, 4, FORMAT)


def describe(
    program: Program,
    suffix: str,
    class_names: Sequence[str] | None = None,
    input_space: str | None = None,
    preprocessing: Any = None,
    multi_label: bool = False,
) -> dict[str, Any]:
    """Returns the manifest of a program that is saved as `suffix`, but for the digest of the file that it will travel in.

    Raises:
        PackageError: the model's output holds what JSON cannot describe.
    """
    signature = program.signature
    outputs, maps = answer(program)
    facts = zip(signature.dtypes, signature.shapes, signature.rows)  # rows: of the embedding that an input is an index into
    inputs_of = [{"dtype": dtype_name(dtype), "shape": list(shape), "rows": rows} for dtype, shape, rows in facts]
    names = signature.names or [f"input_{i}" if i else "inputs" for i in range(len(signature.shapes))]
    starts = [f"start_{i}" for i in range(len(signature.explained))] if signature.looped else []
    return {
        "format": FORMAT,
        "engine": {".pt2": "aotinductor", ".onnx": "onnxruntime"}[suffix],
        "model": program.report.model,
        "rules": str(program.report.rules),
        "temperatures": rules_record(program.report.rules),
        "method": signature.method,
        "arguments": encoded_numbers({k: v for k, v in signature.arguments.items() if k != "bounds"}),
        "ascent": signature.ascent and encoded_ascent(signature.ascent),
        "looped": signature.looped,
        "target": signature.target,
        "arguments_of_the_graph": [*names, *starts, "target"],
        "results_of_the_graph": [f"output_{i}" for i in range(len(outputs))]
        + (["shares"] if signature.method == "tokens" else [f"map_{i}" for i in range(len(maps))]),
        "inputs": inputs_of,
        "single": signature.single,
        "named": signature.names is not None,
        "explained": signature.explained,
        "batch": None if signature.dynamic_batch else signature.batch,
        "output_spec": encoded_skeleton(signature.skeleton),
        "output_spec_plain": encoded_skeleton(plainly(signature.skeleton)),
        "output_tensors": signature.slots,
        "output_constants": [c if isinstance(c, int | float | str | bool) else None for c in signature.constants],
        "output_shape": list(signature.output_shape),
        "bounds": {name: list(bounds) for name, bounds in signature.bounds.items()},
        "chosen": signature.chosen,
        "output_probabilities": "sigmoid" if multi_label and signature.probabilities == "softmax" else signature.probabilities,
        "output_dtype": signature.output_dtype and dtype_name(signature.output_dtype),
        "target_dtype": dtype_name(signature.target_dtype),
        "input_space": input_space,
        "preprocessing": preprocessing and asdict(preprocessing),
        "class_names": None if class_names is None else list(class_names),
        "device": "cpu" if suffix == ".onnx" else str(signature.device.type),
        "machine": machine(signature.device) if suffix == ".pt2" else None,
        "versions": {"sp_fx": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "weights_sha256": weights_digest(program.graph),
        "probe": {
            "batch": probe_batch(program),
            "sizes": probe_sizes(program),
            "integers": probe_integers(program),
            "tolerance": signature.tolerance,
            "outputs": [numbers.tolist() for numbers in outputs],
            "maps": [numbers.tolist() for numbers in maps],
        },
    }


def program_from(manifest: dict[str, Any], run: Run, device: str | None) -> Program:
    """Returns the program that `run` computes, with the signature that `manifest` says; `device` as for `load`."""
    ascent = manifest["ascent"]
    count = len(manifest["inputs"])
    signature = Signature(
        method=manifest["method"],
        arguments=decoded_numbers(manifest["arguments"]),
        target=manifest["target"],
        target_dtype=getattr(torch, manifest["target_dtype" if manifest["format"] > 3 else "output_dtype"]),
        output_dtype=getattr(torch, manifest["output_dtype"]) if manifest["format"] > 3 else None,
        ascent=None if ascent is None else decoded_ascent(ascent),
        tolerance=manifest["probe"]["tolerance"],
        single=manifest["single"],
        names=manifest["arguments_of_the_graph"][:count] if manifest.get("named") else None,
        shapes=[tuple(i["shape"]) for i in manifest["inputs"]],
        dtypes=[getattr(torch, i["dtype"]) for i in manifest["inputs"]],
        rows=[i["rows"] for i in manifest["inputs"]],
        explained=manifest["explained"],
        device=torch.empty(0, device=device or manifest["device"]).device,
        batch=manifest["batch"] or 0,
        dynamic_batch=manifest["batch"] is None,
        skeleton=decoded_skeleton(manifest["output_spec"], manifest.get("output_spec_plain")),
        constants=manifest["output_constants"],
        slots=manifest["output_tensors"],
        output_shape=tuple(manifest["output_shape"]),
        probabilities=manifest.get("output_probabilities", "softmax"),
        bounds={name: (least, most) for name, (least, most) in manifest.get("bounds", {}).items()},
        chosen=manifest.get("chosen", False),
    )
    return Program(signature, run, manifest=manifest)


def encoded_ascent(ascent: Ascent) -> dict[str, Any]:
    numbers = encoded_numbers({field.name: getattr(ascent, field.name) for field in fields(Ascent) if field.name != "bounds"})
    # In float64, which has every number of a narrower type, and those of Python.
    return {**numbers, "bounds": ascent.bounds and [torch.as_tensor(b, dtype=torch.float64).tolist() for b in ascent.bounds]}


def decoded_ascent(encoded: dict[str, Any]) -> Ascent:
    bounds = encoded["bounds"] and tuple(torch.tensor(b, dtype=torch.float64) for b in encoded["bounds"])
    return Ascent(**{**decoded_numbers(encoded), "bounds": bounds})


def encoded_numbers(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments as JSON has them, which knows no infinity: that of the maximum norm."""
    return {name: "inf" if value == math.inf else value for name, value in arguments.items()}


def decoded_numbers(encoded: dict[str, Any]) -> dict[str, Any]:
    return {name: math.inf if value == "inf" else value for name, value in encoded.items()}


def encoded_skeleton(skeleton: Any) -> str:
    """Returns the containers of the model's output as pytree's JSON; PackageError for containers that it does not know."""
    leaves, structure = pytree.tree_flatten(skeleton)
    remedy = "Return a tensor, a tuple, a list or a dict"
    if strange := sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Slot)}):
        raise PackageError(f"outputs of this kind do not travel: {', '.join(strange)}. {remedy}")
    try:
        return pytree.treespec_dumps(structure)
    except (NotImplementedError, ValueError) as error:
        raise PackageError(f"outputs of this kind do not travel: {error}. {remedy}") from error


def decoded_skeleton(spec: str, plain: str | None) -> Any:
    """Returns the containers of an output; where their class is not here, as those of transformers, `plain` ones."""
    try:
        structure = pytree.treespec_loads(spec)
    except NotImplementedError:
        if plain is None:
            raise
        structure = pytree.treespec_loads(plain)
    return pytree.tree_unflatten([Slot(i) for i in range(structure.num_leaves)], structure)


def plainly(skeleton: Any) -> Any:
    """Returns an output in containers of Python's own: a dictionary for a dataclass."""
    parts = items(skeleton)
    if parts is None:
        return skeleton
    inner = {key: plainly(item) for key, item in parts[1].items()}
    is_row = isinstance(skeleton, tuple | list)
    return (list if isinstance(skeleton, list) else tuple)(inner.values()) if is_row else inner


# -- digests and names --------------------------------------------------------------------------------------------------


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest with a digest of its own, which `verified` checks: names of classes are as dear as weights."""
    return {**manifest, "manifest_sha256": seal(manifest)}


def seal(manifest: dict[str, Any]) -> str:
    """Returns SHA-256 over the manifest, but for the digest itself, as JSON with sorted keys."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def verified(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the manifest; PackageError for another format, or a manifest that was altered."""
    if manifest.get("format") not in READ:
        reads = " and ".join(map(str, READ))
        raise PackageError(f"{path} has format {manifest.get('format')!r}, and this sp_fx {__version__} reads {reads}")
    if manifest.get("manifest_sha256") != seal(manifest):
        raise PackageError(f"{path} was altered after it was written: its manifest has another digest than it says")
    return manifest


def machine(device: torch.device) -> dict[str, str]:
    """Returns what compiled code depends on: operating system, architecture, and the instructions of the processor or GPU."""
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
    else:
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return {"system": platform.system(), "architecture": platform.machine(), "capability": capability}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weights_digest(graph: torch.nn.Module) -> str:
    """Returns SHA-256 over names, shapes, dtypes and values of the graph's buffers: weights with BatchNorm folded in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(graph.named_buffers()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
