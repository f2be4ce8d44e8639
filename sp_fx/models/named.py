"""Models by name, such as `resnet50`, `timm/vit_tiny_patch16_224`, `efficientnet_lite0` or `zoo/residual_cnn`, with their
preprocessing.

The zoo's need the extra `demo`, those of `carried.py` `models`, others `vision`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import zoo
from . import carried
from .classes import read_class_names
from .images import Preprocessing, Side
from .own import PACKAGES, called, is_file, is_own, pickled_model
from .pixel_space import PixelSpace, pixel_space
from .published import Logits, Published, huggingface_model, huggingface_weights, timm_model, torchvision_model
from .weights import classes_of, fitted, load_state, load_weights, read_state, weights_hash


@dataclass(frozen=True)
class NamedModel:
    """A network with its `preprocessing`: `model` takes pixels in [-1, 1]; `labels` names its classes where they are known;
    `weights` says where they are from: "published", a file's name, or "none"; `assumed`, in a sentence, what nobody has said of
    it."""

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    weights: str
    assumed: str = ""

    def provenance(self) -> dict[str, Any]:
        """Returns what a record says of the model."""
        return {"model": self.name, "weights": self.weights, "weights_sha256": weights_hash(self.model),
                "preprocessing": asdict(self.preprocessing)}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What a caller says of a network in place of what is published or assumed; None leaves that as it is.

    Attributes:
        weights: a file with a state dict (.safetensors, .pt, .pth, .bin, .ckpt).
        input_size: side of the square crop, in pixels.
        resize: what the shorter side becomes before the crop; None is `proportional`, and for a network of one's own
            `input_size`.
        num_classes: None is that of the weights' last layer.
        class_names: the names, or a file of them (`classes.read_class_names`).
        mean, std: of each channel of the pixels that the network takes, one number for all or one each.
        pixels: (low, high): what the network takes for black and white before `mean` and `std`; None is (0, 1).
        trust_pickle: whether files are unpickled, which runs code of whoever made them.
    """

    weights: str | Path | None = None
    input_size: int | None = None
    resize: int | None = None
    num_classes: int | None = None
    class_names: Sequence[str] | str | Path | None = None
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    pixels: tuple[float, float] | None = None
    trust_pickle: bool = False

    @property
    def normalises(self) -> bool:
        return not (self.mean is None and self.std is None and self.pixels is None)

    def preprocessing(self, published: Preprocessing) -> Preprocessing:
        """Returns the published preprocessing with what the caller says instead.

        Raises:
            ValueError: a `std` that is not above 0, `pixels` of which the second is not above the first, a mean outside of them
                or without a std, neither one number nor one a channel; a `resize` below the crop.
        """
        crop: Side = published.crop if self.input_size is None else self.input_size
        made = replace(published, resize=proportional(published, crop) if self.resize is None else self.resize, crop=crop)
        if self.resize is not None and self.resize < max(made.cropped):
            raise ValueError(f"a picture resized to {self.resize} does not cover the crop of {crop}: resize is at least that")
        if not self.normalises:
            return made
        low, high = self.pixels or (0.0, 1.0)
        if not high > low:
            raise ValueError(f"pixels are (low, high), such as (0, 255) or (-1, 1), with low below high; got {self.pixels}")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"who says the mean says the std too, since they go together; got mean={self.mean}, std={self.std}")
        channels = len(published.mean)
        mean, std = _each(self.mean, 0.0, channels, "mean"), _each(self.std, 1.0, channels, "std")
        if not all(s > 0 for s in std):
            raise ValueError(f"a std is above 0 for each channel, got {list(std)}")
        if not all(low <= m <= high for m in mean):
            raise ValueError(
                f"a mean is one of pixels from {low:g} to {high:g}, got {list(mean)}; pixels=(0, 255) are of that range"
            )
        return replace(made, mean=tuple((m - low) / (high - low) for m in mean), std=tuple(s / (high - low) for s in std))

    def names(self) -> tuple[str, ...] | None:
        """Returns the caller's names of the classes."""
        names = self.class_names
        return read_class_names(names) if isinstance(names, str | Path) else None if names is None else tuple(names)


def _each(values: float | Sequence[float] | None, default: float, channels: int, what: str) -> tuple[float, ...]:
    if values is None:
        return (default,) * channels
    each = (float(values),) * channels if isinstance(values, int | float) else tuple(map(float, values))
    each = each * channels if len(each) == 1 else each
    if len(each) != channels:
        raise ValueError(f"expected one {what} for all channels or one for each of {channels}, got {len(each)}")
    return each


def proportional(published: Preprocessing, crop: Side) -> Side:
    """Returns what a picture is resized to for that crop: in the published proportion, but that a crop between the published one
    and what it is cut from only takes more of it: 227 of 256, where 224 is published."""
    sides = published.resize, published.crop, crop
    resize, old, new = sides
    if not isinstance(resize, int) or not isinstance(old, int) or not isinstance(new, int):
        return resize if crop == published.crop else crop
    return resize if old <= new <= resize and not published.squash else round(new * resize / old)


IMAGENET = Preprocessing(224, 224, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The zoo's networks take pixels in [-1, 1] as they are.
ZOO = Preprocessing(96, 96, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def load_model(name: str, options: Options | None = None, *, trained: bool = True) -> NamedModel:
    """Returns a network for pictures, in eval mode. `models.load` says which names there are, and the errors.

    `trained=False` leaves out published weights, for what depends on the structure alone; a zoo network has its own.
    """
    options = options or Options()
    if is_file(name):
        if options.num_classes is not None:
            raise ValueError(f"the network in {name} has the classes that it has: num_classes is for networks that are made")
        return own_model(name, pickled_model(Path(name), options.trust_pickle), options)
    if is_own(name):
        return own_model(name, called(name, options.num_classes), options)
    if name.startswith("zoo/"):
        if options.num_classes is not None or options.normalises:
            raise ValueError("the shipped networks have ten classes and take pixels as they are: no num_classes, mean or std")
        return _named(name, Published(zoo.load(name[4:], options.weights), ZOO, zoo.labels), options)
    if Path(name).suffix in PACKAGES:
        raise ValueError(
            f"{name} is called as packages are, which have their model in them: sp_fx.load({name!r}), `sp-fx explain`"
        )
    if Path(name).is_dir():
        raise IsADirectoryError(f"{name} is a folder, and no network; one of Hugging Face's is named hf/{name}")
    maker = _maker(name)
    pretrained = trained and options.weights is None
    if pretrained and options.num_classes is not None and not name.startswith("hf/"):
        raise ValueError(
            f"num_classes={options.num_classes} needs weights of such a network, --weights FILE: the published ones of {name} "
            "are for the classes that they were trained on"
        )
    try:
        published = maker(name, pretrained, options.num_classes)
    except OSError as error:  # those of a download
        reason = str(error).strip().split("\n")[0]
        instead = "name a folder that has them, hf/./FOLDER" if name.startswith("hf/") else "pass a file with --weights FILE"
        text = f"the weights of {name} could not be downloaded ({reason}); {instead}"
        raise RuntimeError(text) from error
    if options.weights is not None:
        published = with_weights(published, options, lambda classes: maker(name, False, classes))
    named = _named(name, published, options, "published" if pretrained else "none")
    if options.weights is not None and getattr(published.net, "transform_input", False):
        text = "is taken as published, with transform_input=True, which its weights do not say; for one that was trained without"
        named = replace(named, assumed=f"{text} it name the function that makes it, --model module:function")
    return named


def with_weights(published: Published, options: Options, again: Callable[[int], Published]) -> Published:
    """Returns the network with the caller's weights, made `again` for as many classes as these have."""
    path = Path(options.weights or "")
    state = read_state(path, options.trust_pickle)
    if isinstance(published.net, Logits):
        return huggingface_weights(published, state, path, options.num_classes)
    state = fitted(state, published.net)
    classes = None if options.num_classes else classes_of(state, published.net)
    if classes is not None:
        published = replace(again(classes), labels=None)
    load_state(published.net, state, path)
    return published


def own_model(name: str, made: Any, options: Options | None = None) -> NamedModel:
    """Returns what the user's function or file `name` has made as a named model; arguments and errors as of `load_model`."""
    options = options or Options()
    if not isinstance(made, nn.Module | NamedModel):
        raise TypeError(
            f"{name} returns a torch.nn.Module, or a NamedModel or TextModel of sp_fx.models; got {type(made).__name__}"
        )
    net = ready(made if isinstance(made, nn.Module) else made.model)
    if isinstance(made, nn.Module):
        made = net
    inside = net.model if isinstance(net, PixelSpace) else net  # a file has the weights of what the normalisation is in front of
    if options.weights is not None:
        load_weights(inside, Path(options.weights), options.trust_pickle)
    source = "its own" if isinstance(made, nn.Module) else made.weights
    if options.normalises and not (isinstance(made, nn.Module) and inside is net):
        raise ValueError(f"{name} says itself how pixels are normalised: mean, std and pixels are for a plain module")
    if isinstance(made, NamedModel):
        published, labels = made.preprocessing, made.labels
    elif isinstance(made, PixelSpace):
        mean, std = tuple(made.mean.flatten().tolist()), tuple(made.std.flatten().tolist())
        published, labels = replace(IMAGENET, mean=mean, std=std), None
    else:
        named = _named(name, Published(inside, _assumed(inside, options), None), options, source)
        if options.normalises:
            return named
        how = named.preprocessing
        assumed = f"assumed: mean {how.mean} with deviation {how.std} of pixels in [0, 1] (--mean, --std, --pixels say otherwise)"
        if options.input_size is None:
            assumed += f", {how.crop} x {how.crop} of them (--input-size)"
        return replace(named, assumed=f"says nothing of its pixels; {assumed}")
    if isinstance(made, PixelSpace) and options.input_size is not None:
        published = replace(published, resize=options.input_size, crop=options.input_size)
    called_so = made.name if isinstance(made, NamedModel) else name
    names = options.names() or labels
    return NamedModel(called_so, net.eval(), options.preprocessing(published), names, _source(options, source))


def ready(net: nn.Module) -> nn.Module:
    """Returns the network inside what trains it in parallel or compiles it, in float32, as pixels are: many are saved in half
    precision."""
    while isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel) or isinstance(
        getattr(net, "_orig_mod", None), nn.Module
    ):
        inside = net._orig_mod if hasattr(net, "_orig_mod") else net.module
        assert isinstance(inside, nn.Module)
        net = inside
    kinds = {p.dtype for p in net.parameters() if p.is_floating_point()}
    return net.float() if len(kinds) == 1 and kinds != {torch.float32} else net


def _assumed(net: nn.Module, options: Options) -> Preprocessing:
    """Returns what is assumed of a network of one's own: ImageNet's mean and deviation, or 0.5 for grey; the picture just covers
    the input."""
    size: Side = IMAGENET.crop if options.input_size is None else options.input_size
    grey = grey_only(net)
    mean, std = ((0.5,), (0.5,)) if grey else (IMAGENET.mean, IMAGENET.std)
    return replace(IMAGENET, resize=size, crop=size, mean=mean, std=std)


def grey_only(net: nn.Module) -> bool:
    """Whether the network's first convolution reads one channel."""
    first = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
    return first is not None and first.in_channels == 1


def _named(name: str, published: Published, options: Options, source: str = "published") -> NamedModel:
    preprocessing = options.preprocessing(published.preprocessing)
    labels = options.names() or published.labels
    if options.class_names is None and labels and options.num_classes not in (None, len(labels)):
        labels = None
    return NamedModel(name, _of_pixels(published.net, preprocessing), preprocessing, labels, _source(options, source))


def _source(options: Options, otherwise: str) -> str:
    return otherwise if options.weights is None else Path(options.weights).name


def _of_pixels(net: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    mean, std = preprocessing.mean, preprocessing.std
    return net.eval() if set(mean) == set(std) == {0.5} else pixel_space(net.eval(), mean, std)


def _maker(name: str) -> Callable[[str, bool, int | None], Published]:
    if name in carried.TEXT:
        raise ValueError(f"{name} is a network for text; of those for pictures, packages carry {', '.join(carried.LITE)}")
    if name.startswith("timm/"):
        return timm_model
    if name.startswith("hf/"):
        return huggingface_model
    return carried.lite if name in carried.LITE else torchvision_model
