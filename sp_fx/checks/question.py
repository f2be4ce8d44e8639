"""What `check` is asked: an explainer, arguments, and which direction of the outputs, with respect to what, the maps are of."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..capture.arguments import ByName, Given
from ..capture.tracing.draws import DRAWS
from ..containers import cloned, rebuilt, tensors_of
from ..explainer import Explainer
from ..gates.adjoints.row import FROZEN
from ..gates.dual_path import dual_path
from ..gates.modules.multihead import multihead_attention
from ..gates.table import TABLE
from ..measured.runs import Coarsest, distance, one_seed, perturbed
from ..methods.subgraphs import needed_after
from ..targets import Target, seed
from ..texts.tokens import looked_up

# What a check that is exact but for rounding may be off by, by the coarsest dtype that the graph computes in.
EXACT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.2}


@dataclass(frozen=True)
class Question:
    """The explainer, or what comes after the activation `wrt` of it, with its positional and keyword arguments and the target."""

    explainer: Explainer
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Target = None
    wrt: str = ""

    @property
    def draws(self) -> bool:
        """Whether the forward draws random numbers."""
        return draws(self.explainer)

    @property
    def explained(self) -> list[Tensor]:
        return [x for x in tensors_of(self.args) if x.is_floating_point()]

    @property
    def arguments(self) -> Mapping[str, Any]:
        """All arguments, by name."""
        return inspect.signature(self.explainer.forward).bind(*self.args, **self.kwargs).arguments

    def score(self, output: Any) -> Tensor:
        """What is explained, as one number: the outputs along the target, or along a direction of all of them, which is the same
        at every call."""
        if callable(self.target):
            return self.target(output).sum()
        if self.target is not None:
            y, u = seed(output, self.target)
            return (y * u).sum()
        drawn = torch.Generator().manual_seed(0)
        parts = [finite(y) for y in map(as_real, tensors_of(output)) if y.is_floating_point()]
        return sum((y * torch.randn(y.shape, generator=drawn).to(y)).sum() for y in parts)  # type: ignore[return-value]

    def maps(self) -> list[Tensor]:
        """The pullback of the score at each input that is explained; what the model draws is the same at every call."""
        args = cloned(self.args)
        with one_seed(self.draws):
            found = self.explainer.pullback(
                args if len(args) != 1 else args[0], self.score, forward_kwargs=cloned(dict(self.kwargs))
            )
        return tensors_of(found)

    def in_double(self) -> Question:
        """In float64, on a copy of the weights; as it is where the graph does not run so, having dtypes of its own."""
        own = self.explainer.copied_apart().double()
        args, kwargs = cloned(self.args, torch.float64), cloned(dict(self.kwargs), torch.float64)
        double = replace(self, explainer=own, args=args, kwargs=kwargs)
        try:
            with torch.no_grad():
                ByName(own).run_by_name(cloned(dict(double.arguments)))  # itself: a call may capture another graph that runs so
                own(*cloned(double.args), **cloned(dict(double.kwargs)))
        except RuntimeError:
            return replace(self, explainer=self.explainer.copied_apart())
        return double

    def nudged(self) -> Question:
        """At inputs where no two numbers are equal, nor 0: at a tie, as in the black border of a picture, a hard gate is a matter
        of taste."""
        return replace(self, args=perturbed(Given(self.args, {})).args)

    def rounded(self) -> Question:
        """At inputs that are moved by a few roundings."""
        drawn = torch.Generator().manual_seed(2)

        def moved(t: Any) -> Any:
            if not isinstance(t, Tensor) or not t.is_floating_point():
                return t
            return t * (1 + 4 * torch.finfo(t.dtype).eps * torch.randn(t.shape, generator=drawn, dtype=torch.float64).to(t))

        return replace(self, args=rebuilt(self.args, moved))

    def at_temperature(self, tau: Any) -> Question:
        """With every gate at `tau`; attention uses the forward's weights, not tempered ones."""
        own = copy.copy(self.explainer)  # which shares its tensors
        for node in list(own.graph.nodes):
            if node.target not in (dual_path, multihead_attention):
                continue
            if node.args[0] == "mix":
                node.args = (*node.args[:2], None, *node.args[3:])
            elif node.args[0] == "surrogate" and node.kwargs["tau"] != FROZEN:
                node.replace_all_uses_with(node.args[1])
                own.graph.erase_node(node)
                continue
            if node.kwargs.get("scale") == "batch_norm":
                node.args = node.args[: 1 + TABLE[str(node.args[0])].tensors]
            node.kwargs = {**{k: v for k, v in node.kwargs.items() if k != "scale"}, "tau": tau}
        own.graph.eliminate_dead_code()
        own.edited(own.report(), compare=False)
        return replace(self, explainer=own)

    def at_hard_limit(self) -> Question:
        """With every gate at 1e-9 of the deviation of its own pre-activation: those of a network that was not trained are
        small."""
        own = self.at_temperature(1e-9)  # which has no gate whose result is dropped
        run = Spreads(own.explainer, own.explainer.graph)
        with torch.no_grad(), one_seed(self.draws):
            run.run_by_name(cloned(dict(self.arguments)))
        gates = own.explainer.graph.find_nodes(op="call_function", target=dual_path)
        for node, (name, spread) in zip((n for n in gates if n.args[0] != "surrogate"), run.found, strict=True):
            assert node.args[0] == name
            node.kwargs = {**node.kwargs, "tau": 1e-9 * spread}
        own.explainer.edited(own.explainer.report(), compare=False)
        return own

    def bar(self, bars: Mapping[torch.dtype, float] | None = None) -> float:
        """What a check may be off by that is exact but for rounding, of the `bars` by dtype."""
        run = Coarsest(self.explainer, self.explainer.graph)
        with torch.no_grad():
            run.run_by_name(cloned(dict(self.arguments)))
        return (bars or EXACT)[max(run.of_outputs or [torch.float32], key=list(EXACT).index)]


class Spreads(ByName):
    """Runs a graph and notes the deviation of the first operand of each gate, 1 where it has none, in the graph's order."""

    def __init__(self, module: Explainer, graph: fx.Graph) -> None:
        super().__init__(module, graph)
        self.found: list[tuple[str, float]] = []

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target is dual_path and args[0] != "surrogate":
            spread = float(args[1].double().std(correction=0)) if isinstance(args[1], Tensor) and args[1].numel() else 1.0
            self.found.append((args[0], spread if 0 < spread < math.inf else 1.0))
        return super().call_function(target, args, kwargs)


class FirstSample(ByName):
    """Runs a graph on a batch and notes, by node, the size of each tensor that floats and its rows for the first sample,
    `(tensor.numel(), rows)`. How many rows that is, `alone` says: what was noted where this sample ran by itself."""

    def __init__(self, module: Explainer, alone: Mapping[str, tuple[int, Tensor]] | None = None) -> None:
        super().__init__(module, module.graph)
        self.alone = alone
        self.found: dict[str, tuple[int, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            rows = len(value) if self.alone is None else len(self.alone[n.name][1]) if n.name in self.alone else 0
            self.found[n.name] = value.numel(), value[:rows].detach().clone()
        return value


def mixes(whole: Question, first: Question, batch: int, bar: float) -> bool:
    """Whether a value inside the model, for the first sample, depends on the other `batch - 1`, as where samples attend to each
    other. The outputs may hide it: a LayerNorm over one number, after which timm's csatv2 does so, gives its bias whatever comes
    in, but a frozen norm passes the signal back."""
    alone = FirstSample(first.explainer)
    together = FirstSample(whole.explainer, alone.found)
    with torch.no_grad():
        for run, question in ((alone, first), (together, whole)):
            with one_seed(question.draws):
                run.run_by_name(cloned(dict(question.arguments)))
    for name, (size, rows) in alone.found.items():
        full, same = together.found.get(name, (size, rows))
        if full not in (size, batch * size) or (same.shape == rows.shape and distance([same], [rows]) > bar):
            return True
    return False


def draws(explainer: Explainer) -> bool:
    return any(note.startswith(DRAWS) for note in explainer.report().notes)


def as_real(y: Tensor) -> Tensor:
    return torch.view_as_real(y) if y.is_complex() else y


def finite(y: Tensor) -> Tensor:
    """`y` with 0 where it is not finite, as where a model masks its outputs."""
    return torch.where(y.isfinite(), y, 0)


def asked(explainer: Explainer, args: tuple, kwargs: Mapping[str, Any], target: Target, wrt: str | None) -> Question | None:
    """Returns the question about these arguments: with respect to the activation `wrt`, or, where none of the arguments floats,
    to the first that the graph looks up in a table, as embeddings of token ids are; None where there is nothing to explain."""
    if not isinstance(wrt, str | None):
        raise TypeError(f"check asks about one activation at a time: expected wrt to be its name, got {wrt!r}")
    whole = Question(explainer, args, kwargs, target)
    if wrt is None and whole.explained:
        return whole
    name = wrt or looked_up(explainer.graph)
    if not name:
        return None
    stem, tail = explainer.split(name)
    with torch.no_grad():
        activation = stem(*cloned(args), **cloned(dict(kwargs)))
    more, named = needed_after(tail.graph, whole.arguments)
    return Question(tail, (activation, *more), named, target, name)
