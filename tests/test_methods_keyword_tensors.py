"""Keyword tensors whose axis 0 is as long as the batch: which of them are cut with the samples is measured, and none is repeated.

Everywhere the reference is the call that is not cut.
"""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import sp_fx
from helpers import fill, relative
from sp_fx.methods import keyword_tensors
from sp_fx.methods.requests import Request

B, L, D, H = 4, 5, 6, 8  # samples, steps, width, hidden
G = torch.Generator().manual_seed(0)
X, STEPS = torch.randn(B, D, generator=G), torch.randn(B, L, D, generator=G)
PROTOTYPES, BIAS = torch.randn(B, H, generator=G), torch.randn(H, generator=G)  # as many prototypes as samples
MASK = (torch.rand(B, L, generator=G) < 0.6).float().index_fill_(1, torch.tensor(0), 1.0)


class Head(nn.Module):
    """Hidden features, of one vector or pooled over steps, with further arguments in any role."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H))


class Prototypes(Head):
    def forward(self, x, prototypes):
        return self.body(x) @ prototypes.t()


class Masked(Head):
    def forward(self, x, mask):
        return (self.body(x) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Both(Head):
    def forward(self, x, mask, prototypes):
        return (self.body(x) * mask[..., None]).sum(1) @ prototypes.t()


class Nested(Head):
    def forward(self, x, pair):
        return self.body(x) * pair["scales"][0] + pair["bias"]


class Unread(Head):
    def forward(self, x, labels):
        return self.body(x)


class Several(Head):
    """Several outputs, one of which has the batch on axis 1, and one no batch."""

    def forward(self, x, prototypes, mask):
        h = self.body(x) * mask[..., None]
        return {"logits": h.sum(1) @ prototypes.t(), "states": h.transpose(0, 1), "similarity": prototypes @ prototypes.t()}


CASES = {
    "the same for every sample": (Prototypes, X, {"prototypes": PROTOTYPES}),
    "of the samples": (Masked, STEPS, {"mask": MASK}),
    "one of each": (Both, STEPS, {"mask": MASK, "prototypes": PROTOTYPES}),
    "in containers": (Nested, X, {"pair": {"scales": [torch.rand(B, 1, generator=G)], "bias": BIAS}}),
    "not read": (Unread, X, {"labels": torch.arange(B)}),
    "several outputs": (Several, STEPS, {"prototypes": PROTOTYPES, "mask": MASK}),
}


def explained(model, x, kwargs, tracer):
    return sp_fx.transform(fill(model()), tracer=tracer, example_inputs={"x": x, **kwargs} if tracer == "export" else None)


@pytest.mark.parametrize(
    "case, tracer", [*((case, "fx") for case in CASES), ("one of each", "export"), ("in containers", "export")]
)
def test_pieces_are_the_whole(case, tracer):
    model, x, kwargs = CASES[case]
    explainer = explained(model, x, kwargs, tracer)
    target = torch.tensor([0, 3, 1, 2])
    for method in (explainer.pullback, explainer.double_pullback):
        whole = method(x, target, forward_kwargs=kwargs)
        for size in (1, 2, 3):
            assert relative(method(x, target, forward_kwargs=kwargs, batch_size=size), whole) <= 1e-5  # products of other shapes
    inputs = explainer.pullback({"x": x, **kwargs}, target, batch_size=3)["x"] if case == "of the samples" else None
    assert inputs is None or relative(inputs, explainer.pullback(x, target, forward_kwargs=kwargs)) <= 1e-5


@pytest.mark.parametrize("case", ["of the samples", "one of each"])
def test_pieces_from_an_inner_layer_are_the_whole(case):
    model, x, kwargs = CASES[case]
    explainer = explained(model, x, kwargs, "fx")
    whole = explainer.pullback(x, 1, forward_kwargs=kwargs, wrt="body.0")
    for size in (1, 2, 3):
        assert relative(explainer.pullback(x, 1, forward_kwargs=kwargs, wrt="body.0", batch_size=size), whole) <= 1e-5


@pytest.mark.parametrize("number", [B, B + 1])
def test_many_targets_are_one_at_a_time(number):
    """Nothing is repeated for targets [B, T], so that no prototypes are, however many there are."""
    explainer = sp_fx.transform(fill(Prototypes()))
    kwargs = {"prototypes": torch.randn(number, H, generator=torch.Generator().manual_seed(1))}
    targets = torch.tensor([[0, 1, 3]] * B)
    for method in (explainer.pullback, explainer.double_pullback, explainer.ascend):
        for size in (None, 3):
            many = method(X, targets, forward_kwargs=kwargs, batch_size=size)
            assert many.shape == (B, 3, D)
            for k in range(3):
                assert relative(many[:, k], method(X, targets[:, k], forward_kwargs=kwargs)) <= 1e-5
    assert explainer.ascend(X, targets[:, :1], steps=2, forward_kwargs=kwargs, return_path=True)[1].shape == (3, B, 1, D)


def test_no_forward_has_more_samples_than_the_batch():
    explainer, sizes = sp_fx.transform(fill(Prototypes())), []
    explainer.body.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    explainer.ascend(X, torch.tensor([[0, 1, 3]] * B), steps=2, forward_kwargs={"prototypes": PROTOTYPES})
    assert sizes == [B] * 6


class Scaled(Head):
    def forward(self, x, by):
        return self.body(x) * by.mean()  # both ways it runs, and what is returned looks the same


class Mixed(Head):
    def forward(self, x, pair):
        return (self.body(x) * pair[0]) @ pair[1].t()  # one of them goes with the samples, the other does not


REFUSED = {
    "both": (Scaled, {"by": torch.rand(B)}, r"by \[4\] may or may not go with the samples.*both are right"),
    "neither": (
        Mixed,
        {"pair": (torch.rand(B, 1), PROTOTYPES)},
        r"pair \[4, 1\] and \[4, 8\].*cut it returns \[2, 2\].*\[4, 4\]; whole it does not run",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused(case):
    model, kwargs, message = REFUSED[case]
    explainer = sp_fx.transform(fill(model()))
    assert explainer.pullback(X, 1, forward_kwargs=kwargs).shape == X.shape
    with pytest.raises(ValueError, match=message) as caught:
        explainer.pullback(X, 1, forward_kwargs=kwargs, batch_size=2)
    assert "Pass it among the inputs" in str(caught.value) and "\n" not in str(caught.value)
    if case == "both":
        first = explainer.pullback(X[:2], 1, forward_kwargs={"by": kwargs["by"][:2]})
        assert relative(explainer.pullback((X, kwargs["by"]), 1, batch_size=2)[0][:2], first) <= 1e-6


class Table(nn.Module):
    """Prototypes of two numbers, so that pieces of two samples are also as long as these are wide."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, 2), nn.ReLU())

    def forward(self, x, square):
        return self.body(x) @ square.t()[:2]


def test_a_piece_as_long_as_another_axis():
    explainer, square = sp_fx.transform(fill(Table())), torch.randn(B, B, generator=torch.Generator().manual_seed(1))
    whole = explainer.pullback(X, 1, forward_kwargs={"square": square})
    assert relative(explainer.pullback(X, 1, forward_kwargs={"square": square}, batch_size=2), whole) <= 1e-6


def test_too_many_to_tell_apart():
    class Many(Head):
        def forward(self, x, a, b, c, d, e, f, g):
            return self.body(x) * a * b * c * d * e * f * g

    with pytest.raises(ValueError, match=r"a \[4, 1\], b \[4, 1\].*more than the 6"):
        sp_fx.transform(fill(Many())).pullback(X, 1, forward_kwargs={k: torch.rand(B, 1) for k in "abcdefg"}, batch_size=2)


def test_it_is_measured_where_it_matters_only(monkeypatch):
    explainer, runs = sp_fx.transform(fill(Prototypes())), []
    monkeypatch.setattr(keyword_tensors, "run", lambda *args: runs.append(args) or 1 / 0)
    explainer.pullback(X, 1, forward_kwargs={"prototypes": PROTOTYPES})
    explainer.pullback(X, 1, forward_kwargs={"prototypes": PROTOTYPES}, batch_size=B)
    explainer.pullback(X, 1, forward_kwargs={"prototypes": PROTOTYPES[:3]}, batch_size=2)
    explainer.pullback((X, PROTOTYPES), 1, batch_size=B)
    assert not runs
    with pytest.raises(ZeroDivisionError):
        explainer.pullback(X, 1, forward_kwargs={"prototypes": PROTOTYPES}, batch_size=2)


class Counting(Head):
    """Writes into a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, prototypes):
        return self.body(x) @ prototypes.t() + 0 * self.seen.add_(1)


def test_measuring_touches_no_numbers_and_runs_no_hooks(capfd):
    explainer, hooked = sp_fx.transform(fill(Counting())), []
    for module in explainer.modules():
        module.register_forward_hook(lambda *args: hooked.append(args))
        module.register_forward_pre_hook(lambda *args: hooked.append(args))
    before = {name: (t.clone(), t._version) for name, t in explainer.state_dict().items()}
    call = Request(STEPS[:, 0], 1, {"prototypes": PROTOTYPES}).call(explainer.forward)
    assert keyword_tensors.measured(explainer, call, 2).samplewise == frozenset()
    assert not hooked and capfd.readouterr() == ("", "")
    for name, t in explainer.state_dict().items():
        assert torch.equal(t, before[name][0]) and t._version == before[name][1]


@contextlib.contextmanager
def dual_level():
    with forward_ad.dual_level():
        yield


CALLERS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "fake tensors": FakeTensorMode,
    "forward-mode AD": dual_level,
    "a default device": lambda: torch.device("meta"),
}
TRANSFORMS = {"vmap": torch.func.vmap, "grad": torch.func.grad, "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f))}


@pytest.mark.parametrize("caller", [*CALLERS, *TRANSFORMS])
def test_measuring_under_the_callers_modes(caller):
    explainer = sp_fx.transform(fill(Both()))
    call = Request(STEPS, 1, {"mask": MASK, "prototypes": PROTOTYPES}).call(explainer.forward)
    measured = []

    def measure(t):
        measured.append(keyword_tensors.measured(explainer, call, 3).samplewise)
        return t * t

    if caller in CALLERS:
        with CALLERS[caller]():
            measure(1)
    else:
        TRANSFORMS[caller](measure)(torch.ones(2) if "vmap" in caller else torch.ones(()))
    assert measured == [frozenset({"mask"})]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_keyword_tensors_made_in_the_callers_mode(mode):
    explainer = sp_fx.transform(fill(Both()))
    expected = explainer.pullback(STEPS, 1, forward_kwargs={"mask": MASK, "prototypes": PROTOTYPES})
    with mode():
        kwargs = {"mask": MASK.clone(), "prototypes": PROTOTYPES.clone()}
        assert torch.equal(explainer.pullback(STEPS, 1, forward_kwargs=kwargs), expected)
        assert relative(explainer.pullback(STEPS, 1, forward_kwargs=kwargs, batch_size=2), expected) <= 1e-6
