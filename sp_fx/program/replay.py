"""Compiled programs on a GPU: recorded as CUDA graphs and replayed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Replayed:
    """CUDA graphs of one compiled function.

    A CUDA graph has fixed sizes, so there is one for each power of two of the batch up to 32, and for each multiple of 32 beyond.
    A smaller batch is padded with whatever was in the rows before; results are copies. One call runs at a time, since a graph has
    one set of buffers.
    """

    def __init__(self, run: Callable[..., Sequence[Tensor]], dynamic: bool) -> None:
        self.run, self.dynamic, self.turn = run, dynamic, threading.Lock()
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]] = {}

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        batch = tensors[0].shape[0]
        size = batch if not self.dynamic else 1 << (batch - 1).bit_length() if batch <= 32 else -(-batch // 32) * 32
        with self.turn, torch.cuda.device(tensors[0].device):
            if size not in self.graphs:
                self.graphs[size] = self.record([t.new_zeros((size, *t.shape[1:])) for t in tensors], tensors)
            graph, buffers, results = self.graphs[size]
            for buffer, t in zip(buffers, tensors):
                buffer[:batch].copy_(t)
            graph.replay()
            return [r[:batch].clone() if r.shape[:1] == (size,) else r.clone() for r in results]

    def record(self, buffers: list[Tensor], tensors: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]:
        """Returns a CUDA graph, the buffers that it reads, at first with `tensors` in them, and the buffers of its results."""
        for buffer, t in zip(buffers, tensors):
            buffer[: len(t)].copy_(t)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries choose their kernels and take their workspaces before a graph may be recorded
                self.run(*buffers)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = list(self.run(*buffers))
        return graph, buffers, results
