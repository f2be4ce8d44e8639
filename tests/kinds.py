"""What the tests by kind share: a small network round a body, the ways to explain it, and the comparison with another spelling.

A kind of model, such as "a skip that is added to in place", is a body and the same function spelled without what is special about
it: out of place, without modules, without questions about types. The second spelling is the oracle under default rules; under
plain rules it is the model's own autograd.
"""

import copy
import re
import warnings

import torch
from torch import nn

import sp_fx
from helpers import fill, relative
from sp_fx.gates.rules import KINDS

PLAIN = dict.fromkeys(KINDS)  # Rules(**PLAIN): every op keeps its own derivative
WAYS = {"no example": ("auto", False), "an example": ("auto", True), "export": ("export", True)}


class Net(nn.Module):
    """[..., 6] to [..., 3]: a layer, `body(self, h)` on its output [..., 8], a head; `parts` are further attributes."""

    def __init__(self, body, **parts):
        super().__init__()
        self.inner, self.more, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm, self.shift, self.body = nn.LayerNorm(8), nn.Parameter(torch.zeros(8)), body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.head(self.body(self, self.inner(x)))


def net(body, dtype=torch.float64, **parts):
    """A `Net` with weights from a seed: two bodies with the same parts have the same weights."""
    return fill(Net(body, **copy.deepcopy(parts))).to(dtype)


def noise(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def explain(model, x, way, **options):
    """The explainer of `model` in one of the `WAYS`."""
    tracer, example = WAYS[way]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sp_fx.transform(model, tracer=tracer, **({"example_inputs": x} if example else {}), **options)


def fresh(x):
    """`x` anew, since a forward may write over it."""
    return tuple(t.clone() for t in x) if isinstance(x, tuple) else x.clone()


def call(model, x):
    return model(*x) if isinstance(x, tuple) else model(x)


def score(y):
    """What is explained: class 1, summed over whatever axes an output has."""
    return (y[0] if isinstance(y, tuple) else y)[..., 1]


def own_gradient(model, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(score(model(leaf * 1)).sum(), leaf)[0]


def assert_forward(explainer, model, x):
    """The same outputs as the model: to the bit, or to 1e-5 where a note says that they are not."""
    with torch.no_grad():
        expected, outputs = call(model, fresh(x)), call(explainer, fresh(x))
    for a, b in zip(tensors(outputs), tensors(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a, b) or (relative(a, b) <= 1e-5 and explainer.report().notes)


def tensors(y):
    if isinstance(y, dict):
        y = tuple(y.values())
    return [t for item in y for t in tensors(item)] if isinstance(y, tuple | list) else [y]


def assert_same_map(explainer, model, spelling, x, bar=1e-6):
    """The map that the other spelling of the model has, by a symbolic trace."""
    assert_forward(explainer, model, x)
    with torch.no_grad():
        assert relative(score(call(spelling, fresh(x))), score(call(model, fresh(x)))) <= bar, "the test's own spelling is wrong"
    expected = explain(spelling, x, "no example").pullback(fresh(x), score)
    assert relative(explainer.pullback(fresh(x), score), expected) <= bar


def assert_kind(model, spelling, x, way, bar=1e-6, refusable=False, plainly=True):
    """Explained this way, `model` has its own forward and the map of its other spelling; and, with an example, its own gradient
    under plain rules (not `plainly`: without that, where there is nothing in the backward to lose).

    `refusable`: or it is refused, where this way of tracing cannot know better.
    """
    try:
        explainer = explain(model, x, way)
        assert_same_map(explainer, model, spelling, x, bar)
        plain = explain(model, x, way, rules=sp_fx.Rules(**PLAIN)) if plainly and way == "an example" else None
    except sp_fx.CaptureError as error:
        if not refusable:
            raise
        return assert_clear(error, WAYS[way][1])
    if plain is not None:
        try:
            own = own_gradient(model, x)
        except RuntimeError:  # the model's own backward does not run
            return
        assert relative(plain.pullback(fresh(x), score), own) <= min(bar, 1e-6)


def assert_clear(error, example=False):
    """An error that says where, in a few lines: no traceback, no page of modules, no advice that was followed already."""
    text = str(error)
    assert re.search(r"\w+\.py:\d+|\bNet\b|\bblock\b", text), text
    assert len(text) <= 1500 and "Traceback" not in text and "in_features=" not in text, text
    assert not (example and "With example_inputs" in text), text
