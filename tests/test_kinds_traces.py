"""Models of which a symbolic trace can be another function: aliases written through, questions about types, contexts, draws."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sp_fx
from helpers import relative
from kinds import PLAIN, WAYS, assert_clear, assert_forward, assert_kind, explain, net, noise, own_gradient

X = noise(4, 6)


# -- an augmented assignment is in place: whoever holds the tensor sees it -----------------------------------------------------


def skip_added_to(m, h):
    skip = h
    h += m.shift
    return torch.relu(m.more(h)) + skip


def skip_scaled_from_a_list(m, h):
    stages = [h]
    h *= 0.5
    stages.append(torch.relu(m.more(h)))
    return stages[0] + stages[1]


def residual_in_place(m, h):
    stages = [h]
    h += torch.relu(m.more(h.clone()))
    stages.append(h)
    return stages[0] + stages[1]


def half_through_a_view(m, h):
    first = h[:, :4]
    first -= 1.0
    return torch.relu(h)


def half_of_a_part(m, h):
    first = h.narrow(1, 0, 4)
    first /= 3.0
    return torch.relu(h)


def power_of_an_alias(m, h):
    skip = h
    h **= 2
    return torch.relu(m.more(h)) + skip


ALIASES = {
    skip_added_to: lambda m, h: torch.relu(m.more(h + m.shift)) + (h + m.shift),
    skip_scaled_from_a_list: lambda m, h: 0.5 * h + torch.relu(m.more(0.5 * h)),
    residual_in_place: lambda m, h: 2 * (h + torch.relu(m.more(h))),
    half_through_a_view: lambda m, h: torch.relu(torch.cat([h[:, :4] - 1.0, h[:, 4:]], 1)),
    half_of_a_part: lambda m, h: torch.relu(torch.cat([h[:, :4] / 3.0, h[:, 4:]], 1)),
    power_of_an_alias: lambda m, h: torch.relu(m.more(h**2)) + h**2,
}


ALIASED = [*((body, way) for body in ALIASES for way in ("no example", "an example")),
           (residual_in_place, "export"), (half_through_a_view, "export")]  # fmt: skip


@pytest.mark.parametrize("body, way", ALIASED, ids=lambda f: getattr(f, "__name__", f))
def test_augmented_assignments_reach_every_alias(body, way):
    assert_kind(net(body), net(ALIASES[body]), X, way)


# -- questions that a tensor answers otherwise than what a trace puts in its place ----------------------------------------------


def tried(m, h):
    try:
        if h.shape[0] > 0:
            h = m.norm(h)
    except Exception:  # as such code has it
        pass
    return torch.relu(h)


def tried_on_values(m, h):
    try:
        if h.abs().max() > 0:
            h = m.norm(h)
    except Exception:
        pass
    return torch.relu(h)


def asked_in_a_helper(m, h):
    def block(x, skip=None):
        return m.more(x + skip) if torch.jit.isinstance(skip, torch.Tensor) else m.more(x)

    return torch.relu(m.norm(block(h, h)))


QUESTIONS = {
    "isinstance": lambda m, h: torch.relu(m.norm(h) if isinstance(h, torch.Tensor) else h),
    "isinstance of a tuple": lambda m, h: torch.relu(m.norm(h) if isinstance(h, (list, torch.Tensor)) else h),
    "torch.is_tensor": lambda m, h: torch.relu(m.norm(h) if torch.is_tensor(h) else h),
    "hasattr": lambda m, h: torch.relu(h.tensors if hasattr(h, "tensors") else m.norm(h)),
    "getattr with a default": lambda m, h: torch.relu(m.norm(getattr(h, "tensors", h))),
    "type is": lambda m, h: torch.relu(m.norm(h) if type(h) is torch.Tensor else h),
    "callable": lambda m, h: torch.relu(m.norm(h() if callable(h) else h)),
    "is_floating_point": lambda m, h: torch.relu(m.norm(h) if h.is_floating_point() else h),
    "dtype": lambda m, h: torch.relu(m.norm(h) if h.dtype == torch.float64 else h),
    "dim": lambda m, h: torch.relu(m.norm(h) if h.dim() == 2 else h),
    "a size in max": lambda m, h: torch.relu(m.norm(h) / max(1, h.shape[-1]) * 8),
    "a NumPy number": lambda m, h: torch.relu(m.norm(h * np.float32(2.0) / 2)),
    "a default that is a dict": lambda m, h, extra={}: torch.relu(m.norm(h) * extra.get("scale", 1.0)),
    "grad mode": lambda m, h: torch.relu(m.norm(h) if torch.is_grad_enabled() else h),
}
SIZES_AND_TYPES = ("is_floating_point", "dtype", "dim", "a size in max", "a NumPy number")  # a symbolic trace refuses these


def normed(m, h):
    return torch.relu(m.norm(h))


@pytest.mark.parametrize("way", ["no example", "an example"])
@pytest.mark.parametrize("name", [n for n in QUESTIONS if n != "grad mode"])
def test_questions_have_the_answers_of_tensors(name, way):
    # No tracer's tensors are of the type itself: `type(h) is torch.Tensor` is refused with an example too.
    refusable = (way == "no example" and name in SIZES_AND_TYPES) or name == "type is"
    assert_kind(net(QUESTIONS[name]), net(normed), X, way, refusable=refusable, plainly=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("body", [tried, asked_in_a_helper], ids=lambda f: f.__name__)
def test_questions_in_helpers_and_behind_try(body, way):
    spelling = net(normed if body is tried else lambda m, h: torch.relu(m.norm(m.more(h + h))))
    refusable = body is tried and way == "no example"  # it branches on a size
    assert_kind(net(body), spelling, X, way, refusable=refusable, plainly=False)


@pytest.mark.parametrize("way", WAYS)
def test_a_question_about_values_behind_try_is_refused(way):
    """No tracer sees values, and both errors are caught by the model: the difference shows in its outputs alone."""
    assert_kind(net(tried_on_values), net(normed), X, way, refusable=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_forward_that_asks_for_grad_mode(way):
    """A map is made with gradients on: there the explainer is the model, or it is refused."""
    model = net(QUESTIONS["grad mode"])
    try:
        explainer = explain(model, X, way, rules=sp_fx.Rules(**PLAIN))
        maps = explainer.pullback(X, 1)
    except sp_fx.CaptureError as error:
        return assert_clear(error, WAYS[way][1])
    assert torch.equal(explainer(X), model(X))
    assert relative(maps, own_gradient(model, X)) <= 1e-9


# -- regions ------------------------------------------------------------------------------------------------------------------


def autocast(m, h):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = torch.relu(m.more(h))
    return torch.relu(h.float() - 0.1)


def bfloat16_between(m, h):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a = m.more(h)
    with torch.autocast("cpu", enabled=False):
        b = torch.relu(m.more(a.float()))
    return torch.relu(b + h)


@torch.autocast("cpu", dtype=torch.bfloat16)
def decorated(m, h):
    return torch.relu(m.more(h)).float()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("body", [autocast, bfloat16_between, decorated], ids=lambda f: f.__name__)
def test_autocast_regions_are_kept(body, way):
    """Or refused; every ReLU in them is rewritten, or listed."""
    model, x = net(body, torch.float32), X.float()
    try:
        explainer = explain(model, x, way)
        plain = explain(model, x, way, rules=sp_fx.Rules(**PLAIN))
        y, expected = explainer(x), model(x)
    except sp_fx.CaptureError as error:
        return assert_clear(error, WAYS[way][1])
    assert y.dtype == expected.dtype and torch.equal(y, expected)
    assert relative(plain.pullback(x, 1), own_gradient(model, x)) <= 1e-5  # float32
    report = explainer.report()
    relus = [s for s in report.of("rewritten") if s.kind == "relu"]
    assert len(relus) == (1 if body is decorated else 2) or report.of("NOT REWRITTEN")


def test_an_outer_autocast_is_the_callers():
    model = net(lambda m, h: torch.relu(m.more(h)), torch.float32)
    explainer = sp_fx.transform(model, rules=sp_fx.Rules(**PLAIN))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(explainer(X.float()), model(X.float()))
        assert relative(explainer.pullback(X.float(), 1), own_gradient(model, X.float())) <= 1e-6


def inner_autocast_off(m, h):
    with torch.autocast("cpu", enabled=False):
        h = m.more(h.float())
    return torch.relu(h)


@pytest.mark.parametrize("way", WAYS)
def test_a_region_without_autocast_under_an_outer_one(way):
    """What keeps a part in float32 does so in the explainer, or a note says that it does not."""
    model, x = net(inner_autocast_off, torch.float32), X.float()
    explainer = explain(model, x, way, rules=sp_fx.Rules(**PLAIN))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = torch.equal(explainer(x), model(x))
        same &= relative(explainer.pullback(x, 1), own_gradient(model, x)) <= 1e-6
    assert same or "autocast" in " ".join(explainer.report().notes)


# -- draws --------------------------------------------------------------------------------------------------------------------


def drops_always(m, h):
    return torch.relu(F.dropout(h, 0.5))


def adds_noise(m, h):
    return torch.relu(h + 0.1 * torch.randn_like(h))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("body", [drops_always, adds_noise], ids=lambda f: f.__name__)
def test_draws_are_the_models_and_noted(body, way):
    """Under one seed the explainer draws what the model draws, also at its first call, and the report says that it draws."""
    model = net(body)
    torch.manual_seed(7)
    expected, after = model(X), torch.get_rng_state()
    explainer = explain(model, X, way)
    for _ in range(2):
        torch.manual_seed(7)
        assert torch.equal(explainer(X), expected)
        assert torch.equal(torch.get_rng_state(), after)
    notes = " ".join(explainer.report().notes)
    assert "random" in notes or "draw" in notes


@pytest.mark.parametrize("way", WAYS)
def test_transform_draws_nothing(way):
    model, before = net(drops_always), torch.get_rng_state()
    explain(model, X, way)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("way", WAYS)
def test_a_number_drawn_is_no_constant(way):
    """`float(torch.rand(()))` in the forward: the explainer's number is drawn too, or the model is refused."""
    model = net(lambda m, h: torch.relu(h) * float(torch.rand(())))
    try:
        explainer = explain(model, X, way)
        for seed in (1, 2):
            torch.manual_seed(seed)
            expected = model(X)
            torch.manual_seed(seed)
            assert torch.equal(explainer(X), expected)
    except sp_fx.CaptureError as error:
        assert_clear(error, WAYS[way][1])


@pytest.mark.parametrize("way", WAYS)
def test_plain_networks_have_no_notes(way):
    """No false alarm: nothing to say of a network that every tracer gets right."""
    model = net(lambda m, h: torch.relu(m.norm(h)))
    explainer = explain(model, X, way)
    assert_forward(explainer, model, X)
    assert explainer.report().notes == ()
