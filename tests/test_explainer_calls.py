"""Calls as users make them: inputs in the containers that the model takes, targets in lists and arrays, names by their ends."""

import dataclasses
import functools
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill, relative
from sp_fx import targets


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def hidden(self, x):
        return F.relu(self.second(F.relu(self.first(x))))

    def forward(self, x):
        return self.head(self.hidden(x))


class OneEach(Body):
    def forward(self, x):
        return self.head(self.hidden(x))[:, 0]


class OfBatch(Body):
    def forward(self, batch):
        return self.head(self.hidden(batch["x"]) * batch["scale"])


class OfList(Body):
    def forward(self, tensors):
        return self.head(self.hidden(tensors[0]) + self.hidden(tensors[1]))


class OfTwo(Body):
    def forward(self, x, scale, flag=False):
        return self.head(self.hidden(x) * scale)


class OfNested(Body):
    def forward(self, features, ids):
        return self.head(self.hidden(features["a"]["b"]) + self.hidden(features["pair"][1]) + ids[:, None])


X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


def explainer_of(cls, **options):
    return sp_fx.transform(fill(cls()), **options)


# -- outputs and targets


def test_one_number_a_sample_needs_no_target():
    explainer = explainer_of(OneEach)
    expected = explainer.pullback(X, lambda y: y)
    for found in (explainer.pullback(X), explainer.pullback(X, ()), explainer.attribute(X), explainer.pullback(X, batch_size=2)):
        torch.testing.assert_close(found, expected)
    assert explainer.ascend(X).shape == X.shape and explainer.double_pullback(X).shape == X.shape


def test_a_forgotten_batch_axis_is_no_batch_of_numbers():
    """Four classes of one sample [4, 5] would be as long as its axis 0."""

    class Means(Body):
        def forward(self, x):
            return self.head(self.hidden(x)).mean(0)

    with pytest.raises(ValueError, match="batch axis forgotten"):
        explainer_of(Means).pullback(torch.randn(4, 5))


def test_lists_and_arrays_are_targets():
    explainer = explainer_of(Body)
    one, many = torch.tensor([0, 2, 3]), torch.tensor([[0, 1], [2, 3], [3, 0]])
    for form in ([0, 2, 3], np.array([0, 2, 3]), (np.int64(0),) and [np.int64(0), np.int64(2), np.int64(3)]):
        assert torch.equal(explainer.pullback(X, form), explainer.pullback(X, one))
    for form in ([[0, 1], [2, 3], [3, 0]], many.numpy()):
        maps = explainer.pullback(X, form)
        assert maps.shape == (3, 2, 5) and torch.equal(maps, explainer.pullback(X, many))
        torch.testing.assert_close(explainer.pullback(X, form, batch_size=2), maps)
    u = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    assert torch.equal(explainer.pullback(X, u), explainer.pullback(X, torch.from_numpy(u)))
    assert torch.equal(explainer.pullback(X, np.int64(1)), explainer.pullback(X, 1))
    with pytest.raises(ValueError, match=r"lists of \[1, 2\] classes"):
        explainer.pullback(X, [[0, 1], [2], [3, 0]])
    with pytest.raises(TypeError, match="expected None"):
        explainer.pullback(X, [[0.5, 1], [2, 3], [3, 0]])


def test_directions_add_up():
    explainer = explainer_of(Body)
    several = [targets.score(1), targets.margin(2), targets.log_probability(0)]
    maps = [explainer.pullback(X, direction) for direction in several]
    torch.testing.assert_close(explainer.pullback(X, sum(several)), sum(maps))
    torch.testing.assert_close(explainer.pullback(X, sum(several) / 3), sum(maps) / 3)
    torch.testing.assert_close(explainer.pullback(X, -several[1]), -maps[1])
    with pytest.raises(TypeError):
        1 + several[0]


def structured(make):
    """A model whose outputs are in what `make` makes of two tensors."""

    class Structured(Body):
        def forward(self, x):
            y = super().forward(x)
            return make(y, 2 * y)

    return explainer_of(Structured)


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor


OUTPUTS = {
    "a tuple": (lambda a, b: (a, b), "out[0]"),
    "a dictionary": (lambda a, b: {"first": a, "second": b}, "out['first']"),
    "a dataclass": (Pair, "out.first"),
    "one in another": (lambda a, b: {"first": [a], "second": [b]}, "out['first'][0]"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_error_says_how_an_output_is_picked(name):
    make, read = OUTPUTS[name]
    explainer = structured(make)
    pick = eval(f"lambda out: {read}[:, 3]")
    for ask in (explainer.pullback, functools.partial(sp_fx.check, explainer)):
        with pytest.raises(TypeError, match=re.escape(f"such as lambda out: {read}[:, 3]")):
            ask(X, 3)
    assert torch.equal(explainer.pullback(X, pick), explainer_of(Body).pullback(X, 3))


@pytest.mark.parametrize("target", [0, [0, 0, 0], [[0, 0], [0, 0], [0, 0]], (0,)])
def test_one_number_a_sample_takes_no_target(target):
    for ask in (explainer_of(OneEach).pullback, explainer_of(OneEach).ascend, explainer_of(OneEach).attribute):
        with pytest.raises(ValueError, match=r"output of shape \[3\] has no class axis.*takes no target"):
            ask(X, target)


# -- inputs


def test_a_mapping_that_the_forward_takes_as_one_argument():
    batch = {"x": X, "scale": Y.abs()[:, :1], "name": "a batch"}
    for options in ({}, {"example_inputs": (batch,)}):
        explainer = explainer_of(OfBatch, **options)
        assert torch.equal(explainer(batch), fill(OfBatch())(batch))
        maps = explainer.pullback(batch, 1)
        assert set(maps) == set(batch) and maps["name"] is None and maps["x"].shape == X.shape
        for inputs in ((batch,), {"batch": batch}):
            again = explainer.pullback(inputs, 1)
            again = again[0] if isinstance(inputs, tuple) else again["batch"]
            assert torch.equal(again["x"], maps["x"]) and torch.equal(again["scale"], maps["scale"])
        torch.testing.assert_close(explainer.pullback(batch, 1, batch_size=2)["x"], maps["x"])
        assert explainer.ascend(batch, 1)["x"].shape == X.shape
        assert sp_fx.check(explainer, batch)
    plain = explainer_of(Body)
    torch.testing.assert_close(explainer.pullback({**batch, "scale": torch.ones(3, 1)}, 1)["x"], plain.pullback(X, 1))


def test_a_list_that_the_forward_takes_as_one_argument():
    explainer = explainer_of(OfList)
    maps = explainer.pullback([X, Y], 2)
    assert isinstance(maps, list) and torch.equal(explainer([X, Y]), fill(OfList())([X, Y]))
    torch.testing.assert_close(maps[1], explainer.pullback([Y, X], 2)[0])


def test_containers_in_containers():
    features, ids = {"a": {"b": X}, "pair": (torch.tensor([1, 2, 3]), Y)}, torch.tensor([1, 0, 1])
    explainer = explainer_of(OfNested)
    maps, of_ids = explainer.pullback((features, ids), 1)
    assert of_ids is None and maps["pair"][0] is None and maps["a"]["b"].shape == X.shape and maps["pair"][1].shape == Y.shape
    found = explainer.pullback({"features": features, "ids": ids}, 1)
    assert torch.equal(found["features"]["a"]["b"], maps["a"]["b"]) and found["ids"] is None


def test_the_explainer_takes_what_the_methods_take():
    explainer, scale = explainer_of(OfTwo), Y.abs()[:, :1]
    expected = fill(OfTwo())(X, scale)
    for inputs in ((X, scale), {"x": X, "scale": scale}, {"x": X, "scale": scale, "flag": False}):
        assert torch.equal(explainer(inputs), expected)
    assert torch.equal(explainer(X, scale), expected) and torch.equal(explainer(x=X, scale=scale), expected)
    with pytest.raises(TypeError, match="missing"):
        explainer(X)


def test_what_is_no_tensor_is_no_input():
    with pytest.raises(TypeError, match=r"expected a tensor, a container of tensors.*got int"):
        explainer_of(OfTwo).pullback((X, 3), 0)


ARRAY, SCALE = X.numpy(), Y.abs()[:, :1]
MISFITS = {  # of a model and its inputs
    "an array": (Body, ARRAY, "numpy.ndarray.*torch.from_numpy"),
    "an array by name": (OfTwo, {"x": ARRAY, "scale": SCALE}, "argument x is a numpy.ndarray.*torch.from_numpy"),
    "an array in a mapping": (OfBatch, {"x": ARRAY, "scale": SCALE}, r"batch\['x'\] is a numpy.ndarray.*torch.from_numpy"),
    "arrays in a list": (OfList, [ARRAY, ARRAY], "numpy.ndarray.*torch.from_numpy"),
    "no key": (OfBatch, {"x": X, "name": "a"}, r"reads the key 'scale', .*these are batch\['x'\], batch\['name'\]"),
    "no argument": (OfTwo, {"x": X}, r"forward\(x, scale, flag=False\): missing a required argument: 'scale'; got x by name"),
    "another name": (OfTwo, {"x": X, "scle": SCALE}, "got a dict with the keys x, scle, where no parameter is called scle"),
}  # fmt: skip


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", MISFITS)
def test_inputs_that_the_model_does_not_take(name, verify):
    """Before the first call, which compares the graph with the model, and after it."""
    cls, inputs, message = MISFITS[name]
    explainer = explainer_of(cls, verify=verify)
    asked = [
        explainer,
        explainer.pullback,
        functools.partial(explainer.pullback, wrt="second"),
        functools.partial(explainer.pullback, wrt=["second"]),
        functools.partial(explainer.ascend, batch_size=2),
        functools.partial(sp_fx.check, explainer),
    ]
    for ask in asked:
        with pytest.raises(TypeError, match=message):
            ask(inputs)
    if not isinstance(inputs, list):
        with pytest.raises(
            (TypeError, ValueError), match=f"batch 0 of the calibration set.*{'numpy' if 'numpy' in message else ''}"
        ):
            explainer.calibrate([inputs])


def test_an_array_beside_the_inputs():
    with pytest.raises(TypeError, match=r"argument scale is a numpy\.ndarray.*torch\.from_numpy"):
        explainer_of(OfTwo).pullback(X, 1, forward_kwargs={"scale": SCALE.numpy()})


@pytest.mark.parametrize("wrong", ["shape", "array"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_call_that_fails_leaves_the_next_ones_as_they_are(verify, wrong):
    """The first call says at which axis the sample is: one that the model does not take says nothing."""
    explainer = explainer_of(Body, verify=verify)
    with pytest.raises((RuntimeError, TypeError)):
        explainer(torch.randn(3, 4) if wrong == "shape" else ARRAY)
    assert torch.equal(explainer.pullback(X, 1), explainer_of(Body, verify=verify).pullback(X, 1))
    assert {site.scale for site in explainer.report().sites} == {"sample"}


def test_what_is_not_read_may_be_an_array():
    explainer, batch = explainer_of(OfBatch), {"x": X, "scale": SCALE, "ids": np.arange(3)}
    assert torch.equal(explainer(batch), fill(OfBatch())(batch)) and explainer.pullback(batch, 1)["ids"] is None
    with pytest.raises(TypeError, match="got the target 'cat'"):
        explainer.pullback(batch, "cat")


def test_bounds_that_are_arrays_are_cut_with_the_batch():
    explainer, tensors = explainer_of(Body), (X - 0.1, X + 0.1)
    found = explainer.ascend(X, 1, bounds=tuple(b.numpy() for b in tensors), batch_size=2)
    torch.testing.assert_close(found, explainer.ascend(X, 1, bounds=tensors))


def test_forward_kwargs_are_a_mapping():
    with pytest.raises(TypeError, match="mapping of keyword arguments, got a list"):
        explainer_of(OfTwo).pullback(X, 1, forward_kwargs=[SCALE])
    for ask in (explainer_of(OfTwo).pullback, functools.partial(sp_fx.check, explainer_of(OfTwo))):
        with pytest.raises(TypeError, match="scale is among the inputs and in forward_kwargs too"):
            ask({"x": X, "scale": SCALE}, 1, forward_kwargs={"scale": SCALE})


# -- names


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2)])
        self.last = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3))

    def forward(self, ids):
        h = self.table(ids)
        for block in self.blocks:
            h = h + block(h)
        return self.last(h.mean(1))


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def test_a_name_may_be_given_by_its_end():
    inner = nn.Sequential(Deep())
    explainer = sp_fx.transform(fill(inner))
    assert torch.equal(explainer.pullback(IDS, 1, wrt="table"), explainer.pullback(IDS, 1, wrt="0.table"))
    with pytest.raises(ValueError, match=r"is the end of 4 names: 0\.blocks\.0\.1, 0\.blocks\.1\.1, .*: say which"):
        explainer.pullback(IDS, 1, wrt="1")
    with pytest.raises(ValueError, match=r"names no activation.*nearest are 0\.table"):
        explainer.pullback(IDS, 1, wrt="tabel")


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}])
def test_several_activations_in_one_pass(options):
    explainer, names = sp_fx.transform(fill(Deep())), ["table", "blocks.0", "last.1"]
    runs = []
    explainer.table.register_forward_hook(lambda *args: runs.append(1))
    maps = explainer.pullback(IDS, 2, wrt=names, **options)
    assert list(maps) == names and len(runs) == (2 if options else 1)
    for name in names:
        torch.testing.assert_close(maps[name], explainer.pullback(IDS, 2, wrt=name))
    many = explainer.pullback(IDS, [[0, 1], [1, 2]], wrt=("table", "blocks.1"))
    assert many["table"].shape == (2, 2, 4, 6)
    with pytest.raises(ValueError, match="only pullback"):
        explainer.ascend(IDS, 1, wrt=names)
    with pytest.raises(ValueError, match="got none"):
        explainer.pullback(IDS, 1, wrt=[])


def test_an_activation_by_weights_that_are_frozen():
    model = fill(Deep())
    expected = sp_fx.transform(model).pullback(IDS, 1, wrt="table")
    for p in model.parameters():
        p.requires_grad_(False)
    torch.testing.assert_close(sp_fx.transform(model).pullback(IDS, 1, wrt=["table"])["table"], expected)


def test_overrides_by_the_name_of_a_module_or_the_end_of_a_place():
    model = fill(Deep())
    pattern = sp_fx.transform(model, rules=sp_fx.Rules(overrides={"blocks.*": 0.2, "last.1": 2.0}))
    named = sp_fx.transform(model, rules=sp_fx.Rules(overrides={"blocks": 0.2, "last": 2.0}))
    assert [s.temperature for s in named.report().sites] == [s.temperature for s in pattern.report().sites]
    nested = sp_fx.transform(nn.Sequential(model), rules=sp_fx.Rules(overrides={"last.1": 2.0}))
    assert [s.temperature for s in nested.report().sites] == [1.0, 1.0, 2.0]
    with pytest.raises(ValueError, match=r"is the end of 3 places: 0\.blocks\.0\.1, 0\.blocks\.1\.1"):
        sp_fx.transform(nn.Sequential(model), rules=sp_fx.Rules(overrides={"1": 2.0}))
    with pytest.raises(ValueError, match="fits no gate"):
        sp_fx.transform(model, rules=sp_fx.Rules(overrides={"blocks.3": 2.0}))


# -- reports


def test_a_report_explains_each_of_its_lines():
    class Net(Body):
        def forward(self, x):
            h = self.first(x)
            return self.head(h * torch.sigmoid(h)) + torch.round(self.second(h)).median(-1, keepdim=True).values

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = explainer_of(Net).report()
    assert "silu, rewritten" in report.explain("mul") and "overrides={'mul'" in report.explain("mul")
    assert "NOT REWRITTEN: round chooses by value" in report.explain("round") and "register_gate" in report.explain("round")
    with pytest.raises(ValueError, match="no gating call of Net is at 'rund'; the nearest places are round"):
        report.explain("rund")
    assert " -> put it into a function of its own" in str(report) and "explain(place)" in str(report).splitlines()[-1]


def test_a_module_is_explained_line_by_line():
    report = sp_fx.transform(fill(Deep())).report()
    assert len(report.explain("blocks").splitlines()) == 2 and report.explain("last").startswith("gelu at last.1 is a gelu")


def test_frozen_rules_say_what_they_do_not_freeze():
    class Cosine(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, x):
            out = self.layer(x)
            return out * out.abs() / x.norm(dim=-1, keepdim=True)  # as B-cos networks do

    report = sp_fx.transform(fill(Cosine()), rules=sp_fx.Rules.frozen()).report()
    (note,) = [note for note in report.notes if note.startswith("not frozen")]
    assert "mul" in note and "truediv" in note
    assert not any(n.startswith("not frozen") for n in explainer_of(Body, rules=sp_fx.Rules.frozen()).report().notes)


STOPS = {
    "detached": (lambda h: h + F.relu(h).detach(), "lets no derivative through"),
    "compared": (lambda h: h * (F.relu(h) > 0.3), "only compared"),
    "steering": (lambda h: (F.relu(h) @ F.relu(h).mT).softmax(-1) @ h, "steers a frozen gate"),
}


@pytest.mark.filterwarnings("ignore:1 calls")
@pytest.mark.parametrize("name", STOPS)
def test_why_no_signal_passes(name):
    function, reason = STOPS[name]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x):
            return function(self.layer(x))

    explainer = sp_fx.transform(fill(Net()))
    explainer(X)
    sites = [s for s in explainer.report().sites if s.op == "relu"]
    assert sites and all(reason in s.reason for s in sites)


def test_none_beside_tensors_is_an_argument():
    """As rtdl's networks take numbers and, or None, categories: `model(x, None)`."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x, categories):
            x = x if categories is None else x + categories
            return self.head(x.relu())

    model, x = fill(Two()), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    explainer = sp_fx.transform(model, example_inputs=(x, None))
    found = explainer.pullback((x, None), 1)
    leaf = x.clone().requires_grad_()
    with sp_fx.gates.dual_path.plain_derivatives():
        plain = explainer.pullback((x, None), 1)[0]
    assert relative(plain, torch.autograd.grad(model(leaf, None)[:, 1].sum(), leaf)[0]) <= 1e-6
    assert found[1] is None and not torch.equal(found[0], plain)
    assert torch.equal(explainer.pullback((x, x), 1)[0], explainer.pullback(x, 1, forward_kwargs={"categories": x}))
    assert sp_fx.check(explainer, (x, None)).ok
    with pytest.raises(TypeError, match="got NoneType"):
        explainer.pullback((None, None), 1)
