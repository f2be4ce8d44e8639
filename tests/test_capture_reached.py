"""Wherever a function of the user's own may keep what a forward stores: it is as it was, by every tracer, also after calls."""

import array
import pickle
import random
import types

import numpy as np
import pytest
import torch

import sp_fx
from kinds import WAYS, explain, net, noise


class Helper:
    pass


DEEP = {"kv": {"keys": []}}  # of this file
INNER = Helper()
INNER.inner = types.SimpleNamespace(list=[])
ELSEWHERE = types.ModuleType("elsewhere")  # a module that this file has imported, so to say
ELSEWHERE.LOG, ELSEWHERE.COUNT = [], 0
exec("def log(h):\n    global COUNT\n    COUNT += 1\n    LOG.append(h)\n    return h", vars(ELSEWHERE))


class Registry:
    """A class that is no module, with attributes of the class."""

    table, total = {}, 0


class Private:
    __slots__ = ("__count",)

    def __init__(self):
        self.__count = 0

    def add(self):
        self.__count += 1

    def read(self):
        return self.__count


class One:
    __slots__ = "count"

    def __init__(self):
        self.count = 0


def decorated(function):
    kept = [[]]

    def outer(*args):
        kept[0].append(args)
        return function(*args)

    return outer


@decorated
def with_a_closure(h):
    return h


def with_a_default(h, memo=[], *, named={"n": []}):  # noqa: B006  # it is what is tested
    memo.append(h)
    named["n"].append(h)
    return h


def with_attributes(h):
    with_attributes.calls = getattr(with_attributes, "calls", 0) + 1
    with_attributes.cache.append(h)
    return h


with_attributes.cache = []


def into_a_registry(h):
    Registry.total += 1
    Registry.table["h"] = h
    return h


def deep_in_a_file(h):
    DEEP["kv"]["keys"].append(h)
    INNER.inner.list.append(h)
    return h


def of_a_module(h):
    ELSEWHERE.COUNT += 1
    ELSEWHERE.LOG.append(h)
    return ELSEWHERE.log(h)


KWDEFAULTS = with_a_default.__kwdefaults__
KEEPERS = {
    "a module that is named": (of_a_module, lambda m: (ELSEWHERE.COUNT, len(ELSEWHERE.LOG))),
    "a closure": (with_a_closure, lambda m: len(with_a_closure.__closure__[1].cell_contents[0])),
    "a default": (with_a_default, lambda m: [len(with_a_default.__defaults__[0]), *map(len, KWDEFAULTS["named"].values())]),
    "a function's attributes": (with_attributes, lambda m: (vars(with_attributes).get("calls"), len(with_attributes.cache))),
    "a class": (into_a_registry, lambda m: (Registry.total, len(Registry.table))),
    "deep in a file": (deep_in_a_file, lambda m: (len(DEEP["kv"]["keys"]), len(INNER.inner.list))),
    "a private slot": (lambda h: h, lambda m: m.private.read()),
    "a slot": (lambda h: h, lambda m: m.one.count),
    "bytes": (lambda h: h, lambda m: bytes(m.bytes)),
    "an array": (lambda h: h, lambda m: m.array.tolist()),
    "an array of numpy": (lambda h: h, lambda m: m.numbers.tolist()),
}


def keeping(m, h):
    m.private.add()
    m.one.count += 1
    m.bytes[0] += 1
    m.array.append(1)
    m.numbers[0] += 1
    return torch.relu(m.keeper(h))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KEEPERS)
def test_whatever_keeps_what_a_forward_stores_is_as_it_was(kind, way):
    keeper, read = KEEPERS[kind]
    parts = {"private": Private(), "one": One(), "bytes": bytearray(2), "array": array.array("b"), "numbers": np.zeros(2)}
    model = net(keeping)
    for name, part in {**parts, "keeper": keeper}.items():
        setattr(model, name, part)
    before = read(model)
    x = noise(4, 6)
    explainer = explain(model, x, way)
    assert read(model) == before
    explainer.pullback(x, 1)
    explainer(x)
    assert read(model) == before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("generator", [random.Random(3), np.random.default_rng(3)], ids=["random", "numpy"])
def test_a_generator_of_the_models_own_is_refused_and_stays(generator, way):
    model = net(lambda m, h: torch.relu(h) * m.rng.random())
    model.rng = generator
    before = pickle.dumps(generator)
    with pytest.raises(sp_fx.CaptureError, match="draws from rng: what it drew at transform is a constant here"):
        explain(model, noise(4, 6), way)(noise(4, 6))
    assert pickle.dumps(generator) == before
