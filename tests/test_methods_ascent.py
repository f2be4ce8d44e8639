"""Ascents: what they keep, their paths, and inputs of one axis."""

import itertools
import json
import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import sp_fx
from helpers import fill, relative
from sp_fx.methods.ascent import Ascent, norms

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def net():
    return fill(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)))


@pytest.fixture(scope="module")
def explainer():
    return sp_fx.transform(net())


def test_no_iterate_but_the_last_is_kept():
    """At each step, of all the points that were pulled back before, none is alive but the start."""
    points, alive = [], []

    def pull(x):
        alive.append([i for i, point in enumerate(points) if point() is not None])
        points.append(weakref.ref(x[0]))
        return [torch.ones_like(x[0])]

    for _ in Ascent(steps=6).iterates([X.clone()], pull):
        pass
    assert alive == [[], *([0] for _ in range(5))]


def test_the_path_is_that_of_ascents_of_fewer_steps(explainer):
    """Whole and in pieces, each path in one tensor of its own size."""
    options = {"bounds": (-1.5, 1.5), "radius": 0.5, "step_size": 0.2}
    change, path = explainer.ascend(X, 1, steps=4, return_path=True, **options)
    assert path.shape == (5, *X.shape) and torch.equal(path[0], X) and torch.equal(change, path[-1] - X)
    assert path.untyped_storage().nbytes() == path.numel() * 4
    for steps in (1, 2, 3, 4):
        assert torch.equal(explainer.ascend(X, 1, steps=steps, **options), path[steps] - X)
    for size in (1, 3):
        assert relative(explainer.ascend(X, 1, steps=4, return_path=True, batch_size=size, **options)[1], path) <= 1e-5


def test_the_input_stays_and_no_graph_is_kept(explainer):
    x = X.clone().requires_grad_()
    change, path = explainer.ascend(x, 1, steps=2, return_path=True)
    assert not (change.requires_grad or path.requires_grad or explainer.ascend(x, 1).requires_grad)
    assert torch.equal(x, X)


# -- other steps, by hand


def by_hand(model, x, steps, alpha, p=2.0, relative=False, clip=None, bounds=None):
    """The iterates of `x + alpha v / ||v||_p`, a sample at a time in float64; `clip(k)` says whether step k is clamped."""
    path = [x.double()]
    for k in range(1, steps + 1):
        rows = []
        for row in path[-1]:
            v = model.pullback(row[None], 1)[0]
            if p is not None:
                v = v / np.linalg.norm(v.numpy(), p)
            if relative:
                v = v * np.linalg.norm(row.numpy(), p)
            moved = row + alpha * v
            rows.append(moved.clamp(*bounds) if bounds and clip(k) else moved)
        path.append(torch.stack(rows))
    return torch.stack(path)


@pytest.mark.parametrize("p, relative_step", [(None, False), *itertools.product((1, 1.5, 2, 3, math.inf), (False, True))])
def test_steps_of_other_norms(p, relative_step):
    model = sp_fx.transform(net().double())
    got = model.ascend(X.double(), 1, steps=3, step_size=0.3, norm=p, relative=relative_step, return_path=True)[1]
    assert relative(got, by_hand(model, X, 3, 0.3, p, relative_step)) <= 1e-12


@pytest.mark.parametrize("clip, clamped", [(1, {1, 2, 3, 4, 5}), (2, {2, 4, 5}), (3, {3, 5}), (9, {5}), ("last", {5})])
def test_every_nth_step_is_clipped(clip, clamped):
    model, bounds = sp_fx.transform(net().double()), (-0.6, 0.7)
    got = model.ascend(X.double(), 1, steps=5, step_size=0.4, bounds=bounds, clip=clip, return_path=True)[1]
    expected = by_hand(model, X, 5, 0.4, clip=clamped.__contains__, bounds=bounds)
    assert relative(got, expected) <= 1e-12
    inside = [bool((x.abs() <= 0.7).all()) for x in got[1:]]
    assert {k for k, is_inside in enumerate(inside, 1) if is_inside} >= clamped


@pytest.mark.parametrize("p, per_number", [(1, 24), (2, 24**0.5), (4, 24**0.25), (math.inf, 1)])
def test_the_default_length_moves_each_number_by_the_paper_s_root_mean_square(p, per_number):
    x = torch.zeros(3, 4, 6)
    assert Ascent(norm=p).length([x]) == pytest.approx(20 / math.sqrt(3 * 224 * 224) * per_number)
    assert Ascent(norm=None).length([x]) == 1


@pytest.mark.parametrize("unrolled, options", [
    (False, {"norm": math.inf, "clip": 2}),
    (False, {"relative": True, "step_size": 0.1, "clip": 3}),
    (True, {"norm": None, "step_size": 0.5, "clip": 3}),
], ids=str)  # fmt: skip
def test_programs_and_packages_of_other_steps(unrolled, options, tmp_path):
    explainer, options = sp_fx.transform(net()), {"steps": 4, "step_size": 0.4, "bounds": (-1.0, 1.0), **options}
    program = explainer.compile("ascend", example_inputs=X, unrolled=unrolled, dynamic_batch=False, **options)
    expected = explainer.ascend(X, 1, **options)
    assert relative(program(X, 1)[1], expected) <= 1e-5
    loaded = sp_fx.load(program.save(tmp_path / "ascent.pt2"))
    assert relative(loaded(X, 1)[1], expected) <= 1e-5
    assert loaded.signature.arguments["norm"] == options.get("norm", 2.0)
    text = json.dumps(loaded.manifest, allow_nan=False)  # as a service shows it
    assert ('"norm": "inf"' in text) == (options.get("norm") == math.inf)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"clip": 0}, "each n-th step, got 0"),
        ({"clip": True}, "got True"),
        ({"clip": np.array([1, 2])}, r"got array\(\[1, 2\]\)"),
        ({"norm": True}, "got True"),
        ({"relative": "yes", "step_size": 0.1}, "relative is True or False, got 'yes'"),
        ({"norm": 0.5}, "norm is the p of an L.p norm, 1 or above .*, got 0.5"),
        ({"norm": "max"}, "got 'max'"),
        ({"relative": True}, "needs a norm, and a step_size"),
        ({"relative": True, "step_size": 0.1, "norm": None}, "needs a norm"),
    ],
    ids=str,
)
def test_steps_that_are_none(explainer, options, message):
    with pytest.raises(ValueError, match=message):
        explainer.ascend(X, 1, **options)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_half_precision_keeps_the_length_of_a_step(norm):
    """Numbers of a unit vector of 200,000 are too small for float16, and their multiples are not."""
    ascent, draw = Ascent(steps=1, norm=norm), torch.Generator().manual_seed(0)
    x, v = torch.zeros(1, 200_000), torch.randn(1, 200_000, generator=draw).half()
    (half,) = ascent.step([x.half()], [x.half()], lambda _: [v], clamp=False)
    (whole,) = ascent.step([x], [x], lambda _: [v.float()], clamp=False)
    assert relative(half.float(), whole) <= 5e-4


def test_bounds_of_float64_travel(tmp_path):
    program = sp_fx.transform(net().double()).compile(
        "ascend", example_inputs=X.double(), steps=2, step_size=20.0, bounds=(-0.1, 0.1), clip="last", dynamic_batch=False
    )
    loaded = sp_fx.load(program.save(tmp_path / "ascent.pt2"))
    change = loaded(X.double(), 1)[1]
    assert torch.equal(change, program(X.double(), 1)[1]) and float((X.double() + change).max()) <= 0.1 + 1e-15


def test_a_zero_pullback_is_a_zero_step():
    model = sp_fx.transform(nn.Sequential(nn.Linear(6, 3)).requires_grad_(False))
    nn.init.zeros_(model.get_submodule("0").weight)
    for options in ({"norm": 1}, {"norm": math.inf}, {"norm": None}, {"relative": True, "step_size": 0.1}):
        assert not model.ascend(X, 1, **options).any()


# -- inputs of one axis: weights of edges, masks over steps


class Weighed(nn.Module):
    def __init__(self, column=False):
        super().__init__()
        self.body, self.column = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 2)), column

    def forward(self, w):
        return self.body(w if self.column else w[:, None])


W = torch.rand(6, generator=torch.Generator().manual_seed(0))
METHODS = {
    "pullback": {},
    "double_pullback": {},
    "ascend": {"steps": 3},
    "ascend in a ball": {"steps": 3, "step_size": 0.3, "radius": 0.4},
    "ascend in a box": {"steps": 3, "bounds": (0.1, 0.8)},
    "ascend in boxes": {"steps": 3, "bounds": (W - 0.1, W + 0.2)},
}


@pytest.mark.parametrize("target", [1, None, torch.tensor([[0, 1]] * 6)], ids=["class", "predicted", "classes"])
@pytest.mark.parametrize("method", METHODS)
def test_inputs_of_one_axis_are_columns(method, target):
    column = sp_fx.transform(fill(Weighed(column=True)))
    explainer = sp_fx.transform(fill(Weighed()))
    options = METHODS[method]
    wide = {key: tuple(b[:, None] if isinstance(b, torch.Tensor) else b for b in value) if key == "bounds" else value
            for key, value in options.items()}  # fmt: skip
    name = method.split()[0]
    expected = getattr(column, name)(W[:, None], target, **wide).squeeze(-1)
    for size in (None, 4):
        got = getattr(explainer, name)(W, target, batch_size=size, **options)
        assert got.shape == expected.shape and relative(got, expected) <= 1e-5
    assert getattr(explainer, name)(W[:0], 1, **{k: v for k, v in options.items() if k != "bounds"}).shape == (0,)


def test_norms_over_several_inputs():
    parts = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.full((2, 1, 1), 1e-30)]
    for norm, part in zip(norms(parts), parts):
        assert norm.shape == (2, *[1] * (part.dim() - 1)) and norm.flatten().tolist() == pytest.approx([5, 1e-30])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pullback", "double_pullback", "ascend"])
def test_programs_of_inputs_of_one_axis(method):
    explainer = sp_fx.transform(fill(Weighed()))
    program = explainer.compile(method, example_inputs=W)
    for w in (W, W[:3]):
        assert relative(program(w, 1)[1], getattr(explainer, method)(w, 1)) <= 1e-5
