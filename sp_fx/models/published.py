"""Networks that torchvision, timm and Hugging Face's hub publish, with the preprocessing and the classes of their weights."""

from __future__ import annotations

import contextlib
import difflib
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .images import Preprocessing
from .weights import classes_of, fitted


@dataclass(frozen=True)
class Published:
    """A network of normalised pixels, with the preprocessing and the class names of its published weights."""

    net: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None


def torchvision_model(name: str, pretrained: bool, num_classes: int | None = None) -> Published:
    """Raises ValueError for an unknown name."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"torchvision has no classification model {name!r}; {nearest(name, known)}. {OTHERS}")
    entry = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    net = _torchvision_net(name, entry if pretrained else None, num_classes)
    t = entry.transforms()
    published = Preprocessing(t.resize_size[0], t.crop_size[0], t.interpolation.value, tuple(t.mean), tuple(t.std))
    return Published(net, published, tuple(entry.meta["categories"]))


def _torchvision_net(name: str, weights: Any, num_classes: int | None = None) -> nn.Module:
    from torchvision import models

    # GoogLeNet and Inception initialise by slow rejection sampling unless told not to.
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") and weights is None else {}
    if num_classes is not None:
        options["num_classes"] = num_classes
    return models.get_model(name, weights=weights, **options)


OTHERS = (
    "timm's are timm/NAME, Hugging Face's hf/NAME, the shipped ones zoo/NAME, those in packages efficientnet_lite0, "
    "efficientnet_lite1 and efficientnet_lite2, your own module:function or a file"
)


def architecture(state: dict[str, Tensor]) -> tuple[str, int] | None:
    """Returns the name of torchvision's classifier whose state dict has the names and shapes of `state`, but for the number of
    classes, and that number; None where there is none or several, or torchvision is not installed."""
    if find_spec("torchvision") is None:
        return None
    from torchvision import models

    found = []
    for name in models.list_models(module=models):
        with torch.device("meta"), contextlib.suppress(RuntimeError, NotImplementedError):
            net = _torchvision_net(name, None)
            candidate = fitted(state, net)
            own = net.state_dict()
            if own.keys() == candidate.keys():
                same = all(own[key].shape == candidate[key].shape for key in own)
                if classes := 1000 if same else classes_of(candidate, net):
                    found.append((name, classes))
    return found[0] if len(found) == 1 else None


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


class Logits(nn.Module):
    """A classifier of Hugging Face's as a module from pixels to its logits [B, classes]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.net(pixel_values=pixel_values).logits


def huggingface_model(name: str, pretrained: bool, num_classes: int | None = None) -> Published:
    """`hf/NAME`, a repository of Hugging Face's hub or a folder, which has an image classifier.

    Raises:
        ValueError: it has another kind of network, or `num_classes` are not its own.
        OSError: no such repository, or it cannot be reached.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    name = name.removeprefix("hf/")
    with contextlib.nullcontext() if Path(name).is_dir() else one_try(), quiet():
        config = AutoConfig.from_pretrained(name)
        if num_classes is not None and pretrained and num_classes != config.num_labels:
            raise ValueError(f"hf/{name} has {config.num_labels} classes, and num_classes={num_classes} was asked for")
        if num_classes is not None:
            config.num_labels = num_classes
        make = AutoModelForImageClassification
        try:
            net = make.from_pretrained(name, config=config) if pretrained else make.from_config(config)
        except ValueError as error:
            if "Unrecognized configuration class" in str(error):
                raise ValueError(f"hf/{name} is a {config.model_type}, which transformers has no image classifier of") from None
            raise
        published = _of_processor(name, config)
    names = [config.id2label[i] for i in sorted(config.id2label)]
    generic = all(label == f"LABEL_{i}" for i, label in enumerate(names))
    return Published(Logits(net), published, None if generic else tuple(names))


def _of_processor(name: str, config: Any) -> Preprocessing:
    """Returns the preprocessing that a repository's `preprocessor_config.json` says."""
    from transformers import ImageProcessingMixin

    try:
        said, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        side = getattr(config, "image_size", 224)
        warnings.warn(
            f"hf/{name} says nothing of its pictures (no preprocessor_config.json): {side} pixels, mean and std 0.5 are taken; "
            "input_size, mean and std say otherwise",
            stacklevel=3,
        )
        return Preprocessing(side, side, "bilinear", (0.5,) * 3, (0.5,) * 3)
    size, crop = said.get("size", 224), said.get("crop_size")
    size = {"shortest_edge": size} if isinstance(size, int) and crop else size
    filters = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # pillow's numbers
    how = filters.get(said.get("resample", 2), "bilinear")
    normalised = said.get("do_normalize", True)
    mean, std = ((tuple(said[key]) if normalised else (value,) * 3) for key, value in (("image_mean", 0.0), ("image_std", 1.0)))
    scale = said.get("rescale_factor", 1 / 255) * 255 if said.get("do_rescale", True) else 255.0
    mean, std = tuple(m / scale for m in mean), tuple(s / scale for s in std)
    if isinstance(size, dict) and "shortest_edge" in size:
        side = size["shortest_edge"]
        if crop and said.get("do_center_crop", True):
            box = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
            return Preprocessing(side, box[0] if box[0] == box[1] else box, how, mean, std)
        share = said.get("crop_pct")
        if share and side < 384:  # ConvNeXt's: a larger crop is the whole picture
            return Preprocessing(int(side / share), side, how, mean, std)
        return Preprocessing(side, side, how, mean, std, squash=bool(share))
    box = (size["height"], size["width"]) if isinstance(size, dict) else (size, size)
    side = box[0] if box[0] == box[1] else box
    return Preprocessing(side, side, how, mean, std, squash=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and the advice that transformers prints while it loads."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def one_try() -> Iterator[None]:
    """Hugging Face's hub is asked once whether it is there. Where it is not, only what has been downloaded before is looked for:
    its client alone would try each of several files six times, for up to a minute.

    Raises:
        ConnectionError: it cannot be reached, and what was asked for has not been downloaded before.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if constants.HF_HUB_OFFLINE or (reason := unreachable(constants.ENDPOINT)) is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ConnectionError(f"{constants.ENDPOINT} cannot be reached: {reason}") from error
    finally:
        constants.HF_HUB_OFFLINE = False


def unreachable(address: str) -> str | None:
    """Returns why nothing answers at `address` within five seconds, or None."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return None  # an answer
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None


def nearest(name: str, known: list[str], prefix: str = "") -> str:
    """Returns the end of an error message: the names in `known` that are closest to `name`, each behind `prefix`."""
    close = difflib.get_close_matches(name, known, 3, 0.5)
    return f"the nearest: {', '.join(prefix + c for c in close)}" if close else f"it has {len(known)}, such as {prefix}{known[0]}"
