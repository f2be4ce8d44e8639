"""What is recognised is what it is taken for: random expressions, most of them near a gate, a norm or a softmax but for a
number."""

import random
import re

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from sp_fx.analysis.facts import Facts
from sp_fx.analysis.written.gates import Written
from sp_fx.analysis.written.norms import Statistic
from sp_fx.analysis.written.softmax import Softmax
from sp_fx.capture.symbolic import trace
from sp_fx.rewrite.prepared.out_of_place import normalise

# -- gates

TEMPLATES = [
    "h * torch.sigmoid({a} * h + {b})", "h * torch.sigmoid({a} * h) + {b}", "h / ({a} + torch.exp(-{c} * h))",
    "torch.where(h > {b}, h, {d} * h)", "torch.where({c} * h > {b}, h, 0.0 * h)",
    "torch.where(h / {c} > {b}, {a} * h, {d} * h)", "h * ({c} * h + {e}).clamp({b}, {a})", "h * F.relu6(h + {f}) / {g}",
    "F.relu6({c} * h + {f}) / {g}", "(h / {g} + {e}).clamp({b}, {a})", "F.relu(h - {b}) - {d} * F.relu(-h - {b})",
    "(h + (h - {b}).abs()) / {i}", "0.5 * h * ({a} + torch.tanh({j} * (h + {k} * h ** 3)))",
    "{e} * h * (1 + torch.erf(h / {l} + {b}))", "h * torch.special.ndtr({a} * h + {b})",
    "h * torch.tanh(F.softplus({a} * h + {b}))", "h * torch.tanh(torch.log({a} + h.exp()))", "torch.maximum(h, {d} * h + {b})",
    "h.clamp(min={b}) + {d} * h.clamp(max={b})", "torch.where(h > {b}, h, {a} * (h.exp() - {a}))",
    "h.clamp(min={b}) + {a} * torch.expm1({c} * h.clamp(max=0))", "h * h.sign() + {b}", "h * (h > {b})", "h * (h >= 0) * {a}",
    "h.masked_fill(h < {b}, {b})", "h - h.clamp(-{m}, {m}) * {a}", "h.sign() * F.relu(h.abs() - {m})", "h / ({a} + h.abs())",
    "F.relu(h) * F.relu({a} * h + {b})", "F.relu(h + {b}) ** 2", "F.relu(h) - F.relu({a} * h - {g})",
    "h * torch.sigmoid({n} * h - {f})", "torch.minimum(torch.maximum(h, {b} * torch.ones_like(h)), {g} + torch.zeros_like(h))",
    "h * F.hardsigmoid({a} * h + {b})", "torch.log({a} + torch.exp({c} * h))", "1 / ({a} + torch.exp({c} * -h))",
    "{e} * (torch.tanh(h / {i}) + {a})", "F.relu(h) + torch.log1p({a} * torch.exp(-h.abs()))", "2 * F.relu({a} * h) - h",
    "(h - {b}) * torch.sigmoid(h)", "torch.stack([h, {b} + torch.zeros_like(h)], -1).amax(-1)",
    "h * torch.heaviside({a} * h + {b}, torch.zeros((), dtype=h.dtype))", "torch.where(h.abs() > {m}, h, {b} * h)",
    "h * torch.where(h > {b}, {a}, {d})", "h + torch.sin({b} * h)", "h * torch.atan({a} * h)",
    "{c} * h * torch.sigmoid({a} * h)", "h * ({a} + torch.sigmoid(h))", "{c} * h + {a} * h * torch.sigmoid({c} * h)",
    "h * ({a} + torch.erf(h / {l}))", "torch.where(h > {b}, {c} * h, {d} * h)", "{a} * h + {c} * h.abs() + {b}",
    "{c} * torch.minimum(h, {b} * torch.ones_like(h))", "{e} * h * ({a} + torch.tanh({i} * h))",
]  # fmt: skip
NUMBERS = {
    "a": [1, 1, 1, 1.0, 0.999, 1.01, 2, 0.5], "b": [0, 0, 0, 0.0, 1e-3, -1e-3, 0.25, -0.5, 1e-2],
    "c": [1, 1, 2, 10, 0.5, 1.702, 0.99], "d": [0, 0.1, 0.1, 0.2, 1, -0.1, 1.001], "e": [0.5, 0.5, 0.5, 0.501, 0.49, 1],
    "f": [3, 3, 3, 3.01, 2.5, 25], "g": [6, 6, 6, 6.01, 5, 8],
    "i": [2, 2, 2, 2.001, 1], "j": [0.7978845608, 0.7978845608, 0.8, 0.79], "k": [0.044715, 0.044715, 0.0447, 0.05],
    "l": [2**0.5, 2**0.5, 1.4142, 1.5, 1.41], "m": [0.3, 0.5, 0.301, 1], "n": [1, 100, 30, 8],
}  # fmt: skip

REFERENCE = {  # each from its definition
    "relu": lambda z: torch.where(z > 0, z, 0.0),
    "leaky_relu": lambda z, negative_slope: torch.where(z > 0, z, negative_slope * z),
    "elu": lambda z, alpha, output_scale, input_scale: (
        output_scale * torch.where(z > 0, z, alpha * (input_scale * z).clamp(max=0).expm1())
    ),
    "gelu": lambda z, approximate: F.gelu(z, approximate=approximate),
    "silu": lambda z, rate=1.0: z / (1 + torch.exp(-rate * z)),
    "quick_gelu": lambda z, rate: z / (1 + torch.exp(-rate * z)),
    "hardswish": lambda z: z * ((z + 3) / 6).clamp(0, 1),
    "mish": lambda z: z * torch.tanh(torch.logaddexp(z, torch.zeros_like(z))),
    "relu_squared": lambda z: torch.where(z > 0, z * z, 0.0),
    "abs": lambda z: torch.where(z > 0, z, -z),
    "hardsigmoid": lambda z: ((z + 3) / 6).clamp(0, 1),
    "hardtanh": lambda z, low, high: torch.where(z < low, low, torch.where(z > high, high, z)),
    "floor": lambda z, low: torch.where(z < low, low, z),
    "ceiling": lambda z, high: torch.where(z > high, high, z),
    "negative_relu": lambda z: torch.where(z < 0, z, 0.0),
    "softshrink": lambda z, width: torch.where(z > width, z - width, torch.where(z < -width, z + width, 0.0)),
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
    "tanh": lambda z: 2 / (1 + torch.exp(-2 * z)) - 1,
    "softplus": lambda z: torch.logaddexp(z, torch.zeros_like(z)),
    "softsign": lambda z: z / (1 + z.abs()),
    "log_sigmoid": lambda z: -torch.logaddexp(-z, torch.zeros_like(z)),
    "tanhshrink": lambda z: z - torch.tanh(z),
}  # fmt: skip


class Expression(nn.Module):
    def __init__(self, code):
        super().__init__()
        self.function = eval(f"lambda h: {code}")

    def forward(self, h):
        return self.function(h)


def draw(rng):
    """A template with random numbers in it; sometimes one inside another."""
    numbers = {name: rng.choice(choices) for name, choices in NUMBERS.items()}
    code = rng.choice(TEMPLATES).format(**numbers)
    if rng.random() < 0.25:
        a, b = numbers["a"], numbers["b"]
        inner = rng.choice([f"({a} * h + {b})", f"F.relu(h - {b})", "torch.tanh(h)", "(h.abs() + h)"])
        return re.sub(r"\bh\b", inner, code)
    return code


class Values(fx.Interpreter):
    """Keeps what every node is."""

    def __init__(self, modules, graph):
        super().__init__(modules, graph=graph)
        self.values = {}

    def run_node(self, n):
        self.values[n] = super().run_node(n)
        return self.values[n]


def facts_of(model):
    capture = trace(model.eval())
    normalise(capture.modules, capture.graph)
    return Facts(capture)


DENSE = torch.cat([torch.linspace(-30, 30, 30011, dtype=torch.float64),
                   torch.linspace(-0.02, 0.02, 4001, dtype=torch.float64) + 3e-7])  # fmt: skip


def wrong_gates(code):
    """What is wrong of the gates recognised in an expression, and how many were."""
    facts = facts_of(Expression(code))
    run = Values(facts.modules, facts.graph)
    run.run(DENSE)
    wrong, count = [], 0
    for node, gate in facts.patterns.items():
        if isinstance(gate, Written):
            z, y = run.values[gate.source], run.values[node]
            expected = gate.times * REFERENCE[gate.kind](z, **gate.args) + gate.through * z
            error = (y - expected).abs() / (1 + y.abs())
            count += 1
            if not bool((error[y.isfinite()] < 2e-5).all()):
                wrong.append((code, gate.kind, gate.args, float(error.nan_to_num(9).max())))
    return wrong, count


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 12))])
def test_random_expressions_are_the_gates_they_are_taken_for(seed):
    rng, total = random.Random(seed), 0
    for _ in range(400):
        code = draw(rng)
        wrong, count = wrong_gates(code)
        assert not wrong
        total += count
    assert total > 40  # enough of them are recognised


# -- norms

STATISTICS = [
    "h.pow({p}).mean(-1, keepdim=True)", "h.abs().sum(-1, keepdim=True)", "h.norm(dim=-1, keepdim=True)",
    "h.std(-1, keepdim=True)", "h.sum(-1, keepdim=True)", "h.abs().amax(-1, keepdim=True)", "h.amax(-1, keepdim=True)",
    "(h * h).sum(-1, keepdim=True)", "h.var(-1, keepdim=True)", "torch.einsum('bi,bi->b', h, h)[:, None]",
    "(h * h.abs()).sum(-1, keepdim=True)", "h.exp().sum(-1, keepdim=True)", "h.square().amax(-1, keepdim=True)",
    "(h.abs() + {c}).mean(-1, keepdim=True)", "h.norm(p=1, dim=-1, keepdim=True)",
    "(h.norm(dim=-1, keepdim=True) * h.abs().mean(-1, keepdim=True))", "h.abs().mean(-1, keepdim=True).clamp(min={c})",
]  # fmt: skip
WRAPS = [
    "{s}", "({s} + {c}).sqrt()", "({s} + {c}) ** {q}", "{s}.sqrt()", "{c} + {s}", "{s}.square()", "2 * {s}",
    "{s}.clamp_min({c})",
]  # fmt: skip
CLOSERS = [
    "h / ({t})", "h * ({t}).reciprocal()", "h * ({t})", "h * torch.rsqrt({t})", "(h - h.mean(-1, keepdim=True)) / ({t})",
    "1.5 * h / ({t})",
]  # fmt: skip


def draw_norm(rng):
    choices = {"p": [2, 2, 2, 3, 4, 1], "c": [1e-6, 1e-5, 1e-3, 1.0, 2], "q": [0.5, 0.5, -0.5, 2, 0.25]}
    numbers = {name: rng.choice(values) for name, values in choices.items()}
    statistic = rng.choice(STATISTICS).format(**numbers)
    return rng.choice(CLOSERS).format(t=rng.choice(WRAPS).format(s=f"({statistic})", **numbers))


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 12))])
def test_random_statistics_are_the_norms_they_are_taken_for(seed):
    """A norm of a hundred times the signal is the same; that of its negative is its negative."""
    rng, recognised = random.Random(seed), 0
    h = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    for _ in range(150):
        model = Expression(code := draw_norm(rng))
        norms = [p for p in facts_of(model).patterns.values() if isinstance(p, Statistic)]
        if not norms or norms[0].kind == "local_response_norm":
            continue
        recognised += 1
        y = model(h)
        assert torch.allclose(model(100 * h), y, rtol=0.2, atol=1e-9), code  # but for the small number in it
        assert torch.allclose(model(1e6 * h), model(1e5 * h), rtol=1e-4, atol=1e-12), code
        assert torch.allclose(model(-h), -y, rtol=1e-9), code
    assert recognised > 15


# -- softmaxes

SCORES = [
    "h", "({c} * h)", "(h - h.amax({d}, keepdim=True))", "(h - h.mean({d}, keepdim=True))", "(h + {c})", "h.abs()",
]  # fmt: skip
FORMS = [
    "(lambda e: e / e.sum({d}, keepdim=True))({s}.exp())", "(lambda e: e / ({c} + e.sum({d}, keepdim=True)))({s}.exp())",
    "{s}.log_softmax({d}).exp()", "F.softmin({s}, {d})", "({s} - {s}.logsumexp({d}, keepdim=True)).exp()",
    "(lambda e: e / e.sum({o}, keepdim=True))({s}.exp())", "(lambda e: e / e.amax({d}, keepdim=True))({s}.exp())",
    "({s} - {s}.logsumexp({o}, keepdim=True)).exp()", "(lambda e: e * e.sum({d}, keepdim=True).reciprocal())({s}.exp())",
    "(lambda e: e / e.mean({d}, keepdim=True))({s}.exp())", "(lambda e: e / e.sum({d}, keepdim=True))(torch.exp2({s}))",
    "(lambda e: e / e.sum({d}, keepdim=True))({s}.sigmoid())", "({s}.log_softmax({d}) * {c}).exp()",
]  # fmt: skip


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 6))])
def test_random_quotients_are_the_softmaxes_they_are_taken_for(seed):
    rng, recognised = random.Random(seed), 0
    h = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2
    for _ in range(150):
        dim = rng.choice([-1, 1, 2, -2])
        names = {"d": dim, "o": rng.choice([n for n in (-1, 1, -2) if n % 3 != dim % 3]), "c": rng.choice([1e-9, 0.5, 1.0, 2])}
        code = rng.choice(FORMS).format(s=rng.choice(SCORES).format(**names), **names)
        facts = facts_of(Expression(code))
        run = Values(facts.modules, facts.graph)
        run.run(h)
        for node, softmax in facts.patterns.items():
            if isinstance(softmax, Softmax):
                scores, y = run.values[softmax.scores], run.values[node]
                both = [scores.softmax(softmax.dim), (-scores).softmax(softmax.dim)]
                assert any(torch.allclose(y, expected, rtol=1e-5, atol=1e-8) for expected in both), code
                recognised += 1
    assert recognised > 40
