"""The methods: targets, shapes, bad input, and what a long-running process needs."""

import copy
import gc
import pickle
import threading
from itertools import pairwise

import pytest
import torch
from torch import nn

import sp_fx
from helpers import golden, relative


@pytest.fixture(scope="module")
def vgg():
    model, data = golden("tiny_vgg")
    return sp_fx.transform(model), data["input"], model


def mlp(*sizes):
    torch.manual_seed(0)
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


# -- targets


def test_forms_of_one_target(vgg):
    explainer, x, model = vgg
    one = explainer.pullback(x, 4)
    direction = torch.zeros(3, 10)
    direction[:, 4] = 1
    forms = [
        torch.tensor(4),
        torch.tensor([4, 4, 4]),
        [4, 4, 4],
        direction,
        direction.double(),
        (4,),
        [(4,)] * 3,
        lambda y: y[:, 4],
    ]
    for form in forms:
        assert torch.equal(explainer.pullback(x, form), one)
    assert torch.equal(explainer.pullback(x), explainer.pullback(x, model(x).argmax(1)))


def test_a_direction_is_linear_in_its_length(vgg):
    explainer, x, _ = vgg
    u = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    assert relative(explainer.pullback(x, 2 * u), 2 * explainer.pullback(x, u)) <= 1e-6  # float32 sums


def test_many_targets_equal_single_calls(vgg):
    explainer, x, _ = vgg
    t = torch.tensor([[0, 1], [2, 3], [4, 5]])
    for method in (explainer.pullback, explainer.double_pullback, explainer.ascend):
        many = method(x, t)
        assert many.shape == (3, 2, *x.shape[1:])
        for k in (0, 1):
            assert relative(many[:, k], method(x, t[:, k])) <= 1e-4  # five normalised steps amplify float32 rounding
    assert relative(explainer.pullback(x, t, chunk=1), explainer.pullback(x, t)) <= 1e-6
    assert explainer.ascend(x, t, steps=2, return_path=True)[1].shape == (3, 3, 2, *x.shape[1:])


def test_the_model_runs_once_for_many_targets(vgg):
    explainer, x, _ = vgg
    runs = []
    handle = explainer.features.register_forward_hook(lambda *_: runs.append(1))
    explainer.pullback(x, torch.arange(9).view(3, 3), chunk=2)
    handle.remove()
    assert len(runs) == 1


def test_outputs_with_several_axes():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.conv(x).relu()

    explainer = sp_fx.transform(Dense())
    x = torch.randn(2, 3, 5, 5)
    at = explainer.pullback(x, (1, 2, 3))
    assert at[:, :, 2, 3].norm() > 0
    at[:, :, 2, 3] = 0
    assert not at.any()
    assert relative(explainer.pullback(x, 1), sum(explainer.pullback(x, (1, i, j)) for i in range(5) for j in range(5))) <= 1e-6
    with pytest.raises(ValueError, match=r"shape \[2, 4, 5, 5\] has no single class axis"):
        explainer.pullback(x)
    with pytest.raises(ValueError, match="4 indices"):
        explainer.pullback(x, (1, 2, 3, 4))


def test_other_outputs():
    class Outputs(nn.Module):
        def __init__(self, pack):
            super().__init__()
            self.body, self.pack = mlp(4, 5, 3), pack

        def forward(self, x):
            y = self.body(x).relu()
            return {"logits": y, "other": x} if self.pack == "dict" else (y, x)

    x = torch.randn(2, 4)
    reference = sp_fx.transform(nn.Sequential(mlp(4, 5, 3), nn.ReLU())).pullback(x, 1)
    assert torch.equal(sp_fx.transform(Outputs("dict")).pullback(x, 1), reference)
    explainer = sp_fx.transform(Outputs("tuple"))
    with pytest.raises(TypeError, match=r"tuple with the tensors out\[0\], out\[1\]: pass a callable"):
        explainer.pullback(x, 1)
    assert torch.equal(explainer.pullback(x, lambda out: out[0][:, 1]), reference)


BAD_TARGETS = {
    "too large": (10, IndexError, r"target 10 is outside 0 to 9"),
    "negative": (-1, IndexError, r"target -1 is outside"),
    "text": ("cat", TypeError, r"got the target 'cat'; expected None"),
    "fraction": (1.5, TypeError, r"got the target 1.5"),
    "flag": (True, TypeError, r"got the target True"),
    "flags": (torch.tensor([True, False, True]), TypeError, "bool"),
    "other batch": (torch.tensor([1, 2]), ValueError, r"\[3\] or \[3, T\].*got \[2\]"),
    "three axes": (torch.zeros(3, 2, 2, dtype=torch.long), ValueError, r"got \[3, 2, 2\]"),
    "direction of another shape": (torch.zeros(10), ValueError, r"expected \[3, 10\], got \[10\]"),
    "complex": (torch.zeros(3, 10, dtype=torch.complex64), ValueError, "complex64"),
    "one in many": (torch.tensor([[1, 2], [3, 10], [1, 1]]), IndexError, "target 10"),
    "callable without a tensor": (lambda y: 3, TypeError, "returned a int"),
    "callable that ignores the output": (lambda y: torch.zeros(3), ValueError, "does not depend on the output"),
}


@pytest.mark.parametrize("name", BAD_TARGETS)
@pytest.mark.parametrize("method", ["pullback", "double_pullback", "ascend"])
def test_bad_targets(vgg, name, method):
    explainer, x, _ = vgg
    target, error, message = BAD_TARGETS[name]
    with pytest.raises(error, match=message):
        getattr(explainer, method)(x, target)


# -- inputs


def head(width):
    return nn.Flatten(), nn.Linear(width, 5)


RANKS = {
    "table rows": ((4, 6), lambda: mlp(6, 9, 3)),
    "series": ((2, 3, 20), lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.MaxPool1d(3, 2, 1), *head(36))),
    "volumes": ((2, 1, 6, 6, 6), lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.MaxPool3d(2), *head(16))),
    "sets": ((2, 7, 4, 6), lambda: nn.Sequential(nn.Linear(6, 3), nn.GELU(), *head(84))),
}  # fmt: skip


@pytest.mark.parametrize("name", RANKS)
def test_any_rank(name):
    shape, make = RANKS[name]
    x = torch.randn(shape)
    explainer = sp_fx.transform(make())
    assert explainer.pullback(x, 1).shape == explainer.ascend(x, 1, steps=2).shape == x.shape
    assert explainer.pullback(x[:0], 1).shape == explainer.ascend(x[:0], 1).shape == x[:0].shape


def test_several_inputs_of_which_one_is_integer():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.body = nn.Embedding(5, 4), mlp(4, 6, 3)

        def forward(self, x, ids, weight):
            return self.body(x * weight + self.table(ids))

    explainer = sp_fx.transform(Two())
    x, ids, w = torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.randn(3, 4)
    maps = explainer.pullback((x, ids, w), 1)
    assert [m if m is None else m.shape for m in maps] == [x.shape, None, w.shape]
    delta, path = explainer.ascend((x, ids, w), 1, steps=2, return_path=True)
    assert delta[1] is path[1] is None and path[2].shape == (3, 3, 4)
    step = (path[0][1] - x).square().sum(1) + (path[2][1] - w).square().sum(1)  # one step for both inputs together
    assert torch.allclose(step.sqrt(), torch.full((3,), 20 * (8 / 150528) ** 0.5), rtol=1e-5)
    assert relative(explainer.pullback((x, ids, w), 1, batch_size=2)[0], maps[0]) <= 1e-6  # products of other shapes


BAD_INPUTS = {
    "integers": (torch.zeros(3, 3, 32, 32, dtype=torch.long), TypeError, "nothing to explain.*int64"),
    "complex": (torch.zeros(3, 3, 32, 32, dtype=torch.complex64), TypeError, "complex"),
    "no tensor": ([[1.0]], TypeError, "expected a tensor, a container of tensors.*list"),
    "nothing": ((), ValueError, "empty tuple"),
    "no batch": (torch.tensor(1.0), ValueError, "batch axis"),
    "NaN": (torch.full((3, 3, 32, 32), float("nan")), ValueError, "NaN"),
    "other device": (torch.zeros(3, 3, 32, 32, device="meta"), ValueError, "on meta and the model on cpu"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs(vgg, name):
    inputs, error, message = BAD_INPUTS[name]
    with pytest.raises(error, match=message):
        vgg[0].pullback(inputs, 1)


BAD_ASCENTS = [
    *({"steps": steps} for steps in (0, 1.5, True)),
    *({"step_size": size} for size in (0.0, -1.0, float("nan"), "a")),
    *({"bounds": bounds} for bounds in [(1, -1), (1.0, 1.0), (torch.tensor([0.0, 2.0]), 1.0), 1.0]),
    {"radius": 0.0},
    {"clip": "sometimes"},
]


@pytest.mark.parametrize("options", BAD_ASCENTS, ids=str)
def test_bad_ascents(vgg, options):
    with pytest.raises(ValueError, match=next(iter(options)).split("_")[0] + ".*got"):
        vgg[0].ascend(vgg[1], 1, **options)


def test_bounds_of_each_sample_are_cut_with_the_batch(vgg):
    explainer, x = vgg[:2]
    x = x[:3]
    box = (x - 0.1, x + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1))
    whole = explainer.ascend(x, 1, steps=2, bounds=box)
    assert relative(explainer.ascend(x, 1, steps=2, bounds=box, batch_size=2), whole) <= 1e-5
    twice = explainer.ascend(x, torch.tensor([[1, 0]] * 3), steps=2, bounds=box)
    assert relative(twice[:, 0], whole) <= 1e-5
    with pytest.raises(ValueError, match=r"a bound broadcasts to the inputs, .* got one of shape \[7, 1, 1, 1\]"):
        explainer.ascend(x[:1], 1, bounds=(torch.zeros(7, 1, 1, 1), 1.0))


def test_no_method_keeps_the_callers_graph(vgg):
    explainer, x = vgg[:2]
    leaf = x[:1].clone().requires_grad_()
    assert not explainer.pullback(leaf, 1).requires_grad and not explainer.double_pullback(leaf, 1).requires_grad
    assert not any(t.requires_grad for t in explainer.ascend(leaf, 1, steps=1, return_path=True))


def test_bad_batch_size(vgg):
    with pytest.raises(ValueError, match="batch_size is a whole number of at least 1"):
        vgg[0].pullback(vgg[1], 1, batch_size=0)


# -- steps


def test_default_step_is_the_papers_at_its_resolution():
    explainer = sp_fx.transform(mlp(6, 9, 3))
    x = torch.randn(2, 6)
    assert torch.allclose(explainer.ascend(x, 1, steps=1).norm(dim=1), torch.full((2,), 20 * (6 / 150528) ** 0.5), rtol=1e-5)


def test_a_zero_pullback_gives_a_zero_step():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[2].weight.zero_()
    explainer = sp_fx.transform(model)
    assert torch.equal(explainer.ascend(torch.ones(2, 4), 1), torch.zeros(2, 4))


def test_tiny_pullbacks_still_step():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[2].weight.mul_(1e-25)
    change = sp_fx.transform(model).ascend(torch.ones(1, 4), 1, steps=1, step_size=1.0)
    assert abs(change.norm().item() - 1) < 1e-5


# -- life in a process


def test_no_grad_and_inference_mode(vgg):
    explainer, x, model = vgg
    expected = explainer.pullback(x, 1)
    with torch.no_grad():
        assert torch.equal(explainer.pullback(x, 1), expected)
    with torch.inference_mode():
        assert torch.equal(explainer.pullback(x.clone(), 1), expected)
        assert explainer.ascend(x, 1, steps=2).shape == x.shape
        assert torch.equal(sp_fx.transform(model).pullback(x, 1), expected)
    assert not expected.requires_grad and expected.grad_fn is None


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_and_pickles(vgg, copied):
    explainer, x, _ = vgg
    other = copied(explainer)
    assert torch.equal(other.pullback(x, 1), explainer.pullback(x, 1))
    assert str(other.report()) == str(explainer.report())
    if copied is copy.deepcopy:
        assert other.classifier[0].weight.data_ptr() != explainer.classifier[0].weight.data_ptr()


def test_threads_share_one(vgg):
    explainer, x, _ = vgg
    expected = [explainer.pullback(x, k) for k in range(4)]
    threaded = {}

    def work(k):
        threaded[k] = [explainer.pullback(x, k) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(m, expected[k]) for k in range(4) for m in threaded[k])


def live_tensors():
    gc.collect()
    return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())


def test_calls_leave_nothing_behind(vgg):
    explainer, x, _ = vgg

    def calls():
        explainer.pullback(x, 1)
        explainer.ascend(x, 1, steps=2, bounds=(-1, 1))
        for bad in (99, "cat"):
            with pytest.raises((IndexError, TypeError)):
                explainer.pullback(x, bad)

    calls()
    before = live_tensors()
    for _ in range(5):
        calls()
    assert live_tensors() == before


def test_ascend_keeps_nothing_from_step_to_step(vgg):
    explainer, x, _ = vgg
    counts = []
    handle = explainer.features.register_forward_hook(lambda *_: counts.append(live_tensors()))
    explainer.ascend(x, 1, steps=4)
    handle.remove()
    assert max(counts[1:]) == min(counts[1:])


def test_attribute_is_captums_saliency(vgg):
    from captum.attr import InputXGradient, Saliency

    explainer, x, _ = vgg
    x = x.clone().requires_grad_()
    t = torch.tensor([1, 4, 7])
    assert relative(Saliency(explainer).attribute(x, target=t, abs=False), explainer.attribute(x, t)) <= 1e-6
    assert relative(InputXGradient(explainer).attribute(x, target=t), x * explainer.attribute(x, t)) <= 1e-6
    assert torch.equal(explainer.attribute(x, t), explainer.pullback(x, t))
    message = "Target not provided when necessary, cannot take gradient with respect to multiple outputs."
    for explain in (Saliency(explainer).attribute, explainer.attribute):
        with pytest.raises(AssertionError, match=message):
            explain(x)
    single = sp_fx.transform(mlp(4, 6, 1))
    assert single.attribute(torch.randn(3, 4)).shape == (3, 4)


def test_additional_forward_args():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(4, 6, 3)

        def forward(self, x, by):
            return self.body(x) * by

    explainer = sp_fx.transform(Scaled())
    x = torch.randn(3, 4)
    assert relative(explainer.attribute(x, 1, additional_forward_args=2.0), 2 * explainer.attribute(x, 1, (1.0,))) <= 1e-6


def test_one_samples_map_does_not_depend_on_its_batch(vgg):
    explainer, x, _ = vgg
    t = torch.tensor([1, 2, 3])
    for i in range(3):
        assert relative(explainer.pullback(x[i : i + 1], t[i : i + 1]), explainer.pullback(x, t)[i : i + 1]) <= 1e-5


def test_scaling_a_layer_up_and_the_next_down_leaves_the_default_map():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
                          nn.Linear(8 * 16, 4)).double()  # fmt: skip
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(300), other[0].bias.mul_(300), other[3].weight.div_(300)
    assert relative(sp_fx.transform(other).pullback(x, 1), sp_fx.transform(model).pullback(x, 1)) <= 1e-10
    paper = sp_fx.Rules.paper()
    assert relative(sp_fx.transform(other, rules=paper).pullback(x, 1), sp_fx.transform(model, rules=paper).pullback(x, 1)) > 0.1


def test_pixel_space():
    model, mean, std = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    normalised = ((pixels + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(sp_fx.pixel_space(model, mean, std)(pixels), model(normalised), atol=1e-6)
    with pytest.raises(ValueError, match="one mean and one std"):
        sp_fx.pixel_space(model, mean, [0.2, 0.0, 0.1])
