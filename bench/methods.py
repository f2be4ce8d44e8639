"""The methods that are compared: maps by name, what each costs, and whether it is a slope or a share.

A *slope* says how the score changes with a pixel, a *share* what a pixel adds to the score against the baseline; with the
baseline 0 (mid-grey in [-1, 1]) a slope times the input is a share. Measures take shares, so that both are asked the same.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

import sp_fx

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


def methods(
    model: nn.Module, rules: sp_fx.Rules | None = None, layer: tuple[str, str] | None = None
) -> tuple[dict[str, Method], dict[str, str]]:
    """Returns the methods for `model`, which takes pixels in [-1, 1], by name; and of those left out, why they do not apply.

    `layer` names the last layer whose output has spatial axes, [B, C, h, w], in the graph of `own_relus` and in an explainer, for
    class activation maps; without it the model is no ReLU network, and methods for those are left out.
    """
    default, paper = sp_fx.transform(model, rules=rules), sp_fx.transform(model, rules=sp_fx.Rules.paper())
    chosen, left = ours(default), dict[str, str]()
    chosen["integrated pullback-10"] = Method(integrated(default), 10, "share")
    if layer is not None:
        chosen["guided-CAM pullback"] = Method(guided_cam(default, layer[1]), 2)
    papers = {f"{name}, paper's rules": method for name, method in ours(paper).items()}
    if temperatures(paper) != temperatures(default):
        chosen |= papers
    else:
        left |= dict.fromkeys(papers, "the default's temperatures: no ReLU, no max pooling")
    chosen |= captum_methods(model)
    relu_only = ("DeepLift", "GuidedBackprop", "GuidedGradCam", "EpsilonPlus", "BetaSmooth")
    if layer is None:
        left |= dict.fromkeys(relu_only, "has rules for ReLU networks only: no GELU, LayerNorm or attention")
    else:
        chosen |= relu_methods(model, layer[0])
        try:
            chosen |= zennit_methods(model)
        except ModuleNotFoundError as error:
            left |= dict.fromkeys(("EpsilonPlus", "BetaSmooth"), str(error))
    return chosen, left


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
        "InputXGradient": Method(lambda x, target: InputXGradient(model).attribute(x, target=target), 1, "share"),
        "SmoothGrad-50": Method(seeded(smoothgrad), SAMPLES),
        "IG-50": Method(integrated_gradients, SAMPLES, "share"),
        "GradientShap": Method(seeded(gradient_shap), 5, "share"),
    }


def relu_methods(model: nn.Module, layer: str) -> dict[str, Method]:
    """Returns Captum's methods for ReLU modules; they hook modules, so each call of a ReLU gets one of its own, not in place."""
    from captum.attr import DeepLift, GuidedBackprop, GuidedGradCam

    own = own_relus(model)
    lift, guided, cam = DeepLift(own), GuidedBackprop(own), GuidedGradCam(own, own.get_submodule(layer))
    return {
        "DeepLift": Method(lambda x, target: lift.attribute(x, target=target).detach(), 2, "share"),
        "GuidedBackprop": Method(lambda x, target: guided.attribute(x, target=target), 1),
        "GuidedGradCam": Method(lambda x, target: cam.attribute(x, target=target).detach(), 2),
    }


def zennit_methods(model: nn.Module) -> dict[str, Method]:
    """Returns Zennit's composites; batch norms are merged into the convolutions before them, as the rules of layers suppose."""
    from zennit.attribution import Gradient
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import BetaSmooth, EpsilonPlus

    own = own_relus(model)

    def by(composite: Callable) -> Run:
        def run(x: Tensor, target: Tensor) -> Tensor:
            with Gradient(own, composite(canonizers=[SequentialMergeBatchNorm()])) as attributor:
                y = own(x.detach())
                seed = torch.zeros_like(y).scatter_(1, target[:, None], 1)
                return attributor(x.detach().clone().requires_grad_(), seed)[1].detach()

        return run

    return {"EpsilonPlus": Method(by(EpsilonPlus), 1, "share"), "BetaSmooth": Method(by(BetaSmooth), 1)}


def own_relus(model: nn.Module) -> nn.Module:
    """Returns a copy in which every call of a ReLU is a module of its own, `own_relu0` and so on, that does not work in place."""
    graph_module = fx.symbolic_trace(copy.deepcopy(model))

    def is_relu(node: fx.Node) -> bool:
        called = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        return isinstance(called, nn.ReLU) or node.target in (torch.relu, nn.functional.relu)

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
