"""A second derivation of the adjoints, in float64, from the formulas alone: no autograd, no tracing, no import of the library.

A network is a list of `Op`s. Each knows
    forward(x)          what the layer computes,
    frozen(x, t)        the affine map A(x) t + b(x) that the layer acts as at x, applied to t: frozen(x, x) == forward(x),
    back(x, v, rules)   the adjoint of the cotangent v at x; `rules` maps a kind to a temperature, a `Soft` or "frozen", and
                        "scale" to what the temperatures of HOMOGENEOUS kinds are in units of: "absolute", "sample", "channel".
                        A `Soft` alone may have "batch_norm", for the gates of `Normed`.

Soft gates: Satkiewicz, Corizzo, Pietron, "Pulling Back the Curtain on Deep Networks", arXiv:2507.22832. Kinds that the paper
does not list follow its principle: the Gaussian average of a hard gate, or the gain of the forward pass at a temperature.
"""

import collections
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

FROZEN = "frozen"
# Noise round -margin tau; its own scale; with "batch_norm" what gates have that no batch norm is before.
Soft = collections.namedtuple("Soft", "tau margin scale otherwise", defaults=(0.0, None, None))
DEFAULTS = {
    "relu": 1.0, "leaky_relu": 1.0, "prelu": 1.0, "hardtanh": Soft(1.7, 0.4, "batch_norm", 1.0), "elu": 0.6,
    "silu": 1.6, "hardswish": 1.6, "mish": 1.6,
    "max_pool": 1.0, "attention": 1.0, "gelu": Soft(1.25, 0.5), "quick_gelu": Soft(1.25, 0.5), "abs": 1.0,
    "hardshrink": 0.6, "softshrink": 0.6,
    "stride": "smooth",
}  # fmt: skip
HOMOGENEOUS = ("relu", "leaky_relu", "prelu", "hardtanh", "abs", "max_pool")  # hard gates that do not see a scale
HARD = {kind: None if kind == "stride" else FROZEN for kind in DEFAULTS}
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946  # arXiv:1706.02515


def double(t):
    return None if t is None else t.detach().double() if t.is_floating_point() else t.detach()


# -- pointwise gates: the factor on the cotangent ---------------------------------------------------------------------------


def phi(z):
    """The normal CDF; erfc keeps the digits of the lower tail that 1 + erf loses."""
    return 0.5 * torch.erfc(-z / math.sqrt(2))


def step(z):
    return torch.heaviside(z, z.new_tensor(0.5))


def exp_tail(z, tau, s):
    """E[exp(s (z + tau e)); z + tau e < 0] = exp(s z + (s tau)^2 / 2) Phi(-z/tau - s tau).

    With y = z/tau + s tau the exponent s z + (s tau)^2 / 2 - y^2 / 2 is -(z/tau)^2 / 2, hence the second form for z > 0.
    """
    y = z / tau + s * tau
    near = torch.exp(s * z.clamp(max=0) + (s * tau) ** 2 / 2) * phi(-y)
    far = 0.5 * torch.special.erfcx(y.clamp(min=0) / math.sqrt(2)) * torch.exp(-((z / tau) ** 2) / 2)
    return torch.where(z > 0, far, near)


def away(kind, z, low=None, high=None, **_):
    """The distance of z from the kink that opens the gate: of min(z, high) it opens below, of the others above."""
    if kind == "relu":  # max(z, low) or min(z, high)
        return z - (low or 0.0) if high is None else high - z
    return z - low if kind == "hardtanh" else z


def soft_gain(kind, z, tau, low=None, high=None, slope=None, alpha=1.0, scale=1.0, rate=1.0, approximate=None, margin=0.0):
    if kind == "gelu":
        return phi(z / tau - margin)
    if kind == "relu":
        return phi(away(kind, z, low, high) / tau - margin)
    if kind in ("leaky_relu", "prelu"):
        return slope + (1 - slope) * phi(z / tau - margin)
    if kind == "hardtanh":
        return phi((z - low) / tau - margin) - phi((z - high) / tau - margin)
    if kind == "elu":  # z > 0: z; z < 0: alpha (exp(rate z) - 1); all times scale
        return scale * (phi(z / tau) + alpha * rate * exp_tail(z, tau, rate))
    if kind in ("silu", "quick_gelu"):  # the sigmoid of the forward, rate * z in it, at a temperature
        return 1 / (1 + torch.exp(-rate * (z / tau - margin)))
    if kind == "abs":  # E[sign(z + tau e)]
        return 2 * phi(z / tau) - 1
    if kind in ("hardshrink", "softshrink"):  # P(|z + tau e| > width)
        return 1 - phi((z + alpha) / tau) + phi((z - alpha) / tau)
    if kind == "hardswish":
        return ((z / tau + 3) / 6).clamp(0, 1)
    if kind == "mish":  # tanh(log(1 + e)) = (e^2 + 2 e) / (e^2 + 2 e + 2), in powers of exp(-|z|)
        e = torch.exp(-(z / tau).abs())
        return torch.where(z > 0, (1 + 2 * e) / (1 + 2 * e + 2 * e * e), (e * e + 2 * e) / (e * e + 2 * e + 2))
    raise KeyError(kind)


def frozen_gain(kind, z, low=None, high=None, slope=None, alpha=1.0, scale=1.0, rate=1.0, approximate=None):
    """The gate of the forward pass: hard where the gate is hard, the mean of both sides at a kink."""
    if kind == "relu":
        return step(away(kind, z, low, high))
    if kind in ("leaky_relu", "prelu"):
        return slope + (1 - slope) * step(z)
    if kind == "hardtanh":
        return step(z - low) - step(z - high)
    if kind == "elu":
        return scale * (step(z) + (1 - step(z)) * alpha * rate * torch.exp(rate * z.clamp(max=0)))
    if kind == "abs":
        return 2 * step(z) - 1
    if kind in ("hardshrink", "softshrink"):
        return step(z - alpha) + step(-z - alpha)
    if kind in ("silu", "quick_gelu"):
        return soft_gain(kind, z, 1.0, rate=rate)
    if kind == "gelu" and approximate == "tanh":
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return soft_gain(kind, z, 1.0)


def hard_derivative(kind, t, low=None, high=None, slope=None, alpha=1.0, scale=1.0, rate=1.0):
    """The derivative of the gate itself away from its kinks, for quadrature."""
    if kind == "relu":
        return (t > (low or 0.0) if high is None else t < high) * 1.0
    if kind in ("leaky_relu", "prelu"):
        return np.where(t > 0, 1.0, slope)
    if kind == "hardtanh":
        return ((t > low) & (t < high)) * 1.0
    if kind == "abs":
        return np.sign(t)
    if kind in ("hardshrink", "softshrink"):
        return (np.abs(t) > alpha) * 1.0
    if kind == "elu":
        return scale * np.where(t > 0, 1.0, alpha * rate * np.exp(rate * np.minimum(t, 0)))
    raise KeyError(kind)


def gaussian_average(derivative, z, tau, kinks, width=12.0, panels=48, nodes=20):
    """E[derivative(z + tau e)] by composite Gauss-Legendre, cut at the kinks so that every panel is smooth."""
    at, weight = np.polynomial.legendre.leggauss(nodes)
    low, high = z - width * tau, z + width * tau
    cuts = [low, *sorted(k for k in kinks if low < k < high), high]
    total = 0.0
    for left, right in itertools.pairwise(cuts):
        edges = np.linspace(left, right, panels + 1)
        half = (edges[1:] - edges[:-1]) / 2
        t = (edges[1:] + edges[:-1])[:, None] / 2 + half[:, None] * at
        density = np.exp(-(((t - z) / tau) ** 2) / 2) / (tau * math.sqrt(2 * math.pi))
        total += float((half[:, None] * weight * derivative(t) * density).sum())
    return total


def soft(rules, kind, norm=None):
    """The rule of a kind as a `Soft` whose scale is said, or "frozen"; `norm` is the batch norm right before the gate."""
    value = rules[kind]
    if value == FROZEN:
        return FROZEN
    value = value if isinstance(value, Soft) else Soft(value)
    if value.scale == "batch_norm":
        if norm is not None:
            return value
        value = value._replace(scale=None) if value.otherwise is None else value.otherwise
        value = value if isinstance(value, Soft) else Soft(value)
    wide = rules.get("scale", "absolute")
    wide = "sample" if wide == "channel" and kind in ("abs", "max_pool") else wide  # of gates that no one kink opens
    scale = (value.scale or wide) if kind in HOMOGENEOUS else "absolute"
    return value._replace(scale=scale)


def temperature(rules, kind, x, norm=None, **args):
    """The temperature of a gate at x, [B, 1, ...] with one number a sample, or [B, C, 1, ...]; or "frozen"."""
    value = soft(rules, kind, norm)
    if value != FROZEN and value.scale == "batch_norm":
        squares = [float(v + away(kind, m, **args) ** 2) for m, v in zip(norm.mean, norm.variance)]
        taus = [value.tau * math.sqrt((s + sum(squares) / len(squares)) / 2) for s in squares]
        return along(torch.tensor(taus, dtype=torch.float64), x, 1)
    return FROZEN if value == FROZEN else value.tau * unit(away(kind, x, **args), value.scale)


def unit(distance, scale):
    """What a temperature is in units of, sample by sample: 1; the deviation of the distance; or the root of (S + C) / 2, of the
    mean squares of the distance over the sample and over the places of each channel."""
    places = [1] * (distance.dim() - 2)
    per_sample, per_channel = [], []
    for sample in distance:
        mean = sample.sum() / sample.numel()
        square = (sample**2).sum() / sample.numel()
        per_sample.append(
            torch.sqrt(((sample - mean) ** 2).sum() / sample.numel()) if scale == "sample" else torch.ones_like(mean)
        )
        if scale == "channel" and places:
            channels = [(channel**2).sum() / channel.numel() for channel in sample]
            per_channel.append(torch.stack([torch.sqrt((square + channel) / 2) for channel in channels]))
        elif scale == "channel":  # without places the channels are the numbers themselves
            per_sample[-1] = torch.sqrt(square)
    if per_channel:
        return torch.stack(per_channel).reshape(*distance.shape[:2], *places)
    return torch.stack(per_sample).reshape([-1] + [1] * (distance.dim() - 1))


# -- pooling: the matrix [out, in] of one channel, by loops -------------------------------------------------------------------


def pool_length(n, kernel, stride, padding, dilation, ceil_mode):
    span = n + 2 * padding - dilation * (kernel - 1) - 1
    length = (-(-span // stride) if ceil_mode else span // stride) + 1
    if ceil_mode and (length - 1) * stride >= n + padding:  # no window starts in the padding on the right
        length -= 1
    return length


def windows(shape, kernel, stride, padding, dilation, ceil_mode):
    """The output's shape, and for each window the flat indices of its pixels inside the input."""
    axes = range(len(shape))
    out = [pool_length(shape[a], kernel[a], stride[a], padding[a], dilation[a], ceil_mode) for a in axes]
    members = []
    for position in itertools.product(*map(range, out)):
        inside = []
        for offset in itertools.product(*(range(kernel[a]) for a in axes)):
            at = [position[a] * stride[a] - padding[a] + offset[a] * dilation[a] for a in axes]
            if all(0 <= at[a] < shape[a] for a in axes):
                inside.append(int(np.ravel_multi_index(at, shape)))
        members.append(inside)
    return out, members


def pool_matrix(values, members, tau):
    """[out, in] of one flat channel: softmax(window / tau), or the winner with ties split equally."""
    matrix = torch.zeros(len(members), values.numel(), dtype=values.dtype)
    for o, inside in enumerate(members):
        window = values[inside]
        if tau == FROZEN:
            share = (window == window.max()).double()
        else:
            share = torch.exp((window - window.max()) / tau)
        matrix[o, inside] = share / share.sum()
    return matrix


# -- attention: one row of one head at a time ---------------------------------------------------------------------------------


def attention_weights(q, k, scale, mask=None, causal=False, tau=1.0):
    """softmax((q k^T scale + mask) / tau), [B, H, L, S]; a row without any key is 0. Bool masks: True may be attended."""
    batch, heads, rows, _ = q.shape
    group, columns = heads // k.shape[1], k.shape[2]
    mask = None if mask is None else mask.expand(batch, heads, rows, columns)
    weights = q.new_zeros(batch, heads, rows, columns)
    for b, h, i in itertools.product(range(batch), range(heads), range(rows)):
        score = k[b, h // group] @ q[b, h, i] * scale
        for j in range(columns):
            if causal and j > i:
                score[j] = -math.inf
            elif mask is not None and mask.dtype == torch.bool:
                score[j] = score[j] if mask[b, h, i, j] else -math.inf
            elif mask is not None:
                score[j] = score[j] + mask[b, h, i, j]
        if score.max() > -math.inf:
            share = torch.exp((score - score.max()) / tau)
            weights[b, h, i] = share / share.sum()
    return weights


def attention_mix(weights, v):
    batch, heads, rows, _ = weights.shape
    out = v.new_zeros(batch, heads, rows, v.shape[-1])
    for b, h in itertools.product(range(batch), range(heads)):
        out[b, h] = weights[b, h] @ v[b, h // (heads // v.shape[1])]
    return out


def attention_unmix(weights, g, value_heads):
    """The adjoint of attention_mix in v: grouped query heads add up in the value head that they share."""
    batch, heads, _, columns = weights.shape
    out = g.new_zeros(batch, value_heads, columns, g.shape[-1])
    for b, h in itertools.product(range(batch), range(heads)):
        out[b, h // (heads // value_heads)] += weights[b, h].T @ g[b, h]
    return out


# -- layers ---------------------------------------------------------------------------------------------------------------------


class Op:
    """A layer that is linear plus a constant, unless a method says otherwise."""

    def forward(self, x):
        raise NotImplementedError

    def frozen(self, x, t):
        return self.forward(t)

    def back(self, x, v, rules):
        raise NotImplementedError


class Linear(Op):
    def __init__(self, module):
        self.weight, self.bias = double(module.weight), double(module.bias)

    def forward(self, x):
        return x @ self.weight.T + (0 if self.bias is None else self.bias)

    def back(self, x, v, rules):
        return v @ self.weight


class Conv(Op):
    def __init__(self, module):
        self.weight, self.bias = double(module.weight), double(module.bias)
        self.stride, self.padding, self.dilation, self.groups = module.stride, module.padding, module.dilation, module.groups
        axes = self.weight.dim() - 2
        self.conv = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
        self.transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]

    def forward(self, x):
        return self.conv(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def back(self, x, v, rules):
        shape = zip(x.shape[2:], v.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        lost = [n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, k, s, p, d in shape]
        exact = self.transposed(v, self.weight, None, self.stride, self.padding, lost, self.groups, self.dilation)
        kernel = self.weight.shape[2:]
        second = max(s if k > s else 1 for k, s in zip(kernel, self.stride)) == 2  # of places, which kernels that overlap read
        few = self.weight.shape[1] <= 4  # channels that a kernel sees
        return over_grids(exact, kernel, self.stride) if few and second and rules.get("stride", "smooth") else exact


def over_grids(g, kernel, stride):
    """The mean over the grids of a stride, on every axis on which kernels overlap: two means of `stride` neighbours, the first
    of those from stride // 2 before each place on, the second from (stride - 1) // 2, over what there is."""
    for axis, (k, s) in enumerate(zip(kernel, stride, strict=True), start=2):
        if k > s:
            n = g.shape[axis]
            first = means(n + 1 - s % 2, n, s, s // 2)
            g = torch.tensordot(g, means(n, n + 1 - s % 2, s, (s - 1) // 2) @ first, ([axis], [1])).movedim(-1, axis)
    return g


def means(rows, columns, size, before):
    """The matrix of means of `size` neighbours, from `before` places before each row's number on."""
    matrix = torch.zeros(rows, columns).double()
    for row in range(rows):
        inside = [column for column in range(row - before, row - before + size) if 0 <= column < columns]
        matrix[row, inside] = 1 / len(inside)
    return matrix


class ConvTranspose(Op):
    def __init__(self, module):
        self.weight, self.bias = double(module.weight), double(module.bias)
        self.stride, self.padding, self.extra = module.stride, module.padding, module.output_padding

    def forward(self, x):
        return F.conv_transpose2d(x, self.weight, self.bias, self.stride, self.padding, self.extra)

    def back(self, x, v, rules):
        return F.conv2d(v, self.weight, None, self.stride, self.padding)


class RunningNorm(Op):
    """BatchNorm with running statistics: an affine map of each channel."""

    def __init__(self, module):
        rstd = 1 / torch.sqrt(double(module.running_var) + module.eps)
        self.gain = rstd if module.weight is None else double(module.weight) * rstd
        self.mean = torch.zeros_like(rstd) if module.bias is None else double(module.bias)  # over data of its running statistics
        self.variance = self.gain**2 * double(module.running_var)
        self.shift = -self.gain * double(module.running_mean) + self.mean

    def forward(self, x):
        return x * along(self.gain, x, 1) + along(self.shift, x, 1)

    def back(self, x, v, rules):
        return v * along(self.gain, x, 1)


class RunningInstanceNorm(RunningNorm):
    """InstanceNorm with running statistics."""


class Rearrange(Op):
    """A bijection of the entries."""

    def __init__(self, forward, back):
        self.forward = forward
        self.undo = back

    def back(self, x, v, rules):
        return self.undo(v)


def flatten(*shape):
    return Rearrange(lambda x: x.reshape(x.shape[0], -1), lambda v: v.reshape(v.shape[0], *shape))


def permute(*dims):
    return Rearrange(lambda x: x.permute(dims), lambda v: v.permute([dims.index(a) for a in range(len(dims))]))


class Mean(Op):
    def __init__(self, *dims):
        self.dims = dims

    def forward(self, x):
        return x.mean(self.dims)

    def back(self, x, v, rules):
        for dim in sorted(d % x.dim() for d in self.dims):
            v = v.unsqueeze(dim)
        return v.expand_as(x) * (v.numel() / x.numel())


class AvgPool(Op):
    """Without padding."""

    def __init__(self, kernel, stride):
        self.kernel, self.stride = kernel, stride

    def matrix(self, x):
        axes = len(self.kernel)
        out, members = windows(x.shape[2:], self.kernel, self.stride, [0] * axes, [1] * axes, False)
        matrix = torch.zeros(len(members), math.prod(x.shape[2:]), dtype=x.dtype)
        for o, inside in enumerate(members):
            matrix[o, inside] = 1 / len(inside)
        return out, matrix

    def forward(self, x):
        out, matrix = self.matrix(x)
        return (x.flatten(2) @ matrix.T).reshape(*x.shape[:2], *out)

    def back(self, x, v, rules):
        return (v.flatten(2) @ self.matrix(x)[1]).reshape(x.shape)


class Gate(Op):
    """A pointwise gate. `forward` is the gain times z, plus the constant, as the affine view says."""

    def __init__(self, kind, **args):
        self.kind, self.args = kind, args

    def constant(self, z):
        args = self.args
        if self.kind in ("relu", "hardtanh"):
            low, high = args.get("low"), args.get("high")
            below = 0 if low is None else low * (z < low).to(z)
            return torch.zeros_like(z) + below + (0 if high is None else high * (z > high).to(z))
        if self.kind == "softshrink":
            return -args["alpha"] * torch.sign(z) * (z.abs() > args["alpha"]).to(z)
        if self.kind == "elu":  # the tangent of alpha (exp(rate z) - 1)
            alpha, scale, rate = args.get("alpha", 1.0), args.get("scale", 1.0), args.get("rate", 1.0)
            low = z.clamp(max=0)
            return scale * alpha * (torch.expm1(rate * low) - rate * low * torch.exp(rate * low))
        return torch.zeros_like(z)

    def forward(self, x):
        return self.frozen(x, x)

    def frozen(self, x, t):
        return frozen_gain(self.kind, x, **self.at(x)) * t + self.constant(x)

    def back(self, x, v, rules, norm=None):
        tau, args = temperature(rules, self.kind, x, norm, **self.args), self.at(x)
        if isinstance(tau, str):
            return v * frozen_gain(self.kind, x, **args)
        margin = soft(rules, self.kind, norm).margin
        return v * soft_gain(self.kind, x, tau, **args, **({"margin": margin} if margin else {}))

    def at(self, x):
        slope = self.args.get("slope")
        return {**self.args, "slope": along(slope, x, 1)} if isinstance(slope, torch.Tensor) else self.args


def joined(ops):
    """A chain in which a gate right behind a batch norm knows it."""
    chain = []
    for op in ops:
        if isinstance(op, Gate) and chain and type(chain[-1]) is RunningNorm:
            op = Normed(chain.pop(), op)
        chain.append(op)
    return chain


class Normed(Op):
    """A batch norm and the gate right behind it."""

    def __init__(self, norm, gate):
        self.norm, self.gate = norm, gate

    def forward(self, x):
        return self.gate.forward(self.norm.forward(x))

    def frozen(self, x, t):
        return self.gate.frozen(self.norm.forward(x), self.norm.forward(t))

    def back(self, x, v, rules):
        return self.norm.back(x, self.gate.back(self.norm.forward(x), v, rules, self.norm), rules)


class Smooth(Op):
    """A function that is no gate and keeps its derivative."""

    def __init__(self, function, derivative):
        self.forward, self.derivative = function, derivative

    def frozen(self, x, t):
        return self.forward(x) + self.derivative(x) * (t - x)

    def back(self, x, v, rules):
        return v * self.derivative(x)


class SoftmaxHead(Op):
    """A softmax that multiplies no values: diag(p) - p p^T."""

    def forward(self, x):
        e = torch.exp(x - x.amax(-1, keepdim=True))
        return e / e.sum(-1, keepdim=True)

    def frozen(self, x, t):
        p = self.forward(x)
        return p + p * (t - x) - p * (p * (t - x)).sum(-1, keepdim=True)

    def back(self, x, v, rules):
        p = self.forward(x)
        return p * (v - (p * v).sum(-1, keepdim=True))


def each_channel(tau, x):
    """The temperature of each channel of each sample."""
    if isinstance(tau, str):
        return [FROZEN] * (x.shape[0] * x.shape[1])
    return tau.flatten(1).expand(x.shape[:2]).flatten().tolist()


class MaxPool(Op):
    def __init__(self, kernel, stride=None, padding=0, dilation=1, ceil_mode=False):
        self.kernel, self.ceil_mode = kernel, ceil_mode
        self.stride = kernel if stride is None else stride
        self.padding = (padding,) * len(kernel) if isinstance(padding, int) else padding
        self.dilation = (dilation,) * len(kernel) if isinstance(dilation, int) else dilation

    def matrices(self, x, tau):
        """The matrices of all channels of all samples, [B * C] of [out, in]."""
        out, members = windows(x.shape[2:], self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)
        taus = each_channel(tau, x)
        return out, [pool_matrix(channel, members, t) for channel, t in zip(x.flatten(2).flatten(0, 1), taus, strict=True)]

    def forward(self, x):
        return self.frozen(x, x)

    def frozen(self, x, t):
        out, matrices = self.matrices(x, FROZEN)
        flat = t.flatten(2).flatten(0, 1)
        return torch.stack([m @ c for m, c in zip(matrices, flat, strict=True)]).reshape(*x.shape[:2], *out)

    def back(self, x, v, rules):
        _, matrices = self.matrices(x, temperature(rules, "max_pool", x))
        flat = v.flatten(2).flatten(0, 1)
        return torch.stack([m.T @ c for m, c in zip(matrices, flat, strict=True)]).reshape(x.shape)


class AdaptiveMaxPool(MaxPool):
    """Window i of m over n pixels: from the floor of i n / m to the ceiling of (i + 1) n / m."""

    def __init__(self, size):
        self.size = size

    def matrices(self, x, tau):
        members = []
        for position in itertools.product(*map(range, self.size)):
            spans = [range(i * n // m, -(-(i + 1) * n // m)) for i, n, m in zip(position, x.shape[2:], self.size, strict=True)]
            members.append([int(np.ravel_multi_index(at, x.shape[2:])) for at in itertools.product(*spans)])
        taus = each_channel(tau, x)
        return self.size, [pool_matrix(c, members, t) for c, t in zip(x.flatten(2).flatten(0, 1), taus, strict=True)]


class FractionalMaxPool(MaxPool):
    """Graham, "Fractional Max-Pooling", arXiv:1412.6071, as PyTorch draws it: with a = (n - k) / (m - 1) and the channel's
    sample s, window i starts at floor((i + s) a) - floor(s a), the last at n - k. A sample is (width, height) or (depth, height,
    width)."""

    def __init__(self, kernel, size, samples):
        self.kernel, self.size, self.samples = kernel, size, samples

    def matrices(self, x, tau):
        matrices, axes = [], len(self.kernel)
        taus = each_channel(tau, x)
        for b, c in itertools.product(range(x.shape[0]), range(x.shape[1])):
            drawn = self.samples[b, c].tolist()
            starts = []
            for s, n, m, k in zip(drawn[::-1] if axes == 2 else drawn, x.shape[2:], self.size, self.kernel, strict=True):
                a = (n - k) / (m - 1)
                starts.append([int((i + s) * a) - int(s * a) for i in range(m - 1)] + [n - k])
            members = []
            for begin in itertools.product(*starts):
                spans = [range(i, i + k) for i, k in zip(begin, self.kernel, strict=True)]
                members.append([int(np.ravel_multi_index(at, x.shape[2:])) for at in itertools.product(*spans)])
            matrices.append(pool_matrix(x[b, c].flatten(), members, taus[b * x.shape[1] + c]))
        return self.size, matrices


class Amax(Op):
    """The maximum over some axes, of which none is the first."""

    def __init__(self, *dims, keepdim=False):
        self.dims, self.keepdim = dims, keepdim

    def shares(self, x, tau):
        moved = x.movedim(self.dims, [*range(-len(self.dims), 0)])
        rows = moved.flatten(-len(self.dims))
        best = rows.max(-1, keepdim=True).values
        if isinstance(tau, str):
            share = (rows == best).to(x)
        else:
            taus = tau.expand(x.shape).movedim(self.dims, [*range(-len(self.dims), 0)]).flatten(-len(self.dims))
            share = torch.exp((rows - best) / taus)
        share = (share / share.sum(-1, keepdim=True)).reshape(moved.shape)
        return share.movedim([*range(-len(self.dims), 0)], self.dims)

    def forward(self, x):
        return self.frozen(x, x)

    def frozen(self, x, t):
        return (self.shares(x, FROZEN) * t).sum(self.dims, keepdim=self.keepdim)

    def back(self, x, v, rules):
        for dim in [] if self.keepdim else sorted(d % x.dim() for d in self.dims):
            v = v.unsqueeze(dim)
        return self.shares(x, temperature(rules, "max_pool", x)) * v


class Amin(Amax):
    """The minimum over some axes: where what is negated is highest."""

    def shares(self, x, tau):
        return super().shares(-x, tau)


class Normalise(Op):
    """x over its own p-norm along one axis, the norm a constant."""

    def __init__(self, p, dim, eps=0.0):
        self.p, self.dim, self.eps = p, dim, eps

    def gain(self, x):
        return 1 / ((x.abs() ** self.p).sum(self.dim, keepdim=True) ** (1 / self.p)).clamp(min=self.eps)

    def forward(self, x):
        return x * self.gain(x)

    def frozen(self, x, t):
        return t * self.gain(x)

    def back(self, x, v, rules):
        return v * self.gain(x)


class Norm(Op):
    """gain * (x - mean) * rstd + shift, mean and rstd constants. A subclass says over which entries they are taken."""

    centred = True

    def __init__(self, module):
        self.module, self.eps = module, module.eps
        self.gain = 1.0 if module.weight is None else double(module.weight)
        self.shift = 0.0 if getattr(module, "bias", None) is None else double(module.bias)

    def pool(self, x):
        """x with the entries that share statistics on the last axis."""
        raise NotImplementedError

    def unpool(self, statistic, x):
        raise NotImplementedError

    def affine(self, x):
        """What gain and shift look like beside x."""
        return tuple(along(p, x, 1) if isinstance(p, torch.Tensor) else p for p in (self.gain, self.shift))

    def statistics(self, x):
        rows = self.pool(x)
        mean = rows.sum(-1) / rows.shape[-1] if self.centred else torch.zeros_like(rows[..., 0])
        square = ((rows - mean[..., None]) ** 2).sum(-1) / rows.shape[-1]
        return self.unpool(mean, x), self.unpool(1 / torch.sqrt(square + self.eps), x)

    def forward(self, x):
        return self.frozen(x, x)

    def frozen(self, x, t):
        (mean, rstd), (gain, shift) = self.statistics(x), self.affine(x)
        return gain * rstd * t + (shift - gain * rstd * mean)

    def back(self, x, v, rules):
        return v * self.affine(x)[0] * self.statistics(x)[1]


class LayerNorm(Norm):
    def pool(self, x):
        return x.flatten(-len(self.module.normalized_shape))

    def unpool(self, statistic, x):
        return statistic.reshape(*statistic.shape, *[1] * (x.dim() - statistic.dim()))

    def affine(self, x):
        return self.gain, self.shift


class RMSNorm(LayerNorm):
    centred = False

    def __init__(self, module):
        super().__init__(module)
        self.eps = torch.finfo(torch.float64).eps if module.eps is None else module.eps


class GroupNorm(Norm):
    def pool(self, x):
        return x.reshape(x.shape[0], self.module.num_groups, -1)

    def unpool(self, statistic, x):
        channels = statistic.repeat_interleave(x.shape[1] // self.module.num_groups, 1)
        return channels.reshape(*channels.shape, *[1] * (x.dim() - 2))


class InstanceNorm(Norm):
    def pool(self, x):
        return x.flatten(2)

    def unpool(self, statistic, x):
        return statistic.reshape(*statistic.shape, *[1] * (x.dim() - 2))


class BatchStatNorm(Norm):
    """BatchNorm without running statistics: those of the batch, frozen."""

    def pool(self, x):
        return x.transpose(0, 1).flatten(1)

    def unpool(self, statistic, x):
        return along(statistic, x, 1)


class LocalResponseNorm(Op):
    """x / (k + alpha * mean of the squares of `size` neighbouring channels)^beta, the denominator frozen."""

    def __init__(self, size, alpha, beta, k):
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def gain(self, x):
        total = torch.zeros_like(x)
        for c in range(x.shape[1]):
            for other in range(c - self.size // 2, c + (self.size - 1) // 2 + 1):
                if 0 <= other < x.shape[1]:
                    total[:, c] += x[:, other] ** 2
        return (self.k + self.alpha * total / self.size) ** -self.beta

    def forward(self, x):
        return x * self.gain(x)

    def frozen(self, x, t):
        return t * self.gain(x)

    def back(self, x, v, rules):
        return v * self.gain(x)


class Attention(Op):
    """Projections, heads, softmax(q k^T scale + mask) v, heads merged, output projection.

    The input is one tensor (self-attention) or a pair (queries from the first, keys and values from the second). `extra` are
    keys and values that belong to no token, pairs of [width] vectors, appended after the projection.
    """

    def __init__(self, q, k, v, out, heads, kv_heads=None, scale=None, mask=None, causal=False, extra=()):
        self.q, self.k, self.v, self.out = q, k, v, out
        self.heads, self.kv_heads, self.scale = heads, kv_heads or heads, scale
        self.mask, self.causal, self.extra = mask, causal, extra

    @staticmethod
    def split(t, heads):
        return torch.stack(t.chunk(heads, -1), 1)

    @staticmethod
    def merge(t):
        return torch.cat(t.unbind(1), -1)

    def sources(self, x):
        return x if isinstance(x, tuple) else (x, x)

    def weights(self, x, tau):
        query, memory = self.sources(x)
        keys = self.with_extra(self.k.forward(memory), 0)
        q, k = self.split(self.q.forward(query), self.heads), self.split(keys, self.kv_heads)
        scale = 1 / math.sqrt(q.shape[-1]) if self.scale is None else self.scale
        mask = None if self.mask is None else double(self.mask)
        if mask is not None and self.extra:
            mask = F.pad(mask, (0, len(self.extra)), value=True if mask.dtype == torch.bool else 0.0)
        return attention_weights(q, k, scale, mask, self.causal, 1.0 if tau == FROZEN else tau)

    def with_extra(self, tokens, which):
        for pair in self.extra:
            tokens = torch.cat([tokens, pair[which].expand(tokens.shape[0], 1, -1)], 1)
        return tokens

    def forward(self, x):
        return self.frozen(x, x)

    def frozen(self, x, t):
        values = self.with_extra(self.v.forward(self.sources(t)[1]), 1)
        mixed = attention_mix(self.weights(x, 1.0), self.split(values, self.kv_heads))
        return self.out.forward(self.merge(mixed))

    def back(self, x, v, rules):
        query, memory = self.sources(x)
        g = self.split(self.out.back(None, v, rules), self.heads)
        values = attention_unmix(self.weights(x, rules["attention"]), g, self.kv_heads)
        cotangent = self.v.back(memory, self.merge(values)[:, : memory.shape[1]], rules)
        return (torch.zeros_like(query), cotangent) if isinstance(x, tuple) else cotangent


class Matrix(Op):
    """y = x W^T + b from tensors."""

    def __init__(self, weight, bias=None):
        self.weight, self.bias = double(weight), double(bias)

    forward, back = Linear.forward, Linear.back


def multihead(module, mask=None, causal=False):
    """`nn.MultiheadAttention` by its parameters. `mask` is broadcastable to [B, H, L, S], True where it may attend."""
    width = module.embed_dim
    if module.in_proj_weight is None:
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    else:
        weights = module.in_proj_weight.split(width)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.split(width)
    q, k, v = (Matrix(w, b) for w, b in zip(weights, biases, strict=True))
    extra = []
    if module.bias_k is not None:
        extra.append((double(module.bias_k).flatten(), double(module.bias_v).flatten()))
    if module.add_zero_attn:
        extra.append((torch.zeros(width).double(), torch.zeros(width).double()))
    return Attention(q, k, v, Linear(module.out_proj), module.num_heads, mask=mask, causal=causal, extra=tuple(extra))


class Parallel(Op):
    """Branches that read the same input; their outputs add up (`join=None`) or are joined along an axis. [] is a skip."""

    def __init__(self, *branches, join=None):
        self.branches, self.join = branches, join

    def forward(self, x):
        return self.combine([forward(branch, x) for branch in self.branches])

    def frozen(self, x, t):
        return self.combine([frozen(branch, x, t) for branch in self.branches])

    def combine(self, parts):
        return sum(parts[1:], parts[0]) if self.join is None else torch.cat(parts, self.join)

    def back(self, x, v, rules):
        if self.join is None:
            shares = [v] * len(self.branches)
        else:
            shares = v.split([forward(branch, x).shape[self.join] for branch in self.branches], self.join)
        return sum(pull(branch, x, share, rules) for branch, share in zip(self.branches, shares, strict=True))


class Product(Op):
    """left(x) * right(x), by the product rule, or with `right`, a gate, as a constant."""

    def __init__(self, left, right):
        self.left, self.right = left, right

    def forward(self, x):
        return forward(self.left, x) * forward(self.right, x)

    def back(self, x, v, rules):
        left, right = forward(self.left, x), forward(self.right, x)
        through_left = pull(self.left, x, (v * right).sum_to_size(left.shape), rules)
        if rules.get("product") == FROZEN:
            return through_left
        return through_left + pull(self.right, x, (v * left).sum_to_size(right.shape), rules)


def along(p, x, axis):
    """A vector beside x, along one of its axes; a single number fits everywhere."""
    return p.reshape([-1 if a == axis else 1 for a in range(x.dim())])


# -- networks -------------------------------------------------------------------------------------------------------------------


def trace(ops, x):
    """The input and the output of every op."""
    points = [x]
    for op in ops:
        points.append(op.forward(points[-1]))
    return points


def forward(ops, x):
    return trace(ops, x)[-1]


def frozen(ops, x, t):
    for op, point in zip(ops, trace(ops, x), strict=False):
        t = op.frozen(point, t)
    return t


def pull(ops, x, u, rules):
    """The pullback of u at x: the adjoints from the last op to the first."""
    for op, point in zip(reversed(ops), reversed(trace(ops, x)[:-1]), strict=True):
        u = op.back(point, u, rules)
    return u
