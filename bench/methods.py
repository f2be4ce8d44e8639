"""The methods that are compared: maps by name, what each costs, and whether it is a slope or a share.

A *slope* says how the score changes with a pixel, a *share* what a pixel adds to the score against the baseline; with the
baseline 0 (mid-grey in [-1, 1]) a slope times the input is a share. Measures take shares, so that both are asked the same.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor, fx, nn

import sp_fx
from sp_fx.gates import dual_path
from sp_fx.gates.adjoints import pooling, relu, smooth
from sp_fx.gates.adjoints.row import Row, Tau
from sp_fx.gates.table import TABLE
from sp_fx.methods.ascent import Ascent

Run = Callable[[Tensor, Tensor], Tensor]
warnings.filterwarnings("ignore", "Input Tensor .* did not already require gradients")
warnings.filterwarnings("ignore", "Setting (forward, )?backward hooks")
NOISE = 0.3  # of SmoothGrad: 15 % of the range of the pixels, as in arXiv:1706.03825
SAMPLES = 50


@dataclass(frozen=True)
class Method:
    """`run(x, target)` gives maps like `x` [B, C, H, W] for classes [B]; `passes` counts forwards with a backward, a sample."""

    run: Run
    passes: int
    kind: Literal["slope", "share"] = "slope"

    def shares(self, x: Tensor, maps: Tensor, instead: Tensor | float = 0) -> Tensor:
        """Returns what pixels add against those of a picture `instead`. A share knows of 0 only, which is the mean of noise."""
        return maps if self.kind == "share" else maps * (x - instead)


RELUS = {"relu", "max_pool", "amax", "stride"}  # the gates of networks that the rules of peers are made for


def methods(
    model: nn.Module, x: Tensor, rules: sp_fx.Rules | None = None, layer: str | None = None
) -> tuple[dict[str, Method], dict[str, str]]:
    """Returns the methods for `model`, which takes pixels in [-1, 1] like `x` [B, 3, H, W], by name; and of those left out, why
    they do not apply.

    `layer` names the module of class activation maps; without it, the last whose output has spatial axes.
    """
    default, paper = explainer_of(model, x, rules), explainer_of(model, x, sp_fx.Rules.paper())
    chosen, left = ours(default), dict[str, str]()
    chosen["integrated pullback-10"] = Method(integrated(default), 10, "share")
    chosen["DeepLift pullback"] = Method(deep_lift(default), 2, "share")
    fused = fusion(model, lambda m: explainer_of(m, x, rules).pullback)
    chosen[f"FusionPullback-{DRAWS**2}"] = Method(seeded(fused), DRAWS**2)
    chosen["gradient ascent"] = Method(gradient_ascent(model), 5)
    chosen |= captum_methods(model)
    papers = {f"{name}, paper's rules": method for name, method in ours(paper).items()}
    if temperatures(paper) != temperatures(default):
        chosen |= papers
    else:
        left |= dict.fromkeys(papers, "the default's temperatures")
    try:
        chosen["guided-CAM pullback"] = Method(guided_cam(default, layer or last_spatial(default, x)), 2)
    except ValueError as error:
        left["guided-CAM pullback"] = left["GuidedGradCam"] = str(error)
    relu_only = ("DeepLift", "GuidedBackprop", "GuidedGradCam", "EpsilonPlus", "BetaSmooth")
    if others := {site.kind for site in default.report().sites if site.status == "rewritten"} - RELUS:
        left |= dict.fromkeys(relu_only, f"has rules for ReLU networks only, none for {', '.join(sorted(others))}")
        return chosen, left
    try:
        own = own_relus(model)
    except Exception as error:  # torch.fx has errors of every kind for models that it does not trace
        return chosen, left | dict.fromkeys(relu_only, f"needs a module for each call of a ReLU, and torch.fx says: {error}")
    relus = sum(site.kind == "relu" for site in default.report().sites)
    if unseen := relus - sum(name.startswith("own_relu") for name, _ in own.named_children()):
        return chosen, left | dict.fromkeys(relu_only, f"sees modules alone, and {unseen} of {relus} ReLUs are none")
    chosen |= relu_methods(own, layer or (None if "GuidedGradCam" in left else last_spatial(own, x)))
    try:
        chosen |= zennit_methods(own)
    except ModuleNotFoundError as error:
        left |= dict.fromkeys(("EpsilonPlus", "BetaSmooth"), str(error))
    return chosen, left


def explainer_of(model: nn.Module, x: Tensor, rules: sp_fx.Rules | None = None) -> sp_fx.Explainer:
    """Returns the explainer of `model`, captured by the pictures `x` where torch.fx alone cannot follow it."""
    try:
        return sp_fx.transform(model, rules=rules)
    except sp_fx.CaptureError:
        return sp_fx.transform(model, rules=rules, example_inputs=x[:2])


def last_spatial(model: nn.Module, x: Tensor) -> str:
    """Returns the name of the module whose output, [B, C, h, w] with h and w above 1, is the last such one: what class activation
    maps are made of.

    Raises:
        ValueError: no module has such an output.
    """
    names: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and min(output.shape[2:]) > 1:
                names.append(name)

        return hook

    hooks = [m.register_forward_hook(note(name)) for name, m in model.named_modules() if name]
    with torch.no_grad():
        model(x[:1])
    for hook in hooks:
        hook.remove()
    if not names:
        raise ValueError("no module has an output [B, C, h, w]: there is no class activation map")
    return names[-1]


DRAWS = 5  # of weights, and of inputs, in FusionGrad


def fusion(
    model: nn.Module,
    run_of: Callable[[nn.Module], Run],
    weights: float = 0.2,
    inputs: float = 0.4,
    n: int = DRAWS,
    m: int = DRAWS,
) -> Run:
    """FusionGrad, Bykov et al., "NoiseGrad", arXiv:2106.10185: the mean map of `n` networks, each parameter times its own draw
    of N(1, weights^2), at `m` inputs with noise of deviation `inputs`; the deviations are the authors' defaults.

    `run_of` makes the method of a network: of the gradient FusionGrad, of the soft pullback FusionPullback.
    """
    copied = copy.deepcopy(model)
    method, parameters = run_of(copied), list(copied.parameters())
    kept = [p.detach().clone() for p in parameters]

    def run(x: Tensor, target: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for _ in range(n):
            with torch.no_grad():
                for parameter, value in zip(parameters, kept):
                    parameter.copy_(value * (1 + weights * torch.randn_like(value)))
            for _ in range(m):
                total += method(x + inputs * torch.randn_like(x), target).detach()
        return total / (n * m)

    return run


def gradient_ascent(model: nn.Module, **options: object) -> Run:
    """The change by an ascent along the plain gradient, whose steps are those of the pullback ascent."""
    ascent = Ascent(**options)  # type: ignore[arg-type]

    def run(x: Tensor, target: Tensor) -> Tensor:
        def slope(points: list[Tensor]) -> list[Tensor]:
            return [gradient(model)(points[0], target)]

        *_, (end,) = ascent.iterates([x], slope)
        return end - x

    return run


def gradient(model: nn.Module) -> Run:
    def run(x: Tensor, target: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model(x).gather(1, target[:, None]).sum(), x)[0]

    return run


def ours(explainer: sp_fx.Explainer) -> dict[str, Method]:
    return {
        "pullback": Method(explainer.pullback, 1),
        "double pullback": Method(explainer.double_pullback, 2),
        "ascent": Method(explainer.ascend, 5),
    }


def integrated(explainer: sp_fx.Explainer, steps: int = 10) -> Run:
    """Integrated pullbacks: integrated gradients, by Captum, of the model whose way back is soft."""
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(explainer)
    return lambda x, target: method.attribute(x, target=target, n_steps=steps).detach()


KINKED_OR_SMOOTH = (*relu.ROWS, *smooth.ROWS, *pooling.ROWS)


def deep_lift(explainer: sp_fx.Explainer, instead: float = 0.0, nodes: int = 8) -> Run:
    """The DeepLift pullback: the rescale rule of DeepLift, arXiv:1704.02685, with soft gates.

    DeepLift passes v (f(z) - f(z')) / (z - z') back, z' being what z is for the picture `instead`. That is v times the gate's
    mean on the straight line from z' to z, and so a rule for a soft gate too, whose temperature, where it follows the scale of z,
    goes the same way. The mean is Gauss and Legendre's, of so many nodes: of soft gates to 1e-4, of hard ones to some per cent.
    Reference and picture are one batch of twice the size; products, norms and attention stay as they are.
    """
    places, weights = np.polynomial.legendre.leggauss(nodes)
    quadrature = list(zip(((1 + places) / 2).tolist(), (weights / 2).tolist()))  # of a mean over [0, 1]

    def averaged(row: Row) -> Row:
        def adjoint(v: Tensor, z: Tensor, *others: Tensor | None, tau: Tau, **args: object) -> Tensor | None:
            shares = []
            for part, weight in quadrature:
                here, its_tau = on_line(z, part), tau
                if isinstance(tau, Tensor) and len(tau) == len(z):  # of each sample
                    its_tau = on_line(tau, part)
                if row.sees_output:
                    others = (*others[:-1], row.forward(here, *others[:-1], **args))
                shares.append(row.adjoint(weight * v, here, *others, tau=its_tau, **args))
            return None if shares[0] is None else sum(shares[1:], shares[0])

        return replace(row, adjoint=adjoint)

    rows = {kind: averaged(TABLE[kind]) for kind in KINKED_OR_SMOOTH}

    def run(x: Tensor, target: Tensor) -> Tensor:
        both = torch.cat([x, torch.full_like(x, instead)]).requires_grad_()
        score = explainer(both)[: len(x)].gather(1, target[:, None]).sum()
        with mock.patch.dict(TABLE, rows), mock.patch.object(dual_path, "by_kernel", return_value=None):
            slope = torch.autograd.grad(score, both)[0]
        return (slope[: len(x)] * (x - instead)).detach()

    return run


def on_line(both: Tensor, part: float) -> Tensor:
    """Returns `both` [2 N, ...] with its first half moved to its second, the reference's, but for a `part` of the way."""
    reference = both[len(both) // 2 :].repeat(2, *[1] * (both.dim() - 1))
    return torch.lerp(reference, both, part)


def guided_cam(explainer: sp_fx.Explainer, layer: str) -> Run:
    """The guided-CAM pullback: the soft pullback times the class activation map, by Captum, that the soft way back gives."""
    from captum.attr import LayerAttribution, LayerGradCam

    cam = LayerGradCam(explainer, explainer.get_submodule(layer))

    def run(x: Tensor, target: Tensor) -> Tensor:
        activation = cam.attribute(x, target=target, relu_attributions=True).detach()
        return explainer.pullback(x, target) * LayerAttribution.interpolate(activation, x.shape[2:], "bilinear")

    return run


def temperatures(explainer: sp_fx.Explainer) -> list[tuple]:
    """Returns what became of each gate, for comparison between explainers."""
    return [(site.place, site.status, site.temperature, site.scale) for site in explainer.report().sites]


def captum_methods(model: nn.Module) -> dict[str, Method]:
    """Returns the methods that differentiate and nothing else, by Captum."""
    from captum.attr import GradientShap, InputXGradient, IntegratedGradients, NoiseTunnel, Saliency

    saliency, shap, path = Saliency(model), GradientShap(model), IntegratedGradients(model)
    smooth = NoiseTunnel(saliency)

    def smoothgrad(x: Tensor, target: Tensor) -> Tensor:
        return smooth.attribute(x, target=target, abs=False, nt_samples=SAMPLES, nt_samples_batch_size=2, stdevs=NOISE)

    def gradient_shap(x: Tensor, target: Tensor) -> Tensor:
        return shap.attribute(x, baselines=torch.zeros_like(x[:1]), target=target, n_samples=5, stdevs=NOISE)

    def integrated_gradients(x: Tensor, target: Tensor) -> Tensor:
        return path.attribute(x, target=target, n_steps=SAMPLES, internal_batch_size=max(len(x), 64))

    return {
        "gradient": Method(lambda x, target: saliency.attribute(x, target=target, abs=False), 1),
        f"FusionGrad-{DRAWS**2}": Method(seeded(fusion(model, gradient)), DRAWS**2),
        "InputXGradient": Method(lambda x, target: InputXGradient(model).attribute(x, target=target), 1, "share"),
        "SmoothGrad-50": Method(seeded(smoothgrad), SAMPLES),
        "IG-50": Method(integrated_gradients, SAMPLES, "share"),
        "GradientShap": Method(seeded(gradient_shap), 5, "share"),
    }


def relu_methods(own: nn.Module, layer: str | None) -> dict[str, Method]:
    """Returns Captum's methods for ReLU modules; they hook modules, so each call of a ReLU has one of its own, not in place.
    `layer` is that of class activation maps, None where there is none."""
    from captum.attr import DeepLift, GuidedBackprop, GuidedGradCam

    lift, guided = DeepLift(own), GuidedBackprop(own)
    chosen = {
        "DeepLift": Method(lambda x, target: lift.attribute(x, target=target).detach(), 2, "share"),
        "GuidedBackprop": Method(lambda x, target: guided.attribute(x, target=target), 1),
    }
    if layer is not None:
        cam = GuidedGradCam(own, own.get_submodule(layer))
        chosen["GuidedGradCam"] = Method(lambda x, target: cam.attribute(x, target=target).detach(), 2)
    return chosen


def zennit_methods(own: nn.Module) -> dict[str, Method]:
    """Returns Zennit's composites; batch norms are merged into the convolutions before them, as the rules of layers suppose."""
    from zennit.attribution import Gradient
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import BetaSmooth, EpsilonPlus

    def by(composite: Callable) -> Run:
        def run(x: Tensor, target: Tensor) -> Tensor:
            with Gradient(own, composite(canonizers=[SequentialMergeBatchNorm()])) as attributor:
                y = own(x.detach())
                seed = torch.zeros_like(y).scatter_(1, target[:, None], 1)
                return attributor(x.detach().clone().requires_grad_(), seed)[1].detach()

        return run

    return {"EpsilonPlus": Method(by(EpsilonPlus), 1, "share"), "BetaSmooth": Method(by(BetaSmooth), 1)}


RELU_CALLS = (torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_")  # others are counted: `methods`


def own_relus(model: nn.Module) -> nn.Module:
    """Returns a copy in which every call of a ReLU is a module of its own, `own_relu0` and so on, that does not work in place."""
    graph_module = fx.symbolic_trace(copy.deepcopy(model))

    def is_relu(node: fx.Node) -> bool:
        called = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        return isinstance(called, nn.ReLU) or node.target in RELU_CALLS

    for i, node in enumerate(filter(is_relu, list(graph_module.graph.nodes))):
        graph_module.add_submodule(f"own_relu{i}", nn.ReLU())
        node.op, node.target, node.kwargs, node.args = "call_module", f"own_relu{i}", {}, node.args[:1]
    graph_module.recompile()
    return graph_module.eval()


def seeded(run: Run, seed: int = 0) -> Run:
    """Returns `run` with the same draws at every call, none of them the caller's. Captum's GradientShap draws from NumPy."""

    def same(x: Tensor, target: Tensor) -> Tensor:
        before = np.random.get_state()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            np.random.seed(seed)
            try:
                return run(x, target).detach()
            finally:
                np.random.set_state(before)

    return same
