"""The cases of fidelity.py: networks, pictures, the classes explained, mosaics, and how many questions fit the time."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from photographs import photographs
from torch import Tensor, nn

from sp_fx import zoo
from sp_fx.models.named import load_model, weights_hash

SEED = 2_025  # of the scenes; the zoo was trained on others, but the defaults of Rules were chosen on these


@dataclass(frozen=True)
class Counts:
    """How many samples and questions; methods of more passes than `dear` are asked less, and only `stable_too` of them for
    their stability."""

    batch: int = 10  # samples explained at once
    removals: int = 32
    cells: int = 12  # a side of the grid
    curves: int = 30
    steps: int = 10  # of deletion and insertion
    sensitivity: int = 20
    draws: int = 3  # of noise, a sample
    logit: int = 20
    mosaics: int = 12
    randomised: int = 8
    dear: int = 50
    stable_too: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A network and its samples: `model` takes `pixels` [N, 3, H, W] in [-1, 1]; `target` [N] is the predicted class; `masks`
    [N, H, W] bool say where the object is; `layer` is that of `methods`."""

    name: str
    model: nn.Module
    pixels: Tensor
    target: Tensor
    masks: Tensor | None
    mosaics: tuple[Tensor, Tensor, Tensor] | None  # [M, 3, h, w], the class asked for [M], its tiles [M, 4]
    layer: tuple[str, str] | None
    samples: str
    counts: Counts = field(default_factory=Counts)
    seed: int = SEED
    fresh: int = 0  # the first sample that no default was chosen on

    @property
    def weights(self) -> str:
        return weights_hash(self.model)

    @property
    def classes(self) -> int:
        return self._run(self.pixels[:1]).shape[1]

    def _run(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.model(part) for part in x.split(32)])

    def score(self, x: Tensor, target: Tensor) -> Tensor:
        return self._run(x).gather(1, target[:, None])[:, 0]

    def probability(self, x: Tensor, target: Tensor) -> Tensor:
        return self._run(x).softmax(1).gather(1, target[:, None])[:, 0]

    def with_random_top(self, part: float, draw: torch.Generator) -> nn.Module:
        """Returns a copy of the model whose last `part` of the layers (convolutions, linear maps, and norms among them) is drawn
        anew: 0.5 is the upper half."""
        model = copy.deepcopy(self.model)
        layers = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
        weighted = [i for i, m in enumerate(layers) if isinstance(m, nn.Conv2d | nn.Linear)]
        first = weighted[len(weighted) - round(part * len(weighted))]
        with torch.no_grad():
            for parameter in (p for layer in layers[first:] for p in layer.parameters(recurse=False)):
                if parameter.numel() > 1 and parameter.std() > 0:
                    noise = torch.randn(parameter.shape, generator=draw)
                    parameter.copy_(parameter.mean() + parameter.std() * noise)
        return model


def load_case(name: str, data: Path, samples: int | None = None, seed: int = SEED) -> Case:
    """Returns the case of `squeezenet1_0`, on the photographs in `data` and those of packages; of a network of the zoo, scenes;
    of another of `sp_fx.models`, on the photographs of packages alone, on which no default was chosen."""
    if name == "squeezenet1_0":
        return photographed(data)
    if not name.startswith("zoo/") and name not in zoo.NAMES:
        return proved(name, data)
    return scenes(name.removeprefix("zoo/"), 60 if samples is None else samples, seed)


def scenes(name: str, count: int, seed: int) -> Case:
    model = zoo.load(name)
    drawn = zoo.draw(seed, count)
    counts = Counts()
    # Two tiles show the kind asked for, two show others.
    order = torch.Generator().manual_seed(seed)
    tiles, classes, shown = [], [], []
    kinds = len(zoo.KINDS)
    for i in range(counts.mosaics):
        kind = i % kinds
        others = [(kind + 1 + int(k)) % kinds for k in torch.randperm(kinds - 1, generator=order)[:2]]
        names = [zoo.KINDS[k] for k in (kind, kind, *others)]
        four = torch.cat([zoo.draw(seed + 1, 1, kinds=[n], start=4 * i + j).pixels for j, n in enumerate(names)])
        shuffled = torch.randperm(4, generator=order)
        tiles.append(four[shuffled])
        shown.append(shuffled < 2)
        classes.append(kind)
    return Case(f"zoo/{name}", model, drawn.pixels, predicted(model, drawn.pixels), drawn.masks,
                (mosaic(torch.stack(tiles)), torch.tensor(classes), torch.stack(shown)),
                ("own_relu12", "blocks") if name == "residual_cnn" else None,
                f"scenes 0 to {count - 1} of seed {seed}", counts, seed)  # fmt: skip


def photographed(data: Path) -> Case:
    named = load_model("squeezenet1_0", data / "squeezenet1_0_imagenet.safetensors", 227)
    files, chosen_on = photographs(data)
    pixels = torch.stack([named.preprocessing(path).pixels for path in files])
    # A pass takes 0.2 s on one core: what asks for many more of them is left to the zoo.
    counts = Counts(batch=5, removals=24, cells=7, curves=0, sensitivity=12, draws=2, logit=10, mosaics=0, randomised=4,
                    dear=10, stable_too=("SmoothGrad-50", "IG-50"))  # fmt: skip
    return Case("squeezenet1_0", named.model, pixels, predicted(named.model, pixels), None, None,
                ("model.classifier.0", "model.classifier.0"), f"{len(files)} photographs", counts, fresh=chosen_on)  # fmt: skip


def proved(name: str, data: Path) -> Case:
    """The case of a network of `sp_fx.models` on the photographs that no default was chosen on, with mosaics of them."""
    named = load_model(name)
    files, chosen_on = photographs(data)
    pixels = torch.stack([named.preprocessing(path).pixels for path in files[chosen_on:]])
    target = predicted(named.model, pixels)
    counts = Counts(batch=4, removals=48, cells=7, curves=0, sensitivity=len(pixels), draws=2, logit=len(pixels), mosaics=0,
                    randomised=len(pixels), dear=10, stable_too=("SmoothGrad-50", "IG-50"))  # fmt: skip
    return Case(name, named.model, pixels, target, None, of_two(pixels, target), None,
                f"{len(pixels)} photographs that no default was chosen on", counts)  # fmt: skip


def of_two(pixels: Tensor, target: Tensor, seed: int = SEED) -> tuple[Tensor, Tensor, Tensor]:
    """Mosaics of photographs [N, 3, h, w], one for each: it and its mirror image, and two others of other classes."""
    order = torch.Generator().manual_seed(seed)
    tiles, shown = [], []
    for i in range(len(pixels)):
        others = [j for j in torch.randperm(len(pixels), generator=order).tolist() if target[j] != target[i]][:2]
        four = torch.stack([pixels[i], pixels[i].flip(2), *pixels[others]])
        shuffled = torch.randperm(4, generator=order)
        tiles.append(four[shuffled])
        shown.append(shuffled < 2)
    return mosaic(torch.stack(tiles)), target, torch.stack(shown)


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(32)]).argmax(1)


def mosaic(tiles: Tensor) -> Tensor:
    """Returns tiles [M, 4, 3, h, w] as pictures [M, 3, 2h, 2w], row by row."""
    upper, lower = torch.cat([tiles[:, 0], tiles[:, 1]], 3), torch.cat([tiles[:, 2], tiles[:, 3]], 3)
    return torch.cat([upper, lower], 2)
