"""Call forms of the table's later rows, and what models write out themselves, against the formulas of `oracle.py`.

Tolerances as in test_oracle: float64 chains of three layers, 1e-10.
"""

import copy
import math
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import oracle
import sp_fx
from oracle import FROZEN
from sp_fx import Rules
from sp_fx.analysis import calls
from test_explainer_oracle import Calls, as_rules, check, fill, randn, transform

aten = torch.ops.aten
UNEVEN = {"relu": 0.35, "leaky_relu": 0.9, "hardtanh": 0.8, "elu": 1.4, "gelu": 0.6, "silu": 0.7, "hardswish": 0.4, "mish": 2.5,
          "max_pool": 0.8, "attention": 0.7, "quick_gelu": 0.5, "abs": 0.9, "hardshrink": 1.1, "softshrink": 0.4,
          "scale": "absolute"}  # fmt: skip
RULES = {
    "absolute": {**oracle.DEFAULTS, "hardtanh": oracle.Soft(1.7, 0.4, "absolute"), "scale": "absolute"},
    "sample": {**oracle.DEFAULTS, "scale": "sample"},
    "channel": {**oracle.DEFAULTS, "scale": "channel", "relu": oracle.Soft(0.8, 0.5), "leaky_relu": oracle.Soft(1.1, -0.3)},
    "uneven": UNEVEN,
    "frozen": {**oracle.HARD, "product": FROZEN},
}


def gate(kind, **args):
    return oracle.Gate(kind, **args)


SILU, GELU, TANH = gate("silu"), gate("gelu"), gate("gelu", approximate="tanh")
ROOT = math.sqrt(2 / math.pi)


def in_place_swish(z):
    z = z * 1
    return z.mul_(z.sigmoid())


def in_place_hardswish(z):
    return z * (z + 3).clamp_(0, 6).div_(6)


def at(bound):
    return torch.tensor(bound, dtype=torch.float64)


POINTWISE = {
    "quick gelu": (lambda z: z * torch.sigmoid(1.702 * z), gate("quick_gelu", rate=1.702)),
    "quick gelu, reversed": (lambda z: (z * 1.702).sigmoid() * z, gate("quick_gelu", rate=1.702)),
    "swish": (lambda z: z * z.sigmoid(), SILU),
    "swish in place": (in_place_swish, SILU),
    "swish by exp": (lambda z: z / (1 + torch.exp(-z)), SILU),
    "swish of another rate": (lambda z: z * F.sigmoid(2.5 * z), gate("silu", rate=2.5)),
    "gelu by erf": (lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))), GELU),
    "gelu by erf, other order": (lambda z: z * ((z * 0.7071067811865476).erf() + 1.0) * 0.5, GELU),
    "gelu by tanh": (lambda z: 0.5 * z * (1 + torch.tanh(ROOT * (z + 0.044715 * z**3))), TANH),
    "gelu by tanh, pow": (lambda z: z * 0.5 * (1.0 + torch.tanh(0.7978845608 * (z + 0.044715 * torch.pow(z, 3.0)))), TANH),
    "hardswish": (lambda z: z * F.relu6(z + 3) / 6, gate("hardswish")),
    "hardswish by hardsigmoid": (lambda z: z * F.hardsigmoid(z), gate("hardswish")),
    "hardswish by clamp": (in_place_hardswish, gate("hardswish")),
    "mish": (lambda z: z * torch.tanh(F.softplus(z)), gate("mish")),
    "relu by where": (lambda z: torch.where(z > 0, z, 0.0), gate("relu")),
    "relu by where, zeros": (lambda z: torch.where(z > 0, z, torch.zeros_like(z)), gate("relu")),
    "relu by a mask": (lambda z: z * (z > 0), gate("relu")),
    "relu by a cast mask": (lambda z: z * (z > 0).to(z.dtype), gate("relu")),
    "leaky by where": (lambda z: torch.where(z > 0, z, 0.2 * z), gate("leaky_relu", slope=0.2)),
    "elu by where": (lambda z: torch.where(z > 0, z, 1.3 * (z.exp() - 1)), gate("elu", alpha=1.3)),
    "maximum": (lambda z: torch.maximum(z, torch.tensor(0.3, dtype=z.dtype)), gate("relu", low=0.3)),
    "maximum, reversed": (lambda z: torch.max(torch.tensor(0.3, dtype=torch.float64), z), gate("relu", low=0.3)),
    "minimum": (lambda z: torch.min(z, torch.tensor(0.4, dtype=torch.float64)), gate("relu", high=0.4)),
    "clamp between tensors": (lambda z: z.clamp(at(-0.2), at(0.3)), gate("hardtanh", low=-0.2, high=0.3)),
    "clamp from a tensor": (lambda z: torch.clamp(z, min=at(-0.2)), gate("relu", low=-0.2)),
    "clamp in place to a tensor": (lambda z: (z * 1).clamp_(max=at(0.3)), gate("relu", high=0.3)),
    "threshold at 0": (nn.Threshold(0.0, 0.0), gate("relu")),
    "abs": (torch.abs, gate("abs")),
    "abs method": (lambda z: z.abs(), gate("abs")),
    "abs operator": (abs, gate("abs")),
    "hardshrink": (nn.Hardshrink(0.3), gate("hardshrink", alpha=0.3)),
    "softshrink": (nn.Softshrink(0.2), gate("softshrink", alpha=0.2)),
    "aten gelu": (lambda z: aten.gelu.default(z), GELU),
    "aten elu": (lambda z: aten.elu.default(z, 1.2), gate("elu", alpha=1.2)),
    "aten hardtanh": (lambda z: aten.hardtanh.default(z, -0.5, 0.5), gate("hardtanh", low=-0.5, high=0.5)),
    "aten in place": (lambda z: aten.silu_.default(z * 1), SILU),
}  # fmt: skip


def chain(*pairs, seed=0):
    """A filled float64 network of modules and the ops that they are."""
    modules = [copy.deepcopy(m) if isinstance(m, nn.Module) else Calls(m) for m, _ in pairs]
    net = fill(nn.Sequential(*modules), seed).double()
    return net, [op if isinstance(op, oracle.Op) else op(m) for m, (_, op) in zip(modules, pairs, strict=True)]


def linear(i, o):
    return nn.Linear(i, o), oracle.Linear


def agree(net, ops, x, rules, bar=1e-10):
    explainer = transform(net, **rules)
    assert torch.equal(explainer(x), net(x))
    check(oracle.forward(ops, x), net(x).detach(), 1e-10)
    u = randn(*net(x).shape, seed=70)
    check(explainer.pullback(x, u), oracle.pull(ops, x, u, rules), bar)
    return explainer


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("form", POINTWISE)
def test_pointwise_gates_in_other_forms(form, how):
    function, op = POINTWISE[form]
    net, ops = chain(linear(6, 9), (function, op), linear(9, 9), (nn.ReLU(), gate("relu")), linear(9, 4))
    explainer = agree(net, ops, randn(3, 6, seed=1), RULES[how])
    assert [s.kind for s in explainer.report().of("rewritten")] == [op.kind, "relu"]


@pytest.mark.parametrize("form", [f for f in POINTWISE if "out" not in f])
def test_without_a_rule_they_keep_their_derivative(form):
    function, op = POINTWISE[form]
    net, _ = chain(linear(6, 9), (function, op), linear(9, 4))
    x, u = randn(3, 6, seed=1).requires_grad_(), randn(3, 4, seed=2)
    (expected,) = torch.autograd.grad(net(x), x, u)
    with pytest.warns(UserWarning, match="no gate to rewrite"):
        explainer = sp_fx.transform(net, rules=Rules(**dict.fromkeys(oracle.DEFAULTS)))
    check(explainer.pullback(x.detach(), u), expected, 1e-12)  # the same ops


@pytest.mark.parametrize("tau", [0.05, 0.6, 3.0])
@pytest.mark.parametrize("kind, args, kinks", [("abs", {}, [0.0]), ("hardshrink", {"alpha": 0.3}, [-0.3, 0.3]),
                                               ("softshrink", {"alpha": 0.3}, [-0.3, 0.3])])  # fmt: skip
def test_a_soft_gate_is_the_gaussian_average_of_the_hard_one(kind, args, kinks, tau):
    points = [-50.0, -2.0, -0.7, -0.3, -0.1, 0.0, 0.03, 0.5, 2.0, 50.0]
    expected = [oracle.gaussian_average(lambda t: oracle.hard_derivative(kind, t, **args), p, tau, kinks) for p in points]
    z = torch.tensor([points], dtype=torch.float64)
    module = Calls({"abs": torch.abs, "hardshrink": nn.Hardshrink(0.3), "softshrink": nn.Softshrink(0.3)}[kind])
    got = transform(module, **{kind: tau}, scale="absolute").pullback(z, torch.ones_like(z))
    assert (got - torch.tensor([expected], dtype=torch.float64)).abs().max() < 1e-8  # the quadrature is good to 1e-13


def test_a_threshold_with_a_jump():
    z = torch.tensor([[-1.0, 0.1, 0.4, 2.0]]).double()
    explainer = transform(nn.Threshold(0.2, -7.0), scale="absolute", relu=0.5)
    assert torch.equal(explainer(z), torch.tensor([[-7.0, -7.0, 0.4, 2.0]]).double())
    check(explainer.pullback(z, torch.ones_like(z)), oracle.phi((z - 0.2) / 0.5), 1e-10)


# -- max pooling --------------------------------------------------------------------------------------------------------

SAMPLES = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(5)).double()
SAMPLES3 = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(6)).double()
POOLS = {
    "returns indices": ((7, 6), lambda z: F.max_pool2d(z, 3, 2, 1, return_indices=True)[0],
                        oracle.MaxPool((3, 3), (2, 2), (1, 1))),
    "always with indices": ((9,), lambda z: F.max_pool1d_with_indices(z, 2)[0], oracle.MaxPool((2,))),
    "aten with indices": ((7, 6), lambda z: aten.max_pool2d_with_indices.default(z, [2, 2], [2, 2])[0], oracle.MaxPool((2, 2))),
    "aten": ((7, 6), lambda z: aten.max_pool2d.default(z, [2, 3], [2, 1], [1, 0]), oracle.MaxPool((2, 3), (2, 1), (1, 0))),
    "adaptive 1d": ((10,), nn.AdaptiveMaxPool1d(4), oracle.AdaptiveMaxPool((4,))),
    "adaptive 2d": ((7, 9), nn.AdaptiveMaxPool2d((3, 4)), oracle.AdaptiveMaxPool((3, 4))),
    "adaptive 3d": ((5, 4, 6), nn.AdaptiveMaxPool3d((2, 3, 4)), oracle.AdaptiveMaxPool((2, 3, 4))),
    "adaptive to one": ((7, 9), nn.AdaptiveMaxPool2d(1), oracle.AdaptiveMaxPool((1, 1))),
    "adaptive with indices": ((7, 9), lambda z: F.adaptive_max_pool2d(z, 3, return_indices=True)[0],
                              oracle.AdaptiveMaxPool((3, 3))),
    "adaptive aten": ((7, 9), lambda z: aten.adaptive_max_pool2d.default(z, [3, 2])[0], oracle.AdaptiveMaxPool((3, 2))),
    "fractional 2d": ((9, 10), lambda z: F.fractional_max_pool2d(z, (2, 3), (4, 3), _random_samples=SAMPLES),
                      oracle.FractionalMaxPool((2, 3), (4, 3), SAMPLES)),
    "fractional 2d by ratio": ((9, 10), lambda z: F.fractional_max_pool2d(z, 2, output_ratio=(0.5, 0.6), _random_samples=SAMPLES),
                               oracle.FractionalMaxPool((2, 2), (4, 6), SAMPLES)),
    "fractional 3d": ((5, 6, 7), lambda z: F.fractional_max_pool3d(z, 2, (3, 4, 5), _random_samples=SAMPLES3),
                      oracle.FractionalMaxPool((2, 2, 2), (3, 4, 5), SAMPLES3)),
    "amax": ((5, 6), lambda z: z.amax((-2, -1)), oracle.Amax(-2, -1)),
    "amax keepdim": ((5, 6), lambda z: torch.amax(z, 1, keepdim=True), oracle.Amax(1, keepdim=True)),
    "max over an axis": ((5, 6), lambda z: z.max(-1)[0], oracle.Amax(-1)),
    "max over an axis, values": ((5, 6), lambda z: torch.max(z, 1, True).values, oracle.Amax(1, keepdim=True)),
    "aten max": ((5, 6), lambda z: aten.max.dim(z, 2)[0], oracle.Amax(2)),
    "amin": ((5, 6), lambda z: torch.amin(z, (-2, -1)), oracle.Amin(-2, -1)),
    "min over an axis": ((5, 6), lambda z: z.min(-1)[0], oracle.Amin(-1)),
    "min over an axis, values": ((5, 6), lambda z: torch.min(z, 1, True).values, oracle.Amin(1, keepdim=True)),
    "aten min": ((5, 6), lambda z: aten.min.dim(z, 2)[0], oracle.Amin(2)),
}  # fmt: skip


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("form", POOLS)
def test_max_pooling_in_other_forms(form, how):
    shape, function, op = POOLS[form]
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 1](2, 3, 1)
    net, ops = chain((conv, oracle.Conv), (function, op))
    out = net(randn(2, 2, *shape)).shape
    net, ops = chain((conv, oracle.Conv), (function, op), (nn.Flatten(), oracle.flatten(*out[1:])), linear(math.prod(out[1:]), 4))
    explainer = agree(net, ops, randn(2, 2, *shape, seed=3), RULES[how])
    assert [s.kind for s in explainer.report().of("rewritten")] == ["max_pool"]


def test_indices_still_unpool():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

        def forward(self, x):
            pooled, indices = self.pool(x)
            return self.unpool(pooled * 2, indices)

    x = randn(1, 2, 4, 4)
    explainer = transform(Autoencoder(), max_pool=FROZEN)
    assert torch.equal(explainer(x), Autoencoder()(x))
    u = randn(1, 2, 4, 4, seed=1)
    top = (x == F.max_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)).double()
    check(explainer.pullback(x, u), 2 * u * top, 1e-12)


def test_a_pair_that_is_returned_whole():
    explainer = transform(Calls(lambda x: F.max_pool1d(x * 2, 2, return_indices=True)), max_pool=0.5, scale="absolute")
    x = torch.tensor([[[1.0, 2.0, 5.0, 3.0]]]).double()
    values, indices = explainer(x)
    assert values.tolist() == [[[4.0, 10.0]]] and indices.tolist() == [[[1, 2]]]
    got = explainer.pullback(x, lambda out: out[0])
    low = [1 / (1 + math.exp(4)), 1 / (1 + math.exp(8))]
    check(got, 2 * torch.tensor([[[low[0], 1 - low[0], 1 - low[1], low[1]]]], dtype=torch.float64), 1e-10)


@pytest.mark.parametrize("tau", [1e-9, FROZEN])
def test_ties_of_a_global_maximum_share_equally(tau):
    x = torch.tensor([[3.0, 1.0, 3.0], [2.0, 2.0, 2.0], [-math.inf, -math.inf, 0.0]]).double()
    got = transform(Calls(lambda x: x.amax(1)), max_pool=tau, scale="absolute").pullback(x, torch.ones(3).double())
    assert torch.allclose(got, torch.tensor([[0.5, 0, 0.5], [1 / 3, 1 / 3, 1 / 3], [0, 0, 1]]).double(), atol=1e-12)


# -- norms --------------------------------------------------------------------------------------------------------------


class LlamaNorm(nn.Module):
    """As Llama and T5 write it: statistics in float32 at least, and the weight last."""

    def __init__(self, n, eps=1e-3):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.promote_types(torch.float32, torch.float64))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(dtype)


class ChannelNorm(nn.Module):
    """A channel-first LayerNorm as ConvNeXt's first code writes it."""

    def __init__(self, n, eps=1e-3):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n)), eps

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class VarNorm(ChannelNorm):
    def forward(self, x):
        y = (x - x.mean(1, keepdim=True)) * (x.var(1, keepdim=True, unbiased=False) + self.eps).rsqrt()
        return self.weight.view(1, -1, 1, 1) * y + self.bias.view(1, -1, 1, 1)


class VarMeanNorm(ChannelNorm):
    def forward(self, x):
        var, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
        y = (x - mean) * torch.rsqrt(var + self.eps)
        return y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class Stats(oracle.Norm):
    """Statistics over the channels of images, or over the last axis."""

    def __init__(self, module, axis, centred):
        self.axis, self.centred, self.module, self.eps = axis, centred, module, module.eps
        self.gain, self.shift = oracle.double(module.weight), oracle.double(getattr(module, "bias", torch.zeros(1)))

    def pool(self, x):
        return x.movedim(self.axis, -1)

    def unpool(self, statistic, x):
        return statistic.unsqueeze(self.axis)

    def affine(self, x):
        return tuple(oracle.along(p, x, self.axis % x.dim()) if p.numel() > 1 else p for p in (self.gain, self.shift))


def torchvision_norm(n):
    from torchvision.models.convnext import LayerNorm2d

    return LayerNorm2d(n, eps=1e-3)


def timm_norm(n):
    from timm.layers import LayerNorm2d

    return LayerNorm2d(n, eps=1e-3)


def timm_rms_norm(n):
    from timm.layers import RmsNorm2d

    return RmsNorm2d(n, eps=1e-3)


IMAGE = (2, 5, 3, 4)
NORMS = {
    "llama": ((3, 4, 5), LlamaNorm, -1, "rms_norm"),
    "channel-first": (IMAGE, ChannelNorm, 1, "layer_norm"),
    "by var": (IMAGE, VarNorm, 1, "layer_norm"),
    "by var_mean": (IMAGE, VarMeanNorm, 1, "layer_norm"),
    "torchvision": (IMAGE, torchvision_norm, 1, "layer_norm"),
    "timm": (IMAGE, timm_norm, 1, "layer_norm"),
    "timm rms": (IMAGE, timm_rms_norm, 1, "rms_norm"),
}


@pytest.mark.parametrize("form", NORMS)
def test_norms_written_out(form):
    shape, make, axis, kind = NORMS[form]
    module = make(5)
    net, ops = chain((module, lambda m: Stats(m, axis, kind == "layer_norm")), (nn.ReLU(), gate("relu")),
                     (nn.Flatten(), oracle.flatten(*shape[1:])), linear(math.prod(shape[1:]), 4))  # fmt: skip
    for rules in (RULES["absolute"], RULES["frozen"]):
        explainer = agree(net, ops, randn(*shape, seed=4), rules)
        assert [s.kind for s in explainer.report().of("rewritten")] == [kind, "relu"]
        assert not explainer.report().of("kept")
    x, u = randn(*shape, seed=4).requires_grad_(), randn(shape[0], 4, seed=5)
    (expected,) = torch.autograd.grad(net(x), x, u)
    plain = transform(net, **{kind: None, "relu": FROZEN})
    check(plain.pullback(x.detach(), u), expected, 1e-12)


NORMALISED = {
    "function": (lambda x: F.normalize(x, dim=-1), oracle.Normalise(2, -1)),
    "function of another norm": (lambda x: F.normalize(x, p=3.0, dim=1, eps=1e-6), oracle.Normalise(3, 1)),
    "clipped": (lambda x: F.normalize(x, dim=-1, eps=3.0), oracle.Normalise(2, -1, 3.0)),
    "quotient": (lambda x: x / x.norm(dim=-1, keepdim=True), oracle.Normalise(2, -1)),
    "quotient, clamped": (lambda x: x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-8), oracle.Normalise(2, 1)),
    "root of a sum": (lambda x: x / (x**2).sum(-1, keepdim=True).sqrt(), oracle.Normalise(2, -1)),
    "product with itself": (lambda x: x * (x * x).sum(-1, keepdim=True).rsqrt(), oracle.Normalise(2, -1)),
}


@pytest.mark.parametrize("form", NORMALISED)
def test_division_by_a_norm(form):
    function, op = NORMALISED[form]
    net, ops = chain(linear(6, 5), (function, op), linear(5, 4))
    explainer = agree(net, ops, randn(3, 6, seed=1), RULES["absolute"])
    assert [s.kind for s in explainer.report().of("rewritten")] == ["normalize"]
    x, u = randn(3, 6, seed=1).requires_grad_(), randn(3, 4, seed=2)
    (expected,) = torch.autograd.grad(net(x), x, u)
    with pytest.warns(UserWarning, match="no gate"):
        check(sp_fx.transform(net, rules=Rules(normalize=None)).pullback(x.detach(), u), expected, 1e-12)


def test_local_response_norm_of_an_aten_graph():
    def written(x):  # as torch.export leaves it
        d = aten.mul.Tensor(x, x)
        d = aten.unsqueeze.default(d, 1)
        d = aten.constant_pad_nd.default(d, [0, 0, 0, 0, 1, 1], 0.0)
        d = aten.squeeze.dim(aten.avg_pool3d.default(d, [3, 1, 1], [1, 1, 1]), 1)
        return aten.div.Tensor(x, aten.pow.Tensor_Scalar(aten.add.Tensor(aten.mul.Tensor(d, 0.5), 1.0), 0.75))

    net, ops = chain((written, oracle.LocalResponseNorm(3, 0.5, 0.75, 1.0)), (nn.ReLU(), gate("relu")))
    explainer = agree(net, ops, randn(2, 6, 3, 4), RULES["absolute"])
    assert [s.kind for s in explainer.report().of("rewritten")] == ["local_response_norm", "relu"]


BATCH_NORMS = {
    "function": lambda x, m: F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.1, m.eps),
    "torch": lambda x, m: torch.batch_norm(x, m.weight, m.bias, m.running_mean, m.running_var, False, 0.1, m.eps, False),
    "aten": lambda x, m: aten.batch_norm.default(x, m.weight, m.bias, m.running_mean, m.running_var, False, 0.1, m.eps, False),
}


@pytest.mark.parametrize("form", BATCH_NORMS)
def test_batch_norm_by_function_is_affine(form):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.relu = nn.BatchNorm2d(3), nn.ReLU()

        def forward(self, x):
            return self.relu(BATCH_NORMS[form](x, self.norm))

    net, x = fill(Normed()).double(), randn(2, 3, 4, 5)
    agree(net, [oracle.RunningNorm(net.norm), gate("relu")], x, RULES["absolute"])


def test_statistics_of_the_batch_by_torch_and_aten():
    for function in (torch.batch_norm, aten.batch_norm.default):
        net = Calls(lambda x, f=function: f(x, None, None, None, None, True, 0.1, 0.2, False))
        op = oracle.BatchStatNorm(nn.BatchNorm2d(3, eps=0.2, affine=False))
        agree(net, [op], randn(4, 3, 2, 5), RULES["absolute"])
    net = Calls(lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 0.2, False))
    agree(net, [oracle.InstanceNorm(nn.InstanceNorm2d(3, eps=0.2))], randn(4, 3, 2, 5), RULES["absolute"])


# -- products with a gate -----------------------------------------------------------------------------------------------

sigmoid = oracle.Smooth(torch.sigmoid, lambda z: torch.sigmoid(z) * torch.sigmoid(-z))


def half(which):
    """One of the halves of the last axis."""
    return oracle.Rearrange(lambda x: x.chunk(2, -1)[which], lambda v: torch.cat([v, v * 0] if which == 0 else [v * 0, v], -1))


def first_half_with(function):
    return lambda z: (lambda halves: halves[0] * function(halves[1]))(z.chunk(2, -1))


GATED = {
    "glu": (nn.GLU(), [sigmoid], "glu"),
    "glu by hand": (first_half_with(torch.sigmoid), [sigmoid], "mul"),
    "swiglu": (first_half_with(F.silu), [SILU], "mul"),
    "geglu": (first_half_with(F.gelu), [GELU], "mul"),
    "reglu": (first_half_with(F.relu), [gate("relu")], "mul"),
}


@pytest.mark.parametrize("how", ["absolute", "frozen", "uneven"])
@pytest.mark.parametrize("form", GATED)
def test_products_with_a_gate(form, how):
    function, gating, op = GATED[form]
    net, ops = chain(linear(6, 8), (function, oracle.Product([half(0)], [half(1), *gating])), linear(4, 4))
    for product in (None, FROZEN):
        rules = {**RULES[how], "product": product}
        explainer = sp_fx.transform(net, rules=as_rules(rules)) if form != "glu" and "hand" not in form else quiet(net, rules)
        x, u = randn(3, 6, seed=1), randn(3, 4, seed=2)
        assert torch.equal(explainer(x), net(x))
        check(explainer.pullback(x, u), oracle.pull(ops, x, u, rules), 1e-10)
        site = next(s for s in explainer.report().sites if s.kind == "product")
        told = ("kept", "product rule") if product is None else ("rewritten", "")
        assert (site.op, site.status, site.reason) == (op, *told)


def quiet(net, rules):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sp_fx.transform(net, rules=as_rules(rules))


def test_a_product_frozen_at_one_place():
    class Excite(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

        def forward(self, x):
            return x * F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))

    net, x, u = fill(nn.Sequential(Excite(), Excite())).double(), randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    explainer = transform(net, overrides={"1.mul": {"product": FROZEN}})
    status = {s.place: (s.status, s.reason) for s in explainer.report().sites}
    assert status["0.mul"] == ("kept", "product rule") and status["1.mul"] == ("rewritten", "")
    assert status["1.relu"] == ("rewritten", "steers a frozen gate: no signal passes here")
    inner = net[0](x)
    gate_value = F.hardsigmoid(net[1].up(F.relu(net[1].down(inner.mean((2, 3), keepdim=True))))).detach()
    check(explainer.pullback(x, u), transform(net[0]).pullback(x, u * gate_value), 1e-12)


# -- attention written out ----------------------------------------------------------------------------------------------


class Mixes(nn.Module):
    """Projections of tokens and a function of (q, k, v), each [B, H, N, D]."""

    def __init__(self, function, width=6, heads=2):
        super().__init__()
        self.function, self.heads = function, heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(self.function(q, k, v).transpose(1, 2).flatten(2))


BIAS = randn(2, 5, 5, seed=3)
WRITTEN = {
    "right of the values": lambda q, k, v: (v.mT @ (k @ q.mT).softmax(-2)).mT,
    "transposed": lambda q, k, v: (v.transpose(-2, -1) @ (q @ k.mT).softmax(-1).transpose(-2, -1)).transpose(-2, -1),
    "einsum": lambda q, k, v: torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v),
    "einsum, values first": lambda q, k, v: torch.einsum("bhjd,bhij->bhid", v, torch.softmax(q @ k.mT, -1)),
    "dropout between": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.5, False) @ v,
    "float32 softmax": lambda q, k, v: F.softmax(q @ k.mT, dim=-1, dtype=torch.float64).to(v.dtype) @ v,
    "flat heads": lambda q, k, v: torch.bmm(
        (q @ k.mT).flatten(0, 1).softmax(-1), v.flatten(0, 1)).unflatten(0, (-1, 2)),
    "aten": lambda q, k, v: aten.matmul.default(aten.softmax.int(aten.matmul.default(q, aten.transpose.int(k, -2, -1)), -1), v),
}  # fmt: skip


@pytest.mark.parametrize("tau", [1.0, 0.6, FROZEN])
@pytest.mark.parametrize("form", WRITTEN)
def test_attention_in_other_forms(form, tau):
    net = fill(Mixes(WRITTEN[form])).double()
    op = oracle.Attention(*map(oracle.Linear, (net.q, net.k, net.v, net.out)), 2, scale=1.0)
    explainer = agree(net, [op], randn(2, 5, 6, seed=1), {"attention": tau, "scale": "absolute"})
    report = explainer.report()
    assert [s.kind for s in report.of("rewritten")] == ["attention"]
    assert all("no signal passes" in s.reason for s in report.of("kept"))


def weighted(q, k, v, scale, bias, mixing):
    """The matrix that multiplies the values, [B, H, N, N], from first principles; `mixing` acts on the weights."""
    return mixing(torch.softmax((q @ k.mT * scale + bias) / 1.0, -1))


HEADS = randn(2, 2, seed=8)
BETWEEN = {
    "talking heads": lambda p: torch.einsum("gh,bhij->bgij", HEADS, p),
    "scaled and shifted": lambda p: p * 0.7 + 0.1,
    "normalised twice": lambda p: p / p.sum(-2, keepdim=True),
    "a mean of two": lambda p: (p + p.flip(-1)) / 2,
}
CODE = {
    "talking heads": lambda p: F.linear(p.permute(0, 2, 3, 1), HEADS).permute(0, 3, 1, 2),
    "scaled and shifted": lambda p: p * 0.7 + 0.1,
    "normalised twice": lambda p: p / p.sum(-2, keepdim=True),
    "a mean of two": lambda p: (p + p.flip(-1)) / 2,
}


@pytest.mark.parametrize("tau", [1.0, 0.6, FROZEN])
@pytest.mark.parametrize("form", BETWEEN)
def test_what_weights_pass_on_their_way_to_the_values(form, tau):
    net = fill(Mixes(lambda q, k, v: CODE[form]((q @ k.transpose(-2, -1) + BIAS).softmax(dim=-1)) @ v)).double()
    explainer = transform(net, attention=tau)
    x, u = randn(2, 5, 6, seed=1), randn(2, 5, 6, seed=2)
    assert torch.equal(explainer(x), net(x))
    with torch.no_grad():
        q, k = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (net.q, net.k))
        p = BETWEEN[form](torch.softmax((q @ k.mT + BIAS) / (1.0 if tau == FROZEN else tau), -1))
        received = p.mT @ (u @ net.out.weight).unflatten(-1, (2, -1)).transpose(1, 2)
        expected = received.transpose(1, 2).flatten(2) @ net.v.weight
    check(explainer.pullback(x, u), expected, 1e-10)
    assert not explainer.report().of("NOT REWRITTEN")


def test_attention_across_channels():
    """XCA: the softmax is over channels, from normalised queries and keys."""

    def mix(q, k, v):
        q, k, v = (t.transpose(-2, -1) for t in (q, k, v))
        return ((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * 0.5).softmax(-1) @ v).mT

    net, x, u = fill(Mixes(mix)).double(), randn(2, 5, 6, seed=1), randn(2, 5, 6, seed=2)
    explainer = transform(net)
    with torch.no_grad():
        q, k = (f(x).unflatten(-1, (2, -1)).permute(0, 2, 3, 1) for f in (net.q, net.k))
        p = (q / q.norm(dim=-1, keepdim=True) @ (k / k.norm(dim=-1, keepdim=True)).mT * 0.5).softmax(-1)
        received = p.mT @ (u @ net.out.weight).unflatten(-1, (2, -1)).permute(0, 2, 3, 1)
        expected = received.permute(0, 3, 1, 2).flatten(2) @ net.v.weight
    check(explainer.pullback(x, u), expected, 1e-10)


CODES = randn(4, 2, seed=9)
ROUTERS = {
    "head": lambda x: x.relu().softmax(-1),
    "router": lambda x: x.relu() * x.softmax(-1)[:, :1],
    "a gate on each place": lambda x: x.relu() * x.softmax(-1),
    "codebook": lambda x: x.relu().softmax(-1) @ CODES,
}


@pytest.mark.parametrize("form", ROUTERS)
def test_a_softmax_that_multiplies_no_values_keeps_its_derivative(form):
    net = Calls(ROUTERS[form])
    x = randn(3, 4).requires_grad_()
    y = net(x)
    u = randn(*y.shape, seed=1)
    (expected,) = torch.autograd.grad(y, x, u)
    explainer = transform(net, relu=FROZEN)
    check(explainer.pullback(x.detach(), u), expected, 1e-12)
    reason = "multiplies no values" if form in ("head", "codebook") else "not summed up along its axis"
    assert reason in next(s.reason for s in explainer.report().sites if s.op == "softmax")


# -- everything together ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1e-9, 1e-10])
def test_without_temperature_the_map_is_the_gradient(tau):
    """Networks of ReLU, max pooling (all forms) and affine layers, in float64."""
    net = fill(nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 8, 3),
        Calls(lambda z: torch.where(z > 0, z, 0.0)), nn.AdaptiveMaxPool2d((3, 4)), nn.Conv2d(8, 8, 2), nn.LeakyReLU(0.1),
        Calls(lambda z: z.amax((2, 3))), nn.Linear(8, 5),
    )).double()  # fmt: skip
    x, u = randn(3, 3, 15, 17, seed=1).requires_grad_(), randn(3, 5, seed=2)
    (expected,) = torch.autograd.grad(net(x), x, u)
    for scale in ("absolute", "sample"):
        explainer = transform(net, relu=tau, leaky_relu=tau, max_pool=tau, scale=scale)
        check(explainer.pullback(x.detach(), u), expected, 1e-9)  # no seeded pre-activation is within 1e-7 of a kink


def test_the_new_rows_under_the_other_ways_of_differentiating():
    def f(z):
        z = z * torch.sigmoid(1.702 * z)
        z = F.adaptive_max_pool2d(z, (2, 3))
        return z.amax(-1) * torch.rsqrt(z.amax(-1).pow(2).mean(-1, keepdim=True) + 1e-3)

    explainer, x, u = transform(Calls(f)), randn(2, 3, 5, 7), randn(2, 3, 2, seed=1)
    expected = explainer.pullback(x, u)
    _, back = torch.func.vjp(explainer, x)
    check(back(u)[0], expected, 1e-12)
    each = torch.func.vmap(lambda v: back(v)[0])(torch.stack([u, 2 * u]))
    check(each[1], 2 * expected, 1e-12)
    exported = torch.export.export(explainer, (x,)).module()
    leaf = x.clone().requires_grad_()
    check(torch.autograd.grad(exported(leaf), leaf, u)[0], expected, 1e-12)


def test_a_gate_written_out_after_another():
    quick = (lambda z: z * torch.sigmoid(1.702 * z), gate("quick_gelu", rate=1.702))
    top = (lambda z: z.max(-1, True)[0], oracle.Amax(-1, keepdim=True))
    swish = (lambda z: z * z.sigmoid(), SILU)
    net, ops = chain(linear(6, 8), (lambda z: F.silu(z), SILU), quick, swish, top, swish, swish)
    agree(net, ops, randn(3, 6, seed=1), RULES["absolute"])


def test_operators_of_python_are_calls_too():
    net = Calls(lambda x: operator.truediv(operator.mul(x, F.relu6(operator.add(x, 3))), 6))
    assert [s.kind for s in transform(net).report().of("rewritten")] == ["hardswish"]


def test_overloads_out_of_place_take_what_those_in_place_do():
    """`pow_.Scalar` takes a tensor and a number, and `pow.Scalar` a number and a tensor."""
    for overload in (aten.pow_.Scalar, aten.pow_.Tensor, aten.mul_.Tensor, aten.add_.Scalar, aten.relu_.default):
        plain = calls.plain_target(overload)
        taken = [[str(a.type) for a in o._schema.arguments] for o in (overload, plain)]
        assert taken[0] == taken[1] and not plain._schema.is_mutable
    assert calls.plain_target(aten.pow_.Scalar) is aten.pow.Tensor_Scalar
