"""One transform for every length: the axes that an export lets vary, what has to hold between them, and the forms that are
captured when they are met."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import relative
from sp_fx.capture.arguments import Given
from sp_fx.capture.sizes import freedoms, of_other_sizes

PLAIN = sp_fx.Rules(**dict.fromkeys(sp_fx.gates.rules.KINDS))


class Text(nn.Module):
    """A small transformer that asks for lengths in Python, with positions for 64 tokens and a mask that may be left out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(30, 8), nn.Embedding(64, 8)
        self.q, self.k, self.v, self.up, self.head = (nn.Linear(8, n) for n in (8, 8, 8, 16, 3))
        self.down, self.norm = nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, ids, mask=None, positions=None):
        batch, length = ids.shape
        if length > 64:
            raise ValueError("too long")
        h = self.words(ids) + (self.places(torch.arange(length))[None] if positions is None else self.places(positions))
        q, k, v = (m(h).view(batch, length, 2, 4).transpose(1, 2) for m in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / 2
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        h = self.norm(h + (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, 8))
        h = h + self.down(F.gelu(self.up(h)))
        weights = torch.ones_like(h[..., :1]) if mask is None else mask[..., None].to(h.dtype)
        return self.head((h * weights).sum(1) / weights.sum(1))


def tokens(batch, length):
    drawn = torch.Generator().manual_seed(100 * batch + length)
    return torch.randint(1, 30, (batch, length), generator=drawn)


def gradient(model, name, call, target=1):
    """The gradient of a logit by the output of the embedding `name`, by a hook."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y))
    y = model(**call)
    handle.remove()
    return torch.autograd.grad(y[:, target].sum(), seen[0])[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_one_transform_for_every_length(batch):
    model = Text().eval()
    example = {"ids": tokens(batch, 7), "mask": torch.ones(batch, 7, dtype=torch.long)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plain gradient
        explainer = sp_fx.transform(model, rules=PLAIN, example_inputs=example)
    assert explainer.report().inputs == "ids [*, *], mask [*, *]"
    for b, length in ((batch, 7), (2, 3), (1, 60), (4, 8), (8, 4), (1, 2), (1, 64)):
        call = {"ids": tokens(b, length), "mask": torch.ones(b, length, dtype=torch.long)}
        call["mask"][0, length // 2 :] = 0
        assert torch.equal(explainer(**call), model(**call))
        assert relative(explainer.pullback(call, 1, wrt="words"), gradient(model, "words", call)) <= 1e-6
    assert "another form" not in str(explainer.report())
    for call in ({"ids": tokens(2, 1), "mask": torch.ones(2, 1, dtype=torch.long)}, {"ids": tokens(2, 9)}):
        assert torch.equal(explainer(**call), model(**call))  # a length of one, and an argument that the example left out
    with pytest.raises(RuntimeError, match="too long"):
        explainer(tokens(1, 65))


def test_padding_changes_nothing():
    model = Text().eval()
    explainer = sp_fx.transform(model, example_inputs=(tokens(2, 5), torch.ones(2, 5, dtype=torch.long)))
    ids = tokens(1, 6)
    alone = explainer.pullback((ids, torch.ones_like(ids)), 1, wrt="words")
    for length in (7, 12, 40):
        padded, mask = F.pad(ids, (0, length - 6)), F.pad(torch.ones_like(ids), (0, length - 6))
        found = explainer.pullback((padded, mask), 1, wrt="words")
        assert relative(found[:, :6], alone) <= 1e-6 and not found[:, 6:].any()


class Sequence(nn.Module):
    """Floats [batch, length, 4]: points or frames, with a size that the forward reads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = F.gelu(self.first(x))
        if h.shape[1] > 6:
            h = h[:, :6] * 2
        return self.last(h.sum(1) / x.size(1))


def test_a_condition_on_a_length_is_a_form_of_its_own():
    model = Sequence().eval()
    explainer = sp_fx.transform(model, tracer="export", example_inputs=torch.randn(2, 5, 4))
    for length in (5, 3, 6, 9, 12, 4):
        x = torch.randn(3, length, 4)
        assert torch.equal(explainer(x), model(x)) and explainer.pullback(x, 1).shape == x.shape
    assert str(explainer.report()).count("another form of call was captured: x [*, *, 4]") == 1


class FloatMask(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(30, 8), nn.Linear(8, 3)

    def forward(self, ids, mask):
        h = self.words(ids)[:, None].expand(-1, 2, -1, -1)
        return self.head(F.scaled_dot_product_attention(h, h, h, attn_mask=mask).mean((1, 2)))


def test_a_float_mask_of_four_axes_is_as_long_as_the_ids():
    model = FloatMask().eval()
    explainer = sp_fx.transform(model, tracer="export", example_inputs=(tokens(2, 5), torch.zeros(2, 1, 5, 5)))
    assert explainer.report().inputs == "ids [*, *], mask [*, 1, *, *]"
    for b, length in ((2, 5), (3, 9)):
        mask = torch.zeros(b, 1, length, length).masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        assert torch.equal(explainer(tokens(b, length), mask), model(tokens(b, length), mask))


def test_what_may_vary_of_a_call():
    ids, picture = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 3, 8, 8)
    assert freedoms(Given((ids, picture), {}))[0] == ({0, 1}, {0})
    assert freedoms(Given((ids[:1],), {})) == [({0, 1},), ({0},), ({1},), (set(),)]
    assert freedoms(Given((), {"mask": torch.zeros(2, 1, 7, 7), "ids": ids}))[0] == ({0, 2, 3}, {0, 1})
    assert freedoms(Given((torch.tensor(1.0),), {})) == [(set(),)]
    call = Given((ids, picture), {})
    other = of_other_sizes(call, (frozenset({0, 1}), frozenset({0})), lambda call: True)
    assert [t.shape for t in other.args] == [(1, 3), (1, 3, 8, 8)]
    assert of_other_sizes(call, (frozenset(), frozenset()), lambda call: True) is None
    assert of_other_sizes(call, (frozenset({1}), frozenset()), lambda call: call.args[0].shape[1] == 6).args[0].shape == (2, 6)


class Keywords(nn.Module):
    """Passes on what it got as it got it, and says where something comes twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3)

    def forward(self, x, scale=2.0, sizes=[], options={}, act=F.relu, *, flag=True):  # noqa: B006
        return self.called(x, scale, sizes=sizes, options=options, act=act, flag=flag)

    def called(self, *args, **kwargs):
        x, *rest = args
        factor = rest[0] if rest else 1.0
        for key in kwargs["options"]:
            factor = factor * kwargs["options"][key]
        return self.head(kwargs["act"](x) * factor + sum(kwargs["sizes"]))


def passed_on(function):
    """As a decorator of transformers passes arguments on: a keyword that it sets, and that comes by position too, comes twice."""

    def wrapper(self, *args, **kwargs):
        return function(self, *args, scale=kwargs.pop("scale", 3.0), **kwargs)

    wrapper.__signature__ = __import__("inspect").signature(function)
    return wrapper


class Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3)

    @passed_on
    def forward(self, x, scale=None, options={}):  # noqa: B006
        return self.head(x.relu() * scale)


@pytest.mark.parametrize("tracer", ["auto", "export"])
@pytest.mark.parametrize("kind", [Keywords, Decorated])
def test_arguments_as_they_are_given(kind, tracer):
    model, x = kind().eval(), torch.randn(2, 4)
    for example in (x, {"x": x}, {"x": x, "scale": 5.0}):
        explainer = sp_fx.transform(model, tracer=tracer, example_inputs=example)
        for call in ({"x": x}, {"x": x, "scale": 5.0}, {"x": x, "scale": torch.tensor(4.0)}):
            assert torch.equal(explainer(**call), model(**call))
        assert torch.equal(explainer(x), model(x))


def test_defaults_that_are_containers_or_functions():
    model, x = Keywords().eval(), torch.randn(2, 4)
    explainer = sp_fx.transform(model, tracer="export", example_inputs=x)
    for more in ({}, {"options": {"a": 2.0}}, {"sizes": [1.0, 2.0]}, {"options": {}}, {"flag": False}):
        assert torch.equal(explainer(x, **more), model(x, **more))


def test_a_mapping_beside_keywords_is_one_argument():
    class OfABatch(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, batch, **options):
            return self.head(batch["image"].relu())

    model, batch = OfABatch().eval(), {"image": torch.randn(2, 4)}
    explainer = sp_fx.transform(model, tracer="export", example_inputs=batch)
    assert torch.equal(explainer(batch), model(batch)) and explainer.pullback(batch, 1)["image"].shape == (2, 4)


class OfKeywords(nn.Module):
    """As a wrapper of PEFT is: it takes whatever its model takes."""

    def __init__(self):
        super().__init__()
        self.model = Text()

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("by_name", [True, False])
def test_activations_of_models_that_take_whatever_they_get(by_name):
    model, plain = OfKeywords().eval(), Text().eval()
    call = {"ids": tokens(2, 6), "mask": torch.ones(2, 6, dtype=torch.long)}
    call["mask"][1, 3:] = 0
    given = call if by_name else tuple(call.values())
    explainer = sp_fx.transform(model, example_inputs=given)
    expected = sp_fx.transform(plain, example_inputs=call).pullback(call, 1, wrt="words")
    assert torch.equal(explainer.pullback(given, 1, wrt="model.words"), expected)
    if by_name:
        assert relative(explainer.pullback(given, 1, wrt="words", batch_size=1), expected) <= 1e-5
        assert sp_fx.check(explainer, given, wrt="words").ok
