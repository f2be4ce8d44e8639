"""Recurrent networks as the loop over steps that they are, whose gates are products that can be held constant.

    LSTM  c' = f * c + i * tanh(g), h' = o * tanh(c')      with i, f, o = sigmoid(...)
    GRU   n = tanh(a + r * b), h' = (1 - z) * n + z * h    with r, z = sigmoid(...)

Frozen, `i`, `f`, `o`, `r` and `z` are constants on the way back, and tanh keeps its derivative: the product rule of
`Rules(product="frozen")`, as GLU has it (arXiv:2507.22832, the same principle). The values are those of PyTorch's own op, to the
bit; the loop is only what cotangents go back through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import handle_torch_function, has_torch_function

from ...containers import rebuilt, tensors_of
from ..adjoints.row import FROZEN
from ..calls.autocast import Region, under
from ..dual_path import dual_path, frozen, is_plain

State = tuple[Tensor, ...]  # (h, c) of an LSTM, (h,) of a GRU
Weights = Sequence[Tensor | None]  # of one direction of a layer: w_ih, w_hh, b_ih, b_hh, w_hr


def recurrent(
    exact: Any,
    inputs: Any,
    state: Any,
    weights: Sequence[Tensor],
    *,
    stateful: bool,
    cell: bool = False,
    batch_sizes: Tensor | None = None,
    biases: bool = True,
    layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    flat: bool = False,
    autocast: Region = (),
) -> Any:
    """`exact`, what an LSTM or a GRU returned, with the cotangents of the loop whose gates are constants.

    Args:
        exact: the output of the op or the module: (outputs, h) or (outputs, (h, c)), flat as (outputs, h, c), where `flat`.
        inputs: [T, B, F], [B, T, F] where `batch_first`, [T, F] of one sample, or a `PackedSequence`; [N, F] of packed data,
            whose steps have `batch_sizes` [T]; of a cell [B, F] or [F].
        state: (h, c) or h, [layers * directions, B, H]; None for zeros.
        weights: those of each direction of each layer in turn: w_ih, w_hh, b_ih and b_hh where there are `biases`, and w_hr of an
            LSTM with projections.
        stateful: of an LSTM, which has a state c beside h; else of a GRU.
        cell: of one step, whose outputs are the states alone.
    """
    tensors = tuple(tensors_of((exact, inputs, state, weights)))
    options: dict[str, Any] = {
        "stateful": stateful, "cell": cell, "batch_sizes": batch_sizes, "biases": biases, "layers": layers,
        "bidirectional": bidirectional, "batch_first": batch_first, "flat": flat,
    }  # fmt: skip
    if has_torch_function(tensors):
        return handle_torch_function(recurrent, tensors, exact, inputs, state, weights, **options)
    if is_plain():
        return exact
    found = under(autocast, steps, inputs, state, weights, **options)
    soft = iter(tensors_of(found))

    def through(leaf: Any) -> Any:
        floats = isinstance(leaf, Tensor) and leaf.is_floating_point()  # unlike the batch sizes of a PackedSequence
        return dual_path("surrogate", leaf, next(soft), tau=FROZEN) if floats else leaf

    return rebuilt(exact, through)


def steps(
    inputs: Any,
    state: Any,
    weights: Sequence[Tensor],
    *,
    stateful: bool,
    cell: bool = False,
    batch_sizes: Tensor | None = None,
    biases: bool = True,
    layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    flat: bool = False,
) -> Any:
    """What `recurrent` goes back through: the outputs, in the order of those of the op, with constants for gates."""
    packed = inputs if isinstance(inputs, PackedSequence) else None
    if packed is not None:
        inputs, batch_sizes = packed.data, packed.batch_sizes
        if state is not None and packed.sorted_indices is not None:
            state = rebuilt(state, lambda s: s.index_select(1, packed.sorted_indices))
    alone = batch_sizes is None and inputs.dim() == (1 if cell else 2)
    if cell:
        inputs = inputs[None]
        state = None if state is None else rebuilt(state, lambda s: s[None])
    if alone:
        inputs = inputs.unsqueeze(1)
        state = None if state is None else rebuilt(state, lambda s: s.unsqueeze(1))
    elif batch_first and not cell and batch_sizes is None:
        inputs = inputs.transpose(0, 1)
    sizes = [inputs.shape[1]] * inputs.shape[0] if batch_sizes is None else batch_sizes.tolist()
    rows = inputs if batch_sizes is not None else inputs.flatten(0, 1)  # [N, F], the steps one after the other
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    starts = [None] * (layers * directions) if state is None else list(zip(*(s.unbind(0) for s in as_state(state))))
    ends: list[State] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            at = layer * directions + direction
            own = named(weights[at * each : (at + 1) * each], biases)
            start = starts[at] or zeros(stateful, rows, sizes[0], own)
            output, end = one_direction(rows, start, own, sizes, backwards=direction == 1)
            outputs.append(output)
            ends.append(end)
        rows = torch.cat(outputs, -1) if directions > 1 else outputs[0]
    final = tuple(torch.stack(parts) for parts in zip(*ends))
    if packed is not None and packed.unsorted_indices is not None:
        final = tuple(f.index_select(1, packed.unsorted_indices) for f in final)
    if cell:
        final = tuple(f[0, 0] if alone else f[0] for f in final)
        return final if stateful else final[0]
    if alone:
        final = tuple(f.squeeze(1) for f in final)
    if batch_sizes is None:
        rows = rows.unflatten(0, (len(sizes), sizes[0]))
        rows = rows.squeeze(1) if alone else rows.transpose(0, 1) if batch_first else rows
    return (rows, *final) if flat or len(final) == 1 else (rows, final)


def as_state(state: Any) -> State:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def named(weights: Sequence[Tensor], biases: bool) -> Weights:
    """w_ih, w_hh, b_ih, b_hh and w_hr, None for those that there are not."""
    rest = list(weights[4 if biases else 2 :])
    return [*weights[:2], *(weights[2:4] if biases else (None, None)), rest[0] if rest else None]


def zeros(stateful: bool, rows: Tensor, batch: int, weights: Weights) -> State:
    """The state before the first step: c has as many numbers as w_hh has rows a gate, and h as many as it has columns."""
    w_hh = weights[1]
    assert w_hh is not None
    h = rows.new_zeros(batch, w_hh.shape[1])
    return (h, rows.new_zeros(batch, w_hh.shape[0] // 4)) if stateful else (h,)


def one_direction(rows: Tensor, start: State, weights: Weights, sizes: list[int], backwards: bool) -> tuple[Tensor, State]:
    """The outputs of one direction of a layer, [N, H], and its last state; step t has `sizes[t]` samples, no more than the one
    before."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    assert w_ih is not None and w_hh is not None
    step = gru_step if len(start) == 1 else lstm_step
    projected = F.linear(rows, w_ih, b_ih).split(sizes)  # for all steps at once
    outputs: list[Tensor] = []
    state, finished = tuple(s[: sizes[-1 if backwards else 0]] for s in start), list[State]()
    for t in reversed(range(len(sizes))) if backwards else range(len(sizes)):
        size, now = sizes[t], state[0].shape[0]
        if size > now:  # backwards: samples that are longer begin here
            state = tuple(torch.cat([s, first[now:size]]) for s, first in zip(state, start))
        elif size < now:  # samples that have ended
            finished.insert(0, tuple(s[size:] for s in state))
            state = tuple(s[:size] for s in state)
        state = step(projected[t], F.linear(state[0], w_hh, b_hh), state, w_hr)
        outputs.append(state[0])
    end = tuple(torch.cat(parts) for parts in zip(state, *finished)) if finished else state
    return torch.cat(outputs[::-1] if backwards else outputs), end


def lstm_step(of_input: Tensor, of_state: Tensor, state: State, w_hr: Tensor | None) -> State:
    i, f, g, o = (of_input + of_state).chunk(4, 1)
    c = frozen(f.sigmoid()) * state[1] + frozen(i.sigmoid()) * g.tanh()
    h = frozen(o.sigmoid()) * c.tanh()
    return (h if w_hr is None else F.linear(h, w_hr)), c


def gru_step(of_input: Tensor, of_state: Tensor, state: State, w_hr: Tensor | None) -> State:
    (r, z, n), (of_r, of_z, of_n) = of_input.chunk(3, 1), of_state.chunk(3, 1)
    update = frozen((z + of_z).sigmoid())
    new = (n + frozen((r + of_r).sigmoid()) * of_n).tanh()
    return ((1 - update) * new + update * state[0],)
