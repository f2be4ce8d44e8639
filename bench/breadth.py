"""The examination of one network, of those that are not image classifiers too: token ids, waves, pictures with text, graphs.

`examine` returns the row of one network: how `transform` captures it, whether the forward is the model's for this call and for
calls of other sizes, what `sp_fx.check` says, how far the frozen map is from the oracle (`breadth_oracle.py`), and a verdict:

    ok                    all of it is right
    wrong                 a forward, a verdict of `check` or a map is not
    refused               the library says that it does not take the model, or the call
    crash                 another error
    own backward fails    the model itself cannot be run, or has no gradient: no fault of the library
    draws                 the model draws random numbers at each call; all else is right, under one seed
    not built             the table's own constructor fails
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from breadth_oracle import Held
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sp_fx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import fill

SECONDS = 240  # the most that one network may take
BAR = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative L2 up to which a map is the oracle's; some models compute in float32
FORWARD = 1e-5  # relative L2 up to which a forward is the model's where PyTorch runs attention by a fused path
ANOTHER = "another form of call was captured"
NOTHING: Mapping[str, Any] = MappingProxyType({})

# -- calls of a model ---------------------------------------------------------------------------------------------------------


def run(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def floats(output: Any) -> list[Tensor]:
    """The floating tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output.real if output.is_complex() else output] if output.is_floating_point() or output.is_complex() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = [getattr(output, f.name) for f in dataclasses.fields(output)]
    return [t for part in output for t in floats(part)] if isinstance(output, list | tuple) else []


def score(output: Any) -> Tensor:
    """The product of all outputs with one direction, from a seed; what is not finite is left out."""
    generator, total = torch.Generator().manual_seed(1), 0.0
    for y in floats(output):
        u = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        total = total + (y.masked_fill(~y.isfinite(), 0) * u).sum()
    return total  # type: ignore[return-value]


def changed(inputs: Any, change: Callable[[Any, Tensor], Any], key: Any = None) -> Any:
    """The inputs with each tensor changed; `change` gets its name or position too."""
    if isinstance(inputs, Tensor):
        return change(key, inputs)
    if isinstance(inputs, Mapping):
        return {k: changed(v, change, k) for k, v in inputs.items()}
    return type(inputs)(changed(v, change, k) for k, v in enumerate(inputs)) if isinstance(inputs, list | tuple) else inputs


def tensors(inputs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    changed(inputs, lambda _, t: found.append(t))
    return found


def other_batch(inputs: Any) -> Any:
    """The inputs with one sample more: the first, rolled along its last axis."""
    b = len(tensors(inputs)[0])
    return changed(inputs, lambda _, t: torch.cat([t, t[:1].roll(1, -1)]) if t.dim() and len(t) == b else t)


def other_length(inputs: Any, longer: bool) -> Any:
    """The inputs with shorter or longer sequences (token ids, their masks, waves); None where nothing is a sequence."""
    sequences = ("input_values", "inputs_embeds")

    def is_sequence(key: Any, t: Tensor) -> bool:
        return t.dim() > 1 and t.shape[1] > 3 and (key in sequences or not t.is_floating_point())

    def change(key: Any, t: Tensor) -> Tensor:
        if not is_sequence(key, t):
            return t
        n = t.shape[1]
        return torch.cat([t, t[:, : max(2, n // 4)]], 1) if longer else t[:, : n - max(2, n // 5)]

    found: list[bool] = []
    changed(inputs, lambda key, t: found.append(is_sequence(key, t)) or t)  # type: ignore[func-returns-value]
    return changed(inputs, change) if any(found) else None


def leaves_of(inputs: Any, wrt: str | None, leaves: list[Tensor]) -> Callable[[nn.Module], Any]:
    """A function that runs a model, and fills `leaves` with what maps are of: floating inputs, or what `wrt` first returns."""

    def leaf(_: Any, t: Any) -> Any:
        if isinstance(t, tuple):
            return leaf(None, t[0]), *t[1:]
        if not t.is_floating_point():
            return t
        leaves.append(t.detach().clone().requires_grad_())
        return leaves[-1].clone()  # which may be written over

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return leaf(None, output) if not leaves else None

    def call(model: nn.Module) -> Any:
        leaves.clear()
        if wrt is None:
            return run(model, changed(inputs, leaf))
        handle = model.get_submodule(wrt).register_forward_hook(hook)
        try:
            return run(model, inputs)
        finally:
            handle.remove()

    return call


def backward(model: nn.Module, inputs: Any, wrt: str | None, hold: bool) -> tuple[list[Tensor], set[str]]:
    """The maps of `score` by the model's own backward, where `hold` with every gate held; and what the oracle cannot know."""
    leaves: list[Tensor] = []
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        output = leaves_of(inputs, wrt, leaves)(model)
        notes = Held(floats(output)).notes if hold else set()
        maps = torch.autograd.grad(score(output), leaves, allow_unused=True)
    return [torch.zeros_like(x) if m is None else m for m, x in zip(maps, leaves, strict=True)], notes


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative L2 over the tensors; infinite where their number or shapes differ."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return math.inf
    return max((relative(a.detach(), b.detach()) for a, b in zip(found, expected)), default=0.0)


def relative(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b):
        return 0.0
    known = ~((a == b) | (a.isnan() & b.isnan()))  # infinities, and what both do not know
    off, size = (a - b)[known].double().norm(), torch.where(b.isfinite(), b, 0).double().norm()
    return float(off / size) if size else float(off > 0)


# -- the examination -----------------------------------------------------------------------------------------------------------


class Slow(BaseException):
    """A network took longer than it may; no `except Exception` on the way catches it."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Slow(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def examine(build: Callable[[], tuple]) -> dict[str, Any]:
    """Returns the row of one network; `ok`, `verdict`, and in a line `why`.

    Raises:
        ModuleNotFoundError: the network's library is not installed.
    """
    started, row = time.perf_counter(), {}
    torch.manual_seed(0)
    try:
        made = build()
    except ModuleNotFoundError:
        raise
    except Exception as error:
        return {"verdict": "not built", "ok": False, "why": said(error), "seconds": 0.0}
    try:
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdict, why = judged(*made, row=row)
    except Slow as error:
        verdict, why = "crash", f"{error}, after: {', '.join(row)}"
    except Exception as error:  # whatever a network raises is its row
        verdict, why = "crash", said(error)
    return {**row, "verdict": verdict, "ok": verdict == "ok", "why": why, "seconds": round(time.perf_counter() - started, 1)}


def judged(model: nn.Module, inputs: Any, options: Mapping = NOTHING, *, row: dict[str, Any]) -> tuple[str, str]:
    """Returns the verdict on a network and its reason, and fills the row."""
    model = fill(model)
    pristine = copy.deepcopy(model)  # some models keep states of a call, which cannot be copied
    row["parameters"] = sum(p.numel() for p in model.parameters())
    try:
        wrt = options.get("wrt") or explained(model, inputs)
        expected, again = seeded(model, inputs), seeded(model, inputs, seed=1)
    except Exception as error:
        return "own backward fails", f"its forward: {said(error)}"
    own = ""
    try:
        backward(copy.deepcopy(pristine), inputs, wrt, hold=False)
    except Exception as error:
        own = said(error)
    draws = distance(again, expected) > 0
    begun = time.perf_counter()
    try:
        explainer = sp_fx.transform(model, example_inputs=inputs)
    except Exception as error:
        if own:
            return "own backward fails", f"{own}; transform: {said(error)}"
        row["refusal"] = {"line": bool(re.search(r"line \d+|\.py:\d+", str(error))), "way out": bool(WAY_OUT.search(str(error)))}
        return "refused" if is_refusal(error) else "crash", f"transform: {said(error)}"
    row["transform_s"] = round(time.perf_counter() - begun, 2)
    report = explainer.report()
    row |= {"tracer": report.tracer, "inputs": str(report.inputs)}
    row["gates"] = "/".join(str(len(report.of(status))) for status in ("rewritten", "kept", "NOT REWRITTEN"))
    stages = [lambda: forwards(model, explainer, inputs, options, row), lambda: checks(explainer, inputs, row)]
    stages += [] if own else [lambda: mapped(pristine, inputs, wrt, report.tracer, row)]
    faults, worst = [], "ok"
    for stage in stages:
        try:
            found = stage()
            verdict = "refused" if found and all(REFUSED in fault for fault in found) else "wrong"
        except Exception as error:
            verdict = "refused" if is_refusal(error) else "crash"
            found = [said(error)]
        if found:
            faults += found
            worst = min(worst, verdict, key=("wrong", "crash", "refused", "ok").index)
    if own:
        return "own backward fails", "; ".join([own, *faults])
    return ("draws" if draws and worst == "ok" else worst), "; ".join(faults)


REFUSED = "it is refused"
WAY_OUT = re.compile(r"\b(example_inputs|[Pp]ass|[Gg]ive|[Uu]se|[Cc]hoose|[Ss]et|[Ww]rite|[Cc]all|instead|needs)\b")


def is_refusal(error: Exception) -> bool:
    """Whether the library raised the error itself, on purpose."""
    if isinstance(error, sp_fx.CaptureError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    own = Path(sp_fx.__file__).parent
    return isinstance(error, TypeError | ValueError) and own in Path(frames[-1].filename).parents


def said(error: Exception) -> str:
    """What an error says and where it was raised, in a line, with files from the library's folder on."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = local(" ".join(str(error).split()))
    text = text if len(text) <= 900 else f"{text[:300]} [...] {text[-600:]}"
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno} {frame.name})"


def local(text: str) -> str:
    """The text with paths as they are inside the folder of packages, or of this repository."""
    return re.sub(r"/\S*?/site-packages/", "", text).replace(f"{Path(__file__).parents[1]}/", "")


def explained(model: nn.Module, inputs: Any) -> str | None:
    """The embedding that stands for token ids where no input floats; None where one does."""
    if any(t.is_floating_point() for t in tensors(inputs)):
        return None
    called: list[str] = []
    embeddings = {name: module for name, module in model.named_modules() if "mbedding" in type(module).__name__}
    handles = [m.register_forward_hook(lambda *_, name=name: called.append(name)) for name, m in embeddings.items()]
    with torch.no_grad():
        run(model, inputs)
    for handle in handles:
        handle.remove()
    try:
        words = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        words = None
    named = next((name for name, module in embeddings.items() if module is words), None)
    leaves = [name for name in called if not list(embeddings[name].children())]
    return named if named in called else leaves[0]


def seeded(model: nn.Module, inputs: Any, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    with torch.enable_grad():  # where nothing requires grad, PyTorch fuses transformer layers
        return [t.detach() for t in floats(run(model, changed(inputs, lambda _, t: t.clone())))]


def forwards(model: nn.Module, explainer: sp_fx.Explainer, inputs: Any, options: Mapping, row: dict[str, Any]) -> list[str]:
    """The explainer's forward beside the model's, on the example and on calls of other sizes."""
    calls = {"example": inputs}
    if options.get("batch", True):
        calls["other batch"] = other_batch(inputs)
    calls |= {"shorter": other_length(inputs, False), "longer": other_length(inputs, True)}
    found: dict[str, Any] = row.setdefault("forward", {})
    faults = []
    for name, call in calls.items():
        if call is None:
            continue
        try:
            expected = seeded(model, call)
        except Exception:
            found[name] = "not the model's either"
            continue
        try:
            found[name] = distance(seeded(explainer, call), expected)
        except Exception as error:
            found[name] = f"{REFUSED if is_refusal(error) else 'crash'}: {said(error)}"
        if isinstance(found[name], str) or not found[name] <= FORWARD:
            faults.append(f"forward, {name}: {found[name]}")
    row["captured anew"] = sum(ANOTHER in note for note in explainer.report().notes)
    return faults


def checks(explainer: sp_fx.Explainer, inputs: Any, row: dict[str, Any]) -> list[str]:
    """The lines of `sp_fx.check` that FAILED."""
    try:
        lines = sp_fx.check(explainer, inputs).lines
    except Exception as error:
        row["check"] = said(error)
        return [f"check raised {said(error)}"]
    wrong = [local(f"check, {line.name}: {line.found} {line.note}")[:600] for line in lines if line.verdict == "FAILED"]
    row["check"] = "; ".join(wrong) or "ok"
    return wrong


def mapped(model: nn.Module, inputs: Any, wrt: str | None, tracer: str, row: dict[str, Any]) -> list[str]:
    """The frozen map beside the oracle's: in float64, or in the model's own dtype where it runs in no other."""
    wide = copy.deepcopy(model).double()
    doubled = changed(inputs, lambda _, t: t.double() if t.is_floating_point() else t)
    dtype = torch.float64
    try:
        torch.manual_seed(0)
        expected, notes = backward(copy.deepcopy(wide), doubled, wrt, hold=True)
    except (RuntimeError, TypeError):
        wide, doubled, dtype = copy.deepcopy(model), inputs, torch.float32
        torch.manual_seed(0)
        expected, notes = backward(copy.deepcopy(wide), doubled, wrt, hold=True)
    cells = any(isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in model.modules())
    notes |= {"a recurrent cell, whose products of gates it does not tell apart"} if cells else set()
    row |= {"oracle": "; ".join(sorted(notes)), "map dtype": str(dtype).removeprefix("torch.")}
    by = "export" if tracer == "torch.export" else "fx"
    frozen = sp_fx.transform(wide, example_inputs=doubled, rules=sp_fx.Rules.frozen(), tracer=by, verify=False)
    torch.manual_seed(0)
    found = [m for m in floats(frozen.pullback(doubled, score, wrt=wrt)) if m is not None]
    row["map"] = distance(found, expected)
    row["map is zero"] = not any(m.any() for m in expected)
    if row["map"] <= BAR[dtype] or cells:
        return []
    torch.manual_seed(0)
    plain, _ = backward(copy.deepcopy(wide), doubled, wrt, hold=False)
    row["gradient"] = distance(plain, expected)
    why = f" (oracle: {row['oracle']})" if notes else ""
    return [f"map: off the oracle by {row['map']:.1e}, where the plain gradient is by {row['gradient']:.1e}{why}"]
