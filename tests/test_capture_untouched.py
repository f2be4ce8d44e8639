"""What a forward changes while it is traced, wherever that is, is as it was before; also when the transform fails."""

import collections
import contextlib
import copy
import dataclasses
import functools
import pickle
import random
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import sp_fx
from helpers import fill
from kinds import WAYS, explain, net, noise


class Helper:
    def __init__(self):
        self.last = "nothing yet"


class Stores(nn.Module):
    """A forward that stores its activation wherever one can."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(2, 3))
        self.last, self.count = None, 0
        self.cache, self.queue = ["kept"], collections.deque(["kept"], maxlen=4)
        self.memo = {"old": 1, "deep": {"list": []}}
        self.space = types.SimpleNamespace(h=2)
        self.helper = Helper()

    def forward(self, x):
        h = self.inner(x)
        self.count += 1
        self.last = self.helper.last = self.space.h = self.memo["old"] = self.memo["new"] = self.mean = h
        self.cache.append(h)
        self.queue.append(h)
        self.memo["deep"]["list"].append(h)
        return h.relu()


FEATURES, SEEN, TOTAL = {"old": 1}, ["first", "second"], 0  # of this file
STATE = Helper()


class Everywhere(Stores):
    """Also in its file, in its class, and in objects of plain classes, to some depth."""

    calls, memory = 0, []

    def __init__(self):
        super().__init__()
        self.helper.step, self.helper.inner = 0, Helper()
        self.slotted, self.kinds = Slotted(), {"a", "b"}
        self.counting = counter()
        self.raises = False

    def forward(self, x):
        global TOTAL
        h = super().forward(x)
        TOTAL += 1
        FEATURES["h"], STATE.last = h, h
        SEEN.insert(1, h)
        SEEN.pop(0)
        type(self).calls += 1
        Everywhere.memory.append(h)
        self.helper.step += 1
        self.helper.inner.last = h
        self.helper.inner.new = [h]
        self.slotted.last, self.slotted.step = h, 1
        self.kinds.discard("a")
        self.memo.pop("old")
        self.counting()
        random.random()
        if self.raises:
            raise ValueError("in the forward")
        return h


class Slotted:
    __slots__ = ("last", "step")

    def __init__(self):
        self.last = None


def counter():
    n = 0

    def count():
        nonlocal n
        n += 1
        return n

    return count


def everything(model):
    """All that the forward of `Everywhere` may have changed; in the order of insertion, where there is one."""
    containers = (model.cache, model.queue, list(model.memo.items()), model.memo["deep"], model.space, model.kinds)
    objects = [
        vars(model.helper).copy(),
        vars(model.helper.inner),
        vars(STATE),
        model.slotted.last,
        hasattr(model.slotted, "step"),
    ]
    objects[0].pop("inner")
    file = (list(FEATURES.items()), SEEN, TOTAL, Everywhere.calls, Everywhere.memory, random.getstate())
    plain = (model.last, model.count, model.counting.__closure__[0].cell_contents)
    return str((containers, objects, file, plain)), model.mean


@pytest.mark.parametrize("tracer", ["fx", "export"])
@pytest.mark.parametrize("raises", [False, True])
def test_a_transform_leaves_everything_as_it_was(tracer, raises):
    model, x = Everywhere().eval(), torch.randn(2, 3)
    model.raises = raises
    (before, mean), held = everything(model), (FEATURES, SEEN, model.memo["deep"]["list"], Everywhere.memory)
    with pytest.raises(sp_fx.CaptureError, match="in the forward") if raises else contextlib.nullcontext():
        explainer = sp_fx.transform(model, tracer=tracer, example_inputs=x)
    assert everything(model)[0] == before and model.mean is mean
    assert all(a is b for a, b in zip(held, (FEATURES, SEEN, model.memo["deep"]["list"], Everywhere.memory)))
    if not raises:
        notes = " ".join(explainer.report().notes)
        assert "draws from random" in notes
        assert "the forward changes last, count, " in notes and "each call starts from what was there at transform" in notes
        assert torch.equal(pickle.loads(pickle.dumps(explainer))(x), explainer(x))
        assert torch.equal(explainer(x), model(x)) and model.count == 1


def test_containers_that_hold_themselves():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.ring = []
            self.ring.append(self.ring)

        def forward(self, x):
            self.ring.append(x)
            return x.relu()

    model = Net()
    sp_fx.transform(model)
    assert len(model.ring) == 1 and model.ring[0] is model.ring


class Refuses(dict):
    """A dictionary that can neither be filled nor copied by its own methods."""

    def update(self, *args, **kwargs):
        raise TypeError("read only")

    __setitem__ = copy = __copy__ = __reduce_ex__ = update


def test_dictionaries_that_refuse_to_be_filled_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.settings, self.view = Refuses(scale=2.0), types.MappingProxyType({"layer": self.layer, "scale": 3.0})

        def forward(self, x):
            return self.view["layer"](x).relu() * self.settings["scale"] * self.view["scale"]

    model, x = Net(), torch.randn(2, 4)
    assert torch.equal(sp_fx.transform(model)(x), model(x))
    model.view = Refuses(layer=model.layer, scale=1.0)
    with pytest.raises(sp_fx.CaptureError, match=r"the model's Net.view holds modules of the model in a Refuses"):
        sp_fx.transform(model)


def test_containers_of_every_kind_stay_the_models():
    @dataclasses.dataclass
    class Record:
        last: object = None

    class Store:
        last = None

    class Logging(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.log, self.space, self.record = collections.deque(maxlen=2), types.SimpleNamespace(last=None), Record()
            self.store = Store()
            self.ordered, self.layers = collections.OrderedDict(last=None), collections.OrderedDict(first=self.layer)
            self.round = {}
            self.round["itself"] = self.round

        def forward(self, x):
            y = self.layers["first"](x)
            self.log.append(y)
            self.space.last = self.record.last = self.ordered["last"] = self.store.last = self.store.new = y
            return y.relu()

    model, x = Logging(), torch.randn(2, 4)
    explainer = sp_fx.transform(model)
    assert not model.log and model.space.last is model.record.last is model.ordered["last"] is model.store.last is None
    assert not hasattr(model.store, "new")
    assert torch.equal(explainer(x), model(x)) and len(model.log) == 1


def test_what_a_trace_puts_into_containers_is_taken_out():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.cache = nn.Linear(4, 2), {}

        def forward(self, x):
            self.cache["last"] = self.layer(x)
            self.cache.setdefault("all", []).append(self.cache["last"])
            return self.cache["last"].relu()

    explainer, x = sp_fx.transform(Caching()), torch.randn(3, 4)
    again = pickle.loads(pickle.dumps(copy.deepcopy(explainer)))
    assert torch.equal(again.pullback(x, 1), explainer.pullback(x, 1))


@functools.lru_cache
def places(size):
    return torch.arange(size, dtype=torch.get_default_dtype())


class Remembers(nn.Module):
    """A forward with caches: of its file, of its class, of an attribute."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    ones = staticmethod(functools.lru_cache(None)(torch.ones))

    @functools.cached_property
    def twos(self):
        return torch.full((4,), 2.0)

    def forward(self, x):
        return (self.inner(x) * places(x.shape[-1]) + self.ones(4) * self.twos).relu()


@pytest.mark.parametrize("tracer", ["fx", "export"])
def test_caches_keep_nothing_of_a_trace(tracer):
    """A tensor of torch.export's, in a cache, would be what the model computes with from then on."""
    places.cache_clear()
    Remembers.ones.cache_clear()
    model, x = Remembers().eval(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    explainer = sp_fx.transform(model, tracer=tracer, example_inputs=x)
    assert type(places(4)) is type(model.ones(4)) is type(model.twos) is torch.Tensor
    assert torch.equal(explainer(x), model(x))


# -- tensors that a forward writes over


class Plain(nn.Module):
    """ReLU of a layer whose weights, or what else it holds, `write(self)` writes over."""

    def __init__(self, write):
        super().__init__()
        self.inner, self.write = nn.Linear(6, 4), write
        self.register_buffer("mean", torch.zeros(4))
        self.last = torch.zeros(4)

    def forward(self, x):
        with torch.no_grad():
            self.write(self)
        return (self.inner(x) + self.mean + self.last).relu()


TABLE = torch.zeros(4)  # of this file
WRITES = {
    "a weight": lambda m: m.inner.weight.clamp_(min=0),
    "the data of a weight": lambda m: m.inner.weight.data.clamp_(min=0),
    "an item of a weight": lambda m: m.inner.weight.__setitem__(0, 0),
    "more at each call": lambda m: m.inner.weight.add_(1),
    "other data": lambda m: setattr(m.inner.weight, "data", m.inner.weight.data.clamp(min=0)),
    "a buffer": lambda m: m.mean.add_(1),
    "an attribute": lambda m: m.last.add_(1),
    "a tensor of the file": lambda m: TABLE.add_(1),
}


@pytest.mark.parametrize("tracer", ["auto", "fx", "export"])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_what_a_forward_writes_over_stays(write, verify, tracer):
    """However far it comes: by transform, call, map and check the model's tensors are what and where they were."""
    model, x = fill(Plain(WRITES[write])), noise(3, 6, dtype=torch.float32)
    TABLE.zero_()
    held = [*model.parameters(), *model.buffers(), model.last, TABLE]
    before, places = [t.clone() for t in held], [t.data_ptr() for t in held]
    expected = copy.deepcopy(model)(x).detach()
    TABLE.zero_()
    explained = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            explainer = sp_fx.transform(model, tracer=tracer, example_inputs=x, verify=verify)
        except sp_fx.CaptureError:
            explained = False
        else:
            found = explainer(x)
            explainer.pullback(x, 1)
            checks = sp_fx.check(explainer, x)
    now = [*model.parameters(), *model.buffers(), model.last, TABLE]
    assert all(a is b for a, b in zip(held, now)) and places == [t.data_ptr() for t in now]
    assert all(torch.equal(a, b) for a, b in zip(before, now))
    if explained and verify:
        assert torch.equal(found, expected) and checks
    assert explained or write not in ("a buffer",)


def test_a_model_that_fails_while_it_writes_stays():
    def write(m):
        m.inner.weight.clamp_(min=0)
        raise ValueError("after the write")

    model = fill(Plain(write))
    before = model.inner.weight.clone()
    for tracer in ("auto", "fx", "export"):
        with pytest.raises(sp_fx.CaptureError, match="after the write"):
            sp_fx.transform(model, tracer=tracer, example_inputs=noise(3, 6, dtype=torch.float32))
        assert torch.equal(model.inner.weight, before)


def test_numbers_that_others_draw_are_refused_by_name():
    """What `random` and numpy draw is a constant of a trace: another function, of which the message names the generator."""
    draws = {
        "random": lambda m, h: torch.relu(h) * random.random(),
        "numpy.random": lambda m, h: torch.relu(h) * np.random.rand(),
    }
    for name, body in draws.items():
        model = net(body)
        for way in WAYS:
            with pytest.raises(sp_fx.CaptureError, match=f"draws from {name}: what it drew at transform is a constant"):
                explain(model, noise(4, 6), way).pullback(noise(4, 6), 1)


class Lazy:
    """Imports what it stands for when it is first asked for anything, and fails, as MONAI's optional imports do."""

    def __getattr__(self, name):
        raise ImportError(f"import of an optional package, for {name}")


OPTIONAL = Lazy()


def test_objects_that_import_when_they_are_asked():
    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x.relu()) if x is not OPTIONAL else OPTIONAL.never

    model, x = Uses().eval(), torch.randn(2, 4)
    assert torch.equal(sp_fx.transform(model)(x), model(x))
