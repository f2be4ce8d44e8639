"""Packages: a program as one file that runs without the model's Python. `program.save(path)`, `sp_fx.load(path)`.

`.pt2` is the program's graph compiled ahead of time by AOTInductor, for one kind of device and processor; `.onnx` the same graph
in standard ONNX ops, for ONNX Runtime. Both hold the graph's inputs in order (inputs, then the starts of a looped ascent, then
`target`) and return the tensors of the model's output and then the maps, as `program.py` says. A manifest travels inside: JSON
under the key `sp_fx` of the archive's metadata or of ONNX's `metadata_props`. It says what was packaged and how it is called, and
holds the expected answer to a probe, an input that anyone can make from its formula (`probe`). `load` serves only a file whose
bytes are those that were written, on a machine and torch that it was made for, and whose answer to the probe is right.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import re
import zipfile
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .ascent import Ascent
from .version import __version__

if TYPE_CHECKING:
    from .program import Program

FORMAT, OPSET = 1, 20
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # of a CPU, each with the instructions of those before it
SKETCH = 256  # numbers that stand for a map


class PackageError(RuntimeError):
    """A package could not be written, or is not one that may be served here; the message says what was found and expected."""


# -- writing ------------------------------------------------------------------------------------------------------------


def save(
    program: Program,
    path: str | PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    input_space: str | None = None,
) -> Path:
    """Write `program` to `path`, which ends in `.pt2` or `.onnx`, and check that what was written answers as the program does.

    Args:
        class_names: of the classes, in order.
        input_space: what the inputs are, in words, such as "RGB pixels in [-1, 1]".

    Raises:
        ValueError: another ending, or class names that are not one a class.
        PackageError: an engine does not take the program, or its answer differs; nothing is left at `path` then.
        ModuleNotFoundError: `.onnx` needs the extra `export`.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise ValueError(f"a package is called *.pt2 (AOTInductor) or *.onnx (ONNX Runtime), got {path.name!r}")
    if getattr(program, "graph", None) is None:
        raise ValueError("this program was loaded from a package: copy that file, or save the program it was made from")
    classes = program.output_shape[0] if program.target == "class" else None
    if class_names is not None and len(class_names) != classes:
        raise ValueError(f"got {len(class_names)} class names for an output of {classes} classes")
    manifest = described(program, path.suffix, class_names, input_space)
    draft = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        WRITERS[path.suffix](program, draft, manifest)
        load(draft, device=str(program.device))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def described(
    program: Program, suffix: str, class_names: Sequence[str] | None = None, input_space: str | None = None
) -> dict[str, Any]:
    """The manifest, but for the digest of the file that it will travel in."""
    inputs = probe(program)
    outputs, maps = program(inputs[0] if program.single else tuple(inputs), probe_target(program))
    explained = [m for m in ([maps] if program.single else maps) if m is not None]
    values = [v for v in pytree.tree_leaves(outputs) if isinstance(v, Tensor)]
    try:
        spec = pytree.treespec_dumps(program.output_spec)
    except (NotImplementedError, ValueError) as error:
        raise PackageError(f"outputs of this kind do not travel: {error}. Return a tensor, a tuple, a list or a dict") from error
    ascent = program.ascent and {
        **{name: getattr(program.ascent, name) for name in ("steps", "step_size", "radius", "clip")},
        "bounds": program.ascent.bounds and [torch.as_tensor(b).tolist() for b in program.ascent.bounds],
    }
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
        "inputs": [{"dtype": told(d), "shape": list(s)} for d, s in zip(program.dtypes, program.shapes)],
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


def write_pt2(program: Program, path: Path, manifest: dict[str, Any]) -> None:
    """Compile ahead of time, and put the manifest, which has the digest of every other member, in the archive's metadata."""
    from torch._inductor import aoti_compile_and_package

    from .inductor import COMPILING, suited

    try:
        with torch.inference_mode(False), torch.no_grad(), COMPILING:
            exported = export_graph(program, suited(program.graph), program.example)
            # As many threads as the process that loads it has, not as the one that saves it.
            freezing = all(t.dtype != torch.float64 for t in program.graph.buffers())  # as inductor.compiled
            settings = {"freezing": freezing, "cpp.dynamic_threads": True}
            aoti_compile_and_package(exported, package_path=str(path), inductor_configs=settings)
    except Exception as error:  # Inductor's, export's and the C++ compiler's; all mean that there will be no package
        raise PackageError(f"AOTInductor does not compile this program: {blamed(error, program)}") from error
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    place = metadata_place(members)
    held = {**manifest, "digest": digest_of({k: v for k, v in members.items() if k != place})}
    members[place] = json.dumps({**json.loads(members[place]), "sp_fx": json.dumps(held)}).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def write_onnx(program: Program, path: Path, manifest: dict[str, Any]) -> None:
    """Export, and append the manifest, which has the digest of the bytes before it: two protocol buffers in a row are one."""
    import onnx

    graph = means_by_axis(program.graph if program.device.type == "cpu" else _moved(program.graph))
    example = [x.cpu() for x in program.example]
    try:
        with torch.inference_mode(False), torch.no_grad():
            exported = export_graph(program, graph, example)
            made = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                input_names=manifest["arguments_of_the_graph"],
                output_names=manifest["results_of_the_graph"],
                verbose=False,
            )
        model = made.model_proto  # type: ignore[union-attr]
    except Exception as error:  # the exporter's and onnx's, which share no base
        raise PackageError(f"ONNX does not take this program: {blamed(error, program)}") from error
    custom = sorted({f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain not in ("", "ai.onnx")})
    if custom:
        raise PackageError(f"ONNX has no standard op for {', '.join(custom)}")
    if (size := model.ByteSize()) >= 1 << 31:
        raise PackageError(f"an .onnx file holds less than 2 GiB, and this one has {size / 2**30:.1f}: save it as .pt2")
    body = model.SerializeToString()
    held = {**manifest, "digest": {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}}
    tail = onnx.ModelProto()
    entry = tail.metadata_props.add()
    entry.key, entry.value = "sp_fx", json.dumps(held)
    path.write_bytes(body + tail.SerializeToString())


WRITERS: dict[str, Callable[[Any, Path, dict[str, Any]], None]] = {".pt2": write_pt2, ".onnx": write_onnx}


def export_graph(program: Program, graph: torch.fx.GraphModule, example: Sequence[Tensor]) -> torch.export.ExportedProgram:
    # Copies, since a looped ascent's example starts at its inputs, and export takes one tensor in two places for one argument.
    if not program.dynamic_batch:
        return torch.export.export(graph, tuple(x.clone() for x in example))
    batch = torch.export.Dim("batch", min=1)
    # A batch of one would be taken for a constant.
    several = tuple(x.clone() if len(x) > 1 else torch.cat([x, x]) for x in example)
    return torch.export.export(graph, several, dynamic_shapes=[{0: batch} for _ in several])


def means_by_axis(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same graph, sharing its buffers, with each mean taken over one axis after the other. ONNX Runtime adds the numbers up
    in a row: over [64, 112, 112] at once the mean of squares is 1.7e-5 off, by which SqueezeNet's map was 2.8e-4 off; axis by
    axis 2e-8, in the same time."""
    graph = torch.fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mean.dim):
        x, axes, *keep = node.args
        rank = node.args[0].meta["val"].dim()
        with graph.graph.inserting_before(node):
            for axis in sorted((a % rank for a in axes), reverse=True):
                x = graph.graph.call_function(node.target, (x, [axis], *keep), node.kwargs)
        node.replace_all_uses_with(x)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _moved(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    moved = copy.deepcopy(graph).cpu()
    for node in moved.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    moved.recompile()
    return moved


def blamed(error: BaseException, program: Program) -> str:
    """The op that the innermost reason of `error` names, the layers of the model that have it, and the reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = str(error).strip()
    try:
        found = layers_of(program.graph.graph, reason) or layers_of(written_out(program), reason)
    except Exception:  # what cannot be exported at all
        found = ""
    return f"{found}{': ' if found else ''}{reason[:400]}"


def layers_of(graph: torch.fx.Graph, reason: str) -> str:
    """The ops of `graph` that are named in `reason`, each with its layers, as `onegraph.layer` writes them."""
    said = {word.strip(".") for word in re.split(r"[^\w.]+", reason.replace("::", "."))}
    found: dict[str, dict[str, None]] = {}
    for node in graph.nodes:
        op = str(node.target)
        if node.op == "call_function" and {op, op.rpartition(".")[0]} & said and "custom" in node.meta:
            found.setdefault(op, {})[node.meta["custom"]["layer"]] = None
    return "; ".join(f"{op} in {', '.join([*layers][:5])}{', ...' if len(layers) > 5 else ''}" for op, layers in found.items())


def written_out(program: Program) -> torch.fx.Graph:
    """The program in the smallest ops that torch has: an engine may be asked for those of a larger one."""
    from torch._decomp import decomposition_table
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta

    read, table = torch.fx.Interpreter(program.graph).run, cast(Any, decomposition_table)
    with torch.inference_mode(False), torch.no_grad(), preserve_node_meta():
        return make_fx(read, decomposition_table=table, tracing_mode="real")(*program.example).graph


# -- reading ------------------------------------------------------------------------------------------------------------


def load(path: str | PathLike[str], *, device: str | None = None, threads: int | None = None) -> Program:
    """The program in a package: `(inputs, target) -> (outputs, map)`, with `manifest`. It has answered its probe rightly.

    Args:
        device: None, or the device to run on, such as "cuda:1", which a package was made for by its kind.
        threads: that ONNX Runtime may use on one call; None leaves it to it. A `.pt2` uses torch's.

    Raises:
        FileNotFoundError: no such file.
        PackageError: no package of this library; one that is truncated or altered; one for another device, processor or
            version of torch; one whose answer to its probe is not the one that was packaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no package at {path}")
    if path.suffix not in READERS:
        raise PackageError(f"a package is called *.pt2 or *.onnx, got {path.name!r}")
    manifest, run = READERS[path.suffix](path, device, threads)
    program = restored(manifest, run, device)
    answer(program, path)
    return program


def read_manifest(path: str | PathLike[str]) -> dict[str, Any]:
    """The manifest of the package at `path`, whose bytes have been checked; nothing of it has run.

    Raises:
        PackageError: as `load`, but for what only running shows.
    """
    path = Path(path)
    return _pt2_manifest(path) if path.suffix == ".pt2" else _onnx_manifest(path.read_bytes(), path)


def read_pt2(path: Path, device: str | None, threads: int | None) -> tuple[dict[str, Any], Callable[..., Sequence[Tensor]]]:
    manifest = _pt2_manifest(path)
    fits_here(manifest, path, device)
    try:
        index = torch.device(device or manifest["device"]).index
        loaded = torch._inductor.aoti_load_package(str(path), device_index=-1 if index is None else index)
    except Exception as error:
        raise PackageError(f"torch {torch.__version__} does not load {path}: {str(error)[:400]}") from error
    # Not the model's own call, which reads the layout of its arguments from JSON every time: a program takes and gives tensors.
    return manifest, lambda *tensors: loaded.loader.boxed_run(list(tensors))


def _pt2_manifest(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}  # checks each one's CRC
        place = metadata_place(members)
        manifest = json.loads(json.loads(members.pop(place))["sp_fx"])
    except (zipfile.BadZipFile, EOFError, StopIteration, KeyError, ValueError, OSError, NotImplementedError) as error:
        raise PackageError(f"{path} is not a whole package of this library: {type(error).__name__}: {error}") from error
    if digest_of(members) != manifest.get("digest"):
        raise PackageError(f"{path} was altered after it was written: its members have another digest than its manifest says")
    return same_format(manifest, path)


def read_onnx(path: Path, device: str | None, threads: int | None) -> tuple[dict[str, Any], Callable[..., Sequence[Tensor]]]:
    import onnxruntime

    body = path.read_bytes()
    manifest = _onnx_manifest(body, path)
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
        return [torch.from_numpy(np.asarray(found)) for found in session.run(None, by_name)]

    return manifest, run


def _onnx_manifest(body: bytes, path: Path) -> dict[str, Any]:
    """From the tail alone, by hand: field 14 of a ModelProto, whose key is `sp_fx`."""
    start = body.rfind(b"\x0a\x05sp_fx\x12")
    try:
        if start < 0:
            raise ValueError("it has no manifest")
        text = body[start:]
        manifest = json.loads(text[text.index(b"{") :].decode())
        digest = manifest["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise PackageError(f"{path} is not a whole package of this library: {type(error).__name__}: {error}") from error
    if hashlib.sha256(body[: digest["bytes"]]).hexdigest() != digest["sha256"]:
        raise PackageError(f"{path} was altered after it was written: its graph has another digest than its manifest says")
    return same_format(manifest, path)


READERS: dict[str, Callable[..., tuple[dict[str, Any], Callable[..., Sequence[Tensor]]]]] = {".pt2": read_pt2, ".onnx": read_onnx}


def same_format(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    if manifest.get("format") != FORMAT:
        raise PackageError(f"{path} has format {manifest.get('format')!r}, and this sp_fx {__version__} reads {FORMAT}")
    return manifest


def fits_here(manifest: dict[str, Any], path: Path, device: str | None) -> None:
    """Raise PackageError where compiled code would not run: before it does."""
    kind = manifest["device"]
    asked = kind if device is None else torch.device(device).type
    if asked != kind:
        raise PackageError(f"{path} was made for {kind}, and {device!r} was asked for: save it from a program made on {asked}")
    if kind != "cpu" and not torch.cuda.is_available():
        raise PackageError(f"{path} was made for {kind} ({manifest['machine']['capability']}), and no such device is here")
    made, here = manifest["versions"]["torch"], str(torch.__version__)
    if release(here) < release(made):
        raise PackageError(
            f"{path} was compiled by torch {made}, and this is torch {here}: code compiled for a newer torch calls what "
            "an older one does not have. Install that torch, or save the package with this one"
        )
    wanted, found = manifest["machine"], machine(torch.device(device or kind))
    same = wanted["system"] == found["system"] and wanted["architecture"] == found["architecture"]
    if kind == "cpu":
        known = wanted["capability"] in CAPABILITIES and found["capability"] in CAPABILITIES
        rank = CAPABILITIES.index
        same &= rank(wanted["capability"]) <= rank(found["capability"]) if known else wanted == found
    else:
        same &= wanted["capability"] == found["capability"]
    if not same:
        made, here = [" ".join(str(m[k]) for k in ("system", "architecture", "capability")) for m in (wanted, found)]
        raise PackageError(f"{path} was compiled for {made}, and this machine is {here}: save it on a machine like this one")


def restored(manifest: dict[str, Any], run: Callable[..., Sequence[Tensor]], device: str | None) -> Program:
    from .program import Program

    program = Program.__new__(Program)
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
    program.output_spec = pytree.treespec_loads(manifest["output_spec"])
    program.aim = torch.empty(0, dtype=getattr(torch, manifest["output_dtype"]), device=program.device)
    program.tolerance = manifest["probe"]["tolerance"]
    return program


# -- the probe ----------------------------------------------------------------------------------------------------------


def weyl(count: int) -> np.ndarray:
    """`count` numbers in [-1, 1), float32, that any language makes alike: the top 24 bits of `2654435769 (i + 1) mod 2^32`,
    mixed once (x ^= x >> 15; x *= 2246822519), over 2^23, less 1."""
    x = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(2654435769)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(15)
    x = (x * np.uint64(2246822519)) & np.uint64(0xFFFFFFFF)
    return ((x >> np.uint64(8)).astype(np.float64) / 2**23 - 1).astype(np.float32)


def probe(program: Program) -> list[Tensor]:
    """The inputs that a package is asked: `weyl` in row-major order; integer inputs are zeros."""
    count = program.batch if not program.dynamic_batch else 2
    values = []
    for shape, dtype in zip(program.shapes, program.dtypes):
        size = (count, *shape)
        value = torch.from_numpy(weyl(int(np.prod(size)))).view(size) if dtype.is_floating_point else torch.zeros(size)
        values.append(value.to(program.device, dtype))
    return values


def probe_target(program: Program) -> Any:
    """Class 0, since the predicted one may hang on the last bits; a direction of ones."""
    count = program.batch if not program.dynamic_batch else 2
    return 0 if program.target == "class" else torch.ones((count, *program.output_shape), device=program.device)


def sketch(values: Tensor) -> np.ndarray:
    """256 signed sums of `values`: number i goes to sum `i mod 256` with the sign of `weyl`'s number i. The L2 distance of two
    sketches is, in the mean over signs, that of what they are of."""
    flat = values.detach().double().cpu().flatten().numpy()
    signed = np.where(weyl(len(flat)) < 0, -flat, flat)
    return np.pad(signed, (0, -len(flat) % SKETCH)).reshape(-1, SKETCH).sum(0)


def answer(program: Program, path: Path) -> None:
    """Ask the probe, and raise PackageError where the answer is not the one that was packaged."""
    assert program.manifest is not None
    held, inputs = program.manifest["probe"], probe(program)
    outputs, maps = program(inputs[0] if program.single else tuple(inputs), probe_target(program))
    values = [v.double().cpu().flatten().numpy()[:SKETCH] for v in pytree.tree_leaves(outputs) if isinstance(v, Tensor)]
    sketches = [sketch(m) for m in ([maps] if program.single else maps) if m is not None]
    for kind, found, wanted in (("outputs", values, held["outputs"]), ("maps", sketches, held["maps"])):
        for got, want in zip(found, map(np.asarray, wanted), strict=True):
            error = float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-30))
            if not error <= held["tolerance"]:
                raise PackageError(
                    f"{path} does not answer its probe as it did when it was made: the {kind} differ by {error:.1e} in relative "
                    f"L2 distance, where {held['tolerance']:.0e} is allowed; it is not served"
                )


# -- what is written down -----------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, str]:
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
    else:
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return {"system": platform.system(), "architecture": platform.machine(), "capability": capability}


def release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def metadata_place(members: dict[str, bytes]) -> str:
    """The member that AOTInductor's loaders read the metadata from."""
    return next(name for name in sorted(members) if name.endswith("wrapper_metadata.json"))


def digest_of(members: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(members):
        digest.update(f"{name} {len(members[name])}\n".encode())
        digest.update(members[name])
    return digest.hexdigest()


def weights_digest(graph: torch.nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of what the graph holds: weights with BatchNorm folded in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(graph.named_buffers()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
