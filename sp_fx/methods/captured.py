"""The captured module: a rewritten graph as a module, with its report. The methods run it; it is cut, copied and pickled."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any, Self, TypeVar

from torch import fx, nn

from ..rewrite.report import Report
from .subgraphs import ending_at, restore_places, saved_places, starting_at, within


class CapturedModule(fx.GraphModule):
    """A module equal to the model it was captured from, whose autograd is the soft adjoint.

    Cuts, copies and unpickled ones are of its own class: those of an `Explainer` are Explainers.
    """

    def __init__(self, modules: nn.Module, graph: fx.Graph, report: Report) -> None:
        super().__init__(modules, graph, declared_class(self).__name__)
        self._report = report
        self._splits: dict[str, tuple[Self, Self]] = {}
        self._splitting = threading.Lock()
        self.training = False

    @property
    def origin(self) -> nn.Module | None:
        """The model that it was made from; None of a copy, after unpickling, and where it ends at an inner output."""
        return self.__dict__.get("_origin")

    def report(self) -> Report:
        """Each gating call of the model, its place and temperature, and what was left as it is and why."""
        return self._report

    def split(self, name: str) -> tuple[Self, Self]:
        """The module up to the activation `name`, and the module from there on; made once, and kept."""
        with self._splitting:
            if name not in self._splits:
                graphs = ending_at(self.graph, name, "wrt"), starting_at(self.graph, name)
                stem, tail = (declared_class(self)(self, graph, within(self._report, graph)) for graph in graphs)
                self._splits[name] = stem, tail
            return self._splits[name]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._splits.clear()  # they hold the tensors that are replaced
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Self:
        """Changes nothing: the module was captured in eval mode. Warns where `mode` is True."""
        if mode:
            warnings.warn("an Explainer was captured in eval mode and stays in it: train() changes nothing", stacklevel=2)
        return self

    def __reduce__(self) -> tuple:
        plain = fx.GraphModule(self, self.graph)
        return unpickled, (declared_class(self), plain, self._report, saved_places(self.graph))

    def __deepcopy__(self, memo: dict) -> Self:
        plain = copy.deepcopy(fx.GraphModule(self, self.graph), memo)
        return declared_class(self)(plain, plain.graph, self._report)

    def __copy__(self) -> Self:
        return declared_class(self)(self, copy.deepcopy(self.graph), self._report)


AnyCaptured = TypeVar("AnyCaptured", bound=CapturedModule)


def declared_class(module: AnyCaptured) -> type[AnyCaptured]:
    """The class of `module` as it is written: fx gives every instance a subclass of its own, `GraphModuleImpl`."""
    return next(cls for cls in type(module).__mro__ if not cls.__qualname__.endswith("GraphModuleImpl"))


def unpickled(cls: type[CapturedModule], plain: fx.GraphModule, report: Report, places: list[str | None]) -> CapturedModule:
    """The captured module that was pickled as `plain`, whose nodes get back the places that a pickled graph forgets."""
    restore_places(plain.graph, places)
    return cls(plain, plain.graph, report)
