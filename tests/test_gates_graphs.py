"""Graph networks: sums by an index are linear, softmaxes over the edges of a node are attention, the sample is a graph.

The oracle is a second spelling in float64 that knows no index: it goes through the edges one by one, in Python, and holds a ReLU
by its mask and the weights of attention as constants. Its gradient is autograd's. The networks are written in plain torch, and
are those of torch_geometric where that is installed.
"""

import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill, relative

FROZEN = sp_fx.Rules.frozen()
EXACT = 1e-12


def explain(model, example=None, rules=FROZEN, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sp_fx.transform(model, example_inputs=example, rules=rules, **options)


def graph(nodes, edges, seed=0, features=5):
    """x [nodes, features] and edge_index [2, edges]: with edges that come twice, loops and nodes without any, by chance."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(nodes, features, generator=g, dtype=torch.float64)
    index = torch.randint(max(nodes, 1), (2, edges), generator=g)
    return x, index


# -- the oracle: edge by edge -----------------------------------------------------------------------------------------------


def with_loops(index, nodes):
    return [(s, d) for s, d in index.T.tolist() if s != d] + [(n, n) for n in range(nodes)]


def relu(h):
    return h * (h > 0).detach()


def zeros(nodes, *shape):
    return [torch.zeros(shape, dtype=torch.float64) for _ in range(nodes)]


def gcn(p, x, index, weight=None):
    """Kipf and Welling: loops of weight 1 but where there are some, whose last weight stays."""
    nodes, loops, edges = len(x), {}, []
    for i, (s, d) in enumerate(index.T.tolist()):
        w = torch.ones((), dtype=torch.float64) if weight is None else weight[i]
        if s == d:
            loops[s] = w
        else:
            edges.append((s, d, w))
    edges += [(n, n, loops.get(n, torch.ones((), dtype=torch.float64))) for n in range(nodes)]
    degree = [sum((w for _, d, w in edges if d == n), torch.zeros((), dtype=torch.float64)) for n in range(nodes)]
    h, out = x @ p["weight"].T, zeros(nodes, len(p["weight"]))
    for s, d, w in edges:
        out[d] = out[d] + degree[s] ** -0.5 * w * degree[d] ** -0.5 * h[s]
    return torch.stack(out) + p["bias"]


def attended(scores, values, edges, nodes, soften=lambda s: s, concat=True):
    """The values [E, H, C] of the edges at each node, mixed by the softmax of their scores [E, H], a constant."""
    out = []
    for n in range(nodes):
        at = [i for i, (_, d) in enumerate(edges) if d == n]
        if not at:
            out.append(torch.zeros(values[0].shape if len(values) else (), dtype=torch.float64))
            continue
        w = torch.softmax(soften(torch.stack([scores[i] for i in at])), 0).detach()
        out.append(sum(w[k, :, None] * values[i] for k, i in enumerate(at)))
    out = torch.stack(out)
    return out.flatten(1) if concat else out.mean(1)


def gat(p, x, index, soften=lambda s: s, concat=True):
    h, edges = (x @ p["weight"].T).view(len(x), *p["source"].shape), with_loops(index, len(x))
    a, b = (h * p["source"]).sum(-1), (h * p["target"]).sum(-1)
    scores = [F.leaky_relu(a[s] + b[d], 0.2) for s, d in edges]
    return attended(scores, [h[s] for s, _ in edges], edges, len(x), soften, concat) + p["bias"]


def gatv2(p, x, index, concat=True):
    left, right = ((x @ p[k].T + p[f"{k}_bias"]).view(len(x), *p["att"].shape) for k in ("left", "right"))
    edges = with_loops(index, len(x))
    scores = [(F.leaky_relu(left[s] + right[d], 0.2) * p["att"]).sum(-1) for s, d in edges]
    return attended(scores, [left[s] for s, _ in edges], edges, len(x), concat=concat) + p["bias"]


def sage(p, x, index):
    sums, counts = zeros(len(x), x.shape[1]), [0] * len(x)
    for s, d in index.T.tolist():
        sums[d], counts[d] = sums[d] + x[s], counts[d] + 1
    mean = torch.stack([total / max(count, 1) for total, count in zip(sums, counts)])
    return mean @ p["neighbours"].T + p["bias"] + x @ p["root"].T


def gin(p, x, index):
    sums = zeros(len(x), x.shape[1])
    for s, d in index.T.tolist():
        sums[d] = sums[d] + x[s]
    h = torch.stack(sums) + (1 + p["eps"]) * x
    return relu(h @ p["first"].T + p["first_bias"]) @ p["second"].T + p["second_bias"]


LOOPED = {"gcn": gcn, "gat": gat, "gatv2": gatv2, "sage": sage, "gin": gin}


def maps_of(function, *inputs, u):
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    floating = [t for t in leaves if t.is_floating_point()]
    grads = torch.autograd.grad(function(*leaves), floating, u, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(floating, grads)]


# -- the same in plain torch, by indices ------------------------------------------------------------------------------------


def summed(messages, to, nodes, how):
    """Messages [E, ...] added up at the nodes that `to` [E] names."""
    out = messages.new_zeros(nodes, *messages.shape[1:])
    if how == "index_add":
        return out.index_add(0, to, messages)
    if how == "index_put":
        return out.index_put((to,), messages, accumulate=True)
    index = to.view(-1, *[1] * (messages.dim() - 1)).expand_as(messages)
    if how == "scatter_reduce":
        return out.scatter_reduce(0, index, messages, "sum")
    return out.scatter_add_(0, index, messages)


def looped_index(index, nodes):
    kept = index[:, index[0] != index[1]]
    return torch.cat([kept, torch.arange(nodes).repeat(2, 1)], 1)


class Layer(nn.Module):
    def __init__(self, how="scatter_add", **sizes):
        super().__init__()
        self.how = how
        for name, size in sizes.items():
            setattr(self, name, nn.Parameter(torch.empty(size)))

    @property
    def parts(self):
        return {name: p.detach().double() for name, p in self.named_parameters(recurse=False)}


class GCN(Layer):
    def forward(self, x, index):
        source, to = looped_index(index, x.shape[0])
        degree = summed(torch.ones(to.shape[0], dtype=x.dtype), to, x.shape[0], self.how)
        norm = degree.pow(-0.5)
        messages = (norm[source] * norm[to])[:, None] * (x @ self.weight.t()).index_select(0, source)
        return summed(messages, to, x.shape[0], self.how) + self.bias


def group_softmax(scores, to, nodes, how, form="largest"):
    """Over the edges [E, H] that end at one node; written in several ways."""
    if form == "bare":
        e = scores.exp()
    else:
        index = to[:, None].expand_as(scores)
        largest = scores.detach().new_zeros(nodes, scores.shape[1]).scatter_reduce(0, index, scores, "amax", include_self=False)
        e = (scores - largest.index_select(0, to)).exp()
    total = summed(e, to, nodes, how)
    if form == "logarithm":
        return (e.log() - total.log()[to]).exp()
    if form == "inverse":
        return e * (1 / (total + 1e-16))[to]
    if form == "gather":
        return e / total.gather(0, to[:, None].expand_as(e))
    return e / (total + 1e-16).index_select(0, to)


class GAT(Layer):
    form = "largest"

    def forward(self, x, index):
        source, to = looped_index(index, x.shape[0])
        h = (x @ self.weight.t()).view(-1, *self.source.shape)
        scores = (h * self.source).sum(-1)[source] + (h * self.target).sum(-1)[to]
        w = group_softmax(F.leaky_relu(scores, 0.2), to, x.shape[0], self.how, self.form)
        return summed(w[..., None] * h[source], to, x.shape[0], self.how).flatten(1) + self.bias


class GATv2(Layer):
    def forward(self, x, index):
        source, to = looped_index(index, x.shape[0])
        left, right = ((x @ w.t() + b).view(-1, *self.att.shape) for w, b in
                       ((self.left, self.left_bias), (self.right, self.right_bias)))  # fmt: skip
        scores = (F.leaky_relu(left[source] + right[to], 0.2) * self.att).sum(-1)
        w = group_softmax(scores, to, x.shape[0], self.how)
        return summed(w.unsqueeze(-1) * left[source], to, x.shape[0], self.how).flatten(1) + self.bias


class SAGE(Layer):
    def forward(self, x, index):
        total = summed(x[index[0]], index[1], x.shape[0], self.how)
        count = summed(torch.ones(index.shape[1], dtype=x.dtype), index[1], x.shape[0], self.how)
        return (total / count.clamp(min=1)[:, None]) @ self.neighbours.t() + self.bias + x @ self.root.t()


class GIN(Layer):
    def forward(self, x, index):
        h = summed(x[index[0]], index[1], x.shape[0], self.how) + (1 + self.eps) * x
        return (h @ self.first.t() + self.first_bias).relu() @ self.second.t() + self.second_bias


SIZES = {
    "gcn": (GCN, lambda a, b: {"weight": (b, a), "bias": (b,)}),
    "gat": (GAT, lambda a, b: {"weight": (b, a), "source": (2, b // 2), "target": (2, b // 2), "bias": (b,)}),
    "gatv2": (GATv2, lambda a, b: {"left": (b, a), "left_bias": (b,), "right": (b, a), "right_bias": (b,), "att": (2, b // 2),
                                   "bias": (b,)}),
    "sage": (SAGE, lambda a, b: {"neighbours": (b, a), "root": (b, a), "bias": (b,)}),
    "gin": (GIN, lambda a, b: {"first": (6, a), "first_bias": (6,), "second": (b, 6), "second_bias": (b,), "eps": (1,)}),
}  # fmt: skip


class Two(nn.Module):
    """Two layers with a ReLU between: of nodes, or with a vector of batches [N] of graphs."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x, index):
        return self.second(self.first(x, index).relu(), index)


def net(kind, how="scatter_add"):
    layer, sizes = SIZES[kind]
    return fill(Two(layer(how, **sizes(5, 8)), layer(how, **sizes(8, 4)))).double()


def oracle(kind, model):
    first, second = model.first.parts, model.second.parts
    return lambda x, index: LOOPED[kind](second, relu(LOOPED[kind](first, x, index)), index)


def is_frozen_map(explainer, function, inputs, seed=3):
    y = function(*inputs)
    u = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.allclose(explainer(*inputs), y, rtol=0, atol=1e-12)
    found = explainer.pullback(inputs, u)
    expected = maps_of(function, *inputs, u=u)
    for a, b in zip([m for m in found if m is not None], expected, strict=True):
        assert a.shape == b.shape and float((a - b).norm()) <= EXACT * max(float(b.norm()), 1.0)


# -- frozen maps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("how", ["scatter_add", "index_add", "index_put", "scatter_reduce"])
def test_frozen_maps_are_the_oracles(kind, how):
    model, inputs = net(kind, how), graph(7, 16)
    explainer = explain(model, inputs)
    assert not explainer.report().of("NOT REWRITTEN"), explainer.report()
    attention = [site for site in explainer.report().sites if site.kind == "attention"]
    assert len(attention) == (2 if kind.startswith("gat") else 0)
    is_frozen_map(explainer, oracle(kind, model), inputs)


@pytest.mark.parametrize("kind", SIZES)
def test_one_explainer_is_for_every_graph(kind):
    """Nodes without edges, loops, edges that come twice, no edges at all, one node."""
    model = net(kind)
    explainer = explain(model, graph(7, 16))
    function = oracle(kind, model)
    for seed in range(6):
        is_frozen_map(explainer, function, graph(3 + seed, 4 * seed + 2, seed), seed)
    is_frozen_map(explainer, function, graph(6, 0))
    x, _ = graph(5, 0)
    is_frozen_map(explainer, function, (x, torch.tensor([[0, 0, 0, 3, 3], [1, 1, 0, 3, 3]])))
    is_frozen_map(explainer, function, graph(1, 2))


class Traced(GAT):
    """What torch.fx traces without an example; there are no loops but those that are among the edges."""

    def forward(self, x, index):
        h, to = (x @ self.weight.t()).view(-1, 2, 4 if self.bias.shape[0] == 8 else 2), index[1]
        scores = F.leaky_relu((h * self.source).sum(-1)[index[0]] + (h * self.target).sum(-1)[to], 0.2)
        e = scores.exp()
        w = e / torch.zeros_like(h[..., 0]).index_add(0, to, e)[to]
        return torch.zeros_like(h).index_add(0, to, w[..., None] * h[index[0]]).flatten(1) + self.bias


def test_without_an_example():
    sizes = SIZES["gat"][1]
    model = fill(Two(Traced(**sizes(5, 8)), Traced(**sizes(8, 4)))).double()
    x, index = graph(6, 12)
    index = torch.cat([index[:, index[0] != index[1]], torch.arange(6).repeat(2, 1)], 1)
    explainer = explain(model)
    is_frozen_map(explainer, oracle("gat", model), (x, index))
    report = explainer.report()
    assert not report.of("NOT REWRITTEN") and [s.kind for s in report.of("rewritten")].count("attention") == 2, report


@pytest.mark.parametrize("form", ["largest", "bare", "logarithm", "inverse", "gather"])
def test_softmaxes_over_groups_are_known_by_what_they_compute(form):
    model = net("gat")
    model.first.form = model.second.form = form
    inputs = graph(7, 16)
    explainer = explain(model, inputs)
    assert [s.kind for s in explainer.report().sites if s.status == "rewritten"].count("attention") == 2, explainer.report()
    is_frozen_map(explainer, oracle("gat", model), inputs)


@pytest.mark.parametrize("tau", [0.5, 3.0])
@pytest.mark.parametrize("form", ["largest", "bare"])
def test_a_temperature_softens_the_weights_of_a_group(tau, form):
    """`softmax(scores / tau)` over the edges of a node, on the way back alone."""
    model, inputs = net("gat"), graph(7, 16)
    model.first.form = model.second.form = form
    rules = sp_fx.Rules(**{**dict.fromkeys(sp_fx.gates.rules.KINDS), "relu": "frozen", "attention": tau})
    explainer = explain(model, inputs, rules)
    u = torch.randn(7, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    hidden = relu(gat(model.first.parts, *inputs)).detach()
    mask = (gat(model.first.parts, *inputs) > 0).double()
    (v,) = maps_of(lambda h: gat(model.second.parts, h, inputs[1], lambda s: s / tau), hidden, u=u)
    (expected,) = maps_of(lambda x: gat(model.first.parts, x, inputs[1], lambda s: s / tau), inputs[0], u=v * mask)
    assert torch.equal(explainer(*inputs), model(*inputs))
    assert relative(explainer.pullback(inputs, u)[0], expected) <= EXACT


def test_without_a_rule_attention_keeps_its_derivative():
    model, inputs = net("gat"), graph(7, 16)
    rules = sp_fx.Rules(**dict.fromkeys(sp_fx.gates.rules.KINDS))
    u = torch.ones(7, 4, dtype=torch.float64)
    (expected,) = maps_of(model, *inputs, u=u)
    assert relative(explain(model, inputs, rules).pullback(inputs, u)[0], expected) <= EXACT


@pytest.mark.parametrize("nodes, edges", [(1, 0), (2, 1), (3, 3)])
def test_a_small_example_shows_it_too(nodes, edges):
    model = net("gat")
    explainer = explain(model, graph(nodes, edges))
    assert [s.kind for s in explainer.report().sites].count("attention") == 2, explainer.report()
    sizes = SIZES["gat"][1]
    traced = fill(Two(Traced(**sizes(5, 8)), Traced(**sizes(8, 4)))).double()
    x, index = graph(max(nodes, 2), edges + 3)
    report = explain(traced, (x, index)).report()
    assert report.tracer == "torch.fx" and [s.kind for s in report.sites].count("attention") == 2, report


class Broken(GAT):
    """The sums are gathered by the sources: no softmax over any groups."""

    def forward(self, x, index):
        source, to = looped_index(index, x.shape[0])
        h = (x @ self.weight.t()).view(-1, *self.source.shape)
        e = (h * self.source).sum(-1)[source].exp()
        w = e / (summed(e, to, x.shape[0], self.how) + 1.0)[source]
        return summed(w[..., None] * h[source], to, x.shape[0], self.how).flatten(1) + self.bias


class Unsummed(GAT):
    """Weights over groups that multiply each edge, and are not added up over the groups: the largest message is taken."""

    def forward(self, x, index):
        source, to = looped_index(index, x.shape[0])
        h = (x @ self.weight.t()).view(-1, *self.source.shape)
        w = group_softmax((h * self.source).sum(-1)[source], to, x.shape[0], self.how)
        messages = (w[..., None] * h[source]).flatten(1)
        largest = messages.new_zeros(x.shape[0], messages.shape[1])
        return largest.scatter_reduce(0, to[:, None].expand_as(messages), messages, "amax", include_self=False) + self.bias


class Elsewhere(GAT):
    """Weights over the edges that end at a node, added up where the edges start."""

    def forward(self, x, index):
        source, to = looped_index(index, x.shape[0])
        h = (x @ self.weight.t()).view(-1, *self.source.shape)
        w = group_softmax((h * self.source).sum(-1)[source], to, x.shape[0], self.how)
        return summed(w[..., None] * h[to], source, x.shape[0], self.how).flatten(1) + self.bias


@pytest.mark.parametrize("layer", [Broken, Unsummed, Elsewhere])
def test_what_is_no_attention_keeps_its_derivative(layer):
    sizes = SIZES["gat"][1]
    model, inputs = fill(Two(layer(**sizes(5, 8)), layer(**sizes(8, 4)))).double(), graph(7, 16)
    explainer = explain(model, inputs, dataclasses.replace(FROZEN, product=None))
    assert not [site for site in explainer.report().sites if site.kind == "attention"]
    u = torch.ones(7, 4, dtype=torch.float64)
    assert relative(explainer.pullback(inputs, u)[0], maps_of(model, *inputs, u=u)[0]) <= EXACT


# -- the largest of a group -------------------------------------------------------------------------------------------------


class Largest(nn.Module):
    """The largest, or smallest, over the edges of each node; where there are none, or with `include_self`, -0.3."""

    def __init__(self, reduce, include_self, flat):
        super().__init__()
        self.reduce, self.include_self, self.flat, self.layer = reduce, include_self, flat, nn.Linear(5, 5)

    def forward(self, x, index):
        messages, to = self.layer(x)[index[0]], index[1]
        base = torch.full_like(x, -0.3)
        if self.flat:
            return base.index_reduce(0, to, messages, self.reduce, include_self=self.include_self)
        return base.scatter_reduce(0, to[:, None].expand_as(messages), messages, self.reduce, include_self=self.include_self)


@pytest.mark.parametrize("reduce", ["amax", "amin"])
@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("tau", [0.4, "frozen"])
@pytest.mark.filterwarnings("ignore:index_reduce")
def test_the_largest_of_a_group_is_a_max_pooling(reduce, include_self, flat, tau):
    model, (x, index) = fill(Largest(reduce, include_self, flat)).double(), graph(7, 16)
    explainer = explain(model, (x, index), sp_fx.Rules(max_pool=tau, scale="absolute"))
    (site,) = explainer.report().of("rewritten")
    assert (site.kind, site.temperature) == ("max_pool", tau)
    u = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z, sign = model.layer(x)[index[0]].detach(), 1 if reduce == "amax" else -1
    back = torch.zeros_like(z)
    for n in range(7):
        at = [i for i, d in enumerate(index[1].tolist()) if d == n]
        group = torch.cat([z[at], torch.full((1 if include_self else 0, 5), -0.3, dtype=torch.float64)])
        if not len(group):
            continue
        if tau == "frozen":
            share = (group == (group * sign).amax(0) * sign).double()
            share = share / share.sum(0)
        else:
            share = torch.softmax(sign * group / tau, 0)
        back[at] = share[: len(at)] * u[n]
    expected = torch.zeros_like(x).index_add(0, index[0], back) @ model.layer.weight.detach()
    assert torch.equal(explainer(x, index), model(x, index))
    assert relative(explainer.pullback((x, index), u)[0], expected) <= EXACT


class Reduced(nn.Module):
    """Reductions over groups of which one is no sum: `by` the model's own choice, onto what varies, or a product."""

    def __init__(self, by):
        super().__init__()
        self.by, self.layer = by, nn.Linear(5, 5)

    def forward(self, x, index):
        h = self.layer(x)
        if self.by == "its own choice":
            return h.new_zeros(5, 5).index_add(0, h.argmax(1), h)
        if self.by == "its own choice, largest":
            return h.new_zeros(5, 5).scatter_reduce(0, h.argmax(1)[:, None].expand_as(h), h, "amax")
        if self.by == "what varies":
            return h.scatter_reduce(0, index[1][:, None].expand(-1, 5), h[index[0]], "amax")
        return h.new_ones(*h.shape).scatter_reduce(0, index[1][:, None].expand(-1, 5), h[index[0]], "prod")


@pytest.mark.parametrize("by", ["its own choice", "its own choice, largest", "what varies"])
def test_choices_without_a_rule_are_listed(by):
    model, inputs = fill(Reduced(by)).double(), graph(7, 16)
    assert len(explain(model, inputs).report().of("NOT REWRITTEN")) >= 1


def test_a_product_over_a_group_keeps_its_derivative():
    model, inputs = fill(Reduced("products")).double(), graph(7, 16)
    explainer = explain(model, inputs)
    (site,) = explainer.report().of("kept")
    assert site.reason == "product rule"
    u = torch.ones(7, 5, dtype=torch.float64)
    assert relative(explainer.pullback(inputs, u)[0], maps_of(model, *inputs, u=u)[0]) <= EXACT


# -- the sample is a graph --------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Scores [graphs, 3] of graphs whose nodes `batch` [N] names; how many there are is `graphs`."""

    def __init__(self, kind, pool="mean"):
        super().__init__()
        layer, sizes = SIZES[kind]
        self.inner, self.layer, self.head, self.pool = nn.Linear(5, 5), layer(**sizes(5, 8)), nn.Linear(8, 3), pool

    def forward(self, x, index, batch):
        h = self.layer(self.inner(x).relu(), index).relu()
        graphs = int(batch.max()) + 1
        if self.pool == "max":
            whole = h.new_zeros(graphs, 8).scatter_reduce(0, batch[:, None].expand_as(h), h, "amax", include_self=False)
        else:
            whole = h.new_zeros(graphs, 8).index_add(0, batch, h)
        if self.pool == "mean":
            whole = whole / torch.bincount(batch, minlength=graphs).clamp(min=1)[:, None]
        return self.head(whole)


def several(seed=0):
    """Three graphs in one, and each alone."""
    parts = [graph(n, e, seed + n) for n, e in ((4, 9), (3, 2), (5, 11))]
    starts = [0, 4, 7]
    x, index = torch.cat([x for x, _ in parts]), torch.cat([i + s for (_, i), s in zip(parts, starts)], 1)
    alone = [(x, i, torch.zeros(len(x), dtype=torch.long)) for x, i in parts]
    return (x, index, torch.tensor([0] * 4 + [1] * 3 + [2] * 5)), alone


@pytest.mark.parametrize("pool", ["mean", "sum", "max"])
@pytest.mark.parametrize("kind", ["gin", "gat", "sage"])
@pytest.mark.parametrize("rules", [FROZEN, sp_fx.Rules()], ids=["frozen", "default"])
@pytest.mark.filterwarnings("ignore:no axis is known to be the sample's")
def test_a_graphs_map_is_its_own(kind, pool, rules):
    """Of several graphs at once each has the map that it has alone, for its target, for T targets, for its predicted class."""
    model = fill(Pooled(kind, pool)).double()
    whole, alone = several()
    explainer = explain(model, whole, rules)
    assert not explainer.report().of("NOT REWRITTEN")
    assert torch.allclose(explainer(*whole), torch.cat([model(*one) for one in alone]), rtol=0, atol=1e-12)
    targets = [1, 0, 2]
    for target, each in (
        (torch.tensor(targets), targets),
        (None, [None] * 3),
        (2, [2] * 3),
        (torch.tensor([[0, 1], [2, 0], [1, 1]]), [torch.tensor([row]) for row in ([0, 1], [2, 0], [1, 1])]),
    ):
        found = explainer.pullback(whole, target)
        assert found[1:] == (None, None)
        expected = torch.cat([explainer.pullback(one, t)[0] for one, t in zip(alone, each)])
        assert found[0].shape == expected.shape and relative(found[0], expected) <= EXACT


@pytest.mark.parametrize("kind", ["gin", "gat", "sage"])
@pytest.mark.filterwarnings("ignore:no axis is known to be the sample's")
def test_axis_0_of_nodes_is_no_batch(kind):
    """No scale by node, no cut through a graph; a step of an ascent has one length for all nodes and edges."""
    model, whole = fill(Pooled(kind)).double(), several()[0]
    explainer = explain(model, whole, sp_fx.Rules())
    assert {site.scale for site in explainer.report().of("rewritten")} == {"absolute"}
    with pytest.raises(ValueError, match="axis 0, and an index among the inputs takes its places apart"):
        explainer.pullback(whole, 1, batch_size=4)
    with pytest.raises(ValueError, match="takes its places apart"):
        explainer.double_pullback(whole, 1, batch_size=4)
    change = explainer.ascend(whole, 1, steps=1, step_size=0.5)[0]
    assert math.isclose(float(change.norm()), 0.5, rel_tol=1e-6)
    assert relative(change, explainer.pullback(whole, 1)[0] / explainer.pullback(whole, 1)[0].norm() * 0.5) <= 1e-9
    two = explainer.ascend(whole, torch.tensor([[0, 1], [2, 0], [1, 1]]), steps=1)[0]
    assert two.shape == (12, 2, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sp_fx.check(explainer, whole).ok


def test_pictures_with_indices_keep_their_batch():
    """An index along another axis takes no samples apart, nor does one beside the samples' own numbers."""

    class Picks(nn.Module):
        def __init__(self, way):
            super().__init__()
            self.way, self.layer = way, nn.Linear(5, 5)

        def forward(self, x, at):
            h = self.layer(x).relu()
            if self.way == "gather":
                return h.gather(1, at[:, None, None].expand(-1, 1, 5))[:, 0]
            if self.way == "scatter":
                return h.new_zeros(h.shape[0], 6, 5).scatter_add(1, at[:, None, None].expand(-1, 1, 5), h[:, :1]).sum(1)
            if self.way == "sorted":  # as sequences are before they are packed, and back
                order = at.argsort(descending=True)
                return h.index_select(0, order).tanh().index_select(0, order.argsort())[:, 0]
            return h[torch.arange(x.shape[0]), at]

    x, at = torch.randn(4, 6, 5, dtype=torch.float64), torch.tensor([5, 0, 2, 2])
    for way in ("gather", "scatter", "sorted", "numbers"):
        model = fill(Picks(way)).double()
        explainer = explain(model, (x, at), sp_fx.Rules())
        assert {site.scale for site in explainer.report().of("rewritten")} == {"sample"}, way
        whole = explainer.pullback((x, at), 1)[0]
        assert torch.allclose(explainer.pullback((x, at), 1, batch_size=2)[0], whole, rtol=0, atol=1e-12)


class OfSet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(self.first(x).amax(0, keepdim=True))


@pytest.mark.filterwarnings("ignore:no axis is known to be the sample's")
def test_a_largest_over_axis_0_has_no_scale_by_place():
    """Softened at one temperature for all that compete, not at one of its own for each of them."""
    model, x = fill(OfSet()).double(), graph(7, 0)[0]
    explainer = explain(model, x, sp_fx.Rules())
    assert explainer.report().of("rewritten")[0].scale == "absolute"
    share = torch.softmax(model.first(x), 0).detach()
    assert relative(explainer.pullback(x, 1), (share * model.second.weight[1]).detach() @ model.first.weight.detach()) <= EXACT


# -- weights of edges -------------------------------------------------------------------------------------------------------


class Weighted(nn.Module):
    """A GCN whose edges have weights [E] and features [E, 3]."""

    def __init__(self):
        super().__init__()
        self.weight, self.edge, self.head = nn.Linear(5, 8, bias=False), nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x, index, weight, features):
        messages = weight[:, None] * (self.weight(x)[index[0]] + self.edge(features).relu())
        return self.head(summed(messages, index[1], x.shape[0], "index_add").relu())


def test_each_floating_input_has_its_own_map():
    model, (x, index) = fill(Weighted()).double(), graph(7, 16)
    g = torch.Generator().manual_seed(5)
    weight = torch.rand(16, generator=g, dtype=torch.float64)
    features = torch.randn(16, 3, generator=g, dtype=torch.float64)
    p = {name: t.detach() for name, t in model.named_parameters()}

    def looped(x, index, weight, features):
        out = zeros(7, 8)
        for i, (s, d) in enumerate(index.T.tolist()):
            edge = relu(p["edge.weight"] @ features[i] + p["edge.bias"])
            out[d] = out[d] + weight[i] * (p["weight.weight"] @ x[s] + edge)
        return relu(torch.stack(out)) @ p["head.weight"].T + p["head.bias"]

    inputs = (x, index, weight, features)
    explainer = explain(model, inputs)
    is_frozen_map(explainer, looped, inputs)
    found = explainer.pullback(inputs, 2)
    assert [None if m is None else tuple(m.shape) for m in found] == [(7, 5), None, (16,), (16, 3)]
    changes = explainer.ascend(inputs, 2, steps=1, step_size=0.5)
    assert math.isclose(math.sqrt(sum(float(c.square().sum()) for c in changes if c is not None)), 0.5, rel_tol=1e-6)
    with pytest.raises(ValueError, match="different numbers of places"):
        explainer.pullback(inputs, 2, batch_size=2)


def test_inputs_that_would_be_broadcast_are_refused():
    class Sum(nn.Module):
        def forward(self, a, b):
            return (a + b).relu()

    with pytest.raises(ValueError, match="different batch sizes"):
        explain(Sum()).pullback((torch.randn(4, 3), torch.randn(1, 3)), 0)


# -- torch_geometric --------------------------------------------------------------------------------------------------------


def pyg_parts(conv):
    """The parameters of a convolution of torch_geometric under the oracle's names."""
    p = {name: t.detach().double() for name, t in conv.named_parameters()}
    names = {
        "GCNConv": {"weight": "lin.weight", "bias": "bias"},
        "GATConv": {"weight": "lin.weight", "source": "att_src", "target": "att_dst", "bias": "bias"},
        "GATv2Conv": {"left": "lin_l.weight", "left_bias": "lin_l.bias", "right": "lin_r.weight", "right_bias": "lin_r.bias",
                      "att": "att", "bias": "bias"},
        "SAGEConv": {"neighbours": "lin_l.weight", "bias": "lin_l.bias", "root": "lin_r.weight"},
        "GINConv": {"first": "nn.0.weight", "first_bias": "nn.0.bias", "second": "nn.2.weight", "second_bias": "nn.2.bias"},
    }[type(conv).__name__]  # fmt: skip
    parts = {ours: p[theirs] for ours, theirs in names.items()}
    parts = {name: t[0] if name in ("source", "target", "att") else t for name, t in parts.items()}
    return parts | ({"eps": conv.eps} if "first" in parts else {})


def pyg(kind):
    nn_ = pytest.importorskip("torch_geometric.nn")
    mlp = lambda a, b: nn.Sequential(nn.Linear(a, 6), nn.ReLU(), nn.Linear(6, b))  # noqa: E731
    return {
        "gcn": nn_.GCNConv,
        "gat": lambda a, b: nn_.GATConv(a, b // 2, heads=2),
        "gatv2": lambda a, b: nn_.GATv2Conv(a, b // 2, heads=2),
        "sage": nn_.SAGEConv,
        "gin": lambda a, b: nn_.GINConv(mlp(a, b), eps=0.2),
    }[kind]


@pytest.mark.parametrize("kind", SIZES)
def test_convolutions_of_torch_geometric(kind):
    conv = pyg(kind)
    model = fill(Two(conv(5, 8), conv(8, 4))).double()
    first, second = pyg_parts(model.first), pyg_parts(model.second)
    function = lambda x, index: LOOPED[kind](second, relu(LOOPED[kind](first, x, index)), index)  # noqa: E731
    explainer = explain(model, graph(7, 16))
    assert not explainer.report().of("NOT REWRITTEN"), explainer.report()
    assert len([s for s in explainer.report().sites if s.kind == "attention"]) == (2 if kind.startswith("gat") else 0)
    for seed in range(3):
        is_frozen_map(explainer, function, graph(4 + seed, 9 * seed + 5, seed), seed)
    is_frozen_map(explainer, function, graph(6, 0))


def test_weights_of_edges_in_torch_geometric():
    model = fill(pyg("gcn")(5, 4)).double()
    x, index = graph(7, 16)
    index = index[:, index[0] != index[1]]
    weight = torch.rand(index.shape[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.1
    parts = pyg_parts(model)
    explainer = explain(model, (x, index, weight))
    assert not explainer.report().of("NOT REWRITTEN"), explainer.report()
    is_frozen_map(explainer, lambda x, index, weight: gcn(parts, x, index, weight), (x, index, weight))


@pytest.mark.parametrize("pool", ["global_mean_pool", "global_add_pool", "global_max_pool"])
@pytest.mark.filterwarnings("ignore:no axis is known to be the sample's")
def test_pools_of_torch_geometric(pool):
    conv, nn_ = pyg("gin"), pytest.importorskip("torch_geometric.nn")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = conv(5, 8), nn.Linear(8, 3)

        def forward(self, x, index, batch):
            return self.head(getattr(nn_, pool)(self.conv(x, index).relu(), batch))

    model, (whole, alone) = fill(Net()).double(), several()
    for rules in (FROZEN, sp_fx.Rules()):
        explainer = explain(model, whole, rules)
        assert not explainer.report().of("NOT REWRITTEN")
        found = explainer.pullback(whole, torch.tensor([1, 0, 2]))[0]
        expected = torch.cat([explainer.pullback(one, t)[0] for one, t in zip(alone, (1, 0, 2))])
        assert relative(found, expected) <= EXACT


def test_attention_of_torch_geometric_beside_its_convolutions():
    """TransformerConv, whose scores are products; an aggregation whose weights are a softmax over a graph."""
    nn_ = pytest.importorskip("torch_geometric.nn")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn_.TransformerConv(5, 4, heads=2)
            self.pool = nn_.AttentionalAggregation(nn.Linear(8, 1), nn.Linear(8, 3))

        def forward(self, x, index, batch):
            return self.pool(self.conv(x, index), batch)

    model, (whole, _) = fill(Net()).double(), several()
    report = explain(model, whole).report()
    assert [site.kind for site in report.of("rewritten")].count("attention") == 2 and not report.of("NOT REWRITTEN")
