"""Packages: a program as one file that runs without the model's Python. `program.save(path)`, `sp_fx.load(path)`.

`.pt2` is for AOTInductor, `.onnx` for ONNX Runtime. Both take the graph's tensors in order (inputs, then the starts of a looped
ascent, then `target`) and return the tensors of the model's output and then the maps, as `program/program.py` says. A manifest
travels inside. `load` serves only a file whose bytes are those that were written, on a machine and torch that it was made for,
and whose answer to the manifest's probe is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..models.images import Preprocessing
from ..program.program import Program, saves_programs
from . import onnx, pt2
from .errors import PackageError, names_file
from .manifest import describe, program_from
from .probe import ANSWER, check_answer

ENGINES = {".pt2": pt2, ".onnx": onnx}


@saves_programs
def save(
    program: Program,
    path: str | PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    input_space: str | None = None,
    preprocessing: Preprocessing | None = None,
    multi_label: bool = False,
) -> Path:
    """Write `program` to `path`, which ends in `.pt2` or `.onnx`, and check that what was written answers as the program does.

    Args:
        class_names: of the classes, in order.
        input_space: what the inputs are, in words, such as "RGB pixels in [-1, 1]"; that, where `preprocessing` is given.
        preprocessing: what a picture becomes for this model, pixels in [-1, 1] (`sp_fx.models.load(...).preprocessing`). Batch
            jobs and the service prepare pictures by it; without it a picture is resized until it just covers the input.
        multi_label: the classes do not exclude each other: the probability of each is the sigmoid of its score. What ends with a
            sigmoid of its own is seen to.

    Raises:
        ValueError: another ending, class names that are not one a class, or a preprocessing for inputs of another shape.
        PackageError: an engine does not take the program, or its answer differs; nothing is left at `path` then.
        ModuleNotFoundError: `.onnx` needs the extra `export`.
    """
    path = Path(path)
    if path.suffix not in ENGINES:
        raise ValueError(f"a package is called *.pt2 (AOTInductor) or *.onnx (ONNX Runtime), got {path.name!r}")
    if program.graph is None:
        raise ValueError("this program was loaded from a package: copy that file, or save the program it was made from")
    classes = program.output_shape[0] if program.target == "class" else None
    if isinstance(class_names, str):
        raise TypeError(f"class_names is a sequence of names, got the string {class_names!r}")
    if class_names is not None and len(class_names) != classes:
        raise ValueError(f"got {len(class_names)} class names for an output of {classes} classes")
    if preprocessing is not None:
        channels, (height, width) = len(preprocessing.mean), preprocessing.cropped
        if [list(shape) for shape in program.shapes] != [[channels, height, width]]:
            raise ValueError(
                f"the preprocessing makes pictures of {[channels, height, width]}, and the program takes "
                f"{', '.join(str(list(shape)) for shape in program.shapes)}"
            )
        input_space = input_space or f"{'RGB' if channels == 3 else 'grey'} pixels in [-1, 1]"
    manifest = describe(program, path.suffix, class_names, input_space, preprocessing, multi_label)
    draft = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        with names_file(path):
            ENGINES[path.suffix].write(program, draft, manifest)
            load(draft, device=None if path.suffix == ".onnx" else str(program.device))  # ONNX Runtime runs on the CPU here
            draft.replace(path)
    except PackageError as error:
        text = str(error).replace(str(draft), str(path))
        if ANSWER in text:
            text += (
                ". Its engine sums in another order than PyTorch, and the network magnifies rounding that far on the probe, "
                "which is noise: weights that were trained little, or batch norms that have seen few pictures, do so"
            )
        raise PackageError(text) from error
    finally:
        draft.unlink(missing_ok=True)
    return path


def load(path: str | PathLike[str], *, device: str | None = None, threads: int | None = None) -> Program:
    """The program in a package: `(inputs, target) -> (outputs, map)`, with `manifest`. It has answered its probe rightly.

    Args:
        device: None, or the device to run on, such as "cuda:1", which a package was made for by its kind.
        threads: that ONNX Runtime may use on one call; None leaves it to it. A `.pt2` uses torch's.

    Raises:
        FileNotFoundError, IsADirectoryError: no such file.
        PackageError: no package of this library; one that is truncated or altered; one for another device, processor or
            version of torch; one whose answer to its probe is not the one that was packaged.
    """
    path = Path(path)
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in ENGINES)
        those = f"; in it: {', '.join(inside[:5])}" if inside else ""
        raise IsADirectoryError(f"{path} is a folder, and a package is a file{those}")
    if not path.is_file():
        raise FileNotFoundError(f"no package at {path}")
    manifest, run = engine_of(path).load_graph(path, device, threads)
    program = program_from(manifest, run, device)
    check_answer(program, path)
    return program


def read_manifest(path: str | PathLike[str]) -> dict[str, Any]:
    """The manifest of the package at `path`, whose bytes have been checked; nothing of it has run.

    Raises:
        PackageError: as `load`, but for what only running shows.
    """
    path = Path(path)
    return engine_of(path).read_manifest(path)


def engine_of(path: Path) -> Any:
    """Returns the module of the engine that the ending of `path` names."""
    if path.suffix not in ENGINES:
        raise PackageError(f"a package is called *.pt2 or *.onnx, got {path.name!r}")
    return ENGINES[path.suffix]
