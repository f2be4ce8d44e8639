"""Other libraries on the explainer, each against the library itself."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import sp_fx
from helpers import fill, relative
from sp_fx.bridges import Attributor, explain_func


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(x)).mean((2, 3)))


X = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([1, 0, 3])


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


# -- Captum -------------------------------------------------------------------------------------------------------------


def test_saliency_and_input_x_gradient(explainer):
    attr = pytest.importorskip("captum.attr")
    found = explainer.pullback(X, TARGET)
    assert relative(attr.Saliency(explainer).attribute(X, target=TARGET, abs=False), found) <= 1e-6  # float32, the same calls
    assert relative(attr.InputXGradient(explainer).attribute(X, target=TARGET), X * found) <= 1e-6


def test_integrated_gradients_are_integrated_pullbacks(explainer):
    attr = pytest.importorskip("captum.attr")
    method = attr.IntegratedGradients(explainer)
    found = method.attribute(X, torch.zeros_like(X), target=TARGET, n_steps=16, method="riemann_middle")
    steps = [explainer.pullback(X * (k + 0.5) / 16, TARGET) for k in range(16)]
    assert relative(found, X * torch.stack(steps).mean(0)) <= 1e-5  # sums of float32 in another order


def test_noise_tunnel_is_the_smooth_pullback(explainer):
    attr = pytest.importorskip("captum.attr")
    torch.manual_seed(3)
    tunnel = attr.NoiseTunnel(attr.Saliency(explainer))
    found = tunnel.attribute(X, target=TARGET, abs=False, nt_type="smoothgrad", nt_samples=8, stdevs=0.2)
    torch.manual_seed(3)
    noisy = torch.normal(X.repeat_interleave(8, 0), 0.2)
    each = explainer.pullback(noisy, TARGET.repeat_interleave(8)).unflatten(0, (3, 8)).mean(1)
    assert relative(found, each) <= 1e-5


def test_gradient_shap_is_the_shapley_pullback(explainer):
    attr = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    np.random.seed(0)
    found = attr.GradientShap(explainer).attribute(X, torch.zeros(1, 3, 12, 12), target=TARGET, n_samples=64, stdevs=0.0)
    # Points between the baseline and x, drawn uniformly: 64 of them are the integral to a few per cent.
    integral = X * torch.stack([explainer.pullback(X * (k + 0.5) / 64, TARGET) for k in range(64)]).mean(0)
    assert relative(found, integral) <= 0.1


@pytest.mark.parametrize("name", ["layer1", "layer1.0", "layer1.2", "layer2", "layer2.1", "layer2.2"])
def test_layer_methods_on_the_model_s_own_names(model, explainer, name):
    attr = pytest.importorskip("captum.attr")
    found = attr.LayerGradCam(explainer, explainer.get_submodule(name)).attribute(X, target=TARGET)
    cut = sp_fx.transform(model, output=name)
    activation = cut(X).detach()
    soft = explainer.pullback(X, TARGET, wrt=name)
    expected = (soft.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True)
    assert relative(found, expected) <= 1e-5


def test_what_guided_grad_cam_means_here(model, explainer):
    """The guided hooks sit on the ReLUs' identities, behind the soft gate: a ReLU on the cotangent that enters it."""
    attr = pytest.importorskip("captum.attr")
    found = attr.GuidedGradCam(explainer, explainer.layer2).attribute(X, target=TARGET)
    cam = attr.LayerGradCam(explainer, explainer.layer2).attribute(X, target=TARGET, relu_attributions=True)
    leaf = X.clone().requires_grad_()
    handles = [m.register_full_backward_hook(lambda m, before, after: (before[0].relu(),))
               for m in (explainer.layer1[2], explainer.layer2[1])]  # fmt: skip
    y = explainer(leaf)
    (guided,) = torch.autograd.grad(y.gather(1, TARGET[:, None]).sum(), leaf)
    for handle in handles:
        handle.remove()
    expected = guided * attr.LayerAttribution.interpolate(cam, X.shape[2:])
    assert relative(found, expected) <= 1e-5
    assert relative(explainer.pullback(X, TARGET), sp_fx.transform(model).pullback(X, TARGET)) == 0  # no hook is left


# -- Quantus ------------------------------------------------------------------------------------------------------------


def test_explain_func_returns_arrays(model):
    x = X.numpy()
    found = explain_func(model=model, inputs=x, targets=TARGET.numpy(), device="cpu")
    assert isinstance(found, np.ndarray) and found.dtype == x.dtype and found.shape == x.shape
    assert np.array_equal(found, sp_fx.transform(model).pullback(X, TARGET).numpy())
    climbed = explain_func(model, x, TARGET.numpy(), method="ascend", steps=2, step_size=1.0, rules=sp_fx.Rules.paper())
    expected = sp_fx.transform(model, rules=sp_fx.Rules.paper()).ascend(X, TARGET, steps=2, step_size=1.0)
    assert np.array_equal(climbed, expected.numpy())
    assert np.array_equal(explain_func(sp_fx.transform(model), x, 2), sp_fx.transform(model).pullback(X, 2).numpy())
    with pytest.raises(ValueError, match="one of pullback, double_pullback, ascend"):
        explain_func(model, x, TARGET.numpy(), method="gradient")
    with pytest.raises(TypeError, match="takes no stepz; it takes"):
        explain_func(model, x, TARGET.numpy(), method="ascend", stepz=2)
    with pytest.raises(ValueError, match="move one of them"):
        explain_func(model, x, TARGET.numpy(), device="cuda")


def test_quantus_evaluates_it(model):
    quantus = pytest.importorskip("quantus")
    metric = quantus.MaxSensitivity(nr_samples=3, lower_bound=0.05, disable_warnings=True, return_aggregate=False)
    scores = metric(model=model, x_batch=X.numpy(), y_batch=TARGET.numpy(), explain_func=explain_func, device="cpu",
                    explain_func_kwargs={"method": "pullback"})  # fmt: skip
    assert len(scores) == 3 and all(0 < s < 10 for s in scores)
    given = explain_func(model, X.numpy(), TARGET.numpy())
    fidelity = quantus.FaithfulnessCorrelation(nr_runs=5, subset_size=40, disable_warnings=True, return_aggregate=False)
    scores = fidelity(model=model, x_batch=X.numpy(), y_batch=TARGET.numpy(), a_batch=given, device="cpu")
    assert len(scores) == 3 and np.isfinite(scores).all()


# -- Zennit -------------------------------------------------------------------------------------------------------------


def test_the_attributor_is_zennits_gradient_on_the_explainer(explainer):
    attribution = pytest.importorskip("zennit.attribution")
    direction = torch.eye(4)[TARGET]
    wanted = {"tensor": direction, "callable": lambda output: output * direction, "none": None}
    for attr_output in wanted.values():
        with attribution.Gradient(model=explainer) as theirs, Attributor(explainer) as ours:
            x = X.clone().requires_grad_()
            expected_output, expected = theirs(x, attr_output)
            output, relevance = ours(X, attr_output)
        assert torch.equal(output, expected_output) and relative(relevance, expected) <= 1e-6
    assert relative(Attributor(explainer, direction)(X)[1], explainer.pullback(X, TARGET)) <= 1e-6
    with torch.no_grad():
        assert relative(Attributor(explainer, direction)(X)[1], explainer.pullback(X, TARGET)) <= 1e-6
    with pytest.raises(TypeError, match="expected what transform"):
        Attributor(nn.ReLU())
