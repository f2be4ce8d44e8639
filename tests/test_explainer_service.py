"""What a long-running process needs: hundreds of calls, with failures among them, leave nothing behind."""

import contextlib
import gc
import os
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill


class Service(nn.Module):
    """Convolutions, attention, a BatchNorm in train mode, a hook; large enough that a kept activation shows in the memory."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        self.pool, self.norm = nn.MaxPool2d(4), nn.LayerNorm(16)
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 10)

    def forward(self, x, scale=1.0):
        x = self.act(self.bn(self.conv(x)))
        x = self.norm(self.pool(x).flatten(2).mT)
        x = x + F.gelu(self.attention(x, x, x, need_weights=False)[0]) * scale
        return self.head(x.mean(1))


def calls(explainer, x, i):
    """One of everything, and one of every way to fail: before, during and after the forward."""
    explainer.pullback(x, torch.tensor([[1, 2]] * len(x)))
    explainer.pullback(x, i % 10, wrt="pool")
    explainer.double_pullback(x, batch_size=1)
    explainer.ascend(x, i % 10, steps=2, bounds=(-1, 1), return_path=True)
    failing = [(x, 99), (x, "cat"), (x[:, :2], 1), (x * torch.nan, 1), (x, lambda y: y.missing), (x, lambda y: 1 / 0)]
    for k, (inputs, target) in enumerate(failing):
        method = explainer.pullback if (i + k) % 2 else explainer.ascend
        with contextlib.suppress(IndexError, TypeError, RuntimeError, ValueError, AttributeError, ZeroDivisionError):
            method(inputs, target)
            raise AssertionError("that was to fail")


def live_tensors():
    """By their ids; weak, so that an id that is used again is no tensor that was there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated names among the objects
        return {id(o): weakref.ref(o) for o in gc.get_objects() if isinstance(o, torch.Tensor)}


def new_tensors(before):
    return [key for key, ref in live_tensors().items() if key not in before or before[key]() is not ref()]


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def state(model):
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()
    hooks = [[len(v) for k, v in m.__dict__.items() if k.endswith("hooks")] for m in model.modules()]
    modules = [(type(m), m.training, sorted(m.__dict__)) for m in model.modules()]
    tensors = [(n, id(t), t._version, t.requires_grad, t.grad) for n, t in (*model.named_parameters(), *model.named_buffers())]
    return modes, threads, hooks, modules, tensors


@pytest.mark.parametrize("tracer", ["fx", pytest.param("export", marks=pytest.mark.slow)])
@pytest.mark.parametrize("times", [8, pytest.param(50, marks=pytest.mark.slow)])  # of four calls and six failures each
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory as Linux tells it")
def test_calls_with_failures_between_leave_the_process_as_it_was(tracer, times):
    model = fill(Service()).train()
    model.head.weight.requires_grad_(False)
    seen = []
    model.conv.register_forward_hook(lambda *_: seen.append(None))  # it keeps something, and so is none of the model's own
    x = torch.randn(2, 3, 48, 48)
    with pytest.warns(UserWarning, match="does not run"):
        explainer = sp_fx.transform(model, tracer=tracer, example_inputs=x)
    for i in range(min(20, times)):
        calls(explainer, x, i)
    gc.collect()
    values = [t.clone() for t in model.state_dict().values()]
    tensors = live_tensors()  # before the memory is read: looking at all objects takes memory itself, 80 MiB in a long process
    before, memory = state(model), resident()
    for i in range(times):
        calls(explainer, x, i)
    grown = resident() - memory
    assert not new_tensors(tensors)  # without a collection: nothing waits for one
    assert abs(grown) <= 0.01 * memory
    assert state(model) == before and all(torch.equal(a, b) for a, b in zip(values, model.state_dict().values()))


@pytest.mark.parametrize("method", ["pullback", "double_pullback", "ascend"])
@pytest.mark.parametrize("wrt", [None, "bn"])
def test_activations_go_without_the_garbage_collector(method, wrt):
    explainer, x, kept = sp_fx.transform(fill(Service())), torch.randn(1, 3, 16, 16), []
    for name in ("act", "pool", "norm", "head"):
        explainer.get_submodule(name).register_forward_hook(lambda m, a, y: kept.append(weakref.ref(y)))
    gc.collect()
    gc.disable()
    try:
        getattr(explainer, method)(x, 1, wrt=wrt)
        with contextlib.suppress(ZeroDivisionError):
            getattr(explainer, method)(x, lambda y: 1 / 0, wrt=wrt)
        assert kept and not any(ref() is not None for ref in kept)
    finally:
        gc.enable()
