"""Classifiers of torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..images import Preprocessing
from . import hub
from .network import Published, nearest

OTHERS = (
    "timm's are timm/NAME, Hugging Face's hf/NAME, the shipped ones zoo/NAME, those in packages efficientnet_lite0, "
    "efficientnet_lite1 and efficientnet_lite2, your own module:function or a file"
)


def torchvision_model(name: str, pretrained: bool, num_classes: int | None = None) -> Published:
    """Raises ValueError for an unknown name."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"torchvision has no classification model {name!r}; {nearest(name, known)}. {OTHERS}")
    entry = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    if pretrained and not file.exists() and (reason := hub.unreachable(entry.url)) is not None:
        raise ConnectionError(f"{entry.url} cannot be reached: {reason}")
    net = torchvision_net(name, entry if pretrained else None, num_classes)
    t = entry.transforms()
    published = Preprocessing(t.resize_size[0], t.crop_size[0], t.interpolation.value, tuple(t.mean), tuple(t.std))
    return Published(net, published, tuple(entry.meta["categories"]))


def torchvision_net(name: str, weights: Any, num_classes: int | None = None) -> nn.Module:
    from torchvision import models

    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3") and weights is None:
        # As they are published: with the colours of their first training, and without the heads that only train. They initialise
        # by slow rejection sampling unless told not to.
        options = {"init_weights": False, "transform_input": True, "aux_logits": False}
    if num_classes is not None:
        options["num_classes"] = num_classes
    return models.get_model(name, weights=weights, **options)
