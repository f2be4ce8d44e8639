"""The model goes in and comes out as it was; the graph sees every call site."""

import collections
import contextlib
import copy
import dataclasses
import functools
import pickle
import threading
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import sp_fx
from helpers import relative
from sp_fx.capture.clone import EvalClone
from sp_fx.program.folding import folded
from sp_fx.program.graph import one_graph


class Shared(nn.Module):
    """One in-place ReLU module for three calls, a functional one, a method, a dropout, and a BatchNorm in train mode."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        x = self.act(self.conv(x))
        x = F.relu(self.conv(x), inplace=True) + self.act(self.conv(x))
        return self.head(self.body(x).relu().mean((2, 3)))


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


def test_call_sites_each_have_a_line():
    report = sp_fx.transform(Shared()).report()
    assert [s.place for s in report.of("rewritten")] == ["act", "act#2", "relu", "act#3", "body.2", "relu#2"]
    assert not report.of("NOT REWRITTEN")


def test_train_mode_does_not_reach_the_graph():
    model = Shared().train()
    explainer = sp_fx.transform(model)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(explainer(x), copy.deepcopy(model).eval()(x))
    assert torch.equal(explainer(x), explainer(x))  # no dropout
    assert explainer.eval() is explainer and not explainer.training


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
    assert isinstance(explainer.body, nn.Sequential) and explainer.body[0] is explainer.get_submodule("body.0")
    assert dict(explainer.named_parameters()).keys() == dict(model.named_parameters()).keys()


def test_compiled_and_parallel_models_are_unwrapped():
    model = Shared().eval()
    x = torch.randn(1, 3, 8, 8)
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        assert torch.equal(sp_fx.transform(wrapped)(x), model(x))
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


def test_arguments_with_defaults_are_settings():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x, mask=None, gate=True):
            x = x if mask is None else x * mask
            return self.head(x.relu() if gate else x)

    explainer = sp_fx.transform(Masked())
    x = torch.randn(3, 4)
    assert explainer.pullback(x, 0, forward_kwargs={"mask": None, "gate": True}).shape == x.shape
    with pytest.raises(AssertionError, match="gate has been specialized to have value True"):
        explainer(x, gate=False)


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


def test_forwards_set_on_instances_are_the_ones_traced():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].forward = types.MethodType(lambda self, x: F.silu(F.linear(x, self.weight)), model[0])
    outer = nn.Sequential(model)
    outer.forward = types.MethodType(lambda self, x: self[0](x) * 2, outer)
    x = torch.randn(3, 4)
    explainer = sp_fx.transform(outer)
    assert torch.equal(explainer(x), outer(x))
    assert [s.kind for s in explainer.report().of("rewritten")] == ["silu", "relu"]
    outer.forward = lambda x: x
    with pytest.raises(sp_fx.CaptureError, match="subclass it instead"):
        sp_fx.transform(outer)


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
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module"):
        sp_fx.transform(bad)


def test_models_without_source_and_explainers_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated
        scripted = torch.jit.script(nn.ReLU())
    with pytest.raises(TypeError, match="no Python source"):
        sp_fx.transform(scripted)
    with pytest.raises(TypeError, match="got an Explainer"):
        sp_fx.transform(sp_fx.transform(nn.ReLU()))
    with pytest.raises(TypeError, match="lazy"):
        sp_fx.transform(nn.Sequential(nn.LazyLinear(3), nn.ReLU()))


def test_a_model_without_gates_says_so():
    with pytest.warns(UserWarning, match="no gate to rewrite: its pullback will be the plain gradient"):
        sp_fx.transform(nn.Linear(3, 2))


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


def test_containers_of_every_kind_stay_the_models():
    @dataclasses.dataclass
    class Record:
        last: object = None

    class Store:
        last = None

    class Logging(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.log, self.space, self.record = collections.deque(maxlen=2), types.SimpleNamespace(last=None), Record()
            self.store = Store()
            self.ordered, self.layers = collections.OrderedDict(last=None), collections.OrderedDict(first=self.layer)
            self.round = {}
            self.round["itself"] = self.round

        def forward(self, x):
            y = self.layers["first"](x)
            self.log.append(y)
            self.space.last = self.record.last = self.ordered["last"] = self.store.last = self.store.new = y
            return y.relu()

    model, x = Logging(), torch.randn(2, 4)
    explainer = sp_fx.transform(model)
    assert not model.log and model.space.last is model.record.last is model.ordered["last"] is model.store.last is None
    assert not hasattr(model.store, "new")
    assert torch.equal(explainer(x), model(x)) and len(model.log) == 1


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
    one_graph(lambda model, x: [model(x)], folded(explainer), [x], False)
    done.set()
    worker.join(30)
    assert not failed, failed[0]


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, v):
        return v


def test_a_function_of_ones_own_keeps_its_backward():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return StraightThrough.apply(self.layer(x)).relu()

    model, x = Net(), torch.randn(2, 4)
    apply = torch.autograd.Function.__dict__["apply"]
    with pytest.warns(UserWarning, match="StraightThrough is opaque to the trace"):
        explainer = sp_fx.transform(model, rules=sp_fx.Rules(relu=None))
    assert torch.autograd.Function.__dict__["apply"] is apply
    y = x.clone().requires_grad_()
    expected = torch.autograd.grad(model(y)[:, 1].sum(), y)[0]
    assert torch.equal(explainer.pullback(x, 1), expected) and expected.any()
    again = pickle.loads(pickle.dumps(explainer))
    assert torch.equal(again.pullback(x, 1), expected)


def test_graph_modules_go_through():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(3, 4)
    traced = torch.fx.symbolic_trace(model)
    explainer = sp_fx.transform(traced)
    assert torch.equal(explainer(x), traced(x))
    assert torch.equal(explainer.pullback(x, 1), sp_fx.transform(model).pullback(x, 1))


def test_children_with_an_explainers_names():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.graph, self.meta, self.split = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)
            self.report, self.graph_ = nn.Parameter(torch.rand(4)), nn.Identity()

        def forward(self, x):
            return self.split(self.meta(self.graph_(self.graph(x) * self.report)))

    model, x = Net(), torch.randn(3, 4)
    explainer = sp_fx.transform(model)
    assert torch.equal(explainer(x), model(x)) and explainer.get_submodule("graph__").weight.shape == (4, 4)
    assert any("the model's graph is called graph__ here" in note for note in explainer.report().notes)
    assert explainer.pullback(x, 1, wrt="meta_").shape == (3, 4)
    assert {name for name, _ in model.named_children()} == {"graph", "meta", "split", "graph_"}


@pytest.mark.parametrize("name", ["_report", "_splits", "_splitting", "_origin", "_tracer_cls", "_code"])
def test_children_with_an_explainers_private_names(name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, nn.Linear(4, 4))
            self.act, self.head = nn.ReLU(), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.act(getattr(self, name)(x)))

    model, x = Net(), torch.randn(3, 4)
    plain = nn.Sequential(getattr(model, name), model.act, model.head)  # the same layers, by names that are nobody's
    explainer = sp_fx.transform(model)
    assert torch.equal(explainer(x), model(x))
    assert torch.equal(explainer.pullback(x, 1), sp_fx.transform(plain).pullback(x, 1))
    assert explainer.get_submodule(f"{name}_") is not None and list(dict(model.named_children())) == [name, "act", "head"]
    again = pickle.loads(pickle.dumps(explainer))
    assert torch.equal(again.pullback(x, 1), explainer.pullback(x, 1))


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


def test_what_a_trace_puts_into_containers_is_taken_out():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.cache = nn.Linear(4, 2), {}

        def forward(self, x):
            self.cache["last"] = self.layer(x)
            self.cache.setdefault("all", []).append(self.cache["last"])
            return self.cache["last"].relu()

    explainer, x = sp_fx.transform(Caching()), torch.randn(3, 4)
    again = pickle.loads(pickle.dumps(copy.deepcopy(explainer)))
    assert torch.equal(again.pullback(x, 1), explainer.pullback(x, 1))
