"""Dtypes, autocast and memory layouts, each against the same explainer in float64.

Bars: float32 rounds at 6e-8 over sums of a hundred terms and divides differences by temperatures of 0.3; the half types round
every activation and cotangent of four layers to 2^-9 and 2^-12.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill, relative


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.next = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.stem(x)), inplace=True), 3, 2, 1)
        x = self.next(x)
        return self.head((x * torch.sigmoid(1.702 * x)).amax((2, 3)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.rms, self.qkv = nn.LayerNorm(12), nn.RMSNorm(12, eps=1e-5), nn.Linear(12, 36)
        self.up, self.head = nn.Linear(12, 24), nn.Linear(12, 5)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)[..., :12]
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v) + (q @ k.mT * 0.3).softmax(-1) @ v
        a, b = self.up(self.rms(x)).chunk(2, -1)
        return self.head((x + F.silu(a) * F.gelu(b)).mean(1))


NETS = {"convolutional": (Convolutional, (4, 3, 12, 10)), "transformer": (Transformer, (4, 12, 3, 5))}
BARS = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


@pytest.fixture(params=NETS)
def case(request):
    make, shape = NETS[request.param]
    g = torch.Generator().manual_seed(1)
    model, x = fill(make()).double(), torch.randn(*shape, generator=g).double()
    return model, x, torch.randn(shape[0], 5, generator=g).double()


def maps(model, x, u):
    return sp_fx.transform(model).pullback(x, u)


@pytest.mark.parametrize("dtype", BARS)
def test_each_dtype_against_float64(case, dtype):
    model, x, u = case
    x, u = x.to(dtype), u.to(dtype)
    model = model.to(dtype)
    pulled = maps(model, x, u)
    assert pulled.dtype == dtype and pulled.isfinite().all()
    exact = maps(model.double(), x.double(), u.double())  # of the rounded weights and inputs
    assert relative(pulled.double(), exact) <= BARS[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_against_float64(case, dtype):
    model, x, u = case
    exact = maps(model, x.float().double(), u.float().double())
    explainer = sp_fx.transform(model.float())
    with torch.autocast("cpu", dtype):
        y = explainer(x.float())
        assert torch.equal(y, model(x.float()))
        pulled = explainer.pullback(x.float(), u.float().to(y.dtype))
    assert pulled.dtype == torch.float32
    assert relative(pulled.double(), exact) <= BARS[dtype]


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed storage": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second of a larger one": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_matter(case, layout):
    model, x, u = case
    view = LAYOUTS[layout](x)
    assert torch.equal(view, x)
    pulled = maps(model, view, u)
    assert pulled.shape == x.shape and relative(pulled, maps(model, x, u)) <= 1e-12  # other kernels sum in another order
    leaf = view.clone().requires_grad_()
    assert torch.equal(sp_fx.transform(model)(leaf), model(leaf))


def test_a_model_in_channels_last(case):
    model, x, u = case
    expected = maps(model, x, u)
    pulled = maps(model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last), u)
    assert relative(pulled, expected) <= 1e-12


def test_expanded_inputs(case):
    model, x, u = case
    view, same = x[:1].expand(4, -1, -1, -1), x[:1].repeat(4, 1, 1, 1)
    assert relative(maps(model, view, u), maps(model, same, u)) <= 1e-12
    assert view.stride(0) == 0 and torch.equal(view, same)
    ascended = sp_fx.transform(model).ascend(view, u, steps=2, step_size=0.5)
    assert relative(ascended, sp_fx.transform(model).ascend(same, u, steps=2, step_size=0.5)) <= 1e-12
