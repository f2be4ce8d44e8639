"""Softmaxes over groups that whole numbers say, as over the edges that end at one node of a graph:
`e / e_sum[index]` of `e = (s - s_max[index]).exp()`, where `s_max` and `e_sum` are scattered by the same index.

They are known by runs. The calls that lead from the scores to a quotient are run on random scores, with random groups in place
of the index. Which weights change with a score says which places are in its group, and the weights must be the exponentials
divided by their sum over it. What such weights multiply is attention where it is then added up over the same groups.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..facts import Facts
from ..ops import CARRIES, COMPARISONS, EXPONENTIALS, FACTORS, POWERS, QUOTIENT, SIZES
from ..signals import called
from ..written.graph import is_new_axis, made
from ..written.softmax import Softmax
from .probe import Shapes, Verdict
from .weights import Weights, inputs_of

LIMIT = 16  # calls from the scores to the weights
SIZE, GROUPS = 7, 3  # places along an axis that is not known, and groups that they are put into
PROBED = 16  # scores that are changed one by one
SEEDS = 4  # of random groups
TOLERANCE = 1e-4


def find(facts: Facts, shapes: Shapes | None) -> None:
    """Adds the softmaxes over groups of a graph to its patterns."""
    for node in facts.graph.nodes:
        if may_close(node, facts) and (softmax := grouped_softmax(node, facts, shapes or {})) is not None:
            facts.patterns[node] = softmax
            own = own_calls(softmax.inside, node, facts)
            for n in own - {node}:
                facts.patterns.pop(n, None)  # a sum of positive numbers is a norm, too
                facts.parts[n] = node


def own_calls(inside: tuple[fx.Node, ...], node: fx.Node, facts: Facts) -> set[fx.Node]:
    """Returns those of the calls `inside` a softmax, which `node` closes, whose values nothing but the softmax reads."""
    own = {node}
    for n in reversed(inside):
        readers = [user for user in n.users if user in facts.varying and n in inputs_of(user, facts)]  # not of its shape alone
        if all(user in own for user in readers):
            own.add(n)
    return own


def may_be_in(facts: Facts) -> bool:
    """Whether a graph has calls that may be such a softmax."""
    return any(
        may_close(node, facts) and any(has_groups(i, facts) for _, i in regions(node, facts)) for node in facts.graph.nodes
    )


def may_close(node: fx.Node, facts: Facts) -> bool:
    closes = facts.op(node) in QUOTIENT | FACTORS | EXPONENTIALS and node.op in ("call_function", "call_method")
    return closes and node in facts.signals and node not in facts.patterns and node not in facts.parts


def grouped_softmax(node: fx.Node, facts: Facts, shapes: Shapes) -> Softmax | None:
    """Returns the widest softmax over groups whose last call is `node`, if there is one."""
    found = None
    for scores, inside in regions(node, facts):
        if not has_groups(inside, facts):
            continue
        answers = (first_of(sign_of(at, scores, inside) for at in of_rank) for of_rank in stand_ins(facts, scores, shapes))
        signs = {sign for sign in answers if sign is not None}
        if len(signs) == 1 and (sign := signs.pop()) != 0:
            found = Softmax(scores, (), tuple(inside), sign=sign, grouped=True)  # type: ignore[arg-type]
    return found


def regions(node: fx.Node, facts: Facts) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Pairs of a node that alone determines `node`, beside whole numbers and constants, and the calls between; nearest first."""
    position = facts.aliasing.position
    inside: dict[fx.Node, None] = {node: None}
    while len(inside) <= LIMIT:
        edge = {n for at in inside for n in inputs_of(at, facts) if n not in inside}
        if not edge:
            return
        latest = max(edge, key=position.__getitem__)
        if len(edge) == 1:
            yield latest, sorted(inside, key=position.__getitem__)
        if not (latest.op in ("call_function", "call_method") or facts.is_identity(latest)):
            return
        inside[latest] = None


def has_groups(inside: list[fx.Node], facts: Facts) -> bool:
    """Whether calls have an exponential among them, and read whole numbers."""
    names = {facts.op(n) for n in inside}
    if names.isdisjoint(EXPONENTIALS | POWERS):
        return False
    return any(m in facts.whole and not is_mask(m, facts) for n in inside for m in n.all_input_nodes)


def is_mask(node: fx.Node, facts: Facts) -> bool:
    value = node.meta.get("val")
    return facts.op(node) in COMPARISONS or (isinstance(value, Tensor) and value.dtype == torch.bool)


def stand_ins(facts: Facts, scores: fx.Node, shapes: Shapes) -> Iterator[list[StandIns]]:
    """What stands for scores and indices in a run, for each rank: in three groups, or in fewer, which are asked where three do
    not run, since an example may have one or two nodes."""
    for z in drawn(scores, shapes):
        yield [StandIns(facts, shapes, z, groups) for groups in range(GROUPS, 0, -1)]


def first_of(answers: Iterable[Any]) -> Any:
    """Returns the first answer that is not None."""
    return next((answer for answer in answers if answer is not None), None)


def drawn(node: fx.Node, shapes: Shapes) -> Iterator[Tensor]:
    """Random numbers like a node: of its shape where that is known, else of several ranks."""
    known = known_shape(node, shapes)
    dtype, device = known[1:] if known is not None else (torch.get_default_dtype(), torch.device("cpu"))
    for shape in [known[0]] if known is not None else [(SIZE,) * rank for rank in (1, 2, 3)]:
        generator = torch.Generator().manual_seed(0)
        yield torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)


def known_shape(node: fx.Node, shapes: Shapes) -> tuple[tuple[int, ...], torch.dtype, torch.device] | None:
    """Returns shape, dtype and device of a node, as an export or a run on fake tensors says them; sizes that vary are `SIZE`."""
    value = known_value(node, shapes)
    if not isinstance(value, Tensor):
        return None
    return tuple(n if type(n) is int else SIZE for n in value.shape), value.dtype, value.device


def known_value(node: fx.Node, shapes: Shapes) -> Any:
    """Returns what is known of a node's value: by an export for all sizes, else for those of the example."""
    return node.meta["val"] if "val" in node.meta else shapes.get(node)


def sign_of(at: StandIns, scores: fx.Node, inside: list[fx.Node]) -> int | None:
    """Returns 1 where the calls give the softmax of the scores over some groups, -1 where of their negative, and 0 where neither;
    None where they do not run, or where every score is in a group of its own."""
    z = at.like
    try:
        before = at.run(inside, {scores: z})
        if not isinstance(before, Tensor) or before.shape != z.shape:
            return 0
        groups = list(groups_of(at, scores, inside, before))
    except Exception:  # whatever calls raise for shapes and indices that are not the model's
        return None
    if not any(int(group.sum()) > 1 for _, group in groups):
        return None
    flat, weights = z.double().flatten(), before.double().flatten()
    for sign in (1, -1):
        e = (sign * flat).exp()
        expected = [e[i] / e[group].sum() for i, group in groups]
        if all(math.isclose(float(weights[i]), float(w), rel_tol=TOLERANCE) for (i, _), w in zip(groups, expected)):
            return sign
    return 0


def groups_of(at: StandIns, scores: fx.Node, inside: list[fx.Node], before: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Some places of the scores, each with its group: a mask of the places whose weights change with its score."""
    numel = at.like.numel()
    for i in torch.randperm(numel, generator=torch.Generator().manual_seed(1))[:PROBED].tolist():
        z = at.like.flatten().clone()
        z[i] += 0.5
        group = (at.run(inside, {scores: z.view_as(at.like)}) - before).abs().flatten() > TOLERANCE * before.abs().flatten()
        group[i] = True
        yield i, group


def verdict(node: fx.Node, softmax: Softmax, weights: Weights, facts: Facts, shapes: Shapes | None) -> Verdict:
    """Whether what the weights multiply is added up over the groups: weights that are all at one place of a group, and at another
    one, then are at one place."""
    of_ranks = stand_ins(facts, softmax.scores, shapes or {})
    answers = {first_of(all_meet(at, node, softmax, weights) for at in of_rank) for of_rank in of_ranks} - {None}
    if len(answers) == 1:
        return "attention" if answers.pop() else "elsewhere"
    if shapes is None:
        facts.undecided.add(node)
    return "elsewhere"


def all_meet(at: StandIns, node: fx.Node, softmax: Softmax, weights: Weights) -> bool | None:
    """Whether places of one group meet, by some pairs of each, in several draws of the groups; None where the calls do not run,
    or no group has two places."""
    scores, inside, pairs = softmax.scores, list(softmax.inside), 0
    try:
        for seed in range(SEEDS):
            at = replace(at, seed=seed, indices={})
            before = at.run(inside, {scores: at.like})
            for i, group in groups_of(at, scores, inside, before):
                j = next((j for j in group.nonzero().flatten().tolist() if j != i), None)
                pairs += j is not None
                if j is not None and not meet(at, node, weights, i, j):
                    return False
    except Exception:  # of another rank
        return None
    return True if pairs else None


def meet(at: StandIns, node: fx.Node, weights: Weights, i: int, j: int) -> bool:
    """Whether weights at place i alone and at place j alone make a difference at one place somewhere, after they have met
    values."""
    runs: list[dict[fx.Node, Any]] = []
    for place in (i, j, None):
        one = torch.zeros_like(at.like).flatten()
        if place is not None:
            one[place] = 1
        runs.append({node: one.view_as(at.like)})
    for n in at.facts.graph.nodes:
        if n is node or not (n in weights.passing or n in weights.mixed) or not any(m in runs[0] for m in n.all_input_nodes):
            continue
        for values in runs:
            values[n] = at.called(n, values)
        first, second, none = (values[n] for values in runs)  # what is added makes no difference
        summed = n in weights.mixed and n not in weights.products and isinstance(first, Tensor)
        if summed and bool(((first != none) & (second != none)).any()):
            return True
    return False


@dataclass
class StandIns:
    """What stands for the nodes that a run reads beside those that it computes: for whole numbers groups, drawn at random; for
    numbers sizes; for values 1; constants are what they are. Scores are `like` a tensor, in so many `groups`."""

    facts: Facts
    shapes: Shapes
    like: Tensor
    groups: int
    seed: int = 0
    indices: dict[fx.Node, Tensor] = field(default_factory=dict)

    def run(self, inside: list[fx.Node], known: Mapping[fx.Node, Any]) -> Any:
        """Returns the value of the last of the calls `inside`, from those of the nodes that are `known`."""
        values = dict(known)
        for node in inside:
            values[node] = self.called(node, values)
        return values[inside[-1]]

    def called(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if self.facts.is_identity(node):
            return self.operand(node.all_input_nodes[0], values)
        with torch.no_grad():
            return made(node, fx.map_arg((node.args, node.kwargs), lambda n: self.operand(n, values)))

    def operand(self, n: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if n in values:
            return values[n]
        if n in self.facts.whole or self.is_whole(n):
            return self.index(n, values)
        if n.op == "get_attr":
            return self.facts.view.attribute(n).detach()
        if self.is_size(n):
            return self.called(n, values) if any(m in values for m in n.all_input_nodes) else self.size(n)
        if not self.facts.varies(n) or called(n) in ("shape",):
            return self.called(n, values)
        known = known_shape(n, self.shapes)
        return self.like.new_ones(()) if known is None else self.like.new_ones(known[0])

    def is_whole(self, n: fx.Node) -> bool:
        """Whether a node is known to be a tensor of whole numbers."""
        value = self.facts.view.attribute(n) if n.op == "get_attr" else known_value(n, self.shapes)
        return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)

    def index(self, n: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """Returns groups for an index: the same for all that views and casts make of it."""
        if (facts := self.facts).op(n) in CARRIES or is_new_axis(n) or facts.is_identity(n):
            return self.called(n, values)
        if n not in self.indices:
            known = known_shape(n, self.shapes)
            shape = tuple(self.like.shape[:1]) if known is None else known[0]
            generator = torch.Generator().manual_seed(zlib.crc32(n.name.encode()) + self.seed)
            self.indices[n] = torch.randint(self.groups, shape, generator=generator).to(self.like.device)
        return self.indices[n]

    def is_size(self, n: fx.Node) -> bool:
        value = known_value(n, self.shapes)
        return called(n) in SIZES or isinstance(value, int | torch.SymInt | torch.Size)

    def size(self, n: fx.Node) -> Any:
        """Returns a size of something else: what it is known to be, or `SIZE`."""
        value = known_value(n, self.shapes)
        if isinstance(value, torch.Size):
            return torch.Size(m if type(m) is int else SIZE for m in value)
        if called(n) == "shape" or (called(n) == "size" and len(n.args) + len(n.kwargs) == 1):
            return torch.Size(itertools.repeat(SIZE, 4))
        return value if type(value) is int else SIZE
