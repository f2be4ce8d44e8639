"""One run of a function of a model's arguments, forward and back; and how far apart two runs are."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.arguments import ByName, Given
from ..capture.clones.untouched import generators
from ..containers import rebuilt, slotted, tensors_of

# The largest relative L2 distance that is a rounding error, of outputs that are not bitwise the model's and of gradients, by the
# coarsest dtype that the graph computes in.
OUTPUT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
GRADIENT = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.2}

# Inputs near zero are taken to be of this size at least, where it is asked what a difference of gradients does to outputs: at an
# example of zeros every gradient would do, since none moves an output.
STEP = 1e-2


@dataclass(frozen=True)
class Run:
    """What one run gave: `outputs`; which of them are `directed`, so that gradients are of them; `gradients` of a direction of
    these, None where there are none, for the `reason`; whether it drew random numbers; and `reach`, the norm of what the
    gradients are taken by."""

    outputs: list[Tensor]
    directed: list[bool]
    gradients: list[Tensor] | None
    reach: float
    reason: str
    drew: bool


@dataclass(frozen=True)
class Runnable:
    """A model or a graph: what to call, and the weights that gradients are taken by where none floats."""

    call: Callable[[Given], Any]
    weights: Sequence[Tensor]


def ran(function: Runnable, call: Given, back: bool, draws: bool, grad: bool = True) -> Run:
    """Runs `function`, forward and, with `back`, from a direction of all outputs back to the floating arguments, or to its
    weights where none floats; with `draws`, under one seed."""
    reason, gradients = "", None
    for whole in (False, True) if back else (False,):  # reentrant checkpoints do without a list of inputs alone
        with one_seed(draws) as drew, torch.set_grad_enabled(grad):
            values, leaves = leaves_of(call, function.weights)
            outputs = tensors_of(function.call(values))
            drawn = drew()
            try:
                gradients = gradients_of(outputs, leaves, whole=whole) if back else None
                break
            except RuntimeError as error:
                reason = reason or first_line(error)
    reach = math.sqrt(sum(float(x.detach().double().norm()) ** 2 + STEP**2 * x.numel() for x in leaves))
    return Run([t.detach() for t in outputs], [t.requires_grad for t in outputs], gradients, reach, reason, drawn)


def leaves_of(call: Given, weights: Sequence[Tensor]) -> tuple[Given, list[Tensor]]:
    """Returns a copy of the call, and what to differentiate by: those that float, or, where none does, the `weights`."""
    leaves: list[Tensor] = []

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        own = leaf.detach().clone()
        if own.is_floating_point():
            leaves.append(own.requires_grad_())
            return own * 1  # a forward may write over its inputs, and may not over a leaf
        return own

    values = rebuilt(call, copied)
    return values, leaves or [weight.requires_grad_() for weight in weights]


def weights_of(model: nn.Module, modules: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the weights of a model that a gradient is taken by where no argument floats, and those of the same names in the
    `modules` that a graph was captured over: the embeddings', or, where it has none, all."""
    of_model, of_graph = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, modules))
    embeddings = {path for path, m in model.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    shared = {id(p): name for name, p in of_model.items() if name in of_graph and p.is_floating_point()}
    chosen = [name for name in shared.values() if name.rpartition(".")[0] in embeddings] or [*shared.values()]
    return [of_model[name] for name in chosen], [of_graph[name] for name in chosen]


def gradients_of(outputs: list[Tensor], inputs: list[Tensor], keep: bool = False, whole: bool = False) -> list[Tensor]:
    """Returns the gradients, by the `inputs`, of a direction of all outputs, the same at every call; 0 where there is none. Large
    outputs have small directions, so that none hides another.

    `keep`: whether the graph is kept. `whole`: whether the inputs are leaves that gradients are accumulated in, as all others.
    """
    directed = [y for y in outputs if y.requires_grad]
    if not directed or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    drawn = torch.Generator().manual_seed(0)
    sizes = [float(y.detach().abs().double().nan_to_num(0, 0, 0).square().mean().sqrt()) for y in directed]
    us = [
        (torch.randn(y.shape, generator=drawn, dtype=torch.float32) / (size or 1.0)).to(y.device, y.dtype)
        for y, size in zip(directed, sizes)
    ]
    if whole:
        torch.autograd.backward(directed, us)  # type: ignore[arg-type]
        gradients = tuple(x.grad for x in inputs)
    else:
        gradients = torch.autograd.grad(directed, inputs, us, allow_unused=True, retain_graph=keep)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients)]


@contextlib.contextmanager
def one_seed(draws: bool) -> Iterator[Callable[[], bool]]:
    """While it lasts random numbers are the same at every call, where a model `draws` them; the generators are the process's, so
    that other threads draw the same, too. Yields a function that says whether any was drawn."""
    if not draws:
        yield lambda: False
        return
    others = generators()
    states = {name: get() for name, (get, _, _) in others.items()}
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(0)
        for _, _, seed in others.values():
            seed(0)
        fresh = torch.get_rng_state()
        devices = [torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []
        try:
            yield (
                lambda: (
                    not (
                        torch.equal(fresh, torch.get_rng_state())
                        and all(torch.equal(before, torch.cuda.get_rng_state(i)) for i, before in enumerate(devices))
                    )
                )
            )
        finally:
            for name, (_, put, _) in others.items():
                put(states[name])


def perturbed(call: Given) -> Given:
    """Returns the call, with every floating number moved a little, so that none is another's equal."""
    drawn = torch.Generator().manual_seed(1)

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        noise = torch.randn(leaf.shape, generator=drawn, dtype=torch.float32).to(leaf.device, leaf.dtype)
        return leaf.detach() + noise * (0.01 * leaf.detach().abs().nan_to_num(0, 0, 0).mean() + 0.01)

    return rebuilt(call, moved)


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Returns the largest of the `distances`, 0 of no tensors; infinite where there are more of the ones than of the others."""
    return max(distances(found, expected), default=0.0) if len(found) == len(expected) else math.inf


def distances(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Returns the relative L2 distance of each pair of tensors, 0 where they are equal to the bit; infinite where their shapes,
    dtypes or places of NaN and infinities differ, or they do not float. Of the pairs that there are."""
    return [distance_of_two(a.detach(), b.detach()) for a, b in zip(found, expected)]


def distance_of_two(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return math.inf
    if torch.equal(a, b):
        return 0.0
    if not (b.is_floating_point() or b.is_complex()):
        return math.inf
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (a, b))
    odd = ~b.isfinite()
    if not (torch.equal(odd, ~a.isfinite()) and torch.equal(a[odd].nan_to_num(0.0), b[odd].nan_to_num(0.0))):
        return math.inf
    a, b = a.masked_fill(odd, 0).double(), b.masked_fill(odd, 0).double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def beyond(apart: float, dtype: torch.dtype, bars: Mapping[torch.dtype, float]) -> bool:
    """Whether a distance is more than rounding in `dtype`; in others than those that have a bar, in float32."""
    return not apart <= bars.get(dtype, bars[torch.float32])


class Coarsest(ByName):
    """Runs a graph and notes the coarsest dtype that each output was computed in.

    Attributes:
        of_outputs: those, after a run, of the tensors among the outputs.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph)
        self.of_nodes: dict[fx.Node, torch.dtype] = {}
        self.of_outputs: list[torch.dtype] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            own = [t.dtype for t in tensors_of(value) if t.dtype in OUTPUT]
            dtypes = [*own, *(self.of_nodes[m] for m in n.all_input_nodes if m in self.of_nodes)]
            if dtypes:
                self.of_nodes[n] = max(dtypes, key=OUTPUT.__getitem__)
            return value
        for leaf in slotted(n.args[0])[1]:
            if isinstance(leaf, fx.Node):
                coarsest = self.of_nodes.get(leaf, torch.float32)
                self.of_outputs += [coarsest for _ in tensors_of(self.env[leaf])]
        return value


class Seen(ByName):
    """Runs a graph and keeps what each call of each module gave, by the module's path and the number of the call."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph)
        self.values: dict[tuple[str, int], list[Tensor]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().call_module(target, args, kwargs)
        number = 1 + sum(path == target for path, _ in self.values)
        self.values[target, number] = tensors_of(value)
        return value


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
