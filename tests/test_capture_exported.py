"""Capture by torch.export: what symbolic tracing cannot follow, or goes round. The reference is always the model itself."""

import collections
import copy
import dataclasses
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill, gradient, relative


class Windows(nn.Module):
    """Branches on shapes, as windowed attention does, in a function that fx is told not to enter."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.norm(windowed(self.body(x))).mean(1))


@torch.fx.wrap
def windowed(x):
    if x.shape[-1] % 3:
        x = F.pad(x, (0, 3 - x.shape[-1] % 3))
    x = x.flatten(2).mT
    weights = torch.softmax(x @ x.mT / 2, -1)
    return F.dropout(weights, 0.0) @ x


class Encoder(nn.Module):
    def __init__(self, act="gelu"):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation=act, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x, mask=None):
        return self.head(self.layers(x, src_key_padding_mask=mask)[:, 0])


class Counts(nn.Module):
    """Branches on the batch."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x.relu()) * torch.ones(len(x.tolist()[0]) - 3) if x.shape[0] == 4 else self.head(x.relu() + 1)


def image(batch=1, side=8):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch))


def test_what_fx_goes_round_is_exported_where_there_is_an_example():
    model = fill(Windows())
    with pytest.warns(UserWarning, match="windowed is opaque.*pass example_inputs"):
        sp_fx.transform(model)
    explainer = sp_fx.transform(model, example_inputs=image())
    report = explainer.report()
    assert report.tracer == "torch.export" and "captured by torch.export" in str(report)
    rewritten = [(s.place, s.kind) for s in report.of("rewritten")]
    assert rewritten == [("body.2", "relu"), ("body.3", "max_pool"), ("softmax", "attention"), ("norm", "layer_norm")]
    assert not report.of("NOT REWRITTEN")
    for batch in (1, 2, 5):
        assert torch.equal(explainer(image(batch)), model(image(batch)))
        assert explainer.pullback(image(batch), 1).isfinite().all()


def test_a_trace_that_an_export_replaces_is_not_compared(monkeypatch):
    """A comparison runs the model and the graph: none is made of a graph that nobody gets."""
    compared, own = [], sp_fx.build.verified
    monkeypatch.setattr(sp_fx.build, "verified", lambda capture, *rest: compared.append(capture.tracer) or own(capture, *rest))
    assert sp_fx.transform(fill(Windows()), example_inputs=image()).report().tracer == "torch.export"
    assert compared == ["torch.export"] * 2  # on the example, and on two samples


def test_both_tracers_give_one_map():
    model = fill(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 3),
                               nn.GELU(), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 3)))  # fmt: skip
    by_fx = sp_fx.transform(model, tracer="fx")
    by_export = sp_fx.transform(model, tracer="export", example_inputs=image())
    assert by_export.report().sites == by_fx.report().sites
    assert torch.equal(by_fx.pullback(image(3), 1), by_export.pullback(image(3), 1))
    plain = sp_fx.Rules(**dict.fromkeys(sp_fx.gates.rules.KINDS))
    with pytest.warns(UserWarning, match="plain gradient"):
        plainly = sp_fx.transform(model, rules=plain, tracer="export", example_inputs=image())
    u = torch.eye(3)[1].expand(3, 3)
    assert relative(plainly.pullback(image(3), 1), gradient(model, image(3), u)) <= 1e-6


@pytest.mark.parametrize("act, trainable", [("relu", True), ("gelu", False)])
def test_transformer_layers_open(act, trainable):
    model = fill(Encoder(act)).requires_grad_(trainable)
    x = torch.randn(2, 5, 8)
    explainer = sp_fx.transform(model, example_inputs=x[:1])
    kinds = collections.Counter(s.kind for s in explainer.report().of("rewritten"))
    assert kinds == {"attention": 2, act: 2, "layer_norm": 4} and not explainer.report().of("NOT REWRITTEN")
    assert [p.requires_grad for p in explainer.parameters()] == [trainable] * len(list(model.parameters()))
    assert torch.equal(explainer(x), model(x)) if trainable else relative(explainer(x), model(x)) <= 1e-5  # the fused fast path


def test_keyword_arguments_and_masks():
    model = fill(Encoder())
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    explainer = sp_fx.transform(model, example_inputs={"x": x, "mask": mask})
    assert relative(explainer(x, mask=mask), model(x, mask)) <= 1e-5
    found = explainer.pullback(x, 1, forward_kwargs={"mask": mask})
    assert found[1, :3].norm() > 0 and not found[1, 3:].norm() > 0  # padded keys get nothing
    assert relative(explainer(x), model(x)) <= 1e-5  # another form, which is captured now
    without = sp_fx.transform(model, example_inputs=x)
    assert torch.equal(without.pullback(x, 1, forward_kwargs={"mask": mask}), found)
    for one, missing in ((explainer, "mask: expected a tensor .*, got None"), (without, "mask: expected None, got a tensor")):
        unpickled = pickle.loads(pickle.dumps(one))  # which has no model to capture
        with pytest.raises(ValueError, match=missing):
            unpickled(x) if one is explainer else unpickled(x, mask)


def test_other_sizes_are_captured_when_they_are_met():
    model = fill(Windows())
    explainer = sp_fx.transform(model, example_inputs=image(2))
    assert "captured by torch.export for x [*, 3, 8, 8]" in str(explainer.report())
    alone = sp_fx.transform(model, example_inputs=image(1, 12))
    for batch in (1, 3):
        x = image(batch, 12)
        assert torch.equal(explainer(x), model(x)) and torch.equal(explainer.pullback(x, 1), alone.pullback(x, 1))
    assert "another form of call was captured: x [*, 3, 12, 12], by torch.export" in str(explainer.report())
    assert str(explainer.report()).count("another form") == 1
    with pytest.raises(ValueError, match=r"x: expected a tensor \[\*, 3, 8, 8\], got \[1, 3, 12, 12\]"):
        pickle.loads(pickle.dumps(explainer)).pullback(image(1, 12), 1)


def test_forms_are_captured_inside_inference_mode_and_kept_within_bounds(monkeypatch):
    monkeypatch.setattr(sp_fx.methods.captured, "FORMS", 2)
    model = fill(Windows())
    explainer = sp_fx.transform(model, example_inputs=image())
    with torch.inference_mode():
        for side in (12, 16, 20, 12):
            assert torch.equal(explainer(image(1, side)), model(image(1, side)))
    assert len(explainer._others) == 2


def test_a_form_that_cannot_be_captured_leaves_the_others_as_they_are():
    model = fill(Windows())
    explainer = sp_fx.transform(model, example_inputs=image())
    before = str(explainer.report())
    with pytest.raises(RuntimeError, match=r"3 channels, but got 4"):  # the model's own error
        explainer(torch.zeros(1, 4, 8, 8))
    assert str(explainer.report()) == before and torch.equal(explainer(image(2)), model(image(2)))


def test_another_form_has_the_rules_and_the_weights_of_now():
    """Those of an explainer that was calibrated, or whose weights were updated, since it was made."""
    model = fill(Windows())
    explainer = sp_fx.transform(model, example_inputs=image()).calibrate(image(4))
    with torch.no_grad():
        model.head.weight.mul_(2)
    alone = sp_fx.transform(model, example_inputs=image(1, 12), rules=explainer.report().rules)
    assert torch.equal(explainer.pullback(image(1, 12), 1), alone.pullback(image(1, 12), 1))
    explainer = explainer.double()
    assert torch.equal(explainer(image(1, 12).double()), copy.deepcopy(model).double()(image(1, 12).double()))


def test_a_branch_on_the_batch_is_a_form_of_its_own():
    model = fill(Counts())
    x = torch.randn(4, 4)
    with pytest.raises(sp_fx.CaptureError, match="example_inputs"):
        sp_fx.transform(model)
    explainer = sp_fx.transform(model, example_inputs=x[:3])
    for size in (3, 4, 1, 2):  # of 4 it takes another path, which is captured then
        assert torch.equal(explainer(x[:size]), model(x[:size]))
    assert "another form of call was captured: x [4, 4]" in str(explainer.report())


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x.relu()) * torch.tensor([x.shape[0]] * int(x.shape[0]), dtype=x.dtype)[:, None]


def test_a_batch_that_is_a_constant_is_fixed_and_says_so():
    model, x = fill(Constant()), torch.randn(4, 4)
    explainer = sp_fx.transform(model, example_inputs=x[:3])
    assert "the batch is fixed at 3" in str(explainer.report())
    for size in (3, 4, 1):
        assert torch.equal(explainer(x[:size]), model(x[:size]))


def test_neither_tracer():
    class Branches(nn.Module):
        def forward(self, x):
            return x.relu() if float(x.sum()) > 0 else -x  # a number of its own at each call, and no path

    both = r"torch.fx cannot trace[\s\S]*test_capture_exported.py[\s\S]*torch.export cannot capture"
    with pytest.raises(sp_fx.CaptureError, match=both):
        sp_fx.transform(Branches(), example_inputs=torch.randn(2, 3))
    with pytest.raises(ValueError, match="pass example_inputs"):
        sp_fx.transform(Branches(), tracer="export")
    with pytest.raises(ValueError, match="'auto', 'fx' or 'export', got 'jit'"):
        sp_fx.transform(Branches(), tracer="jit")
    with pytest.raises(TypeError, match=r"example_inputs do not fit Branches.forward\(x\)"):
        sp_fx.transform(Branches(), example_inputs=(torch.ones(1), torch.ones(1)))


@dataclasses.dataclass
class Outcome:
    logits: torch.Tensor
    hidden: tuple | None = None


Pair = collections.namedtuple("Pair", "logits size")


class Packs(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.head, self.pack = nn.Linear(4, 3), pack

    def forward(self, x, more, *rest, flag=True, **named):
        if x.shape[-1] == 4:
            x = x + more["a"][0].relu() + sum(rest) + named["b"]
        y = self.head(x.gelu() if hasattr(x, "gelu") else F.gelu(x))
        match self.pack:
            case "dataclass":
                return Outcome(y, (x, None))
            case "namedtuple":
                return Pair(y, x.shape[0])
            case "dict":
                return {"logits": y, "other": [x, {"name": "x"}]}
            case "object":
                return {"logits": y, "cache": types.SimpleNamespace(x=x)}
        return y, x


@pytest.mark.parametrize("pack", ["dataclass", "namedtuple", "dict", "tuple", "object"])
def test_containers_go_in_and_come_out(pack):
    model = fill(Packs(pack))
    x, more, named = torch.randn(3, 4), {"a": (torch.randn(3, 4),)}, torch.randn(3, 1)
    example = {"x": x, "more": more, "b": named}
    explainer = sp_fx.transform(model, example_inputs=example)
    with torch.no_grad():
        out, expected = explainer(x, more, b=named), model(x, more, b=named)
    if pack == "object":
        assert out.pop("cache") is None and "SimpleNamespace in its output is left out" in str(explainer.report())
        expected.pop("cache")
    assert type(out) is type(expected) and str(out) == str(expected)
    target = (lambda y: y[0][:, 1]) if pack == "tuple" else 1
    assert explainer.pullback(x, target, forward_kwargs={"more": more, "b": named}).norm() > 0
    saved = pickle.loads(pickle.dumps(explainer)) if pack != "object" else explainer.split("head")[0]
    with pytest.raises(ValueError, match="flag: expected True, got False"):
        saved(x, more, flag=False, b=named)
    with pytest.raises(ValueError, match=r"named: expected one of \['b'\]"):
        saved(x, more, b=named, c=named)


def test_modules_keep_their_names_and_can_be_hooked():
    model, seen, expected = fill(Windows()), {}, {}
    explainer = sp_fx.transform(model, example_inputs=image())
    for name in ("body", "body.0", "body.2", "norm", "head"):
        explainer.get_submodule(name).register_forward_hook(lambda m, a, y, n=name: seen.update({n: y.clone()}))
        model.get_submodule(name).register_forward_hook(lambda m, a, y, n=name: expected.update({n: y.clone()}))
    explainer(image(2)), model(image(2))
    assert seen.keys() == expected.keys() and all(torch.equal(seen[n], expected[n]) for n in seen if n != "body.1")


def test_weights_are_shared_and_the_model_stays():
    model = fill(Windows()).train()
    flags = [p.requires_grad for p in model.parameters()]
    explainer = sp_fx.transform(model, example_inputs=image())
    assert model.training and flags == [p.requires_grad for p in model.parameters()]
    assert explainer.head.weight.data_ptr() == model.head.weight.data_ptr()
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert torch.equal(explainer(image(2)), copy.deepcopy(model).eval()(image(2)))
    assert explainer.double()(image(2).double()).dtype == torch.float64 and model.head.weight.dtype == torch.float32


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_and_pickles(copied):
    explainer = sp_fx.transform(fill(Windows()), example_inputs=image())
    assert torch.equal(copied(explainer).pullback(image(2), 1), explainer.pullback(image(2), 1))


class Regions(nn.Module):
    """Positions made without grad and outside autocast, and a buffer that counts the calls."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        if x.shape[-1] != 4:
            raise ValueError
        with torch.no_grad():
            scale = 1 + x.abs().amax()
        with torch.autocast("cpu", enabled=False):
            place = torch.arange(4.0)[:, None] @ torch.ones(1, 1)
        return self.head(x.relu() / scale + place[:, 0]) + self.calls


@pytest.mark.parametrize("tracer", ["auto", "export"])
@pytest.mark.filterwarnings("ignore:.*NOT REWRITTEN")
def test_regions_and_buffers(tracer):
    model = fill(Regions())
    x = torch.randn(2, 4)
    explainer = sp_fx.transform(model, tracer=tracer, example_inputs=x)
    assert "writes over calls" in str(explainer.report())
    before = model.calls.clone()
    found = [explainer(x), explainer(x)]
    assert torch.equal(model.calls, before) and torch.equal(found[0], found[1])
    assert torch.equal(found[0], model(x))
    frozen = sp_fx.transform(model, rules=sp_fx.Rules.frozen(), tracer=tracer, example_inputs=x)
    assert relative(frozen.pullback(x, 1), gradient(model, x, torch.eye(3)[1].expand(2, 3))) <= 1e-6


class Decoder(nn.Module):
    """Asks whether its queries are its keys, as `nn.MultiheadAttention` does."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(8, 2, 12, batch_first=True)
        self.layers, self.head = nn.TransformerDecoder(layer, 1), nn.Linear(8, 3)

    def forward(self, x, memory, more=None):
        y = self.head(self.layers(x, memory).mean(1))
        return y if more is None else y + sum(m.mean() for m in more)


@pytest.mark.filterwarnings("ignore:Decoder has no gate")
@pytest.mark.parametrize("tracer", ["fx", "export"])
def test_one_tensor_for_several_arguments_is_several(tracer):
    model, g = fill(Decoder()), torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(2, 5, 8, generator=g) for _ in range(3))
    more = {"more": [a, a]} if tracer == "export" else {}
    plain = sp_fx.Rules(relu=None, attention=None, layer_norm=None)
    explainer = sp_fx.transform(model, rules=plain, tracer=tracer, example_inputs={"x": a, "memory": a, **more})
    for x, memory, rest in [(a, b, (b, c)), (a, a, (a, a)), (b, a, (a, c))]:
        rest = {"more": list(rest)} if more else {}
        assert torch.equal(explainer(x, memory, **rest), model(x, memory, **rest))
        leaves = [t.clone().requires_grad_() for t in (x, memory)]
        want = torch.autograd.grad(model(*leaves, **rest)[:, 1].sum(), leaves)
        got = explainer.pullback((x, memory), 1, forward_kwargs=rest)
        assert all(relative(p, q) <= 1e-5 for p, q in zip(got, want))
        apart = explainer.ascend((x, memory.clone()), 1, steps=2, forward_kwargs=rest)
        assert all(map(torch.equal, explainer.ascend((x, memory), 1, steps=2, forward_kwargs=rest), apart))


class Careful(nn.Module):
    """Goes another way where it is exported: through its own name of the question."""

    asks = staticmethod(torch.compiler.is_exporting)

    def __init__(self, branches):
        super().__init__()
        self.inner, self.branches = nn.Linear(6, 6), branches

    def forward(self, x):
        if self.asks():
            return self.inner(x * 3 / 3).relu()
        if self.branches and x.sum() > 1e9:
            return x
        return self.inner(x).relu()


def test_a_model_goes_the_way_that_it_goes_when_it_is_called():
    """Both ways are one function, but for rounding; an export that fails by the one takes the other, and says so."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    model, code = fill(Careful(False)), torch.compiler.is_exporting.__code__
    explainer = sp_fx.transform(model, tracer="export", example_inputs=x)
    assert torch.equal(explainer(x), model(x)) and not explainer.report().notes
    model = fill(Careful(True))
    explainer = sp_fx.transform(model, tracer="export", example_inputs=x)
    assert relative(explainer(x), model(x)) <= 1e-6
    assert "the forward takes its path for torch.export, since the other fails" in " ".join(explainer.report().notes)
    assert torch.compiler.is_exporting.__code__ is code and not torch.compiler.is_exporting()
    assert torch.export.export(model, (x,)).module()(x).shape == (4, 6)  # the user's own export is told the truth


class TakesMapping(nn.Module):
    """Enters a module with an ordered dictionary of tensors, one of which it writes over, as detectors do with their features."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, parts, x):
        return self.inner(parts["a"]).relu_() + parts["b"].mul_(2) + x


class GivesMapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.takes = nn.Linear(4, 4), TakesMapping()

    def forward(self, x):
        h = self.layer(x)
        return self.takes(collections.OrderedDict(a=h.sigmoid(), b=h * 1), h.tanh()) * 3


def test_a_module_that_is_given_an_ordered_dictionary():
    model, x = fill(GivesMapping()), torch.randn(2, 4)
    explainer = sp_fx.transform(model, tracer="export", example_inputs=x)
    assert torch.equal(explainer(x), model(x))
    seen = []
    explainer.get_submodule("takes").register_forward_hook(lambda module, args, output: seen.append(args))
    explainer(x)
    h = model.layer(x)
    assert list(seen[0][0]) == ["a", "b"] and torch.equal(seen[0][0]["a"], h.sigmoid()) and torch.equal(seen[0][0]["b"], h)


class BreaksWhenExported(nn.Module):
    """Goes another way for torch.export, which fails."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        if torch.compiler.is_exporting() or isinstance(x, torch._subclasses.FakeTensor):
            x = x + torch.ones(3)
        return self.head(torch.relu(x))


def test_a_forward_that_fails_for_the_export_alone_says_so():
    x = torch.randn(2, 4)
    BreaksWhenExported().eval()(x)
    with pytest.raises(sp_fx.CaptureError, match=r"asks whether it is being exported.*the part of the model that does not ask"):
        sp_fx.transform(BreaksWhenExported().eval(), example_inputs=x, tracer="export")
