"""Dual-path ops under every way that PyTorch differentiates and captures.

The reference is eager autograd through the same network, which test_explainer_oracle.py ties to the formulas.
"""

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from helpers import relative
from sp_fx.gates.dual_path import dual_path
from sp_fx.gates.table import TABLE

POOL = dict(kernel=(3, 2), stride=(2, 2), padding=(1, 1), dilation=(1, 1), ceil_mode=False)
W = torch.linspace(0.5, 1.5, 4)
M = torch.tensor([[0.2, -0.4, 1.0], [0.5, 0.1, 2.0]])  # means and variances of three channels
KINDS = {
    "relu": lambda x: dual_path("relu", x, tau=0.6),
    "relu, sample scale": lambda x: dual_path("relu", x, tau=0.6, scale="sample"),
    "relu, margin by channel": lambda x: dual_path("relu", x, tau=0.6, scale="channel", margin=0.4),
    "leaky_relu": lambda x: dual_path("leaky_relu", x, tau=0.6, negative_slope=0.1),
    "prelu": lambda x: dual_path("prelu", x, W[:3].to(x.dtype), tau=0.6),
    "hardtanh": lambda x: dual_path("hardtanh", x, tau=0.6, low=-0.5, high=1.0),
    "hardtanh, margin by channel": lambda x: dual_path("hardtanh", x, tau=1.7, scale="channel", margin=0.4, low=-0.5, high=1.0),
    "hardtanh, by a batch norm": lambda x: dual_path("hardtanh", x, M.to(x.dtype), tau=1.7, scale="batch_norm", margin=0.4,
                                                     low=-0.5, high=1.0),
    "between, by a batch norm": lambda x: dual_path("between", x, -W[:1].to(x.dtype), W[:1].to(x.dtype), M.to(x.dtype), tau=0.6,
                                                    scale="batch_norm", margin=0.4),
    "written, by a batch norm": lambda x: dual_path("written", x, x.clamp(-0.5, 1.0).detach(), M.to(x.dtype), tau=0.9,
                                                    scale="batch_norm", row="hardtanh", args=(("low", -0.5), ("high", 1.0))),
    "floor": lambda x: dual_path("floor", x, tau=0.6, scale="sample", margin=-0.3, low=-0.5),
    "ceiling": lambda x: dual_path("ceiling", x, tau=0.6, scale="channel", margin=0.3, high=0.4),
    "elu": lambda x: dual_path("elu", x, tau=0.6, alpha=1.0, output_scale=1.0, input_scale=1.0),
    "gelu": lambda x: dual_path("gelu", x, tau=1.0, approximate="none"),
    "silu": lambda x: dual_path("silu", x, tau=1.6),
    "quick_gelu": lambda x: dual_path("quick_gelu", x, tau=1.0, rate=1.702),
    "maximum": lambda x: dual_path("maximum", x, W[:1].to(x.dtype), tau=0.6),
    "between": lambda x: dual_path("between", x, -W[:1].abs().to(x.dtype), W[:1].abs().to(x.dtype), tau=0.6),
    "between, margin by channel": lambda x: dual_path("between", x, -W[:1].to(x.dtype), W[:1].to(x.dtype), tau=0.6,
                                                      scale="channel", margin=0.4),
    "minimum": lambda x: dual_path("minimum", x, W[:1].to(x.dtype), tau=0.6),
    "negative_relu": lambda x: dual_path("negative_relu", x, tau=0.6),
    "hardsigmoid": lambda x: dual_path("hardsigmoid", x * 4, tau=0.6),
    "relu_squared": lambda x: dual_path("relu_squared", x, tau=0.6, scale="sample"),
    "threshold": lambda x: dual_path("threshold", x, tau=0.6, threshold=0.2, value=-1.0),
    "hardshrink": lambda x: dual_path("hardshrink", x, tau=0.6, width=0.3),
    "softshrink": lambda x: dual_path("softshrink", x, tau=0.6, width=0.3),
    "abs, sample scale": lambda x: dual_path("abs", x, tau=0.6, scale="sample"),
    "amax": lambda x: dual_path("amax", x, tau=0.3, dim=(-1,), keepdim=False),
    "amin": lambda x: dual_path("amin", x, tau=0.3, dim=(-1,), keepdim=True),
    "adaptive_max_pool": lambda x: dual_path("adaptive_max_pool", x, tau=0.3, scale="sample", size=(4, 3)),
    "normalize": lambda x: dual_path("normalize", x, tau="frozen", p=2.0, dim=1, eps=1e-12),
    "written, margin by channel": lambda x: dual_path("written", x, x.clamp(-0.5, 1.0).detach(), tau=0.9, scale="channel",
                                                      margin=0.4, row="hardtanh", args=(("low", -0.5), ("high", 1.0))),
    "written": lambda x: dual_path("written", x, (x * torch.sigmoid(x)).detach(), tau=0.9, row="silu"),
    "glu": lambda x: dual_path("glu", x, tau="frozen", dim=-1),
    "hardswish": lambda x: dual_path("hardswish", x, tau=1.6),
    "mish": lambda x: dual_path("mish", x, tau=1.6),
    "max_pool": lambda x: dual_path("max_pool", x, tau=0.3, **POOL),
    "max_pool, sample scale": lambda x: dual_path("max_pool", x, tau=0.3, scale="sample", **POOL),
    "layer_norm": lambda x: dual_path("layer_norm", x, W.to(x.dtype), None, tau="frozen", normalized_shape=(4,), eps=1e-5),
    "rms_norm": lambda x: dual_path("rms_norm", x, W.to(x.dtype), tau="frozen", normalized_shape=(4,), eps=1e-5),
    "group_norm": lambda x: dual_path("group_norm", x, None, None, tau="frozen", num_groups=1, eps=1e-5),
    "instance_norm": lambda x: dual_path("instance_norm", x, None, None, tau="frozen", eps=1e-5),
    "local_response_norm": lambda x: dual_path("local_response_norm", x, tau="frozen", size=2, alpha=0.1, beta=0.75, k=1.0),
    "attention": lambda x: dual_path("attention", x, x * 2, x.sin(), None, tau=0.7),
    "attention, one tensor": lambda x: dual_path("attention", x, x, x, None, tau=1.0),
    "linear": lambda x: dual_path("linear", x, torch.outer(W, W).to(x.dtype), None, tau="frozen"),
    "conv": lambda x: dual_path("conv", x, torch.ones(2, 3, 2, 2, dtype=x.dtype), None, tau="frozen", stride=(1, 2),
                                padding=(1, 0), dilation=(1, 1), groups=1),
    "conv, smooth": lambda x: dual_path("conv", x, torch.ones(2, 3, 3, 3, dtype=x.dtype), None, tau="smooth", stride=(2, 1),
                                        padding=(1, 0), dilation=(1, 1), groups=1),
    "affine_norm": lambda x: dual_path("affine_norm", x, *[W[:3].to(x.dtype)] * 2, None, None, tau="frozen", eps=1e-5),
}  # fmt: skip


class Net(nn.Module):
    """Any op, between two smooth ones, as five numbers a sample."""

    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, x):
        y = self.op(x * 1.5).flatten(1)
        return torch.stack([(y * (k + 1)).sin().mean(1) for k in range(5)], 1)


def grad(f, x, u):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(f(x), x, u)[0]


def exported(net, x, u, decompose=False, strict=False):
    program = torch.export.export(net, (x,), strict=strict)
    return grad((program.run_decompositions() if decompose else program).module(), x, u)


def vjp(net, x, u):
    return torch.func.vjp(net, x)[1](u)[0]


WAYS = {
    "vjp": vjp,
    "vmap over cotangents": lambda n, x, u: torch.func.vmap(torch.func.vjp(n, x)[1])(torch.stack([u, 2 * u]))[0][0],
    "vmap over inputs": lambda n, x, u: torch.func.vmap(lambda a, b: vjp(n, a[None], b[None])[0])(x, u),
    "batched grads": lambda n, x, u: (lambda x: torch.autograd.grad(n(x), x, torch.stack([u, u]), is_grads_batched=True)[0][1])(
        x.clone().requires_grad_()
    ),
    "make_fx": lambda n, x, u: make_fx(lambda x, u: vjp(n, x, u))(x, u)(x, u),
    "make_fx, symbolic": lambda n, x, u: make_fx(lambda x, u: vjp(n, x, u), tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        x, u
    )(x, u),
    "make_fx, then export": lambda n, x, u: torch.export.export(make_fx(lambda x, u: vjp(n, x, u))(x, u), (x, u)).module()(x, u),
    "fx trace": lambda n, x, u: grad(torch.fx.symbolic_trace(n), x, u),
    "second fx trace": lambda n, x, u: grad(torch.fx.symbolic_trace(torch.fx.symbolic_trace(n)), x, u),
    "deep copy": lambda n, x, u: grad(copy.deepcopy(torch.fx.symbolic_trace(n)), x, u),
    "export": lambda n, x, u: exported(n, x, u),
    "export, decomposed": lambda n, x, u: exported(n, x, u, decompose=True),
    "strict export": lambda n, x, u: exported(n, x, u, strict=True),
}


@pytest.fixture
def point():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 6, 4, generator=g, dtype=torch.float64), torch.randn(2, 5, generator=g, dtype=torch.float64)


COSTLY = ("make_fx, symbolic", "export, decomposed")  # two thirds of the time of all ways: of most kinds in the slow form
EVERY_WAY = [
    pytest.param(kind, way, marks=[pytest.mark.slow] if way in COSTLY and i % 5 else [])
    for i, kind in enumerate(KINDS)
    for way in WAYS
]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind, way", EVERY_WAY)
def test_every_way_gives_the_soft_adjoint(kind, way, point):
    x, u = point
    net = Net(KINDS[kind])
    assert relative(WAYS[way](net, x, u), grad(net, x, u)) <= 1e-12  # the same formulas in float64


def test_every_row_of_the_table_is_in_the_matrix():
    shown = {kind.split(",")[0] for kind in KINDS}
    groups = {"scatter_amax", "scatter_amin"}  # in test_gates_graphs.py
    assert set(TABLE) - shown - groups == {"mix", "surrogate", "batch_norm", "fractional_max_pool"}  # not by sample, or parts


class All(nn.Module):
    """Every kind in one network, so that one compilation covers them."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(Net(op) for op in KINDS.values())

    def forward(self, x):
        return sum(net(x) for net in self.nets)


@pytest.mark.parametrize("way", ["backward of the compiled forward", pytest.param("compiled vjp", marks=pytest.mark.slow)])
def test_compiled_whole(way, point):
    x, u = point
    net = All()
    if way == "compiled vjp":
        pulled = torch.compile(lambda x, u: vjp(net, x, u), fullgraph=True)(x, u)
    else:
        pulled = grad(torch.compile(net, fullgraph=True), x, u)
    assert relative(pulled, grad(net, x, u)) <= 1e-10  # Inductor reorders float64 sums


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_precision_of_each_dtype_against_float64(kind, dtype, tolerance, point):
    """Float32: rounding over a few dozen terms, and Phi to 3e-7. The half types round every input and output: 2^-8 and 2^-11."""
    if kind == "local_response_norm" and dtype != torch.float32:
        pytest.skip("torch has no local_response_norm of the half types on CPU")
    x = point[0].to(dtype)
    op = KINDS[kind]
    u = op(x).detach().double().cos()
    soft = torch.autograd.grad(op(y := x.clone().requires_grad_()), y, u.to(dtype))[0]
    exact = torch.autograd.grad(op(y := x.double().requires_grad_()), y, u)[0]
    assert soft.dtype == dtype
    assert relative(soft.double(), exact) <= tolerance


def test_each_sample_of_a_large_batch_gets_what_it_gets_alone():
    x = torch.randn(5, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    v = torch.randn(5, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    for op in (KINDS["relu, sample scale"], KINDS["gelu"], KINDS["prelu"], KINDS["max_pool, sample scale"]):
        batch = torch.autograd.grad((y := op(z := x.clone().requires_grad_())), z, v[..., : y.shape[-2], : y.shape[-1]])[0]
        for i in range(5):
            alone = torch.autograd.grad(
                (y := op(z := x[i : i + 1].clone().requires_grad_())), z, v[i : i + 1, :, : y.shape[-2], : y.shape[-1]]
            )[0]
            assert relative(batch[i : i + 1], alone) <= 1e-6  # the same arithmetic, except the scale's two formulas


@pytest.mark.parametrize("kind", [k for k in KINDS if "attention" not in k])
def test_empty_batches(kind):
    x = torch.randn(0, 3, 6, 4, requires_grad=True)
    y = KINDS[kind](x)
    assert torch.autograd.grad(y, x, torch.zeros_like(y))[0].shape == x.shape


def test_an_adjoint_is_not_differentiated():
    """Of one gate alone autograd would be right; of two it would go through the adjoint of the first a second time."""
    z = torch.randn(7, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(dual_path("gelu", z, tau=1.0, approximate="none").sum(), z)[0]
    again = torch.autograd.grad(dual_path("gelu", z, tau=1.0, approximate="none").sum(), z, create_graph=True)[0]
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="a map cannot be differentiated"):
        again.sum().backward()
    assert torch.autograd.grad(dual_path("gelu", z, tau=1.0, approximate="none").sum(), z)[0].equal(first)  # nothing is left


def test_nothing_is_saved_of_the_inputs_of_affine_maps():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dual_path("linear", torch.randn(64, 4, requires_grad=True), torch.randn(3, 4), None, tau="frozen")
    assert max(t.untyped_storage().nbytes() for t in kept) <= 3 * 4 * 4
