"""Calls in place, normalised. References: what the model computes itself, its own autograd, and the same program out of place.

A program is a list of statements over named tensors, aliases and views of each other, drawn from a seed. It is run in two
spellings: in place, as written, and out of place, where a tensor is a base and a path of views, and a write makes a new base.
"""

import copy
import operator
import pickle
import random
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import sp_fx
from helpers import fill
from sp_fx.analysis.calls import writes
from sp_fx.gates.dual_path import dual_path
from sp_fx.gates.rules import KINDS
from sp_fx.rewrite.prepared.out_of_place import normalise

PLAIN = sp_fx.Rules(**{kind: None for kind in KINDS})
TRACERS = ["fx", "export"]

# -- random programs ----------------------------------------------------------------------------------------------------

BATCH, SHAPE = 3, (4, 6)

# Views: how one is taken of a tensor, and the tensor that `new` in its place makes of `old`.
VIEWS = {
    "slice": (
        lambda x, dim, start, end: x[(slice(None),) * dim + (slice(start, end),)],
        lambda old, new, dim, start, end: torch.slice_scatter(old, new, dim, start, end),
    ),
    "select": (lambda x, dim, i: x.select(dim, i), lambda old, new, dim, i: torch.select_scatter(old, new, dim, i)),
    "transpose": (lambda x, a, b: x.transpose(a, b), lambda old, new, a, b: new.transpose(a, b)),
    "reshape": (lambda x, shape, before: x.reshape(shape), lambda old, new, shape, before: new.reshape(before)),
    "view": (lambda x, shape, before: x.view(shape), lambda old, new, shape, before: new.reshape(before)),
    "flatten": (lambda x, before: x.flatten(1), lambda old, new, before: new.reshape(before)),
    "unsqueeze": (lambda x, dim: x.unsqueeze(dim), lambda old, new, dim: new.squeeze(dim)),
    "chunk": (
        lambda x, dim, i, start, end: x.chunk(2, dim)[i],
        lambda old, new, dim, i, start, end: torch.slice_scatter(old, new, dim, start, end),
    ),
    "expand": (lambda x, sizes: x.unsqueeze(1).expand(sizes), None),  # nobody may write over it
}

# One tensor: the call in place, and what it writes.
ONE = {
    "relu": (lambda m, x: x.relu_(), F.relu),
    "F.relu": (lambda m, x: F.relu(x, inplace=True), F.relu),
    "F.relu_": (lambda m, x: F.relu_(x), F.relu),
    "module": (lambda m, x: m.act(x), F.relu),
    "leaky": (lambda m, x: F.leaky_relu(x, 0.1, True), lambda x: F.leaky_relu(x, 0.1)),
    "silu": (lambda m, x: F.silu(x, inplace=True), F.silu),
    "clamp": (lambda m, x: x.clamp_(min=-0.2, max=0.5), lambda x: x.clamp(-0.2, 0.5)),
    "sigmoid": (lambda m, x: x.sigmoid_(), torch.sigmoid),
    "scale": (lambda m, x: x.mul_(0.7), lambda x: x * 0.7),
    "shift": (lambda m, x: augmented(x, 0.1), lambda x: x + 0.1),
    "negate": (lambda m, x: x.neg_(), torch.neg),
    "zero": (lambda m, x: x.zero_(), torch.zeros_like),
    "fill": (lambda m, x: x.fill_(0.3), lambda x: torch.full_like(x, 0.3)),
    "swish": (lambda m, x: x.mul_(torch.sigmoid(x)), lambda x: x * torch.sigmoid(x)),
    "mask": (lambda m, x: x.masked_fill_(x > 0.4, 0.2), lambda x: x.masked_fill(x > 0.4, 0.2)),
}
TWO = {
    "add": (lambda x, y: x.add_(y), lambda x, y: x + y),
    "sub": (lambda x, y: x.sub_(y, alpha=0.5), lambda x, y: torch.sub(x, y, alpha=0.5)),
    "augmented": (lambda x, y: augmented(x, y), lambda x, y: x + y),
    "setitem": (lambda x, y: assign(x, y), lambda x, y: y * 1.0),
    "mul": (lambda x, y: x.mul_(y), lambda x, y: x * y),
    "copy": (lambda x, y: x.copy_(y), lambda x, y: y.expand_as(x) * 1.0),
    "where": (lambda x, y: x.masked_fill_(y > 0.2, 0.0), lambda x, y: x.masked_fill(y > 0.2, 0.0)),
}
NEW = {
    "relu": lambda m, x: F.relu(x),
    "gelu": lambda m, x: F.gelu(x),
    "silu": lambda m, x: x * torch.sigmoid(x),
    "linear": lambda m, x: m.lin(x),
    "zeros": lambda m, x: torch.zeros_like(x),
    "double": lambda m, x: x * 2,
    "clone": lambda m, x: x.clone(),
    "pool": lambda m, x: F.max_pool1d(x, 3, 1, 1),
}
SAME = {"alias": lambda m, x: x, "identity": lambda m, x: m.identity(x), "dropout": lambda m, x: m.dropout(x)}


def augmented(x, y):
    """`x += y`, which a proxy of torch.fx makes `x = x + y`."""
    return x.add_(y) if isinstance(x, fx.Proxy) else operator.iadd(x, y)


def assign(x, y):
    """`x[:] = y`, which a proxy of torch.fx refuses."""
    return x[:].copy_(y) if isinstance(x, fx.Proxy) else operator.setitem(x, slice(None), y)


class Tensors:
    """The named tensors of a run in place."""

    def __init__(self, model, x):
        self.model, self.of = model, {"x": x}

    def get(self, name):
        return self.of[name]

    def new(self, name, value):
        self.of[name] = value

    def view(self, name, source, kind, args, copies):
        self.of[name] = VIEWS[kind][0](self.of[source], *args)

    def same(self, name, source, how):
        self.of[name] = SAME[how](self.model, self.of[source])

    def write(self, name, how, other):
        if other is None:
            ONE[how][0](self.model, self.of[name])
        else:
            TWO[how][0](self.of[name], self.of[other])


class Values:
    """The same out of place: of a name its base and the views that lead from there, and the value of each base."""

    def __init__(self, model, x):
        self.model, self.of, self.bases = model, {"x": ("x", ())}, {"x": x}

    def get(self, name):
        base, path = self.of[name]
        return self.along(base, path)

    def along(self, base, path):
        value = self.bases[base]
        for kind, args in path:
            value = VIEWS[kind][0](value, *args)
        return value

    def new(self, name, value):
        self.of[name], self.bases[name] = (name, ()), value

    def view(self, name, source, kind, args, copies):
        if copies:
            self.new(name, VIEWS[kind][0](self.get(source), *args))
        else:
            base, path = self.of[source]
            self.of[name] = base, (*path, (kind, args))

    def same(self, name, source, how):
        self.of[name] = self.of[source]

    def write(self, name, how, other):
        value = ONE[how][1](self.get(name)) if other is None else TWO[how][1](self.get(name), self.get(other))
        base, path = self.of[name]
        for at in range(len(path) - 1, -1, -1):
            kind, args = path[at]
            value = VIEWS[kind][1](self.along(base, path[:at]), value, *args)
        self.bases[base] = value


class Program(nn.Module):
    def __init__(self, statements, outputs, spelling):
        super().__init__()
        self.lin, self.act, self.identity, self.dropout = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Identity(), nn.Dropout(0.5)
        self.statements, self.outputs, self.spelling = statements, outputs, spelling
        g = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g) / 2)
        self.double().eval()

    def forward(self, x):
        env = self.spelling(self, x)
        for statement in self.statements:
            run(self, env, statement)
        return torch.cat([env.get(name).unsqueeze(-1).flatten(1) for name in self.outputs], 1)


def run(model, env, statement):
    kind, name, *rest = statement
    if kind == "new":
        how, source, size = rest
        value = env.get(source)
        env.new(name, F.layer_norm(value, (size,)) if how == "norm" else NEW[how](model, value))
    elif kind == "sum":
        env.new(name, env.get(rest[0]) + env.get(rest[1]))
    elif kind == "view":
        env.view(name, *rest)
    elif kind == "same":
        env.same(name, *rest)
    else:
        env.write(name, *rest)


def free(shape):
    """A shape for any batch."""
    return (-1, *shape[1:])


def random_view(rng, x):
    kind = rng.choice(list(VIEWS))
    dim = rng.randrange(1, x.dim()) if x.dim() > 1 else 0
    if kind == "slice":
        start = rng.randrange(x.shape[dim])
        return kind, (dim, start, rng.randrange(start + 1, x.shape[dim] + 1))
    if kind == "select":
        return kind, (dim, rng.randrange(x.shape[dim]))
    if kind == "transpose":
        return kind, (dim, rng.randrange(1, x.dim()) if x.dim() > 1 else 0)
    if kind in ("reshape", "view"):
        rest = x[0].numel()
        sizes = rng.choice([(rest,), *((n, rest // n) for n in (2, 3, 4, 6) if rest % n == 0)])
        return kind, ((-1, *sizes), free(x.shape))
    if kind == "flatten":
        return kind, (free(x.shape),)
    if kind == "unsqueeze":
        return kind, (rng.randrange(1, x.dim() + 1),)
    if kind == "chunk":
        i, half = rng.randrange(2), -(-x.shape[dim] // 2)
        return kind, (dim, i, i * half, min((i + 1) * half, x.shape[dim]))
    return kind, ((-1, 2, *x.shape[1:]),)


def random_statement(rng, env, name):
    names = list(env.of)
    source = rng.choice(names)
    x = env.of[source]
    draw = rng.random()
    if draw < 0.22 and x.dim() > 1:
        kind, args = random_view(rng, x)
        return ("view", name, source, kind, args, None)
    if draw < 0.3:
        return ("same", name, source, rng.choice(list(SAME)))
    if draw < 0.5:
        how = rng.choice([*NEW, "norm"])
        return ("new", name, how, source, x.shape[-1])
    alike = [n for n in names if env.of[n].shape == x.shape]
    if draw < 0.57:
        return ("sum", name, source, rng.choice(alike))
    if draw < 0.8:
        return ("write", source, rng.choice(list(ONE)), None)
    return ("write", source, rng.choice(list(TWO)), rng.choice(alike))


def run_all(statements, x):
    """The tensors after the statements, where the model's own forward and backward run; None where they do not."""
    env = Tensors(Program([], [], Tensors), x.clone().requires_grad_() * 1.0)
    try:
        for statement in statements:
            run(env.model, env, statement)
        sum(t.sum() for t in env.of.values()).backward()
    except (RuntimeError, IndexError):
        return None
    return env


def random_program(seed):
    """Statements that the model takes, one after another, and the names of its outputs."""
    rng = random.Random(seed)
    x = torch.randn(BATCH, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    statements = [("new", "h", "linear", "x", 6)]
    env = run_all(statements, x)
    while len(statements) < 12:
        statement = random_statement(rng, env, f"v{len(statements)}")
        kind, name, *rest = statement
        if kind == "new" and (rest[0] == "pool" and env.of[rest[1]].dim() != 3):
            continue
        if kind == "write" and 0 in env.of[name].stride():  # expanded
            continue
        after = run_all([*statements, statement], x)
        if after is None or after.of[name].numel() > 500 or after.of[name].abs().max() > 1e3:
            continue
        if kind == "view":
            one, two = (after.of[n].untyped_storage().data_ptr() for n in (name, rest[0]))
            statement = (*statement[:-1], one != two)
        statements.append(statement)
        env = after
    outputs = rng.sample(list(env.of), min(3, len(env.of)))
    return statements, [*outputs, list(env.of)[-1]]


def explained(model, tracer, x, rules):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sp_fx.transform(model, rules=rules, tracer=tracer, example_inputs=x)


def map_of(explainer, x, u):
    try:
        return explainer.pullback(x, u)
    except ValueError as error:  # out of place, what was zeroed depends on nothing
        assert "does not depend on the inputs" in str(error)
        return torch.zeros_like(x)


def check_program(seed, tracer):
    statements, outputs = random_program(seed)
    model, other = (Program(statements, outputs, spelling) for spelling in (Tensors, Values))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, *SHAPE, dtype=torch.float64, generator=g)
    with torch.no_grad():
        expected = model(x.clone())
        assert torch.allclose(other(x.clone()), expected, 1e-12, 1e-12)  # the two spellings are one function
    u = torch.randn(expected.shape, dtype=torch.float64, generator=g)
    before = x.clone()
    plain, soft = explained(model, tracer, x, PLAIN), explained(model, tracer, x, sp_fx.Rules())
    with torch.no_grad():
        assert torch.equal(plain(x), expected) and torch.equal(soft(x), expected)
    reference = x.clone().requires_grad_()
    try:
        output = model(reference * 1.0)
        (gradient,) = torch.autograd.grad(output, reference, u, allow_unused=True)
    except RuntimeError:  # the model's own backward does not run
        return "no gradient"
    if gradient is None:
        return "constant"
    assert torch.equal(x, before)
    functional = explained(other, "fx", x, sp_fx.Rules())
    assert torch.allclose(map_of(plain, x, u), gradient, 1e-6, 1e-9)
    assert torch.allclose(map_of(soft, x, u), map_of(functional, x, u), 1e-6, 1e-9)
    return "checked"


def check_programs(tracer, seeds):
    results = Counter(check_program(seed, tracer) for seed in seeds)
    assert results["checked"] >= 0.9 * len(seeds)


@pytest.mark.parametrize("tracer, number", [("fx", 24), ("export", 4)])
def test_random_programs(tracer, number):
    check_programs(tracer, range(number))


@pytest.mark.slow
@pytest.mark.parametrize("tracer, number", [("fx", 2600), ("export", 400)])
def test_many_random_programs(tracer, number):
    check_programs(tracer, range(100, 100 + number))


# -- one kind at a time -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A linear layer, a function, another layer; `f` may take the module for its buffer and its inner modules."""

    def __init__(self, f, **modules):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.first, self.last, self.f = nn.Linear(6, 6), nn.Linear(6, 3), f
        self.register_buffer("state", torch.ones(6))
        for name, module in modules.items():
            self.add_module(name, module)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=g) / 2)
        self.double().eval()

    def forward(self, x):
        return self.last(self.f(self, self.first(x)))


def example(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def in_place_and_not(f, g, tracer, **modules):
    """Explainers of a network with `f` and of one with `g`, which is the same out of place, on an example."""
    x = example(3, 6)
    nets = [Net(h, **modules) for h in (f, g)]
    one, two = (explained(net, by, x, sp_fx.Rules()) for net, by in zip(nets, (tracer, "fx")))  # an export takes a second
    with torch.no_grad():
        assert torch.equal(one(x), nets[0](x)) and torch.allclose(one(x), nets[1](x), 1e-12)
    return one, two, x


def swish_of_relu(m, h):
    F.relu_(h)
    return h * torch.sigmoid(h)


def transposed(m, h):
    h.t_()
    h.relu_()
    return h.t()


def detached(m, h):
    a = h * 2
    h.detach_()
    return a + h.relu_()


def rows(m, h):
    z = torch.zeros(6, 3, dtype=h.dtype)
    for i in range(6):
        z[i].copy_(h[:, 5 - i])
    return F.relu(z).t()


def filled(m, h):
    z = torch.empty_like(h)
    z.copy_(h)
    z[:, 1:3].relu_()
    return F.gelu(z)


def gated(m, h):
    h.mul_((h > 0).to(h.dtype))
    h.mul_(0.7)
    return h


def normed(m, h):
    y = F.layer_norm(h, (6,))
    y.add_(h)
    y[:, :2].mul_(2)
    return y


def restricted(m, h):
    a, b = h.chunk(2, 1)
    return torch.cat([a.clone().relu_(), b], 1)


def cast(m, h):
    h.double().mul_(2)  # of that dtype already
    return h.to(torch.float64).relu_() + h.float().neg_().double()


FORMS = {
    "a statement before a written gate": (swish_of_relu, lambda m, h: (r := F.relu(h)) * torch.sigmoid(r)),
    "a change of shape": (transposed, lambda m, h: F.relu(h)),
    "detach_": (detached, lambda m, h: h * 2 + F.relu(h.detach())),
    "a buffer filled by rows": (rows, lambda m, h: F.relu(h.flip(1))),
    "a gate on part of a buffer": (filled, lambda m, h: F.gelu(torch.cat([h[:, :1], F.relu(h[:, 1:3]), h[:, 3:]], 1))),
    "a written gate": (gated, lambda m, h: F.relu(h) * 0.7),
    "after a norm": (normed, lambda m, h: (F.layer_norm(h, (6,)) + h) * torch.tensor([2.0] * 2 + [1.0] * 4)),
    "casts": (cast, lambda m, h: F.relu(2 * h) - F.relu(2 * h).float().double()),
    "halves": (restricted, lambda m, h: torch.cat([F.relu(h[:, :3]), h[:, 3:]], 1)),
}


@pytest.mark.parametrize("tracer, form", [(t, f) for t in TRACERS for f in FORMS if (t, f) != ("export", "detach_")])
def test_maps_are_those_of_the_same_out_of_place(form, tracer):
    one, two, x = in_place_and_not(*FORMS[form], tracer)
    for target in (0, 2):
        assert torch.allclose(one.pullback(x, target), two.pullback(x, target), 1e-9, 1e-12)


@pytest.mark.parametrize("tracer", TRACERS)
def test_dtype_stays_that_of_what_is_written_over(tracer):
    class Halves(nn.Module):
        def forward(self, x, y):
            h = x.half()
            h.add_(y)  # float32
            return h.relu(), h[:, :2].clone().mul_(y[:, :2])

    x, y = example(2, 4).float(), example(2, 4).float()
    expected = Halves()(x, y)
    for found, wanted in zip(explained(Halves(), tracer, (x, y), sp_fx.Rules())(x, y), expected):
        assert found.dtype == torch.float16 and torch.equal(found, wanted)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, h: h.long().add_(0.5),
        lambda m, h: h[:1].add_(h),
        lambda m, h: h[:1].expand(3, 6).mul_(2),
        lambda m, h: (z := torch.zeros_like(h).long(), z[:1].add_(h), z)[-1],
    ],
)
def test_what_the_model_refuses_the_explainer_refuses(call):
    net, x = Net(call), example(3, 6)
    with pytest.raises(RuntimeError):
        net(x)
    with pytest.raises(RuntimeError):
        explained(net, "fx", None, sp_fx.Rules())(x)


@pytest.mark.parametrize("tracer", TRACERS)
def test_strides_stay_those_of_the_model(tracer):
    class Strided(nn.Module):
        def forward(self, x):
            a = x.relu()
            a.add_(1)
            b = a.transpose(1, 2)
            b.mul_(x.transpose(1, 2).contiguous())
            c = a[:, :, ::2]
            c.add_(1)
            return a, b, c, a[:, ::2].neg_()

    for x in (example(2, 4, 6), example(2, 6, 4).mT, example(2, 8, 6)[:, ::2]):
        explainer = explained(Strided(), tracer, x if tracer == "export" else None, PLAIN)
        for found, wanted in zip(explainer(x), Strided()(x)):
            assert torch.equal(found, wanted) and found.stride() == wanted.stride()


@pytest.mark.parametrize("tracer", TRACERS)
def test_inputs_and_buffers_are_not_written_over(tracer):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(2))

        def forward(self, x):
            self.calls[:1].add_(1)
            x["a"].mul_(2)
            x["b"][:, :1].relu_()
            return F.relu(x["a"]) + x["b"] + self.calls[0] + self.calls.sum()

    model, x = Counting(), {"a": example(2, 3), "b": example(2, 3)}
    given = {key: value.clone() for key, value in x.items()}
    expected = Counting()({key: value.clone() for key, value in x.items()})
    explainer = explained(model, tracer, (x,), sp_fx.Rules())
    assert torch.equal(explainer(x), expected) and torch.equal(explainer(x), expected)
    assert all(torch.equal(x[key], given[key]) for key in x) and not model.calls.any() and not explainer.calls.any()
    assert str(explainer.report()).count("the forward writes over calls") == 1


def test_outputs_given_by_name():
    """Where nothing requires grad: else PyTorch itself refuses them, and so does an export."""

    def into(m, h):
        z = torch.zeros_like(h)
        torch.mul(h, 2, out=z)
        return torch.add(z, 1, out=z[:, :]) + z

    net, x = Net(into), example(3, 6)
    with torch.no_grad():
        explainer = explained(net.requires_grad_(False), "fx", x, sp_fx.Rules())
        assert torch.equal(explainer(x), net(x))


def copies(explainer):
    return [n for n in explainer.graph.nodes if getattr(n.target, "__name__", "") == "copied"]


@pytest.mark.parametrize("tracer", TRACERS)
def test_a_loop_that_fills_a_buffer_copies_it_never(tracer):
    explainer = explained(Net(rows), tracer, example(3, 6), sp_fx.Rules())
    assert not copies(explainer) and [s.kind for s in explainer.report().of("rewritten")] == ["relu"]

    def read_between(m, h):
        z = torch.zeros_like(h)
        z[:, 0].copy_(h[:, 0])
        y = F.relu(z)
        z[:, 1].copy_(h[:, 1])
        z[:, 2].copy_(h[:, 2])
        return y + z

    assert len(copies(explained(Net(read_between), tracer, example(3, 6), sp_fx.Rules()))) == 1


def normalised(graph, root=None):
    notes = normalise(root or nn.Module(), graph)
    assert not [n for n in graph.nodes if writes(n) and n.args[0].op in ("placeholder", "get_attr")]
    return fx.GraphModule(root or nn.Module(), graph), notes


def test_items_that_are_assigned():
    """As a tracer that sees `z[:, 1:] = x[:, :-1]` records it."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    z = graph.call_function(torch.zeros_like, (x,))
    graph.call_function(operator.setitem, (z, (slice(None), slice(1, None)), graph.call_function(operator.getitem,
                                                                          (x, (slice(None), slice(None, -1))))))  # fmt: skip
    graph.call_function(operator.setitem, (x, 0, 5.0))
    graph.output((z, x))
    module, _ = normalised(graph)
    x = example(2, 3)
    given = x.clone()
    shifted, written = module(x)
    assert torch.equal(shifted, F.pad(x, (1, 0))[:, :-1]) and torch.equal(x, given) and (written[0] == 5).all()


def test_numbers_are_not_written_over():
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_method("size", (x, 0))
    more = graph.call_function(operator.iadd, (size, 1))
    graph.output((size, more))
    assert normalised(graph)[0](example(2, 3)) == (2, 3)


class Marked(nn.Module):
    """An identity that is called with what its module returned, and with what the module got."""

    def forward(self, result, *inputs):
        return result


def test_marks_of_modules_are_what_they_mark():
    root = nn.Module()
    for name in ("one", "pair"):
        root.add_module(name, Marked())
    graph = fx.Graph()
    x = graph.placeholder("x")
    h, z = graph.call_function(torch.mul, (x, 2)), graph.call_function(torch.zeros_like, (x,))
    one = graph.call_module("one", (h, z))
    graph.call_method("add_", (h, 1))  # the mark is `h`
    graph.call_method("add_", (z, one))
    view = graph.call_function(operator.getitem, (z, 0))
    graph.call_method("add_", (view, 1))
    pair = graph.call_module("pair", ((one, z), x))
    graph.call_method("mul_", (z, 2))
    second = graph.call_function(operator.getitem, (pair, 1))
    graph.call_method("sub_", (second, 1))
    graph.output((h, one, z, pair, second))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sp_fx.analysis.aliasing.lets_through", lambda module: isinstance(module, Marked))
        module, _ = normalised(graph, root)
    x = example(2, 3)
    h = 2 * x + 1
    z = (h + torch.tensor([[1.0], [0.0]])) * 2 - 1
    found = module(x)
    for value, wanted in zip((*found[:3], *found[3], found[4]), (h, h, z, h, z, z)):
        assert torch.equal(value, wanted)


def test_a_module_that_gives_a_view_runs_once():
    def f(m, h):
        flat = m.flat(h.view(3, 2, 3))
        flat[:, :2].relu_()
        return h + flat

    net, x = Net(f, flat=nn.Flatten()), example(3, 6)
    explainer, calls = explained(net, "fx", None, sp_fx.Rules()), []
    explainer.flat.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(explainer(x), net(x)) and len(calls) == 1


def test_random_numbers_are_the_models():
    def f(m, h):
        y = h * 1
        noisy = F.dropout(y, 0.5, True, True)
        return noisy + torch.empty_like(y).uniform_()

    net, x = Net(f), example(3, 6)
    explainer = explained(net, "fx", None, sp_fx.Rules())
    torch.manual_seed(0)
    expected = net(x)
    torch.manual_seed(0)
    assert torch.equal(explainer(x), expected)


def test_copies_and_cuts():
    def f(m, h):
        z = torch.zeros_like(h)
        z[:, :3].copy_(m.act(h[:, :3]))
        h[:, 3:].add_(1)
        return F.gelu(z + h)

    net, x = Net(f, act=nn.ReLU(inplace=True)), example(3, 6)
    explainer = explained(net, "fx", None, sp_fx.Rules())
    expected = explainer.pullback(x, 0)
    for other in (copy.deepcopy(explainer), pickle.loads(pickle.dumps(explainer))):
        assert torch.equal(other(x), net(x)) and torch.equal(other.pullback(x, 0), expected)
    stem, tail = explainer.split("act")
    assert torch.equal(stem(x), F.relu(net.first(x)[:, :3])) and torch.equal(tail(stem(x), x), net(x))
    v = explainer.pullback(x, 0, wrt="first")
    assert torch.allclose(torch.autograd.grad(net.first(z := x.clone().requires_grad_()), z, v)[0], expected, 1e-9)


CALLS = {
    "linear": lambda x: dual_path("linear", x, torch.eye(6, dtype=x.dtype), torch.ones(6, dtype=x.dtype), tau="frozen"),
    "instance norm": lambda x: dual_path("instance_norm", x, None, None, tau="frozen", eps=1e-5),
    "attention": lambda x: dual_path("attention", x[None], x[None], x[None], None, tau=1.0),
    "mix": lambda x: dual_path("mix", x.softmax(-1).mT, None, x, tau=1.0),
    "einsum": lambda x: dual_path("mix", x, None, x, tau=1.0, form="bij,bik->bkj"),
    "written": lambda x: dual_path("written", x, x * torch.sigmoid(x), tau=1.0, row="silu"),
    "empty": lambda x: dual_path("relu", x[:0], tau=1.0),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_a_gate_returns_may_be_written_over(call):
    """By a hook, say. Not what a row of the table keeps for its adjoint, as max pooling does, which autograd refuses."""
    x = example(2, 4, 6).requires_grad_()
    y = CALLS[call](x)
    expected = torch.autograd.grad(y.sum() * 2, x)[0]
    y = CALLS[call](x)
    doubled = y.detach() * 2
    y.mul_(2)
    assert torch.equal(y, doubled) and torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize("tracer", ["fx", "export"])
def test_a_buffer_written_in_part_and_then_whole(tracer):
    """A copy of a part has the form of the part; what is made of the whole buffer for that call has not."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("kept", torch.full((6,), 0.2))

        def forward(self, x):
            h = self.layer(x)
            self.kept[:3].copy_(h[:, :3].mean(0))
            self.kept.add_(h.sum(0) * 0.1)
            return torch.relu(h + self.kept)

    model, x = fill(Parts()), torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    explainer = sp_fx.transform(copy.deepcopy(model), tracer=tracer, example_inputs=x)
    assert torch.equal(explainer(x), model(x))
