"""What is timed: networks by name, and the ways of explaining them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

import sp_fx

NETWORKS = ("resnet18", "resnet50", "vgg11_bn", "convnext_tiny", "vit_b_16", "timm/pvt_v2_b1")


def network(name: str) -> nn.Module:
    """A network in eval mode with PyTorch's own initialisation from a fixed seed."""
    torch.manual_seed(0)
    if name.startswith("timm/"):
        import timm

        return timm.create_model(name[5:], pretrained=False).eval()
    return torchvision.models.get_model(name, weights=None).eval()


def gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    y = model(leaf)
    u = torch.zeros_like(y).scatter_(1, target[:, None], 1.0)
    return torch.autograd.grad(y, leaf, u)[0]


def eager(model: nn.Module, x: Tensor, target: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The eager ways, by name; `forward` and `gradient` are the model's own."""
    explainer = sp_fx.transform(model)
    absolute = sp_fx.transform(model, rules=sp_fx.Rules.paper())

    def forward() -> Tensor:
        with torch.no_grad():
            return model(x)

    return {
        "forward": forward,
        "gradient": lambda: gradient(model, x, target),
        "pullback": lambda: explainer.pullback(x, target),
        "pullback, paper's rules": lambda: absolute.pullback(x, target),
        "double_pullback": lambda: explainer.double_pullback(x, target),
        "ascend, 5 steps": lambda: explainer.ascend(x, target),
    }


def correct(model: nn.Module, x: Tensor, target: Tensor) -> bool:
    """Whether what is timed is right: the forward bitwise, and the frozen pullback of a ReLU network its gradient."""
    explainer = sp_fx.transform(model, rules=sp_fx.Rules.frozen())
    same = torch.equal(explainer(x), model(x))
    kinds = {site.kind for site in explainer.report().of("rewritten")}
    if kinds <= {"relu", "max_pool"}:
        expected = gradient(model, x, target)
        same &= bool((explainer.pullback(x, target) - expected).norm() <= 1e-3 * expected.norm())
    return same
