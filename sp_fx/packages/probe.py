"""The probe of a package: an input that anyone can make from its formula, and whether the package answers it as it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..containers import tensors_of
from ..program.program import Program
from .errors import PackageError

ANSWER = "does not answer its probe as it did when it was made"
SKETCH = 256  # numbers that stand for a map


def weyl(count: int) -> np.ndarray:
    """`count` numbers in [-1, 1), float32, that any language makes alike: the top 24 bits of `2654435769 (i + 1) mod 2^32`,
    mixed once (x ^= x >> 15; x *= 2246822519), over 2^23, less 1."""
    x = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(2654435769)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(15)
    x = (x * np.uint64(2246822519)) & np.uint64(0xFFFFFFFF)
    return ((x >> np.uint64(8)).astype(np.float64) / 2**23 - 1).astype(np.float32)


def probe_batch(program: Program) -> int:
    return 2 if program.dynamic_batch else program.batch


def probe(program: Program) -> list[Tensor]:
    """Returns the inputs of the probe: `weyl` in row-major order; integer inputs are those of the example, as token ids and masks
    are no numbers to make up: a mask of zeros hides all of a text, and its softmax is NaN in some engines."""
    count, values = probe_batch(program), []
    sizes = probe_sizes(program)
    for shape, dtype, integers in zip(program.shapes, program.dtypes, probe_integers(program)):
        size = (count, *program.signature.filled(shape, sizes))
        value = torch.from_numpy(weyl(int(np.prod(size)))).view(size) if integers is None else torch.tensor(integers).view(size)
        values.append(value.to(program.device, dtype))
    return values


def probe_sizes(program: Program) -> dict[str, int]:
    """Returns the lengths of the probe by name: those of the example, or as the manifest has them, which none of before has."""
    if program.manifest is not None:
        return program.manifest["probe"].get("sizes", {})
    return program.signature.sizes(program.example)


def probe_integers(program: Program) -> list[list[Any] | None]:
    """Returns the integer inputs of the probe as nested lists, None for those that float: of the example, or as the manifest has
    them; zeros of a package of before, which has none."""
    count = probe_batch(program)
    if program.manifest is not None and "integers" in program.manifest["probe"]:
        return program.manifest["probe"]["integers"]
    integers: list[list[Any] | None] = []
    for i, (shape, dtype) in enumerate(zip(program.shapes, program.dtypes)):
        given = torch.zeros((count, *map(int, shape)), dtype=dtype) if program.example is None else program.example[i]
        several = torch.cat([given] * count)[:count]
        integers.append(None if dtype.is_floating_point else several.long().tolist())
    return integers


def probe_target(program: Program) -> Any:
    """Returns the target of the probe: class 0, since the predicted one may hang on the last bits; or a direction of ones."""
    shape = (probe_batch(program), *program.signature.filled(program.output_shape, probe_sizes(program)))
    return 0 if program.target == "class" else torch.ones(shape, device=program.device)


def sketch(values: Tensor) -> np.ndarray:
    """Returns 256 signed sums of `values`: number i goes to sum `i mod 256` with the sign of `weyl`'s number i. The squared L2
    distance of two sketches is, in the mean over signs, that of the values."""
    flat = values.detach().double().cpu().flatten().numpy()
    signed = np.where(weyl(len(flat)) < 0, -flat, flat)
    return np.pad(signed, (0, -len(flat) % SKETCH)).reshape(-1, SKETCH).sum(0)


def answer(program: Program) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Runs the probe; returns the first 256 numbers of each output, and the sketch of each map."""
    inputs = probe(program)
    outputs, maps = program(inputs[0] if program.single else tuple(inputs), probe_target(program))
    values = [v.double().cpu().flatten().numpy()[:SKETCH] for v in pytree.tree_leaves(outputs) if isinstance(v, Tensor)]
    return values, [sketch(m) for m in tensors_of(maps)]


def check_answer(program: Program, path: Path) -> None:
    """Runs the probe, and raises PackageError where the answer is not the one that was packaged."""
    assert program.manifest is not None
    packaged = program.manifest["probe"]
    values, sketches = answer(program)
    for kind, answers, expected in (("outputs", values, packaged["outputs"]), ("maps", sketches, packaged["maps"])):
        for got, want in zip(answers, map(np.asarray, expected), strict=True):
            error = float(np.linalg.norm(got - want) / max(float(np.linalg.norm(want)), 1e-30))
            if not error <= packaged["tolerance"]:
                raise PackageError(
                    f"{path} {ANSWER}: the {kind} differ by {error:.1e} in relative "
                    f"L2 distance, where {packaged['tolerance']:.0e} is allowed; it is not served"
                )
