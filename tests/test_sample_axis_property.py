"""Where the sample is: no sample's map depends on the others of its batch, however a model moves its axes.

First by random programs, whose maps are those that the definition of the gates gives for one sample alone; then by the ways in
which models are written.
"""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from axis_programs import Constant, written
from helpers import fill, relative
from kinds import WAYS, assert_clear, explain, noise

SCALED = ("relu", "leaky_relu", "prelu", "abs", "max_pool")  # kinds whose temperature is in units of the sample's deviation


def scales(explainer):
    return [site.scale for site in explainer.report().of("rewritten") if site.kind in SCALED]


def assert_independent(explainer, x, seed=9, bar=1e-6):
    """The map of each sample alone is its map in this batch, and in one of other mates and another size."""
    maps = explainer.pullback(x, 1)
    mates = torch.cat([x[:1], 3 * noise(2, *x.shape[1:], seed=seed).to(x.dtype)])
    assert relative(explainer.pullback(mates, 1)[:1], maps[:1]) <= bar, "sample 0 among others"
    for i in range(len(x)):
        assert relative(explainer.pullback(x[i : i + 1], 1), maps[i : i + 1]) <= bar, f"sample {i} alone"
    return maps


# -- random programs -----------------------------------------------------------------------------------------------------------


def check_program(seed):
    program, x = written(seed)
    y = program(x).detach()  # with gradients on, as the explainer: torch.matmul goes another way without
    if any(relative(program(x[i : i + 1]), y[i : i + 1]) > 1e-9 for i in range(len(x))):
        pytest.skip("the program mixes samples")
    try:
        expected = [program.map_of_one(x[i : i + 1], 1) for i in range(len(x))]
    except Constant:
        pytest.skip("a gate has no scale")
    norms = [float(maps.norm()) for maps in expected]
    if min(norms) <= 1e-9 * max(norms):  # 1e-17 off: of such a map, 1e-6
        pytest.skip("a map is zero, but for the tail of a shut gate")
    for way in WAYS if seed % 4 == 0 else ("no example", "an example"):  # an export takes ten times as long as a symbolic trace
        where = f"seed {seed}, {way}: {program}"
        explainer = explain(program, x[: 2 + seed % 3], way)
        assert torch.equal(explainer(x), y), where
        maps = assert_independent(explainer, x, seed)
        for i in range(len(x)):
            assert relative(maps[i : i + 1], expected[i]) <= 1e-6, f"sample {i}, {where}"
        assert set(scales(explainer)) <= {"sample"}, where


@pytest.mark.parametrize("seed", range(16))
def test_random_programs(seed):
    check_program(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(16, 3016, 100))
def test_many_random_programs(block):
    for seed in range(block, block + 100):
        try:
            check_program(seed)
        except pytest.skip.Exception:
            continue


# -- ways in which models are written: what they do with [B, T, 6] or [B, 6] ---------------------------------------------------


class Model(nn.Module):
    """`run(self, x)`, then a head over the last axis, [B, 8] to [B, 3]."""

    def __init__(self, run):
        super().__init__()
        self.layer, self.inner, self.head, self.run = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), run
        self.block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.members, self.single = nn.Parameter(torch.zeros(4, 8, 8)), nn.Parameter(torch.zeros(4, 1, 1))
        self.left, self.knots = nn.Parameter(torch.zeros(8, 6)), nn.Parameter(torch.zeros(8, 1))
        self.gru, self.lstm = nn.GRU(6, 8, batch_first=True), nn.LSTM(6, 4, 2, batch_first=True, bidirectional=True)
        self.lstm_first, self.attend = nn.LSTM(6, 8), nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.head(self.run(self, x))


def class_token_first(m, x):
    """Tokens first, as in CLIP, DETR and fairseq; the class token read as `h[0]` of what a module returns."""
    return torch.relu(m.inner(m.block(m.layer(x).transpose(0, 1))[0]))


def last_token_first(m, x):
    return torch.relu(m.inner(m.block(m.layer(x).transpose(0, 1)).contiguous()[-1]))


def attended_first(m, x):
    h = m.layer(x).transpose(0, 1)
    return torch.relu(h + m.attend(h, h, h)[0]).mean(0)


def in_place_first(m, x):
    return m.layer(x.permute(1, 0, 2)).relu_().permute(1, 0, 2).mean(1)


def list_of_heads(m, x):
    q, k = m.layer(x).reshape(x.size(0), 5, 2, 4).permute(2, 0, 1, 3).unbind(0)
    return torch.cat([torch.relu(q), torch.relu(k)], -1).mean(1)


def frames_folded(m, x):
    return torch.relu(m.layer(x.reshape(-1, 6))).reshape(x.size(0), -1, 8).mean(1)


def frames_folded_by_sizes(m, x):
    b, t, c = x.shape
    return torch.relu(m.layer(x.reshape(b * t, c))).view(b, t, -1).mean(1)


def frames_folded_by_rest(m, x):
    return torch.relu(m.layer(x.reshape(-1, *x.shape[2:]))).reshape(x.shape[0], -1, 8).mean(1)


def frames_folded_first(m, x):
    return torch.relu(m.layer(x.transpose(0, 1).flatten(0, 1))).unflatten(0, (5, -1)).mean(0)


def two_axes_of_frames(m, x):
    """5 frames and a sixth of them padded, folded as [3, 2 B, 8]."""
    h = torch.cat([x, x[:, :1]], 1).transpose(0, 1)
    return torch.relu(m.layer(h).reshape(3, -1, 8)).reshape(6, -1, 8).mean(0)


def side_by_side(m, x):
    """Samples in one row, as grouped convolutions like them."""
    return torch.relu(m.layer(x).reshape(1, -1, 8)).reshape(-1, 5, 8).mean(1)


def unsqueezed_module(m, x):
    return torch.relu(m.block(m.layer(x[:, 0]))[None] @ m.members).mean(0)


def unsqueezed_again(m, x):
    return torch.relu(m.block(m.layer(x[:, 0])).unsqueeze(0) @ m.members).mean(0)


def affine_copies(m, x):
    return torch.relu(m.layer(x[:, 0]) * m.single + m.single).mean(0)


def members_by_matmul(m, x):
    return torch.relu(m.layer(x[:, 0]) @ m.members).mean(0)


def time_steps_by_repeat(m, x):
    return torch.relu(m.layer(x[:, 0].repeat(4, 1, 1)) - m.single).mean(0)


def from_the_left(m, x):
    return torch.relu(m.left @ x[:, 0].mT).mT


def from_the_left_by_axes(m, x):
    return torch.relu(m.left @ x[:, 0].transpose(-1, -2)).transpose(-1, -2)


def knots(m, x):
    return torch.relu(x[:, 0, 0] - m.knots).t()


def state_of_a_gru(m, x):
    return torch.relu(m.gru(x)[1]).squeeze(0)


def transposed_state_of_a_gru(m, x):
    return torch.relu(m.inner(m.gru(x)[1].transpose(0, 1))).flatten(1)


def states_of_an_lstm(m, x):
    _, (h, c) = m.lstm(x)
    return torch.relu(h.permute(1, 0, 2)[:, :2].flatten(1) + c[:2].transpose(0, 1).flatten(1))


def last_state_of_an_lstm(m, x):
    return torch.relu(m.inner(m.lstm_first(x.permute(1, 0, 2))[1][0][-1]))


def outputs_of_an_lstm(m, x):
    return torch.relu(m.inner(m.lstm_first(x.transpose(0, 1))[0])).mean(0)


def viewed_state(m, x):
    return torch.relu(m.gru(x)[1].view(-1, 8))


def contracted(m, x):
    return torch.relu(torch.einsum("btc,dc->tbd", x, m.left)).sum(0)


def largest_before_the_sample(m, x):
    return torch.relu(m.layer(x)).transpose(0, 1).amax(0)


def stacked(m, x):
    y = torch.stack([m.layer(x), m.layer(x) - 1], 0).relu()
    return (y[0] + y[1]).mean(1)


RUNS = [class_token_first, last_token_first, attended_first, in_place_first, list_of_heads, frames_folded, frames_folded_by_sizes,
        frames_folded_by_rest, frames_folded_first, two_axes_of_frames, side_by_side, unsqueezed_module, unsqueezed_again,
        affine_copies, members_by_matmul, time_steps_by_repeat, from_the_left, from_the_left_by_axes, knots, state_of_a_gru,
        transposed_state_of_a_gru, states_of_an_lstm, last_state_of_an_lstm, outputs_of_an_lstm, viewed_state, contracted,
        largest_before_the_sample, stacked]  # fmt: skip
X = noise(4, 5, 6) * torch.tensor([1.0, 6.0, 0.1, 10.0], dtype=torch.float64).view(4, 1, 1)


EXPORTED = [class_token_first, attended_first, frames_folded, frames_folded_by_rest, frames_folded_first, side_by_side,
            time_steps_by_repeat, from_the_left, state_of_a_gru]  # fmt: skip
BY_BOTH = [*((run, "no example") for run in RUNS), *((run, "export") for run in EXPORTED)]


@pytest.mark.parametrize("run, way", BY_BOTH, ids=lambda f: getattr(f, "__name__", f))
def test_a_map_does_not_depend_on_the_batch(run, way):
    model = fill(Model(run)).double()
    try:
        explainer = explain(model, X[:3], way)
    except sp_fx.CaptureError as error:
        assert run is frames_folded_by_rest and way == "no example"  # a symbolic trace has no number of axes
        return assert_clear(error)
    assert_independent(explainer, X)
    assert set(scales(explainer)) == {"sample"}


@pytest.mark.parametrize("run", [frames_folded, frames_folded_by_sizes, frames_folded_by_rest, frames_folded_first, side_by_side],
                         ids=lambda f: f.__name__)  # fmt: skip
def test_folded_frames_have_the_map_of_frames_that_are_not(run):
    """A reshape of what a layer works on is no other function."""
    model, other = (fill(Model(f)).double() for f in (run, lambda m, x: torch.relu(m.layer(x)).mean(1)))
    expected = explain(other, X, "no example").pullback(X, 1)
    for way, example in (("no example", X), ("an example", X[:2]), ("an example", X[:1])):
        if run is frames_folded_by_rest and way == "no example":
            continue
        assert relative(explain(model, example, way).pullback(X, 1), expected) <= 1e-9, (way, len(example))


@pytest.mark.parametrize("run", [in_place_first, frames_folded, contracted, stacked], ids=lambda f: f.__name__)
def test_the_scale_is_the_samples_own(run):
    """A sample 1000 times as large has the same map: its gates' temperatures grow with it."""
    model = fill(Model(run)).double()
    nn.init.zeros_(model.layer.bias)
    nn.init.zeros_(model.head.bias)
    if run is stacked:
        model.run = lambda m, x: torch.stack([m.layer(x), 2 * m.layer(x)], 0).relu().mean((0, 2))
    explainer, x = explain(model, X, "no example"), X[:2]
    far = explainer.pullback(torch.stack([x[0], 1000 * x[1]]), 1)
    assert relative(far, explainer.pullback(x, 1)) <= 1e-9


class Video(nn.Module):
    """A network of pictures on the frames of a clip, [B, T, 3, H, W], and the mean of its outputs."""

    def __init__(self, net, fold):
        super().__init__()
        self.net, self.fold = net, fold

    def forward(self, v):
        return self.net(self.fold(v)).reshape(v.shape[0], -1, 3).mean(1)


FOLDS = {
    "flatten": lambda v: v.flatten(0, 1),
    "sizes": lambda v: v.reshape(v.size(0) * v.size(1), 3, v.size(3), v.size(4)),
    "the rest of a shape": lambda v: v.reshape(-1, *v.shape[2:]),
}


@pytest.mark.parametrize("examples", [None, 2, 1])
@pytest.mark.parametrize("fold", FOLDS)
def test_clips_of_equal_frames_have_the_networks_own_map(fold, examples):
    """Both frames of a clip are one picture: the deviation over the clip is the picture's."""
    net = fill(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(),
                             nn.Linear(24, 3))).double()  # fmt: skip
    x = noise(2, 3, 10, 10) * torch.tensor([1.0, 8.0], dtype=torch.float64).view(2, 1, 1, 1)
    clips = x[:, None].repeat(1, 2, 1, 1, 1)
    expected = explain(net, x, "no example").pullback(x, 1)
    try:
        explainer = explain(Video(net, FOLDS[fold]), clips[:examples], "an example" if examples else "no example")
    except sp_fx.CaptureError as error:
        assert fold == "the rest of a shape" and examples is None and "example_inputs" in str(error)
        return
    for frame in explainer.pullback(clips, 1).unbind(1):
        assert relative(2 * frame, expected) <= 1e-9
    assert set(scales(explainer)) == {"sample"}


# -- where no axis is known, and where the samples do meet ---------------------------------------------------------------------


def interleaved(m, x):
    """[B, 8] read as [8, B]: no row and no column is a sample's, though every number is."""
    return torch.relu(m.layer(x[:, 0]).reshape(8, -1)).reshape(-1, 8)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_known_is_said(way):
    """Absolute, with a reason and a warning, at transform with an example and else at the first call; or else right."""
    model = fill(Model(interleaved)).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tracer, example = WAYS[way]
        explainer = sp_fx.transform(model, tracer=tracer, **({"example_inputs": X} if example else {}))
        explainer.pullback(X, 1)
    if not any("the batch is fixed" in note for note in explainer.report().notes):
        assert_independent(explainer, X)
    (site,) = explainer.report().of("rewritten")
    if site.scale == "absolute":
        assert site.reason and any("scale" in str(w.message) or "absolute" in str(w.message) for w in caught)
        assert isinstance(explainer.calibrate(X).report().of("rewritten")[0].scale, float)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("way", WAYS)
def test_samples_that_meet_in_shapes_alone_are_told_apart_by_numbers(batch, way):
    """An attention over the batch [B, B] whose scores are all one, as csatv2 of timm has it: all samples get one constant."""

    def body(m, x):
        h = m.layer(x[:, 0])
        q = torch.ones_like(h)
        return torch.relu(h + (q @ q.mT).softmax(-1) @ q)

    model = fill(Model(body)).double()
    explainer = explain(model, X[:batch], way)
    assert_independent(explainer, X)
    assert set(scales(explainer)) == {"sample"}


@pytest.mark.parametrize("way", ["an example", "export"])
def test_a_gate_of_folded_windows_leaves_its_output_where_the_model_has_it(way):
    """In channels_last, as Hiera has its windows: what follows rounds by the layout, and the forward is bitwise the model's."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2)
            self.after, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

        def forward(self, x):
            h = self.conv(x).permute(0, 2, 3, 1).reshape(-1, 8, 16, 8)
            h = self.pool(h.permute(0, 3, 1, 2))
            self.seen = h
            return self.head(self.after(h).relu().mean((2, 3))).unflatten(0, (-1, 2)).mean(1)

    model, x, strides = fill(Windows()), noise(3, 3, 16, 16, dtype=torch.float32), []
    explainer = explain(model, x, way)
    explainer.get_submodule("pool").register_forward_hook(lambda m, inputs, y: strides.append(y.stride()))
    assert torch.equal(explainer(x), model(x)) and strides == [model.seen.stride()]
    assert set(scales(explainer)) == {"sample"}
    assert relative(explainer.pullback(x[1:2], 1), explainer.pullback(x, 1)[1:2]) <= 1e-5


def test_samples_that_meet_have_their_scale_all_the_same():
    """The model compares each sample with the mean of its batch: the axis is known, though the maps depend on the batch."""
    model = fill(Model(lambda m, x: torch.relu(m.layer(x[:, 0]) - m.layer(x[:, 0]).mean(0)))).double()
    explainer = explain(model, X, "an example")
    explainer.pullback(X, 1)
    assert torch.equal(explainer(X), model(X)) and set(scales(explainer)) <= {"sample", "absolute"}


def test_an_axis_as_long_as_the_batch_is_not_taken_for_it():
    """[T, B, ...] with as many times as samples in the example: shapes of one run cannot tell them apart."""
    model = fill(Model(class_token_first)).double()
    for way in ("an example", "export"):
        explainer = explain(model, noise(5, 5, 6), way)
        assert_independent(explainer, X)


# -- constants beside the sample -----------------------------------------------------------------------------------------------


def test_constants_that_stand_within_the_sample_keep_its_scale():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gamma = nn.Conv2d(3, 6, 3), nn.Parameter(torch.ones(6, 1, 1))
            self.places = nn.Parameter(torch.zeros(1, 36, 6))

        def forward(self, x):
            y = torch.relu(self.conv(x) * self.gamma)
            return torch.relu(y.flatten(2).transpose(1, 2) + self.places).mean(1)

    explainer = explain(fill(Net()).double(), None, "no example")
    assert_independent(explainer, noise(3, 3, 8, 8))
    assert set(scales(explainer)) == {"sample"}


@pytest.mark.parametrize("way", ["no example", "export"])
@pytest.mark.parametrize("value", [0.0, -math.inf, 0.7])
def test_padding_keeps_the_scale_of_each_sample(value, way):
    """TensorFlow's padding of a max pooling is of minus infinity."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)

        def forward(self, x):
            y = F.max_pool2d(F.pad(self.conv(x), (0, 1, 1, 0), value=value), 2)
            return torch.relu(F.pad(y.flatten(2), (2, 0), value=0.5).transpose(0, 1)).mean(2).T

    explainer = explain(fill(Net()).double(), noise(4, 3, 7, 7), way)
    assert_independent(explainer, noise(4, 3, 7, 7))
    assert scales(explainer) == ["sample", "sample"]


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3, 1, 1)])
def test_normalised_pixels_keep_the_scale_of_each_sample(shape):
    """The rank of an input is not known, and the statistics of its channels have three axes, as `pixel_space` has them."""

    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.conv, self.pool = nn.Buffer(torch.full(shape, 0.4)), nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)

        def forward(self, x):
            return self.pool(torch.relu(self.conv(((x + 1) / 2 - self.mean) / self.mean))).mean((2, 3))

    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    for model in (Normalised(), sp_fx.pixel_space(inner, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))):
        explainer = sp_fx.transform(model.double())
        explainer.pullback(noise(2, 3, 8, 8), 1)
        assert set(scales(explainer)) == {"sample"}


def test_a_bias_of_heads_keeps_the_scale_of_each_sample():
    """[heads, places, places] added to [B, heads, places, places], whose rank follows from how heads are made."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.bias, self.out = nn.Linear(8, 24), nn.Parameter(torch.zeros(2, 6, 6)), nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = self.qkv(x).reshape(x.shape[0], 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            y = (q @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
            return torch.relu(self.out(y.transpose(1, 2).flatten(2))).mean(1)

    explainer = explain(fill(Attention()).double(), None, "no example")
    assert_independent(explainer, noise(3, 6, 8))
    assert scales(explainer) == ["sample"]


def test_copies_keep_the_axis():
    """What was measured belongs to copies, too."""
    explainer = explain(fill(Model(affine_copies)).double(), X, "no example")
    maps = explainer.pullback(X, 1)
    twin = copy.deepcopy(explainer)
    assert torch.equal(twin.pullback(X, 1), maps)
    assert relative(twin.pullback(X[:2], 1), maps[:2]) <= 1e-12  # matrix products of two rows and of four differ in the last bit


def test_several_inputs_share_one_batch():
    """Two inputs with the batch on axis 0, a table without it that has as many rows, and a mask."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x, y, table):
            h = torch.relu(self.a(x) + self.b(y))[None] + table[:, None]
            return self.head(F.leaky_relu(h, 0.1).mean(0))

    model, table = fill(Pair()).double(), noise(4, 8, seed=5)
    explainer = explain(model, None, "no example")
    x, y = X[:, 0], noise(4, 5, seed=6)
    maps = explainer.pullback((x, y), 1, forward_kwargs={"table": table})
    for i in range(4):
        alone = explainer.pullback((x[i : i + 1], y[i : i + 1]), 1, forward_kwargs={"table": table})
        for a, b in zip(alone, maps):
            assert relative(a, b[i : i + 1]) <= 1e-6
