"""Ascents: what they keep, their paths, and inputs of one axis."""

import weakref

import pytest
import torch
from torch import nn

import sp_fx
from helpers import fill, relative
from sp_fx.methods.ascent import Ascent, norms

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def explainer():
    return sp_fx.transform(fill(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))))


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
