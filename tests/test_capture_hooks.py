"""Forward hooks: those that are a model's own are a part of its function."""

import dataclasses
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import relative

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Keeps(nn.Module):
    """Uses in its forward what a hook of its own has kept, and what it made of it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(8, 3)
        self.first.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.kept = output.relu()
        return output * 2

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(torch.cat([h, self.kept], 1))


class Around(nn.Module):
    """Has hooks on itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.register_forward_pre_hook(self.before)
        self.register_forward_hook(self.after, with_kwargs=True)

    def before(self, module, args):
        return (args[0] * 3,)

    def after(self, module, args, kwargs, output):
        return output + 1

    def forward(self, x):
        return F.gelu(self.first(x))


def collector(scale):
    """A hook as libraries make it, in a closure with plain values alone."""

    def collect(module, args, output):
        return output * scale

    return collect


class OfALibrary(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        if not getattr(self, "installed", False):  # at the first call, as transformers does
            self.installed = True
            self.first.register_forward_hook(collector(2.0))
            self.first.register_forward_hook(functools.partial(shifted, by=1.0))
        return self.last(self.first(x).relu())


def shifted(module, args, output, by):
    return output + by


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("kind", [Keeps, Around, OfALibrary])
def test_hooks_of_the_model_run(kind, ran_before, tracer):
    model = kind().eval()
    if ran_before or kind is OfALibrary:
        model(X)
    explainer = sp_fx.transform(model, tracer=tracer, example_inputs=X)
    assert torch.equal(explainer(X), model(X)) and "does not run" not in str(explainer.report())
    plain = sp_fx.Rules(**dict.fromkeys(sp_fx.gates.rules.KINDS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plain gradient
        found = sp_fx.transform(model, rules=plain, tracer=tracer, example_inputs=X).pullback(X, 1)
    x = X.clone().requires_grad_()
    assert relative(found, torch.autograd.grad(model(x)[:, 1].sum(), x)[0]) <= 1e-6
    assert sp_fx.check(explainer, X).ok


def test_hooks_of_somebody_else_do_not_run_and_are_told():
    model, seen = OfALibrary().eval(), []
    model(X)
    model.last.register_forward_hook(lambda m, a, y: seen.append(y))  # it keeps what it sees in a list that is not the model's
    with pytest.warns(UserWarning, match=r"the hook of last, .*lambda.* does not run"):
        explainer = sp_fx.transform(model)
    assert torch.equal(explainer(X), model(X)) and len(seen) == 1 and isinstance(seen[0], torch.Tensor)


class SetsLater(nn.Module):
    """Returns a mapping whose keys were set in another order than its class has them, as the outputs of transformers may be."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.last = Inner(), nn.Linear(4, 3)

    def forward(self, x):
        found = self.inner(x)
        return self.last(found["a"].relu() + found["b"].sum((1, 2))[:, None])


class Ordered(dict):
    """Has its keys in the order of its class, whatever the order they come in."""

    def __init__(self, values):
        super().__init__({key: values[key] for key in ("a", "b")})


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x):
        found = Ordered({"a": x, "b": x})
        del found["a"]
        found["b"], found["a"] = F.gelu(self.first(x))[:, None], x * 2
        return found


def test_outputs_that_were_set_in_another_order():
    model = SetsLater().eval()
    assert list(model.inner(X)) == ["b", "a"] and list(Ordered(model.inner(X))) == ["a", "b"]
    explainer = sp_fx.transform(model, tracer="export", example_inputs=X)
    assert torch.equal(explainer(X), model(X))


@dataclasses.dataclass
class Intermediates:
    scores: torch.Tensor
    cached: tuple | None = None


class ReturnsADataclass(nn.Module):
    """Its inner module returns a tuple with a dataclass inside, as the attention of x_transformers does."""

    class Attend(nn.Module):
        def forward(self, x):
            scores = x @ x.mT
            return scores.softmax(-1) @ x, Intermediates(scores, (x,))

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.last = self.Attend(), nn.Linear(4, 3)

    def forward(self, x):
        y, seen = self.attend(x)
        return self.last(y.mean(1) + seen.scores.sum(-1, keepdim=True).mean(1))


def test_modules_that_return_dataclasses():
    model, x = ReturnsADataclass().eval(), torch.randn(2, 5, 4)
    explainer = sp_fx.transform(model, tracer="export", example_inputs=x)
    assert torch.equal(explainer(x), model(x)) and explainer.pullback(x, 1).norm() > 0
    seen = []
    explainer.attend.register_forward_hook(lambda m, a, y: seen.append(y))
    explainer(x)
    assert type(seen[0][1]) is Intermediates and seen[0][1].scores.shape == (2, 5, 5)
