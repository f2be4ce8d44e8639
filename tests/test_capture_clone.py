"""The clone in eval mode that is traced in the model's place: its structure, its weights, its hooks."""

import copy
import functools
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sp_fx
from helpers import Shared, fill, relative
from sp_fx.capture.clones.clone import EvalClone


def test_weights_are_shared_and_in_place_updates_arrive():
    model = Shared().eval()
    explainer = sp_fx.transform(model)
    assert explainer.conv.weight.data_ptr() == model.conv.weight.data_ptr()
    assert explainer.conv.weight is not model.conv.weight
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        model.conv.weight.mul_(2)
    assert torch.equal(explainer(x), model(x))
    model.load_state_dict({k: torch.rand_like(v.float()).to(v.dtype) for k, v in model.state_dict().items()})
    assert torch.equal(explainer(x), model(x))
    replaced = model.double()
    assert explainer(x).dtype == torch.float32 and replaced.conv.weight.dtype == torch.float64


def test_train_mode_does_not_reach_the_graph():
    model = Shared().train()
    explainer = sp_fx.transform(model)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(explainer(x), copy.deepcopy(model).eval()(x))
    assert torch.equal(explainer(x), explainer(x))  # no dropout
    assert explainer.eval() is explainer and not explainer.training


def test_compiled_and_parallel_models_are_unwrapped():
    model = Shared().eval()
    x = torch.randn(1, 3, 8, 8)
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        for options in ({}, {"example_inputs": x}, {"example_inputs": {"x": x}}):
            assert torch.equal(sp_fx.transform(wrapped, **options)(x), model(x))
    inner = nn.Sequential(torch.compile(model), nn.ReLU())
    assert sp_fx.transform(inner).report().sites[0].place == "0.act"


def test_distributed_models_are_unwrapped(tmp_path):
    model = Shared().eval()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        x = torch.randn(1, 3, 8, 8)
        assert torch.equal(sp_fx.transform(wrapped)(x), model(x))
    finally:
        torch.distributed.destroy_process_group()


def test_clones_keep_structure_and_references():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.again = self.a
            self.steps = [self.a, self.b]
            self.by_name = {"b": self.b}
            self.call = self.step
            self.bound = functools.partial(self.step, 1)

        def step(self, i, x):
            return self.steps[i](x)

    model = Tied()
    clone = EvalClone()(model)
    assert clone.b.weight is clone.a.weight and clone.again is clone.a
    assert clone.steps == [clone.a, clone.b] and clone.by_name["b"] is clone.b
    assert clone.call.__self__ is clone and clone.bound.func.__self__ is clone
    assert not set(map(id, model.modules())) & set(map(id, clone.modules()))


def test_parametrised_and_normed_weights():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(3, 4)
    explainer = sp_fx.transform(model)
    assert torch.equal(explainer(x), model(x))
    frozen = sp_fx.transform(model, rules=sp_fx.Rules.frozen()).pullback(x, 1)
    y = x.clone().requires_grad_()
    assert relative(frozen, torch.autograd.grad(model(y)[:, 1].sum(), y)[0]) <= 1e-6


def test_weights_that_hooks_compute():
    """As the hook would compute them now, which is not what it left at the last forward."""
    x = torch.randn(3, 4)
    for hooked in (nn.utils.weight_norm, nn.utils.spectral_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these forms are deprecated
            model = nn.Sequential(hooked(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)).eval()
        model.load_state_dict({name: torch.rand_like(value) for name, value in model.state_dict().items()})
        explainer = sp_fx.transform(model)
        assert torch.equal(explainer(x), model(x))
        assert explainer.report().notes == (
            "the hook of 0 computes its weight, as it was at transform: after an update, transform again",
        )


def test_hooks_that_do_not_run_are_told():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def triple(module, args, output):
        return 3 * output

    model[0].register_forward_hook(triple)
    model.register_forward_pre_hook(lambda module, args: None)
    with pytest.warns(UserWarning, match="triple, does not run"):
        explainer = sp_fx.transform(model)
    told = " ".join(explainer.report().notes)
    assert sp_fx.check(explainer, torch.randn(2, 4), model=model)["forward"].verdict == "FAILED"
    assert "the hook of 0, " in told and "triple, does not run" in told and "the model's own hook" in told


class Act:
    """A callable of a plain class that holds the model."""

    def __init__(self, owner):
        self.owner = owner

    def __call__(self, x):
        return self.owner.lin(x).relu() * self.owner.scale


class Slots:
    __slots__ = ("layer",)


def doubling(layer):
    return lambda x, again=layer: again(layer(x)).relu()


HOLDERS = {
    "a closure": lambda m: lambda x: m.lin(x).relu() * m.scale,
    "a closure over a layer, and a default": lambda m: doubling(m.lin),
    "a closure over a closure": lambda m: (lambda inner: lambda x: inner(x) * 2)(lambda x: m.lin(x).relu()),
    "a closure that calls itself": lambda m: recursive(m),
    "an object": Act,
    "a method of an object": lambda m: Act(m).__call__,
    "objects in a list": lambda m: (lambda acts: lambda x: acts[0](acts[1](x)))([Act(m), Act(m)]),
    "a partial": lambda m: functools.partial(lambda act, x: act(x), Act(m)),
    "slots": lambda m: (lambda held: setattr(held, "layer", m.lin) or (lambda x: held.layer(x).relu()))(Slots()),
    "a weak reference": lambda m: (lambda ref: lambda x: ref().lin(x).relu())(weakref.ref(m)),
    "a compiled function": lambda m: torch.compile(m.method),
}


def recursive(m):
    def apply(x, times=2):
        return apply(m.lin(x).relu(), times - 1) if times else x

    return apply


@pytest.mark.parametrize("name", HOLDERS)
def test_what_holds_the_model_holds_the_clone(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.scale = nn.Linear(4, 4), nn.Parameter(torch.tensor(2.0))

        def method(self, x):
            return self.lin(x).relu() * self.scale

        def forward(self, x):
            return self.function(x) * (2 if self.training else 1)

    model, x = Net().eval(), torch.randn(2, 4)
    model.function = HOLDERS[name](model)
    expected = (HOLDERS[name](model) if name != "a compiled function" else model.method)(x)
    explainer = sp_fx.transform(model.train(), tracer="fx")
    assert torch.equal(explainer(x), expected)
    with torch.no_grad():
        model.lin.weight.mul_(2)
    updated = (model.method if name == "a compiled function" else model.function)(x)
    assert torch.equal(explainer(x), updated) and not torch.equal(updated, expected)  # the weights are the model's
    assert explainer.double()(x.double()).dtype == torch.float64 and model.lin.weight.dtype == torch.float32
    assert all(site.status == "rewritten" for site in explainer.report().sites)


def test_modules_that_are_none_of_the_models_are_named_as_such():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(4, 4)]  # in a list: registered nowhere

        def forward(self, x):
            return self.layers[0](x).relu()

    with pytest.raises(
        sp_fx.CaptureError, match=r"calls a module that is none of the model's: make it.*test_capture_clone.py:\d+"
    ):
        sp_fx.transform(Net())


def test_attributes_of_parameters_and_embeddings_of_a_norm():
    """What a library notes on a parameter is read by the clone's forward; a weight that a forward scales is a copy, and told."""

    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4, max_norm=1.0), nn.Linear(4, 3)
            self.head.weight.times = 2.0

        def forward(self, ids):
            return torch.relu(self.head(self.table(ids))) * self.head.weight.times

    model, ids = fill(Noted()), torch.tensor([[0, 3], [6, 2]])
    explainer = sp_fx.transform(model)
    assert relative(explainer(ids), model(ids)) <= 1e-6
    assert any("table scales its weight by max_norm" in note for note in explainer.report().notes)
