"""What a symbolic trace sees of a forward: in-place statements as such, true answers to what the forward asks, or an error.

The reference is always the model itself, bit for bit.
"""

import collections

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill


def net(forward, **buffers):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
            self.pos = nn.Parameter(torch.randn(8))
            for name, value in buffers.items():
                self.register_buffer(name, value)

        def forward(self, x):
            return forward(self, x)

    return fill(Net())


def batch():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def added(m, x):
    h = skip = m.a(x)
    h += m.pos
    return F.relu(m.b(h)) + skip


def collected(m, x):
    h = m.a(x)
    stages = [h]
    h *= 0.5
    stages.append(F.relu(m.b(h)))
    return stages[0] + stages[1]


def through_a_view(m, x):
    h = m.a(x)
    half = h[:, :4]
    half -= 1.0
    return F.relu(m.b(h))


def every_operator(m, x):
    h = skip = m.a(x)
    h += 1.5
    h -= m.pos
    h *= 2
    h /= 3
    h **= 2
    h //= 0.1
    h %= 5
    bits = same = h.long()
    bits |= 8
    bits &= 13
    bits ^= 3
    bits <<= 1
    bits >>= 1
    return F.relu(m.b(h)) + skip + same + bits


def matrix_product(m, x):
    h = skip = m.a(x)
    h @= m.b.weight  # tensors have none in place: h is another one
    return F.relu(h) + skip


def sizes(m, x):
    n = x.shape[0]
    before = n
    n += 1
    n *= 2
    shape = x.shape
    shape += (1,)
    return F.relu(m.a(x)) * n + before + len(m.pos.shape) + shape[-1]


def into_a_tensor_that_is_there(m, x):
    total = torch.zeros(8)
    total += m.a(x).sum(0)
    rows = torch.zeros(4, 8)
    rows[1:3] = m.b(x)[:2]
    return total + F.relu(m.a(x)) + rows


SEEN = [added, collected, through_a_view, every_operator, matrix_product, sizes, into_a_tensor_that_is_there]


@pytest.mark.parametrize("forward", SEEN, ids=lambda f: f.__name__)
def test_statements_in_place(forward):
    model, x = net(forward), batch()
    explainer = sp_fx.transform(model, tracer="fx")
    for _ in range(2):  # nothing is left of the first call
        assert torch.equal(explainer(x), model(x))


ASKED = {
    "isinstance": lambda m, h: isinstance(h, torch.Tensor),
    "isinstance of several": lambda m, h: isinstance(h, (tuple, torch.Tensor)),
    "not a container": lambda m, h: not isinstance(h, (list, tuple, dict)),
    "jit.isinstance": lambda m, h: torch.jit.isinstance(h, torch.Tensor),
    "is_tensor": lambda m, h: torch.is_tensor(h),
    "type": lambda m, h: type(h) is torch.Tensor,
    "no such attribute": lambda m, h: not hasattr(h, "tensors"),
    "an attribute": lambda m, h: hasattr(h, "view") and getattr(h, "tensors", None) is None,
    "callable": lambda m, h: not callable(h) and callable(h.view) and not callable(h.shape),
    "a parameter": lambda m, h: isinstance(m.pos, nn.Parameter) and not isinstance(h, nn.Parameter),
    "a part": lambda m, h: isinstance(h[:, :2], torch.Tensor) and isinstance(h.chunk(2)[0], torch.Tensor),
    "several": lambda m, h: isinstance(h.max(1), tuple) and isinstance(h.max(), torch.Tensor),
    "a sum": lambda m, h: isinstance(2 * h + 1, torch.Tensor) and isinstance(h.float(), torch.Tensor),
    "sizes": lambda m, h: isinstance(h.shape, torch.Size) and isinstance(h.shape[0] * 2, int) and not torch.is_tensor(h.dtype),
    "the shape of a weight": lambda m, h: m.a.weight.shape[0] == 8 and len(m.pos) == 8 and m.pos.ndim == 1,
    "collections": lambda m, h: isinstance(collections.OrderedDict(h=h), dict),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", ASKED)
def test_questions_have_the_models_answers(name):
    def forward(m, x):
        h = m.a(x)
        return F.relu(m.b(m.n(h) if ASKED[name](m, h) else h))

    model, x = net(forward), batch()
    assert ASKED[name](model, x)
    explainer = sp_fx.transform(model, tracer="fx")
    assert torch.equal(explainer(x), model(x))
    assert not explainer.report().notes


def caught(m, x):
    h = m.a(x)
    try:
        if h.shape[0] > 0:
            h = m.n(h)
    except Exception:
        pass
    return F.relu(m.b(h))


REFUSED = {
    "an error that the forward catches": (caught, "branches on the shape of a tensor"),
    "the class of an input": (lambda m, x: F.relu(m.a(x[0] if isinstance(x, tuple) else x)), "asks for the class of the input x"),
    "an attribute of an input": (lambda m, x: F.relu(m.a(x.tensors if hasattr(x, "tensors") else x)), "'tensors' of the input x"),
    "a value": (lambda m, x: F.relu(m.a(x)) if x.sum() > 0 else x, "branches on what sum returns"),
    "a dtype": (lambda m, x: F.relu(m.a(x) if x.is_floating_point() else x), "branches on what is_floating_point returns"),
    "a number": (lambda m, x: F.relu(m.a(x)) * float(x.max()), "makes a number of what max returns"),
    "a length": (lambda m, x: F.relu(m.a(x)) * len(x), "asks for the length of the input x"),
    "rows": (lambda m, x: F.relu(torch.stack([m.a(r) for r in x])), "iterates over the input x"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_and_exported_where_there_is_an_example(name):
    forward, reason = REFUSED[name]
    model, x = net(forward), batch()
    with pytest.raises(sp_fx.CaptureError, match=rf"{reason}.*test_capture_stand_ins.py:\d+, in (forward|<lambda>|caught)"):
        sp_fx.transform(model)
    if name == "an error that the forward catches":
        assert torch.equal(sp_fx.transform(model, example_inputs=x)(x), model(x))


def test_an_example_says_what_an_input_is():
    def forward(m, x):
        first = x["first"] if isinstance(x, dict) else x
        return F.relu(m.a(m.n(first) if isinstance(first, torch.Tensor) and not hasattr(first, "tensors") else first))

    model, x = net(forward), batch()
    for given in (x, {"first": x}):
        explainer = sp_fx.transform(model, tracer="fx", example_inputs={"x": given})
        assert torch.equal(explainer(given), model(given))


def test_settings_in_buffers_in_one_trace():
    runs = iter(range(9))  # no list, which a trace puts back

    def forward(m, x):
        next(runs)
        h = m.a(x)
        for scale in m.scales.tolist():
            h = h * scale
        for row in m.rows:
            h = h + row
        for _ in range(m.repeats):
            h = F.relu(m.b(h))
        first, second = m.sizes.tolist()
        h = torch.cat(h.split([first, second], 1), 1)
        return h * int(m.repeats) if m.flag and m.rows.sum() > -100 and m.rows.shape[1] == 8 else h

    model = net(forward, flag=torch.tensor(True), repeats=torch.tensor(2), scales=torch.tensor([2.0, 3.0]),
                rows=torch.randn(3, 8), sizes=torch.tensor([3, 5]), unread=torch.zeros(1))  # fmt: skip
    x = batch()
    explainer = sp_fx.transform(model)
    assert next(runs) == 1
    assert torch.equal(explainer(x), model(x))
    (note,) = explainer.report().notes
    assert (
        all(name in note for name in ("flag", "repeats", "scales", "rows")) and "unread" not in note and "transform again" in note
    )
    with torch.no_grad():
        model.rows.add_(1)  # what is read by the graph is not baked into it
    assert torch.equal(explainer(x), model(x))


DRAWS = {
    "dropout": lambda m, x: F.dropout(m.a(x)),
    "rand": lambda m, x: m.a(x) + torch.rand(8),
    "in place": lambda m, x: m.a(x) + torch.empty(8).uniform_(1, 2),
    "like": lambda m, x: m.a(x) + torch.randn_like(x),
    "bernoulli": lambda m, x: m.a(x) * torch.bernoulli(torch.full((8,), 0.5)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_drawn_by_each_call_and_told(name):
    model, x = net(lambda m, x: F.relu(DRAWS[name](m, x))), batch()
    state = torch.get_rng_state()
    explainer = sp_fx.transform(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert any(
        note.startswith("each call draws anew: ") and "test_capture_stand_ins.py:" in note for note in explainer.report().notes
    )
    results = []
    for call in (explainer, model, explainer):
        torch.manual_seed(len(results) // 2)
        results.append(call(x))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_no_random_numbers_are_told_of_where_none_are_drawn():
    def forward(m, x):
        h = F.dropout(F.dropout(m.a(x), training=m.training), 0.0)
        return F.rrelu(F.scaled_dot_product_attention(h, h, h), training=False)

    assert not any("random" in note or "draw" in note for note in sp_fx.transform(net(forward)).report().notes)


def test_tensors_that_are_no_buffers_are_not_written_over():
    model = net(lambda m, x: F.relu(m.a(x)) + m.count.add_(1))
    model.count = torch.zeros(1)
    with pytest.raises(sp_fx.CaptureError, match=r"writes over a tensor of the model that is no buffer.*stand_ins.py:\d+"):
        sp_fx.transform(model)
    assert not model.count


@torch.fx.wrap
def wrapped(h, pos):
    kept = h
    h += pos
    with torch.no_grad():
        scale = F.relu(h).mean()
    return kept * scale if isinstance(h, torch.Tensor) else h


def test_functions_that_are_wrapped_are_seen_likewise():
    model, x = net(lambda m, x: F.relu(wrapped(m.a(x), m.pos))), batch()
    explainer = sp_fx.transform(model, rules=sp_fx.Rules(relu=None))
    y = x.clone().requires_grad_()
    expected = torch.autograd.grad(model(y)[:, 1].sum(), y)[0]
    assert torch.equal(explainer(x), model(x)) and torch.allclose(explainer.pullback(x, 1), expected, atol=1e-6)


def test_refusals_name_the_construct():
    def hooks(m, x):
        h = x * 2
        h.register_hook(lambda g: -g)
        return h

    def asks(m, x):
        return (x * 2).relu() if (x * 2).requires_grad else x

    def sets(m, x):
        h = x * 2
        h[:, 0] = 0
        return h

    class Net(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            return self.body(self, x)

    texts = {hooks: "hooks the gradient", asks: "branches on the attribute requires_grad", sets: "sets items of a tensor"}
    for body, text in texts.items():
        with pytest.raises(sp_fx.CaptureError, match=rf"cannot trace Net: the forward {text}.*test_capture_stand_ins.py:\d+"):
            sp_fx.transform(Net(body), tracer="fx")
