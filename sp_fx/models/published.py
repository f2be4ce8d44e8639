"""Networks that torchvision, timm and Hugging Face's hub publish, with the preprocessing and the classes of their weights."""

from __future__ import annotations

import contextlib
import copy
import difflib
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..zoo.store import check_finite
from .images import Preprocessing
from .weights import unfit

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage


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
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    if pretrained and not file.exists() and (reason := unreachable(entry.url)) is not None:
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


OTHERS = (
    "timm's are timm/NAME, Hugging Face's hf/NAME, the shipped ones zoo/NAME, those in packages efficientnet_lite0, "
    "efficientnet_lite1 and efficientnet_lite2, your own module:function or a file"
)


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
    return Published(Logits(net, bgr), preprocessing, None if generic else tuple(names))


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
            missing = {key for key in info["missing_keys"] if not key.endswith("num_batches_tracked")}
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
    missing = [key for key in info["missing_keys"] if not key.endswith("num_batches_tracked")]
    shapes = [f"{key} {list(theirs)} where it has {list(own)}" for key, theirs, own in mismatched]
    if missing or info["unexpected_keys"] or shapes:
        raise unfit(net, path, len(state), sorted(missing), sorted(info["unexpected_keys"]), shapes)
    check_finite(path, state)
    return replace(published, net=Logits(net, logits.bgr))


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


def asked(processor: Any, channels: int = 3) -> tuple[Preprocessing, bool]:
    """Returns the preprocessing that an image processor of transformers comes closest to, and whether it puts blue first.

    Raises:
        ValueError: what it makes of pictures is no crop of a size of its own, normalised.
    """
    from PIL import Image

    mode = "RGB" if channels == 3 else "L"

    def seen(image: PillowImage) -> Tensor:
        made = processor(image.convert(mode), return_tensors="pt")
        if "pixel_values" not in made or made["pixel_values"].dim() != 4 or made["pixel_values"].shape[1] != channels:
            shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in made.items() if isinstance(value, Tensor))
            raise ValueError(f"its {type(processor).__name__} makes {shapes} of one")
        return made["pixel_values"][0].float()

    # One colour at a time shows how it is normalised, whichever settings do that.
    basis = [(255, 0, 0), (0, 255, 0), (0, 0, 255)] if channels == 3 else [(255, 255, 255)]
    black, *colours = (_middle(seen(Image.new("RGB", (64, 48), colour))) for colour in [(0, 0, 0), *basis])
    gains = torch.stack([colour - black for colour in colours]).double()
    bgr = channels == 3 and not bool(gains[0, 0]) and bool(gains[0, 2])  # red is seen in the last channel
    slope, offset = (gains.fliplr().diagonal(), black.flip(0)) if bgr else (gains.diagonal(), black)
    if not bool((slope > 0).all()):
        raise ValueError(f"its {type(processor).__name__} makes no picture of a plain colour brighter where that is")
    said = {key: value for key, value in processor.to_dict().items() if value is not None}
    mean = _as_said((-offset.double() / slope).tolist(), said.get("image_mean"))
    std = _as_said((1 / slope).tolist(), said.get("image_std"))

    # Of the ways to resize and crop, the one that comes closest on a wide and on a high picture.
    _, height, width = seen(_drawn(300, 200)).shape
    pictures = [_drawn(int(1.5 * width) + 1, int(1.2 * height)), _drawn(int(1.1 * width), int(1.7 * height) + 1)]
    shift, scale = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    wanted = [(each.flip(0) if bgr else each) * scale + shift for each in map(seen, pictures)]
    if any(each.shape[1:] != (height, width) for each in wanted):
        raise ValueError(f"its {type(processor).__name__} makes {width} x {height} of one and other sizes of others")

    def distance(way: Preprocessing) -> float:
        return max(_apart((way.pixels(image) + 1) / 2, want) for image, want in zip(pictures, wanted))

    best = min(_ways(said, (height, width), mean, std), key=lambda way: round(distance(way), 5))
    if (off := 255 * distance(best)) > 3:
        warnings.warn(
            f"{type(processor).__name__} does more to pictures than resize, crop and normalise: those made here differ by "
            f"{off:.0f} of 255 on average",
            stacklevel=4,
        )
    return best, bgr


def _middle(pixels: Tensor) -> Tensor:
    return pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2]


def _apart(found: Tensor, wanted: Tensor) -> float:
    """The mean distance of two pictures. One may lie a pixel beside the other: where an odd number of them is cut off,
    torchvision and transformers leave one out at different ends."""
    rows, columns = found.shape[1] - 2, found.shape[2] - 2
    moved = (wanted[:, y : y + rows, x : x + columns] for y in range(3) for x in range(3))
    return min(float((found[:, 1:-1, 1:-1] - each).abs().mean()) for each in moved)


def _as_said(found: list[float], said: Any) -> tuple[float, ...]:
    """The mean or deviation as its settings have it, in full precision, where that is what was found."""
    if isinstance(said, list | tuple) and len(said) == len(found) and all(abs(a - b) < 1e-5 for a, b in zip(found, said)):
        return tuple(map(float, said))
    return tuple(round(value, 6) + 0.0 for value in found)  # no -0.0


def _ways(said: dict[str, Any], crop: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]) -> list[Preprocessing]:
    """Returns the ways to resize and crop to `crop` that an image processor with these settings may mean."""
    pillows = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
    timms = said.get("data_config") or {}
    if "resample" in said:
        filters = [pillows.get(int(said["resample"]), "bilinear")]
    else:
        filters = [str(timms["interpolation"])] if "interpolation" in timms else ["bilinear", "bicubic"]
    size, side, least = dict(said.get("size") or {}), crop[0] if crop[0] == crop[1] else crop, min(crop)
    shares = [share for share in (said.get("crop_pct"), timms.get("crop_pct"), 224 / 256) if share]
    edges = dict.fromkeys([*(v for v in size.values() if v), *(int(least / share) for share in shares), least])
    boxes = dict.fromkeys([(size.get("height", crop[0]), size.get("width", crop[1])), crop])
    covered = [(edge, False) for edge in edges]
    squashed = [((h, w) if h != w else h, True) for h, w in boxes]
    return [Preprocessing(resize, side, how, mean, std, squash) for how in filters for resize, squash in [*squashed, *covered]]


def _drawn(width: int, height: int) -> PillowImage:
    """Returns a picture with detail of every size."""
    from PIL import Image

    noise = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
    waves = nn.functional.interpolate(noise[None], (height, width), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((waves * 255).byte().permute(1, 2, 0).numpy())


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
    """Returns why nothing answers at `address` within seven seconds, or None."""
    found: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=5).close()
        except urllib.error.HTTPError:
            pass  # an answer
        except (OSError, ValueError) as error:
            found.append(str(getattr(error, "reason", error)))
            return
        found.append(None)

    # The look-up of a name has no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(7)
    return found[0] if found else "no answer within seven seconds"


def nearest(name: str, known: list[str], prefix: str = "") -> str:
    """Returns the end of an error message: the names in `known` that are closest to `name`, each behind `prefix`."""
    close = difflib.get_close_matches(name, known, 3, 0.5)
    return f"the nearest: {', '.join(prefix + c for c in close)}" if close else f"it has {len(known)}, such as {prefix}{known[0]}"
