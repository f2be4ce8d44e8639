"""Classifiers of timm: `timm/NAME`."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

from ..images import Preprocessing
from .hub import one_try
from .network import Published, nearest


def timm_model(name: str, pretrained: bool, num_classes: int | None = None) -> Published:
    """Raises ValueError for an unknown name; warns where timm crops otherwise than at the centre."""
    import timm

    name = name.removeprefix("timm/")
    known = timm.list_models()
    hub = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))  # timm's own spellings of a repository or a folder
    if not hub and name.split(".")[0] not in known:
        raise ValueError(f"timm has no model {name!r}; {nearest(name, known, 'timm/')}")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    with one_try() if pretrained else contextlib.nullcontext():
        net = timm.create_model(name, pretrained=pretrained, **options)
    config = timm.data.resolve_model_data_config(net)
    crop, mode = config["input_size"][-1], config["crop_mode"]
    if mode not in ("center", "squash"):
        warnings.warn(f"timm crops for {name} by {mode!r}; here the centre is cropped", stacklevel=2)
    # timm rounds down, torchvision's entries are given.
    resize, mean, std = int(crop / config["crop_pct"]), tuple(config["mean"]), tuple(config["std"])
    published = Preprocessing(resize, crop, config["interpolation"], mean, std, squash=mode == "squash")
    subset = timm.data.infer_imagenet_subset(net)
    return Published(net, published, tuple(timm.data.ImageNetInfo(subset).label_descriptions()) if subset else None)
