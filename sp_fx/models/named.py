"""Models by name, such as `resnet50`, `timm/vit_tiny_patch16_224`, `efficientnet_lite0` or `zoo/residual_cnn`, with their
preprocessing.

The zoo's need the extra `demo`, those of `carried.py` `models`, others `vision`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import zoo
from . import carried
from .images import Preprocessing, Side
from .options import Options
from .own import PACKAGES, architecture, called, is_file, is_own, pickled_model
from .pixel_space import PixelSpace, pixel_space
from .published.huggingface import Logits, huggingface_model, huggingface_weights
from .published.network import Published
from .published.timm_models import timm_model
from .published.torchvision_models import torchvision_model
from .weights import UnfitError, classes_of, fitted, load_state, load_weights, read_state, weights_hash


@dataclass(frozen=True)
class NamedModel:
    """A network with its `preprocessing`: `model` takes pixels in [-1, 1]; `labels` names its classes where they are known;
    `weights` says where they are from: "published", a file's name, or "none"; `assumed`, in a sentence, what nobody has said of
    it; `multi_label`, that its classes do not exclude each other, so that the probability of each is the sigmoid of its score."""

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    weights: str
    assumed: str = ""
    multi_label: bool = False

    def provenance(self) -> dict[str, Any]:
        """Returns what a record says of the model."""
        return {"model": self.name, "weights": self.weights, "weights_sha256": weights_hash(self.model),
                "preprocessing": asdict(self.preprocessing)}  # fmt: skip


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
        raise RuntimeError(no_download(name, error)) from error
    if options.weights is not None:
        published = with_weights(published, options, lambda classes: maker(name, False, classes))
    named = _named(name, published, options, "published" if pretrained else "none")
    if options.weights is None:
        return named
    unsaid = options.unsaid(named.preprocessing)
    assumed = f"has weights that say nothing of pictures; assumed: {unsaid}" if unsaid else ""
    if getattr(published.net, "transform_input", False):
        text = "is taken as published, with transform_input=True, which its weights do not say; for one that was trained without"
        assumed = "; ".join(filter(None, [f"{text} it name the function that makes it, --model module:function", assumed]))
    return replace(named, assumed=assumed)


def no_download(name: str, error: OSError) -> str:
    """Says that the weights of a published network cannot be had, why, and what to do."""
    reason = str(error).strip().split("\n")[0]
    instead = "name a folder that has them, hf/./FOLDER" if name.startswith("hf/") else "pass a file with --weights FILE"
    return f"the weights of {name} could not be downloaded ({reason}); {instead}"


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
    try:
        load_state(published.net, state, path)
    except UnfitError as error:
        if (found := architecture(state)) is None:
            raise
        name, classes = found
        raise UnfitError(f"{error}. They fit torchvision's {name} with {classes} classes: --model {name}") from None
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
        unsaid = options.unsaid(named.preprocessing)
        return replace(named, assumed=f"says nothing of its pixels; assumed: {unsaid}" if unsaid else "")
    if isinstance(made, PixelSpace) and options.input_size is not None:
        published = replace(published, resize=options.input_size, crop=options.input_size)
    called_so = made.name if isinstance(made, NamedModel) else name
    names = options.names() or labels
    several = options.multi_label or (isinstance(made, NamedModel) and made.multi_label)
    how = options.preprocessing(published)
    return NamedModel(called_so, net.eval(), how, names, _source(options, source), multi_label=several)


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
    several = options.multi_label or published.multi_label
    net = _of_pixels(published.net, preprocessing)
    return NamedModel(name, net, preprocessing, labels, _source(options, source), multi_label=several)


def _source(options: Options, otherwise: str) -> str:
    return otherwise if options.weights is None else Path(options.weights).name


def _of_pixels(net: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    mean, std = preprocessing.mean, preprocessing.std
    return net.eval() if set(mean) == set(std) == {0.5} else pixel_space(net.eval(), mean, std)


def _maker(name: str) -> Callable[[str, bool, int | None], Published]:
    if name in carried.TEXT:
        those = f"of those for pictures, packages carry {', '.join(carried.LITE)}"
        raise ValueError(f"{name} is a network for text, which `sp-fx text` explains; {those}")
    if name.startswith("timm/"):
        return timm_model
    if name.startswith("hf/"):
        return huggingface_model
    return carried.lite if name in carried.LITE else torchvision_model
