"""What a graph and its model are compared by: which gradients, of which weights, and over which buffers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill, relative
from kinds import WAYS, explain, net, noise

X = noise(4, 6)


def tripled(h):
    """The gradient of `h` is thrice what it is of any graph: a hook is Python's, and no trace sees it."""
    if h.requires_grad:
        h.register_hook(lambda g: 3 * g)
    return h


@pytest.mark.parametrize("size", [0.0, 1e-9, 1.0])
def test_a_gradient_is_compared_at_an_example_of_zeros_too(size):
    """Where inputs are 0 no gradient moves an output: what it does to an input of 0.01 is asked."""
    model = net(lambda m, h: F.relu(tripled(h * 2)))
    with pytest.raises(sp_fx.CaptureError, match=r"another gradient than the model, off by 6\.7e-01"):
        sp_fx.transform(model, example_inputs=X * size)


class Tokens(nn.Module):
    """Ids in, classes out, by an embedding of some kind; `between` is what happens to the activation."""

    def __init__(self, embedding, between):
        super().__init__()
        self.embedding, self.between, self.head = embedding, between, nn.Linear(6, 3)

    def forward(self, ids):
        h = self.embedding(ids)
        return F.relu(self.head(self.between(h if h.dim() == 2 else h.mean(1))))


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2.5


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 6))

    def forward(self, ids):
        return F.embedding(ids, self.table)


class OneHot(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(11, 6)

    def forward(self, ids):
        return self.mix(F.one_hot(ids, 11).to(self.mix.weight.dtype))


EMBEDDINGS = {
    "nn.Embedding": lambda: nn.Embedding(11, 6),
    "a subclass": lambda: Scaled(11, 6),
    "a bag": lambda: nn.EmbeddingBag(11, 6),
    "a function": Table,
    "one hot": OneHot,
}
IDS = torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_models_of_tokens_are_compared_by_the_gradient_of_weights(kind):
    right, wrong = (fill(Tokens(EMBEDDINGS[kind](), between)) for between in (lambda h: h * 2, lambda h: tripled(h * 2)))
    explainer = sp_fx.transform(right, example_inputs=IDS)
    assert torch.equal(explainer(IDS), right(IDS)) and not explainer.report().notes
    with pytest.raises(sp_fx.CaptureError, match="another gradient than the model"):
        sp_fx.transform(wrong, example_inputs=IDS)


class Several(nn.Module):
    """Embeddings whose weights are copied in a comparison: they are scaled where they are looked up, or all weights are."""

    def __init__(self, max_norm):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(11, 6, max_norm=max_norm) for _ in range(4))
        self.head, self.max_norm_of_head = nn.Linear(6, 3), None if max_norm else 5.0

    def forward(self, ids):
        if self.max_norm_of_head:
            with torch.no_grad():
                self.head.weight.clamp_(-self.max_norm_of_head, self.max_norm_of_head)
        return F.relu(self.head(sum((i + 1) * e(ids).mean(1) for i, e in enumerate(self.embeddings))))


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("max_norm", [1.0, None])
def test_weights_are_paired_by_their_names(max_norm, tracer):
    """Not by their places in memory, which copies do not keep: of 32 such transforms 24 were refused."""
    model = fill(Several(max_norm))
    for _ in range(4):
        explainer = sp_fx.transform(model, tracer=tracer, example_inputs=IDS)
        assert relative(explainer(IDS), model(IDS)) <= 1e-6


# -- buffers that share storage ----------------------------------------------------------------------------------------------


def kept_as(share):
    """A model that writes into a buffer and reads what shares its storage."""
    model = net(lambda m, h: written_and_read(m, h))
    model.register_buffer("kept", torch.zeros(4, 8, dtype=torch.float64))
    share(model)
    return model


def written_and_read(m, h):
    m.kept.copy_(h)
    return F.relu(m.read[0] if isinstance(m.read, list) else m.read) + h[: m.read[0].shape[0]].sum(1, keepdim=True)


SHARED = {
    "an attribute": lambda m: setattr(m, "read", m.kept),
    "a list": lambda m: setattr(m, "read", [m.kept]),
    "a view": lambda m: setattr(m, "read", m.kept[:4]),
    "two names": lambda m: m.register_buffer("read", m.kept),
    "two views": lambda m: m.register_buffer("read", m.kept.view(4, 8)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("share", SHARED)
def test_buffers_that_share_storage_do_so_in_what_is_compared(share, way):
    """Right, or refused; a reference whose buffers are apart agrees with a graph that is wrong."""
    model = kept_as(SHARED[share])
    try:
        explainer = explain(copy.deepcopy(model), X, way)
        found, scored = explainer(X), explainer.pullback(X, 1)
    except sp_fx.CaptureError as error:
        assert share != "two names" and str(error)
        return
    assert torch.equal(found, model(X))
    assert scored.norm() > 0
