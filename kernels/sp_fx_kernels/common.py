"""Shared by the kernels: finite bounds, and the first steps of a launcher: checks, memory layouts, the device."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

INTERPRETED = bool(triton.knobs.runtime.interpret)  # read once, as `triton.jit` reads it once for each kernel
if INTERPRETED:
    # From NumPy 2.4 on, Triton 3.6's interpreter cannot loop up to a kernel's argument, which it holds as [n].
    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_tensor_and_index

    # It also multiplies the bits of bfloat16 matrices as if they were integers.
    _create_dot = interpreter.InterpreterBuilder.create_dot

    def _widen(handle):
        if handle.dtype != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def _create_dot_of_floats(self, a, b, *args):
        return _create_dot(self, _widen(a), _widen(b), *args)

    interpreter.InterpreterBuilder.create_dot = _create_dot_of_floats

OPTIONS = {"enable_fp_fusion": True}  # Triton 3.9 warns where it is left open, and later versions turn it off
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def bounded(x):
    """`x` within the finite floats, so that no inf - inf arises and equal infinities tie. NaN stays."""
    x = tl.where(x > 3.4028234663852886e38, 3.4028234663852886e38, x)
    return tl.where(x < -3.4028234663852886e38, -3.4028234663852886e38, x)


def check(launcher: str, *tensors: Tensor) -> None:
    """Raise unless all tensors have a dtype that kernels take, and are on one device that Triton reaches."""
    for t in tensors:
        if t.dtype not in FLOATS:
            raise TypeError(f"{launcher} computes in float32 and takes float32, float16 or bfloat16, got {t.dtype}")
        if t.device != tensors[0].device:
            raise ValueError(f"{launcher} wants its tensors on one device, got {tensors[0].device} and {t.device}")
    if not (tensors[0].is_cuda or INTERPRETED):
        got = f"got tensors on {tensors[0].device}"
        raise RuntimeError(f"{launcher} runs on a GPU, or on CPU where TRITON_INTERPRET=1 was set before triton's import; {got}")


def check_temperature(launcher: str, tau: object) -> None:
    """Raise unless `tau` is a temperature. A tensor passes as it is: reading its values would wait for the GPU."""
    if isinstance(tau, Tensor) or (isinstance(tau, str) and tau == "frozen"):
        return
    if not isinstance(tau, int | float) or not 0 < tau < float("inf"):
        raise ValueError(f"{launcher}: tau is a finite number above 0, a tensor with one a sample, or 'frozen', got {tau!r}")


def on_device_of(t: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of `t` the current one, on which Triton launches."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one piece of memory, in whatever order of axes."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def in_one_layout(leader: Tensor, *others: Tensor) -> list[Tensor]:
    """All tensors (of one shape) in the memory order of `leader`, which is copied only where its elements are not dense or axis 0
    is not outermost. Then an offset means the same element in all of them, and a sample is one piece of memory."""
    samples = leader.shape[0] if leader.dim() else 1
    outermost = samples <= 1 or leader.stride(0) * samples == leader.numel()
    leader = leader if is_dense(leader) and outermost else leader.contiguous()
    laid_out = [leader]
    for t in others:
        same = all(a == b or n == 1 for a, b, n in zip(t.stride(), leader.stride(), t.shape, strict=True))
        laid_out.append(t if same else torch.empty_like(leader, dtype=t.dtype).copy_(t))
    return laid_out
