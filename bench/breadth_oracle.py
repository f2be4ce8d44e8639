"""The oracle of frozen maps: a model's own backward in float64 with every gate held, which knows nothing of `sp_fx`.

It walks the graph that autograd recorded of the model's own eager forward. It changes what single nodes send back and nothing
else: a GELU sends `v Phi(z)`, a layer norm `v gamma / std`, a product with a gate nothing to the gate, and a product of a softmax
with values nothing to the weights. Autograd's nodes are the facts here, whatever Python spelled them, so a gate that `sp_fx` does
not see is still a gate to the oracle. Gates with a kink have as their derivative the gate itself. What the oracle cannot know, an
`autograd.Function` say, it notes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Kinds of autograd nodes: what PyTorch calls `MulBackward0` is "Mul" here.
VIEWS = frozenset(
    "View UnsafeView ReshapeAlias Transpose T Permute Expand Clone ToCopy Squeeze Unsqueeze Slice Select Alias AsStrided Split "
    "Unbind Repeat SplitWithSizes Unfold".split()
)
SHIFTED = VIEWS | {"Add", "Sub", "Rsub"}  # of a constant and one signal
MASKS = frozenset("MaskedFill Where NativeDropout ConstantPadNd Tril Triu NanToNum Roll Flip".split())
SOFTMAXES = frozenset(("Softmax", "SafeSoftmax", "MaskedSoftmax"))
SHARES = frozenset(("Sigmoid", "Tanh", "Hardsigmoid", *SOFTMAXES))
ACTIVATIONS = frozenset("Relu Gelu Silu Hardswish Mish Hardtanh Clamp ClampMin ClampMax".split())
SQUASHES = frozenset("Tanh Erf Erfc Sigmoid Hardsigmoid Hardtanh Softplus SpecialNdtr Clamp".split())
POINTWISE = SQUASHES | VIEWS | frozenset("Mul Add Sub Rsub Div Pow Exp Log Log1P Expm1 Neg ClampMin ClampMax Reciprocal".split())
MATMULS = frozenset("Bmm Mm Baddbmm Addmm Mv Dot".split())
ROOTS = frozenset("Sqrt Rsqrt Pow Reciprocal".split())
LENGTHS = frozenset("Var Std LinalgVectorNorm Norm VarMean StdMean".split())


def by_tanh(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def gelu(node: Any) -> Tensor:
    z = node._saved_self
    return by_tanh(z) if node._saved_approximate == "tanh" else 0.5 * torch.erfc(-z / math.sqrt(2))


ROWS: dict[str, Callable[[Any], Tensor]] = {  # gates f(z) = z a(z) that are one node: a(z)
    "Silu": lambda node: node._saved_self.sigmoid(),
    "Hardswish": lambda node: (node._saved_self / 6 + 0.5).clamp(0, 1),
    "Mish": lambda node: nn.functional.softplus(node._saved_self).tanh(),
    "Gelu": gelu,
    # Functions whose own backward is their derivative: of BLOOM, and of efficientnet_pytorch.
    "GeLUFunction": lambda node: by_tanh(node.saved_tensors[0]),
    "SwishImplementation": lambda node: node.saved_tensors[0].sigmoid(),
}


def kind(node: Any) -> str:
    """The kind of an autograd node: "Mul" of `MulBackward0`."""
    name = node.name().rsplit("::", 1)[-1]
    return re.sub(r"Backward(ForCpu)?\d*$|Backwards$", "", name)


def operands(node: Any) -> list[int]:
    """The positions of the operands through which a derivative goes."""
    return [k for k, (other, _) in enumerate(node.next_functions) if other is not None]


def along(edge: tuple[Any, int], kinds: frozenset[str] = VIEWS, scalars: bool = True) -> tuple[Any, int]:
    """The edge back to what made a tensor, through nodes of these kinds and multiples by what carries no derivative."""
    while edge[0] is not None:
        node, (only, *others) = edge[0], operands(edge[0]) or [None]
        name = kind(node)
        multiple = scalars and (name in ("Mul", "Neg") or (name == "Div" and only == 0))
        if only is None or others or not (name in kinds or multiple):
            return edge
        edge = node.next_functions[only]
    return edge


class Held:
    """Every gate of the graph that made `outputs` held as the forward pass set it; `notes` says what the oracle cannot know."""

    def __init__(self, outputs: list[Tensor]) -> None:
        self.nodes: list[Any] = []  # alive, so that a node is one Python object
        self.stopped: dict[Any, set[int]] = {}
        self.softmaxes: set[Any] = set()
        self.notes: set[str] = set()
        waiting, seen = [t.grad_fn for t in outputs if t.grad_fn is not None], set()
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                self.nodes.append(node)
                waiting += [other for other, _ in node.next_functions if other is not None]
        for node in self.nodes:
            self.visit(node, kind(node))
        used = {along(node.next_functions[k], VIEWS | MASKS)[0] for node, ks in self.stopped.items() for k in ks}
        if left := len([n for n in self.nodes if self.is_softmax(n) and n not in used | self.softmaxes]):
            self.notes.add(f"{left} softmaxes keep their derivative")
        for node, ks in self.stopped.items():
            node.register_hook(lambda inputs, _, ks=ks: tuple(
                torch.zeros_like(g) if k in ks and g is not None else g for k, g in enumerate(inputs)))  # fmt: skip

    def stop(self, node: Any, k: int) -> None:
        self.stopped.setdefault(node, set()).add(k)

    def visit(self, node: Any, name: str) -> None:
        """Holds what is a gate in one node."""
        if name in ROWS:
            gain = ROWS[name](node)
            node.register_hook(lambda inputs, outputs: (outputs[0] * gain, *inputs[1:]))
        elif name == "Glu":
            gate = node._saved_self.chunk(2, node._saved_dim)[1].sigmoid()
            node.register_hook(
                lambda inputs, outputs: (torch.cat([outputs[0] * gate, torch.zeros_like(gate)], signed(node._saved_dim)),)
            )
        elif name in NORMS:
            hold = NORMS[name](node)
            if hold is not None:
                node.register_hook(lambda inputs, outputs: (hold(outputs[0]), *inputs[1:]))
        elif name in ("Mul", "Div") and len(operands(node)) == 2:
            self.product(node, name)
        elif name in MATMULS and len(both := operands(node)) > 1:
            for k, other in ((both[-2], both[-1]), (both[-1], both[-2])):
                if self.weights(node.next_functions[k]) and not self.weights(node.next_functions[other]):
                    self.stop(node, k)
        elif name == "CopySlices" or hasattr(node, "saved_tensors"):
            self.notes.add("a write in place into a view" if name == "CopySlices" else f"an autograd.Function, {name}")

    def product(self, node: Any, name: str) -> None:
        """A product or a quotient: by a statistic, or with a gate."""
        ends = node.next_functions
        for k in (1,) if name == "Div" else (0, 1):
            if self.is_statistic(ends[k], ends[1 - k], inverse=name == "Mul"):
                self.stop(node, k)
                centred, _ = along(ends[1 - k])
                if (taken := mean_taken_off(centred)) is not None:
                    self.stop(centred, taken)
                return
        if name == "Div":
            return
        if gates := [k for k in (0, 1) if is_written_gate(ends[k], ends[1 - k])]:
            return self.stop(node, gates[0])
        for makers in (SHARES, ACTIVATIONS):
            found = [
                k for k in (0, 1) if kind(along(ends[k], SHIFTED)[0]) in makers or (makers is ACTIVATIONS and is_gated(ends[k]))
            ]
            weights = [k for k in (0, 1) if makers is SHARES and k not in found and self.weights(ends[k])]
            if found + weights:
                if len(found + weights) == 1:
                    self.stop(node, (found + weights)[0])
                return

    def is_softmax(self, node: Any) -> bool:
        """Whether the node is a softmax, or the division at the end of one that is written out."""
        if kind(node) in SOFTMAXES:
            return True
        if kind(node) != "Div" or len(operands(node)) != 2:
            return False
        over, under = along(node.next_functions[0]), along(node.next_functions[1], VIEWS | {"ClampMin", "Add"})
        return kind(over[0]) == "Exp" and kind(under[0]) == "Sum" and along(under[0].next_functions[0]) == over

    def weights(self, edge: tuple[Any, int]) -> bool:
        """Whether a tensor has the weights of attention: a softmax, behind masks, constants that mix its heads, or a second
        normalisation."""
        passing = VIEWS | MASKS | MATMULS | {"Convolution", "Add", "Sub"}
        while True:
            node, _ = along(edge, passing)
            if node is None:
                return False
            if self.is_softmax(node):
                self.softmaxes.add(node)
                return True
            if kind(node) != "Div" or kind(along(node.next_functions[1], VIEWS | {"ClampMin", "Add"})[0]) != "Sum":
                return False
            edge = node.next_functions[0]

    def is_statistic(self, edge: tuple[Any, int], other: tuple[Any, int], inverse: bool) -> bool:
        """Whether a factor is the deviation, or the root mean square, of the `other` factor; `inverse` where it multiplies."""
        passing = VIEWS | {"Add", "Clamp", "ClampMin", "Maximum"}
        node, inverted = along(edge, passing)[0], False
        for _ in range(3):
            name = kind(node) if node is not None else ""
            if name not in ROOTS or (name == "Pow" and abs(float(node._saved_exponent)) not in (0.5, 1.0)):
                break
            inverted |= name in ("Rsqrt", "Reciprocal") or (name == "Pow" and float(node._saved_exponent) < 0)
            node = along(node.next_functions[0], passing)[0]
        if node is None or inverted != inverse:
            return False
        if kind(node) not in LENGTHS:
            if kind(node) not in ("Mean", "Sum"):
                return False
            node = along(node.next_functions[0])[0]
            squares = kind(node) == "Pow" and float(node._saved_exponent) == 2
            squares |= kind(node) == "Mul" and len(set(map(origin, node.next_functions))) == 1
            if not squares and kind(node) != "Abs":
                return False
        return origin(node.next_functions[0]) == origin(other)


def mean_taken_off(node: Any) -> int | None:
    """The position at which a difference takes its own operand's mean off."""
    if node is None or kind(node) != "Sub" or len(operands(node)) != 2:
        return None
    mean = along(node.next_functions[1])[0]
    return (
        1
        if kind(mean) in ("Mean", "Sum", "VarMean") and origin(mean.next_functions[0]) == origin(node.next_functions[0])
        else None
    )


def origin(edge: tuple[Any, int]) -> tuple[Any, int]:
    """What a tensor is a multiple of, and what it was before its mean was taken off."""
    edge = along(edge)
    return origin(edge[0].next_functions[0]) if mean_taken_off(edge[0]) is not None else edge


def is_written_gate(edge: tuple[Any, int], other: tuple[Any, int]) -> bool:
    """Whether a factor is `a(z)`, pointwise and with a squash in it, of the `z` that the other factor is a multiple of."""
    z, waiting, seen, squashed = along(other), [along(edge)], set(), False
    while waiting:
        found = waiting.pop()
        if found == z or found in seen:
            continue
        seen.add(found)
        node = found[0]
        if node is None or kind(node) not in POINTWISE or not operands(node) or len(seen) > 40:
            return False
        squashed |= kind(node) in SQUASHES
        waiting += [along(node.next_functions[k]) for k in operands(node)]
    return squashed and bool(seen)


def is_gated(edge: tuple[Any, int]) -> bool:
    """Whether a tensor was made by a gate that is written out, `z a(z)`."""
    node = along(edge)[0]
    if node is None or kind(node) != "Mul" or len(operands(node)) != 2:
        return False
    return any(is_written_gate(node.next_functions[k], node.next_functions[1 - k]) for k in (0, 1))


def signed(dim: int) -> int:
    """A position as PyTorch saves it, where -1 is 2**64 - 1."""
    return dim - 2**64 if dim >= 2**63 else dim


def times(gain: Tensor, gamma: Tensor | None, channels: int | None = None) -> Callable[[Tensor], Tensor]:
    if gamma is not None:
        gain = gain * (gamma if channels is None else gamma.view(-1, *[1] * (channels - 2)))
    return lambda v: v * gain


def layer_norm(node: Any) -> Callable[[Tensor], Tensor]:
    return times(node._saved_result2, node._saved_weight)


def group_norm(node: Any) -> Callable[[Tensor], Tensor]:
    z = node._saved_input
    rstd = node._saved_result2.repeat_interleave(z.shape[1] // node._saved_group, 1).view(*z.shape[:2], *[1] * (z.dim() - 2))
    return times(rstd, node._saved_weight, z.dim())


def batch_norm(node: Any) -> Callable[[Tensor], Tensor] | None:
    if not node._saved_training:
        return None
    z = node._saved_input
    return times(node._saved_result2.view(-1, *[1] * (z.dim() - 2)), node._saved_weight, z.dim())


NORMS = {"NativeLayerNorm": layer_norm, "NativeGroupNorm": group_norm, "NativeBatchNorm": batch_norm}
