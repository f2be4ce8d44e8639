"""The kernels' share of the memory bandwidth, on a GPU: bytes moved a second over those of a copy in the same run, with a working
set over four times the second-level cache; and attention's adjoint against the flash forward. `bench/run.py` runs them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

import sp_fx_kernels as kernels


def seconds(run: Callable[[], Any], turns: int = 20) -> float:
    """Returns the median time of `run`, by CUDA events, after three runs to warm up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(turns):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def bandwidth() -> Iterator[dict[str, Any]]:
    """Yields a row for each kernel and dtype: its seconds, the bytes it has to move, and its share of a copy's bandwidth."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    for dtype in (torch.float32, torch.bfloat16):
        itemsize = torch.finfo(dtype).bits // 8
        n = max(4 * cache // itemsize, 2**28 // itemsize) // (64 * 112 * 112) + 1  # samples of ResNet's first gate
        x = torch.randn(n, 64, 112, 112, device="cuda", dtype=dtype)
        v, out = torch.randn_like(x), torch.empty_like(x)
        nbytes = x.numel() * itemsize
        copy = 2 * nbytes / seconds(lambda out=out, x=x: out.copy_(x))

        def row(
            name: str, moved: float, run: Callable[[], Any], copy: float = copy, dtype: torch.dtype = dtype
        ) -> dict[str, Any]:
            median = seconds(run)
            share = moved / median / copy
            print(
                f"{name:34} {str(dtype)[6:]:9} {1e3 * median:8.3f} ms {moved / median / 1e9:8.0f} GB/s {share:6.1%} of copy",
                flush=True,
            )
            return {"kernel": name, "dtype": str(dtype)[6:], "s": median, "bytes": moved, "of_copy": share}

        yield row("copy", 2 * nbytes, lambda out=out, x=x: out.copy_(x))
        tau = torch.rand(n, device="cuda") + 0.5
        for kind in ("relu", "gelu", "silu", "mish", "hardswish"):
            yield row(f"gate {kind}", 3 * nbytes, lambda kind=kind, v=v, x=x: kernels.gate_adjoint(kind, v, x, tau=0.6))
        yield row("gate relu, tau a sample", 3 * nbytes, lambda v=v, x=x, tau=tau: kernels.gate_adjoint("relu", v, x, tau=tau))
        # The step reads the pullback twice: for its norm, and to move.
        yield row("ascent step", 4 * nbytes, lambda v=v, x=x: kernels.ascent_step(x, v, step=20.0, low=-1.0, high=1.0))
        yield row("ascent step, ball", 7 * nbytes, lambda v=v, x=x, o=out: kernels.ascent_step(x, v, o, step=20.0, radius=9.0))
        y = F.max_pool2d(x, 3, 2, 1)
        u, windows = torch.randn_like(y), y.numel()
        # x twice and its cotangent; y twice, v, and the shares in float32 written and read
        moved = 3 * nbytes + windows * (3 * itemsize + 8)
        pool = dict(kernel=(3, 3), stride=(2, 2), padding=(1, 1))
        yield row("max pool 3x3 s2", moved, lambda u=u, x=x, y=y, pool=pool: kernels.max_pool_adjoint(u, x, y, tau=0.3, **pool))
        xl, yl, ul = (t.contiguous(memory_format=torch.channels_last) for t in (x, y, u))
        yield row(
            "max pool 3x3 s2, channels_last", moved,
            lambda u=ul, x=xl, y=yl, pool=pool: kernels.max_pool_adjoint(u, x, y, tau=0.3, **pool),
        )  # fmt: skip
        rows = torch.randn(nbytes // itemsize // 1024, 1024, device="cuda", dtype=dtype)
        gamma, w = torch.ones(1024, device="cuda", dtype=dtype), torch.randn_like(rows)
        yield row(
            "layer norm 1024", 3 * rows.numel() * itemsize,
            lambda w=w, rows=rows, gamma=gamma: kernels.norm_adjoint(w, rows, gamma, (1024,), eps=1e-5, centred=True),
        )  # fmt: skip
    yield from attention()


def attention() -> Iterator[dict[str, Any]]:
    """Yields the adjoint of attention in units of the flash forward, at B 16, H 12, N 1024, D 64 in bfloat16."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, value, v = (torch.randn(16, 12, 1024, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        forward = seconds(lambda: F.scaled_dot_product_attention(q, k, value))
    lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, value)[1]
    for name, arguments in (("tau 1, lse given", {"tau": 1.0, "lse": lse}), ("tau 1", {"tau": 1.0}), ("tau 0.5", {"tau": 0.5})):
        median = seconds(lambda arguments=arguments: kernels.attention_adjoint(v, q, k, **arguments))
        print(f"attention adjoint, {name:18} {1e3 * median:8.3f} ms {median / forward:6.2f} x the flash forward", flush=True)
        yield {"kernel": f"attention, {name}", "dtype": "bfloat16", "s": median, "x_flash_forward": median / forward}
