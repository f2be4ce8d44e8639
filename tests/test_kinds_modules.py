"""Modules that are not only a forward: their own calls and copies, what hooks see, what a forward leaves behind, their names."""

import array
import copy
import functools
import io
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill, relative
from kinds import (
    PLAIN,
    WAYS,
    assert_clear,
    assert_forward,
    assert_kind,
    assert_same_map,
    explain,
    net,
    noise,
    score,
)

X = noise(4, 6)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(8, 8)

    def forward(self, x, mask=None):
        y = F.relu(self.l(x))
        return y if mask is None else y * mask


# -- modules with a __call__ of their own --------------------------------------------------------------------------------------


class Doubling(Layer):
    def __call__(self, x):
        return super().__call__(x) * 2


class Shifting(Layer):
    """Prepares its input, as kornia's ImageModule and PyTorch Geometric's aggregations do."""

    def __call__(self, x):
        return super().__call__(x - 1)


class PassingOn(Layer):
    def __call__(self, x, mask=None):
        return super().__call__(x, mask=mask)


class Wrapping(Layer):
    """Returns a tuple, where its forward returns a tensor."""

    def __call__(self, x):
        return super().__call__(x), x


OWN_CALLS = {
    Doubling: (lambda m, h: m.part(h), lambda m, h: F.relu(m.part.l(h)) * 2),
    Shifting: (lambda m, h: m.part(h), lambda m, h: F.relu(m.part.l(h - 1))),
    PassingOn: (lambda m, h: m.part(h, mask=torch.ones(8)), lambda m, h: F.relu(m.part.l(h))),
    Wrapping: (lambda m, h: m.part(h)[0] + m.part(h)[1], lambda m, h: F.relu(m.part.l(h)) + h),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", OWN_CALLS, ids=lambda c: c.__name__)
def test_a_call_of_its_own(part, way):
    body, spelled = OWN_CALLS[part]
    model, spelling = net(body, part=part()), net(spelled, part=Layer())
    assert_kind(model, spelling, X, way)
    if way != "export":
        again = pickle.loads(pickle.dumps(explain(model, X, way)))
        assert_same_map(again, model, spelling, X)


class Root(nn.Module):
    """The model itself has one."""

    def __init__(self):
        super().__init__()
        self.net = net(lambda m, h: F.relu(h))

    def __call__(self, x):
        return super().__call__(x) * 3

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_with_a_call_of_its_own(way):
    model = Root()
    explainer = explain(model, X, way)
    assert torch.equal(explainer(X), model(X))
    assert relative(explainer.pullback(X, score), 3 * explain(model.net, X, "no example").pullback(X, score)) <= 1e-9


# -- copies --------------------------------------------------------------------------------------------------------------------


class Rearranging(nn.Module):
    """Keeps no derived state in copies, as einops layers do: `__setstate__` makes it anew."""

    def __init__(self, *axes):
        super().__init__()
        self.axes = axes
        self.recipe = self.made()

    def made(self):
        return tuple(self.axes)

    def __getstate__(self):
        return {"axes": self.axes}

    def __setstate__(self, state):
        super().__init__()
        self.axes = state["axes"]
        self.recipe = self.made()

    def forward(self, x):
        return x.permute(self.recipe)


class Copied(nn.Module):
    """Copies itself its own way."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(8, 8)

    def __deepcopy__(self, memo):
        new = type(self)()
        new.load_state_dict(self.state_dict())
        return new.to(self.l.weight.dtype)

    def __reduce__(self):
        return _rebuilt, (self.state_dict(),)

    def forward(self, x):
        return F.relu(self.l(x))


def _rebuilt(state):
    new = Copied().to(state["l.weight"].dtype)
    new.load_state_dict(state)
    return new


def saved_and_loaded(explainer):
    file = io.BytesIO()
    torch.save(explainer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda e: pickle.loads(pickle.dumps(e)),
    "torch.save": saved_and_loaded,
    "twice": lambda e: pickle.loads(pickle.dumps(copy.deepcopy(e))),
}


def rearranged(m, h):
    y = m.part(h[:, :, None].expand(-1, -1, 8))
    return torch.relu(m.more(y)).mean(1)


def of_einops():
    layers = pytest.importorskip("einops.layers.torch")
    return layers.Rearrange("b c w -> b w c")


PARTS = {
    "its own __setstate__": (rearranged, lambda: Rearranging(0, 2, 1)),
    "its own __deepcopy__": (lambda m, h: m.part(h) + h, Copied),
    "an einops layer": (rearranged, of_einops),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PARTS)
def test_copies_have_the_same_map(name, way):
    body, part = PARTS[name]
    model = net(body, part=part())
    try:
        explainer = explain(model, X, way)
    except sp_fx.CaptureError as error:  # an einops layer asks for sizes
        assert way == "no example" and "einops" in name
        return assert_clear(error)
    assert_forward(explainer, model, X)
    maps = explainer.pullback(X, 1)
    for how, copied in COPIES.items():
        other = copied(explainer)
        assert torch.equal(other(X), model(X)), how
        assert torch.equal(other.pullback(X, 1), maps), how
    assert relative(explainer.calibrate(X)(X), model(X)) == 0
    assert sp_fx.check(explainer, X)
    assert_forward(explainer, model, X)  # whoever was copied is what it was


def test_copies_of_an_explainer_that_has_not_run():
    """What its first call finds out belongs to the copy too."""
    model = net(lambda m, h: F.relu(m.more(h)))
    explainer = explain(model, X, "no example")
    copies = {how: copied(explainer) for how, copied in COPIES.items()}
    maps = explainer.pullback(X, 1)
    for how, other in copies.items():
        assert torch.equal(other.pullback(X, 1), maps), how


# -- what hooks see ------------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(8, 8)

    def forward(self, x, factor=2.0):
        return F.relu(self.l(x)), x * factor


class Named(Pair):
    def forward(self, x, factor=2.0):
        return {"gate": F.relu(self.l(x)), "other": x * factor}


class Inner(nn.Module):
    """A tuple, a dict and keywords inside."""

    def __init__(self):
        super().__init__()
        self.pair, self.named, self.act, self.norm = Pair(), Named(), nn.ReLU(), nn.LayerNorm(8)
        self.pool = nn.MaxPool1d(2, 1, ceil_mode=True)

    def forward(self, x, y):
        a, b = self.pair(x)
        named = self.named(self.act(b - 0.1), factor=1.5)
        return self.norm(named["gate"] + named["other"] + a + y)


def with_inner(m, h):
    return m.block(h, m.more(h))


def calls_of(model, x):
    """What forward hooks of each module see: the tensors of its arguments, and of its output."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if name and isinstance(module, nn.Module):

            def hook(module, args, output, name=name):
                seen.setdefault(name, []).append((flat(args), flat(output)))

            handles.append(module.register_forward_hook(hook))
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value.detach().clone()]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in flat(item)] if isinstance(value, tuple | list) else []


@pytest.mark.parametrize("way", WAYS)
def test_hooks_see_inputs_and_outputs(way):
    model = net(with_inner, block=Inner())
    expected, calls = calls_of(model, X), calls_of(explain(model, X, way), X)
    for name, ((args, outputs),) in expected.items():
        assert name in calls, name
        ((seen_args, seen_outputs),) = calls[name]
        assert len(seen_args) == len(args) and all(map(torch.equal, seen_args, args)), f"{name}: inputs"
        assert len(seen_outputs) == len(outputs) and all(map(torch.equal, seen_outputs, outputs)), f"{name}: outputs"


@pytest.mark.parametrize("way", WAYS)
def test_hooks_see_gradients(way):
    """Backward hooks of a module get the gradient of its output, the model's own under plain rules."""
    model = net(with_inner, block=Inner())
    explainer = explain(model, X, way, rules=sp_fx.Rules(**PLAIN))
    gradients = []
    for each in (model, explainer):
        seen = []
        handle = each.block.norm.register_full_backward_hook(lambda m, before, after, seen=seen: seen.append(after))
        score(each(X.clone().requires_grad_())).sum().backward()
        handle.remove()
        ((output,),) = seen
        gradients.append(output)
    assert relative(*reversed(gradients)) <= 1e-9


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_that_returns_something_changes_what_follows(way):
    model = net(lambda m, h: F.relu(m.block(h)), block=nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    outputs = []
    for each in (model, explain(model, X, way)):
        handle = each.block.register_forward_hook(lambda module, args, output: output * 2)
        outputs.append(each(X).detach())
        handle.remove()
        assert not torch.equal(each(X), outputs[-1])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("way", WAYS)
def test_modules_are_of_a_real_class(way):
    """What makes a module pass on its value is its class, not an attribute of the instance that a copy may lose."""
    explainer = explain(net(with_inner, block=Inner()), X, way)
    for name, module in explainer.named_modules():
        if name:
            assert "forward" not in vars(module), name
            assert isinstance(module, nn.Module) and isinstance(type(module).forward, types.FunctionType), name


def test_captum_attributes_to_a_layers_input():
    attr = pytest.importorskip("captum.attr")
    model = net(lambda m, h: m.block(torch.tanh(h)), block=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    explainer = explain(model, X, "no example")
    for inner in (False, True):
        for method in (attr.LayerActivation,):
            ours, theirs = (method(m, m.block).attribute(X, attribute_to_layer_input=inner) for m in (explainer, model))
            ours, theirs = ((t[0] if isinstance(t, tuple) else t) for t in (ours, theirs))
            assert torch.equal(ours, theirs), inner
    plain = explain(model, X, "no example", rules=sp_fx.Rules(**PLAIN))
    ours, theirs = (
        attr.LayerGradientXActivation(m, m.block).attribute(X, target=1, attribute_to_layer_input=True) for m in (plain, model)
    )
    ours, theirs = ((t[0] if isinstance(t, tuple) else t) for t in (ours, theirs))
    assert relative(ours, theirs) <= 1e-9


# -- what the forward leaves behind: never a trace in the model ----------------------------------------------------------------


class Helper:
    """A plain object that a model holds."""

    def __init__(self):
        self.cache, self.step, self.seen, self.last = [], 0, {}, None


FEATURES = {}
TIMES = array.array("b")  # which no trace puts back, as it does lists


def kept_in_a_helper(m, h):
    h = F.relu(h)
    m.helper.step += 1
    m.helper.cache.append(h)
    m.helper.seen["h"] = h
    m.helper.last = h
    return h


def kept_in_a_module_level_dict(m, h):
    FEATURES["h"] = F.relu(h)
    return FEATURES["h"]


def kept_in_an_own_dict(m, h):
    m.features["h"] = F.relu(h)
    m.stages.append(h)
    return m.features["h"]


class Frozen(dict):
    """A dictionary that refuses to be refilled, as frozen configurations are."""

    def __setitem__(self, key, value):
        raise TypeError("frozen")

    def update(self, *args, **kwargs):
        raise TypeError("frozen")

    def clear(self):
        raise TypeError("frozen")

    def __deepcopy__(self, memo):
        return Frozen(self)


@pytest.mark.parametrize("way", WAYS)
def test_objects_of_the_model_stay_as_they_were(way):
    FEATURES.clear()
    model = net(kept_in_a_helper, helper=Helper())
    other = net(kept_in_an_own_dict, features={}, stages=[])
    third = net(kept_in_a_module_level_dict)
    for each in (model, other, third):
        explainer = explain(each, X, way)
        explainer.pullback(X, 1)
    assert model.helper.step == 0 and model.helper.cache == [] and model.helper.seen == {} and model.helper.last is None
    assert other.features == {} and other.stages == [] and FEATURES == {}
    assert_forward(explain(model, X, way), model, X)
    model(X)
    assert model.helper.step >= 1 and model.helper.cache  # still the model's own


@pytest.mark.parametrize("way", WAYS)
def test_a_dictionary_that_refuses_to_be_refilled(way):
    model = net(lambda m, h: F.relu(h) * m.config["scale"], config=Frozen(scale=2.0))
    assert_kind(model, net(lambda m, h: F.relu(h) * 2.0), X, way)
    assert model.config == {"scale": 2.0}


def test_a_forward_is_traced_once():
    def counted(m, h):
        if not isinstance(h, torch.Tensor) or isinstance(h, torch.fx.Proxy):
            TIMES.append(1)
        return F.relu(h)

    del TIMES[:]
    explain(net(counted), X, "no example")
    assert len(TIMES) == 1


class Activation:
    """A callable that is no module, and holds the module whose parameter it uses."""

    def __init__(self, owner):
        self.owner = owner

    def __call__(self, x):
        return F.relu(x) * self.owner.shift.exp()


class HoldsItself(nn.Module):
    """Its forward goes through functions that hold the model itself."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.more, self.head, self.shift = (
            nn.Linear(6, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
            nn.Parameter(torch.zeros(8)),
        )
        self.how = how
        if how == "a lambda":
            self.act = lambda x: F.relu(self.more(x))
        elif how == "a closure of the layer":
            layer = self.more

            def act(x):
                return F.relu(layer(x))

            self.act = act
        elif how == "a callable":
            self.act = Activation(self)
        else:
            self.act = types.SimpleNamespace(layer=self.more)

    def forward(self, x):
        h = self.inner(x)
        return self.head(F.relu(self.act.layer(h)) if self.how == "a namespace" else self.act(h))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", ["a lambda", "a closure of the layer", "a callable", "a namespace"])
def test_functions_that_hold_the_model(how, way):
    model = fill(HoldsItself(how)).double()
    body = (lambda m, h: F.relu(h) * m.shift.exp()) if how == "a callable" else lambda m, h: F.relu(m.more(h))
    spelling = net(body)
    spelling.load_state_dict(model.state_dict(), strict=False)
    explainer = explain(model, X, way)
    assert_same_map(explainer, model, spelling, X)
    with torch.no_grad():  # the weights are shared through such a function as elsewhere
        model.more.weight.mul_(1.5)
        model.shift.add_(0.5)
    assert torch.equal(explainer(X), model(X))


def replaced(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return wrapper


def replaced_without_a_signature(forward):
    return lambda self, *args, **kwargs: forward(self, *args, **kwargs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("decorator", [replaced, replaced_without_a_signature], ids=lambda f: f.__name__)
def test_a_forward_that_a_decorator_replaced(decorator, way):
    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        @decorator
        def forward(self, x):
            return self.head(F.relu(self.inner(x)))

    model, spelling = fill(Decorated()).double(), net(lambda m, h: F.relu(h))
    spelling.load_state_dict(model.state_dict(), strict=False)
    try:
        explainer = explain(model, X, way)
    except sp_fx.CaptureError as error:  # how many arguments there are is not known
        assert way == "no example" and decorator is replaced_without_a_signature
        return assert_clear(error)
    assert_same_map(explainer, model, spelling, X)


# -- names ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["class", "lambda", "a-b", "torch", "dual_path", "activation_", "__class", "0", "x", "training_"]
)
def test_names_of_children(name):
    """Keywords of Python, names of the graph's own and of its arguments."""

    class Names(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.head = nn.ModuleDict({name: nn.Linear(6, 8)}), nn.Linear(8, 3)
            self.add_module(name, nn.Linear(8, 8))

        def forward(self, x):
            return self.head(F.relu(self._modules[name](self.parts[name](x))))

    model = fill(Names()).double()
    plain = nn.Sequential(model.parts[name], model._modules[name], nn.ReLU(), model.head)
    for way in ("no example", "export") if name == "x" else ("no example",):  # torch.export writes no keywords
        explainer = explain(model, X, way)
        assert_same_map(explainer, model, plain, X)
        assert torch.equal(copy.deepcopy(explainer).pullback(X, 1), explainer.pullback(X, 1))
        assert explainer.pullback(X, 1, wrt=f"parts.{name}").shape == (4, 8)


def test_names_of_arguments():
    class Arguments(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(lambda m, h: F.relu(h))

        def forward(self, activation_, target=None, chunk=1.0):
            return self.net(activation_) * chunk

    model = Arguments()
    explainer = explain(model, X, "no example")
    expected = explain(model.net, X, "no example").pullback(X, score)
    assert relative(explainer.pullback(X, score, forward_kwargs={"chunk": 1.0}), expected) <= 1e-9
    try:
        assert relative(explainer.pullback(X, score, forward_kwargs={"chunk": 2.0}), 2 * expected) <= 1e-9
    except (ValueError, TypeError, AssertionError) as error:  # or an error that says which argument
        assert "chunk" in str(error)


@pytest.mark.parametrize("way", WAYS)
def test_a_refusal_is_short(way):
    """The line, the construct and what to do."""

    def halved(m, h):
        while float(h.norm()) > 1:  # a number, which is another one at each call
            h = h / 2
        return F.relu(h)

    with pytest.raises(sp_fx.CaptureError) as caught:
        explain(net(halved), X, way).pullback(X, 1)
    assert_clear(caught.value, WAYS[way][1])
    assert "test_kinds_modules.py" in str(caught.value)


@pytest.mark.parametrize("tracer", ["fx", "export"])
def test_hooks_see_what_a_module_was_entered_with(tracer):
    """The input of a ReLU in place is its pre-activation, though the output lies where it was."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU(inplace=True)

        def forward(self, h):
            h *= 2
            return self.act(h) + 1

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block, self.act = nn.Linear(6, 6), Block(), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.act(self.block(self.first(x).mT).mT - 2)

    model, x, seen = fill(Net()).double(), noise(3, 6), {}
    explainer = sp_fx.transform(model, tracer=tracer, example_inputs=x)
    assert torch.equal(explainer(x), model(x))
    names, handles = ("block", "block.act", "act"), []
    for which, module in {"model": model, "explainer": explainer}.items():
        for name in names:

            def hook(module, args, key=(which, name)):
                seen[key] = args[0].clone()

            handles.append(module.get_submodule(name).register_forward_pre_hook(hook))
        module(x)
    assert all(torch.equal(seen["explainer", name], seen["model", name]) for name in names)
    assert seen["explainer", "act"].min() < 0  # no ReLU has been there


@pytest.mark.parametrize("kind", ["fx", "export", "by name", "no example"])
def test_a_model_that_has_a_call_and_no_forward(kind):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 3)

        def __call__(self, x):
            return torch.relu(self.inner(x)) * 2

    model = fill(Net()).double()
    options = {"by name": {"example_inputs": {"x": X}}, "no example": {}}.get(kind, {"example_inputs": X, "tracer": kind})
    explainer = sp_fx.transform(model, **options)
    assert torch.equal(explainer(X), model(X)) and explainer.pullback(X, 1).abs().max() > 0


def test_a_model_that_was_made_in_inference_mode():
    with torch.inference_mode():
        model = fill(nn.Sequential(nn.Linear(6, 3), nn.ReLU())).double()
    explainer = sp_fx.transform(model)
    assert torch.equal(explainer(X), model(X)) and explainer.pullback(X, 1).abs().max() > 0
