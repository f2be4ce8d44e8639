"""The model goes in and comes out as it was; the graph sees every call site."""

import collections
import contextlib
import functools
import threading
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import Shared, fill
from sp_fx.gates.dual_path import plain_derivatives
from sp_fx.program.graphs.folding import folded
from sp_fx.program.graphs.graph import one_graph


def state(model):
    return {
        "classes": [type(m) for m in model.modules()],
        "modes": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "dicts": [sorted(m.__dict__) for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "values": [t.clone() for t in model.state_dict().values()],
        "ids": [id(t) for t in (*model.parameters(), *model.buffers())],
    }


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.pop("values"), b.pop("values"))) and a == b


def test_the_model_is_not_touched_by_anything():
    torch.manual_seed(0)
    model = Shared().train()
    fired = []
    for m in model.modules():
        m.register_forward_hook(lambda *_: fired.append(1))
    model.head.weight.requires_grad_(False)
    before = state(model)
    with pytest.warns(UserWarning, match="does not run"):
        explainer = sp_fx.transform(model)
    x = torch.randn(2, 3, 8, 8)
    explainer.pullback(x, 1)
    explainer.ascend(x, 1, steps=2)
    with pytest.raises(IndexError):
        explainer.pullback(x, 99)
    with pytest.raises(RuntimeError):
        explainer.pullback(torch.randn(2, 7, 8, 8), 1)
    with pytest.warns(UserWarning, match="eval mode"):
        explainer.train()
    explainer.half().requires_grad_(False).double()
    explainer.conv.weight.data.add_(1)
    assert same(before, state(model)) and not fired
    assert explainer.conv.weight.dtype == torch.float64 and model.conv.weight.dtype == torch.float32


def test_failures_of_transform_leave_the_model_alone():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            x = self.act(x)
            return x if x.sum() > 0 else -x

    model = Branches().train()
    before = state(model)
    with pytest.raises(sp_fx.CaptureError, match=r"test_capture_symbolic.py:\d+, in forward"):
        sp_fx.transform(model)
    assert same(before, state(model))


def test_call_sites_each_have_a_line():
    report = sp_fx.transform(Shared()).report()
    assert [s.place for s in report.of("rewritten")] == ["act", "act#2", "relu", "act#3", "body.2", "relu#2"]
    assert not report.of("NOT REWRITTEN")


def test_modules_keep_their_names_and_can_be_hooked():
    model = Shared().eval()
    explainer = sp_fx.transform(model)
    x, seen, expected = torch.randn(2, 3, 8, 8), {}, {}
    for name in ("conv", "bn", "act", "body", "body.0", "body.2", "head"):
        explainer.get_submodule(name).register_forward_hook(lambda m, a, y, n=name: seen.setdefault(n, []).append(y.clone()))
        model.get_submodule(name).register_forward_hook(lambda m, a, y, n=name: expected.setdefault(n, []).append(y.clone()))
    explainer(x), model(x)
    assert seen.keys() == expected.keys()
    for name in seen:
        assert all(torch.equal(a, b) for a, b in zip(seen[name], expected[name], strict=True)), name
    assert explainer.body[0] is explainer.get_submodule("body.0") and len(explainer.body) == len(model.body)
    assert dict(explainer.named_parameters()).keys() == dict(model.named_parameters()).keys()


def test_arguments_with_defaults_are_settings():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x, mask=None, gate=True):
            x = x if mask is None else x * mask
            return self.head(x.relu() if gate else x)

    model, x = Masked().eval(), torch.randn(3, 4)
    explainer = sp_fx.transform(model, tracer="fx")
    assert explainer.pullback(x, 0, forward_kwargs={"mask": None, "gate": True}).shape == x.shape
    assert torch.equal(explainer(x), model(x)) and torch.equal(explainer(x, gate=False), model(x, gate=False))
    assert "another form of call was captured: x float32 [3, 4], gate False, by torch.fx" in str(explainer.report())
    for mask in (torch.rand(4), torch.rand(3, 4)):
        assert torch.equal(explainer(x, mask), model(x, mask)) and torch.equal(explainer(x, mask=mask), model(x, mask))
    assert str(explainer.report()).count("another form") == 2
    with pytest.raises(AssertionError, match="gate has been specialized to have value True"):
        explainer.split("head")[0](x, gate=False)  # a part of it, which cannot be captured again


def test_forwards_set_on_instances_are_the_ones_traced():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].forward = types.MethodType(lambda self, x: F.silu(F.linear(x, self.weight)), model[0])
    outer = nn.Sequential(model)
    outer.forward = types.MethodType(lambda self, x: self[0](x) * 2, outer)
    x = torch.randn(3, 4)
    explainer = sp_fx.transform(outer)
    assert torch.equal(explainer(x), outer(x))
    assert [s.kind for s in explainer.report().of("rewritten")] == ["silu", "relu"]
    outer.forward = lambda x: outer[0](x) * 3  # which calls the clone's own
    assert torch.equal(sp_fx.transform(outer)(x), outer(x))
    outer.forward = functools.update_wrapper(functools.partial(thrice, outer), model.forward)
    for tracer in ("fx", "export"):
        assert torch.equal(sp_fx.transform(outer, tracer=tracer, example_inputs=x)(x), outer(x))


def thrice(module, *args, scale=1.0, **kwargs):
    """As libraries put forwards in place: with the module in front, and the signature of what was there."""
    return module[0](*args, **kwargs) * 3 * scale


@torch.fx.wrap
def traceable(x, slope):
    return F.leaky_relu(x, slope) if slope else x


@torch.fx.wrap
def opaque(x):
    return x.relu() if x.shape[0] > 1 else x.clamp(min=0)


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.head = function, nn.Linear(4, 2)

    def forward(self, x):
        return self.head(traceable(x, 0.3) if self.function == "traceable" else opaque(x))


def test_wrapped_functions_are_opened_where_they_trace():
    x = torch.randn(2, 4)
    model = Calls("traceable")
    explainer = sp_fx.transform(model)
    assert [s.kind for s in explainer.report().of("rewritten")] == ["leaky_relu"]
    assert torch.equal(explainer(x), model(x))


def test_wrapped_functions_that_do_not_trace_are_listed():
    model = Calls("opaque")
    with pytest.warns(UserWarning, match="NOT REWRITTEN.*opaque"):
        explainer = sp_fx.transform(model)
    assert [s.op for s in explainer.report().of("NOT REWRITTEN")] == ["opaque"]
    with pytest.raises(sp_fx.NotRewrittenError, match="opaque"):
        sp_fx.transform(model, strict=True)


def test_leaves_that_may_hide_gates_are_listed():
    with pytest.warns(UserWarning, match="TransformerEncoderLayer"):
        explainer = sp_fx.transform(nn.Sequential(nn.TransformerEncoderLayer(8, 2, batch_first=True), nn.ReLU()))
    assert [s.place for s in explainer.report().of("NOT REWRITTEN")] == ["0"]


@pytest.mark.parametrize("bad", [3, "resnet50", torch.relu, None])
def test_what_is_no_module_is_refused(bad):
    for options in ({}, {"example_inputs": torch.ones(2)}, {"example_inputs": torch.ones(2), "tracer": "export"}):
        with pytest.raises(TypeError, match=r"expected a torch.nn.Module"):
            sp_fx.transform(bad, **options)


def test_models_without_source_and_explainers_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        scripted = torch.jit.script(nn.ReLU())
    for options in ({}, {"example_inputs": torch.ones(2)}, {"example_inputs": torch.ones(2), "tracer": "export"}):
        with pytest.raises(TypeError, match="no Python source"):
            sp_fx.transform(scripted, **options)
    with pytest.raises(TypeError, match="got an Explainer"):
        sp_fx.transform(sp_fx.transform(nn.ReLU()))
    with pytest.raises(TypeError, match="lazy"):
        sp_fx.transform(nn.Sequential(nn.LazyLinear(3), nn.ReLU()))


def test_a_model_without_gates_says_so():
    with pytest.warns(UserWarning, match="no gate to rewrite: its pullback will be the plain gradient"):
        sp_fx.transform(nn.Linear(3, 2))


def test_an_explainer_runs_while_others_are_made():
    """`torch.fx` patches nn.Module for all threads, and a compilation puts stand-ins for weights into modules."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)).eval()
    explainer, x = sp_fx.transform(model), torch.randn(2, 3, 8, 8)
    expected, failed, done = explainer.pullback(x, 1), [], threading.Event()

    def work():
        while not done.is_set():
            try:
                assert torch.equal(explainer.pullback(x, 1), expected)
            except Exception as error:
                failed.append(repr(error))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    for _ in range(20):
        sp_fx.transform(nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)], nn.ReLU()))
    one_graph(lambda model, x: [model({"input": x})], folded(explainer), [x], [x.shape])
    done.set()
    worker.join(30)
    assert not failed, failed[0]


def test_graph_modules_go_through():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(3, 4)
    traced = torch.fx.symbolic_trace(model)
    explainer = sp_fx.transform(traced)
    assert torch.equal(explainer(x), traced(x))
    assert torch.equal(explainer.pullback(x, 1), sp_fx.transform(model).pullback(x, 1))


def test_outputs_stay_of_their_kind():
    class Net(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.layer, self.kind = nn.Linear(4, 2), kind

        def forward(self, x):
            return self.kind(logits=self.layer(x).relu())

    kinds = [collections.OrderedDict, dict]
    with contextlib.suppress(ImportError):
        from transformers.modeling_outputs import SequenceClassifierOutput

        kinds.append(SequenceClassifierOutput)
    for kind in kinds:
        explainer, x = sp_fx.transform(Net(kind)), torch.randn(3, 4)
        assert type(explainer(x)) is kind and explainer.pullback(x, 1).shape == x.shape


def test_names_that_are_words_of_python():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            branches = nn.ModuleDict({"if": nn.Linear(4, 3), "pass": nn.Sequential(nn.Linear(4, 3), nn.ReLU())})
            self.heads = nn.ModuleDict({"class": branches, "box": nn.Linear(4, 3), "class_": nn.Identity()})
            self.register_parameter("lambda", nn.Parameter(torch.rand(4)))

        def forward(self, x):
            h = self.heads["class_"](self.layer(x).relu() * getattr(self, "lambda"))
            return self.heads["class"]["if"](h) + self.heads["class"]["pass"](h) + self.heads["box"](h)

    model, x = Net(), torch.randn(2, 4)
    explainer = sp_fx.transform(model, example_inputs=x)
    with pytest.raises(sp_fx.CaptureError, match=r"heads.class has a word of Python's own.*rename it"):
        sp_fx.transform(model, tracer="export", example_inputs=x)
    assert torch.equal(explainer(x), model(x)) and explainer.pullback(x, 1, wrt="heads.class__.pass_").shape == (2, 3)
    assert "the model's heads.class.if is called heads.class__.if_ here" in " ".join(explainer.report().notes)
    assert list(model.heads) == ["class", "box", "class_"] and isinstance(model.heads["class"]["if"], nn.Linear)


def wraps(forward):
    """A decorator as libraries have them, which takes whatever comes."""

    @functools.wraps(forward)
    def wrapped(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return wrapped


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    @wraps
    @wraps
    def forward(self, x, mask=None, *rest, scale=None, **more):
        h = self.layer(x).relu()
        for r in (mask, *rest):
            h = h if r is None else h * r
        return h if "more" not in more else h + more["more"].relu() * (2 if scale is None else scale)


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
CALLS = [
    ((X,), {}),
    ((X, X + 1), {}),
    ((X, X + 1, X + 2, X + 3), {}),
    ((X,), {"scale": 3, "more": X + 4}),
    ((X,), {"more": X + 4, "mask": X + 1}),
    ((X, X + 1, X + 2), {"more": X + 4, "scale": 0.5}),
]


@pytest.mark.parametrize("example", [None, *CALLS[:-1]])  # no mapping says what is in `*rest`
def test_a_wrapped_forward_takes_what_it_says(example):
    model = fill(Wrapped())
    args, kwargs = example or CALLS[0]
    named = example and (args if not kwargs else {**dict(zip(("x", "mask"), args)), **kwargs})
    explainer = sp_fx.transform(model, tracer="fx", example_inputs=named)
    assert torch.equal(explainer(*args, **kwargs), model(*args, **kwargs))
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(x, *args[1:], **kwargs).sum(), x)
    with plain_derivatives():
        (found,) = torch.autograd.grad(explainer(x, *args[1:], **kwargs).sum(), x)
    assert torch.equal(found, expected)
    for other, more in CALLS:  # right, or refused
        with contextlib.suppress(sp_fx.CaptureError, AssertionError):
            y = explainer(*other, **more)
            assert torch.equal(y, model(*other, **more)) or pytest.fail(f"{len(other)}, {more}")
