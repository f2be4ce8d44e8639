"""Explaining from an inner activation and to one. References: the model cut by hand, and autograd."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill, relative


class Residual(nn.Module):
    """Adds in place, calls one ReLU twice and one function of its own, and needs its input again after the cut."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.skip, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 5)

    def stem(self, x):
        return self.act(self.bn(self.conv(x)))

    def after(self, h, x):
        out = self.block(h)
        out.add_(h)  # `out += h` would be traced out of place
        out = self.act(out)
        return self.head(F.gelu(out + self.skip(x)).mean((2, 3)))

    def forward(self, x):
        return self.after(self.stem(x), x)


TRACERS = ["fx", "export"]


@pytest.fixture(scope="module", params=TRACERS)
def cut(request):
    model = fill(Residual()).double()
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return sp_fx.transform(model, tracer=request.param, example_inputs=x), model, x


FROZEN = sp_fx.Rules.frozen()


def seen(model, name, x, call=1):
    """What the model's module returns in its `call`-th call, before anything writes over it."""
    values = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, y: values.append(y.clone()))
    model(x)
    handle.remove()
    return values[call - 1]


@pytest.mark.parametrize("name", ["conv", "bn", "act", "act#2", "block", "block.1", "skip", "gelu", "head"])
def test_the_output_is_the_activation(cut, name):
    whole, model, x = cut
    explainer = sp_fx.transform(model, tracer="export", example_inputs=x, output=name) if "export" in str(whole.report()) \
        else sp_fx.transform(model, tracer="fx", output=name)  # fmt: skip
    module, _, call = name.partition("#")
    with torch.no_grad():
        if name == "gelu":
            after = model.act(model.block(model.stem(x)) + model.stem(x))
            expected = F.gelu(after + model.skip(x))
        else:
            expected = seen(model, module, x, int(call or 1))
        assert torch.equal(explainer(x), expected)
    places = [site.place for site in explainer.report().sites]
    assert ("gelu" in places) == (name in ("gelu", "head")) and ("act#2" in places) == (name in ("act#2", "gelu", "head"))
    assert explainer.pullback(x, 1).shape == x.shape  # a channel
    at = (2, 3, 3) if expected.dim() == 4 else (2,)
    assert explainer.ascend(x, at, steps=2).norm() > 0  # a neuron


def test_with_respect_to_an_activation(cut):
    explainer, model, x = cut
    frozen = sp_fx.transform(model, rules=sp_fx.Rules(**{**dict.fromkeys(sp_fx.gates.rules.KINDS), "relu": "frozen"}))
    h = model.stem(x).detach().requires_grad_()
    expected = torch.autograd.grad(model.after(h, x)[:, 1].sum(), h)[0]
    pulled = frozen.pullback(x, 1, wrt="act")
    assert pulled.shape == h.shape and relative(pulled, expected) <= 1e-12  # hard gates are the derivative
    soft = explainer.pullback(x, 1, wrt="act")
    # The chain rule of pullbacks: through the stem, the map of the activation is the map of the input, but for the skip.
    stem, tail = explainer.split("act")
    assert torch.equal(tail(stem(x), x=x), explainer(x)) and torch.equal(stem(x), model.stem(x))
    without = explainer.pullback(x, 1) - stem.pullback(x, soft)
    only_skip = x.clone().requires_grad_()
    through = torch.autograd.grad(tail(stem(x).detach(), x=only_skip)[:, 1].sum(), only_skip)[0]
    assert relative(without, through) <= 1e-10
    assert [s.place for s in stem.report().sites] == ["act"] and [s.place for s in tail.report().sites] == ["act#2", "gelu"]


def test_methods_and_batches(cut):
    explainer, _, x = cut
    t = torch.tensor([[0, 1], [2, 3], [4, 0]])
    assert explainer.pullback(x, t, wrt="bn").shape == (3, 2, 4, 6, 6)
    for method, options in [("pullback", {}), ("double_pullback", {}), ("ascend", {"steps": 2})]:
        whole = getattr(explainer, method)(x, 1, wrt="bn", **options)
        assert relative(getattr(explainer, method)(x, 1, wrt="bn", batch_size=2, **options), whole) <= 1e-10
    delta, path = explainer.ascend(x, 1, wrt="block", steps=2, return_path=True)
    assert torch.equal(path[-1] - path[0], delta) and path.shape == (3, 3, 4, 6, 6)
    many = explainer.ascend(x, t, wrt="bn", steps=1)
    assert relative(many[:, 1], explainer.ascend(x, t[:, 1], wrt="bn", steps=1)) <= 1e-10


def test_names_that_do_not_exist(cut):
    explainer, model, x = cut
    with pytest.raises(ValueError, match=r"wrt='block.2' names no activation of this model; the nearest are .*block\.[01]"):
        explainer.pullback(x, 1, wrt="block.2")
    with pytest.raises(ValueError, match=r"output='convv' names no activation of this model; the nearest are conv"):
        sp_fx.transform(model, output="convv")


def test_an_activation_after_the_output_or_without_effect(cut):
    explainer, _, x = cut
    stem, _ = explainer.split("bn")
    with pytest.raises(ValueError, match="names no activation"):
        stem.pullback(x, 1, wrt="block")


def test_hooks_copies_weights_and_threads(cut):
    explainer, model, x = cut
    expected, seen = explainer.pullback(x, 1, wrt="block"), []
    handle = explainer.block.register_forward_hook(lambda *_: seen.append(1))
    explainer.pullback(x, 1, wrt="act")
    handle.remove()
    assert len(seen) == 1  # what comes after the cut runs once
    for other in (copy.copy(explainer), copy.deepcopy(explainer), pickle.loads(pickle.dumps(explainer))):
        assert torch.equal(other.pullback(x, 1, wrt="block"), expected)
        assert torch.equal(other.pullback(x, 1, wrt="gelu"), explainer.pullback(x, 1, wrt="gelu"))
    with torch.no_grad():
        model.block[0].weight.mul_(2)
    changed = explainer.pullback(x, 1, wrt="act")
    with torch.no_grad():
        model.block[0].weight.div_(2)
    assert relative(changed, explainer.pullback(x, 1, wrt="act")) > 0.1
    single = copy.deepcopy(explainer)
    single.pullback(x, 1, wrt="act")
    assert single.float().pullback(x.float(), 1, wrt="act").dtype == torch.float32
    maps = []
    fresh = copy.copy(explainer)
    threads = [threading.Thread(target=lambda: maps.append(fresh.pullback(x, 1, wrt="block"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(maps) == 4 and all(torch.equal(f, expected) for f in maps)


def test_multihead_and_tokens():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, ids):
            x = self.table(ids)
            return self.head(self.attention(x, x, x, need_weights=False)[0].relu().mean(1))

    explainer = sp_fx.transform(fill(Tokens()))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(TypeError, match=r"nothing to explain.*wrt="):
        explainer.pullback(ids, 1)
    assert explainer.pullback(ids, 1, wrt="table").shape == (2, 3, 4)
    assert explainer.pullback(ids, 1, wrt="attention").shape == (2, 3, 4)
    assert explainer.ascend(ids, 1, wrt="table", steps=2, step_size=0.1).norm() > 0


def test_the_tail_compiles():
    model = fill(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3)))
    x = torch.randn(3, 4)
    explainer = sp_fx.transform(model)
    stem, tail = explainer.split("1")
    program = tail.compile(example_inputs=stem(x).detach())
    outputs, maps = program(stem(x).detach(), torch.tensor([1, 1, 1]))
    assert relative(maps, explainer.pullback(x, 1, wrt="1")) <= 1e-5 and relative(outputs, model(x)) <= 1e-5


class Shared(nn.Module):
    """One table that two modules look up in, as T5 has it; the first of them is never called itself."""

    def __init__(self, once):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.encoder, self.decoder, self.head = *(nn.Embedding(9, 4) for _ in range(3)), nn.Linear(4, 3)
        self.encoder.weight = self.decoder.weight = self.shared.weight
        self.once = once

    def forward(self, ids):
        found = self.encoder(ids) if self.once else self.encoder(ids) + self.decoder(ids.flip(1))
        return self.head(nn.functional.gelu(found)).mean(1)


def test_a_table_under_another_name():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    explainer = sp_fx.transform(Shared(once=True).eval(), example_inputs=ids)
    assert torch.equal(explainer.pullback(ids, 1, wrt="shared"), explainer.pullback(ids, 1, wrt="encoder"))
    explainer = sp_fx.transform(Shared(once=False).eval(), example_inputs=ids)
    with pytest.raises(ValueError, match="'shared' is run as encoder and as decoder: say which"):
        explainer.pullback(ids, 1, wrt="shared")


def test_nested_tensors_are_refused():
    parts = [torch.randn(2, 4), torch.randn(3, 4)]
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    for nested in (torch.nested.nested_tensor(parts), torch.nested.nested_tensor(parts, layout=torch.jagged)):
        with pytest.raises(TypeError, match="to_padded_tensor"):
            sp_fx.transform(model, example_inputs=nested)
        with pytest.raises(TypeError, match="to_padded_tensor"):
            sp_fx.transform(model).pullback(nested, 1)
