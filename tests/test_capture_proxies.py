"""What a forward stores while it is traced: proxies come off again, and what stood there before comes back, but in lists."""

import collections
import copy
import dataclasses
import pickle
import types

import torch
from torch import fx, nn

import sp_fx
from sp_fx.capture.clone import EvalClone
from sp_fx.capture.proxies import Snapshot, holders


class Helper:
    def __init__(self):
        self.last = "nothing yet"


class Stores(nn.Module):
    """A forward that stores its activation wherever one can."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))
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


def proxies_in(model):
    values = [v for holder in holders(model) for v in (holder.values() if isinstance(holder, dict) else holder)]
    return [v for v in values if isinstance(v, fx.Proxy)]


def test_everything_is_as_it_was_but_for_what_is_no_proxy():
    clone = EvalClone()(Stores())
    mean = clone.mean
    snapshot = Snapshot(clone)
    tracer = fx.Tracer()
    tracer.proxy_buffer_attributes = True
    tracer.trace(clone)
    assert len(proxies_in(clone)) >= 8
    assert snapshot.take_off() == ["mean"]
    assert not proxies_in(clone)
    assert clone.mean is mean and clone.last is None and clone.count == 1
    assert clone.cache == ["kept"] and list(clone.queue) == ["kept"] and clone.queue.maxlen == 4
    assert clone.memo == {"old": 1, "deep": {"list": []}} and clone.space.h == 2 and clone.helper.last == "nothing yet"


def test_containers_that_hold_themselves():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.ring = []
            self.ring.append(self.ring)

        def forward(self, x):
            self.ring.append(x)
            return x.relu()

    clone = Net()
    snapshot = Snapshot(clone)
    fx.Tracer().trace(clone)
    assert snapshot.take_off() == [] and len(clone.ring) == 1 and clone.ring[0] is clone.ring


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
