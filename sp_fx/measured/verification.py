"""Verification: is a rewritten graph the model's function, and under plain derivatives its gradient the model's own?

Both run once on the same arguments, forward and back. The graph runs with its rules switched off (`plain_derivatives`), so that
what it loses on the way back, such as the backward of an `autograd.Function`, is seen as a difference of gradients.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..capture.arguments import ByName, FormError
from ..capture.capture import Capture, CaptureError, blame, said
from ..capture.clone import EvalClone, give_own_buffers
from ..capture.untouched import Untouched
from ..containers import rebuilt, tensors_of
from ..gates.dual_path import plain_derivatives

Verify = Literal[True, False, "forward"]

# The largest relative L2 distance that is a rounding error, of outputs that are not bitwise the model's and of gradients, by the
# coarsest dtype that the graph computes in. Where the outputs are not bitwise, a ReLU may open that the model's keeps shut, and
# gradients may differ by a gate.
OUTPUT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
GRADIENT = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.2}
GATE = 2e-2


def verified(capture: Capture, modules: nn.Module, graph: fx.Graph, arguments: Mapping[str, Any], verify: Verify) -> list[str]:
    """Compares `graph`, rewritten over `modules`, with the model that was captured; returns notes for the reader of a report.

    `arguments` are those of the forward, by name; `verify` is True, or "forward" for the outputs alone. Models that draw random
    numbers are compared under one seed; the caller's random numbers go on where they were.

    Raises:
        CaptureError: they differ by more than rounding; the message names the first module whose output, or gradient, differs.
    """
    if not verify:
        return []
    reference = EvalClone()(capture.reference)
    give_own_buffers(reference)
    subject = fx.GraphModule(EvalClone()(modules), graph)
    call = inspect.BoundArguments(inspect.signature(reference.forward), dict(arguments))  # type: ignore[arg-type]

    def of_model(values: Mapping[str, Any]) -> Any:
        call.arguments.update(values)
        return reference(*call.args, **call.kwargs)

    dtypes: set[torch.dtype] = set()

    def of_graph(values: Mapping[str, Any]) -> Any:
        with plain_derivatives():
            return Noting(subject, dtypes).run_by_name(values)

    back = verify is True
    with Untouched(reference, modules).restored():
        notes = compared(of_model, of_graph, reference, subject, arguments, dtypes, capture.tracer, back)
        if capture.asks:
            same_without_gradients(of_model, reference, arguments, capture.asks)
        return notes


def same_without_gradients(of_model: Callable[..., Any], reference: nn.Module, arguments: Mapping[str, Any], asks: str) -> None:
    """Checks a model that asks whether gradients are on, at the lines `asks`.

    Raises:
        CaptureError: it computes other outputs where they are off.
    """
    on, off = (ran(of_model, reference, arguments, False, grad).outputs for grad in (True, False))
    if not distance(off, on) <= bar_of({y.dtype for y in on}, OUTPUT):
        raise CaptureError(
            f"{type(reference).__name__} computes other outputs where gradients are off, and asks at {asks}: an explainer "
            "computes those of where they are on. Pass verify=False if these are the ones to explain"
        )


def own_error(model: nn.Module, arguments: Mapping[str, Any]) -> str:
    """What the model itself raises on the arguments, by name, and where; "" where it runs."""
    clone = EvalClone()(model)
    give_own_buffers(clone)
    call = inspect.BoundArguments(inspect.signature(clone.forward), dict(arguments))  # type: ignore[arg-type]
    with Untouched(model, clone).restored(), one_seed(), torch.no_grad():
        try:
            clone(*call.args, **call.kwargs)
        except Exception as error:  # whatever it is
            return f"{said(error)} ({blame(error)})"
    return ""


def compared(
    of_model: Callable[..., Any], of_graph: Callable[..., Any], reference: nn.Module, subject: fx.GraphModule,
    arguments: Mapping[str, Any], dtypes: Collection[torch.dtype], tracer: str, back: bool,
) -> list[str]:  # fmt: skip
    """`verified`, of the model and the graph as functions of the arguments by name; `dtypes` are those that the graph's last run
    computed in."""
    graph, notes = f"the graph of {type(reference).__name__} by {tracer}", []
    try:
        own = ran(of_model, reference, arguments, back)
    except RuntimeError as error:  # `torch.mul(a, b, out=c)` runs where nothing requires grad alone
        back = False
        own = ran(of_model, reference, arguments, back, grad=False)
        notes.append(f"the model runs without gradients alone, so that gradients were not compared: {first_line(error)}")
    try:
        other = ran(of_graph, subject, arguments, back, grad=not notes)
    except (FormError, AssertionError):  # a call that the graph is not for, and says so
        raise
    except Exception as error:  # whatever the graph raises where the model does not
        raise CaptureError(f"{graph} raises where the model does not: {first_line(error)}") from error
    if own.drew:
        notes.append("the forward draws random numbers: the same call twice gives two outputs, and two maps")
    apart = distance(other.outputs, own.outputs)
    bar = bar_of(dtypes, OUTPUT)
    if not apart <= bar:
        where = first_difference(of_model, of_graph, reference, subject, arguments)
        raise CaptureError(
            f"{graph} computes other outputs than the model, off by {apart:.1e}; {where}. verify=False explains the graph"
        )
    if apart:
        notes.append(f"outputs are the model's to {apart:.0e} (relative L2), not to the bit")
    if back and own.gradients is None:
        notes.append(f"the model's own backward fails, so that gradients were not compared: {own.reason}")
    elif back:
        bar = max(bar_of(dtypes, GRADIENT), GATE if apart else 0.0)
        slope = slope_apart(other, own)
        if not slope <= bar and other.gradients is not None:  # perhaps for a tie, whose winner is a matter of taste
            near = perturbed(arguments)
            slope = slope_apart(ran(of_graph, subject, near, True), ran(of_model, reference, near, True))
        if not slope <= bar:
            where = first_difference(of_model, of_graph, reference, subject, arguments, back=True)
            how_far = f"off by {slope:.1e}" if other.gradients is not None else f"which fails: {other.reason}"
            raise CaptureError(
                f"{graph} has another gradient than the model, {how_far}; {where}. verify='forward' explains the graph"
            )
    return notes


def slope_apart(found: Run, expected: Run) -> float:
    """Returns how far apart the gradients of two runs are; 0 where the difference, over all of the inputs, would not show in a
    float32 output."""
    apart = distance(found.gradients, expected.gradients)
    if math.isfinite(apart) and found.gradients is not None and expected.gradients is not None:
        over = sum(float((a - b).double().norm()) for a, b in zip(found.gradients, expected.gradients)) * expected.reach
        if over <= 1e-7 * sum(float(y.double().norm()) for y in expected.outputs if y.is_floating_point()):
            return 0.0
    return apart


@dataclass(frozen=True)
class Run:
    """What one run gave: `outputs`; `gradients` of a direction of them, None where there are none, for the `reason`; whether it
    drew random numbers; and `reach`, the norm of what the gradients are taken by."""

    outputs: list[Tensor]
    gradients: list[Tensor] | None
    reach: float
    reason: str
    drew: bool


def ran(
    function: Callable[[Mapping[str, Any]], Any], module: nn.Module, arguments: Mapping[str, Any], back: bool, grad: bool = True
) -> Run:
    """Runs `function` of the arguments, forward and, with `back`, from a direction of all outputs back to the floating arguments,
    or to the embeddings of `module` where none floats."""
    reason, gradients = "", None
    for whole in (False, True) if back else (False,):  # reentrant checkpoints do without a list of inputs alone
        with one_seed() as drew, torch.set_grad_enabled(grad):
            values, leaves = leaves_of(arguments, module)
            outputs = tensors_of(function(values))
            drawn = drew()
            try:
                gradients = gradients_of(outputs, leaves, whole=whole) if back else None
                break
            except RuntimeError as error:
                reason = reason or first_line(error)
    reach = math.sqrt(sum(float(x.detach().double().norm()) ** 2 for x in leaves))
    return Run([t.detach() for t in outputs], gradients, reach, reason, drawn)


def leaves_of(arguments: Mapping[str, Any], module: nn.Module) -> tuple[Any, list[Tensor]]:
    """Returns copies of the arguments, and what to differentiate by: those that float, or, where none does, the weights of the
    embeddings of `module`, which are replaced by copies."""
    leaves: list[Tensor] = []

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        own = leaf.detach().clone()
        if own.is_floating_point():
            leaves.append(own.requires_grad_())
            return own * 1  # a forward may write over its inputs, and may not over a leaf
        return own

    values = rebuilt(dict(arguments), copied)
    if not leaves:  # in the order of their places in memory, which is the same in the model and in the graph
        embeds = lambda m: "Embedding" in (type(m).__name__, getattr(m, "name", ""))  # noqa: E731  # itself, or its mark
        weights = {p.data_ptr(): p for m in module.modules() if embeds(m) for p in m.parameters(recurse=False)}
        leaves = [weights[place].requires_grad_() for place in sorted(weights)]
    return values, leaves


def gradients_of(outputs: list[Tensor], inputs: list[Tensor], keep: bool = False, whole: bool = False) -> list[Tensor]:
    """Returns the gradients, by the `inputs`, of a direction of all outputs, the same at every call; 0 where there is none.

    `keep`: whether the graph is kept. `whole`: whether the inputs are leaves that gradients are accumulated in, as all others.
    """
    directed = [y for y in outputs if y.requires_grad]
    if not directed or not inputs:
        return [torch.zeros_like(x) for x in inputs]
    drawn = torch.Generator().manual_seed(0)
    us = [torch.randn(y.shape, generator=drawn, dtype=torch.float32).to(y.device, y.dtype) for y in directed]
    if whole:
        torch.autograd.backward(directed, us)  # type: ignore[arg-type]
        gradients = tuple(x.grad for x in inputs)
    else:
        gradients = torch.autograd.grad(directed, inputs, us, allow_unused=True, retain_graph=keep)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients)]


@contextlib.contextmanager
def one_seed() -> Iterator[Callable[[], bool]]:
    """While it lasts random numbers are the same at every call. Yields a function that says whether any was drawn."""
    state = random.getstate()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(0)
        random.seed(0)
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
            random.setstate(state)


def perturbed(arguments: Mapping[str, Any]) -> Any:
    """Returns the arguments, with every floating number moved a little, so that none is another's equal."""
    drawn = torch.Generator().manual_seed(1)

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        noise = torch.randn(leaf.shape, generator=drawn, dtype=torch.float32).to(leaf.device, leaf.dtype)
        return leaf.detach() + noise * (0.01 * leaf.detach().abs().nan_to_num(0, 0, 0).mean() + 0.01)

    return rebuilt(dict(arguments), moved)


def distance(found: list[Tensor] | None, expected: list[Tensor] | None) -> float:
    """Returns the largest relative L2 distance of tensors, 0 where they are equal to the bit; infinite where their number, their
    shapes, dtypes or places of NaN and infinities differ, or they do not float."""
    if found is None or expected is None or len(found) != len(expected):
        return 0.0 if found is expected else float("inf")
    worst = 0.0
    for a, b in ((a.detach(), b.detach()) for a, b in zip(found, expected)):
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return float("inf")
        if torch.equal(a, b):
            continue
        if not (b.is_floating_point() or b.is_complex()):
            return float("inf")
        a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (a, b))
        odd = ~b.isfinite()
        if not (torch.equal(odd, ~a.isfinite()) and torch.equal(a[odd].nan_to_num(0.0), b[odd].nan_to_num(0.0))):
            return float("inf")
        a, b = a.masked_fill(odd, 0).double(), b.masked_fill(odd, 0).double()
        worst = max(worst, float((a - b).norm() / b.norm().clamp_min(1e-30)))
    return worst


def bar_of(dtypes: Collection[torch.dtype], bars: Mapping[torch.dtype, float]) -> float:
    """The bar of the coarsest of some dtypes; of others than these, and of none, that of float32."""
    return max((bars.get(dtype, bars[torch.float32]) for dtype in dtypes), default=bars[torch.float32])


def first_difference(
    of_model: Callable[..., Any], of_graph: Callable[..., Any], reference: nn.Module, subject: fx.GraphModule, arguments: Any,
    back: bool = False,
) -> str:  # fmt: skip
    """Says at which module the graph first goes another way than the model: the first whose output differs; with `back`, the last
    whose output has another gradient, which is the first on the way back."""
    calls: list[tuple[str, list[Tensor]]] = []
    handles = [
        module.register_forward_hook(lambda m, a, y, path=path: calls.append((path, tensors_of(y))))
        for path, module in reference.named_modules()
        if path
    ]
    seen = Seen(subject)
    try:
        with one_seed(), torch.set_grad_enabled(True):
            outputs = tensors_of(of_model(leaves_of(arguments, reference)[0]))
        with one_seed(), torch.set_grad_enabled(True), plain_derivatives():
            others = tensors_of(seen.run_by_name(leaves_of(arguments, subject)[0]))
    except Exception as error:
        return f"it raises where the model does not: {first_line(error)}"
    finally:
        for handle in handles:
            handle.remove()
    numbers: dict[str, int] = {}
    pairs = []
    for path, values in calls:
        numbers[path] = numbers.get(path, 0) + 1
        if (path, numbers[path]) in seen.values:
            name = path if numbers[path] == 1 else f"{path}#{numbers[path]}"
            pairs.append((name, seen.values[path, numbers[path]], values))
    for name, found, expected in reversed(pairs) if back else pairs:
        if back:
            both = [(a, b) for a, b in zip(found, expected) if a.requires_grad and b.requires_grad]
            if len(both) < sum(b.requires_grad for b in expected):
                return f"at the output of {name} the graph has none"
            found = gradients_of(others, [a for a, _ in both], keep=True)
            expected = gradients_of(outputs, [b for _, b in both], keep=True)
        if not distance(found, expected) <= bar_of({t.dtype for t in expected}, GRADIENT if back else OUTPUT):
            module = reference.get_submodule(name.partition("#")[0])
            return f"the first module that differs is {name}, {written_at(module)}{', by its gradient' if back else ''}"
    return f"all of its modules agree: the difference is in the forward of {written_at(reference)} itself"


def written_at(module: nn.Module) -> str:
    """The class of a module, and where its forward is written."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return type(module).__name__ + (f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else "")


class Noting(ByName):
    """Runs a graph and notes the floating dtypes of what its calls return."""

    def __init__(self, module: fx.GraphModule, dtypes: set[torch.dtype]) -> None:
        super().__init__(module)
        self.dtypes = dtypes

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.dtypes.update(t.dtype for t in tensors_of(value) if t.is_floating_point() or t.is_complex())
        return value


class Seen(ByName):
    """Runs a graph and keeps what each call of each module gave, by the module's path and the number of the call."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[tuple[str, int], list[Tensor]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().call_module(target, args, kwargs)
        number = 1 + sum(path == target for path, _ in self.values)
        self.values[target, number] = tensors_of(value)
        return value


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
