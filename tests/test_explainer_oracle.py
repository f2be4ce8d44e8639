"""The explainer against `oracle.py`, a second derivation of every adjoint, and against the identities that they must satisfy."""

import copy
import functools
import math
import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import oracle
import sp_fx
from oracle import FROZEN
from sp_fx import Rules

# Tolerances. float64: a chain of a few layers rounds at about 1e-15; 1e-10 leaves room for cancellation in the adjoints and none
# for a wrong formula. float32: rounding of 6e-8 is amplified by 1/tau in pooling and by the condition of the norms.
DOUBLE, SINGLE = 1e-10, 2e-5
NORMS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "local_response_norm", "normalize")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed)).double()


def exact(values):
    """A float64 tensor of numbers that float32 would round."""
    return torch.tensor(values, dtype=torch.float64)


def fill(module, seed=0):
    """Parameters that make every gate work: weights that double the variance; biases, gains and statistics far from trivial."""
    g = generator(seed)
    for name, p in [*module.named_parameters(), *module.named_buffers()]:
        if not p.is_floating_point() or name.split(".")[-1] == "mask":
            continue
        if name.endswith("running_var"):
            new = 0.5 + torch.rand(p.shape, generator=g)
        elif p.dim() >= 2 and "bias_" not in name:
            new = torch.randn(p.shape, generator=g) * math.sqrt(2 / max(p[0].numel(), 1))
        elif name.endswith("weight"):
            new = 1 + 0.5 * torch.randn(p.shape, generator=g)
        else:
            new = 0.5 * torch.randn(p.shape, generator=g)
        p.data.copy_(new)
    return module.eval()


def check(got, expected, bar):
    """The relative error in L2 is below the bar, and nothing is infinite or NaN; tuples are one long vector."""
    if isinstance(expected, tuple):
        assert isinstance(got, tuple) and len(got) == len(expected)
        got, expected = (torch.cat([p.flatten() for p in parts]) for parts in (got, expected))
    assert got.shape == expected.shape
    finite = bool(torch.isfinite(got).all())
    assert finite
    error = float((got.double() - expected).norm() / expected.norm())
    assert error < bar, f"{error:.1e} is above {bar:.0e}"


def transform(model, **rules):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing in this file is without a rule
        return sp_fx.transform(model, rules=as_rules(rules))


def as_rules(rules):
    """The library's rules of the oracle's."""

    def as_rule(value):
        return sp_fx.Soft(*map(as_rule, value)) if isinstance(value, oracle.Soft) else value

    return Rules(**{kind: as_rule(value) for kind, value in rules.items()})


# -- the networks, each layer beside its op -------------------------------------------------------------------------------------

CASES = {}


def case(name, shape, *pairs, affine=True):
    """A chain: `pairs` are a module and the op that it is, or a function from the module to that op."""
    assert name not in CASES
    CASES[name] = (shape, pairs, affine)


def layers(name, seed=0):
    shape, pairs, _ = CASES[name]
    modules = [copy.deepcopy(module) for module, _ in pairs]
    fill(nn.ModuleList(modules), seed)
    with torch.no_grad():
        ops = [op if isinstance(op, oracle.Op) else op(module) for module, (_, op) in zip(modules, pairs, strict=True)]
    shapes = shape if isinstance(shape[0], tuple) else (shape,)
    x = tuple(randn(*s, seed=seed + 1 + i) for i, s in enumerate(shapes))
    return modules, ops, x if isinstance(shape[0], tuple) else x[0]


class Chain(nn.Module):
    """`nn.Sequential` whose first layer may take two inputs."""

    def __init__(self, modules):
        super().__init__()
        self.first, self.rest = modules[0], nn.Sequential(*modules[1:])

    def forward(self, x):
        return self.rest(self.first(x))


class PairChain(Chain):
    def forward(self, x, memory):
        return self.rest(self.first(x, memory))


def network(name, seed=0):
    modules, ops, x = layers(name, seed)
    ops = oracle.joined(ops)
    model = (PairChain if isinstance(x, tuple) else Chain)(modules).eval().double()
    return model, ops, x


class Calls(nn.Module):
    """A functional, method or operator form of an op."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def gate(kind, **args):
    return oracle.Gate(kind, **args)


RELU = (nn.ReLU(inplace=True), gate("relu"))


def linear(i, o, **kwargs):
    return nn.Linear(i, o, **kwargs), oracle.Linear


def conv(i, o, k, axes=2, **kwargs):
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](i, o, k, **kwargs), oracle.Conv


def head(*shape, classes=4):
    return (nn.Flatten(), oracle.flatten(*shape)), linear(math.prod(shape), classes)


POINTWISE = {
    "relu module": (nn.ReLU(), gate("relu")),
    "relu in place": (nn.ReLU(inplace=True), gate("relu")),
    "relu function": (Calls(F.relu), gate("relu")),
    "relu method": (Calls(lambda z: z.relu()), gate("relu")),
    "relu method in place": (Calls(lambda z: (z * 1).relu_()), gate("relu")),
    "relu torch": (Calls(torch.relu), gate("relu")),
    "leaky_relu": (nn.LeakyReLU(0.2), gate("leaky_relu", slope=0.2)),
    "leaky_relu default slope": (Calls(F.leaky_relu), gate("leaky_relu", slope=0.01)),
    "leaky_relu negative slope": (nn.LeakyReLU(-0.4), gate("leaky_relu", slope=-0.4)),
    "leaky_relu steep": (nn.LeakyReLU(1.7, inplace=True), gate("leaky_relu", slope=1.7)),
    "rrelu": (nn.RReLU(0.1, 0.5), gate("leaky_relu", slope=0.3)),
    "prelu shared": (nn.PReLU(), lambda m: gate("prelu", slope=oracle.double(m.weight))),
    "prelu channels": (nn.PReLU(9), lambda m: gate("prelu", slope=oracle.double(m.weight))),
    "relu6": (nn.ReLU6(), gate("hardtanh", low=0.0, high=6.0)),
    "relu6 function": (Calls(F.relu6), gate("hardtanh", low=0.0, high=6.0)),
    "hardtanh": (nn.Hardtanh(), gate("hardtanh", low=-1.0, high=1.0)),
    "hardtanh narrow": (nn.Hardtanh(-0.2, 0.3), gate("hardtanh", low=-0.2, high=0.3)),
    "clamp": (Calls(lambda z: z.clamp(-0.5, 1.5)), gate("hardtanh", low=-0.5, high=1.5)),
    "clamp min": (Calls(lambda z: torch.clamp(z, min=-0.5)), gate("relu", low=-0.5)),
    "clamp max": (Calls(lambda z: torch.clip(z, max=0.7)), gate("relu", high=0.7)),
    "clamp_min method": (Calls(lambda z: z.clamp_min(0.25)), gate("relu", low=0.25)),
    "elu": (nn.ELU(), gate("elu")),
    "elu alpha": (nn.ELU(1.7), gate("elu", alpha=1.7)),
    "selu": (nn.SELU(), gate("elu", alpha=oracle.SELU_ALPHA, scale=oracle.SELU_SCALE)),
    "celu": (nn.CELU(), gate("elu")),
    "celu alpha": (nn.CELU(0.5), gate("elu", alpha=0.5, rate=2.0)),  # PyTorch's gradient has 1 / alpha in float32 only
    "gelu erf": (nn.GELU(), gate("gelu")),
    "gelu tanh": (nn.GELU(approximate="tanh"), gate("gelu", approximate="tanh")),
    "silu": (nn.SiLU(), gate("silu")),
    "silu function in place": (Calls(lambda z: F.silu(z * 1, inplace=True)), gate("silu")),
    "hardswish": (nn.Hardswish(), gate("hardswish")),
    "mish": (nn.Mish(), gate("mish")),
}
for form, (module, op) in POINTWISE.items():
    last = [] if form == "prelu channels" else [(module, op), linear(9, 7)]
    case(form, (3, 6), linear(6, 9), (module, op), linear(9, 9), *last, linear(7 if last else 9, 4))

case("prelu on images", (2, 3, 5, 6), conv(3, 4, 3), (nn.PReLU(4), lambda m: gate("prelu", slope=oracle.double(m.weight))),
     *head(4, 3, 4))  # fmt: skip


def pool(axes, kernel, **kwargs):
    module = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1](kernel, **kwargs)
    spread = {k: v if k == "ceil_mode" or isinstance(v, tuple) else (v,) * axes for k, v in kwargs.items()}
    return module, oracle.MaxPool((kernel,) * axes if isinstance(kernel, int) else kernel, **spread)


def pooled(name, shape, channels, layer):
    axes = len(shape)
    convolution, op = conv(2, channels, 2, axes)
    out = layer[1].matrices(torch.zeros(1, 1, *(n - 1 for n in shape)).double(), FROZEN)[0]
    case(f"max_pool{axes}d {name}", (2, 2, *shape), (convolution, op), layer, *head(channels, *out))


pooled("even", (9,), 3, pool(1, 2))
pooled("overlap padded", (12,), 3, pool(1, 3, stride=2, padding=1))
pooled("ceil", (12,), 3, pool(1, 4, stride=3, padding=2, ceil_mode=True))
pooled("ceil drops a window", (9,), 3, pool(1, 2, stride=3, padding=1, ceil_mode=True))
pooled("dilated", (12,), 3, pool(1, 3, stride=1, dilation=3))
pooled("function", (10,), 2, (Calls(lambda z: F.max_pool1d(z, 3, 1)), oracle.MaxPool((3,), (1,))))
pooled("overlap padded", (9, 8), 3, pool(2, 3, stride=2, padding=1))
pooled("gaps", (9, 10), 2, pool(2, 2, stride=3))
pooled("all odd", (9, 11), 2, pool(2, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), ceil_mode=True))
pooled("ceil wide", (8, 8), 2, pool(2, (2, 3), stride=(3, 2), padding=(1, 1), ceil_mode=True))
pooled("dilated padded", (8, 9), 2, pool(2, 3, stride=2, padding=1, dilation=2))
pooled("function", (7, 7), 2, (Calls(lambda z: F.max_pool2d(z, 3, padding=1)), oracle.MaxPool((3, 3), (3, 3), (1, 1))))
pooled("one window", (6, 5), 2, (Calls(lambda z: F.max_pool2d(z, kernel_size=[5, 4])), oracle.MaxPool((5, 4))))
pooled("even", (5, 5, 5), 2, pool(3, 2))
pooled("all odd", (5, 6, 7), 2, pool(3, (2, 3, 2), stride=(2, 1, 2), padding=(1, 1, 0), dilation=(1, 2, 1), ceil_mode=True))

case("layer_norm", (3, 5), linear(5, 6), (nn.LayerNorm(6), oracle.LayerNorm), linear(6, 4))
case("layer_norm two axes", (2, 3, 4, 5), (nn.LayerNorm((4, 5)), oracle.LayerNorm), *head(3, 4, 5))
case("layer_norm bare", (3, 4, 5), (nn.LayerNorm(5, elementwise_affine=False, eps=0.1), oracle.LayerNorm), *head(4, 5))
case("layer_norm no bias", (3, 4, 5), (nn.LayerNorm(5, bias=False), oracle.LayerNorm), *head(4, 5))
case("layer_norm channels last", (2, 3, 4, 5), (Calls(lambda z: z.permute(0, 2, 3, 1)), oracle.permute(0, 2, 3, 1)),
     (nn.LayerNorm(3), oracle.LayerNorm), (nn.GELU(), gate("gelu")), *head(4, 5, 3))  # fmt: skip
case("rms_norm", (3, 5), linear(5, 6), (nn.RMSNorm(6), oracle.RMSNorm), linear(6, 4))
case("rms_norm two axes", (2, 3, 4, 5), (nn.RMSNorm((4, 5), eps=0.2), oracle.RMSNorm), *head(3, 4, 5))
case("rms_norm bare", (2, 6), (nn.RMSNorm(6, elementwise_affine=False), oracle.RMSNorm), linear(6, 4))
case("group_norm", (2, 6, 3, 4), (nn.GroupNorm(3, 6), oracle.GroupNorm), *head(6, 3, 4))
case("group_norm bare", (2, 6, 5), (nn.GroupNorm(2, 6, affine=False), oracle.GroupNorm), *head(6, 5))
case("group_norm no space", (3, 6), (nn.GroupNorm(2, 6), oracle.GroupNorm), linear(6, 4))
case("group_norm one group", (2, 4, 3, 3), (nn.GroupNorm(1, 4, eps=0.3), oracle.GroupNorm), RELU, *head(4, 3, 3))
case("instance_norm 1d", (2, 3, 7), (nn.InstanceNorm1d(3, affine=True), oracle.InstanceNorm), *head(3, 7))
case("instance_norm 2d", (2, 3, 4, 5), (nn.InstanceNorm2d(3), oracle.InstanceNorm), *head(3, 4, 5))
case("instance_norm 3d", (2, 3, 2, 3, 4), (nn.InstanceNorm3d(3, affine=True), oracle.InstanceNorm), *head(3, 2, 3, 4))
case("instance_norm running", (2, 3, 4, 5), (nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
     oracle.RunningInstanceNorm), RELU, *head(3, 4, 5))  # fmt: skip
case("batch_norm of the batch", (5, 3, 4, 5), (nn.BatchNorm2d(3, track_running_stats=False), oracle.BatchStatNorm),
     *head(3, 4, 5))  # fmt: skip
case("batch_norm of the batch 1d", (5, 4), (nn.BatchNorm1d(4, affine=False, track_running_stats=False), oracle.BatchStatNorm),
     linear(4, 4))  # fmt: skip
case("batch_norm running", (2, 3, 4, 5), conv(3, 4, 3, bias=False), (nn.BatchNorm2d(4), oracle.RunningNorm), RELU,
     *head(4, 2, 3))  # fmt: skip


def normed(norm, kind, function, **args):
    return nn.Sequential(norm, *function), lambda m: oracle.Normed(oracle.RunningNorm(m[0]), gate(kind, **args))


case("relu6 of a batch_norm", (2, 3, 4, 5), conv(3, 4, 3, bias=False), normed(nn.BatchNorm2d(4), "hardtanh", [nn.ReLU6()],
     low=0.0, high=6.0), *head(4, 2, 3))  # fmt: skip
case("clamp of a batch_norm 1d", (3, 5), linear(5, 6), normed(nn.BatchNorm1d(6, affine=False), "hardtanh",
     [nn.Dropout(), Calls(lambda z: z.contiguous().clamp(-0.3, 0.8))], low=-0.3, high=0.8), linear(6, 4))  # fmt: skip
case("relus of batch_norms", (2, 3, 4, 5), conv(3, 4, 3), normed(nn.BatchNorm2d(4), "relu", [nn.ReLU(inplace=True)]),
     normed(nn.BatchNorm2d(4), "leaky_relu", [nn.LeakyReLU(0.3)], slope=0.3), *head(4, 2, 3))  # fmt: skip
case("local_response_norm", (2, 6, 3, 3), (nn.LocalResponseNorm(5, 0.5, 0.75, 1.0), oracle.LocalResponseNorm(5, 0.5, 0.75, 1.0)),
     *head(6, 3, 3))  # fmt: skip
case("local_response_norm even", (2, 6, 7), (Calls(lambda z: F.local_response_norm(z, 4, 0.9, 0.6, 2.0)),
     oracle.LocalResponseNorm(4, 0.9, 0.6, 2.0)), *head(6, 7))  # fmt: skip


class Attend(nn.Module):
    """Projections round a function of (q, k, v, mask), heads on axis 1."""

    def __init__(self, function, width=6, heads=2, kv_heads=None, memory=None, mask=None):
        super().__init__()
        self.function, self.heads, self.kv_heads = function, heads, kv_heads or heads
        inner = width // heads * self.kv_heads
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(memory or width, inner) for _ in "kv")
        self.register_buffer("mask", mask)

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k(memory).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        v = self.v(memory).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        return self.out(self.function(q, k, v, self.mask).transpose(1, 2).flatten(2))


class CrossAttend(Attend):
    def forward(self, x, memory):
        return super().forward(x, memory)


def attend(function, cls=Attend, scale=None, causal=False, allowed=None, **kwargs):
    """`allowed`: the oracle's mask where it is not the module's."""

    def op(module):
        mask = module.mask if allowed is None else allowed
        return oracle.Attention(*map(oracle.Linear, (module.q, module.k, module.v, module.out)), module.heads, module.kv_heads,
                                scale, mask, causal)  # fmt: skip

    return cls(function, **kwargs), op


def sdpa(**kwargs):
    return lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **kwargs)


def some(*shape, seed):
    """A bool mask that leaves the first key to every row."""
    mask = torch.rand(*shape, generator=generator(seed)) < 0.6
    mask[..., 0] = True
    return mask


def additive(mask, low=-math.inf):
    """A float mask from a bool one, with a bias on what may be attended."""
    bias = torch.randn(mask.shape, generator=generator(9))
    return torch.where(mask, bias, low)


TOKENS = (2, 5, 6)
READ = (Calls(lambda z: z.mean(1)), oracle.Mean(1)), linear(6, 4)


def written(normalise=lambda s: s.softmax(-1), scale=None, drop=False):
    def function(q, k, v, mask):
        score = q @ k.transpose(-2, -1)
        score = score if scale is None else score * scale
        p = normalise(score if mask is None else score + mask)
        return (F.dropout(p, 0.3, training=False) if drop else p) @ v

    return function


def written_bmm(q, k, v, mask):
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    p = F.softmax(torch.bmm(flat[0], flat[1].transpose(1, 2)) / math.sqrt(3), dim=2)
    return torch.bmm(p, flat[2]).unflatten(0, (-1, 2))


def written_fill(q, k, v, mask):
    return torch.matmul(torch.softmax((q @ k.mT * 0.8).masked_fill(~mask, -math.inf), dim=-1), v)


case("sdpa", TOKENS, attend(sdpa()), *READ)
case("sdpa bool mask", TOKENS, attend(sdpa(), mask=some(5, 5, seed=1)), *READ)
case("sdpa key padding", TOKENS, attend(sdpa(), mask=some(2, 1, 1, 5, seed=2)), *READ)
case("sdpa float mask", TOKENS, attend(sdpa(), mask=additive(some(2, 2, 5, 5, seed=3))), *READ)
case("sdpa float bias", TOKENS, attend(sdpa(), mask=torch.randn(1, 2, 5, 5, generator=generator(4))), *READ)
case("sdpa causal", TOKENS, attend(sdpa(is_causal=True), causal=True), *READ)
case("sdpa scale", TOKENS, attend(sdpa(scale=1.3), scale=1.3), *READ)
case("sdpa empty rows", TOKENS, attend(sdpa(), mask=some(5, 5, seed=1) & (torch.arange(5) != 2)[:, None]), *READ)
case("sdpa grouped", (2, 5, 8), attend(sdpa(enable_gqa=True), width=8, heads=4, kv_heads=2),
     (Calls(lambda z: z.mean(1)), oracle.Mean(1)), linear(8, 4))  # fmt: skip
case("sdpa one value head", (2, 5, 8), attend(sdpa(enable_gqa=True, is_causal=True), width=8, heads=4, kv_heads=1, causal=True),
     (Calls(lambda z: z.mean(1)), oracle.Mean(1)), linear(8, 4))  # fmt: skip
case("sdpa grouped masked", (2, 5, 8), attend(sdpa(enable_gqa=True, scale=0.9), scale=0.9, width=8, heads=4, kv_heads=2,
     mask=some(2, 4, 5, 5, seed=5)), (Calls(lambda z: z.mean(1)), oracle.Mean(1)), linear(8, 4))  # fmt: skip
case("sdpa cross", ((2, 4, 6), (2, 7, 5)), attend(sdpa(), CrossAttend, memory=5), *READ)
case("sdpa cross causal", ((2, 4, 6), (2, 7, 5)), attend(sdpa(is_causal=True), CrossAttend, memory=5, causal=True), *READ)
case("sdpa cross causal tall", ((2, 7, 6), (2, 4, 5)), attend(sdpa(is_causal=True), CrossAttend, memory=5, causal=True), *READ)
case("sdpa cross masked", ((2, 4, 6), (2, 7, 5)), attend(sdpa(), CrossAttend, memory=5, mask=some(4, 7, seed=6)), *READ)
case("sdpa stacked", TOKENS, attend(sdpa()), (nn.LayerNorm(6), oracle.LayerNorm), attend(sdpa(is_causal=True), causal=True),
     *READ)  # fmt: skip
case("written out", TOKENS, attend(written(), scale=1.0), *READ)
case("written out scaled", TOKENS, attend(written(scale=0.6, drop=True), scale=0.6), *READ)
case("written out function", TOKENS, attend(written(lambda s: F.softmax(s, dim=-1), 0.6), scale=0.6), *READ)
case("written out biased", TOKENS, attend(written(scale=1.1), scale=1.1, mask=randn(2, 5, 5, seed=4).float()), *READ)
case("written out one value head", (2, 5, 8), attend(written(scale=0.8), scale=0.8, width=8, heads=4, kv_heads=1),
     (Calls(lambda z: z.mean(1)), oracle.Mean(1)), linear(8, 4))  # fmt: skip
case("sdpa without heads", TOKENS, attend(lambda q, k, v, mask: F.scaled_dot_product_attention(
     q.squeeze(1), k.squeeze(1), v.squeeze(1)).unsqueeze(1), heads=1), *READ)  # fmt: skip
case("written out bmm", TOKENS, attend(written_bmm), *READ)
case("written out masked_fill", TOKENS, attend(written_fill, scale=0.8, mask=some(5, 5, seed=8)), *READ)
case("written out cross", ((2, 4, 6), (2, 7, 5)), attend(written(scale=0.7), CrossAttend, memory=5, scale=0.7), *READ)


class Multihead(nn.Module):
    """`nn.MultiheadAttention` with its call arguments; the masks are as it wants them: True is hidden."""

    def __init__(self, width=6, heads=2, need_weights=True, is_causal=False, mask=None, padding=None, average=True, **kwargs):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, **kwargs)
        self.flags = {"need_weights": need_weights, "is_causal": is_causal, "average_attn_weights": average}
        self.register_buffer("mask", mask)
        self.padding = padding

    def forward(self, x):
        x = x if self.inner.batch_first else x.transpose(0, 1)
        y = self.inner(x, x, x, key_padding_mask=self.padding, attn_mask=self.mask, **self.flags)[0]
        return y if self.inner.batch_first else y.transpose(0, 1)


class CrossMultihead(Multihead):
    def forward(self, x, memory):
        swap = not self.inner.batch_first
        x, memory = (x.transpose(0, 1), memory.transpose(0, 1)) if swap else (x, memory)
        y = self.inner(x, memory, memory, key_padding_mask=self.padding, attn_mask=self.mask, **self.flags)[0]
        return y.transpose(0, 1) if swap else y


def multihead(cls=Multihead, allowed=None, causal=False, **kwargs):
    return cls(**kwargs), lambda module: oracle.multihead(module.inner, allowed, causal)


HIDDEN = ~some(5, 5, seed=11)
HIDDEN_EACH = ~some(4, 5, 5, seed=12)  # [B * heads, L, S]
PADDING = torch.tensor([[False, False, False, True, True], [False, True, False, False, False]])
LATER = torch.ones(5, 5).triu(1).bool()
for weights in (True, False):
    for first in (True, False):
        how = f"{'weights' if weights else 'no weights'}, {'batch' if first else 'sequence'} first"
        flags = {"need_weights": weights, "batch_first": first}
        case(f"multihead, {how}", TOKENS, multihead(**flags), *READ)
        case(f"multihead bool mask, {how}", TOKENS, multihead(mask=HIDDEN, allowed=~HIDDEN, **flags), *READ)
        case(f"multihead float mask, {how}", TOKENS,
             multihead(mask=additive(~HIDDEN), allowed=additive(~HIDDEN), **flags), *READ)  # fmt: skip
        case(f"multihead mask of each head, {how}", TOKENS,
             multihead(mask=HIDDEN_EACH, allowed=~HIDDEN_EACH.unflatten(0, (2, 2)), **flags), *READ)  # fmt: skip
        case(f"multihead padding, {how}", TOKENS,
             multihead(padding=PADDING, allowed=~PADDING[:, None, None], **flags), *READ)  # fmt: skip
        case(f"multihead padding and mask, {how}", TOKENS,
             multihead(padding=PADDING, mask=HIDDEN, allowed=~(PADDING[:, None, None] | HIDDEN), **flags), *READ)  # fmt: skip
        case(f"multihead causal, {how}", TOKENS, multihead(mask=LATER, is_causal=True, causal=True, **flags), *READ)
        case(f"multihead cross, {how}", ((2, 4, 6), (2, 7, 5)),
             multihead(CrossMultihead, kdim=5, vdim=5, bias=False, **flags), *READ)  # fmt: skip
        case(f"multihead cross same width, {how}", ((2, 4, 6), (2, 7, 6)),
             multihead(CrossMultihead, mask=~some(4, 7, seed=6), allowed=some(4, 7, seed=6), **flags), *READ)  # fmt: skip
        case(f"multihead extra tokens, {how}", TOKENS,
             multihead(add_bias_kv=True, add_zero_attn=True, mask=HIDDEN, allowed=~HIDDEN, **flags), *READ)  # fmt: skip
case("multihead weights of each head", TOKENS, multihead(average=False, batch_first=True), *READ)


class Add(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return functools.reduce(operator.add, [branch(x) for branch in self.branches])


class Join(Add):
    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


class Times(Add):
    def forward(self, x):
        return self.branches[0](x) * self.branches[1](x)


def branches(cls, *chains, **kwargs):
    """A module of parallel chains of pairs, and its op."""
    module = cls(*(nn.Sequential(*(m for m, _ in chain)) for chain in chains))

    def op(filled):
        parts = [oracle.joined(o if isinstance(o, oracle.Op) else o(m) for m, (_, o) in zip(branch, chain, strict=True))
                 for branch, chain in zip(filled.branches, chains, strict=True)]  # fmt: skip
        return oracle.Product(*parts) if cls is Times else oracle.Parallel(*parts, **kwargs)

    return module, op


case("residual", (2, 3, 6, 6), conv(3, 4, 3, stride=2, padding=1), (nn.BatchNorm2d(4), oracle.RunningNorm), RELU,
     branches(Add, [conv(4, 4, 3, padding=1, groups=2), (nn.BatchNorm2d(4), oracle.RunningNorm), (nn.ReLU(), gate("relu")),
                    conv(4, 4, 1)], []), RELU, *head(4, 3, 3))  # fmt: skip
case("branches joined", (2, 3, 6, 6), branches(
         Join, [conv(3, 2, 3, padding=2, dilation=2), (nn.SiLU(), gate("silu"))], [pool(2, 3, stride=1, padding=1)],
         [conv(3, 3, 1), (nn.LeakyReLU(0.1), gate("leaky_relu", slope=0.1)), conv(3, 2, 3, padding=1)], join=1),
     (nn.AvgPool2d((2, 3), 2), oracle.AvgPool((2, 3), (2, 2))), (nn.Hardswish(), gate("hardswish")), *head(7, 3, 2))  # fmt: skip
case("transposed convolution", (2, 3, 4, 5), (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), oracle.ConvTranspose), RELU,
     *head(4, 7, 9))  # fmt: skip
case("images to tokens", (2, 3, 8, 8), conv(3, 6, 4, stride=4), (Calls(lambda z: z.flatten(2).transpose(1, 2)), oracle.Rearrange(
         lambda x: x.flatten(2).transpose(1, 2), lambda v: v.transpose(1, 2).unflatten(2, (2, 2)))),
     branches(Add, [], [(nn.LayerNorm(6), oracle.LayerNorm), multihead(need_weights=False, batch_first=True)]),
     branches(Add, [], [(nn.LayerNorm(6), oracle.LayerNorm), linear(6, 12), (nn.GELU(), gate("gelu")), linear(12, 6)]),
     (nn.LayerNorm(6), oracle.LayerNorm), *READ)  # fmt: skip


sigmoid = oracle.Smooth(torch.sigmoid, lambda z: torch.sigmoid(z) * torch.sigmoid(-z))
case("smooth functions", (3, 6), linear(6, 8), (nn.Tanh(), oracle.Smooth(torch.tanh, lambda z: 1 - torch.tanh(z) ** 2)),
     linear(8, 8), (nn.Softplus(), oracle.Smooth(F.softplus, torch.sigmoid)), linear(8, 8), RELU, linear(8, 4),
     (nn.Sigmoid(), sigmoid), affine=False)  # fmt: skip
case("softmax head", (3, 6), linear(6, 8), RELU, linear(8, 4), (nn.Softmax(-1), oracle.SoftmaxHead()), affine=False)
case("squeeze and excite", (2, 4, 5, 5), conv(4, 4, 3), (nn.SiLU(), gate("silu")), branches(Times, [], [
         (nn.AdaptiveAvgPool2d(1), oracle.AvgPool((3, 3), (3, 3))), conv(4, 3, 1), (nn.ReLU(), gate("relu")), conv(3, 4, 1),
         (nn.Sigmoid(), sigmoid)]), *head(4, 3, 3), affine=False)  # fmt: skip

UNEVEN = {  # every temperature other than the default
    "relu": 0.35, "leaky_relu": 0.9, "prelu": 1.3, "hardtanh": 0.8, "elu": 1.4, "gelu": 0.6, "silu": 0.7, "hardswish": 0.4,
    "mish": 2.5, "max_pool": 0.8, "attention": 0.7, "scale": "absolute",
}  # fmt: skip
ABSOLUTE = {**oracle.DEFAULTS, "hardtanh": oracle.Soft(1.7, 0.4, "absolute"), "scale": "absolute"}
AFFINE = [name for name, (_, _, affine) in CASES.items() if affine]  # the others keep a derivative, or the product rule
RULES = {
    "absolute": ABSOLUTE,
    "frozen": {**oracle.HARD, "product": FROZEN},
    "uneven": UNEVEN,
    "sample": {**oracle.DEFAULTS, "scale": "sample"},
    "channel": {**oracle.DEFAULTS, "scale": "channel"},
    "margins": {**oracle.DEFAULTS, "relu": oracle.Soft(0.7, 0.5, "channel"), "leaky_relu": oracle.Soft(1.2, 0.3),
                "prelu": oracle.Soft(0.8, -0.6, "absolute"), "hardtanh": oracle.Soft(0.9, -0.2, "sample"),
                "stride": None, "scale": "sample"},
    "batch norms": {**oracle.DEFAULTS, "relu": oracle.Soft(0.7, 0.3, "batch_norm"), "hardtanh": oracle.Soft(1.7, 0.4, "channel"),
                    "leaky_relu": oracle.Soft(0.9, 0.0, "batch_norm", oracle.Soft(1.2, 0.2, "channel")), "scale": "sample"},
}  # fmt: skip


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture(params=RULES)
def rules(request):
    return RULES[request.param]


# -- the oracle itself -----------------------------------------------------------------------------------------------------------


def test_the_oracle_computes_the_network_and_its_frozen_view_is_affine(name):
    model, ops, x = network(name)
    with torch.no_grad():
        expected = model(*x) if isinstance(x, tuple) else model(x)
    check(oracle.forward(ops, x), expected, 1e-12)  # the same sums in another order
    if name in AFFINE:
        check(oracle.frozen(ops, x, x), expected, 1e-12)


@pytest.mark.parametrize("name", AFFINE)
def test_the_oracle_pulls_back_by_the_transpose_of_its_frozen_view(name):
    _, ops, x = network(name)
    tensors = x if isinstance(x, tuple) else (x,)
    t = tuple(randn(*p.shape, seed=50 + i) for i, p in enumerate(tensors))
    zero = tuple(map(torch.zeros_like, tensors))
    t, zero = (t, zero) if isinstance(x, tuple) else (t[0], zero[0])
    moved = oracle.frozen(ops, x, t) - oracle.frozen(ops, x, zero)
    u = randn(*moved.shape, seed=60)
    pulled = oracle.pull(ops, x, u, oracle.HARD)
    pairs = zip(pulled, t, strict=True) if isinstance(x, tuple) else [(pulled, t)]
    assert math.isclose(sum(float((a * b).sum()) for a, b in pairs), float((u * moved).sum()), rel_tol=1e-10, abs_tol=1e-12)


# -- the explainer and the oracle ------------------------------------------------------------------------------------------------


def test_the_default_temperatures_are_the_method_s():
    assert Rules() == as_rules(oracle.DEFAULTS) and Rules().scale == "sample"
    assert Rules().hardtanh == sp_fx.Soft(1.7, 0.4, "batch_norm", otherwise=1.0) and Rules().gelu == sp_fx.Soft(1.25, 0.5)
    numbers = {kind: value for kind, value in oracle.DEFAULTS.items() if not isinstance(value, oracle.Soft)}
    assert {kind: getattr(Rules(), kind) for kind in numbers} == numbers
    assert {kind: getattr(Rules.frozen(), kind) for kind in oracle.DEFAULTS} == oracle.HARD
    assert all(getattr(Rules.frozen(), kind) == FROZEN for kind in NORMS)


def test_the_pullback_in_float64(name, rules):
    model, ops, x = network(name)
    u = randn(*oracle.forward(ops, x).shape, seed=70)
    got = transform(model, **rules).pullback(x, u)
    check(got, oracle.pull(ops, x, u, rules), DOUBLE)


@pytest.mark.parametrize("scale", ["absolute", "sample"])
@pytest.mark.parametrize("name", [n if i % 3 == 0 else pytest.param(n, marks=pytest.mark.slow) for i, n in enumerate(CASES)])
def test_the_pullback_in_float32(name, scale):
    model, ops, x = network(name)
    u = randn(*oracle.forward(ops, x).shape, seed=70)
    single = tuple(p.float() for p in x) if isinstance(x, tuple) else x.float()
    got = transform(model.float(), **RULES[scale]).pullback(single, u.float())
    check(got, oracle.pull(ops, x, u, RULES[scale]), SINGLE)


def test_autograd_through_the_explainer_is_the_pullback(name):
    model, ops, x = network(name, seed=5)
    leaves = [p.clone().requires_grad_() for p in (x if isinstance(x, tuple) else (x,))]
    y = transform(model, **UNEVEN)(*leaves)
    u = randn(*y.shape, seed=71)
    partial = torch.autograd.grad(y, leaves, u, allow_unused=True)
    grads = tuple(torch.zeros_like(p) if g is None else g for g, p in zip(partial, leaves, strict=True))
    check(grads if isinstance(x, tuple) else grads[0], oracle.pull(ops, x, u, UNEVEN), DOUBLE)


def test_without_rules_the_pullback_is_the_gradient(name):
    model, _, x = network(name)
    plain = dict.fromkeys((*oracle.DEFAULTS, *NORMS))
    leaves = [p.clone().requires_grad_() for p in (x if isinstance(x, tuple) else (x,))]
    y = model(*leaves)
    u = randn(*y.shape, seed=72)
    expected = torch.autograd.grad(y, leaves, u)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of having nothing to rewrite
        got = sp_fx.transform(model, rules=Rules(**plain)).pullback(x, u)
    check(got, expected if isinstance(x, tuple) else expected[0], 1e-12)  # the same ops


# -- the Gaussian average of a hard gate -----------------------------------------------------------------------------------------

HARD_GATES = {
    "relu": (nn.ReLU(), "relu", {}, [0.0]),
    "leaky_relu": (nn.LeakyReLU(0.2), "leaky_relu", {"slope": 0.2}, [0.0]),
    "prelu": (nn.PReLU(init=-0.5), "prelu", {"slope": -0.5}, [0.0]),
    "relu6": (nn.ReLU6(), "hardtanh", {"low": 0.0, "high": 6.0}, [0.0, 6.0]),
    "hardtanh": (nn.Hardtanh(-0.5, 2.0), "hardtanh", {"low": -0.5, "high": 2.0}, [-0.5, 2.0]),
    "clamp min": (Calls(lambda z: z.clamp(min=-1.0)), "relu", {"low": -1.0}, [-1.0]),
    "clamp max": (Calls(lambda z: z.clamp(max=1.0)), "relu", {"high": 1.0}, [1.0]),
    "elu": (nn.ELU(1.5), "elu", {"alpha": 1.5}, [0.0]),
    "selu": (nn.SELU(), "elu", {"alpha": oracle.SELU_ALPHA, "scale": oracle.SELU_SCALE}, [0.0]),
    "celu": (nn.CELU(0.7), "elu", {"alpha": 0.7, "rate": 1 / 0.7}, [0.0]),
}


def gains(module, z, **rules):
    """The factor on the cotangent of a pointwise gate."""
    return transform(module.to(z.dtype), **rules).pullback(z, torch.ones_like(z))


@pytest.mark.parametrize("tau", [0.05, 0.6, 3.0])
@pytest.mark.parametrize("form", HARD_GATES)
def test_a_soft_gate_is_the_gaussian_average_of_the_hard_one(form, tau):
    module, kind, args, kinks = HARD_GATES[form]
    points = [-200.0, -50.0, -6.0, -2.0, -0.7, -0.1, 0.0, 0.03, 0.5, 1.0, 2.0, 5.9, 9.0, 50.0, 200.0]
    z = exact([points])
    expected = [oracle.gaussian_average(lambda t: oracle.hard_derivative(kind, t, **args), p, tau, kinks) for p in points]
    rules = {kind: tau, "scale": "absolute"}
    got = gains(module, z, **rules)
    assert (got - exact([expected])).abs().max() < 1e-8  # the quadrature is good to 1e-13
    single = gains(module, z.float(), **rules)
    assert (single.double() - got).abs().max() < 2e-6  # float32 arguments of up to 200 / tau beside an exponential
    module.double()


# -- the affine view -------------------------------------------------------------------------------------------------------------


class Shift(nn.Module):
    """Adds zeros, whose gradient is the cotangent at this place."""

    def __init__(self, shape):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(shape).double())

    def forward(self, x):
        return x + self.zero


@pytest.mark.parametrize("name", AFFINE)
def test_the_frozen_pullback_and_the_biases_make_the_output(name):
    """<nu, x> + sum over layers <cotangent, b> = <u, f(x)>, b what the layer adds beside its frozen linear map."""
    modules, ops, x = layers(name)
    points = oracle.trace(ops, x)
    none = [tuple(map(torch.zeros_like, p)) if isinstance(p, tuple) else torch.zeros_like(p) for p in points]
    biases = [op.frozen(point, zero) for op, point, zero in zip(ops, points, none, strict=False)]
    shifted = [part for module, bias in zip(modules, points[1:], strict=True) for part in (module, Shift(bias.shape))]
    model = (PairChain if isinstance(x, tuple) else Chain)(shifted).eval().double()
    explainer = sp_fx.transform(model, rules=Rules.frozen())
    leaves = [p.clone().requires_grad_() for p in (x if isinstance(x, tuple) else (x,))]
    y = explainer(*leaves)
    u = randn(*y.shape, seed=73)
    places = [p for n, p in explainer.named_parameters() if n.endswith("zero")]
    assert len(places) == len(ops)
    cotangents = torch.autograd.grad(y, [*leaves, *places], u, allow_unused=True)
    terms = [float((v * at.detach()).sum()) for v, at in zip(cotangents, [*leaves, *biases], strict=True) if v is not None]
    size = sum(map(abs, terms))  # what the sum may cancel from
    assert abs(sum(terms) - float((u * y.detach()).sum())) < DOUBLE * size


class BiasesGiven(nn.Module):
    """Every bias an input: with gates that add nothing this is a linear map of all its inputs together, once frozen."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.RMSNorm(6)
        self.q, self.k, self.v = (nn.Linear(6, 6, bias=False) for _ in "qkv")
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x, b1, b2, b3, b4):
        z = F.max_pool2d(F.relu(self.conv(x) + b1), 3, 2, 1)
        z = self.norm(z.flatten(2).transpose(1, 2))
        q, k, v = (f(z).unflatten(-1, (2, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        z = z + F.scaled_dot_product_attention(q, k, v + b2).transpose(1, 2).flatten(2)
        return self.head(F.mish(F.gelu(z + b3)).mean(1)) + b4


def test_biases_that_are_inputs_are_explained_like_inputs():
    model = fill(BiasesGiven(), seed=3).double()
    inputs = randn(2, 3, 6, 6), randn(2, 6, 1, 1, seed=1), randn(2, 2, 1, 3, seed=2), randn(2, 9, 6, seed=3), randn(2, 4, seed=4)
    u = randn(2, 4, seed=5)
    maps = sp_fx.transform(model, rules=Rules.frozen()).pullback(inputs, u)
    total = sum(float((m * x).sum()) for m, x in zip(maps, inputs, strict=True))
    assert math.isclose(total, float((u * model(*inputs).detach()).sum()), rel_tol=DOUBLE)


# -- the product of the layers' matrices -----------------------------------------------------------------------------------------


def matrix(layer, *shape):
    """[out, in] of an affine layer, a column for each basis vector."""
    n = math.prod(shape)
    basis = torch.cat([torch.eye(n).double(), torch.zeros(1, n).double()]).reshape(n + 1, *shape)
    with torch.no_grad():
        out = layer(basis).flatten(1)
    return (out[:-1] - out[-1]).T


def diagonal(factors):
    return torch.diag(factors.flatten())


def test_the_pullback_is_the_transposed_product_of_matrices_convolutional(rules):
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(3, 4, 2),
                        nn.LeakyReLU(0.1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3))  # fmt: skip
    fill(net, seed=4).double()
    x, u = randn(1, 2, 6, 6, seed=6), randn(1, 3, seed=7)
    with torch.no_grad():
        z = [x]
        for layer in net:
            z.append(layer(z[-1]))

    def gain(kind, at, norm=None, **args):
        if rules[kind] == FROZEN:
            return oracle.frozen_gain(kind, at, **args)
        margin, tau = oracle.soft(rules, kind, norm).margin, oracle.temperature(rules, kind, at, norm, **args)
        return oracle.soft_gain(kind, at, tau, margin=margin, **args).expand(at.shape)

    norm = oracle.RunningNorm(net[1])
    pooling = oracle.MaxPool((3, 3), (2, 2), (1, 1)).matrices(z[3], oracle.temperature(rules, "max_pool", z[3]))[1]
    product = torch.linalg.multi_dot([
        matrix(net[8], 4), matrix(net[6], 4, 2, 2), diagonal(gain("leaky_relu", z[5], slope=0.1)), matrix(net[4], 3, 3, 3),
        torch.block_diag(*pooling), diagonal(gain("relu", z[2], norm)), matrix(net[1], 3, 6, 6), matrix(net[0], 2, 6, 6),
    ])  # fmt: skip
    got = transform(net, **rules).pullback(x, u)
    check(got.flatten(), product.T @ u[0], DOUBLE)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.RMSNorm(4, eps=1e-3)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.up, self.down, self.head = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        p = (q @ k.transpose(-2, -1) / math.sqrt(2)).softmax(-1)
        x = x + self.out((p @ v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def test_the_pullback_is_the_transposed_product_of_matrices_transformer(rules):
    net, tokens = fill(Block(), seed=5).double(), 5
    x, u = randn(1, tokens, 4, seed=8), randn(1, 3, seed=9)
    gelu, taus = oracle.soft(rules, "gelu"), {"attention": 1.0 if rules["attention"] == FROZEN else rules["attention"]}
    with torch.no_grad():
        z = net.norm1(x)
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in net.qkv(z).chunk(3, -1))
        score = q @ k.transpose(-2, -1) / math.sqrt(2)
        middle = x + net.out((score.softmax(-1) @ v).transpose(1, 2).flatten(2))
        inner = net.up(net.norm2(middle))
    p = (score / taus["attention"]).softmax(-1)[0]
    attention = torch.zeros(tokens, 2, 2, tokens, 2, 2).double()  # [row, head, channel, column, head, channel]
    for h in range(2):
        for c in range(2):
            attention[:, h, c, :, h, c] = p[h]
    n = tokens * 4
    rstd1 = (x.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt().expand_as(x)
    rstd2 = ((middle**2).mean(-1, keepdim=True) + 1e-3).rsqrt().expand_as(x)
    value = matrix(lambda t: net.qkv(t)[..., 8:], tokens, 4)
    first = torch.eye(n).double() + torch.linalg.multi_dot(
        [matrix(net.out, tokens, 4), attention.reshape(n, n), value, diagonal(rstd1 * net.norm1.weight.detach())]
    )
    openness = oracle.phi(inner) if gelu == FROZEN else oracle.phi(inner / gelu.tau - gelu.margin)
    second = torch.eye(n).double() + torch.linalg.multi_dot(
        [matrix(net.down, tokens, 8), diagonal(openness), matrix(net.up, tokens, 4),
         diagonal(rstd2 * net.norm2.weight.detach())])  # fmt: skip
    last = matrix(lambda t: net.head(t.mean(1)), tokens, 4)
    got = transform(net, **rules).pullback(x, u)
    check(got.flatten(), (last @ second @ first).T @ u[0], DOUBLE)


# -- limits ----------------------------------------------------------------------------------------------------------------------

PIECEWISE = [n for n in CASES if n.startswith(("relu", "leaky", "rrelu", "prelu", "hardtanh", "clamp", "elu", "selu", "celu",
             "max_pool", "batch_norm running", "instance_norm running", "residual", "transposed"))]  # fmt: skip


@pytest.mark.parametrize("scale", ["absolute", "sample"])
@pytest.mark.parametrize("tau", [1e-9, 1e-10, FROZEN])
@pytest.mark.parametrize("name", PIECEWISE)
def test_without_temperature_hard_gates_give_the_gradient(name, tau, scale):
    model, _, x = network(name)
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    u = randn(*y.shape, seed=74)
    (expected,) = torch.autograd.grad(y, leaf, u)
    got = transform(model, **{**dict.fromkeys(oracle.DEFAULTS, tau), "stride": None}, scale=scale).pullback(x, u)
    check(got, expected, 1e-9)  # seeded pre-activations lie further than 1e-7 from a kink


@pytest.mark.parametrize("tau", [1e-9, FROZEN])
@pytest.mark.parametrize("form", HARD_GATES)
def test_at_a_kink_a_gate_is_half_open(form, tau):
    module, kind, args, kinks = HARD_GATES[form]
    z = exact([[*kinks, -0.0 if 0.0 in kinks else kinks[0]]])
    sides = [oracle.hard_derivative(kind, kinks[0] + d, **args) for d in (-1e-12, 1e-12)]
    got = gains(module, z, **{kind: tau}, scale="absolute")
    assert torch.allclose(got, torch.full_like(z, float(sum(sides)) / 2), rtol=1e-8, atol=0)


@pytest.mark.parametrize("form", ["gelu erf", "silu", "mish", "hardswish"])
def test_at_temperature_one_a_smooth_gate_is_the_frozen_one(form):
    module, op = POINTWISE[form]
    z = torch.linspace(-9, 9, 181).double()[None]
    soft, hard = (gains(module, z, **{op.kind: tau}) for tau in (1.0, FROZEN))
    assert torch.allclose(soft, hard, rtol=1e-12, atol=1e-15)
    nonzero = z != 0
    assert torch.allclose((hard * z)[nonzero], module(z)[nonzero], rtol=1e-10, atol=1e-12)  # the gain is forward / z


def test_the_two_forms_of_gelu_share_their_soft_gate_and_keep_their_own_frozen_one():
    z = torch.linspace(-4, 4, 81).double()[None]
    erf, tanh = nn.GELU(), nn.GELU(approximate="tanh")
    assert torch.equal(gains(erf, z, gelu=0.5), gains(tanh, z, gelu=0.5))
    assert torch.allclose(gains(tanh, z, gelu=FROZEN) * z, tanh(z), rtol=1e-12, atol=1e-15)
    assert not torch.allclose(gains(tanh, z, gelu=FROZEN), gains(erf, z, gelu=FROZEN), atol=1e-5)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(("sdpa", "written")) and "stacked" not in n])
def test_frozen_attention_is_the_gradient_with_its_weights_detached(name):
    model, ops, x = network(name)
    attention = ops[0]
    leaves = [p.clone().requires_grad_() for p in (x if isinstance(x, tuple) else (x,))]
    values = attention.split(attention.v.forward(leaves[-1]), attention.kv_heads)
    mixed = oracle.attention_mix(attention.weights(x, FROZEN).detach(), values)
    y = oracle.forward(ops[1:], attention.out.forward(attention.merge(mixed)))
    u = randn(*y.shape, seed=75)
    (expected,) = torch.autograd.grad(y, leaves[-1], u)
    for tau in (1.0, FROZEN):
        got = transform(model, attention=tau).pullback(x, u)
        check(got[-1] if isinstance(x, tuple) else got, expected, DOUBLE)
        assert not isinstance(x, tuple) or not got[0].any()


@pytest.mark.parametrize("tau", [FROZEN, 1e-9, 0.3])
def test_ties_in_max_pooling_share_equally(tau):
    z = exact([[[2.0, 2.0, 0.0, 2.0, -100.0, -100.0, -100.0]]])
    u = exact([[[8.0, 4.0, 2.0, 1.0]]])
    got = transform(nn.MaxPool1d(3, 2, padding=1), max_pool=tau, scale="absolute").pullback(z, u)
    low = 0.0 if isinstance(tau, str) else math.exp(-2 / tau)  # the share of the 0 beside two 2s, not yet normalised
    pair, first = 4 / (2 + low), 8 / 2
    expected = [first, first + pair, low * pair, pair + 2.0, 0.0, 0.5, 0.5]
    assert torch.allclose(got, exact([[expected]]), rtol=1e-10, atol=1e-12)


def test_padding_takes_nothing_from_a_border_of_negative_values():
    z = -1 - randn(1, 2, 5, 5, seed=11).abs()
    u = torch.ones(1, 2, 3, 3).double()
    assert math.isclose(float(transform(nn.MaxPool2d(3, 2, 1)).pullback(z, u).sum()), 18.0, rel_tol=1e-12)


# -- infinities, masks and zeros -------------------------------------------------------------------------------------------------

ENDS = {  # the gains at -inf and at inf
    "relu module": (0, 1), "leaky_relu": (0.2, 1), "prelu shared": (0.25, 1), "relu6": (0, 0), "hardtanh": (0, 0),
    "clamp min": (0, 1), "clamp max": (1, 0), "elu": (0, 1), "elu alpha": (0, 1), "selu": (0, oracle.SELU_SCALE), "celu": (0, 1),
    "celu alpha": (0, 1), "gelu erf": (0, 1), "gelu tanh": (0, 1), "silu": (0, 1), "hardswish": (0, 1), "mish": (0, 1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["absolute", "frozen", "sample"])
@pytest.mark.parametrize("form", ENDS)
def test_infinite_preactivations(form, how, dtype):
    module, rules = copy.deepcopy(POINTWISE[form][0]), RULES[how]
    ends = [[-math.inf, math.inf]] if how == "sample" else [[-math.inf, math.inf], [-1e30, 1e30], [-3e4, 3e4]]
    z = torch.tensor(ends, dtype=dtype)  # at the scale of the sample only the infinite is far
    got = gains(module, z, **rules).double()
    assert torch.allclose(got, exact([ENDS[form]]).expand(got.shape), rtol=1e-6, atol=1e-7)  # float32 constants


@pytest.mark.parametrize("tau", [0.3, 1.0, FROZEN])
def test_windows_of_infinities(tau):
    z = torch.full((1, 1, 6, 6), -math.inf)
    z[0, 0, 3:] = torch.randn(3, 6, generator=generator(2))
    z[0, 0, 5, 5] = math.inf
    op, explainer = oracle.MaxPool((2, 2)), transform(nn.MaxPool2d(2), max_pool=tau, scale="absolute")
    everywhere = explainer.pullback(z, torch.ones(1, 1, 3, 3))
    assert torch.isfinite(everywhere).all()
    corner = torch.tensor([[0.0, 0.0], [0.0, 1.0]])  # nothing is near infinity
    assert torch.allclose(everywhere[0, 0, 4:, 4:], corner, rtol=0, atol=1e-12)
    u = torch.randn(1, 1, 3, 3, generator=generator(3))
    u[0, 0, 0] = u[0, 0, 2, 2] = 0  # windows without a finite winner
    finite = z.double().clone()
    finite[0, 0, :2] = finite[0, 0, 5, 5] = 0
    check(explainer.pullback(z, u), op.back(finite, u.double(), {"max_pool": tau}), SINGLE)


EMPTY = some(5, 5, seed=21) & (torch.arange(5) != 2)[:, None]  # row 2 attends to nothing
LOWEST = torch.finfo(torch.float32).min
MASKED = {
    "sdpa, bool": attend(sdpa(), mask=EMPTY),
    "sdpa, -inf": attend(sdpa(), mask=additive(EMPTY)),
    "sdpa, lowest": attend(sdpa(), mask=additive(EMPTY, LOWEST)),
    "written out, -inf": attend(written(scale=0.5), scale=0.5, mask=additive(EMPTY)),
    "written out, lowest": attend(written(scale=0.5), scale=0.5, mask=additive(EMPTY, LOWEST)),
    "written out, filled": attend(written_fill, scale=0.8, mask=EMPTY),
}
for weights in (True, False):
    kind = "with" if weights else "without"
    flags = {"need_weights": weights, "batch_first": True}
    MASKED[f"multihead {kind} weights, bool"] = multihead(mask=~EMPTY, allowed=EMPTY, **flags)
    MASKED[f"multihead {kind} weights, -inf"] = multihead(mask=additive(EMPTY), allowed=additive(EMPTY), **flags)
    lowest = additive(EMPTY, LOWEST)
    MASKED[f"multihead {kind} weights, lowest"] = multihead(mask=lowest, allowed=lowest, **flags)


@pytest.mark.parametrize("tau", [0.5, 1.0, FROZEN])
@pytest.mark.parametrize("form", MASKED)
def test_rows_that_attend_to_nothing(form, tau):
    """Hidden by -inf they give 0; by the lowest number every key alike, as in the forward. That may be NaN, the map not."""
    module, op = MASKED[form]
    module = fill(nn.Sequential(copy.deepcopy(module)), seed=22)
    x, u = torch.randn(*TOKENS, generator=generator(23)), torch.randn(*TOKENS, generator=generator(24))
    explainer, attention = transform(module, attention=tau), op(module[0])
    check(explainer.pullback(x, u), attention.back(x.double(), u.double(), {"attention": tau}), SINGLE)
    alone = torch.zeros_like(u)
    alone[:, 2] = u[:, 2]
    got = explainer.pullback(x, alone)
    assert torch.isfinite(got).all() and got.any() == ("lowest" in form)


def test_a_float_mask_that_is_an_input_gets_nothing():
    class Masked(nn.Module):
        def forward(self, x, mask):
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x, mask, u = randn(2, 2, 4, 3), randn(2, 1, 4, 4, seed=1), randn(2, 2, 4, 3, seed=2)
    got = transform(Masked()).pullback((x, mask), u)
    weights = oracle.attention_weights(x, x, 1 / math.sqrt(3), mask)
    check(got[0], oracle.attention_unmix(weights, u, 2), DOUBLE)
    assert got[1].shape == mask.shape and not got[1].any()


def test_a_mask_by_keyword():
    class Masked(nn.Module):
        def forward(self, x, mask):
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x, mask, u = randn(4, 2, 5, 3), some(4, 1, 5, 5, seed=7), randn(4, 2, 5, 3, seed=2)
    explainer = transform(Masked(), attention=0.7)
    expected = oracle.attention_unmix(oracle.attention_weights(x, x, 1 / math.sqrt(3), mask, tau=0.7), u, 2)
    for batch_size in (None, 3):
        got = explainer.pullback(x, u, forward_kwargs={"mask": mask}, batch_size=batch_size)
        check(got, expected, DOUBLE)
    got, nothing = explainer.pullback((x, mask), u)
    check(got, expected, DOUBLE)
    assert nothing is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.02, 0.6])
@pytest.mark.parametrize("value", [-2.0, 0.0, 0.1, 1.0])
def test_at_the_scale_of_the_sample_a_constant_sample_has_hard_gates(value, tau, dtype):
    z = torch.full((2, 2, 4), value, dtype=dtype)
    opened = {"relu": 0.5 + 0.5 * (value > 0) - 0.5 * (value < 0), "max_pool": 0.5}
    for module, kind in ((nn.ReLU(), "relu"), (nn.MaxPool1d(2), "max_pool")):
        explainer = transform(module, **{kind: tau}, scale="sample")
        got = explainer.pullback(z, torch.ones_like(explainer(z)))
        assert torch.allclose(got, torch.full_like(z, opened[kind]), rtol=0, atol=1e-6)  # Phi in float32 is good to 3e-7


def test_a_zero_pullback_is_a_zero_step():
    closed = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        closed[0].bias.fill_(-1e6)
    explainer, x = transform(closed, scale="absolute"), randn(3, 4)
    assert not explainer.pullback(x, 1).any()
    moved, path = explainer.ascend(x, 1, step_size=3.0, return_path=True)
    assert torch.equal(moved, torch.zeros_like(x)) and torch.equal(path, x.expand(6, 3, 4))
    assert torch.equal(explainer.double_pullback(x, 1), torch.zeros_like(x))
    alive = fill(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))).double()
    u = exact([[0.0, 0.0], [1.0, -1.0], [0.0, 0.0]])
    for dtype in (torch.float64, torch.float32):
        moved = transform(alive.to(dtype)).ascend(x.to(dtype), u.to(dtype), step_size=3.0, radius=1.0, bounds=(-5, 5))
        assert not moved[0].any() and not moved[2].any() and moved[1].any()


# -- what is computed from the pullback ------------------------------------------------------------------------------------------


def climb(pull, x, steps, size, bounds=None, clip="every", radius=None):
    """x <- P(x + size nu / |nu|), sample by sample; P projects on the ball round the start, then clamps to the box.

    From a start in the box the clamp only brings it nearer, so that the result is in both.
    """
    start, path = x, [x]
    for k in range(steps):
        nu, moved = pull(x), []
        for b in range(len(x)):
            length = math.sqrt(float((nu[b] ** 2).sum()))
            at = x[b] + (size / length) * nu[b] if length > 0 else x[b]
            distance = math.sqrt(float(((at - start[b]) ** 2).sum()))
            if radius is not None and distance > radius:
                at = start[b] + (at - start[b]) * (radius / distance)
            if bounds is not None and (clip == "every" or (clip == "last" and k == steps - 1)):
                low, high = (torch.as_tensor(bound).double().expand(x.shape)[b] for bound in bounds)
                at = torch.where(at < low, low, torch.where(at > high, high, at))
            moved.append(at)
        x = torch.stack(moved)
        path.append(x)
    return torch.stack(path)


@pytest.fixture(scope="module")
def climber():
    stem = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
    net = fill(nn.Sequential(*stem, nn.Flatten(), nn.Linear(36, 5)), seed=31).double()
    return transform(net), randn(3, 3, 6, 6, seed=32).clamp(-0.9, 0.9)


CHANNEL = exact([-0.9, -1.0, -1.1])[:, None, None], exact([0.95, 1.2, 1.0])[:, None, None]
EACH = -1 - randn(3, 3, 6, 6, seed=33).abs(), 1 + randn(3, 3, 6, 6, seed=34).abs()
TARGETS = {"predicted": None, "one": 2, "each": torch.tensor([4, 0, 1]), "direction": randn(3, 5, seed=35)}
CLIMBS = {
    "free": {},
    "one step": {"steps": 1, "step_size": 0.5},
    "box": {"bounds": (-1, 1), "step_size": 4.0},
    "box at the end": {"bounds": (-1.0, 1.0), "clip": "last", "step_size": 4.0},
    "box not used": {"bounds": (-1.0, 1.0), "clip": "never", "step_size": 4.0},
    "box of each channel": {"bounds": CHANNEL, "step_size": 4.0, "steps": 3},
    "box of each entry": {"bounds": EACH, "step_size": 6.0, "clip": "last"},
    "box with a number and a tensor": {"bounds": (-1.0, CHANNEL[1]), "step_size": 6.0},
    "ball": {"radius": 1.5, "step_size": 1.0},
    "ball and box": {"radius": 2.5, "bounds": (-1, 1), "step_size": 2.0},
    "ball and box at the end": {"radius": 2.5, "bounds": (-1, 1), "step_size": 2.0, "clip": "last"},
    "ball and no box": {"radius": 2.5, "bounds": (-1, 1), "step_size": 2.0, "clip": "never"},
}


@pytest.mark.parametrize("form", TARGETS)
@pytest.mark.parametrize("how", CLIMBS)
def test_ascent_is_the_iteration(climber, how, form):
    (explainer, x), target = climber, TARGETS[form]
    options = dict(CLIMBS[how])
    resolved = explainer(x).argmax(1) if target is None else target
    default = 20 * math.sqrt(x[0].numel() / 150528)
    arguments = {"steps": 5, "size": options.get("step_size", default), **{k: v for k, v in options.items() if k != "step_size"}}
    expected = climb(lambda at: explainer.pullback(at, resolved), x, **arguments)
    got = explainer.ascend(x, target, **options)
    check(got, expected[-1] - expected[0], 1e-12)  # the same pullbacks: only the step is computed twice
    both, path = explainer.ascend(x, target, return_path=True, **options)
    assert torch.equal(both, got) and torch.equal(path[0], x)
    check(path, expected, 1e-12)
    if "radius" in options:
        assert (path - x).flatten(2).norm(dim=2).max() <= options["radius"] * (1 + 1e-12)
    if "bounds" in options and options.get("clip") != "never":
        low, high = options["bounds"]
        inside = path[1:] if options.get("clip", "every") == "every" else path[-1:]
        assert (inside >= low).all() and (inside <= high).all()


def test_ascent_in_pieces_and_for_many_targets(climber):
    explainer, x = climber
    targets = torch.tensor([[0, 1], [2, 2], [4, 3]])
    together = explainer.ascend(x, targets, step_size=1.0, steps=2, batch_size=4)
    path = explainer.ascend(x, targets, step_size=1.0, steps=2, return_path=True)[1]
    assert together.shape == (3, 2, 3, 6, 6) and path.shape == (3, 3, 2, 3, 6, 6)
    for t in range(2):
        expected = climb(lambda at, target=targets[:, t]: explainer.pullback(at, target), x, 2, 1.0)
        check(together[:, t], expected[-1] - x, 1e-12)
        check(path[:, :, t], expected, 1e-12)


def test_ascent_over_two_inputs_takes_one_step_over_both():
    model, _, (x, memory) = network("sdpa cross masked")
    residual = TwoReaders(model).double()
    explainer, target = transform(residual), 1
    got = explainer.ascend((x, memory), target, steps=3, step_size=0.7)
    at, start = [x, memory], [x, memory]
    for _ in range(3):
        nu = explainer.pullback(tuple(at), target)
        length = sum((n**2).flatten(1).sum(1) for n in nu).sqrt()[:, None, None]
        at = [p + 0.7 * n / length for p, n in zip(at, nu, strict=True)]
    check(got, tuple(p - s for p, s in zip(at, start, strict=True)), 1e-12)


class TwoReaders(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, memory):
        return self.model(x, memory) + x[:, 0, :4]


@pytest.mark.parametrize("step", [None, 0.5])
@pytest.mark.parametrize("form", TARGETS)
def test_the_double_pullback_is_the_pullback_further_on(climber, form, step):
    (explainer, x), target = climber, TARGETS[form]
    resolved = explainer(x).argmax(1) if target is None else target
    ahead = x + (2.0 if step is None else step) * explainer.pullback(x, resolved)
    got = explainer.double_pullback(x, target) if step is None else explainer.double_pullback(x, target, step=step)
    check(got, explainer.pullback(ahead, resolved), 1e-12)
