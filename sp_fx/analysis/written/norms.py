"""Norms that a model writes out itself, as `x * (x.pow(2).mean(-1, True) + eps).rsqrt()`: recognised by their algebra.

Such a norm is a signal over a statistic of that signal, or times the inverse of one: twice the signal has twice the statistic, so
that the result stays. `x * x.pow(2).mean()` has twice the signal and four times the statistic, and is none. The statistic is the
same for the negative of the signal, as that of squares or magnitudes is, so that `x / x.sum()` is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from .. import ops
from ..calls import operands_of
from .degrees import Degree, Made
from .graph import Graph
from .softmax import SIZES

Calls = tuple[fx.Node, ...]
Constants = tuple[tuple[fx.Node, fx.Node], ...]  # calls, and what they read
FACTORS = 6  # signals of which a product is, the calls between them and it counted


@dataclass(frozen=True)
class Statistic:
    """A norm: `constants` are its statistics, each with the call that reads it as a constant; `inside` are the calls that make
    them.

    Of `(x - mean) / std` they are the deviation, read by the quotient, and the mean, read by the difference.
    """

    kind: str
    constants: Constants
    inside: Calls


@dataclass(frozen=True)
class Signal:
    """What a norm is of: the nodes that its statistic may be made from; the call by which it was centred, if it was, the mean
    that this took off, the node before, and the calls that make the mean."""

    forms: set[fx.Node]
    centring: fx.Node | None = None
    taken_off: fx.Node | None = None
    base: fx.Node | None = None
    mean: Calls = ()


def written_norm(graph: Graph, node: fx.Node) -> Statistic | None:
    """The norm whose last call is `node`, if there is one."""
    name = graph.called(node)
    if name in ops.SHIFTS:
        return folded_norm(graph, node)
    if name not in ops.PRODUCT | ops.QUOTIENT or name in ops.MIXTURES - ops.ADDENDS:
        return None
    operands = operands_of(node)[-2:] if name in ops.ADDENDS else operands_of(node)
    varying = [a for a in operands if isinstance(a, fx.Node) and graph.varies(a)]
    if len(varying) != 2:
        return None
    divides = name in ops.QUOTIENT
    for numerator, operand in [varying] if divides else [varying, varying[::-1]]:
        for signals, divisors in factors_of(graph, numerator):
            if (found := normalised(graph, signals, divisors, operand, divides)) is not None:
                kind, constants, inside = found
                return Statistic(kind, ((node, operand), *constants), inside)
    return None


def factors_of(graph: Graph, node: fx.Node) -> Iterator[tuple[list[fx.Node], list[fx.Node]]]:
    """The signals that `node` is linear in, each, and what divides them: first itself; of `(a * b).sum(-1) / c` then a and b."""
    signals, divisors = [node], list[fx.Node]()
    for _ in range(FACTORS):
        yield signals, divisors
        for i, n in enumerate(signals):
            linear, divisor = linear_in(graph, graph.carried(n))
            if linear:
                signals = [*signals[:i], *linear, *signals[i + 1 :]]
                divisors = [*divisors, *divisor]
                break
        else:
            return
        if len({graph.carried(n) for n in signals}) < len(signals):  # `h * h` is not linear in h
            return


def linear_in(graph: Graph, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The signals of which a call is the product, the sum or a multiple; and what divides it."""
    name, inputs = graph.called(node), graph.inputs(node)
    if name in ops.MIXTURES:
        return [], []
    if name in ops.QUOTIENT and len(inputs) == len(node.args) == 2:
        return inputs[:1], inputs[1:]
    product = name in ops.PRODUCT and 1 <= len(inputs) <= 2
    alone = len(inputs) == 1 and (name in ops.CENTRES & ops.AFFINE or (is_matrix(graph, node) and inputs[0] is node.args[0]))
    return (inputs if (product and list(operands_of(node)).count(inputs[0]) == 1) or alone else []), []


def is_matrix(graph: Graph, node: fx.Node) -> bool:
    """Whether a call is a linear layer without a bias."""
    if node.op == "call_module":
        leaf = graph.modules.get_submodule(str(node.target))
        return isinstance(leaf, nn.Linear) and leaf.bias is None
    return graph.called(node) == "linear" and len(node.args) == 2 and not node.kwargs


def normalised(
    graph: Graph, signals: list[fx.Node], divisors: list[fx.Node], statistic: fx.Node, divides: bool
) -> tuple[str, Constants, Calls] | None:
    """Whether a product of `signals` is one of norms when the statistic divides it, or multiplies it: the kind, what is constant
    beside the statistic, and the calls that make the statistics. What `divisors` have divided already is none."""
    of = [signal_of(graph, n) for n in signals]
    if len(set().union(*(signal.forms for signal in of))) < sum(len(signal.forms) for signal in of):
        return None
    made = Made(graph, *(signal.forms for signal in of))
    degree = made.degree(statistic)
    if degree is None or degree.parities or graph.carried(statistic) in made.forms or not degree.reduced:
        return None
    names = {statistic_name(graph, n) for n in made.calls}
    powers = [power if divides else -power for power in degree.powers.values()]
    window = bool(names & ops.WINDOWS)
    if len(signals) == 1 and window:
        fits = sum(powers) > 0
    else:
        relative = len(signals) == 1 and not powers and bool(names & ops.NORMS) and bool(names & ops.QUOTIENT)
        fits = ((bool(powers) and set(powers) == {1}) or relative) and made.exact  # |x| over the mean of |x| over channels
    if not fits:
        return None
    inside = tuple(made.calls)
    normed = [signal for signal in of if not signal.forms.isdisjoint(degree.powers)] or of
    rest = [n for n, signal in zip(signals, of) if signal not in normed] + divisors
    if any((by := Made(graph, *(s.forms for s in normed)).degree(n)) is not None and by.powers for n in rest):
        return None
    own, *others = normed
    if not others and own.centring is not None and own.taken_off is not None and over_equal_axes(graph, own, inside):
        return "layer_norm", ((own.centring, own.taken_off),), inside + own.mean
    if window:
        return "local_response_norm", (), inside
    return "rms_norm" if len(signals) == 1 and "mean" in names and not names & ops.NORMS else "normalize", (), inside


def over_equal_axes(graph: Graph, signal: Signal, statistic: Calls) -> bool:
    """Whether the mean that centres a signal is over the axes of its statistic, as that of a layer norm, and not over the samples
    of a batch: both have one number along these. True where neither runs on numbers."""
    for rank in (2, 3, 4, 1):
        axes = [constant_axes(graph, calls, signal, rank) for calls in (signal.mean, statistic)]
        if None not in axes:
            return axes[0] == axes[1]
    return True


def centred_over(graph: Graph, node: fx.Node, shape: Sequence[int]) -> Signal | None:
    """Returns the signal `node`, if a mean over as many last axes as `shape` has was taken off it: its RMS norm is a layer
    norm."""
    signal = signal_of(graph, node)
    if signal.centring is None:
        return None
    for rank in (4, 3, 2):
        if (axes := constant_axes(graph, signal.mean, signal, rank)) is not None:
            return signal if axes == {rank - 1 - i for i in range(len(shape))} else None
    return None


def constant_axes(graph: Graph, calls: Calls, signal: Signal, rank: int) -> set[int] | None:
    """Returns the axes along which what the `calls` make of a signal of that rank is one number; None where they do not run on
    such."""
    z = torch.randn(SIZES[:rank], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        made = graph.computed(calls, {signal.base or next(iter(signal.forms)): z, **dict.fromkeys(signal.forms, z)}).expand_as(z)
    except Exception:  # of another rank, or by sizes of the model's tensors
        return None
    return {i for i in range(rank) if bool((made == made.narrow(i, 0, 1)).all())}


def folded_norm(graph: Graph, node: fx.Node) -> Statistic | None:
    """The layer norm `h * r - h.mean(-1, True) * r`, with `r` the inverse of a deviation, whose last call is `node`."""
    if len(node.args) < 2 or not all(isinstance(a, fx.Node) and graph.varies(a) for a in node.args[:2]):
        return None
    for i in (0, 1):
        scaled, shift = node.args[i], node.args[1 - i]
        norm = written_norm(graph, graph.carried(scaled))  # type: ignore[arg-type]
        if norm is None or len(norm.constants) != 1:
            continue
        call, statistic = norm.constants[0]
        base = graph.carried(next(n for n in graph.inputs(call) if n is not statistic))
        made = Made(graph, signal_of(graph, base).forms)
        degree = made.degree(shift)
        if degree is not None and not degree.powers and is_centre(graph, node, made, degree):
            inside = tuple(dict.fromkeys((*norm.inside, *made.calls, call)))
            return Statistic("layer_norm", (*norm.constants, (node, shift)), inside)  # type: ignore[arg-type]
    return None


def statistic_name(graph: Graph, node: fx.Node) -> str:
    """Returns the name of a call; "mean" of a pooling over all places."""
    name = graph.called(node)
    sizes = node.args[1] if len(node.args) > 1 else None
    return "mean" if name.startswith("adaptive") and set(sizes if isinstance(sizes, tuple | list) else [sizes]) == {1} else name


def signal_of(graph: Graph, node: fx.Node) -> Signal:
    """Returns what the statistic of the signal `node` may be made from, and how the signal was centred.

    The nodes are the signal, what it is a multiple of, and what it was before a mean was taken off. Of `2 * (x - x.mean())` they
    are the product, the difference and x.
    """
    at = graph.carried(node)
    forms = {at}
    while True:
        inputs = graph.inputs(at)
        name = graph.called(at)
        if name in ops.SCALES and len(inputs) == 1 and at.args[:1] != at.args[1:2]:
            at = graph.carried(inputs[0])
            forms.add(at)
        else:
            return centred(graph, at, forms) if name in ops.SHIFTS and len(inputs) == len(at.args) == 2 else Signal(forms)


def centred(graph: Graph, node: fx.Node, forms: set[fx.Node]) -> Signal:
    """Returns the signal that a sum or difference gives, which may take a mean off."""
    for i in (1, 0):
        base = graph.carried(node.args[1 - i])  # type: ignore[arg-type]
        made = Made(graph, {base})
        degree = made.degree(node.args[i])
        if degree is not None and list(degree.powers.values()) == [1] and is_centre(graph, node, made, degree):
            return Signal(forms | {base}, node, node.args[i], base, tuple(made.calls))  # type: ignore[arg-type]
    return Signal(forms)


def is_centre(graph: Graph, node: fx.Node, made: Made, degree: Degree) -> bool:
    """Whether a sum or difference takes off, and does not add, what is `made` of the other operand: a mean, or a multiple of it.
    Where everything is 1 a mean is positive, over whatever sizes."""
    if degree.parity != "odd" or not {graph.called(n) for n in made.calls} & ops.CENTRES:
        return False
    takes_off = graph.called(node) not in ops.SUMS
    for rank in (2, 3, 4, 1):
        try:
            mean = graph.computed(made.calls, {n: torch.ones(SIZES[:rank], dtype=torch.float64) for n in made.forms})
            return bool((mean > 0).all() if takes_off else (mean < 0).all())
        except Exception:  # of another rank, or by sizes of the model's tensors
            continue
    return takes_off
