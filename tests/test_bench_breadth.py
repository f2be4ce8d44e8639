"""The oracle of frozen maps that the zoo's wider collections are examined by, against formulas by hand; and their tables."""

import ast
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

BENCH = Path(__file__).parents[1] / "bench"
if not BENCH.exists():
    pytest.skip("the benches are not beside these tests", allow_module_level=True)
sys.path.insert(0, str(BENCH))

from breadth import backward, distance, examine, other_batch, other_length, relative, score  # noqa: E402

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).double()
A, B, C = (torch.randn(6, 6, generator=torch.Generator().manual_seed(i)).double() for i in (1, 2, 3))
U = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # the direction that `score` asks about


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def held(function, *inputs):
    """The oracle's maps of `score` of the function's outputs."""
    return backward(Of(function), inputs or (X,), None, hold=True)


def phi(z):
    return 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def tanh_gate(z):
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


# The function of z = x A, and the share a(z) that z a(z) has: the map is (U B^T a(z)) A^T for z a(z) B.
GATES = {
    "relu": (F.relu, lambda z: (z > 0).double()),
    "leaky": (lambda z: F.leaky_relu(z, 0.1), lambda z: 0.1 + 0.9 * (z > 0).double()),
    "gelu": (F.gelu, phi),
    "gelu by tanh": (lambda z: F.gelu(z, approximate="tanh"), tanh_gate),
    "gelu written out": (lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))), phi),
    "gelu by tanh written out": (lambda z: z * tanh_gate(z), tanh_gate),
    "silu": (F.silu, torch.sigmoid),
    "quick gelu": (lambda z: z * torch.sigmoid(1.702 * z), lambda z: torch.sigmoid(1.702 * z)),
    "hardswish": (F.hardswish, lambda z: (z / 6 + 0.5).clamp(0, 1)),
    "mish": (F.mish, lambda z: torch.tanh(F.softplus(z))),
}


@pytest.mark.parametrize("name", GATES)
def test_gate(name):
    gate, share = GATES[name]
    found, notes = held(lambda x: gate(x @ A) @ B)
    assert relative(found[0], ((U @ B.T) * share(X @ A)) @ A.T) < 1e-14 and not notes


NORMS = {
    "layer norm": (lambda x: F.layer_norm(x, (6,), B[0], C[0]), lambda x: B[0] / (x.var(1, False, keepdim=True) + 1e-5).sqrt()),
    "layer norm written out": (
        lambda x: (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, False, keepdim=True) + 1e-5) * B[0],
        lambda x: B[0] / (x.var(1, False, keepdim=True) + 1e-5).sqrt(),
    ),
    "rms norm": (lambda x: F.rms_norm(x, (6,), B[0], 1e-5), lambda x: B[0] / ((x * x).mean(1, keepdim=True) + 1e-5).sqrt()),
    "rms norm written out": (
        lambda x: B[0] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
        lambda x: B[0] / ((x * x).mean(1, keepdim=True) + 1e-5).sqrt(),
    ),
    "group norm": (
        lambda x: F.group_norm(x, 2, B[0]),
        lambda x: B[0] / (x.view(3, 2, 3).var(2, False).repeat_interleave(3, 1) + 1e-5).sqrt(),
    ),
    "length": (lambda x: F.normalize(x, dim=1), lambda x: 1 / (x * x).sum(1, keepdim=True).sqrt()),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm(name):
    norm, gain = NORMS[name]
    found, _ = held(lambda x: norm(x @ A))
    assert relative(found[0], (U * gain(X @ A)) @ A.T) < 1e-14


def weights(x):
    return torch.softmax((x @ A) @ (x @ B).T / math.sqrt(6), 1)


ATTENTION = {
    "fused": lambda x: F.scaled_dot_product_attention(x @ A, x @ B, x @ C),
    "written out": lambda x: weights(x) @ (x @ C),
    "values first": lambda x: ((x @ C).T @ weights(x).T).T,
    "einsum": lambda x: torch.einsum("ij,jd->id", weights(x), x @ C),
    "by a product and a sum": lambda x: (weights(x)[:, :, None] * (x @ C)[None]).sum(1),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    found, notes = held(ATTENTION[name])
    assert relative(found[0], weights(X).T @ U @ C.T) < 1e-13 and not notes


def test_product_with_a_gate_holds_the_gate_alone():
    for gate in (torch.sigmoid, F.silu, F.relu):
        found, _ = held(lambda x, gate=gate: gate(x @ A) * (x @ B))
        assert relative(found[0], (U * gate(X @ A)) @ B.T) < 1e-14
    two = (
        lambda x: (x @ A) * (x @ B),
        lambda x: F.relu(x @ A) * ((x @ B).clamp(-1, 1) + 1),
        lambda x: (x @ A).sigmoid() * (x @ B).tanh(),
    )
    for function in two:  # neither is a gate, or both are
        plain, _ = backward(Of(function), (X,), None, hold=False)
        assert distance(held(function)[0], plain) == 0
    halves, _ = held(lambda x: F.glu(torch.cat([x @ A, x @ B], 1), 1))
    assert relative(halves[0], (U * torch.sigmoid(X @ B)) @ A.T) < 1e-14


def test_a_softmax_that_weighs_nothing_is_noted():
    found, notes = held(lambda x: torch.softmax(x @ A, 1))
    p = torch.softmax(X @ A, 1)
    assert relative(found[0], (p * (U - (U * p).sum(1, keepdim=True))) @ A.T) < 1e-14
    assert notes == {"1 softmaxes keep their derivative"}


def test_maps_of_an_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 4), nn.GELU()).double()
    ids = torch.tensor([[1, 2, 5]])
    found, _ = backward(model, (ids,), "0", hold=True)
    z = model[1](model[0](ids))
    u = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert relative(found[0], (u * phi(z)) @ model[1].weight) < 1e-14


def test_calls_of_other_sizes():
    inputs = {"input_ids": torch.arange(16).view(2, 8), "pixel_values": torch.ones(2, 3, 4, 4), "scale": 2.0}
    assert other_batch(inputs)["input_ids"].shape == (3, 8) and other_batch(inputs)["pixel_values"].shape == (3, 3, 4, 4)
    assert other_length(inputs, True)["input_ids"].shape == (2, 10) and other_length(inputs, False)["input_ids"].shape == (2, 6)
    assert other_length(inputs, True)["pixel_values"].shape == (2, 3, 4, 4) and other_length((X,), True) is None


def test_a_row():
    def build():
        return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 3)), (X.float(),)

    row = examine(build)
    assert row["verdict"] == "ok" and row["gates"] == "2/0/0" and row["map"] < 1e-14, row
    assert row["forward"] == {"example": 0.0, "other batch": 0.0} and row["check"] == "ok"

    def broken():
        return Of(lambda x: x.missing), (X.float(),)

    assert examine(broken)["verdict"] == "own backward fails"

    def refused():
        return Of(lambda x: F.relu(x) * float(x.sum())), (X.float(),)

    row = examine(refused)
    assert row["verdict"] == "refused" and row["refusal"]["way out"], row


def test_a_score_leaves_out_what_is_not_finite():
    y = torch.tensor([[1.0, -math.inf], [2.0, 3.0]])
    u = torch.randn(2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    assert math.isclose(score(y), float(u[0, 0] + 2 * u[1, 0] + 3 * u[1, 1]), rel_tol=1e-6)


def test_no_name_twice():
    """A key that stands twice in a table would hide a model, without a word."""
    for path in sorted(BENCH.glob("breadth*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict):
                keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
                assert len(keys) == len(set(keys)), (path.name, sorted(k for k in keys if keys.count(k) > 1))
    import breadth_huggingface as huggingface
    import breadth_libraries as libraries

    parts = [huggingface.TEXT, huggingface.CAUSAL, huggingface.SOUND, huggingface.VISION, huggingface.BOTH, huggingface.FILMS]
    parts += [libraries.SEGMENTATION, libraries.VIDEO, libraries.TORCHVISION, libraries.PICTURES, *libraries.sequences.PARTS]
    names = [name for part in parts for name in part]
    assert len(names) == len(set(names)) > 250
