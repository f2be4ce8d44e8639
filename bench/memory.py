"""How much memory does an explanation keep for the way back, and what would keeping less cost?

    python bench/memory.py [--networks ...] [--out bench/results/memory.json]

For one batch in eager mode: the bytes that autograd keeps between the forward and the way back, of the plain gradient and of the
pullback; how many of those are the pre-activations of pointwise gates; and, were each of these kept in 16 bits (the
pre-activation) or in 8 (its gain, between 0 and 1), the bytes, and how far the map would be off, in relative L2. To keep nothing
and run the forward once more costs what `bench/run.py` says a forward does; peak memory is in its table too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from cases import NETWORKS, UnknownNetwork, network, noise
from provenance import provenance
from torch import Tensor, nn

import sp_fx
from sp_fx.gates import dual_path as dual
from sp_fx.gates import kernels
from sp_fx.gates.adjoints.row import Row
from sp_fx.gates.table import TABLE

MIB = 2**20


def saved_bytes(model: Callable[[Tensor], Tensor], x: Tensor, weights: set[int]) -> int:
    """Returns the bytes of storage that the graph of `model(x)` keeps alive; `weights`, addresses of storages, do not count."""
    storages: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage()  # kept, so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x.detach().requires_grad_())
    del y
    return sum(s.nbytes() for address, s in storages.items() if address not in weights)


def gate_bytes(explainer: nn.Module, x: Tensor) -> int:
    """Returns the bytes of the pre-activations that pointwise gates keep."""
    storages: dict[int, Any] = {}

    def kept(gate: Any, tensors: Any, output: Tensor) -> list[Tensor | None]:
        if gate[0] in kernels.POINTWISE:
            storages[tensors[0].untyped_storage().data_ptr()] = tensors[0].untyped_storage()
        return original(gate, tensors, output)

    original = dual.kept
    with mock.patch.object(dual, "kept", kept):
        explainer(x.detach().requires_grad_())
    return sum(s.nbytes() for s in storages.values())


def in_bits(row: Row, bits: int) -> Row:
    """Returns the row with an adjoint that keeps the pre-activation in 16 bits, or the gain in 8, as `bits` says."""

    def adjoint(v: Tensor, z: Tensor, *rest: Any, **fit: Any) -> Tensor | None:
        if bits == 16:
            return row.adjoint(v, z.bfloat16().to(z.dtype), *rest, **fit)
        gain = row.adjoint(torch.ones_like(v), z, *rest, **fit)
        assert gain is not None
        return v * (gain * 255).round() / 255

    return replace(row, adjoint=adjoint)


@contextmanager
def kept_in(bits: int) -> Iterator[None]:
    """A context in which pointwise gates keep so many bits a number."""
    changed = {kind: in_bits(TABLE[kind], bits) for kind in kernels.POINTWISE}
    with mock.patch.dict(TABLE, changed):
        yield


def memory_of(name: str, batch: int) -> dict[str, Any]:
    """Returns the row of one network: bytes, and relative errors of its map."""
    model = network(name)
    x, target = noise(batch, NETWORKS.get(name, 224), torch.float32, "cpu"), torch.arange(batch)
    explainer = sp_fx.transform(model)
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    exact, gates = explainer.pullback(x, target), gate_bytes(explainer, x)
    row = {
        "gradient": saved_bytes(model, x, weights),
        "pullback": saved_bytes(explainer, x, weights),
        "pre-activations of gates": gates,
    }
    for bits in (16, 8):
        with kept_in(bits):
            error = float((explainer.pullback(x, target) - exact).norm() / exact.norm())
        row |= {f"{bits} bits": row["pullback"] - gates * (32 - bits) // 32, f"error of {bits} bits": error}
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    record: dict[str, Any] = {**provenance(), "batch": args.batch, "bytes": {}}
    print(f"MiB kept, batch {args.batch:<11} {'gradient':>9} {'pullback':>9} {'gates':>7} {'16 bits':>17} {'8 bits':>17}")
    for name in args.networks:
        try:
            row = record["bytes"][name] = memory_of(name, args.batch)
        except UnknownNetwork as error:
            print(f"memory: {error}", file=sys.stderr)
            return 2
        cells = [f"{row[bits] / MIB:7.1f} ({row[f'error of {bits}']:.0e})" for bits in ("16 bits", "8 bits")]
        gradient, pullback, gates = (row[k] / MIB for k in ("gradient", "pullback", "pre-activations of gates"))
        print(f"{name:28} {gradient:9.1f} {pullback:9.1f} {gates:7.1f} " + " ".join(f"{cell:>17}" for cell in cells), flush=True)
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
