"""Image classifiers of Hugging Face's hub, or of folders that transformers has written: `hf/NAME`."""

from __future__ import annotations

import contextlib
import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...zoo.store import check_finite
from ..images import Preprocessing
from ..weights import COUNTED, unfit
from .hub import one_try, quiet
from .network import Published
from .processors import asked


class Logits(nn.Module):
    """A classifier of Hugging Face's as a module from pixels to its logits [B, classes]. `bgr`: it reads blue first."""

    def __init__(self, net: nn.Module, bgr: bool = False) -> None:
        super().__init__()
        self.net, self.bgr = net.float(), bgr  # pixels are float32, and many are published in bfloat16

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.net(pixel_values=pixel_values.flip(1) if self.bgr else pixel_values).logits


def huggingface_model(name: str, pretrained: bool, num_classes: int | None = None) -> Published:
    """`hf/NAME`, a repository of Hugging Face's hub or a folder, which has an image classifier.

    Raises:
        ValueError: it has another kind of network, one that no classifier was trained for, or `num_classes` are not its own.
        OSError: no such repository, or it cannot be reached.
    """
    name = name.removeprefix("hf/")
    path = Path(name)
    if name.startswith((".", "/", "~")) and not path.is_dir():
        raise ValueError(f"hf/{name}: there is no folder {name}")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"hf/{name}: the folder has no config.json, as Hugging Face's models have")
    with contextlib.nullcontext() if path.is_dir() else one_try(), quiet():
        try:
            net, config = _huggingface_net(name, pretrained, num_classes)
        except OSError as error:
            if not path.is_dir():
                raise
            raise ValueError(f"hf/{name} cannot be loaded: {error}") from error
        preprocessing, bgr = _of_processor(name, config)
    names = [config.id2label[i] for i in sorted(config.id2label)]
    generic = all(label == f"LABEL_{i}" for i, label in enumerate(names))
    several = getattr(config, "problem_type", None) == "multi_label_classification"
    return Published(Logits(net, bgr), preprocessing, None if generic else tuple(names), several)


def _huggingface_net(name: str, pretrained: bool, num_classes: int | None) -> tuple[nn.Module, Any]:
    """Returns a classifier of transformers, and its configuration."""
    from transformers import AutoConfig, AutoModelForImageClassification

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        if "custom code" in str(error):
            text = "needs code of its repository, which is not run here: name a function that loads it, --model module:function"
            raise ValueError(f"hf/{name} {text}") from None
        raise
    if num_classes is not None and pretrained and num_classes != config.num_labels:
        raise ValueError(f"hf/{name} has {config.num_labels} classes, and num_classes={num_classes} was asked for")
    if num_classes is not None:
        config.num_labels = num_classes
    make, missing = AutoModelForImageClassification, set()
    try:
        if pretrained:
            net, info = make.from_pretrained(name, config=config, trust_remote_code=False, output_loading_info=True)
            missing = {key for key in info["missing_keys"] if not key.endswith(COUNTED)}
        else:
            net = make.from_config(config, trust_remote_code=False)
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise ValueError(f"hf/{name} is a {config.model_type}, which transformers has no image classifier of") from None
        raise
    if missing:
        raise ValueError(
            f"hf/{name} has no trained classifier: {', '.join(sorted(missing)[:3])} would be random. It is there to be "
            "fine-tuned; one that was, for your classes or for ImageNet's, has its own name"
        )
    return net, config


def _of_processor(name: str, config: Any) -> tuple[Preprocessing, bool]:
    """Returns the preprocessing of a repository, and whether its network reads blue first. Its image processor is asked what it
    makes of drawn pictures, since what the settings of each kind mean is in the kind's code alone."""
    from transformers import AutoImageProcessor

    channels = getattr(config, "num_channels", 3)
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        side = getattr(config, "image_size", None) or 224
        side = side if isinstance(side, int) else tuple(side)
        why = "no preprocessor_config.json" if isinstance(error, OSError) else str(error).strip().split("\n")[0].split(". ")[0]
        warnings.warn(
            f"hf/{name} says nothing of its pictures ({why}): {side} pixels, mean and std 0.5 are "
            "taken; input_size, mean and std say otherwise",
            stacklevel=3,
        )
        return Preprocessing(side, side, "bilinear", (0.5,) * channels, (0.5,) * channels), False
    try:
        return asked(processor, channels)
    except ValueError as error:
        raise ValueError(f"hf/{name} does not take pictures as a crop of one size: {error}") from error


def huggingface_weights(published: Published, state: dict[str, Tensor], path: Path, num_classes: int | None) -> Published:
    """Returns a network of Hugging Face's with the weights that were read at `path`, named as in its repositories or as in
    memory, made for as many classes as these have; ValueError where they do not fit."""
    logits = published.net
    assert isinstance(logits, Logits)
    make: Any = type(logits.net)
    config: Any = copy.deepcopy(logits.net.config)

    def made() -> tuple[nn.Module, dict[str, Any]]:
        with quiet():
            return make.from_pretrained(
                None, config=config, state_dict=dict(state), output_loading_info=True, ignore_mismatched_sizes=True
            )

    net, info = made()
    mismatched = [(key, tuple(theirs), tuple(own)) for key, theirs, own in info["mismatched_keys"]]
    counts = {theirs[0] for _, theirs, own in mismatched if theirs[1:] == own[1:] and own[:1] == (config.num_labels,)}
    if num_classes is None and len(counts) == 1:
        config.num_labels = next(iter(counts))
        net, info = made()
        published = replace(published, labels=None)
        mismatched = [(key, tuple(theirs), tuple(own)) for key, theirs, own in info["mismatched_keys"]]
    missing = [key for key in info["missing_keys"] if not key.endswith(COUNTED)]
    shapes = [f"{key} {list(theirs)} where it has {list(own)}" for key, theirs, own in mismatched]
    if missing or info["unexpected_keys"] or shapes:
        raise unfit(net, path, len(state), sorted(missing), sorted(info["unexpected_keys"]), shapes)
    check_finite(path, state)
    return replace(published, net=Logits(net, logits.bgr))
