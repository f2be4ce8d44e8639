"""What becomes of each call of a graph, decided on facts.

Each decision below looks at one node. Where the node is its business, it writes a line of the report, carries out the edit that
makes it true, and returns True. For example `gate` at `F.relu(h)`: the line "relu, rewritten, temperature 1.0 x scale",
and a `ReplaceCall`. `rewrite.ORDER` says in which order decisions are asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx, nn

from ..analysis.calls import AFFINE_MODULES, is_affine_row, keywords, known, name_of, op_of, recurrent_name
from ..analysis.facts import Facts, gates_among
from ..analysis.ops import (
    BY_INDEX,
    CELLS,
    FACTORS,
    FUSED,
    GATED,
    INDICES,
    LISTED,
    ORDERS,
    PIECEWISE,
    PRODUCT,
    QUOTIENT,
    RECURRENT,
    SMOOTH,
)
from ..analysis.readers import COMPUTED, READERS, Gate, Unread, bounded, is_tensor
from ..analysis.written.gates import Written
from ..analysis.written.norms import Statistic, centred_over
from ..analysis.written.products import Product
from ..capture.kept_functions import applied
from ..gates.adjoints.affine import leaves_checkerboard
from ..gates.adjoints.row import FROZEN, Temperature
from ..gates.rules import KINDS
from ..gates.table import TABLE, rule_of
from .account import Account
from .edits.calls import Compete, OpenLeaf, Recur, ReplaceCall, Surrogate
from .edits.rewriting import Softness
from .edits.written import CloseWritten, Freeze, Regroup
from .report import PART, WRITTEN_OUT

CHOSEN = "chooses by comparing what the model computed, and has no rule"
SMOOTH_FUNCTION = "smooth, no gate"
WEIGHED = f"{PART}attention: its weights are constants here"
BASE = "chooses by value between groups and what was there before, both of which vary, and has no rule"
CHOICE = "its choice is held as the forward made it: each value goes back where it is from"


def affine_leaf(node: fx.Node, facts: Facts, account: Account) -> bool:
    """A module that is affine and has a row of the table: `nn.Conv2d`. Also of constants: a leaf is opened for all of its
    calls."""
    leaf = facts.leaf(node)
    if leaf is None or node in facts.patterns or not is_affine_row(leaf):
        return False
    uneven = isinstance(leaf, nn.Conv1d | nn.Conv2d | nn.Conv3d) and leaves_checkerboard(leaf.weight.shape, leaf.stride)
    signal = any(map(facts.is_signal, node.all_input_nodes))
    account.apply(OpenLeaf(node, leaf, account.stride(node) if uneven and signal else FROZEN))
    return True


def constant(node: fx.Node, facts: Facts, account: Account) -> bool:
    """What does not depend on the inputs has no signal to pass."""
    return node not in facts.varying


def written_gate(node: fx.Node, facts: Facts, account: Account) -> bool:
    """A gate that the model writes out itself, or that a user has registered."""
    gate = facts.patterns.get(node)
    if not isinstance(gate, Written):
        return False
    if gate.smooth:
        account.note(node, "kept", f"{gate.kind}, {SMOOTH_FUNCTION}")
        account.amend(op=f"{name_of(node)}{WRITTEN_OUT}")
        return True
    tau = written_line(node, gate, account)
    if tau is not None:
        account.apply(CloseWritten(node, account.rewriting.unshared.get(node, gate), account.soft))
    return True


def written_line(node: fx.Node, gate: Written, account: Account) -> Temperature | None:
    """Write a line on a gate that is written out; returns its temperature."""
    tau = account.gate(node, rule_of(gate.kind), account.rewriting.instead.get(gate.source, gate.source))
    if not TABLE[gate.kind].registered:
        account.amend(op=f"{name_of(node)}{WRITTEN_OUT}")
    reasons = [account.sites[-1].reason]
    if (gate.times, gate.through) != (1.0, 0.0):
        reasons.append(f"{gate.times:g} times it" + (f", and {gate.through:g} times its argument" if gate.through else ""))
    if gate.weights:
        reasons.append(f"with {', '.join(gate.weights)} as it was at transform: after an update, transform again")
    account.amend(reason="; ".join(filter(None, reasons)))
    return tau


def regrouped(node: fx.Node, facts: Facts, account: Account) -> bool:
    """A product in which the factors of gates stand apart."""
    product = facts.patterns.get(node)
    if not isinstance(product, Product):
        return False
    softened: list[Softness | None] = []
    for at, (gate, _) in zip(reversed(product.products), product.gates):
        if gate.smooth:
            account.note(at, "kept", f"{gate.kind}, {SMOOTH_FUNCTION}")
            softened.append(None)
        else:
            softened.append(None if written_line(at, gate, account) is None else account.soft)
    others = [factor for factor in product.others if facts.is_signal(factor.value)]
    makers: dict[Any, str] = {factor.value: facts.maker(factor.value) for factor in others if not factor.divides}
    makers |= {i: "" if gate.through else gate.kind for i, (gate, _) in enumerate(product.gates)}
    constant = None
    if len(makers) > 1:
        gates = gates_among(makers)
        if len(gates) != 1:
            account.note(node, "kept", "product rule")
        elif account.gate(node, "product") is None:
            account.amend(reason="product rule")
        else:
            (constant,) = gates
    elif others:
        account.note(node, "kept", "quotient rule")
    account.apply(Regroup(node, product, softened, constant))
    return True


def leaf(node: fx.Node, facts: Facts, account: Account) -> bool:
    """A module that the trace did not go into."""
    module = facts.leaf(node)
    if module is None:
        return False
    if isinstance(module, nn.MultiheadAttention):
        tau = account.gate(node, "attention")
        if tau is not None:
            account.apply(OpenLeaf(node, module, tau))
    elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
        recurrent_network(node, facts, account)
    elif not isinstance(module, AFFINE_MODULES):
        account.note(node, "NOT REWRITTEN", "a leaf of the trace that may hold gates", opaque=True)
    elif facts.is_chosen(node):
        account.note(node, "NOT REWRITTEN", CHOSEN)
    return True


def recurrent_network(node: fx.Node, facts: Facts, account: Account) -> None:
    """An LSTM or a GRU, whose gates are products; an Elman network, which has a tanh in place of gates, or a ReLU."""
    leaf = facts.leaf(node)
    name = name_of(node) if leaf is None else recurrent_name(leaf)
    if name in SMOOTH:
        account.note(node, "kept", SMOOTH_FUNCTION)
    elif name not in GATED:
        account.note(node, "NOT REWRITTEN", RECURRENT)
    elif account.gate(node, "product") is None:
        account.amend(reason="product rule")
    else:
        account.apply(Recur(node, leaf))


def written_norm(node: fx.Node, facts: Facts, account: Account) -> bool:
    """A norm that the model writes out itself: its statistics become constants."""
    norm = facts.patterns.get(node)
    if not isinstance(norm, Statistic):
        return False
    if account.gate(node, norm.kind) is not None:
        for call, statistic in norm.constants:
            account.apply(Freeze(call, statistic, node))
    account.amend(op=f"{name_of(node)}{WRITTEN_OUT}")
    return True


def part(node: fx.Node, facts: Facts, account: Account) -> bool:
    """A call inside a gate or norm that is written out."""
    if node not in facts.parts:
        return False
    if op_of(node) in READERS or name_of(node) in LISTED:
        account.note(node, "kept", f"{PART}{facts.patterns[facts.parts[node]].kind} written out here")
    return True


def gate(node: fx.Node, facts: Facts, account: Account) -> bool:
    """A call of a gate, a norm, attention or an affine map that the table has a row for."""
    reader = READERS.get(op_of(node))
    if reader is None:
        return False
    call = gate_of(node, reader, facts)
    if isinstance(call, Unread) and name_of(node) in ORDERS:
        account.note(node, "kept", CHOICE)
    elif isinstance(call, Unread):
        account.note(node, "kept" if call.kept else "NOT REWRITTEN", call.reason)
    elif facts.op(node) in BY_INDEX and (facts.is_chosen(node) or has_signals(call, facts) > 1):
        account.note(node, "NOT REWRITTEN", CHOSEN if facts.is_chosen(node) else BASE)
    elif call is None:
        pass
    elif not any(map(facts.is_signal, call.tensors)):
        if node not in facts.whole and rule_of(call.kind) in KINDS:
            account.note(node, "kept", "no signal passes: it is made of masks or whole numbers")
    elif call.kind == "abs" and node.all_input_nodes[0] in facts.complex:
        account.note(node, "kept", "the modulus of a complex number, no gate")
    elif call.fixed and sum(map(facts.is_signal, call.tensors)) > 1:
        competition(node, call, facts, account)
    elif call.kind == "cosine_similarity":
        if account.gate(node, "normalize") is not None:
            account.apply(Surrogate(node, call))
    elif call.kind == "rms_norm" and (signal := centred_over(facts.view, call.tensors[0], call.args["normalized_shape"])):
        if account.gate(node, "layer_norm") is not None:
            account.apply(ReplaceCall(node, call, account.soft))
            account.apply(Freeze(signal.centring, signal.taken_off, account.rewriting.instead[node]))  # type: ignore[arg-type]
    elif (rule := rule_of(call.kind)) in KINDS:
        tau = account.gate(node, rule, call.tensors[0])
        if tau is None and call.kind == "glu":
            account.amend(reason="product rule")
        elif tau is not None:
            account.apply(ReplaceCall(node, call, account.soft))
    elif not any(map(facts.varies, call.tensors[1:])):
        shape = weight_shape(call, facts) if call.kind == "conv" else None
        uneven = shape is not None and leaves_checkerboard(shape, call.args["stride"])
        account.apply(ReplaceCall(node, call, account.stride(node) if uneven else FROZEN))  # affine
    else:
        account.note(node, "kept", "product rule")  # its weights are computed from the input
    return True


def has_signals(call: Gate | None, facts: Facts) -> int:
    """Returns the number of tensors of a gate that a derivative reaches."""
    return 0 if call is None else sum(map(facts.is_signal, call.tensors))


def weight_shape(conv: Gate, facts: Facts) -> tuple[int, ...] | None:
    """Returns the shape of a convolution's weights, [out, in / groups, *kernel]: of those that are stored, which what computes
    with them (weight standardisation, a parametrization) keeps; None where none are."""
    seen = [conv.tensors[1]]
    for node in seen:
        shape = tuple(facts.view.attribute(node).shape) if node.op == "get_attr" else ()
        if len(shape) == len(conv.args["stride"]) + 2:
            return shape
        seen += [n for n in node.all_input_nodes if n not in seen]
    return None


def competition(node: fx.Node, call: Gate, facts: Facts, account: Account) -> None:
    """The larger, or the smaller, of two signals: a max pooling of the two."""
    if call.kind not in ("maximum", "minimum") or facts.op(node).startswith("f"):  # fmax and fmin pass over NaN
        account.note(node, "NOT REWRITTEN", f"{facts.op(node)} of two things that both vary has no rule")
    elif account.gate(node, "max_pool") is not None:
        account.apply(Compete(node, call.tensors, account.soft, 1 if call.kind == "maximum" else -1))


def gate_of(node: fx.Node, reader: Callable[..., Gate | Unread | None], facts: Facts) -> Gate | Unread | None:
    """Returns the gate that a reader makes of a call, its varying tensor first."""
    try:
        call = reader(*node.args, **keywords(node))
    except TypeError as error:  # a signature that the reader does not know, or arguments computed at run time
        return Unread(f"its arguments are not constants of the graph: {error}")
    if not (isinstance(call, Gate) and call.fixed):
        return call
    if not facts.is_signal(call.tensors[0]):
        call = replace(call, tensors=call.tensors[::-1])
    numbers = [facts.view.fixed_number(t) for t in call.tensors[1:]]
    if None not in numbers:
        return bounded(call, *numbers)  # type: ignore[arg-type]
    tensors = all(is_tensor(t) or facts.varies(t) for t in call.tensors[1:])
    return call if tensors or facts.op(node) in PIECEWISE else COMPUTED  # only a clamp may take numbers that are computed


def no_rule(node: fx.Node, facts: Facts, account: Account) -> bool:
    """What gates, or chooses by value, and has no rule; and smooth functions, which are no gates."""
    name, signals = name_of(node), facts.signal_inputs(node)
    if name in CELLS:
        recurrent_network(node, facts, account)
    elif name in ORDERS and signals:
        account.note(node, "kept", CHOICE)
    elif name in PIECEWISE and signals and (name not in INDICES or any(map(facts.has_weights, node.all_input_nodes))):
        account.note(node, "NOT REWRITTEN", f"{name} chooses by value and has no rule")
    elif name in SMOOTH and signals:
        account.note(node, "kept", SMOOTH_FUNCTION)
    elif facts.is_chosen(node):
        account.note(node, "NOT REWRITTEN", CHOSEN)
    else:
        return False
    return True


def product(node: fx.Node, facts: Facts, account: Account) -> bool:
    """A product or quotient of signals; a product with a gate has a rule of its own."""
    name, signals = name_of(node), facts.signal_inputs(node)
    squares = len(signals) == 1 and sum(a is signals[0] for a in node.args) > 1
    inverts = len(signals) == 1 and name in QUOTIENT and node.args[0] is not signals[0]
    if name not in PRODUCT | QUOTIENT or not (len(signals) > 1 or squares or inverts):
        return False
    factors = [] if node in account.weighed else facts.gating_factors(node)  # weights gate their values already
    if node in account.weighed and name in FACTORS and len(signals) == 2:
        account.note(node, "kept", WEIGHED)
    elif len(factors) != 1 or name not in FACTORS:
        rule = "product rule" if name in PRODUCT else "quotient rule"
        account.note(node, "kept", "; ".join([rule, *constant_elsewhere(node, facts)]))
    elif account.gate(node, "product") is None:
        account.amend(reason="product rule")
    else:
        account.apply(Freeze(node, factors[0]))
    return True


def constant_elsewhere(node: fx.Node, facts: Facts) -> list[str]:
    """Says where an operand of a product is a constant that keeps its derivative here: the deviation that a reversible
    normalisation divides by, and later multiplies by."""
    own = {facts.view.carried(n) for n in facts.signal_inputs(node)}
    for closing, norm in facts.patterns.items():
        if isinstance(norm, Statistic):
            statistics = {facts.view.carried(n) for _, n in norm.constants}
            if own & statistics and "place" in closing.meta:
                return [f"by a statistic that is a constant at {closing.meta['place']}, and keeps its derivative here"]
    return []


def opaque(node: fx.Node, facts: Facts, account: Account) -> bool:
    """A function that the trace did not see into."""
    name = name_of(node)
    if node.op != "call_function" or (name not in FUSED and known(op_of(node))):
        return False
    kept = ": its own backward is kept" if node.target is applied else ""
    account.note(node, "NOT REWRITTEN", f"{name} is opaque to the trace and may hold gates{kept}", opaque=True)
    return True
