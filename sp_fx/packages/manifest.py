"""What a package says of itself, and the probe by which it shows that it still answers as it did.

A manifest is JSON: what was packaged, how it is called, and the expected answer to a probe, an input that anyone can make from
its formula (`weyl`).
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..containers import Slot
from ..methods.ascent import Ascent
from ..version import __version__
from .errors import PackageError
from .probe import SKETCH, probe, probe_target, sketch

if TYPE_CHECKING:
    from ..program.program import Program


FORMAT = 2


def described(
    program: Program, suffix: str, class_names: Sequence[str] | None = None, input_space: str | None = None
) -> dict[str, Any]:
    """The manifest, but for the digest of the file that it will travel in."""
    inputs = probe(program)
    outputs, maps = program(inputs[0] if program.single else tuple(inputs), probe_target(program))
    explained = [m for m in ([maps] if program.single else maps) if m is not None]
    values = [v for v in pytree.tree_leaves(outputs) if isinstance(v, Tensor)]
    slots, structure = pytree.tree_flatten(program.skeleton)
    remedy = "Return a tensor, a tuple, a list or a dict"
    if strange := sorted({type(leaf).__name__ for leaf in slots if not isinstance(leaf, Slot)}):
        raise PackageError(f"outputs of this kind do not travel: {', '.join(strange)}. {remedy}")
    try:
        spec = pytree.treespec_dumps(structure)
    except (NotImplementedError, ValueError) as error:
        raise PackageError(f"outputs of this kind do not travel: {error}. {remedy}") from error
    ascent = program.ascent and {
        **{name: getattr(program.ascent, name) for name in ("steps", "step_size", "radius", "clip")},
        "bounds": program.ascent.bounds and [torch.as_tensor(b).tolist() for b in program.ascent.bounds],
    }
    facts = zip(program.dtypes, program.shapes, program.rows)  # rows: of the embedding that an input is an index into
    inputs_of = [{"dtype": told(dtype), "shape": list(shape), "rows": rows} for dtype, shape, rows in facts]
    names = [f"input_{i}" if i else "inputs" for i in range(len(program.shapes))]
    starts = [f"start_{i}" for i in range(len(program.explained))] if program.looped else []
    return {
        "format": FORMAT,
        "engine": {".pt2": "aotinductor", ".onnx": "onnxruntime"}[suffix],
        "model": program.report.model,
        "rules": str(program.report.rules),
        "method": program.method,
        "arguments": {k: v for k, v in program.arguments.items() if k not in ("bounds",)},
        "ascent": ascent,
        "looped": program.looped,
        "target": program.target,
        "arguments_of_the_graph": [*names, *starts, "target"],
        "results_of_the_graph": [f"output_{i}" for i in range(len(values))] + [f"map_{i}" for i in range(len(explained))],
        "inputs": inputs_of,
        "single": program.single,
        "explained": program.explained,
        "batch": None if program.dynamic_batch else program.batch,
        "output_spec": spec,
        "output_tensors": program.tensors,
        "output_constants": [c if isinstance(c, int | float | str | bool) else None for c in program.constants],
        "output_shape": list(program.output_shape),
        "output_dtype": told(program.aim.dtype) if program.target == "direction" else "int64",
        "input_space": input_space,
        "class_names": None if class_names is None else list(class_names),
        "device": "cpu" if suffix == ".onnx" else str(program.device.type),
        "machine": machine(program.device) if suffix == ".pt2" else None,
        "versions": {"sp_fx": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "weights_sha256": weights_digest(program.graph),
        "probe": {
            "batch": len(inputs[0]),
            "tolerance": program.tolerance,
            "outputs": [v.double().flatten().tolist()[:SKETCH] for v in values],
            "maps": [sketch(m).tolist() for m in explained],
        },
    }


def restored(manifest: dict[str, Any], run: Callable[..., Sequence[Tensor]], device: str | None) -> Program:
    from ..program.program import Program

    program = Program.__new__(Program)  # without what only compiling knows: the class has None for it
    climbs = manifest["ascent"]
    if climbs is not None:
        bounds = climbs["bounds"] and tuple(torch.tensor(b) for b in climbs["bounds"])
        program.ascent = Ascent(**{**climbs, "bounds": bounds})
    else:
        program.ascent = None
    program.manifest, program.run = manifest, run
    program.method, program.arguments = manifest["method"], manifest["arguments"]
    program.target, program.looped, program.single = manifest["target"], manifest["looped"], manifest["single"]
    program.explained, program.tensors = manifest["explained"], manifest["output_tensors"]
    program.shapes = [torch.Size(i["shape"]) for i in manifest["inputs"]]
    program.dtypes = [getattr(torch, i["dtype"]) for i in manifest["inputs"]]
    program.device = torch.empty(0, device=device or manifest["device"]).device
    program.dynamic_batch, program.batch = manifest["batch"] is None, manifest["batch"] or 0
    program.constants, program.output_shape = manifest["output_constants"], torch.Size(manifest["output_shape"])
    structure = pytree.treespec_loads(manifest["output_spec"])
    program.skeleton = pytree.tree_unflatten([Slot(i) for i in range(structure.num_leaves)], structure)
    program.rows = [i["rows"] for i in manifest["inputs"]]
    program.aim = torch.empty(0, dtype=getattr(torch, manifest["output_dtype"]), device=program.device)
    program.tolerance = manifest["probe"]["tolerance"]
    return program


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """With a digest of its own, which `whole` checks: names of classes are as dear as weights."""
    return {**manifest, "manifest_sha256": seal(manifest)}


def seal(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def whole(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """Raise PackageError for another format, or a manifest that was altered."""
    if manifest.get("format") != FORMAT:
        raise PackageError(f"{path} has format {manifest.get('format')!r}, and this sp_fx {__version__} reads {FORMAT}")
    if manifest.get("manifest_sha256") != seal(manifest):
        raise PackageError(f"{path} was altered after it was written: its manifest has another digest than it says")
    return manifest


# -- what is written down -----------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, str]:
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
    else:
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return {"system": platform.system(), "architecture": platform.machine(), "capability": capability}


def told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def weights_digest(graph: torch.nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of what the graph holds: weights with BatchNorm folded in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(graph.named_buffers()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
