"""What a capture of a model is: a graph over an eval clone of its modules, and the error where there is none."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from torch import fx, nn

tracing = threading.RLock()  # held by whatever traces: torch patches itself meanwhile, for all threads


@dataclass(frozen=True)
class Capture:
    """The eval clone of a model, the graph of its forward, how it was captured, and what a reader of the report should know."""

    modules: nn.Module
    graph: fx.Graph
    tracer: str
    notes: tuple[str, ...] = ()


def blame(error: BaseException) -> str:
    """The innermost line outside torch that `error` came through."""
    place, step = "no Python line", error.__traceback__
    while step is not None:
        file = step.tb_frame.f_code.co_filename
        if "/torch/" not in file and file != __file__:
            place = f"{file}:{step.tb_lineno}, in {step.tb_frame.f_code.co_name}"
        step = step.tb_next
    return place


class CaptureError(RuntimeError):
    """The model could not be turned into a graph; the message names the line and the reason."""
