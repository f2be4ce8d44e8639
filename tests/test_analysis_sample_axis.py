"""Where the sample is: no sample's map may depend on the others of its batch, however a model moves its axes."""

import pytest
import torch
from torch import nn

import sp_fx
from helpers import fill, relative


class Model(nn.Module):
    """[B, 6, 8] to [B, 3]: a layer, ReLUs in whatever layout `run` chooses, a head over the mean."""

    def __init__(self, run):
        super().__init__()
        self.inner, self.head, self.run = nn.Linear(8, 8), nn.Linear(8, 3), run
        self.pool, self.conv = nn.MaxPool1d(3, 2, 1), nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x):
        return self.head(self.run(self, x))


def sequence_first(m, x):
    return torch.relu(m.inner(x.transpose(0, 1))).mean(0)


def sequence_first_in_place(m, x):
    return m.inner(x.permute(1, 0, 2)).relu_().permute(1, 0, 2).mean(1)


def times_folded(m, x):
    return torch.relu(m.inner(x.reshape(-1, 8))).reshape(x.size(0), -1, 8).mean(1)


def times_before_samples_folded(m, x):
    return torch.relu(m.inner(x.transpose(0, 1).flatten(0, 1))).unflatten(0, (6, -1)).mean(0)


def feature_first(m, x):
    return m.inner(x.mean(1)).T.relu().T


def pooled_sequence_first(m, x):
    return m.pool(torch.relu(m.inner(x)).transpose(0, 1)).repeat(1, 1, 2).mean(0)


def a_list_of_heads(m, x):
    q, k = m.inner(x).reshape(x.size(0), 6, 2, 4).permute(2, 0, 1, 3).unbind(0)
    return torch.cat([torch.relu(q), torch.relu(k)], -1).mean(1)


def stacked(m, x):
    y = torch.stack([m.inner(x), x], 0).relu()
    return (y[0] + y[1]).mean(1)


def contracted(m, x):
    y = torch.einsum("btc,dc->tbd", x, m.inner.weight)
    return torch.relu(y).sum(0)


def indexed(m, x):
    return torch.relu(m.inner(x)[:, None, 1:, :]).mean((1, 2))


def reduced_over_times(m, x):
    """The gate takes the axis before the sample's away."""
    return torch.relu(m.inner(x)).transpose(0, 1).amax(0)


def lost(m, x):
    """One reshape over both axes: nothing but the shapes tells where the samples are."""
    return torch.relu(m.inner(x.transpose(0, 1)).reshape(3, -1, 8)).reshape(6, -1, 8).mean(0)


def lost_glued(m, x):
    """Samples side by side in one row, as grouped convolutions like them."""
    return torch.relu(m.inner(x).reshape(1, -1, 8)).reshape(-1, 6, 8).mean(1)


FOUND = [sequence_first, sequence_first_in_place, times_folded, times_before_samples_folded, feature_first, pooled_sequence_first,
         a_list_of_heads, stacked, contracted, indexed]  # fmt: skip


@pytest.mark.parametrize("run", [*FOUND, reduced_over_times, lost, lost_glued], ids=lambda f: f.__name__)
def test_a_map_does_not_depend_on_the_batch(run):
    model = fill(Model(run))
    explainer = sp_fx.transform(model, rules=sp_fx.Rules(relu=1.0, max_pool=1.0, scale="sample"))
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.1, 1.0, 10.0, 100.0]).view(4, 1, 1)
    together = explainer.pullback(x, 1)
    assert torch.equal(explainer(x), model(x))
    for i in range(4):
        assert relative(together[i : i + 1], explainer.pullback(x[i : i + 1], 1)) <= 1e-5  # float32 rounding of the scale


@pytest.mark.parametrize("run", FOUND, ids=lambda f: f.__name__)
def test_the_scale_is_the_samples_own(run):
    """A sample 1000 times as large has the same map: its gates' temperatures grow with it."""
    model = fill(Model(run))
    nn.init.zeros_(model.inner.bias)
    explainer = sp_fx.transform(model, rules=sp_fx.Rules(relu=1.0, max_pool=1.0, scale="sample"))
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    assert {site.scale for site in explainer.report().of("rewritten")} == {"sample"}
    far = explainer.pullback(torch.stack([x[0], 1000 * x[1]]), 1)
    assert relative(far, explainer.pullback(x, 1)) <= 1e-5


@pytest.mark.parametrize("run", [lost, lost_glued], ids=lambda f: f.__name__)
def test_what_is_not_known_is_said(run):
    explainer = sp_fx.transform(fill(Model(run)), rules=sp_fx.Rules(scale="sample"))
    (site,) = explainer.report().of("rewritten")
    assert site.scale == "absolute" and "axis 0 may not be the sample" in site.reason
    assert "calibrate() measures a scale" in str(explainer.report())
    calibrated = explainer.calibrate(torch.randn(4, 6, 8)).report()
    assert isinstance(calibrated.of("rewritten")[0].scale, float) and "axis 0" not in str(calibrated)


def test_modules_that_take_sequences_first():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.attend, self.head = nn.LSTM(8, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

        def forward(self, x):
            y, _ = self.lstm(x.transpose(0, 1))
            y = y + self.attend(y, y, y)[0]
            return self.head(torch.relu(y).mean(0))

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="LSTM at lstm"):
        explainer = sp_fx.transform(Tagger(), rules=sp_fx.Rules(scale="sample"))
    assert next(s for s in explainer.report().sites if s.kind == "relu").scale == "sample"
    x = torch.randn(3, 6, 8) * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1)
    assert relative(explainer.pullback(x, 1)[1:2], explainer.pullback(x[1:2], 1)) <= 1e-5


class Broadcast(nn.Module):
    """[B, 5] met with something of more axes."""

    def __init__(self, run):
        super().__init__()
        self.layer, self.run = nn.Linear(5, 6), run
        self.stack, self.bias = nn.Parameter(torch.randn(4, 6, 5)), nn.Parameter(torch.randn(4, 1, 6))

    def forward(self, x):
        return self.run(self, x)


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: torch.relu(m.layer(x).expand(4, -1, -1)),
        lambda m, x: torch.relu(torch.matmul(m.layer(x), m.stack)),
        lambda m, x: torch.relu(m.layer(x) + m.bias),
    ],
    ids=["expand", "matmul", "add"],
)
def test_a_constant_of_more_axes_does_not_share_the_scale(run):
    torch.manual_seed(0)
    explainer, x = sp_fx.transform(Broadcast(run).eval()), torch.randn(2, 5)
    other = torch.stack([x[0], 100 * x[1]])
    maps, others = (explainer.pullback(t, lambda y: y.sum()) for t in (x, other))
    assert torch.equal(maps[0], others[0])


def test_constants_that_stand_within_the_sample_keep_its_scale():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gamma, self.places = (
                nn.Conv2d(3, 6, 3),
                nn.Parameter(torch.ones(6, 1, 1)),
                nn.Parameter(torch.zeros(1, 36, 6)),
            )

        def forward(self, x):
            y = torch.relu(self.conv(x) * self.gamma)
            return torch.relu(y.flatten(2).transpose(1, 2) + self.places).mean(1)

    assert {site.scale for site in sp_fx.transform(Net()).report().of("rewritten")} == {"sample"}


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
        assert {site.scale for site in sp_fx.transform(model).report().of("rewritten")} == {"sample"}


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

    scales = {site.kind: site.scale for site in sp_fx.transform(Attention()).report().of("rewritten")}
    assert scales["relu"] == "sample"
