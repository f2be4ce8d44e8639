"""Functions, each in several spellings that give the same values: `SPELLINGS[function][spelling](m, h)`.

`h` is a float64 tensor [2, 5, 8], made by a linear layer of the input; `m` has what some of them need: linear layers `q`, `k`,
`v` of eight channels, `s` of one and `e` of four, buffers `mask` [5, 5] of ones and zeros and `bias` [5, 5].
"""

import math
import operator

import torch
import torch.nn.functional as F
from torch import nn

ROOT2, N = math.sqrt(2.0), 8
aten = torch.ops.aten


def zeros(h):
    return torch.zeros((), dtype=h.dtype)


def normal_cdf(h):
    return torch.distributions.Normal(0.0, 1.0, validate_args=False).cdf(h)


def stable_sigmoid(h):
    e = torch.exp(-h.abs())
    return torch.where(h >= 0, 1 / (1 + e), e / (1 + e))


def scores(m, h):
    return m.q(h) @ m.k(h).mT / math.sqrt(N)


def heads(t):
    return t.unflatten(-1, (2, 4)).transpose(1, 2)


def joined(t):
    return t.transpose(1, 2).flatten(2)


def head_weights(m, h):
    return (heads(m.q(h)) @ heads(m.k(h)).mT / 2).softmax(-1)


def written_softmax(s, dim=-1):
    e = (s - s.amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)


def experts(m, h):
    return torch.stack([m.q(h), m.k(h), m.v(h), h], -2)  # [2, 5, 4, 8]


def loop_over(weights, values, number):
    total = 0
    for i in range(number):
        total = total + weights[..., i : i + 1] * values[..., i, :]
    return total


def each_of(weights, values):
    return sum(weights.narrow(-1, i, 1) * value for i, value in enumerate(values))


def rstd(c):
    return (c.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()


def entropy(w):
    return -(w * w.log()).sum(-1, keepdim=True)


def centred(h):
    return h - h.mean(-1, keepdim=True)


POINTWISE = {
    "relu": [
        F.relu, torch.relu, lambda h: h.relu(), lambda h: h.clamp(min=0), lambda h: h.clamp(0), lambda h: h.clip(0),
        lambda h: torch.clamp_min(h, 0), lambda h: torch.maximum(h, torch.zeros_like(h)), lambda h: torch.max(h, zeros(h)),
        lambda h: torch.maximum(torch.zeros_like(h), h), lambda h: torch.fmax(h, zeros(h)),
        lambda h: F.threshold(h, 0.0, 0.0), lambda h: h * (h > 0), lambda h: h * (h > 0).to(h.dtype),
        lambda h: torch.where(h > 0, h, torch.zeros_like(h)), lambda h: torch.where(h <= 0, 0.0, h),
        lambda h: (h + h.abs()) / 2, lambda h: h.masked_fill(h < 0, 0.0), lambda h: F.hardtanh(h, 0.0, float("inf")),
        lambda h: torch.stack([h, torch.zeros_like(h)], -1).amax(-1), lambda h: h * torch.heaviside(h, zeros(h)),
        lambda h: torch.stack([h, torch.zeros_like(h)], -1).max(-1).values, lambda h: torch.max(torch.stack([h, 0 * h]), 0)[0],
        lambda h: h - h.clamp(max=0), lambda h: 0.5 * torch.add(h, torch.absolute(h)), lambda h: F.elu(h, 0.0),
        lambda h: F.leaky_relu(h, 0.0),
    ],
    "the other side of a relu": [
        lambda h: -F.relu(-h), lambda h: h.clamp(max=0), lambda h: torch.minimum(h, torch.zeros_like(h)),
        lambda h: torch.where(h < 0, h, 0.0), lambda h: (h - h.abs()) / 2, lambda h: h * torch.signbit(h),
        lambda h: h - F.relu(h),
    ],
    "relu up to 255": [lambda h: h.clamp(0, 255), lambda h: F.relu(h).clamp(max=255), lambda h: F.hardtanh(h, 0.0, 255.0)],
    "leaky relu": [
        lambda h: F.leaky_relu(h, 0.1), lambda h: torch.maximum(h, 0.1 * h), lambda h: torch.where(h > 0, h, 0.1 * h),
        lambda h: F.relu(h) - 0.1 * F.relu(-h), lambda h: h.clamp(min=0) + 0.1 * h.clamp(max=0),
        lambda h: h * torch.where(h > 0, 1.0, 0.1), lambda h: 0.55 * h + 0.45 * h.abs(),
    ],
    "elu": [
        F.elu, lambda h: torch.where(h > 0, h, h.exp() - 1), lambda h: h.clamp(min=0) + h.clamp(max=0).expm1(),
        lambda h: F.relu(h) + torch.special.expm1(-F.relu(-h)), lambda h: F.celu(h, 1.0),
    ],
    "elu of another alpha": [lambda h: F.elu(h, 1.3), lambda h: torch.where(h > 0, h, 1.3 * h.expm1()),
                             lambda h: h.clamp(min=0) + 1.3 * h.clamp(max=0).expm1()],
    "selu": [F.selu, lambda h: 1.0507009873554805 * F.elu(h, 1.6732632423543772),
             lambda h: 1.0507009873554805 * torch.where(h > 0, h, 1.6732632423543772 * h.expm1())],
    "celu": [lambda h: F.celu(h, 0.7), lambda h: torch.where(h > 0, h, 0.7 * (h / 0.7).expm1()),
             lambda h: h.clamp(min=0) + (0.7 * torch.expm1(h / 0.7)).clamp(max=0)],
    "gelu": [
        F.gelu, lambda h: 0.5 * h * (1 + torch.erf(h / ROOT2)), lambda h: h * torch.special.ndtr(h),
        lambda h: 0.5 * h * torch.erfc(-h / ROOT2), lambda h: h * normal_cdf(h), lambda h: h * 0.5 * (1 + (h * 0.5**0.5).erf()),
        lambda h: h - h * torch.special.ndtr(-h), lambda h: torch.multiply(h, torch.special.erf(h / ROOT2).add(1).div(2)),
    ],
    "gelu by tanh": [
        lambda h: F.gelu(h, approximate="tanh"),
        lambda h: 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
        lambda h: 0.5 * h * (1 + torch.tanh(h * 0.7978845608028654 * (1 + 0.044715 * h * h))),
        lambda h: h * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (h + 0.044715 * h.pow(3))),
    ],
    "silu": [
        F.silu, lambda h: h * torch.sigmoid(h), lambda h: torch.sigmoid(h).mul(h), lambda h: h / (1 + torch.exp(-h)),
        lambda h: 0.5 * h * (1 + torch.tanh(h / 2)), lambda h: F.glu(torch.cat([h, h], -1)), lambda h: h * torch.special.expit(h),
        lambda h: h * F.logsigmoid(h).exp(), lambda h: h * stable_sigmoid(h), lambda h: torch.multiply(torch.sigmoid(h), h),
        lambda h: torch.true_divide(h, torch.add(torch.exp(torch.neg(h)), 1)), lambda h: operator.mul(h, h.sigmoid()),
        lambda h: h - h * torch.sigmoid(-h),
    ],
    "quick gelu": [lambda h: h * torch.sigmoid(1.702 * h), lambda h: h / (1 + torch.exp(-1.702 * h)),
                   lambda h: torch.sigmoid(h * 1.702) * h, lambda h: 0.5 * h * (1 + torch.tanh(0.851 * h))],
    "swish of another rate": [lambda h: h * torch.sigmoid(2.5 * h), lambda h: h / (1 + torch.exp(h * -2.5)),
                              lambda h: F.silu(2.5 * h) / 2.5],
    "swish of a shifted argument": [lambda h: F.silu(h - 1), lambda h: (h - 1) * torch.sigmoid(h - 1),
                                    lambda h: (h - 1) / (1 + torch.exp(-(h - 1))), lambda h: (h - 1) * (h - 1).sigmoid()],
    "thrice swish": [lambda h: 3 * F.silu(h), lambda h: 3 * h * torch.sigmoid(h), lambda h: h * (3 * h.sigmoid()),
                     lambda h: 3 * h / (1 + torch.exp(-h)), lambda h: h * h.sigmoid() * 3],
    "twice gelu": [lambda h: 2 * F.gelu(h), lambda h: h * (1 + torch.erf(h / ROOT2)), lambda h: 2 * h * torch.special.ndtr(h)],
    "swish and its argument": [lambda h: h + F.silu(h), lambda h: h * (1 + torch.sigmoid(h)), lambda h: h + h * h.sigmoid()],
    "swish of the negative": [lambda h: F.silu(-h), lambda h: -h * torch.sigmoid(-h), lambda h: h * torch.sigmoid(h) - h],
    "twice a leaky relu": [lambda h: 2 * F.leaky_relu(h, 0.1), lambda h: torch.where(h > 0, 2 * h, 0.2 * h),
                           lambda h: 2 * h.clamp(min=0) + 0.2 * h.clamp(max=0)],
    "minus the magnitude": [lambda h: -h.abs(), lambda h: torch.where(h > 0, -h, h), lambda h: torch.minimum(h, -h)],
    "hardswish": [
        F.hardswish, lambda h: h * F.relu6(h + 3) / 6, lambda h: h * F.hardsigmoid(h), lambda h: h * (h / 6 + 0.5).clamp(0, 1),
        lambda h: h * ((h + 3).clamp(0, 6) / 6), lambda h: torch.divide(h * (F.relu(h + 3) - F.relu(h - 3)), 6),
    ],
    "mish": [F.mish, lambda h: h * torch.tanh(F.softplus(h)), lambda h: h * torch.tanh(torch.log1p(h.exp())),
             lambda h: h * torch.tanh(torch.log(1 + torch.exp(h))), lambda h: h - 2 * h / (1 + (1 + h.exp()) ** 2)],
    "hardsigmoid": [F.hardsigmoid, lambda h: F.relu6(h + 3) / 6, lambda h: (h / 6 + 0.5).clamp(0, 1),
                    lambda h: (h + 3).clamp(0, 6) / 6, lambda h: torch.clamp(h + 3, 0, 6) * (1 / 6),
                    lambda h: (F.relu(h + 3) - F.relu(h - 3)) / 6],
    "relu6": [F.relu6, lambda h: h.clamp(0, 6), lambda h: F.hardtanh(h, 0.0, 6.0), lambda h: F.relu(h).clamp(max=6),
              lambda h: torch.minimum(F.relu(h), torch.full_like(h, 6.0)), lambda h: F.relu(h) - F.relu(h - 6),
              lambda h: torch.min(torch.max(h, zeros(h)), zeros(h) + 6), lambda h: h.clip(0, 6)],
    "hardtanh": [F.hardtanh, lambda h: h.clamp(-1, 1), lambda h: torch.minimum(h.clamp(min=-1), torch.ones_like(h)),
                 lambda h: F.relu(h + 1) - F.relu(h - 1) - 1, lambda h: ((h + 1).abs() - (h - 1).abs()) / 2],
    "abs": [torch.abs, abs, torch.absolute, lambda h: torch.where(h > 0, h, -h), lambda h: torch.maximum(h, -h),
            lambda h: h * h.sign(), lambda h: F.relu(h) + F.relu(-h), lambda h: 2 * F.relu(h) - h, lambda h: h * h.sgn()],
    "softshrink": [lambda h: F.softshrink(h, 0.3), lambda h: h.sign() * F.relu(h.abs() - 0.3), lambda h: h - h.clamp(-0.3, 0.3),
                   lambda h: F.relu(h - 0.3) - F.relu(-h - 0.3)],
    "squared relu": [lambda h: F.relu(h) ** 2, lambda h: F.relu(h) * F.relu(h), lambda h: h * F.relu(h),
                     lambda h: torch.where(h > 0, h * h, torch.zeros_like(h)), lambda h: F.relu(h).square(),
                     lambda h: torch.float_power(F.relu(h), 2).to(h.dtype), lambda h: h.clamp(min=0).pow(2)],
    "softsign": [F.softsign, lambda h: h / (1 + h.abs()), lambda h: h / (h.abs() + 1), lambda h: h * (1 + h.abs()).reciprocal()],
    "sigmoid": [torch.sigmoid, lambda h: 1 / (1 + torch.exp(-h)), lambda h: 0.5 * (torch.tanh(h / 2) + 1), stable_sigmoid,
                torch.special.expit, lambda h: (1 + (-h).exp()).reciprocal(), lambda h: F.logsigmoid(h).exp()],
    "tanh": [torch.tanh, lambda h: 2 * torch.sigmoid(2 * h) - 1, lambda h: (h.exp() - (-h).exp()) / (h.exp() + (-h).exp())],
    "softplus": [F.softplus, lambda h: torch.log1p(h.exp()), lambda h: torch.logaddexp(h, torch.zeros_like(h)),
                 lambda h: F.relu(h) + torch.log1p(torch.exp(-h.abs())), lambda h: -F.logsigmoid(-h)],
    "log of a sigmoid": [F.logsigmoid, lambda h: -F.softplus(-h), lambda h: torch.sigmoid(h).log(),
                         lambda h: h.clamp(max=0) - torch.log1p(torch.exp(-h.abs()))],
    "tanhshrink": [F.tanhshrink, lambda h: h - torch.tanh(h)],
    "square": [lambda h: h**2, lambda h: h * h, torch.square, lambda h: h.pow(2), lambda h: torch.mul(h, h)],
    "exponential": [torch.exp, lambda h: h.exp(), lambda h: torch.exp2(h / math.log(2)), lambda h: h.expm1() + 1],
    "clamp between other bounds": [lambda h: h.clamp(-0.5, 0.8), lambda h: F.hardtanh(h, -0.5, 0.8),
                                   lambda h: h.clip(-0.5, 0.8), lambda h: h.clamp(min=-0.5).clamp(max=0.8)],
    "sine": [torch.sin, lambda h: h.sin(), lambda h: torch.cos(h - math.pi / 2)],
    "running sum": [lambda h: h.cumsum(1), lambda h: torch.ones(5, 5, dtype=h.dtype).tril() @ h,
                    lambda h: torch.einsum("ij,bjd->bid", torch.ones(5, 5, dtype=h.dtype).tril(), h)],
    "stopped gate": [lambda h: h * torch.sigmoid(h).detach(), lambda h: h * torch.sigmoid(h.detach())],
    "affine": [lambda h: 2 * h + 1, lambda h: h.mul(2).add(1), lambda h: h + h + 1, lambda h: torch.add(1, h, alpha=2),
               lambda h: (h + 0.5) / 0.5, lambda h: torch.rsub(-2 * h, 1)],
}  # fmt: skip

NORMS = {
    "layer norm": [
        lambda h: F.layer_norm(h, (N,)), lambda h: centred(h) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
        lambda h: centred(h) * torch.rsqrt((h * h).mean(-1, keepdim=True) - h.mean(-1, keepdim=True) ** 2 + 1e-5),
        lambda h: (lambda c: c * (c.square().mean(-1, keepdim=True) + 1e-5).pow(-0.5))(centred(h)),
        lambda h: (lambda c: c * torch.rsqrt(torch.einsum("bni,bni->bn", c, c)[..., None] / N + 1e-5))(centred(h)),
        lambda h: (lambda vm: (h - vm[1]) * (vm[0] + 1e-5).rsqrt())(torch.var_mean(h, -1, correction=0, keepdim=True)),
        lambda h: (lambda c: c / torch.sqrt(c.pow(2).sum(-1, keepdim=True) / N + 1e-5))(h.sub(h.mean(-1, keepdim=True))),
        lambda h: (lambda r: h * r - h.mean(-1, keepdim=True) * r)((h.var(-1, False, keepdim=True) + 1e-5).rsqrt()),
        lambda h: F.group_norm(h.flatten(0, 1), 1).view(h.shape), lambda h: F.instance_norm(h),
        lambda h: aten.layer_norm(h, (N,), None, None, 1e-5),
        lambda h: -(h.mean(-1, keepdim=True) - h) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
        lambda h: (-h.mean(-1, keepdim=True) + h) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
        lambda h: (lambda r, mean: h * r + (-mean * r))((h.var(-1, False, keepdim=True) + 1e-5).rsqrt(), h.mean(-1, True)),
        lambda h: torch.addcdiv(0 * h, centred(h), (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()),
        lambda h: torch.einsum("bni,bn->bni", centred(h), (h.var(-1, unbiased=False) + 1e-5).rsqrt()),
        lambda h: F.rms_norm(centred(h), (N,), eps=1e-5), lambda h: F.rms_norm(h - h.sum(-1, keepdim=True) / N, (N,), eps=1e-5),
    ],
    "layer norm beside what it is of": [
        lambda h: F.layer_norm(h, (N,)) + 2 * centred(h), lambda h: (lambda c: c * rstd(c) + 2 * c)(centred(h)),
        lambda h: (lambda c: 2 * c + F.rms_norm(c, (N,), eps=1e-5))(centred(h)),
    ],
    "rms norm": [
        lambda h: F.rms_norm(h, (N,), eps=1e-6), lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda h: h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt(),
        lambda h: h * (torch.einsum("...i,...i->...", h, h).unsqueeze(-1) / N + 1e-6) ** -0.5,
        lambda h: h / torch.sqrt(torch.linalg.vecdot(h, h)[..., None] / N + 1e-6),
        lambda h: torch.div(h, torch.sqrt(torch.mean(h * h, axis=-1, keepdims=True) + 1e-6)),
        lambda h: torch.einsum("bni,bn->bni", h, (h.pow(2).mean(-1) + 1e-6).rsqrt()),
        lambda h: torch.addcdiv(0 * h, h, (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()),
    ],
    "normalisation by length": [
        lambda h: F.normalize(h, dim=-1), lambda h: h / h.norm(dim=-1, keepdim=True),
        lambda h: h / torch.linalg.norm(h, dim=-1, keepdim=True), lambda h: h / torch.linalg.vector_norm(h, dim=-1, keepdim=True),
        lambda h: h / h.pow(2).sum(-1, keepdim=True).sqrt(), lambda h: h * h.square().sum(-1, keepdim=True).rsqrt(),
        lambda h: h / torch.einsum("bni,bni->bn", h, h).sqrt()[..., None], lambda h: h / torch.norm(h, p=2, dim=-1, keepdim=True),
        lambda h: h * (1 / h.norm(dim=-1, keepdim=True)), lambda h: h / h.norm(dim=-1, keepdim=True).clamp_min(1e-12),
        lambda h: h * h.norm(dim=-1, keepdim=True).reciprocal(), lambda h: torch.divide(h, (h * h).sum(2, True) ** 0.5),
    ],
    "normalisation by magnitudes": [
        lambda h: F.normalize(h, p=1, dim=-1), lambda h: h / h.abs().sum(-1, keepdim=True),
        lambda h: h / h.norm(p=1, dim=-1, keepdim=True), lambda h: h / torch.linalg.vector_norm(h, 1, -1, keepdim=True),
        lambda h: h * h.abs().sum(-1, keepdim=True).reciprocal(), lambda h: (h / h.abs().mean(-1, keepdim=True)) / N,
    ],
    "normalisation by the largest": [
        lambda h: F.normalize(h, p=float("inf"), dim=-1), lambda h: h / h.abs().amax(-1, keepdim=True),
        lambda h: h / h.norm(p=float("inf"), dim=-1, keepdim=True), lambda h: h / h.abs().max(-1, keepdim=True).values,
    ],
    "normalisation over tokens": [
        lambda h: F.normalize(h, dim=1), lambda h: h / h.norm(dim=1, keepdim=True),
        lambda h: h / h.pow(2).sum(dim=1, keepdim=True).sqrt(), lambda h: (h.mT / h.mT.norm(dim=-1, keepdim=True)).mT,
    ],
    "division by the deviation": [
        lambda h: h / h.std(-1, keepdim=True), lambda h: h / h.var(-1, keepdim=True).sqrt(),
        lambda h: h * h.var(-1, keepdim=True).rsqrt(), lambda h: h / torch.std(h, dim=-1, keepdim=True),
    ],
    "cosine with constants": [
        lambda h: F.cosine_similarity(h.unsqueeze(2), torch.eye(N, dtype=h.dtype), dim=-1),
        lambda h: F.normalize(h, dim=-1) @ torch.eye(N, dtype=h.dtype),
        lambda h: F.linear(F.normalize(h, dim=-1), torch.eye(N, dtype=h.dtype)), lambda h: h / h.norm(dim=-1, keepdim=True),
    ],
    "cosine of two": [
        lambda h: F.cosine_similarity(h, h.flip(-1) + 1, dim=-1),
        lambda h: (F.normalize(h, dim=-1) * F.normalize(h.flip(-1) + 1, dim=-1)).sum(-1),
        lambda h: (h / h.norm(dim=-1, keepdim=True) * F.normalize(h.flip(-1) + 1, dim=-1)).sum(-1),
        lambda h: (lambda g: (h * g).sum(-1) / (h.norm(dim=-1) * g.norm(dim=-1)))(h.flip(-1) + 1),
        lambda h: (h * (h.flip(-1) + 1)).sum(-1) / (h.norm(dim=-1) * (h.flip(-1) + 1).norm(dim=-1)).clamp_min(1e-8),
        lambda h: (lambda g: torch.einsum("bni,bni->bn", h, g) / h.norm(dim=-1) / g.norm(dim=-1))(h.flip(-1) + 1),
        lambda h: (lambda g: (h * g).sum(-1) * ((h * h).sum(-1) * (g * g).sum(-1)).rsqrt())(h.flip(-1) + 1),
        lambda h: (lambda g: torch.linalg.vecdot(h, g) / ((h * h).sum(-1) * (g * g).sum(-1)).sqrt())(h.flip(-1) + 1),
    ],
    "cosines of all pairs": [
        lambda h: F.normalize(h, dim=-1) @ F.normalize(h.flip(-1) + 1, dim=-1).mT,
        lambda h: (lambda g: h @ g.mT / (h.norm(dim=-1, keepdim=True) * g.norm(dim=-1)[:, None]))(h.flip(-1) + 1),
        lambda h: (lambda g: h @ g.mT / (h.norm(dim=-1, keepdim=True) @ g.norm(dim=-1, keepdim=True).mT))(h.flip(-1) + 1),
        lambda h: (lambda g: torch.einsum("bni,bmi->bnm", h, g) / h.norm(dim=-1)[..., None] / g.norm(dim=-1)[:, None])(
            h.flip(-1) + 1
        ),
    ],
    "a normalised signal times another": [
        lambda h: F.normalize(h, dim=-1) * h.roll(1, -1), lambda h: h * h.roll(1, -1) / h.norm(dim=-1, keepdim=True),
        lambda h: h.roll(1, -1) * (h / h.norm(dim=-1, keepdim=True)),
    ],
    "length 1 after a mean": [
        lambda h: F.normalize(centred(h), dim=-1), lambda h: centred(h) / centred(h).norm(dim=-1, keepdim=True),
        lambda h: (lambda c: c / (c * c).sum(-1, keepdim=True).sqrt())(centred(h)),
    ],
    "correlation": [
        lambda h: F.cosine_similarity(centred(h), centred(h.roll(1, 1)), dim=-1),
        lambda h: (lambda a, b: (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)))(centred(h), centred(h.roll(1, 1))),
        lambda h: (F.normalize(centred(h), dim=-1) * F.normalize(centred(h.roll(1, 1)), dim=-1)).sum(-1),
    ],
    "normalised after a mean over samples": [
        lambda h: F.normalize(h - h.mean(0), dim=-1),
        lambda h: (h - h.mean(0)) / (h - h.mean(0)).norm(dim=-1, keepdim=True),
    ],
    "group norm": [
        lambda h: F.group_norm(h.mT, 2).mT,
        lambda h: F.layer_norm(h.mT.reshape(2, 2, 20), (20,)).reshape(2, 8, 5).mT,
    ],
    "instance norm": [
        lambda h: F.instance_norm(h.mT).mT, lambda h: F.layer_norm(h.mT, (5,)).mT,
        lambda h: (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
    ],
    "distance": [
        lambda h: torch.cdist(h, h + 1)[..., :1], lambda h: (h - (h[:, :1] + 1)).pow(2).sum(-1, keepdim=True).sqrt(),
        lambda h: (h - (h[:, :1] + 1)).norm(dim=-1, keepdim=True),
        lambda h: F.pairwise_distance(h, h[:, :1] + 1, eps=0.0, keepdim=True),
    ],
    "largest": [lambda h: h.amax(-1), lambda h: h.max(-1).values, lambda h: h.max(-1)[0], lambda h: torch.amax(h, dim=-1),
                lambda h: h.topk(1, -1).values.squeeze(-1), lambda h: F.adaptive_max_pool1d(h, 1).squeeze(-1),
                lambda h: F.max_pool1d(h, N).squeeze(-1)],
    "largest over tokens": [lambda h: h.amax(1), lambda h: h.max(1).values, lambda h: F.adaptive_max_pool1d(h.mT, 1).squeeze(-1),
                            lambda h: h.mT.amax(-1), lambda h: F.max_pool1d(h.mT, 5).squeeze(-1)],
    "length": [lambda h: h.norm(dim=-1), lambda h: torch.linalg.vector_norm(h, dim=-1), lambda h: (h * h).sum(-1).sqrt(),
               lambda h: torch.einsum("bni,bni->bn", h, h) ** 0.5],
    "variance": [lambda h: h.var(-1, unbiased=False), lambda h: centred(h).square().mean(-1),
                 lambda h: torch.var(h, -1, correction=0), lambda h: torch.var_mean(h, -1, correction=0)[0]],
    "largest of two": [
        lambda h: torch.maximum(h[..., ::2], h[..., 1::2]), lambda h: torch.max(h[..., ::2], h[..., 1::2]),
        lambda h: F.max_pool1d(h, 2), lambda h: h.unflatten(-1, (4, 2)).amax(-1), lambda h: h.view(2, 5, 4, 2).max(-1)[0],
        lambda h: F.max_pool1d(h, 2, stride=2), lambda h: torch.stack([h[..., ::2], h[..., 1::2]], -1).amax(-1),
    ],
    "smaller of two": [
        lambda h: torch.minimum(h[..., ::2], h[..., 1::2]), lambda h: torch.min(h[..., ::2], h[..., 1::2]),
        lambda h: -torch.maximum(-h[..., ::2], -h[..., 1::2]), lambda h: -F.max_pool1d(-h, 2),
    ],
    "logarithm of a sum": [lambda h: h.logsumexp(-1), lambda h: h.exp().sum(-1).log(), lambda h: torch.special.logsumexp(h, -1)],
    "product of all": [lambda h: h.prod(-1), lambda h: h[..., :4].prod(-1) * h[..., 4:].prod(-1)],
    "log-add-exp": [lambda h: torch.logaddexp(h, h.flip(-1)), lambda h: (h.exp() + h.flip(-1).exp()).log(),
                    lambda h: h + F.softplus(h.flip(-1) - h)],
    "gated linear unit": [lambda h: F.glu(h), lambda h: h[..., :4] * torch.sigmoid(h[..., 4:]),
                          lambda h: (lambda ab: ab[0] * ab[1].sigmoid())(h.chunk(2, -1))],
    "mean": [lambda h: h.mean(1), lambda h: h.sum(1) / 5, lambda h: F.adaptive_avg_pool1d(h.mT, 1).squeeze(-1),
             lambda h: F.avg_pool1d(h.mT, 5).squeeze(-1), lambda h: torch.einsum("bni->bi", h) / 5],
    "a product of two": [lambda h: h * h.flip(-1), lambda h: torch.mul(h, h.flip(-1)), lambda h: torch.multiply(h, h.flip(-1)),
                         lambda h: torch.einsum("bni,bni->bni", h, h.flip(-1))],
    "a quotient of two": [lambda h: h / (h.flip(-1) + 9), lambda h: torch.div(h, h.flip(-1) + 9),
                          lambda h: torch.true_divide(h, 9 + h.flip(-1)), lambda h: torch.divide(h, h.flip(-1) + 9)],
}  # fmt: skip

ATTENTION = {
    "attention": [
        lambda m, h: F.scaled_dot_product_attention(m.q(h), m.k(h), m.v(h)), lambda m, h: scores(m, h).softmax(-1) @ m.v(h),
        lambda m, h: torch.bmm(F.softmax(scores(m, h), dim=2), m.v(h)),
        lambda m, h: torch.einsum("bij,bjd->bid", torch.softmax(scores(m, h), -1), m.v(h)),
        lambda m, h: written_softmax(scores(m, h)) @ m.v(h), lambda m, h: scores(m, h).log_softmax(-1).exp() @ m.v(h),
        lambda m, h: F.softmin(-scores(m, h), -1) @ m.v(h), lambda m, h: scores(m, h).softmax(-1).type_as(h) @ m.v(h),
        lambda m, h: scores(m, h).softmax(-1).to(h) @ m.v(h), lambda m, h: scores(m, h).softmax(-1).to(h.dtype) @ m.v(h),
        lambda m, h: scores(m, h).softmax(-1).type(torch.float64) @ m.v(h),
        lambda m, h: torch.nan_to_num(scores(m, h).softmax(-1)) @ m.v(h),
        lambda m, h: scores(m, h).softmax(-1).masked_fill(m.mask > 2, 0.0) @ m.v(h),
        lambda m, h: torch.where(m.mask < 2, scores(m, h).softmax(-1), 0.0) @ m.v(h),
        lambda m, h: (scores(m, h).softmax(-1) * torch.ones_like(m.mask)) @ m.v(h),
        lambda m, h: torch.einsum("bij,jk->bik", scores(m, h).softmax(-1), torch.eye(5, dtype=h.dtype)) @ m.v(h),
        lambda m, h: F.dropout(torch.special.softmax(scores(m, h), -1), 0.3, training=False) @ m.v(h),
        lambda m, h: F.softmax(scores(m, h), -1, dtype=torch.float64).clone().contiguous().matmul(m.v(h)),
        lambda m, h: (m.v(h).mT @ scores(m, h).softmax(-1).mT).mT,
        lambda m, h: (scores(m, h).softmax(-1).unsqueeze(-1) * m.v(h).unsqueeze(1)).sum(2),
        lambda m, h: (lambda s: (s - s.logsumexp(-1, keepdim=True)).exp() @ m.v(h))(scores(m, h)),
        lambda m, h: aten._softmax(scores(m, h), -1, False) @ m.v(h),
        lambda m, h: torch.linalg.matmul(scores(m, h).softmax(-1), m.v(h)),
        lambda m, h: (lambda e: e @ m.v(h) / e.sum(-1, keepdim=True))(scores(m, h).exp()),
        lambda m, h: (lambda e: e @ m.v(h) / (e.sum(-1, keepdim=True) + 1e-12))((scores(m, h) - 1).exp()),
        lambda m, h: (lambda e: e @ m.v(h) * e.sum(-1, keepdim=True).clamp(min=1e-9).reciprocal())(scores(m, h).exp()),
        lambda m, h: (lambda e: torch.einsum("bij,bjd->bid", e, m.v(h)) / torch.einsum("bij->bi", e)[..., None])(
            scores(m, h).exp()
        ),
        lambda m, h: (lambda e: e @ m.v(h) / (e @ torch.ones(5, 1, dtype=h.dtype)))(scores(m, h).exp()),
        lambda m, h: (lambda e: e / e.sum(-1, keepdim=True) @ m.v(h))(torch.exp2(scores(m, h) / math.log(2))),
        lambda m, h: (lambda e: e / e.sum(-1, keepdim=True) @ m.v(h))(torch.pow(math.e, scores(m, h))),
        lambda m, h: F.normalize(scores(m, h).exp(), p=1, dim=-1) @ m.v(h),
    ],
    "values behind a gate": [
        lambda m, h: F.scaled_dot_product_attention(m.q(h), F.relu(h), F.relu(h)),
        lambda m, h: (lambda r: (m.q(h) @ r.mT / math.sqrt(N)).softmax(-1) @ r)(F.relu(h)),
        lambda m, h: (lambda r: written_softmax(m.q(h) @ r.mT / math.sqrt(N)) @ r)(h * (h > 0)),
        lambda m, h: (lambda r: ((m.q(h) @ r.mT / math.sqrt(N)).softmax(-1)[..., None] * r[:, None]).sum(2))(h.clamp(min=0)),
    ],
    "masked weights": [
        lambda m, h: (scores(m, h).softmax(-1) * m.mask) @ m.v(h),
        lambda m, h: scores(m, h).softmax(-1).masked_fill(m.mask == 0, 0.0) @ m.v(h),
        lambda m, h: torch.where(m.mask > 0, scores(m, h).softmax(-1), torch.zeros((), dtype=h.dtype)) @ m.v(h),
        lambda m, h: torch.einsum("bij,ij->bij", scores(m, h).softmax(-1), m.mask) @ m.v(h),
        lambda m, h: torch.einsum("bij,ij,bjd->bid", scores(m, h).softmax(-1), m.mask, m.v(h)),
        lambda m, h: (scores(m, h).softmax(-1) * (m.mask > 0)) @ m.v(h),
        lambda m, h: (written_softmax(scores(m, h)) * m.mask[None]) @ m.v(h),
        lambda m, h: (lambda e: (e * m.mask / e.sum(-1, keepdim=True)) @ m.v(h))(scores(m, h).exp()),
        lambda m, h: (lambda e: (e * m.mask) @ m.v(h) / e.sum(-1, keepdim=True))(scores(m, h).exp()),
    ],
    "masked scores": [
        lambda m, h: F.scaled_dot_product_attention(m.q(h), m.k(h), m.v(h), is_causal=True),
        lambda m, h: scores(m, h).masked_fill(torch.ones(5, 5).triu(1) > 0, -torch.inf).softmax(-1) @ m.v(h),
        lambda m, h: (scores(m, h) + torch.full((5, 5), -torch.inf).triu(1)).softmax(-1) @ m.v(h),
        lambda m, h: F.scaled_dot_product_attention(m.q(h), m.k(h), m.v(h), attn_mask=torch.ones(5, 5).tril() > 0),
        lambda m, h: torch.where(torch.ones(5, 5).tril() > 0, scores(m, h), -1e300).softmax(-1) @ m.v(h),
        lambda m, h: (lambda e: (e / e.sum(-1, keepdim=True)) @ m.v(h))(scores(m, h).exp() * m.mask),
        lambda m, h: (lambda e: (e / (e.sum(-1, True) + 1e-13)) @ m.v(h))(torch.where(m.mask > 0, scores(m, h).exp(), 0.0)),
        lambda m, h: (lambda e: e @ m.v(h) / e.sum(-1, keepdim=True))(scores(m, h).exp().masked_fill(m.mask == 0, 0.0)),
        lambda m, h: (lambda w: (w / w.sum(-1, keepdim=True)) @ m.v(h))(scores(m, h).softmax(-1) * m.mask),
    ],
    "a sink": [
        lambda m, h: torch.cat([scores(m, h), m.s(h)], -1).softmax(-1)[..., :-1] @ m.v(h),
        lambda m, h: written_softmax(torch.cat([scores(m, h), m.s(h)], -1)).narrow(-1, 0, 5) @ m.v(h),
        lambda m, h: F.pad(torch.cat([scores(m, h), m.s(h)], -1).softmax(-1), (0, -1)) @ m.v(h),
    ],
    "weights in two parts": [
        lambda m, h: scores(m, h).softmax(-1) @ m.v(h),
        lambda m, h: (lambda w, v: w[..., :2] @ v[:, :2] + w[..., 2:] @ v[:, 2:])(scores(m, h).softmax(-1), m.v(h)),
    ],
    "weights mixed along their axis": [
        lambda m, h: F.linear(scores(m, h).softmax(-1), m.bias) @ m.v(h),
        lambda m, h: (scores(m, h).softmax(-1) @ m.bias.T) @ m.v(h),
    ],
    "the difference of two": [
        lambda m, h: (scores(m, h).softmax(-1) - 0.3 * scores(m, h.flip(1)).softmax(-1)) @ m.v(h),
        lambda m, h: torch.sub(written_softmax(scores(m, h)), written_softmax(scores(m, h.flip(1))), alpha=0.3) @ m.v(h),
    ],
    "a bias on the weights": [
        lambda m, h: (scores(m, h).softmax(-1) + m.bias) @ m.v(h),
        lambda m, h: torch.einsum("bij,bjd->bid", torch.add(m.bias, scores(m, h).softmax(-1)), m.v(h)),
    ],
    "talking heads": [
        lambda m, h: joined(m.heads(head_weights(m, h).movedim(1, -1)).movedim(-1, 1) @ heads(m.v(h))),
        lambda m, h: joined(torch.einsum("bhij,gh->bgij", head_weights(m, h), m.heads.weight) @ heads(m.v(h))),
        lambda m, h: joined(F.conv2d(head_weights(m, h), m.heads.weight[:, :, None, None]) @ heads(m.v(h))),
        lambda m, h: joined((head_weights(m, h).movedim(1, -1) @ m.heads.weight.T).movedim(-1, 1) @ heads(m.v(h))),
    ],
    "attention pooling": [
        lambda m, h: (m.s(h).softmax(1) * m.v(h)).sum(1), lambda m, h: (m.s(h).softmax(1).mT @ m.v(h)).squeeze(1),
        lambda m, h: torch.einsum("bno,bnd->bd", m.s(h).softmax(1), m.v(h)),
        lambda m, h: torch.bmm(m.s(h).softmax(1).squeeze(-1).unsqueeze(1), m.v(h)).squeeze(1),
        lambda m, h: torch.einsum("bn,bnd->bd", m.s(h).squeeze(-1).softmax(-1), m.v(h)),
        lambda m, h: torch.sum(m.v(h) * F.softmax(m.s(h), dim=1), dim=1),
        lambda m, h: (written_softmax(m.s(h), 1) * m.v(h)).sum(1),
        lambda m, h: (m.s(h).softmax(-2) * m.v(h)).mean(1) * 5, lambda m, h: (F.softmin(-m.s(h), 1) * m.v(h)).sum(1),
        lambda m, h: loop_over(m.s(h).squeeze(-1).softmax(-1), m.v(h), 5),
        lambda m, h: (m.s(h).log_softmax(1).exp() * m.v(h)).sum(dim=1), lambda m, h: (m.v(h).mT @ m.s(h).softmax(1)).squeeze(-1),
        lambda m, h: (lambda e: (e * m.v(h)).sum(1) / e.sum(1))(m.s(h).exp()),
        lambda m, h: (lambda e: (e.mT @ m.v(h)).squeeze(1) / e.sum(1))(m.s(h).exp()),
        lambda m, h: (lambda e: (e * m.v(h)).mean(1) / e.mean(1))(m.s(h).exp()),
    ],
    "attention pooling over two axes": [
        lambda m, h: (m.q(h).flatten(1).softmax(-1).view(2, 5, 8) * m.v(h)).sum((1, 2)),
        lambda m, h: (lambda e: (e / e.sum((1, 2), keepdim=True) * m.v(h)).sum((1, 2)))(m.q(h).exp()),
        lambda m, h: (lambda s: ((s - s.logsumexp((1, 2), keepdim=True)).exp() * m.v(h)).sum((1, 2)))(m.q(h)),
        lambda m, h: (lambda e: (e * m.v(h)).sum((1, 2)) / e.sum((1, 2)))(m.q(h).exp()),
    ],
    "attention, and the entropy of its weights": [
        lambda m, h: scores(m, h).softmax(-1) @ m.v(h) + entropy(scores(m, h).softmax(-1)),
        lambda m, h: (lambda w: w @ m.v(h) + entropy(w))(scores(m, h).softmax(-1)),
        lambda m, h: (lambda w: w @ m.v(h) + entropy(w))(written_softmax(scores(m, h))),
    ],
    "attention beside its weights": [
        lambda m, h: torch.cat([scores(m, h).softmax(-1) @ m.v(h), scores(m, h).softmax(-1)], -1),
        lambda m, h: (lambda w: torch.cat([w @ m.v(h), w], -1))(scores(m, h).softmax(-1)),
        lambda m, h: (lambda w: torch.cat([w @ m.v(h), w * 1], -1))(scores(m, h).softmax(-1)),
    ],
    "attention beside the mean of its exponentials": [
        lambda m, h: scores(m, h).softmax(-1) @ m.v(h) + scores(m, h).exp().mean(-1, keepdim=True),
        lambda m, h: (lambda e: (e / e.sum(-1, keepdim=True)) @ m.v(h) + e.mean(-1, keepdim=True))(scores(m, h).exp()),
        lambda m, h: (lambda e: (lambda s: (e / s) @ m.v(h) + s / 5)(e.sum(-1, keepdim=True)))(scores(m, h).exp()),
    ],
    "weights of weights": [
        lambda m, h: scores(m, h).softmax(-1) @ (scores(m, h.flip(1)).softmax(-1) @ m.v(h)),
        lambda m, h: (scores(m, h).softmax(-1) @ scores(m, h.flip(1)).softmax(-1)) @ m.v(h),
        lambda m, h: torch.einsum("bij,bjk->bik", scores(m, h).softmax(-1), scores(m, h.flip(1)).softmax(-1)) @ m.v(h),
    ],
    "weights twice": [
        lambda m, h: (lambda w: w @ (w @ m.v(h)))(scores(m, h).softmax(-1)),
        lambda m, h: (lambda w: (w @ w) @ m.v(h))(scores(m, h).softmax(-1)),
    ],
    "a mixture of softmaxes": [
        lambda m, h: torch.einsum("bne,bnec->bnc", m.e(h).softmax(-1), experts(m, h).softmax(-1)),
        lambda m, h: (m.e(h).softmax(-1)[..., None] * experts(m, h).softmax(-1)).sum(-2),
        lambda m, h: loop_over(m.e(h).softmax(-1), experts(m, h).softmax(-1), 4),
        lambda m, h: (m.e(h).softmax(-1)[..., None, :] @ experts(m, h).softmax(-1)).squeeze(-2),
    ],
    "how alike two softmaxes are": [
        lambda m, h: m.q(h).softmax(-1) @ m.v(h).softmax(-1).mT,
        lambda m, h: torch.einsum("bic,bjc->bij", m.q(h).softmax(-1), m.v(h).softmax(-1)),
        lambda m, h: (m.q(h).softmax(-1)[:, :, None] * m.v(h).softmax(-1)[:, None]).sum(-1),
    ],
    "entropy": [
        lambda m, h: (lambda p: -(p * p.log()).sum(-1))(m.q(h).softmax(-1)),
        lambda m, h: -(m.q(h).log_softmax(-1).exp() * m.q(h).log_softmax(-1)).sum(-1),
        lambda m, h: torch.special.entr(m.q(h).softmax(-1)).sum(-1),
        lambda m, h: (lambda s: -(s.softmax(-1) * (s - s.logsumexp(-1, keepdim=True))).sum(-1))(m.q(h)),
        lambda m, h: (lambda s: -(s.softmax(-1) * (s - s.exp().sum(-1, keepdim=True).log())).sum(-1))(m.q(h)),
        lambda m, h: -torch.einsum("bnc,bnc->bn", m.q(h).softmax(-1), m.q(h).log_softmax(-1)),
    ],
    "mixture of experts": [
        lambda m, h: (m.e(h).softmax(-1).unsqueeze(-1) * experts(m, h)).sum(-2),
        lambda m, h: torch.einsum("bne,bned->bnd", m.e(h).softmax(-1), experts(m, h)),
        lambda m, h: loop_over(m.e(h).softmax(-1), experts(m, h), 4),
        lambda m, h: (m.e(h).softmax(-1).unsqueeze(-2) @ experts(m, h)).squeeze(-2),
        lambda m, h: each_of(m.e(h).softmax(-1), (m.q(h), m.k(h), m.v(h), h)),
    ],
    "channel attention": [
        lambda m, h: m.v(h) @ (m.q(h).mT @ m.k(h)).softmax(-1).mT,
        lambda m, h: torch.einsum("bnj,bij->bni", m.v(h), (m.q(h).mT @ m.k(h)).softmax(-1)),
    ],
    "linear attention": [
        lambda m, h: m.q(h).softmax(-1) @ (m.k(h).softmax(1).mT @ m.v(h)),
        lambda m, h: torch.einsum("bni,bij->bnj", m.q(h).softmax(-1), torch.einsum("bni,bnj->bij", m.k(h).softmax(1), m.v(h))),
    ],
    "slot attention": [
        lambda m, h: (lambda w: (w / w.sum(-1, keepdim=True)) @ m.v(h))(scores(m, h).softmax(1)),
        lambda m, h: (lambda w: torch.bmm(w / w.sum(-1, keepdim=True), m.v(h)))(written_softmax(scores(m, h), 1)),
    ],
    "weights that are summed up along the other axis": [
        lambda m, h: scores(m, h).softmax(1) @ m.v(h), lambda m, h: written_softmax(scores(m, h), 1) @ m.v(h),
        lambda m, h: torch.einsum("bij,bjd->bid", F.softmax(scores(m, h), 1), m.v(h)),
    ],
    "a softmax gate": [lambda m, h: m.v(h) * m.q(h).softmax(-1), lambda m, h: written_softmax(m.q(h)) * m.v(h)],
    "a softmax head": [lambda m, h: m.q(h).softmax(-1), lambda m, h: written_softmax(m.q(h)),
                       lambda m, h: F.log_softmax(m.q(h), -1).exp(), lambda m, h: F.softmin(-m.q(h), -1)],
    "sigmoid attention": [lambda m, h: torch.sigmoid(scores(m, h)) @ m.v(h),
                          lambda m, h: torch.einsum("bij,bjd->bid", scores(m, h).sigmoid(), m.v(h))],
    "a linear layer": [lambda m, h: m.q(h), lambda m, h: F.linear(h, m.q.weight, m.q.bias),
                       lambda m, h: h @ m.q.weight.T + m.q.bias,
                       lambda m, h: torch.einsum("bni,oi->bno", h, m.q.weight) + m.q.bias,
                       lambda m, h: torch.addmm(m.q.bias, h.flatten(0, 1), m.q.weight.T).view(2, 5, 8),
                       lambda m, h: F.conv1d(h.mT, m.q.weight[..., None], m.q.bias).mT],
    "swiglu": [lambda m, h: F.silu(m.q(h)) * m.v(h), lambda m, h: (lambda q: q * torch.sigmoid(q) * m.v(h))(m.q(h)),
               lambda m, h: torch.mul(m.v(h), (lambda q: q / (1 + (-q).exp()))(m.q(h))),
               lambda m, h: (lambda q: q * (q.sigmoid() * m.v(h)))(m.q(h)),
               lambda m, h: (lambda q: q * m.v(h) * q.sigmoid())(m.q(h)),
               lambda m, h: (lambda q: m.v(h) * q / (1 + (-q).exp()))(m.q(h)),
               # behind a mask that comes with the call, as of padding
               lambda m, h: (F.silu(m.q(h)) * h.isfinite().all(-1, keepdim=True).to(h)) * m.v(h)],
    "geglu": [lambda m, h: F.gelu(m.q(h)) * m.v(h), lambda m, h: (lambda q: q * torch.special.ndtr(q) * m.v(h))(m.q(h)),
              lambda m, h: m.v(h).mul((lambda q: 0.5 * q * (1 + torch.erf(q / ROOT2)))(m.q(h))),
              lambda m, h: (lambda q: 0.5 * q * m.v(h) * (1 + torch.erf(q / ROOT2)))(m.q(h))],
    "reglu": [lambda m, h: F.relu(m.q(h)) * m.v(h), lambda m, h: m.v(h) * m.q(h).clamp(min=0),
              lambda m, h: (lambda q: m.v(h) * torch.where(q > 0, q, 0.0))(m.q(h)),
              lambda m, h: (lambda q: q * m.v(h) * (q > 0))(m.q(h)), lambda m, h: (lambda q: m.v(h) * (q > 0) * q)(m.q(h))],
    "swish with a weight a channel": [
        lambda m, h: m.q.bias * F.silu(h), lambda m, h: m.q.bias * h * h.sigmoid(), lambda m, h: h * m.q.bias / (1 + (-h).exp()),
    ],
    "two swishes": [
        lambda m, h: F.silu(h) * F.silu(m.q(h)), lambda m, h: (lambda q: h * q * h.sigmoid() * q.sigmoid())(m.q(h)),
        lambda m, h: (lambda q: q * (h * (q.sigmoid() * h.sigmoid())))(m.q(h)),
    ],
    "the square of a gated product": [
        lambda m, h: (F.silu(h) * m.q(h)) ** 2, lambda m, h: (lambda p: p * p)(h * m.q(h) * h.sigmoid()),
        lambda m, h: (h * m.q(h) * h.sigmoid()).square(),
    ],
    "rms norm with a gain of its own": [
        lambda m, h: h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + m.q(h.mean(1, keepdim=True))),
        lambda m, h: h * ((1 + m.q(h.mean(1, keepdim=True))) * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()),
        lambda m, h: h * ((1 + m.q(h.mean(1, keepdim=True))) / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()),
    ],
    "swish, times two others": [
        lambda m, h: F.silu(h) * m.q(h) * m.v(h), lambda m, h: h * m.q(h) * m.v(h) * h.sigmoid(),
        lambda m, h: (h * m.q(h)) * h.sigmoid() * m.v(h),
    ],
    "softsign, times another": [lambda m, h: F.softsign(h) * m.q(h), lambda m, h: h * m.q(h) / (1 + h.abs())],
    "a squeezed gate": [
        lambda m, h: m.v(h) * torch.sigmoid(m.q(h.mean(1, keepdim=True))),
        lambda m, h: torch.mul(torch.special.expit(m.q(h.mean(1, keepdim=True))), m.v(h)),
    ],
}  # fmt: skip

SPELLINGS = {
    **{name: [lambda m, h, f=f: f(h) for f in forms] for name, forms in (POINTWISE | NORMS).items()},
    **ATTENTION,
}


class Spelling(nn.Module):
    """One spelling, in a module of its own, so that its lines of a report are known by their place."""

    def __init__(self, function, parts):
        super().__init__()
        self.function, self.parts = function, parts

    def forward(self, h):
        return self.function(self.parts, h)


class Function(nn.Module):
    """All spellings of one function, after a linear layer; returns a tuple of what they give."""

    def __init__(self, forms):
        super().__init__()
        parts = nn.Module()
        for name, width in (("q", 8), ("k", 8), ("v", 8), ("s", 1), ("e", 4)):
            parts.add_module(name, nn.Linear(8, width))
        parts.heads = nn.Linear(2, 2, bias=False)
        parts.register_buffer("mask", torch.ones(5, 5).tril())
        parts.register_buffer("bias", torch.linspace(-1, 1, 25).view(5, 5))
        self.layer = nn.Linear(8, 8)
        self.forms = nn.ModuleList([Spelling(form, parts) for form in forms])

    def forward(self, x):
        h = self.layer(x)
        return tuple(form(h) for form in self.forms)
