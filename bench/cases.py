"""The cases of the benches on cost: networks by name, with the size of their pictures, and noise to explain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NETWORKS = {
    "resnet18": 224,
    "resnet50": 224,
    "vgg11_bn": 224,
    "densenet121": 224,
    "timm/pvt_v2_b1": 224,
    "timm/vit_small_patch16_224": 224,
    "convnext_tiny": 224,
    "zoo/residual_cnn": 96,
    "zoo/pyramid_transformer": 96,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UnknownNetwork(ValueError):
    """torchvision has no network of this name; the message has the choices."""


def network(name: str) -> nn.Module:
    """Returns a network in eval mode: the zoo's as trained, others with PyTorch's own initialisation from a fixed seed.

    Raises:
        UnknownNetwork: torchvision has no such model.
    """
    if name.startswith("zoo/"):
        from sp_fx import zoo

        return zoo.load(name[4:])
    torch.manual_seed(0)
    if name.startswith("timm/"):
        import timm

        return timm.create_model(name[5:], pretrained=False).eval()
    import torchvision

    if name not in torchvision.models.list_models():
        raise UnknownNetwork(f"no network {name!r}: expected torchvision's, timm/NAME or zoo/NAME, such as {', '.join(NETWORKS)}")
    return torchvision.models.get_model(name, weights=None).eval()


def noise(batch: int, size: int, dtype: torch.dtype, device: str) -> Tensor:
    """Returns [batch, 3, size, size] of standard normal noise, the same at every call."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
