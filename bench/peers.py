"""Methods of Captum, pytorch-grad-cam and Zennit on the work of a pullback, one batch and one class a sample, as ways that
`bench/run.py --peers` times beside ours. None of these packages is imported before its way is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sp_fx.cli.timing import Way


def peers(model: nn.Module, x: Tensor, target: Tensor) -> Iterator[tuple[str, Callable[[], Way]]]:
    """Yields the peers' ways by name, each as a function that makes it ready, such as `("Captum Saliency", make)`; it raises
    ImportError where the package is not installed, ValueError where the model has no convolution to look at."""

    def captum(name: str, **arguments: Any) -> Callable[[], Way]:
        def make() -> Way:
            import captum.attr

            kind = getattr(captum.attr, name)
            method = kind(model, last_convolution(model)) if name == "GuidedGradCam" else kind(model)
            return lambda: method.attribute(x.clone().requires_grad_(), target=target, **arguments)

        return make

    def smooth_grad() -> Way:
        from captum.attr import NoiseTunnel, Saliency

        method = NoiseTunnel(Saliency(model))
        return lambda: method.attribute(x.clone(), target=target, nt_type="smoothgrad", nt_samples=50, nt_samples_batch_size=1)

    def grad_cam() -> Way:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        method = GradCAM(model, [last_convolution(model)])
        return lambda: method(x, [ClassifierOutputTarget(int(t)) for t in target])

    def zennit() -> Way:
        from zennit.attribution import Gradient
        from zennit.composites import EpsilonPlusFlat

        def run() -> Tensor:
            with Gradient(model, EpsilonPlusFlat()) as attributor:
                return attributor(x, torch.eye(model(x[:1]).shape[1], device=x.device)[target])[1]

        return run

    yield "Captum Saliency", captum("Saliency")
    yield "Captum DeepLift", captum("DeepLift")
    yield "Captum GuidedGradCam", captum("GuidedGradCam")
    yield "pytorch-grad-cam GradCAM", grad_cam
    yield "Zennit EpsilonPlusFlat", zennit
    yield "Captum SmoothGrad-50", smooth_grad
    yield "Captum IntegratedGradients-50", captum("IntegratedGradients", n_steps=50, internal_batch_size=len(x))


def last_convolution(model: nn.Module) -> nn.Module:
    """Returns the layer that class activation maps look at.

    Raises:
        ValueError: there is none.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions:
        raise ValueError("the model has no convolution")
    return convolutions[-1]
