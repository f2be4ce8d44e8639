"""Norms that a model writes out itself, as `x * (x.pow(2).mean(-1, True) + eps).rsqrt()`: recognised by their algebra.

Such a norm is a signal over a statistic of that signal, or times the inverse of one: twice the signal has twice the statistic, so
that the result stays. `x * x.pow(2).mean()` has twice the signal and four times the statistic, and is none. The statistic is the
same for the negative of the signal, as that of squares or magnitudes is, so that `x / x.sum()` is none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

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
        for call, statistic, by in [(node, operand, divides), *([] if divides else statistics_in(graph, operand))]:
            for signals, divisors in factors_of(graph, numerator):
                if (found := normalised(graph, signals, divisors, statistic, by)) is not None:
                    kind, constants, inside = found
                    return Statistic(kind, ((call, statistic), *constants), inside)
    return None


def statistics_in(graph: Graph, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, bool]]:
    """What a factor may be multiplied or divided by, as that of `x * (g * r)` is by r: the call, r, and whether it divides."""
    at = graph.carried(node)
    if len(at.args) == 2 and len(graph.inputs(at)) == 2 and not at.kwargs:
        first, second = at.args
        if graph.called(at) in ops.FACTORS:
            yield from ((at, n, False) for n in (second, first))  # type: ignore[misc]
        elif graph.called(at) in ops.QUOTIENT:
            yield at, second, True  # type: ignore[misc]


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
    if not others and own.base is not None and standardises(graph, own.base, own.forms, statistic, divides):
        return "layer_norm", ((own.centring, own.taken_off),), inside + own.mean  # type: ignore[return-value]
    if window:
        return "local_response_norm", (), inside
    return "rms_norm" if len(signals) == 1 and "mean" in names and not names & ops.NORMS else "normalize", (), inside


def standardises(graph: Graph, base: fx.Node, forms: Collection[fx.Node], statistic: fx.Node | None, divides: bool) -> bool:
    """Whether one of the `forms` of a centred signal has variance 1 once a statistic, if there is one, divides or multiplies it,
    so that it is a layer norm; `(x - x.mean()) / x.norm()` has not. True where that does not run on numbers."""

    def answer(form: fx.Node) -> bool | None:
        of = calls_between(graph, base, form)
        by = () if statistic is None else calls_between(graph, base, statistic)
        if not of or by is None:
            return None

        def computed(z: Tensor) -> Tensor:
            scale = graph.computed(by, {base: z}) if by else 1.0
            return graph.computed(of, {base: z}) / scale if divides else graph.computed(of, {base: z}) * scale

        return is_standard(computed, {*of, *by})

    found = [answer(form) for form in forms]
    return any(found) or all(known is None for known in found)


def is_standard(function: Callable[[Tensor], Tensor], calls: Collection[fx.Node]) -> bool | None:
    """Whether a function of a signal has mean 0 and variance 1, with N or N - 1 in its denominator, over the same axes
    everywhere, whatever is added to the signal. None where it does not run on numbers of any shape, with sizes that its calls
    name."""
    sizes = sorted({a for n in calls for a in n.args if type(a) is int and 2 < a <= 4096})
    runs = False
    for rank in (2, 3, 4, 1):
        shapes = [SIZES[:rank]] + [(*SIZES[:i], size, *SIZES[i + 1 : rank]) for size in sizes for i in range(rank)]
        for shape in shapes:
            z = 30 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            try:
                y, shifted = function(z), function(z + 1)
            except Exception:  # of another rank, or by sizes of the model's tensors
                continue
            runs = True
            if y.shape == z.shape and torch.allclose(y, shifted, atol=1e-6) and any(is_unit(y, axes) for axes in subsets(rank)):
                return True
    return False if runs else None


def is_unit(y: Tensor, axes: tuple[int, ...]) -> bool:
    """Whether `y` has mean 0 and one variance of 1, or somewhat less, over the axes."""
    variances = y.square().mean(axes)
    alike = bool((variances.max() - variances.min()) < 1e-3) and 0.6 < float(variances.min()) < 1.001
    return alike and bool(y.mean(axes).abs().max() < 1e-6)


def subsets(rank: int) -> Iterator[tuple[int, ...]]:
    """The sets of axes, those of few first."""
    for number in range(1, rank + 1):
        yield from itertools.combinations(range(rank), number)


def calls_between(graph: Graph, base: fx.Node, node: fx.Node) -> Calls | None:
    """Returns the calls that make `node` of the node `base` alone, if they can be run on numbers."""
    return graph.between(base, node, lambda n: n.op != "call_module" or graph.passes(n))


def centred_over(graph: Graph, node: fx.Node, shape: Sequence[int]) -> Signal | None:
    """Returns the signal `node`, if the mean over as many last axes as `shape` has was taken off it: its RMS norm is a layer
    norm."""
    signal = signal_of(graph, node)
    calls = None if signal.base is None else calls_between(graph, signal.base, graph.carried(node))
    if not calls:
        return None

    def normed(z: Tensor) -> Tensor:
        c = graph.computed(calls, {signal.base: z})  # type: ignore[dict-item]
        axes = tuple(range(c.dim() - len(shape), c.dim()))
        return c / c.square().mean(axes, keepdim=True).sqrt()

    return signal if is_standard(normed, calls) else None


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
        if degree is None or degree.powers or not is_centre(graph, node, made, degree):
            continue
        if standardises(graph, base, [node], None, divides=True):
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
