"""Models by name, such as `resnet50`, `timm/vit_tiny_patch16_224`, `efficientnet_lite0` or `zoo/residual_cnn`, with their
preprocessing.

The zoo's need the extra `demo`, those of `carried.py` `models`, others `vision`.
"""

from __future__ import annotations

import difflib
import hashlib
import urllib.error
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import zoo
from . import carried
from .factory import called, is_own
from .images import Preprocessing
from .pixel_space import PixelSpace, pixel_space


@dataclass(frozen=True)
class NamedModel:
    """A network with its `preprocessing`: `model` takes pixels in [-1, 1]; `labels` names its classes where they are known;
    `weights` says where they are from: "published", a file's name, or "none"."""

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    weights: str

    def provenance(self) -> dict[str, Any]:
        """Returns what a record says of the model."""
        return {"model": self.name, "weights": self.weights, "weights_sha256": weights_hash(self.model),
                "preprocessing": asdict(self.preprocessing)}  # fmt: skip


IMAGENET = Preprocessing(256, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Loaded = tuple[nn.Module, Preprocessing, tuple[str, ...] | None]  # of normalised pixels; as published; labels


def load_model(name: str, weights: str | Path | None = None, input_size: int | None = None) -> NamedModel:
    """Returns a torchvision classification model, `timm/NAME`, `zoo/NAME` (one that ships with the package), one that another
    package carries (`efficientnet_lite0`) or one of your own, `module:function`, in eval mode.

    What a function of your own returns takes pixels normalised by ImageNet's mean and deviation, resized to 256 and cropped to
    224; with other preprocessing it returns a `NamedModel`.

    Args:
        weights: a state dict (.safetensors, .pt, .pth); None is the published one, which is downloaded (the zoo's is here).
        input_size: side of the square crop; None is the published one. The picture is resized as published, or, for a crop
            that is larger than that, in the published proportion.

    Raises:
        ValueError: an unknown name (the nearest are suggested), or weights that do not fit the model.
        TypeError: a function that returns no model for pictures.
        FileNotFoundError: no such weights file.
        RuntimeError: the published weights cannot be downloaded.
    """
    if is_own(name):
        return own_model(name, called(name), weights, input_size)
    net: nn.Module
    labels: tuple[str, ...] | None
    if name.startswith("zoo/"):
        net, published, labels = zoo.load(name[4:], weights), ZOO, zoo.labels
    else:
        try:
            net, published, labels = _loader(name)(name.removeprefix("timm/"), weights is None)
        except (urllib.error.URLError, OSError) as error:
            raise RuntimeError(
                f"the weights of {name} could not be downloaded ({error}); pass a file with --weights FILE"
            ) from error
        if weights is not None:
            load_weights(net, Path(weights))
    preprocessing = resized(published, input_size)
    source = "published" if weights is None else Path(weights).name
    return NamedModel(name, _of_pixels(net, preprocessing), preprocessing, labels, source)


def own_model(name: str, made: Any, weights: str | Path | None, input_size: int | None) -> NamedModel:
    """Returns what the user's function `name` has made as a named model; arguments and errors as of `load_model`."""
    if not isinstance(made, nn.Module | NamedModel):
        raise TypeError(
            f"{name} returns a torch.nn.Module, or a NamedModel or TextModel of sp_fx.models; got {type(made).__name__}"
        )
    net: nn.Module = made if isinstance(made, nn.Module) else made.model
    net = net.model if isinstance(net, PixelSpace) else net  # a file has the weights of what the normalisation is in front of
    if weights is not None:
        load_weights(net, Path(weights))
    named: Any = made
    if isinstance(made, PixelSpace):  # it says itself what pixels become
        own = replace(IMAGENET, mean=tuple(made.mean.flatten().tolist()), std=tuple(made.std.flatten().tolist()))
        named = NamedModel(name, made, own, None, "its own")
    elif isinstance(made, nn.Module):
        named = NamedModel(name, _of_pixels(made, IMAGENET), IMAGENET, None, "its own")
    source = named.weights if weights is None else Path(weights).name
    return replace(named, model=named.model.eval(), preprocessing=resized(named.preprocessing, input_size), weights=source)


def resized(published: Preprocessing, size: int | None) -> Preprocessing:
    """Returns the preprocessing with crops of `size`, in the published proportion where that is above the published resize."""
    crop = size or published.crop
    resize = published.resize if crop <= published.resize else round(crop * published.resize / published.crop)
    return replace(published, resize=resize, crop=crop)


def untrained(name: str) -> NamedModel:
    """Returns the model without its weights, for what depends on its structure alone; a zoo network has its own."""
    if name.startswith("zoo/") or is_own(name):
        return load_model(name)
    net, published, labels = _loader(name)(name.removeprefix("timm/"), False)
    return NamedModel(name, _of_pixels(net, published), published, labels, "none")


# The zoo's networks take pixels in [-1, 1] as they are.
ZOO = Preprocessing(96, 96, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _of_pixels(net: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    mean, std = preprocessing.mean, preprocessing.std
    return net.eval() if mean == std == ZOO.mean else pixel_space(net.eval(), mean, std)


def _loader(name: str) -> Callable[[str, bool], Loaded]:
    if name in carried.TEXT:
        raise ValueError(f"{name} is a network for text; of those for pictures, packages carry {', '.join(carried.LITE)}")
    return timm_model if name.startswith("timm/") else carried.lite if name in carried.LITE else torchvision_model


def torchvision_model(name: str, pretrained: bool) -> Loaded:
    """Raises ValueError for an unknown name."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        others = f"timm's are timm/NAME, the shipped ones zoo/NAME, those in packages {', '.join(carried.LITE)}"
        raise ValueError(f"torchvision has no classification model {name!r}; {nearest(name, known)}. {others}")
    entry = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    # GoogLeNet and Inception initialise by slow rejection sampling unless told not to.
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") and not pretrained else {}
    net = models.get_model(name, weights=entry if pretrained else None, **options)
    t = entry.transforms()
    published = Preprocessing(t.resize_size[0], t.crop_size[0], t.interpolation.value, tuple(t.mean), tuple(t.std))
    return net, published, tuple(entry.meta["categories"])


def timm_model(name: str, pretrained: bool) -> Loaded:
    """Raises ValueError for an unknown name; warns where timm crops otherwise than at the centre."""
    import timm

    known = timm.list_models()
    if name.split(".")[0] not in known:
        raise ValueError(f"timm has no model {name!r}; {nearest(name, known, 'timm/')}")
    net = timm.create_model(name, pretrained=pretrained)
    config = timm.data.resolve_model_data_config(net)
    crop = config["input_size"][-1]
    if config["crop_mode"] != "center":
        warnings.warn(f"timm crops for {name} by {config['crop_mode']!r}; here the centre is cropped", stacklevel=2)
    # timm rounds down, torchvision's entries are given.
    resize = int(crop / config["crop_pct"])
    published = Preprocessing(resize, crop, config["interpolation"], tuple(config["mean"]), tuple(config["std"]))
    subset = timm.data.infer_imagenet_subset(net)
    labels = tuple(timm.data.ImageNetInfo(subset).label_descriptions()) if subset else None
    return net, published, labels


def nearest(name: str, known: list[str], prefix: str = "") -> str:
    """Returns the end of an error message: the names in `known` that are closest to `name`, each behind `prefix`."""
    close = difflib.get_close_matches(name, known, 3, 0.5)
    return f"the nearest: {', '.join(prefix + c for c in close)}" if close else f"it has {len(known)}, such as {prefix}{known[0]}"


def class_index(name: str, labels: Sequence[str] | None) -> int:
    """Returns the index of the class called `name`: its label, or one of the synonyms that commas separate in it; case matters
    only where names differ by nothing else. For "Tinca tinca" and the labels ("tench, Tinca tinca", "crane") it is 0.

    Raises:
        ValueError: no class or several are called so (the nearest or all are named), or there are no labels.
    """
    if labels is None:
        raise ValueError(f"the names of this model's classes are not known: pass an index instead of {name!r}")
    synonyms = [(i, synonym) for i, label in enumerate(labels) for synonym in dict.fromkeys([label, *label.split(", ")])]
    for fold in (str, str.casefold):
        matches = sorted({i for i, synonym in synonyms if fold(synonym) == fold(name)})
        if len(matches) == 1:
            return matches[0]
        if matches:
            several = ", ".join(f"{i} ({labels[i]})" for i in matches)
            raise ValueError(f"several classes are called {name!r}: pass one of the indices {several}")
    folded = {synonym.casefold(): synonym for _, synonym in synonyms}
    close = difflib.get_close_matches(name.casefold(), folded, 3, 0.5)
    hint = f"the nearest: {', '.join(folded[c] for c in close)}" if close else f"it has {len(labels)}, such as {labels[0]}"
    raise ValueError(f"no class is called {name!r}; {hint}")


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a state dict (.safetensors, or one of `torch.save`) from `path` into `net`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not fit, or has values that are not finite; the message names them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Mapping[str, Any] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        net.load_state_dict(state)
    except Exception as error:  # safetensors, zip, pickle and torch each have their own; all mean the same to the user
        raise ValueError(f"the weights in {path} do not fit {type(net).__name__}: {str(error)[:400]}") from error
    zoo.store.check_finite(path, state)


def weights_hash(net: nn.Module) -> str:
    """Returns the SHA-256, in hex, of names, shapes, dtypes and values of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
