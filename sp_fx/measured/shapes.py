"""Runs on shapes alone: on fake tensors, which have shapes, dtypes and devices, and no numbers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes


class ShapeMode(FakeTensorMode):
    """PyTorch's fake tensors, for a graph whose weights stay the tensors that they are.

    No device is stood in for where there is none: torch 2.11 does so once in a process, in the thread that is the first to ask,
    and when this thread has ended, the next one to ask ends in a segmentation fault.
    """

    avoid_device_init = False  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)


@contextlib.contextmanager
def on_shapes_alone() -> Iterator[None]:
    """While it lasts calls compute shapes and dtypes only, whatever modes and transforms the caller is under."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # writes a traceback of each call that does not fit
    before, logger.disabled = logger.disabled, True
    try:
        with _disable_current_modes(), temporarily_clear_interpreter_stack(), torch.no_grad(), ShapeMode():
            yield
    finally:
        logger.disabled = before
