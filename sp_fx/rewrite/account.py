"""The account of a rewrite: a line of the report for each gating call, and the edits that make these lines true.

A decision writes a line here, and passes on its edit, which is applied before the next node is looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import fx, nn

from ..analysis.attention.uses import Use
from ..analysis.calls import name_of
from ..analysis.facts import Facts
from ..gates.adjoints.row import FROZEN, SMOOTH, Soft, Temperature
from ..gates.rules import Rules
from .edits.rewriting import Edit, Rewriting, Softness
from .report import Site, Status


class Account:
    """The lines of the report so far, and the graph as the edits so far have left it.

    Attributes:
        sites: the lines of the report.
        nodes: the call of each line.
        softmaxes: what each softmax is used for.
        weighed: the products of values with weights that are constants.
        rewriting: the graph, and what the edits so far have put in place of what.
    """

    def __init__(self, facts: Facts, rules: Rules, softmaxes: Mapping[fx.Node, Use | str]) -> None:
        self.facts, self.rules, self.softmaxes = facts, rules, softmaxes
        self.sites: list[Site] = []
        self.nodes: list[fx.Node] = []
        self.rewriting = Rewriting(facts)
        self.weighed: set[fx.Node] = set()
        self._calls: Counter[str] = Counter()

    def apply(self, edit: Edit) -> None:
        """Carry out an edit of the graph."""
        edit.apply(self.rewriting)

    def note(self, node: fx.Node, status: Status, reason: str, opaque: bool = False) -> None:
        """Write a line on a call that stays as it is."""
        self.sites.append(Site(self._place(node), self.facts.op(node), "", status, None, reason, opaque=opaque))
        self.nodes.append(node)

    def gate(self, node: fx.Node, kind: str, source: object = None) -> Temperature | None:
        """Write a line on the gate at `node`; returns the temperature that the rules give it, None for its plain derivative.
        `source` is its pre-activation in the graph as it is now, where that may be a batch norm's output."""
        place, normed = self._place(node), self.rewriting.norm_before(source) is not None
        tau = self.rules.temperature(kind, place, normed)
        status: Status = "kept" if tau is None else "rewritten"
        reason = "plain derivative, by the rules" if tau is None else ""
        scale, margin = self.rules.scale_of(kind, place, tau, normed), self.rules.margin(kind, place, normed)
        self.sites.append(Site(place, self.facts.op(node), kind, status, tau, reason, scale, margin))
        self.nodes.append(node)
        return tau

    def stride(self, node: fx.Node) -> Literal["frozen", "smooth"]:
        """Write a line on a convolution that steps over places, unless the rules want no smooth adjoint anywhere; returns the
        adjoint."""
        place = self._place(node)
        if self.rules.temperature("stride", place) != SMOOTH:
            if self.rules.stride == SMOOTH:  # an override names the place, which is to be in the report
                self.sites.append(Site(place, self.facts.op(node), "stride", "kept", reason="exact adjoint, by the rules"))
                self.nodes.append(node)
            else:
                self._calls[place] -= 1
            return FROZEN
        self.sites.append(Site(place, self.facts.op(node), "stride", "rewritten", SMOOTH))
        self.nodes.append(node)
        return SMOOTH

    def amend(self, **changes: Any) -> None:
        """Change the last line."""
        self.sites[-1] = replace(self.sites[-1], **changes)

    @property
    def soft(self) -> Softness:
        """The temperature of the last line, as an edit writes it into the graph: a measured scale is multiplied in."""
        site = self.sites[-1]
        assert site.temperature is not None
        if isinstance(site.temperature, str):
            return site.temperature
        if isinstance(site.scale, float):
            return Soft(site.temperature * site.scale, site.margin)
        return Soft(site.temperature, site.margin, None if site.scale == "missing" else site.scale)  # type: ignore[arg-type]

    def _place(self, node: fx.Node) -> str:
        """Names the call for the report, and in the node's `meta["place"]`: the path of a module for its own call; for a function
        called in a module, the path and the function's name. A second call there is `path#2`."""
        # A trace notes no module at an attribute, as `.values` of a maximum: it is where that is.
        at = node.args[0] if node.target is getattr and isinstance(node.args[0], fx.Node) else node
        path, module = next(reversed(at.meta.get("nn_module_stack", {"": ("", None)}).values()))
        if node.op == "call_module":
            place = str(node.target)
        elif module is not None and module.__module__.startswith("torch.nn.") and not issubclass(module, nn.Sequential):
            place = path or name_of(node)  # of a model that is a module of torch.nn itself
        else:
            place = f"{path}.{name_of(node)}".lstrip(".")
        self._calls[place] += 1
        node.meta["place"] = place if self._calls[place] == 1 else f"{place}#{self._calls[place]}"
        return node.meta["place"]
