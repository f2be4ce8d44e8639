"""Random programs that move axes, and the soft pullback of one sample of each by its definition.

A program takes [B, ...] to [B, 3]. It goes through layouts in which the sample is on any axis, alone or folded with others, and
never lets one sample touch another. Each step knows where the sample is by construction: an axis is a tuple of factors, such as
`("B",)`, `(5,)`, or `(3, "B")` for three rows of all samples one after the other.
"""

import math
import random

import torch
import torch.nn.functional as F
from torch import nn

SIZES, MOST = (2, 3, 4, 5, 6), 240  # of axes; of the numbers of a sample


def noise(g, *shape):
    return torch.randn(shape, generator=g, dtype=torch.float64)


# -- gates, as a model spells them, and with their soft adjoint where the tensor is all one sample -------------------------------


def straight(z, value, gain):
    """`value` forward, and `gain` times the cotangent back to `z`."""
    return value.detach() + (z - z.detach()) * gain.detach()


class Constant(ValueError):
    """A sample whose pre-activation is one number everywhere has no scale."""


def standardised(z):
    """`z` in units of its deviation, which is that of the whole sample."""
    deviation = z.detach().std(unbiased=False)
    if deviation <= 1e-9 * z.detach().abs().max():
        raise Constant
    return z.detach() / deviation


def openness(z):
    return 0.5 * torch.erfc(-standardised(z) / math.sqrt(2))


def soft_largest(z, axis):
    share = torch.softmax(standardised(z), axis)
    return z.amax(axis).detach() + ((z - z.detach()) * share).sum(axis)


def soft_pooled(z):
    windows, share = z.unfold(-1, 2, 2), torch.softmax(standardised(z).unfold(-1, 2, 2), -1)
    return windows.amax(-1).detach() + ((windows - windows.detach()) * share).sum(-1)


def frozen_norm(z, weight, bias):
    rstd = (z.detach().var(-1, keepdim=True, unbiased=False) + 1e-5).rsqrt()
    return straight(z, F.layer_norm(z, z.shape[-1:], weight, bias), weight * rstd)


POINTWISE = {  # spellings; the soft gate
    "relu": (
        [torch.relu, F.relu, lambda h: h.relu()],
        lambda z: straight(z, F.relu(z), openness(z)),
    ),
    "leaky_relu": (
        [lambda h: F.leaky_relu(h, 0.1), lambda h: F.leaky_relu(h, negative_slope=0.1)],
        lambda z: straight(z, F.leaky_relu(z, 0.1), 0.1 + 0.9 * openness(z)),
    ),
    "abs": ([torch.abs, lambda h: h.abs()], lambda z: straight(z, z.abs(), 2 * openness(z) - 1)),
}


class Program(nn.Module):
    """Steps, each a function of the program, the tensor so far and the input; `soft` gates are those of one sample."""

    def __init__(self, steps, tensors, modules):
        super().__init__()
        self.steps, self.w, self.m = steps, nn.ParameterList(tensors), nn.ModuleList(modules)
        self.soft = False

    def forward(self, x):
        h = x
        for _, step in self.steps:
            h = step(self, h, x)
        return h

    def __str__(self):
        return " > ".join(name for name, _ in self.steps)

    def map_of_one(self, sample, target):
        """The soft pullback of a batch of one sample, by the definition of its gates.

        Raises:
            Constant: a gate has no scale there.
        """
        leaf = sample.clone().requires_grad_()
        self.soft = True
        try:
            return torch.autograd.grad(self(leaf)[:, target].sum(), leaf)[0]
        finally:
            self.soft = False


class Writer:
    """Writes one program from a seed: keeps the axes and adds steps that fit them."""

    def __init__(self, seed):
        self.r, self.g = random.Random(seed), torch.Generator().manual_seed(seed)
        self.steps, self.tensors, self.modules = [], [], []
        self.shape = tuple(self.r.choice(SIZES) for _ in range(self.r.choice((1, 2, 2, 3))))
        self.axes = [("B",), *((n,) for n in self.shape)]
        self.gates = 0

    # helpers

    def add(self, name, step, axes):
        self.steps.append((name, step))
        self.axes = [merged(axis) for axis in axes]

    def weight(self, *shape):
        self.tensors.append(noise(self.g, *shape) / max(1, shape[-1]) ** 0.5)
        return len(self.tensors) - 1

    def module(self, module):
        for p in module.parameters():
            p.data = noise(self.g, *p.shape) / 2
        self.modules.append(module.double())
        return len(self.modules) - 1

    def plain(self, least=1):
        """The axes without the sample."""
        return [i for i, axis in enumerate(self.axes) if "B" not in axis and axis[0] >= least]

    @property
    def place(self):
        return next(i for i, axis in enumerate(self.axes) if "B" in axis)

    @property
    def numbers(self):
        return math.prod(f for axis in self.axes for f in axis if f != "B")

    def dims(self, axes=None):
        """Sizes to reshape to, -1 where the sample is."""
        return [-1 if "B" in axis else axis[0] for axis in map(merged, axes or self.axes)]

    # axes moved

    def transpose(self):
        i, j = self.r.sample(range(len(self.axes)), 2)
        axes = list(self.axes)
        axes[i], axes[j] = axes[j], axes[i]
        n = len(axes)
        form = self.r.choice([
            lambda m, h, x: h.transpose(i, j), lambda m, h, x: torch.swapaxes(h, i - n, j),
            lambda m, h, x: h.permute([j if k == i else i if k == j else k for k in range(n)]),
        ])  # fmt: skip
        self.add(f"transpose({i},{j})", form, axes)

    def permute(self):
        order = self.r.sample(range(len(self.axes)), len(self.axes))
        self.add(f"permute{order}", lambda m, h, x: h.permute(*order), [self.axes[i] for i in order])

    def movedim(self):
        i, j = self.r.randrange(len(self.axes)), self.r.randrange(len(self.axes))
        axes = list(self.axes)
        axes.insert(j, axes.pop(i))
        self.add(f"movedim({i},{j})", lambda m, h, x: h.movedim(i, j), axes)

    def last_two(self):
        axes = [*self.axes[:-2], self.axes[-1], self.axes[-2]]
        forms = [lambda m, h, x: h.mT, lambda m, h, x: h.transpose(-1, -2)]
        if len(axes) == 2:
            forms += [lambda m, h, x: h.T, lambda m, h, x: h.t()]
        self.add("mT", self.r.choice(forms), axes)

    # axes folded and unfolded

    def flatten(self):
        if len(self.axes) > 2:
            i = self.r.randrange(len(self.axes) - 1)
            axes = [*self.axes[:i], (*self.axes[i], *self.axes[i + 1]), *self.axes[i + 2 :]]
            dims = self.dims(axes)
            form = self.r.choice([lambda m, h, x: h.flatten(i, i + 1), lambda m, h, x: h.reshape(*dims)])
            self.add(f"flatten({i},{i + 1})", form, axes)

    def rows(self):
        """`x.reshape(-1, C)`, as layers over points, frames or tokens begin."""
        if len(self.axes) > 2 and self.place != len(self.axes) - 1:
            axes = [tuple(f for axis in self.axes[:-1] for f in axis), self.axes[-1]]
            (last,) = self.axes[-1]
            form = self.r.choice([
                lambda m, h, x: h.reshape(-1, last), lambda m, h, x: h.contiguous().view(-1, last),
                lambda m, h, x: h.reshape(-1, h.shape[-1]), lambda m, h, x: h.flatten(0, -2),
            ])  # fmt: skip
            self.add("rows", form, axes)

    def unfold(self):
        i = self.place
        factors = self.axes[i]
        if len(factors) > 1 and len(self.axes) < 5:
            sizes = [-1 if f == "B" else f for f in factors]
            axes = [*self.axes[:i], *((f,) for f in factors), *self.axes[i + 1 :]]
            forms = [lambda m, h, x: h.unflatten(i, sizes)]
            if factors[0] == "B" and i == 0:
                dims = self.dims(axes)[1:]
                forms += [lambda m, h, x: h.reshape(x.size(0), *dims), lambda m, h, x: h.contiguous().view(x.shape[0], *dims)]
            self.add(f"unfold({i})", self.r.choice(forms), axes)

    def split(self):
        """An axis of 4 or 6 into two."""
        even = [i for i in self.plain(4) if self.axes[i][0] % 2 == 0]
        if even and len(self.axes) < 4:
            i = self.r.choice(even)
            sizes = (2, self.axes[i][0] // 2) if self.r.random() < 0.5 else (self.axes[i][0] // 2, 2)
            axes = [*self.axes[:i], (sizes[0],), (sizes[1],), *self.axes[i + 1 :]]
            self.add(f"split({i},{sizes})", lambda m, h, x: h.unflatten(i, sizes), axes)

    def unsqueeze(self):
        if len(self.axes) < 4:
            i = self.r.randrange(len(self.axes) + 1)
            forms = [lambda m, h, x: h.unsqueeze(i)]
            if i == 0:
                forms.append(lambda m, h, x: h[None])
            if i == 1:
                forms.append(lambda m, h, x: h[:, None])
            self.add(f"unsqueeze({i})", self.r.choice(forms), [*self.axes[:i], (1,), *self.axes[i:]])

    def squeeze(self):
        ones = [i for i in self.plain() if self.axes[i] == (1,)]
        if ones and len(self.axes) > 2:
            i = self.r.choice(ones)
            self.add(f"squeeze({i})", lambda m, h, x: h.squeeze(i), [a for k, a in enumerate(self.axes) if k != i])

    # more and fewer numbers

    def ensemble(self):
        """Members before everything else, each with a number of its own, [K, 1, ...]."""
        k, n = self.r.choice((2, 3, 4)), len(self.axes)
        if n < 4 and self.numbers * k <= MOST:
            w = self.weight(k, *[1] * n)
            form = self.r.choice([
                lambda m, h, x: h * m.w[w], lambda m, h, x: h + m.w[w],
                lambda m, h, x: h.expand(k, *[-1] * n) * m.w[w], lambda m, h, x: h.repeat(k, *[1] * n) - m.w[w],
                lambda m, h, x: h[None].repeat_interleave(k, 0) + m.w[w],
            ])  # fmt: skip
            self.add(f"ensemble({k})", form, [(k,), *self.axes])

    def linear(self):
        if self.place != len(self.axes) - 1:
            (n,), k = self.axes[-1], self.r.choice(SIZES)
            if self.numbers // n * k <= MOST:
                w, b = self.weight(k, n), self.weight(k)
                form = self.r.choice([lambda m, h, x: F.linear(h, m.w[w], m.w[b]), lambda m, h, x: h @ m.w[w].t() + m.w[b]])
                self.add(f"linear({n},{k})", form, [*self.axes[:-1], (k,)])

    def matmul_of_an_ensemble(self):
        if len(self.axes) == 2 and self.place == 0:
            (n,), k, j = self.axes[1], self.r.choice((2, 3)), self.r.choice(SIZES)
            if self.numbers // n * k * j <= MOST:
                w = self.weight(k, n, j)
                self.add(f"matmul({k},{n},{j})", lambda m, h, x: h @ m.w[w], [(k,), self.axes[0], (j,)])

    def matmul_from_the_left(self):
        if self.place != len(self.axes) - 2:
            (n,), k = self.axes[-2], self.r.choice(SIZES)
            if self.numbers // n * k <= MOST:
                w = self.weight(k, n)
                self.add(f"left({k},{n})", lambda m, h, x: torch.matmul(m.w[w], h), [*self.axes[:-2], (k,), self.axes[-1]])

    def einsum(self):
        if self.plain():
            i, k = self.r.choice(self.plain()), self.r.choice(SIZES)
            (n,) = self.axes[i]
            if self.numbers // n * k <= MOST:
                letters = "abcde"[: len(self.axes)]
                axes = {**dict(zip(letters, self.axes)), "z": (k,)}
                out = self.r.sample(sorted(set(axes) - {letters[i]}), len(self.axes))
                w, equation = self.weight(k, n), f"{letters},z{letters[i]}->{''.join(out)}"
                self.add(f"einsum({equation})", lambda m, h, x: torch.einsum(equation, h, m.w[w]), [axes[c] for c in out])

    def joined(self):
        if self.plain() and self.numbers * 2 <= MOST:
            i = self.r.choice(self.plain())
            if self.r.random() < 0.5 or len(self.axes) > 3:
                axes = [(2 * a[0],) if k == i else a for k, a in enumerate(self.axes)]
                self.add(f"cat({i})", lambda m, h, x: torch.cat([h, 0.5 * h - 1], i), axes)
            else:
                axes = [*self.axes[:i], (2,), *self.axes[i:]]
                self.add(f"stack({i})", lambda m, h, x: torch.stack([h, 0.5 - h], i), axes)

    def chunked(self):
        even = [i for i in self.plain(2) if self.axes[i][0] % 2 == 0]
        if even and self.numbers >= 8:
            i = self.r.choice(even)

            def halves(m, h, x):
                a, b = h.chunk(2, i)
                return a - 0.5 * b

            self.add(f"chunk({i})", halves, [(a[0] // 2,) if k == i else a for k, a in enumerate(self.axes)])

    def unbound(self):
        if self.plain(2):
            i, j = self.r.choice(self.plain(2)), self.r.randrange(len(self.axes))
            axes = list(self.axes)
            axes.insert(j, axes.pop(i))

            def elsewhere(m, h, x):
                return torch.stack(h.unbind(i)[::-1], j)

            self.add(f"unbind({i},{j})", elsewhere, axes)

    def item(self):
        if self.plain(2) and len(self.axes) > 2:
            i = self.r.choice(self.plain(2))
            k = self.r.choice((0, -1, 1))
            if self.numbers // self.axes[i][0] >= 4:
                index = (*[slice(None)] * i, k)
                form = self.r.choice([lambda m, h, x: h[index], lambda m, h, x: h.select(i, k)])
                self.add(f"item({i},{k})", form, [a for n, a in enumerate(self.axes) if n != i])

    def sliced(self):
        if self.plain(3):
            i = self.r.choice(self.plain(3))
            index = (*[slice(None)] * i, slice(1, None))
            axes = [(a[0] - 1,) if k == i else a for k, a in enumerate(self.axes)]
            self.add(f"slice({i})", lambda m, h, x: h[index], axes)

    def rolled(self):
        if self.plain(2):
            i = self.r.choice(self.plain(2))
            form = self.r.choice([lambda m, h, x: torch.roll(h, 1, i), lambda m, h, x: h.flip(i)])
            self.add(f"roll({i})", form, self.axes)

    def reduced(self):
        if self.plain(2) and len(self.axes) > 2:
            i = self.r.choice(self.plain(2))
            if self.numbers // self.axes[i][0] >= 4:
                form = self.r.choice([lambda m, h, x: h.sum(i), lambda m, h, x: h.mean(i), lambda m, h, x: h.mean((i,))])
                self.add(f"sum({i})", form, [a for k, a in enumerate(self.axes) if k != i])

    def norm(self):
        if self.place != len(self.axes) - 1 and self.axes[-1][0] > 2:
            (n,) = self.axes[-1]
            w, b = self.weight(n), self.weight(n)

            def normed(m, h, x):
                return frozen_norm(h, m.w[w], m.w[b]) if m.soft else F.layer_norm(h, (n,), m.w[w], m.w[b])

            self.add(f"norm({n})", normed, self.axes)

    def recurrent(self):
        """A GRU or LSTM over axis 1 or 0, its outputs or its last state, [layers, samples, features]."""
        if len(self.axes) == 3 and self.place != 2 and self.numbers <= 60:
            first = self.place == 0
            cell = self.r.choice((nn.GRU, nn.LSTM))
            (n,), layers = self.axes[2], self.r.choice((1, 2))
            i = self.module(cell(n, 4, layers, batch_first=first))
            if self.r.random() < 0.5:
                self.add(f"{cell.__name__} outputs", lambda m, h, x: m.m[i](h)[0], [*self.axes[:2], (4,)])
            else:
                state = (lambda m, h, x: m.m[i](h)[1]) if cell is nn.GRU else (lambda m, h, x: m.m[i](h)[1][0])
                self.add(f"{cell.__name__} state", state, [(layers,), self.axes[self.place], (4,)])

    # gates

    def gate(self):
        kind = self.r.choice(("relu", "relu", "leaky_relu", "abs", "largest", "pool"))
        if kind in POINTWISE:
            spellings, soft = POINTWISE[kind]
            spelling = self.r.choice(spellings)
            self.add(kind, lambda m, h, x: soft(h) if m.soft else spelling(h), self.axes)
        elif kind == "largest" and self.plain(2) and len(self.axes) > 2:
            i = self.r.choice(self.plain(2))
            if self.numbers // self.axes[i][0] < 4:
                return
            form = self.r.choice([lambda h: h.amax(i), lambda h: torch.max(h, i).values, lambda h: h.max(i)[0]])
            axes = [a for k, a in enumerate(self.axes) if k != i]
            self.add(f"max({i})", lambda m, h, x: soft_largest(h, i) if m.soft else form(h), axes)
        elif kind == "pool" and len(self.axes) == 3 and self.place != 2 and self.axes[2][0] >= 2 and self.numbers >= 8:
            axes = [*self.axes[:2], (self.axes[2][0] // 2,)]
            self.add("max_pool1d", lambda m, h, x: soft_pooled(h) if m.soft else F.max_pool1d(h, 2), axes)
        else:
            return
        self.gates += 1

    def program(self, least=6, most=11):
        moves = [self.transpose, self.permute, self.movedim, self.last_two]
        folds = [self.flatten, self.rows, self.unfold, self.split, self.unsqueeze, self.squeeze]
        others = [self.ensemble, self.linear, self.linear, self.matmul_of_an_ensemble, self.matmul_from_the_left, self.einsum,
                  self.joined, self.chunked, self.unbound, self.item, self.sliced, self.rolled, self.reduced, self.norm,
                  self.recurrent, self.recurrent]  # fmt: skip
        self.linear()
        while len(self.steps) < least or (self.gates < 2 and len(self.steps) < 3 * most):
            self.r.choice(self.r.choice((moves, folds, others, [self.gate])))()
        self.head()
        return Program(self.steps, self.tensors, self.modules)

    def head(self):
        while len(self.axes[self.place]) > 1:
            i, factors = self.place, self.axes[self.place]
            sizes = [-1 if f == "B" else f for f in factors]
            self.add(f"unfold({i})", lambda m, h, x, i=i, sizes=sizes: h.unflatten(i, sizes),
                     [*self.axes[:i], *((f,) for f in factors), *self.axes[i + 1 :]])  # fmt: skip
        i, n, w = self.place, self.numbers, self.weight(3, self.numbers)
        self.add("head", lambda m, h, x: F.linear(h.movedim(i, 0).reshape(-1, n), m.w[w]), [("B",), (3,)])


def merged(axis):
    """An axis with neighbouring sizes multiplied: `(2, 3, "B")` is `(6, "B")`."""
    out = []
    for factor in axis:
        if out and factor != "B" and out[-1] != "B":
            out[-1] *= factor
        else:
            out.append(factor)
    return tuple(f for f in out if f != 1 or len(out) == 1) or (1,)


def written(seed):
    """The program of a seed, and a batch of four samples of very different size for it."""
    writer = Writer(seed)
    program = writer.program()
    x = noise(writer.g, 4, *writer.shape) * torch.tensor([1.0, 0.1, 10.0, 100.0]).view(4, *[1] * len(writer.shape)).double()
    return program.eval(), x
