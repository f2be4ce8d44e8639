"""Which arguments beside the inputs go with the samples: measured, where a call is cut along the batch.

A mask [B, L] is cut with its samples; prototypes [K, D] are the same for every sample, also where K happens to be B. Their shapes
do not say which. So the captured graph is run on fake tensors, which have shapes and no numbers, with fewer samples: once with
the argument cut and once with it whole. The one that runs, and returns the shapes of the full call but for the batch, is right:
the mask, whole, does not run, and the prototypes, cut, make fewer classes.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from ..capture.admission import checked
from ..capture.arguments import ByName
from ..capture.clones.clone import EvalClone
from ..containers import primary, rebuilt, tensors_of
from ..measured.by_index import taken_apart
from ..measured.sample_axis import sample_axes
from ..measured.shapes import on_shapes_alone
from .requests import Call, Key

MOST = 6  # arguments to tell apart, by 64 ways to cut some of them


def measured(module: fx.GraphModule, call: Call, batch_size: int) -> Call:
    """Returns `call` with those of its arguments marked that go with the samples, before it is cut into pieces of `batch_size`.

    Raises:
        ValueError: both or neither is right of an argument; the message says what was tried. Axis 0 is not that of samples.
    """
    if reason := undivided(module, call):
        raise ValueError(
            f"batch_size={batch_size} cuts the inputs along axis 0, and {reason}: leave out batch_size; of several graphs, call "
            "for some at a time"
        )
    parameters = call.parameters(module.forward)
    keys = [key for key in call.as_long_as_the_batch() if is_read(module, parameters.get(key, ""))]
    if not keys:
        return call
    size = batch_size if batch_size > 1 else 2 if call.batch != 2 else 3  # of one sample, all would broadcast
    ways = [frozenset(way) for n in range(len(keys), -1, -1) for way in itertools.combinations(keys, n) if len(keys) <= MOST]
    with on_shapes_alone():
        full = run(module, call)
        reasons = {way: why_not(module, call, way, size, full) for way in ways}
        right = [way for way, reason in reasons.items() if not reason]
        if len(right) > 1:  # by chance, where `size` is also that of another axis
            right = [way for way in right if not why_not(module, call, way, 7 * size, full)] or right
    if len(right) == 1:
        return replace(call, samplewise=right[0])
    unclear = [key for key in keys if len({key in way for way in right}) != 1]
    if not ways:
        tried = f"they are more than the {MOST} that can be told apart"
    elif right:
        tried = f"on the shapes of {size} samples, both are right"
    else:
        tried = f"on the shapes of {size} samples, cut {reasons[ways[0]]}; whole {reasons[ways[-1]]}"
    raise ValueError(
        f"batch_size={batch_size} cuts the batch of {call.batch}, and {described(call, unclear)} may or may not go with the "
        f"samples, axis 0 being as long: {tried}. Pass it among the inputs if it goes with the samples; else leave out "
        "batch_size, or call once for each piece yourself and concatenate the maps"
    )


def undivided(module: fx.GraphModule, call: Call) -> str:
    """Says why axis 0 of the inputs is not that of samples, as that of a graph's nodes is not; "" where it may be."""
    if call.is_uneven:
        return f"the inputs have different numbers of places on it, {call.sizes}"
    if not call.has_integers:
        return ""
    clone = fx.GraphModule(EvalClone()(module), module.graph)  # which has no hooks to run
    arguments = call.apply(inspect.signature(module.forward).bind, call.explained).arguments
    return taken_apart(clone, arguments, sample_axes(clone, arguments)[0])


def described(call: Call, keys: list[Key]) -> str:
    """Returns the arguments by name or position, with their shapes: `prototypes [4, 8]`."""
    names = [key if isinstance(key, str) else f"argument {key}" for key in keys]
    shapes = [" and ".join(str(list(t.shape)) for t in tensors_of(call.argument(key))) for key in keys]
    return ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes))


def is_read(module: fx.GraphModule, parameter: str) -> bool:
    """Whether the graph computes anything from an argument. One that it only takes and checks may be cut or not."""

    def reads(node: fx.Node) -> bool:
        return any(user.target is not checked or reads(user) for user in node.users)

    placeholders = module.graph.find_nodes(op="placeholder")
    own = [node for node in placeholders if node.target == parameter]
    among = [node for node in placeholders if str(node.target).startswith("**") and not own]
    taken = [user for node in (*among, *(user for node in among for user in node.users)) for user in node.users]
    own += [node for node in taken if node.target is operator.getitem and node.args[1] == parameter]
    return any(map(reads, own))


class WithoutHooks(ByName):
    """Runs a graph's modules without their hooks, which expect numbers."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.fetch_attr(target).forward(*args, **kwargs)


@dataclass
class Shapes:
    """Of the tensors that the graph returns, which of them is explained where that is known, or else the error."""

    shapes: list[torch.Size]
    explained: int | None = None
    error: str = ""


def run(module: fx.GraphModule, call: Call) -> Shapes:
    """Returns what the graph returns for the shapes of a call. Within `on_shapes_alone`."""
    whole = replace(call, values=rebuilt(call.values, fake), kwargs=rebuilt(call.kwargs, fake))
    try:
        arguments = whole.apply(inspect.signature(module.forward).bind, whole.explained).arguments
        output = WithoutHooks(module).run_by_name(arguments)
    except Exception as error:  # whatever a model's own code raises for shapes that it does not take, AssertionError say
        return Shapes([], None, f"it does not run, {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
    tensors, explained = tensors_of(output), None
    if not callable(call.target):
        with contextlib.suppress(TypeError):  # several outputs: the method itself will say so
            explained = next(i for i, t in enumerate(tensors) if t is primary(output))
    return Shapes([t.shape for t in tensors], explained)


def has_one_each(module: fx.GraphModule, call: Call, output: Any) -> bool:
    """Whether the model returns one number for each sample, [B]: of other batches others as many."""
    if not isinstance(output, Tensor) or output.shape != (call.batch,):
        return False
    size = call.batch + 1
    with on_shapes_alone():
        got = run(module, call.mapped(lambda t: fake(t, size)))
    return got.shapes == [torch.Size([size])]


def why_not(module: fx.GraphModule, call: Call, way: frozenset[Key], size: int, full: Shapes) -> str:
    """Returns why it is wrong to cut the arguments `way`, and no others, along with the inputs, to `size` samples: the graph does
    not run, or returns other shapes than the `full` call's but for the batch. An empty string where it is right."""
    piece = replace(call, samplewise=way, target=None, bounds=()).mapped(lambda t: fake(t, size))
    got = run(module, replace(piece, target=call.target))
    if full.error or got.error:
        return full.error or got.error
    for i, (before, after) in enumerate(zip(full.shapes, got.shapes)):
        changed = [axis for axis, (n, m) in enumerate(zip(before, after)) if n != m]
        of_the_batch = all((before[axis], after[axis]) == (call.batch, size) for axis in changed)
        on_axis_0 = i != full.explained or before[:1] != (call.batch,) or changed == [0]
        if len(before) != len(after) or len(changed) > 1 or not of_the_batch or not on_axis_0:
            return f"it returns {list(after)} where the whole batch returns {list(before)}"
    return "" if len(full.shapes) == len(got.shapes) else f"it returns {len(got.shapes)} tensors instead of {len(full.shapes)}"


def fake(leaf: Any, size: int | None = None) -> Any:
    """Returns a fake tensor like `leaf`, with `size` numbers on axis 0 where that is not None; what is no tensor, as it is."""
    if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
        return leaf
    shape = leaf.shape if size is None else (size, *leaf.shape[1:])
    return torch.empty_strided(shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
