"""Fixtures of the kernel tests, and one thread for each of several workers."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture
def device():
    """Where kernels run: on CPU under Triton's interpreter, else on the GPU."""
    import triton

    return "cpu" if triton.knobs.runtime.interpret else "cuda"


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN, so that an element that no program writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)
