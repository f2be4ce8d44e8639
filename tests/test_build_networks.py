"""Real architectures with weights from a seed: the forward is bitwise the model's, every gate is in the report, and none whose
scale is not known."""

import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torchvision

import sp_fx
from helpers import fill, gradient, relative

BENCH = Path(__file__).parents[1] / "bench"
SCALED = {**dict.fromkeys(("relu", "leaky_relu", "prelu", "abs", "max_pool"), "sample"), "hardtanh": "batch_norm"}  # by kind

# name: (gates of the model and strides of few channels that overlap, calls that are not rewritten)
MODELS = {
    "resnet18": (17 + 1 + 1, 0),
    "resnet50": (49 + 1 + 1, 0),
    "vgg11_bn": (10 + 5, 0),
    "densenet121": (121 + 1 + 1, 0),
    "googlenet": (57 + 13 + 1, 0),
    "inception_v3": (94 + 4 + 1, 0),
    "vit_b_16": (12 + 12 + 25, 0),  # GELU, attention, LayerNorm
    "swin_t": (12 + 29, 12),  # GELU, LayerNorm; attention hides in a wrapped function
    "convnext_tiny": (18 + 23, 0),
    "squeezenet1_0": (26 + 3 + 1, 0),
    "timm/pvt_v2_b1": (8 + 8 + 30, 0),
}
SLOW = {"vgg11_bn", "densenet121", "googlenet", "inception_v3", "convnext_tiny"}  # bench/zoo.py has all 178 networks


def build(name):
    if name.startswith("timm/"):
        return timm.create_model(name[5:], pretrained=False)
    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **slow)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS])
def test_forward_and_coverage(name):
    model = fill(build(name))
    side = 299 if name == "inception_v3" else 224
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Swin's, which the counts below check
        explainer = sp_fx.transform(model)
    y = model(x)
    assert y.std() > 0 and torch.equal(explainer(x), y)
    with torch.no_grad():  # MultiheadAttention takes PyTorch's fused fast path here
        close = 1e-5 * y.abs().max() if name == "vit_b_16" else 0.0
        assert (explainer(x) - model(x)).abs().max() <= close

    u = torch.nn.functional.one_hot(torch.tensor([3]), y.shape[1]).float()
    found = explainer.pullback(x, 3)
    assert found.isfinite().all() and found.norm() > 0
    assert relative(found, gradient(model, x, u)) > 0.05
    report = explainer.report()
    assert (len(report.of("rewritten")), len(report.of("NOT REWRITTEN"))) == MODELS[name]
    assert unscaled(report) == []


def unscaled(report):
    """The places whose temperature could follow each sample's own scale, and does not."""
    return [site.place for site in report.of("rewritten") if site.kind in SCALED and site.scale != SCALED[site.kind]]


SMALL = {"squeezenet1_0": 64, "timm/ghostnet_100": 64}


@pytest.mark.parametrize("name", ["squeezenet1_0", pytest.param("timm/ghostnet_100", marks=pytest.mark.slow)])
def test_with_an_example_and_without(name):
    """The example changes no map of a network that a symbolic trace sees whole."""
    side = SMALL[name]
    model, x = fill(build(name)), torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    without, explainer = sp_fx.transform(model), sp_fx.transform(model, example_inputs=x)
    maps, expected = explainer.pullback(x, 3), without.pullback(x, 3)
    assert torch.equal(explainer(x), model(x)) and torch.equal(without(x), model(x))
    for each in (explainer, without):
        assert each.report().of("NOT REWRITTEN") == [] and unscaled(each.report()) == []
    assert relative(maps, expected) <= 1e-6
    assert relative(explainer.pullback(x[1:], 3), maps[1:]) <= 1e-4  # convolutions of one sample round otherwise


def library(name):
    sys.path.insert(0, str(BENCH))
    import zoo

    source = zoo.torchvision_models if name == "torchvision" else zoo.timm_models
    return zoo, {key: build for key, _, build in source()}


@pytest.mark.slow
@pytest.mark.skipif(not BENCH.exists(), reason="the benches are not beside these tests")
@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_every_network_of_a_library(name):
    """As `python bench/zoo.py` has it: forward, coverage, scales, with an example and without."""
    zoo, builds = library(name)
    assert len(builds) >= {"torchvision": 80, "timm": 98}[name]
    wrong = {}
    for key, build_it in builds.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = zoo.examine(build_it)
        if not row["ok"]:
            wrong[key] = row["why"]
    assert not wrong
