"""Timing ways of explaining one model side by side, in turns, with their memory; a result that is wrong is not timed.

The harness of `sp-fx bench` and of `bench/run.py`. A way is a function without arguments that explains one batch, such as
`lambda: explainer.pullback(x, target)`.
"""

from __future__ import annotations

import copy
import ctypes
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..build import transform
from ..explainer import Explainer
from ..gates.rules import Rules

Way = Callable[[], Any]

FORWARD, PROGRAM = "forward, compiled", "program pullback"


@dataclass
class Row:
    """The row of one way: seconds a turn, peak memory above what the process held before (bytes), and seconds to make it."""

    way: str
    median_s: float = 0.0
    low_s: float = 0.0  # quartiles
    high_s: float = 0.0
    min_s: float = 0.0
    turns: int = 0
    peak_bytes: int | None = None
    made_s: float = 0.0
    error: str = ""  # why there is no number
    x_forward: float | None = None  # its median over that of the compiled forward
    x_program: float | None = None

    def record(self) -> dict[str, Any]:
        return asdict(self)


def gradient(model: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
    """Returns the plain gradient of the score of each sample's class `target` [B], shaped like `x`."""
    leaf = x.detach().requires_grad_()
    y = model(leaf)
    return torch.autograd.grad(y, leaf, torch.zeros_like(y).scatter_(1, target[:, None], 1.0))[0]


def compiled_forward(model: nn.Module, x: Tensor) -> Way:
    """Returns the way that others are measured by: the model's forward as Inductor compiles it, weights frozen; on CUDA with CUDA
    graphs."""
    from torch._inductor import config

    run = torch.compile(model, fullgraph=True, dynamic=False, mode="reduce-overhead" if x.is_cuda else None)

    def forward() -> Tensor:
        with torch.no_grad(), config.patch(freezing=True):
            return run(x)

    forward()
    return forward


def ours(model: nn.Module, x: Tensor, target: Tensor, rules: Rules | None = None) -> Iterator[tuple[str, Callable[[], Way]]]:
    """Yields our ways and the forwards and gradients they are compared with, by name, each as a function that makes it ready."""
    explainer = transform(model, rules=rules)

    def eager_forward() -> Tensor:
        with torch.no_grad():
            return model(x)

    def program(explainer: Explainer, method: str, **arguments: Any) -> Way:
        compiled = explainer.compile(method, example_inputs=x, **arguments)
        return lambda: compiled(x, target)

    def compiled_gradient() -> Way:
        run = torch.compile(model, fullgraph=True, dynamic=False)
        gradient(run, x, target)
        return lambda: gradient(run, x, target)

    yield FORWARD, lambda: compiled_forward(model, x)
    yield "forward, eager", lambda: eager_forward
    yield "gradient, eager", lambda: lambda: gradient(model, x, target)
    yield "gradient, compiled", compiled_gradient
    yield "pullback, eager", lambda: lambda: explainer.pullback(x, target)
    yield "ascend, 5 steps, eager", lambda: lambda: explainer.ascend(x, target, steps=5)

    def compiled_at_another_batch() -> Way:
        compiled = explainer.compile("pullback", example_inputs=x[:1] if len(x) > 1 else torch.cat([x, x]))
        return lambda: compiled(x, target)

    yield PROGRAM, lambda: program(explainer, "pullback")
    yield "program pullback, another batch's", compiled_at_another_batch
    yield "program pullback, hard gates", lambda: program(transform(model, rules=Rules.frozen()), "pullback")
    yield "program double_pullback", lambda: program(explainer, "double_pullback")
    yield "program ascend, 5 steps", lambda: program(explainer, "ascend", steps=5)


def verify(model: nn.Module, x: Tensor, target: Tensor) -> None:
    """Check what is to be timed: the forward is the model's to the bit, and the frozen pullback of a network of ReLU and max
    pooling is its gradient: in float64 to 1e-9, and as it is timed to 1e-2 (half types: 5e-2), since a pre-activation that rounds
    to zero has a gate half open, and closed in PyTorch's gradient: one of them is 1.1e-3 on ResNet-50 at 112 x 112. Programs
    compare themselves with the explainer when they are compiled.

    Raises:
        ArithmeticError: a result is wrong.
    """
    explainer = transform(model, rules=Rules.frozen())
    with torch.enable_grad():
        same = torch.equal(explainer(x), model(x))
    if not same:
        raise ArithmeticError("the explainer's forward is not the model's")
    if {site.kind for site in explainer.report().of("rewritten")} <= {"relu", "max_pool"}:
        exact = copy.deepcopy(model).double()
        expected = gradient(exact, x.double(), target)
        for pullback, allowed in (
            (transform(exact, rules=Rules.frozen()).pullback(x.double(), target), 1e-9),
            (explainer.pullback(x, target).double(), 1e-2 if x.dtype == torch.float32 else 5e-2),
        ):
            error = float((pullback - expected).norm() / expected.norm())
            if not error <= allowed:
                raise ArithmeticError(f"the frozen pullback is off the gradient by {error:.1e}, {allowed:.0e} is allowed")


def measure(ways: Iterator[tuple[str, Callable[[], Way]]], device: torch.device, turns: int) -> list[Row]:
    """Make the ways, then let them take turns, so that a slow minute of the machine falls on all of them; returns a row of each.

    A way that takes more than twenty times the first gets one turn. The row of one that cannot be made or run has an
    error in place of numbers.
    """
    rows, runnable = [], []
    for name, make in ways:
        row, started = Row(name), time.perf_counter()
        rows.append(row)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = make()
                row.made_s = time.perf_counter() - started
                run()  # warm
                row.peak_bytes = peak(run, device)
        except Exception as error:  # whatever stands in a peer's way is the row's content
            row.error = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            continue
        runnable.append((row, run))
    seconds: dict[int, list[float]] = {id(row): [] for row, _ in runnable}
    for turn in range(turns):
        for row, run in runnable:
            if turn > 0 and seconds[id(row)][0] > 20 * seconds[id(runnable[0][0])][0]:
                continue
            synchronize(device)
            started = time.perf_counter()
            run()
            synchronize(device)
            seconds[id(row)].append(time.perf_counter() - started)
    for row, _ in runnable:
        times = sorted(seconds[id(row)])
        quarters = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
        row.low_s, row.median_s, row.high_s, row.min_s, row.turns = quarters[0], quarters[1], quarters[2], times[0], len(times)
    for attribute, base in (("x_forward", FORWARD), ("x_program", PROGRAM)):
        bar = next((row.median_s for row, _ in runnable if row.way == base), None)
        for row, _ in runnable:
            setattr(row, attribute, row.median_s / bar if bar else None)
    return rows


def synchronize(device: torch.device) -> None:
    """Wait for what a CUDA device still runs."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(run: Way, device: torch.device) -> int | None:
    """Returns the most memory that `run` took above what the process had before, in bytes; on CPU by Linux's count of resident
    pages, and None where the kernel does not say."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed before, and is still resident, would be taken again unseen
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present
        before = resident("VmRSS")
        if resident("VmHWM") > before + 2**24:  # a kernel that keeps the old peak: what follows would be that
            return None
        run()
        return max(resident("VmHWM") - before, 0)
    except (OSError, StopIteration, AttributeError):
        return None


def resident(field: str) -> int:
    """Returns a field of /proc/self/status in bytes: "VmRSS", the resident memory, or "VmHWM", its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def format_table(rows: list[Row]) -> str:
    """Returns the rows as lines to print, under a heading."""
    lines = [f"{'way':34} {'median ms':>10} {'quartiles':>15} {'MiB':>7} {'made in s':>9} {'x forward':>9} {'x program':>9}"]
    for row in rows:
        if row.error:
            lines.append(f"{row.way:34} {row.error}")
            continue
        ratios = [f"{ratio:9.2f}" if ratio is not None else f"{'':9}" for ratio in (row.x_forward, row.x_program)]
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        spread = f"{1e3 * row.low_s:.1f}-{1e3 * row.high_s:.1f}"
        lines.append(f"{row.way:34} {1e3 * row.median_s:10.1f} {spread:>15} {memory:>7} {row.made_s:9.1f} " + " ".join(ratios))
    return "\n".join(lines)
