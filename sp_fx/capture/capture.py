"""What a capture of a model is: a graph over an eval clone of its modules, and the error where there is none."""

from __future__ import annotations

import functools
import sys
import threading
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx, nn

tracing = threading.RLock()  # held by whatever traces: torch patches itself meanwhile, for all threads


@dataclass(frozen=True)
class Capture:
    """A model as a graph.

    Attributes:
        modules: the modules and tensors that the graph uses: leaves, and marks of those that the capture went through.
        reference: an eval clone of the model that the capture has not run, to compare the graph with.
        graph: the forward.
        tracer: what captured it, "torch.fx" or "torch.export".
        notes: what a reader of the report should know of the capture.
        asks: where the forward asks whether gradients are on; "" where it does not.
        varies: of a capture by torch.export, the axes of each tensor of its example whose sizes do not matter.
        inputs: these tensors with their sizes, as text, * for one that varies.
    """

    modules: nn.Module
    reference: nn.Module
    graph: fx.Graph
    tracer: str
    notes: tuple[str, ...] = ()
    asks: str = ""
    varies: tuple[frozenset[int], ...] = ()
    inputs: str = ""


def blame(error: BaseException) -> str:
    """The innermost line of the model that `error` came through, or that it says it is from."""
    place, step = getattr(error, "line", "no Python line"), error.__traceback__
    while step is not None:
        if is_models(step.tb_frame):
            place = f"{step.tb_frame.f_code.co_filename}:{step.tb_lineno}, in {step.tb_frame.f_code.co_name}"
        step = step.tb_next
    return place


def line_of_caller() -> str:
    """The innermost line of the model that is running."""
    frame = frame_of_caller()
    return "no Python line" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"


def frame_of_caller(until: types.CodeType | None = None) -> types.FrameType | None:
    """The innermost frame of the model that is running, of those that the function with the code `until` has called."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not until:
        if is_models(frame):
            return frame
        frame = frame.f_back
    return None


def is_models(frame: types.FrameType) -> bool:
    """Whether a frame is of a model's code."""
    return is_a_models_file(frame.f_code.co_filename)


TORCH, PACKAGE = Path(torch.__file__).parent, Path(__file__).parents[1]


@functools.cache
def is_a_models_file(file: str) -> bool:
    """Whether a file is outside torch and this package, or one of the package's networks."""
    path = Path(file)
    return path.is_relative_to(PACKAGE / "zoo") or not (path.is_relative_to(TORCH) or path.is_relative_to(PACKAGE))


def said(error: BaseException) -> str:
    """What an error says, on one line: its first paragraph, as far as a sentence or two go, after its class if that says more."""
    if asks_for_values(error):  # which torch.export says in terms of its own symbols
        return "the forward asks for the value of what it computes"
    plain = isinstance(error, CaptureError | fx.proxy.TraceError) or type(error) is RuntimeError
    text = " ".join(str(error).strip().split("\n\n")[0].split())
    return f"{'' if plain else f'{type(error).__name__}: '}{text if len(text) <= 400 else f'{text[:400]}...'}"


def asks_for_values(error: BaseException) -> bool:
    """Whether an error is that a forward asks for the value of what has none in a trace."""
    return isinstance(error, DATA_DEPENDENT) or any(words in str(error) for words in ("data-dependent", "but got FakeTensor"))


DATA_DEPENDENT = (
    torch._subclasses.fake_tensor.DataDependentOutputException,
    torch._subclasses.fake_tensor.DynamicOutputShapeException,
)


class CaptureError(RuntimeError):
    """The model could not be turned into a graph; the message names the line and the reason."""
