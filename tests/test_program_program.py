"""Programs against the published maps, the eager explainer, and what they refuse."""

import copy
import dataclasses
import sys
import threading
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import NETS, fill, golden, relative
from shipped import Block
from sp_fx.gates import kernels
from sp_fx.program import compiling, inductor, program
from sp_fx.program.graphs import decompositions as decompose
from sp_fx.program.graphs.folding import folded


@pytest.fixture(scope="module")
def resnet():
    model, data = golden("tiny_resnet")
    explainer = sp_fx.transform(model)
    return explainer, data["input"], data["target"], explainer.compile(example_inputs=data["input"])


# -- right


FORBIDDEN = ("backward", "scatter", "index_put", "sp_fx", "_.")


@pytest.mark.parametrize("net", NETS)
def test_graph_equals_the_published_maps(interpreted, net):
    model, data = golden(net)
    made = sp_fx.transform(model, rules=sp_fx.Rules.paper()).compile(example_inputs=data["input"])
    outputs, maps = made(data["input"], data["target"])
    assert relative(outputs, data["logits"]) <= 1e-5
    assert relative(maps, data["soft_pullback"]) <= 1e-4
    names = {str(node.target) for node in made.graph.graph.nodes if node.op == "call_function"}
    assert not [name for name in names if any(word in name for word in FORBIDDEN)]


@pytest.mark.parametrize(
    "method, arguments",
    [
        ("double_pullback", {}),
        ("ascend", {"steps": 3, "step_size": 20.0}),
        ("ascend", {"steps": 3, "bounds": (-1, 1), "radius": 5.0}),
        ("ascend", {"steps": 2, "bounds": (-0.5, 0.5), "clip": "last"}),
        ("ascend", {"steps": 2, "bounds": (-0.5, 0.5), "clip": "last", "unrolled": True}),
    ],
)
def test_methods_equal_the_eager_ones(interpreted, method, arguments):
    """In float64, where what the steps amplify is 1e-15. The class of target None is the one predicted at the start."""
    model, data = golden("tiny_resnet")
    explainer, x = sp_fx.transform(model.double()), data["input"].double()
    made = explainer.compile(method, example_inputs=x, dynamic_batch=False, **arguments)
    arguments.pop("unrolled", None)
    for target in (None, data["target"]):
        outputs, maps = made(x, target)
        assert relative(outputs, model(x)) <= 1e-12
        assert relative(maps, getattr(explainer, method)(x, target, **arguments)) <= 1e-9


def test_compiled_at_any_batch(resnet):
    explainer, x, t, made = resnet
    for n in (1, 2, 3):
        outputs, maps = made(x[:n], t[:n])
        assert relative(outputs, explainer(x[:n])) <= 1e-5
        assert relative(maps, explainer.pullback(x[:n], t[:n])) <= 1e-4
    many, classes = x.repeat(6, 1, 1, 1)[:17], t.repeat(6)[:17]  # beyond 15, where oneDNN's layouts change
    assert relative(made(many, classes)[1], explainer.pullback(many, classes)) <= 1e-4


def test_compiled_attention():
    explainer, x = sp_fx.transform(fill(Block())), torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    made = explainer.compile(example_inputs=x[:1])
    outputs, maps = made(x, 1)
    assert relative(outputs, explainer(x)) <= 1e-5
    assert relative(maps, explainer.pullback(x, 1)) <= 1e-4


@pytest.mark.slow
def test_ascent_compiled_on_a_network_of_attention():
    model, data = golden("tiny_pvt")
    explainer, x, t = sp_fx.transform(model), data["input"], data["target"]
    made = explainer.compile("ascend", example_inputs=x[:1], steps=2, bounds=(-1.0, 1.0), radius=3.0)
    assert relative(made(x, t)[1], explainer.ascend(x, t, steps=2, bounds=(-1.0, 1.0), radius=3.0)) <= 1e-3


def test_targets(resnet):
    explainer, x, t, made = resnet
    predicted = explainer(x).argmax(1)
    assert torch.equal(made(x)[1], made(x, predicted)[1])
    assert torch.equal(made(x, 4)[1], made(x, torch.tensor([4, 4, 4]))[1])
    mixed = torch.tensor([-1, 2, -1])
    assert torch.equal(made(x, mixed)[1], made(x, torch.where(mixed < 0, predicted, mixed))[1])
    assert torch.equal(made(x, t.int())[1], made(x, t)[1])


def test_a_direction(interpreted):
    model, data = golden("tiny_silu")
    explainer, x = sp_fx.transform(model), data["input"]
    made = explainer.compile(example_inputs=x, target="direction")
    u = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    assert relative(made(x, u)[1], explainer.pullback(x, u)) <= 1e-5
    with pytest.raises(ValueError, match=r"a direction.*\[3, 10\].*got torch.int64 \[3\]"):
        made(x, data["target"])


class Odd(nn.Module):
    """Two inputs and a table of numbers; a dictionary with `logits`; in-place arithmetic."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(7, 5), nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x, ids):
        h = F.relu(self.mix(x + self.embed(ids)), inplace=True)
        h.add_(1)  # `h += 1` would be traced out of place
        return {"logits": self.head(h), "hidden": h}


def test_several_inputs_and_outputs(interpreted):
    explainer = sp_fx.transform(fill(Odd()))
    x, ids = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 6])
    made = explainer.compile(example_inputs=(x, ids))
    outputs, maps = made((x, ids), 2)
    assert outputs.keys() == {"logits", "hidden"} and maps[1] is None
    assert relative(outputs["hidden"], explainer(x, ids)["hidden"]) <= 1e-5
    assert relative(maps[0], explainer.pullback((x, ids), 2)[0]) <= 1e-5


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor
    name: str = "answer"


class Answering(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layer, self.head, self.make = nn.Linear(5, 6), nn.Linear(6, 3), make

    def forward(self, x):
        hidden = self.layer(x).relu()
        return self.make(self.head(hidden), hidden)


@pytest.mark.parametrize("make", [Answer, lambda y, h: {"logits": y, "rest": [h, ("a", None)]}], ids=["dataclass", "nested"])
def test_outputs_of_every_kind(interpreted, make):
    explainer = sp_fx.transform(fill(Answering(make)))
    made = explainer.compile(example_inputs=torch.randn(2, 5))
    x = torch.randn(7, 5)  # another batch: nothing of the example's may come back
    outputs, maps = made(x, 1)
    expected = explainer(x)
    assert type(outputs) is type(expected) and relative(maps, explainer.pullback(x, 1)) <= 1e-5
    if make is Answer:
        assert relative(outputs.logits, expected.logits) <= 1e-5 and outputs.name == "answer"
    else:
        assert relative(outputs["rest"][0], expected["rest"][0]) <= 1e-5 and outputs["rest"][1] == ("a", None)


def test_an_output_that_varies_and_is_no_tensor_is_refused(interpreted):
    explainer = sp_fx.transform(fill(Answering(lambda y, h: {"logits": y, "count": h.shape[0]})))
    with pytest.raises(program.ProgramError, match=r"the model returns 1 for .* where its program would return 2"):
        explainer.compile(example_inputs=torch.randn(2, 5))


def test_an_index_that_no_row_has(interpreted):
    """Compiled code would end the process."""
    explainer = sp_fx.transform(fill(Odd()))
    made = explainer.compile(example_inputs=(torch.randn(3, 5), torch.tensor([0, 3, 6])))
    assert made.rows == [None, 7]
    for bad in ([0, 7, 1], [0, -1, 1]):
        with pytest.raises(IndexError, match=rf"0 to 6, got {min(bad)} to {max(bad)}"):
            made((torch.randn(3, 5), torch.tensor(bad)), 1)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (3, 3), (7, 4)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1), (4, 4)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_input_gradients_of_convolutions(groups, transposed, kernel, stride, dilation):
    g = torch.Generator().manual_seed(0)
    for wide, padding, size in ((4, 0, (17, 16)), (4, 1, (14, 15)), (4, 3, (16, 19)), (16, 0, (17, 16)), (16, 3, (16, 19))):
        if transposed:
            conv = nn.ConvTranspose2d(wide, 6, kernel, stride, padding, 0, groups, dilation=dilation, dtype=torch.float64)
        else:
            conv = nn.Conv2d(wide, 6, kernel, stride, padding, dilation, groups, dtype=torch.float64)
        x = torch.randn(2, wide, *size, generator=g, dtype=torch.float64, requires_grad=True)
        y = conv(x)
        v = torch.randn(y.shape, generator=g, dtype=torch.float64)
        got, _, _ = decompose.convolution_backward(
            v, x, conv.weight, None, conv.stride, conv.padding, conv.dilation, transposed, [0, 0], groups, [True, False, False]
        )
        # float64, sums of at most 6 * 28 products: 1e-13 is rounding
        assert torch.allclose(got, torch.autograd.grad(y, x, v)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["pullback", "ascend"])
def test_forms_for_a_cpu_are_the_same_function(interpreted, method):
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GELU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(100, 5)
    model = fill(nn.Sequential(*layers))
    made = sp_fx.transform(model).compile(method, example_inputs=torch.randn(3, 3, 12, 12))
    suited = inductor.suited(made.graph)
    for got, want in zip(suited(*made.example), made.graph(*made.example)):
        assert relative(got, want) <= 2e-6  # erf by a quotient is 5e-7 off
    scales = [n for n in suited.graph.nodes if "force_stride_order" in str(n.target) and n.meta["val"][0].numel() == 1]
    assert len(scales) >= 2  # one for each gate at the scale of the sample: what a loop over its values reads


def test_a_network_of_convolutions_is_compiled_for_its_example_too(monkeypatch):
    batches = []

    def compiled(graph, example):
        return lambda *args: batches.append(graph.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]) or graph(*args)

    monkeypatch.setattr(compiling, "compiled", compiled)
    convolutions = fill(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5)))
    layers = fill(nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.ReLU(), nn.Linear(8, 5)))
    for model, fixed in ((convolutions, True), (layers, False)):
        made = sp_fx.transform(model).compile(example_inputs=torch.randn(3, 3, 6, 6))
        batches.clear()
        for n in (3, 2):
            made(torch.randn(n, 3, 6, 6))
        assert [isinstance(batch, int) for batch in batches] == [fixed, False]


def test_batch_norms_are_folded(interpreted):
    model, data = golden("tiny_resnet")
    explainer = sp_fx.transform(model)
    module = folded(explainer)
    assert not [n for n in module.graph.nodes if n.args and n.args[0] == "affine_norm"]
    assert relative(module(data["input"]), model(data["input"])) <= 1e-5
    assert [n for n in explainer.graph.nodes if n.args and n.args[0] == "affine_norm"]  # the explainer's own graph is as it was


def test_weights_that_are_computed_in_the_pass(interpreted):
    """A convolution whose weight is centred, before a BatchNorm: nothing to fold."""

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.norm = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.BatchNorm2d(4)

        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self.norm(F.conv2d(x, weight)).relu().mean((2, 3))

    explainer, x = sp_fx.transform(Centred()), torch.randn(2, 3, 8, 8)
    program = explainer.compile(example_inputs=x)
    assert relative(program(x, 1)[1], explainer.pullback(x, 1)) <= 1e-5


# -- what a program is


def test_weights_are_those_of_the_moment(resnet):
    _, x, t, made = resnet
    before = made(x, t)[1].clone()
    model, _ = golden("tiny_resnet")
    explainer = sp_fx.transform(model)
    again = copy.copy(made)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert not explainer(x).any()
    assert torch.equal(again(x, t)[1], before)


def test_threads_share_one(resnet):
    _, x, t, made = resnet
    alone, threaded = [made(x[i : i + 1], t[i : i + 1])[1] for i in range(3)], {}

    def work(i):
        threaded[i] = [made(x[i : i + 1], t[i : i + 1])[1] for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(m, alone[i]) for i in range(3) for m in threaded[i])


def test_under_no_grad_and_inference_mode(resnet):
    _, x, t, made = resnet
    expected = made(x, t)[1]
    with torch.no_grad():
        assert torch.equal(made(x, t)[1], expected)
    with torch.inference_mode():
        assert torch.equal(made(x.clone(), t.clone())[1], expected)
    outputs, maps = made(x.clone().requires_grad_(), t)
    assert not outputs.requires_grad and not maps.requires_grad


# -- what it refuses


class Drawing(nn.Module):
    """A dropout that is not told whether the model trains."""

    def __init__(self, p):
        super().__init__()
        self.body, self.p = nn.Sequential(nn.Linear(4, 16), nn.ReLU()), p

    def forward(self, x):
        return F.dropout(self.body(x), self.p)


def test_a_model_that_draws_is_refused(interpreted):
    x = torch.ones(2, 4)
    with pytest.raises(program.ProgramError, match=r"others at each call, .*: dropout .*test_program_program.py.*"):
        sp_fx.transform(Drawing(0.5).eval()).compile(example_inputs=x)
    made = sp_fx.transform(Drawing(0.0).eval()).compile(example_inputs=x, dynamic_batch=False)  # which draws, and drops nothing
    assert made.error < 1e-6


def test_a_program_that_differs_is_refused(monkeypatch):
    model, data = golden("tiny_vgg")
    monkeypatch.setattr(compiling, "compiled", lambda graph, example: lambda *args: [2 * r for r in graph(*args)])
    with pytest.raises(program.ProgramError, match=r"relative L2 distance 1.0e.00 where 1e-04"):
        sp_fx.transform(model).compile(example_inputs=data["input"])


def test_other_inputs_are_refused(resnet):
    _, x, t, made = resnet
    with pytest.raises(ValueError, match=r"made for torch.float32 \[B, 3, 32, 32\] on cpu; got torch.float32 \[3, 3, 32, 31\]"):
        made(x[..., :31], t)
    with pytest.raises(ValueError, match=r"made for torch.float32.*got torch.float64"):
        made(x.double(), t)
    with pytest.raises(ValueError, match=r"at least 1"):
        made(x[:0], t[:0])
    with pytest.raises(TypeError, match="got str"):
        made("cat", t)


def test_other_targets_are_refused(resnet):
    _, x, _, made = resnet
    with pytest.raises(IndexError, match=r"-1 to 9.*got \[10, 10, 10\]"):
        made(x, 10)
    for bad in (torch.tensor([1, 2]), 1.5, "cat", torch.zeros(3, 10), True, [1, 2]):
        with pytest.raises(ValueError, match=r"None, an int or an integer tensor \[3\]"):
            made(x, bad)


def test_lists_and_arrays_are_targets(resnet):
    _, x, _, made = resnet
    expected = made(x, torch.tensor([1, 2, 3]))
    for form in ([1, 2, 3], np.array([1, 2, 3])):
        assert all(torch.equal(a, b) for a, b in zip(made(x, form), expected))


def test_a_fixed_batch(interpreted):
    model, data = golden("tiny_vgg")
    made = sp_fx.transform(model).compile(example_inputs=data["input"], dynamic_batch=False)
    made(data["input"], data["target"])
    with pytest.raises(ValueError, match=r"a batch of 3 alone.*got torch.float32 \[2"):
        made(data["input"][:2], data["target"][:2])


class FixesBatch(nn.Module):
    def forward(self, x):
        return F.relu(x).view(3, -1)[:, :4]


def test_a_model_that_fixes_its_batch(interpreted):
    explainer, x = sp_fx.transform(FixesBatch()), torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"fixes its batch at 3.*dynamic_batch=False"):
        explainer.compile(example_inputs=x)
    assert explainer.compile(example_inputs=x, dynamic_batch=False)(x)[1].shape == x.shape


def test_bad_requests():
    model, data = golden("tiny_vgg")
    explainer, x = sp_fx.transform(model), data["input"]
    with pytest.raises(ValueError, match="methods are pullback, double_pullback, ascend, tokens; got 'gradient'"):
        explainer.compile("gradient", example_inputs=x)
    with pytest.raises(TypeError, match="double_pullback program takes step; got steps"):
        explainer.compile("double_pullback", example_inputs=x, steps=3)
    with pytest.raises(ValueError, match="pass example_inputs"):
        explainer.compile()
    with pytest.raises(ValueError, match="step_size"):
        explainer.compile("ascend", example_inputs=x, step_size=-1.0)
    with pytest.raises(TypeError, match="nothing to explain"):
        explainer.compile(example_inputs=x.long())
    with pytest.raises(ValueError, match=r"'class', 'direction', or a callable"):
        explainer.compile(example_inputs=x, target="top3")


def test_hard_gates_in_float64():
    """Rounding carries no pre-activation over its threshold here, so that the bar stays float64's."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 5))
    explainer = sp_fx.transform(fill(net).double(), rules=sp_fx.Rules.frozen())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    program = explainer.compile("pullback", example_inputs=x)
    assert program.tolerance == 1e-9 and program.error <= 1e-12  # sums in another order
    assert relative(program(x, 1)[1], explainer.pullback(x, 1)) <= 1e-12


def test_a_gpu_without_triton_is_told_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"Triton, which is not installed.*eager"):
        inductor.compiled(None, [types.SimpleNamespace(is_cuda=True)])


def test_without_triton_eager_adjoints_are_the_table_s(monkeypatch):
    monkeypatch.setitem(sys.modules, "sp_fx_kernels", None)  # importing it fails
    kernels.triton_kernels.cache_clear()
    try:
        assert kernels.triton_kernels() is None
    finally:
        kernels.triton_kernels.cache_clear()
