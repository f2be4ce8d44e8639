"""Captum's gradient methods on the explainer, which is a model to them: each is the pullback's like."""

import warnings

import numpy as np
import pytest
import torch

import sp_fx
from bridged import TARGET, Net, X
from helpers import fill, relative


@pytest.fixture(scope="module")
def model():
    return fill(Net())


@pytest.fixture(scope="module")
def explainer(model):
    return sp_fx.transform(model)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input Tensor .* did not already require gradients")
        warnings.filterwarnings("ignore", "Setting backward hooks on ReLU")
        yield


def test_saliency_and_input_x_gradient(explainer):
    attr = pytest.importorskip("captum.attr")
    pulled = explainer.pullback(X, TARGET)
    assert relative(attr.Saliency(explainer).attribute(X, target=TARGET, abs=False), pulled) <= 1e-6  # float32, the same calls
    assert relative(attr.InputXGradient(explainer).attribute(X, target=TARGET), X * pulled) <= 1e-6


def test_integrated_gradients_are_integrated_pullbacks(explainer):
    attr = pytest.importorskip("captum.attr")
    method = attr.IntegratedGradients(explainer)
    attributed = method.attribute(X, torch.zeros_like(X), target=TARGET, n_steps=16, method="riemann_middle")
    steps = [explainer.pullback(X * (k + 0.5) / 16, TARGET) for k in range(16)]
    assert relative(attributed, X * torch.stack(steps).mean(0)) <= 1e-5  # sums of float32 in another order


def test_noise_tunnel_is_the_smooth_pullback(explainer):
    attr = pytest.importorskip("captum.attr")
    torch.manual_seed(3)
    tunnel = attr.NoiseTunnel(attr.Saliency(explainer))
    attributed = tunnel.attribute(X, target=TARGET, abs=False, nt_type="smoothgrad", nt_samples=8, stdevs=0.2)
    torch.manual_seed(3)
    noisy = torch.normal(X.repeat_interleave(8, 0), 0.2)
    each = explainer.pullback(noisy, TARGET.repeat_interleave(8)).unflatten(0, (3, 8)).mean(1)
    assert relative(attributed, each) <= 1e-5


def test_gradient_shap_is_the_shapley_pullback(explainer):
    attr = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    np.random.seed(0)
    attributed = attr.GradientShap(explainer).attribute(X, torch.zeros(1, 3, 12, 12), target=TARGET, n_samples=64, stdevs=0.0)
    # Points between the baseline and x, drawn uniformly: 64 of them are the integral to a few per cent.
    integral = X * torch.stack([explainer.pullback(X * (k + 0.5) / 64, TARGET) for k in range(64)]).mean(0)
    assert relative(attributed, integral) <= 0.1


@pytest.mark.parametrize("name", ["layer1", "layer1.0", "layer1.2", "layer2", "layer2.1", "layer2.2"])
def test_layer_methods_on_the_model_s_own_names(model, explainer, name):
    attr = pytest.importorskip("captum.attr")
    attributed = attr.LayerGradCam(explainer, explainer.get_submodule(name)).attribute(X, target=TARGET)
    cut = sp_fx.transform(model, output=name)
    activation = cut(X).detach()
    soft = explainer.pullback(X, TARGET, wrt=name)
    expected = (soft.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True)
    assert relative(attributed, expected) <= 1e-5


def test_what_guided_grad_cam_means_here(model, explainer):
    """The guided hooks sit on the ReLUs' identities, behind the soft gate: a ReLU on the cotangent that enters it."""
    attr = pytest.importorskip("captum.attr")
    attributed = attr.GuidedGradCam(explainer, explainer.layer2).attribute(X, target=TARGET)
    cam = attr.LayerGradCam(explainer, explainer.layer2).attribute(X, target=TARGET, relu_attributions=True)
    leaf = X.clone().requires_grad_()
    handles = [m.register_full_backward_hook(lambda m, before, after: (before[0].relu(),))
               for m in (explainer.layer1[2], explainer.layer2[1])]  # fmt: skip
    y = explainer(leaf)
    (guided,) = torch.autograd.grad(y.gather(1, TARGET[:, None]).sum(), leaf)
    for handle in handles:
        handle.remove()
    expected = guided * attr.LayerAttribution.interpolate(cam, X.shape[2:])
    assert relative(attributed, expected) <= 1e-5
    assert relative(explainer.pullback(X, TARGET), sp_fx.transform(model).pullback(X, TARGET)) == 0  # no hook is left
