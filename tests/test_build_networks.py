"""Real architectures with weights from a seed: the forward is bitwise the model's, and every gate is in the report."""

import warnings

import pytest
import timm
import torch
import torchvision

import sp_fx
from helpers import fill, gradient, relative

# name: (gates of the model, calls that are not rewritten)
MODELS = {
    "resnet18": (17 + 1, 0),
    "resnet50": (49 + 1, 0),
    "vgg11_bn": (10 + 5, 0),
    "densenet121": (121 + 1, 0),
    "googlenet": (57 + 13, 0),
    "inception_v3": (94 + 4, 0),
    "vit_b_16": (12 + 12 + 25, 0),  # GELU, attention, LayerNorm
    "swin_t": (12 + 29, 12),  # GELU, LayerNorm; attention hides in a wrapped function
    "convnext_tiny": (18 + 23, 0),
    "squeezenet1_0": (26 + 3, 0),
    "timm/pvt_v2_b1": (8 + 8 + 30, 0),
}


def build(name):
    if name.startswith("timm/"):
        return timm.create_model(name[5:], pretrained=False)
    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, **slow)


@pytest.mark.parametrize("name", MODELS)
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
