"""The library on the kernels: adjoints and ascent steps by a kernel are those of the plain formulas."""

import sys

import pytest
import torch

pytest.importorskip("triton")

from sp_fx.gates import dual_path as dual
from sp_fx.gates import kernels as dispatch
from sp_fx.gates.adjoints import smooth
from sp_fx.gates.table import TABLE
from sp_fx.methods.ascent import Ascent

pytestmark = pytest.mark.skipif(
    not dispatch.triton_kernels() or not (torch.cuda.is_available() or __import__("triton").knobs.runtime.interpret),
    reason="needs a GPU, or TRITON_INTERPRET=1 in a process of its own",
)

POOL = {"kernel": (3, 2), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "ceil_mode": True}
SDPA = {"is_causal": False, "score_scale": None, "enable_gqa": False}
CASES = [
    ("relu", [(2, 3, 5, 7)], {}),
    ("leaky_relu", [(2, 3, 5)], {"negative_slope": 0.1}),
    ("prelu", [(2, 3, 5), (3,)], {}),
    ("hardtanh", [(4, 5)], {"low": -1.0, "high": None}),
    ("elu", [(4, 5)], {"alpha": 1.0, "output_scale": 1.0, "input_scale": 1.0}),
    ("gelu", [(4, 5)], {"approximate": "tanh"}),
    ("silu", [(4, 5)], {}),
    ("hardswish", [(4, 5)], {}),
    ("mish", [(4, 5)], {}),
    ("max_pool", [(2, 3, 9, 8)], POOL),
    ("layer_norm", [(2, 5, 8), (8,), (8,)], {"normalized_shape": (8,), "eps": 1e-5}),
    ("rms_norm", [(2, 5, 8), (8,)], {"normalized_shape": (8,), "eps": None}),
    ("attention", [(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), None], SDPA),
    ("attention", [(2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8), None], {**SDPA, "enable_gqa": True}),
    ("attention", [(2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 5, 8), None], {**SDPA, "is_causal": True}),
]
LAUNCHERS = {
    "max_pool": "max_pool_adjoint",
    "layer_norm": "norm_adjoint",
    "rms_norm": "norm_adjoint",
    "attention": "attention_adjoint",
}


@pytest.fixture
def launched(monkeypatch, device):
    """Kernels reach the tensors of `device`; the names of the launchers that were called."""
    names = []
    kernels = dispatch.triton_kernels()
    for name in kernels.__all__:
        launcher = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *args, name=name, launcher=launcher, **kw: names.append(name) or launcher(*args, **kw)
        )
    monkeypatch.setattr(dispatch, "reached", lambda v: v.device.type == device)
    return names


def test_kinds_are_the_tables():
    gate = sys.modules[dispatch.triton_kernels().gate_adjoint.__module__]
    assert tuple(gate.GATES) == dispatch.POINTWISE and set(dispatch.POINTWISE) <= set(TABLE)
    assert set(gate.HOMOGENEOUS) == {kind for kind in dispatch.POINTWISE if TABLE[kind].homogeneous}
    assert set(gate.SMOOTH) == set(smooth.ROWS) & set(dispatch.POINTWISE)


SCALES = [  # the scale is for homogeneous gates, a margin for those of them that open on one side
    (*case, scale, margin)
    for case in CASES
    for scale, margin in (("absolute", 0.0), ("sample", 0.0), ("sample", 0.4))
    if scale == "absolute" or (TABLE[case[0]].homogeneous and (not margin or TABLE[case[0]].opens))
]


@pytest.mark.parametrize("kind, shapes, args, scale, margin", SCALES)
def test_adjoints(launched, device, kind, shapes, args, scale, margin):
    row = TABLE[kind]
    g = torch.Generator().manual_seed(0)
    tensors = [None if s is None else torch.randn(s, generator=g).to(device) for s in shapes]
    with torch.no_grad():
        y = row.forward(*tensors, **args)
        v = torch.randn(y.shape, generator=g).to(device)
        tau = "frozen" if row.default == "frozen" else 0.7
        gate = (kind, tau, scale, margin, tuple(args.items()))
        got = dual.adjoint(gate, v, dual.kept(gate, tensors, y))
        fitted = tau * dual.deviation(tensors[0]) if scale == "sample" else tau
        z, *others = dual.kept(gate, tensors, y)
        expected = row.adjoint(v, z - margin * fitted if margin else z, *others, tau=fitted, **args)
    assert launched == [LAUNCHERS.get(kind, "gate_adjoint")] and got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)  # float32 in another order


def test_under_a_trace_the_table_stays(launched, device):
    z = torch.randn(3, 4, device=device, requires_grad=True)
    torch.func.vjp(lambda z: dual.dual_path("relu", z, tau=0.6), z)[1](torch.ones_like(z))
    assert launched == []


@pytest.mark.parametrize("radius, bounds", [(None, None), (0.5, None), (0.5, (-1.0, 0.3)), (None, (-0.2, 0.2))])
def test_ascent_steps(launched, device, radius, bounds, monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, v, start = (torch.randn(2, 3, 5, generator=g).to(device) for _ in range(3))
    rule = Ascent(steps=1, step_size=2.0, radius=radius, bounds=bounds)
    (got,) = rule.step([start], [x], lambda _: [v], clamp=True)
    assert launched == ["ascent_step"]
    monkeypatch.setattr(dispatch, "reached", lambda v: False)
    (expected,) = rule.step([start], [x], lambda _: [v], clamp=True)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
