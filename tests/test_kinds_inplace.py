"""Calls in place by kind: before a pattern, as choices, after gates, on views, and in a buffer made for it. The right map is that
of the spelling out of place; the properties of in-place calls in general are another file's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill, relative
from kinds import assert_clear, assert_forward, assert_kind, assert_same_map, explain, net, noise, own_gradient, score

X = noise(4, 6)


# -- a statement in place, then a pattern that must read the result of it ------------------------------------------------------


def relu_then_swish(m, h):
    F.relu_(h)
    return h * torch.sigmoid(h)


def relu_then_rms_norm(m, h):
    h.relu_()
    return h * torch.rsqrt(h.pow(2).mean(-1, True) + 1e-6)


def written_relu_then_scaled(m, h):
    h.mul_((h > 0).to(h.dtype))
    h.mul_(0.7)
    return h


def written_relu_then_shifted(m, h):
    h.mul_((h > 0).to(h.dtype))
    h = h + 1
    return h


def swish_then_scaled(m, h):
    h = h * torch.sigmoid(h)
    h.mul_(2.0)
    return h


def layer_written_over(m, h):
    """The output of a linear layer over a sequence, as wav2vec 2.0 masks it."""
    h = m.more(h[:, None].repeat(1, 3, 1))
    h[:, 1] = 0.0
    return torch.relu(h).mean(1)


def layer_added_to(m, h):
    return torch.relu(m.more(h).add_(h))


PATTERNS = {
    relu_then_swish: lambda m, h: (r := F.relu(h)) * torch.sigmoid(r),
    relu_then_rms_norm: lambda m, h: (r := F.relu(h)) * torch.rsqrt(r.pow(2).mean(-1, True) + 1e-6),
    written_relu_then_scaled: lambda m, h: h * (h > 0).to(h.dtype) * 0.7,
    written_relu_then_shifted: lambda m, h: h * (h > 0).to(h.dtype) + 1,
    swish_then_scaled: lambda m, h: F.silu(h) * 2.0,
    layer_written_over: lambda m, h: F.relu(torch.stack([m.more(h), 0 * m.more(h), m.more(h)], 1)).mean(1),
    layer_added_to: lambda m, h: F.relu(m.more(h) + h),
}


PATTERN_WAYS = [*((body, way) for body in PATTERNS for way in ("no example", "an example")),
                *((body, "export") for body in (relu_then_swish, swish_then_scaled, layer_written_over))]  # fmt: skip


@pytest.mark.parametrize("body, way", PATTERN_WAYS, ids=lambda f: getattr(f, "__name__", f))
def test_a_pattern_reads_what_was_written_before_it(body, way):
    """A symbolic trace may refuse an assignment to a slice, where there is no example to export."""
    refusable = body is layer_written_over and way == "no example"
    assert_kind(net(body), net(PATTERNS[body]), X, way, refusable=refusable)


@pytest.mark.parametrize("rules", [sp_fx.Rules(), sp_fx.Rules.frozen()], ids=["soft", "frozen"])
def test_in_place_statements_have_the_frozen_map_too(rules):
    for body, other in PATTERNS.items():
        explainer, spelling = explain(net(body), X, "an example", rules=rules), explain(net(other), X, "no example", rules=rules)
        assert relative(explainer.pullback(X, 1), spelling.pullback(X, 1)) <= 1e-6, body.__name__


# -- choices by value, made in place: no gate of the table, hence listed -------------------------------------------------------


def masked_by_threshold(m, h):
    h.mul_((h > 0.1).to(h.dtype))
    return h


def filled_below(m, h):
    h.masked_fill_(h < 0.1, 0.0)
    return h


def remainder(m, h):
    h.remainder_(1.0)
    return h


def multiplied_in_place(m, h):
    h *= (h > 0.1).to(h.dtype)
    return h


CHOICES = [masked_by_threshold, filled_below, remainder, multiplied_in_place]


CHOICE_WAYS = [*((body, "auto") for body in CHOICES), (masked_by_threshold, "export")]


@pytest.mark.parametrize("body, tracer", CHOICE_WAYS, ids=lambda f: getattr(f, "__name__", f))
def test_choices_made_in_place_are_listed(body, tracer):
    model = net(body)
    with pytest.warns(UserWarning, match="NOT REWRITTEN"):
        explainer = sp_fx.transform(model, tracer=tracer, example_inputs=X, rules=sp_fx.Rules(max_pool=None))
    assert explainer.report().of("NOT REWRITTEN")
    assert_forward(explainer, model, X)
    assert relative(explainer.pullback(X, 1), own_gradient(model, X)) <= 1e-9
    with pytest.raises(sp_fx.NotRewrittenError):
        sp_fx.transform(model, tracer=tracer, example_inputs=X, strict=True)


# -- in place on what a gate returns -------------------------------------------------------------------------------------------


class Picture(nn.Module):
    """[B, 3, 8, 8] to [B, 3]: `gate` on a convolution's output, then `after` in place, then a head over what is left."""

    def __init__(self, gate, after, channels=6):
        super().__init__()
        self.conv, self.side = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.gate, self.after, self.head = gate, after, nn.Linear(6, 3)

    def forward(self, x):
        y = self.after(self.gate(self.conv(x)), self.side(x))
        return self.head(y.flatten(2).mean(2))


def added(y, r):
    y += r
    return y


def scaled(y, r):
    return y.mul_(0.5)


def added_through_a_view(y, r):
    row = y.flatten(2)
    row += 1.0
    return y


def channel_assigned(y, r):
    y[:, 0] = 0.0
    return y


def clamped_and_shifted(y, r):
    y.clamp_(min=-0.1).add_(1)
    return y


AFTER = {
    added: lambda y, r: y + r,
    scaled: lambda y, r: y * 0.5,
    added_through_a_view: lambda y, r: y + 1.0,
    channel_assigned: lambda y, r: torch.cat([0.0 * y[:, :1], y[:, 1:]], 1),
    clamped_and_shifted: lambda y, r: y.clamp(min=-0.1) + 1,
}
GATES = {
    "relu": nn.ReLU(),
    "leaky": nn.LeakyReLU(),
    "prelu": nn.PReLU(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "elu": nn.ELU(),
    "hardtanh": nn.Hardtanh(),
    "hardswish": nn.Hardswish(),
    "softshrink": nn.Softshrink(),
    "max pool": nn.MaxPool2d(3, 1, 1),
    "adaptive max pool": nn.AdaptiveMaxPool2d(8),
    "layer norm": nn.LayerNorm(8),
    "group norm": nn.GroupNorm(2, 6),
    "instance norm": nn.InstanceNorm2d(6),
    "batch norm": nn.BatchNorm2d(6),
    "batch norm of the batch": nn.BatchNorm2d(6, track_running_stats=False),
    "response norm": nn.LocalResponseNorm(3),
    "rms norm": nn.RMSNorm(8),
    "glu": nn.GLU(1),
}


def pictures(name, after):
    model, other = (fill(Picture(GATES[name], f, 12 if name == "glu" else 6)).double() for f in (after, AFTER[after]))
    return model, other


P = noise(2, 3, 8, 8)


def runs(model, x):
    """Whether the model's own backward runs: PyTorch refuses some writes over what a backward needs."""
    try:
        own_gradient(model, x)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("name", GATES)
def test_in_place_after_a_gate(name):
    """Runs wherever the model's own backward does, with the map of the spelling out of place."""
    for after in AFTER:
        if after is channel_assigned:  # which a symbolic trace may refuse
            continue
        model, other = pictures(name, after)
        if runs(model, P):
            assert_kind(model, other, P, "no example")
        else:  # its forward runs all the same
            assert_forward(explain(model, P, "no example"), model, P)


@pytest.mark.parametrize("name, way", [("gelu", "an example"), ("instance norm", "an example"), ("max pool", "export")])
def test_in_place_after_a_gate_by_export(name, way):
    for after in (added, added_through_a_view) if way == "export" else (channel_assigned,):
        model, other = pictures(name, after)
        assert runs(model, P)
        assert_kind(model, other, P, way)


REDUCED = {
    "the largest of each channel": (lambda y: y.amax((2, 3)), lambda y: y.amax((2, 3))),
    "max of one axis": (lambda y: y.flatten(2).max(-1)[0], lambda y: y.flatten(2).amax(-1)),
    "flattened pool": (lambda y: F.adaptive_max_pool2d(y, 1).flatten(1), lambda y: y.amax((2, 3))),
    "transposed pool": (
        lambda y: F.max_pool2d(y, 8).flatten(2).transpose(1, 2)[:, 0],
        lambda y: y.amax((2, 3)),
    ),
}


@pytest.mark.parametrize("name, way", [*((name, "an example") for name in REDUCED), ("the largest of each channel", "export")])
def test_in_place_after_a_largest_number(name, way):
    reduce, plainly = REDUCED[name]

    def written(y, r):
        y = reduce(y)
        y -= 1.0
        y.mul_(2.0)
        y /= 3.0
        return y[..., None]

    def spelled(y, r):
        return ((plainly(y) - 1.0) * 2.0 / 3.0)[..., None]

    model, other = (fill(Picture(nn.Identity(), f)).double() for f in (written, spelled))
    assert_kind(model, other, P, way)


# -- a buffer made for it, filled in place from what varies --------------------------------------------------------------------


def slice_of_zeros_like(m, h):
    z = torch.zeros_like(h)
    z[:, 1:] = h[:, :-1]
    return z


def slice_of_new_zeros(m, h):
    z = h.new_zeros(h.shape)
    z[:, 1:] = h[:, :-1].clone()
    return z


def padded_by_hand(m, h):
    z = torch.zeros(h.shape[0], h.shape[1] + 2, dtype=h.dtype)
    z[:, 1:-1] = h
    return z[:, :8]


def copied(m, h):
    z = torch.empty_like(h)
    z.copy_(h)
    return z


def copied_by_index(m, h):
    return torch.zeros_like(h).index_copy_(1, torch.arange(8), h)


def scattered(m, h):
    return torch.zeros_like(h).scatter_(1, torch.arange(8).expand(h.shape[0], 8), h)


def added_by_index(m, h):
    z = torch.zeros_like(h)
    z.index_add_(1, torch.arange(8), h)
    return z


def accumulated(m, h):
    z = torch.zeros_like(h)
    z += h
    return z


def scattered_by_mask(m, h):
    z = torch.zeros_like(h)
    return z.masked_scatter(torch.ones_like(h, dtype=torch.bool), h)


def column_by_column(m, h):
    z = torch.zeros_like(h)
    for i in range(8):
        z[:, i] = h[:, 7 - i]
    return z


def filled_through_a_view(m, h):
    z = torch.zeros_like(h)
    z.view(-1, 2, 4)[:, 0].copy_(h[:, :4])
    z.view(-1, 2, 4)[:, 1].add_(h[:, 4:])
    return z


def shifted(m, h):
    return torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)


BUFFERS = {
    slice_of_zeros_like: shifted,
    slice_of_new_zeros: shifted,
    padded_by_hand: shifted,
    **dict.fromkeys((copied, copied_by_index, scattered, added_by_index, accumulated, scattered_by_mask, filled_through_a_view),
                    lambda m, h: h * 1),
    column_by_column: lambda m, h: h.flip(1),
}  # fmt: skip


def then_relu(fill_buffer):
    return lambda m, h: torch.relu(fill_buffer(m, h))


BUFFER_WAYS = [*((body, way) for body in BUFFERS for way in ("no example", "an example")),
               *((body, "export") for body in (slice_of_zeros_like, scattered, filled_through_a_view))]  # fmt: skip


@pytest.mark.parametrize("body, way", BUFFER_WAYS, ids=lambda f: getattr(f, "__name__", f))
def test_gates_after_a_buffer_filled_in_place_are_rewritten(body, way):
    """Without an example a symbolic trace may refuse an assignment to a slice, or a size; what it takes it gets right."""
    model, spelling = net(then_relu(body)), net(then_relu(BUFFERS[body]))
    try:
        explainer = explain(model, X, way)
    except sp_fx.CaptureError as error:
        assert way == "no example"
        return assert_clear(error)
    assert [site.kind for site in explainer.report().of("rewritten")] == ["relu"]
    assert_same_map(explainer, model, spelling, X)


def shift(x, frames):
    """The temporal shift module as published (arXiv:1811.08383): a quarter of the channels each from both neighbours."""
    n, c, h, w = x.shape
    x = x.view(n // frames, frames, c, h, w)
    f = c // 4
    out = torch.zeros_like(x)
    out[:, :-1, :f] = x[:, 1:, :f]
    out[:, 1:, f : 2 * f] = x[:, :-1, f : 2 * f]
    out[:, :, 2 * f :] = x[:, :, 2 * f :]
    return out.view(n, c, h, w)


def shift_out_of_place(x, frames):
    x = x.unflatten(0, (-1, frames))
    f = x.shape[2] // 4
    before = torch.cat([x[:, 1:, :f], 0 * x[:, :1, :f]], 1)
    after = torch.cat([0 * x[:, :1, f : 2 * f], x[:, :-1, f : 2 * f]], 1)
    return torch.cat([before, after, x[:, :, 2 * f :]], 2).flatten(0, 1)


class Shifted(nn.Module):
    """[B, T, 3, H, W] to [B, 5], with 4 ReLUs, three of them after a shift."""

    def __init__(self, shift):
        super().__init__()
        self.stem, self.fc, self.shift = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5), shift
        self.blocks = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(2))

    def forward(self, x):
        b, frames = x.shape[:2]
        x = F.relu(self.stem(x.flatten(0, 1)))
        for block in self.blocks:
            x = block(self.shift(x, frames))
        return self.fc(F.relu(x).mean((2, 3))).view(b, frames, 5).mean(1)


class Padded(nn.Module):
    """[B, 3, T] to [B, 5]: a convolution over a border that is padded by hand."""

    def __init__(self, by_hand):
        super().__init__()
        self.a, self.b, self.c, self.by_hand = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3), nn.Linear(8, 5), by_hand

    def forward(self, x):
        h = F.gelu(self.a(x))
        if self.by_hand:
            z = torch.zeros(h.shape[0], 8, h.shape[2] + 2, dtype=h.dtype)
            z[:, :, 1:-1] = h
        else:
            z = F.pad(h, (1, 1))
        return self.c(F.gelu(self.b(F.relu(z))).mean(2))


@pytest.mark.parametrize("way", ["an example", "export"])
def test_a_temporal_shift_network(way):
    model, other = (fill(Shifted(f)).double() for f in (shift, shift_out_of_place))
    clips = noise(2, 3, 3, 6, 6)
    explainer = explain(model, clips, way)
    assert_same_map(explainer, model, other, clips)
    sites = explainer.report().sites
    assert [(s.kind, s.status, s.scale) for s in sites] == [("relu", "rewritten", "sample")] * 4


@pytest.mark.parametrize("way", ["an example", "export"])
def test_a_convolution_padded_by_hand(way):
    model, other = (fill(Padded(by_hand)).double() for by_hand in (True, False))
    x = noise(2, 3, 12)
    explainer = explain(model, x, way)
    assert_same_map(explainer, model, other, x)
    assert [s.kind for s in explainer.report().of("rewritten")] == ["gelu", "relu", "gelu"]


# -- the model itself -----------------------------------------------------------------------------------------------------------


def test_check_of_a_model_without_a_backward():
    """A residual added to what the ReLU still needs: the model's own backward raises, and `check` says so without raising."""

    def residual(m, h):
        h.add_(torch.relu(m.more(h)))
        return h

    model = net(residual)
    assert not runs(model, X)
    explainer = explain(model, X, "no example")
    assert_forward(explainer, model, X)
    assert sp_fx.check(explainer, X).lines


def test_an_input_that_the_model_writes_over_stays():
    model = net(lambda m, h: torch.relu(h))

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            x.mul_(2)
            return self.inner(x)

    explainer, x = explain(Writes(), X.clone(), "an example"), X.clone()
    maps = explainer.pullback(x, score)
    assert torch.equal(x, X)
    assert relative(maps, 2 * explain(model, X, "no example").pullback(2 * X, score)) <= 1e-9
