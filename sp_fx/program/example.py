"""The call of a model that a program is made for: what of its output is explained, and which of its sizes may be others."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor, fx, nn

from ..analysis.calls import name_of
from ..analysis.ops import CELLS, LOOKUPS
from ..capture.admission import asked_of_inputs
from ..capture.arguments import Given, are_named
from ..capture.kept_functions import PACKING
from ..capture.sizes import Axes, lengths, with_batch, with_lengths
from ..capture.tracing.draws import DRAWS
from ..containers import tensors_of
from ..gates.modules.recurrent import recurrent
from ..measured.runs import distance
from ..measured.sample_axis import shapes_of
from ..measured.sigmoids import Sigmoids
from ..methods.captured import CapturedModule, runs
from ..methods.pullbacks import pullback
from ..methods.requests import Request
from ..targets import primary
from ..texts.tokens import Embedded, embedded_in, real_value
from .program import ProgramError
from .signature import described, positional

MOST_STEPS = 64  # of a recurrent network in a program: a step takes Inductor 5 s on two cores

Choice = Callable[[Any], Tensor]  # from a model's output to what of it is explained


@dataclass(frozen=True)
class Example:
    """A call that a program is made for.

    Attributes:
        module: the captured module that runs such calls.
        call: the call, with copies of the inputs.
        names: of the inputs, where they came as a mapping; else None.
        single: whether they came as one tensor.
        choice: takes what is explained from the output.
        outputs: of the module.
        embedded: the embedding of the tokens, of a method of tokens.
        real: the value that the mask of the tokens has where they are none of the padding.
        ends_in_sigmoid: whether what is explained is what a sigmoid has given.
    """

    module: CapturedModule
    call: Given
    names: list[str] | None
    single: bool
    choice: Choice
    outputs: Any
    embedded: Embedded | None
    real: float
    ends_in_sigmoid: bool

    @classmethod
    def of(cls, module: CapturedModule, inputs: Any, method: str, choice: Choice, embedding: str | None) -> Self:
        """Runs `module` on `inputs`, as they were given.

        Raises:
            TypeError, ValueError: inputs that a program cannot have.
            ProgramError: a forward that a program cannot be.
        """
        names = list(map(str, inputs)) if isinstance(inputs, Mapping) else None
        tensors = [x.detach().clone() for x in positional(inputs if names is None else tuple(inputs.values()))]
        check_inputs(tensors, method)
        named = None if names is None else dict(zip(names, tensors))
        call = Given(tuple(tensors), {})
        if named is not None:  # arguments by keyword, or one argument that is a mapping
            call = Given((), named) if are_named(inspect.signature(module.forward), named) else Given((named,), {})
        module = module.for_call(*call.args, **call.kwargs)
        if lines := asked_of_inputs(module.graph):
            raise ProgramError(
                f"the forward goes by values of its inputs, at {lines[0]}, and a program is one path for all: choose between two "
                "results by torch.where, or give the forward what it asks for as a constant"
            )
        for node in module.graph.nodes:
            if node.op == "call_function" and node.target in PACKING:
                raise ProgramError(
                    f"{node.meta.get('place', node.name)} packs sequences by the values of their lengths, and a program is one "
                    "path for all: let the network run on padded sequences, and take the outputs that are real by a mask"
                )
        check_steps(module, call)
        with Sigmoids() as sigmoids:
            outputs = module(*call.args, **call.kwargs)
        check_repeats(module, call, outputs)
        embedded = embedded_in(module, call.args, call.kwargs, embedding) if method == "tokens" else None
        if embedded is not None and embedded.ids is None:
            raise ProgramError(f"no input has the ids that {embedded.name} is looked up by: name another by embedding=")
        check_scores(y := chosen(outputs, choice), tensors[0].shape[0])
        real = 1.0
        if embedded is not None and embedded.mask is not None:
            request = Request(inputs, lambda out: chosen(out, choice).flatten(1).sum(1) if y.dim() > 1 else chosen(out, choice))
            maps = pullback(module, replace(request, wrt=embedded.name))
            real = real_value(embedded.mask, maps.transpose(0, -2) if embedded.length_first else maps)
        single = names is None and not isinstance(inputs, tuple)
        return cls(module, call, names, single, choice, outputs, embedded, real, sigmoids.gave(y))

    @property
    def tensors(self) -> list[Tensor]:
        """The inputs, in order."""
        return tensors_of(self.call)

    def given(self, call: Given) -> Any:
        """Returns the inputs of another such call as those of this one came: a mapping, or a tuple."""
        tensors = tensors_of(call)
        return tuple(tensors) if self.names is None else dict(zip(self.names, tensors))

    @property
    def y(self) -> Tensor:
        """What is explained of the output."""
        return chosen(self.outputs, self.choice)

    def lengths(self, direction: bool) -> list[tuple[str, Axes, Given]]:
        """Returns the lengths that may be others, with names for them, and with calls of another length each: those that its
        graph is for, and that leave the classes as many; where a `direction` is asked for, what is explained has them too."""
        found: list[tuple[str, Axes, Given]] = []
        for axes, other in lengths(self.call, lambda call: runs(self.module, call)):
            before, after = self.y.shape, chosen(self.module(*other.args, **other.kwargs), self.choice).shape
            sizes = {(tensors_of(self.call)[i].shape[axis], tensors_of(other)[i].shape[axis]) for i, axis in axes}
            changes = [pair for pair in zip(before, after) if pair[0] != pair[1]]
            if len(before) == len(after) and set(changes) <= sizes and (direction or before[1:2] == after[1:2]):
                found.append((f"length{f'_{len(found) + 1}' if found else ''}", axes, other))
        return found

    def most(self, axes: Axes, vocabularies: Collection[int | None]) -> int | None:
        """Returns the largest that a length may be by a table that the model looks up in, such as one of positions: as many as it
        has rows, or a few less; None where the model takes more than that, or there is none. `vocabularies` are the rows of those
        tables that inputs are indices into, which no length has to do with."""
        now = max(tensors_of(self.call)[i].shape[axis] for i, axis in axes)

        def takes(n: int) -> bool:
            return runs(self.module, with_lengths(with_batch(self.call, 1), axes, lambda _: n))

        for rows in sorted({n for n in rows_of_tables(self.module) if now <= n <= MOST_ROWS}.difference(vocabularies)):
            if not takes(rows + 1):
                return next((n for n in range(rows, max(now, rows - OFFSET) - 1, -1) if takes(n)), now)
        return None


MOST_ROWS, OFFSET = 4200, 3  # of tables of positions, up to Longformer's 4098; RoBERTa's first position is 2


def rows_of_tables(module: CapturedModule) -> set[int]:
    """Returns how many rows each table has that the graph of a module looks up in."""
    rows: set[int] = set()
    for node in module.graph.nodes:
        if node.op == "call_module":
            leaf = module.get_submodule(str(node.target))
            rows |= {leaf.num_embeddings} if isinstance(leaf, nn.Embedding) else set()
        elif name_of(node) in LOOKUPS:
            tables = [n for n in node.all_input_nodes if n.op == "get_attr"]
            rows |= {operator.attrgetter(str(n.target))(module).shape[0] for n in tables}
    return rows


def chosen(outputs: Any, choice: Choice) -> Tensor:
    """Returns what `choice` takes from the output of a model.

    Raises:
        TypeError: there are several tensors, and none is called `logits`; or a choice that returns none.
    """
    if choice is primary:
        try:
            return primary(outputs)
        except TypeError as error:
            reason = str(error).split(":")[0]
            raise TypeError(
                f"{reason}: a program explains one of them. Choose it by target=, such as target=lambda out: out[0], or wrap the "
                "model to return it alone, or as `logits`"
            ) from None
    y = choice(outputs)
    if not isinstance(y, Tensor) or not y.is_floating_point() or not y.dim():
        got = f"{y.dtype} {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"a target takes scores from the output: a floating tensor [B] or [B, classes]; it returned {got}")
    return y


def check_scores(y: Tensor, batch: int) -> None:
    """Raises ValueError for what is explained that has not one row a sample."""
    if y.shape[0] != batch:
        raise ValueError(
            f"what is explained has one row for each of the {batch} samples, [{batch}] or [{batch}, classes]; got {list(y.shape)}"
        )


def check_inputs(tensors: list[Tensor], method: str) -> None:
    """Raises TypeError or ValueError for an example without a floating input, or without one batch on axis 0."""
    if method != "tokens" and not any(x.is_floating_point() for x in tensors):
        raise TypeError(
            f"nothing to explain: the inputs are {', '.join(str(x.dtype) for x in tensors)}; the method 'tokens' explains the "
            "tokens whose ids they are"
        )
    batches = {x.shape[0] if x.dim() else None for x in tensors}
    if len(batches) > 1 or not batches - {None, 0}:
        raise ValueError(f"every input of a program has the batch on axis 0, of at least one sample: got {described(tensors)}")


def check_steps(module: CapturedModule, call: Given) -> None:
    """Raises ProgramError for a recurrent network of more than `MOST_STEPS` steps, each of which is a part of the graph."""
    arguments = call.by_name(module.forward)
    networks = [node for node in module.graph.nodes if node.target is recurrent or is_recurrent(node, module)]
    shapes = shapes_of(module, module.graph, arguments) if networks else {}
    for node in networks:
        first = shapes.get(node.args[1 if node.target is recurrent else 0])  # type: ignore[call-overload]
        leaf = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        batch_first = node.kwargs.get("batch_first", getattr(leaf, "batch_first", node.args[-1:] == (True,)))
        if isinstance(first, Tensor) and first.dim() == 3 and (steps := first.shape[1 if batch_first else 0]) > MOST_STEPS:
            raise ProgramError(
                f"{node.meta.get('place', node.name)} runs {steps} steps, and a program, whose graph has each of them, at most "
                f"{MOST_STEPS}: use the explainer itself, which loops over them, or shorter inputs"
            )


def is_recurrent(node: fx.Node, module: CapturedModule) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), nn.RNNBase)
    return node.op == "call_function" and name_of(node) in CELLS


def check_repeats(module: CapturedModule, call: Given, outputs: Any) -> None:
    """Raises ProgramError for a model that draws random numbers and so returns something other than `outputs` when asked again:
    there is nothing that its program could be compared with."""
    drawn = [note for note in module.report().notes if note.startswith(DRAWS)]
    if drawn and distance(tensors_of(module(*call.args, **call.kwargs)), tensors_of(outputs)) > 0:
        raise ProgramError(
            f"the model's outputs are others at each call, and no program could be compared with it: {'; '.join(drawn)}. "
            "Let it draw where it trains alone, as nn.Dropout and F.dropout(x, p, self.training) do"
        )
