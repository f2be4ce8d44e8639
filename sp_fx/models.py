"""Models by name, with the preprocessing they were trained for. Needs the extra `vision`."""

from __future__ import annotations

import difflib
import hashlib
import urllib.error
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .pixels import pixel_space


@dataclass(frozen=True)
class Preprocessing:
    """Resize the shorter side to `resize`, crop the centre to `crop`; the network takes [0, 1] normalised by `mean` and `std`."""

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, path: str | Path) -> Tensor:
        """The picture at `path` as pixels in [-1, 1], float32 [3, crop, crop]."""
        from PIL import Image, ImageOps
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as T

        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")
        picture = T.resize(picture, self.resize, InterpolationMode(self.interpolation))
        return T.to_tensor(T.center_crop(picture, self.crop)) * 2 - 1


@dataclass(frozen=True)
class NamedModel:
    """`model` takes pixels in [-1, 1]; `labels` names its classes where they are known."""

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    labels: tuple[str, ...] | None
    weights: str

    def provenance(self) -> dict[str, Any]:
        return {"model": self.name, "weights": self.weights, "weights_sha256": weights_hash(self.model),
                "preprocessing": asdict(self.preprocessing)}  # fmt: skip


def load_model(name: str, weights: str | Path | None = None, input_size: int | None = None) -> NamedModel:
    """A torchvision classification model, or `timm/NAME`, in eval mode.

    Args:
        weights: a state dict (.safetensors, .pt, .pth); None downloads the published one.
        input_size: side of the square crop; None is the published one. The picture is resized as published, or, for a crop
            that is larger than that, in the published proportion.

    Raises:
        ValueError: an unknown name (the nearest are suggested), or weights that do not fit the model.
        FileNotFoundError: no such weights file.
        RuntimeError: the published weights cannot be downloaded.
    """
    loader = timm_model if name.startswith("timm/") else torchvision_model
    try:
        net, published, labels = loader(name.removeprefix("timm/"), pretrained=weights is None)
    except (urllib.error.URLError, OSError) as error:
        raise RuntimeError(f"the weights of {name} could not be downloaded ({error}); pass a file with --weights FILE") from error
    if weights is not None:
        fill(net, Path(weights))
    crop = input_size or published.crop
    resize = published.resize if crop <= published.resize else round(crop * published.resize / published.crop)
    used = Preprocessing(resize, crop, published.interpolation, published.mean, published.std)
    source = "published" if weights is None else Path(weights).name
    return NamedModel(name, pixel_space(net.eval(), used.mean, used.std), used, labels, source)


def untrained(name: str) -> NamedModel:
    """The model without its weights: for what depends on its structure alone."""
    loader = timm_model if name.startswith("timm/") else torchvision_model
    net, published, labels = loader(name.removeprefix("timm/"), pretrained=False)
    return NamedModel(name, pixel_space(net.eval(), published.mean, published.std), published, labels, "none")


def torchvision_model(name: str, pretrained: bool) -> tuple[nn.Module, Preprocessing, tuple[str, ...] | None]:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"torchvision has no classification model {name!r}; {nearest(name, known)}. timm's are timm/NAME")
    entry = models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
    # GoogLeNet and Inception initialise by slow rejection sampling unless told not to.
    quick = {"init_weights": False} if name in ("googlenet", "inception_v3") and not pretrained else {}
    net = models.get_model(name, weights=entry if pretrained else None, **quick)
    t = entry.transforms()
    published = Preprocessing(t.resize_size[0], t.crop_size[0], t.interpolation.value, tuple(t.mean), tuple(t.std))
    return net, published, tuple(entry.meta["categories"])


def timm_model(name: str, pretrained: bool) -> tuple[nn.Module, Preprocessing, tuple[str, ...] | None]:
    import timm

    known = timm.list_models()
    if name.split(".")[0] not in known:
        raise ValueError(f"timm has no model {name!r}; {nearest(name, known, 'timm/')}")
    net = timm.create_model(name, pretrained=pretrained)
    config = timm.data.resolve_model_data_config(net)
    crop = config["input_size"][-1]
    published = Preprocessing(round(crop / config["crop_pct"]), crop, config["interpolation"], config["mean"], config["std"])
    return net, published, None


def nearest(name: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, 3, 0.5)
    return f"the nearest: {', '.join(prefix + c for c in close)}" if close else f"it has {len(known)}, such as {prefix}{known[0]}"


def fill(net: nn.Module, path: Path) -> None:
    """Load a state dict from `path`, or raise a ValueError that names what does not fit."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Mapping[str, Any] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(state.get("state_dict", state))  # type: ignore[arg-type]
    except Exception as error:  # safetensors, zip, pickle and torch each have their own; all mean the same to the user
        raise ValueError(f"the weights in {path} do not fit {type(net).__name__}: {str(error)[:400]}") from error


def weights_hash(net: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
