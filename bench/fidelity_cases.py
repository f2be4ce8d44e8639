"""The cases of fidelity.py: networks, pictures, the classes explained, mosaics, and how many questions fit the time."""

from __future__ import annotations

import copy
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from photographs import folder, photographs
from torch import Tensor, nn

import sp_fx
from sp_fx import zoo
from sp_fx.models.classes import class_index
from sp_fx.models.named import NamedModel, load_model
from sp_fx.models.options import Options
from sp_fx.models.weights import weights_hash

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
    layer: str | None  # that of class activation maps, where it is not the last
    samples: str
    counts: Counts = field(default_factory=Counts)
    seed: int = SEED
    fresh: int = 0  # the first sample that no default was chosen on

    @property
    def weights(self) -> str:
        return weights_hash(self.model)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What answers depend on."""
        return self.pixels, self.target, *(self.mosaics or ())

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
        first = weighted[len(weighted) - max(1, round(part * len(weighted)))]
        with torch.no_grad():
            for parameter in (p for layer in layers[first:] for p in layer.parameters(recurse=False)):
                if parameter.numel() > 1 and parameter.std() > 0:
                    noise = torch.randn(parameter.shape, generator=draw)
                    parameter.copy_(parameter.mean() + parameter.std() * noise)
        return model


def load_case(name: str, data: Path, samples: int | None = None, seed: int = SEED, mosaics: int | None = None) -> Case:
    """Returns the case of a network of the zoo, on scenes; of `squeezenet1_0`, on the photographs in `data` and those of
    packages; of another, on those of packages alone."""
    if name == "squeezenet1_0":
        return photographed(data)
    if not name.startswith("zoo/") and name not in zoo.NAMES:
        return of_pictures(load_model(name), None, None, data, samples, seed, mosaics)
    return scenes(name.removeprefix("zoo/"), 60 if samples is None else samples, seed, mosaics)


def scenes(name: str, count: int, seed: int, mosaics: int | None = None) -> Case:
    model = zoo.load(name)
    drawn = zoo.draw(seed, count)
    counts = Counts() if mosaics is None else replace(Counts(), mosaics=mosaics)
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
                (mosaic(torch.stack(tiles)), torch.tensor(classes), torch.stack(shown)) if tiles else None,
                None, f"scenes 0 to {count - 1} of seed {seed}", counts, seed)  # fmt: skip


def photographed(data: Path) -> Case:
    named = load_model("squeezenet1_0", Options(data / "squeezenet1_0_imagenet.safetensors", 227))
    files, chosen_on = photographs(data)
    pixels = torch.stack([named.preprocessing(path).pixels for path in files])
    # A pass takes 0.2 s on one core: what asks for many more of them is left to the zoo.
    counts = Counts(batch=5, removals=24, cells=7, curves=0, sensitivity=12, draws=2, logit=10, mosaics=0, randomised=4,
                    dear=10, stable_too=("SmoothGrad-50", "IG-50"))  # fmt: skip
    return Case("squeezenet1_0", named.model, pixels, predicted(named.model, pixels), None, None,
                "model.classifier.0", f"{len(files)} photographs", counts, fresh=chosen_on)  # fmt: skip


def choosing(name: str, data: Path) -> Case:
    """The case of a network on the photographs that defaults are chosen on: the ten in `data`; for clamps, too few, also two of
    scikit-learn's and the mirror image of each."""
    if name == "squeezenet1_0":
        case = photographed(data)
        n = case.fresh
        return replace(case, pixels=case.pixels[:n], target=case.target[:n], samples=f"the first {n} photographs", fresh=0)
    named = load_model(name)
    files, chosen_on = photographs(data)
    more = [folder("sklearn").parent / "datasets" / "images" / file for file in ("china.jpg", "flower.jpg")]
    chosen = files[:chosen_on] + [path for path in more if path.exists()]
    pixels = torch.stack([named.preprocessing(path).pixels for path in chosen])
    pixels = torch.cat([pixels, pixels.flip(3)])
    counts = Counts(batch=4, removals=48, cells=7, sensitivity=len(chosen), draws=2)
    target = predicted(named.model, pixels)
    return Case(name, named.model, pixels, target, None, None, None, f"{len(chosen)} photographs and their mirror images", counts)


def of_pictures(
    named: NamedModel, images: Path | None, labels: Path | None, data: Path, samples: int | None = None, seed: int = SEED,
    mosaics: int | None = None,
) -> Case:  # fmt: skip
    """Returns the case of a network on the pictures in the folder `images`, `samples` of them spread evenly over all, with
    mosaics of them; without `images` on the photographs of packages, on which no default was chosen.

    Raises:
        ValueError: no picture, one that cannot be read, labels that do not fit, or a network whose output is not [B, classes].
        FileNotFoundError: there is no such folder or file.
    """
    if images is None:
        known, chosen_on = photographs(data)
        files, where = known[chosen_on:], "photographs that no default was chosen on"
    else:
        if not images.is_dir():
            raise FileNotFoundError(f"no folder of pictures at {images}")
        files = sorted(path for path in images.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
        where = f"pictures of {images.name}"
    classes = of_labels(labels, named.labels, files, images or Path()) if labels else None
    if classes is not None:
        if missing := len(files) - len(classes):
            where += f", {missing} without a label left out"
        files = list(classes)
    if not files:
        raise ValueError(f"no picture ({', '.join(ENDINGS)}) in {images}" + (f" that {labels} has a class of" if labels else ""))
    if samples is not None and samples < len(files):
        files = [files[k * len(files) // samples] for k in range(samples)]
    pixels = torch.stack([read(named, path) for path in files])
    target = predicted(named.model, pixels)
    if classes is not None:
        right, target = target, torch.tensor([classes[path] for path in files])
        with torch.no_grad():
            numbers = named.model(pixels[:1]).shape[1]
        if int(target.max()) >= numbers:
            raise ValueError(f"{labels} has class {int(target.max())}; {named.name} has {numbers}, numbered from 0")
        where += f", labelled; {int((right == target).sum())} predicted right"
    n = len(pixels)
    few = min(n, 23)  # stability and randomised weights explain anew, several times
    counts = Counts(batch=4, removals=48, cells=7, curves=n, sensitivity=few, draws=2, logit=n, randomised=few, dear=10,
                    mosaics=n if mosaics is None else mosaics, stable_too=("SmoothGrad-50", "IG-50"))  # fmt: skip
    several = of_two(pixels, target, seed, mosaics)
    if several is None and mosaics != 0:
        where += "; no mosaics, since no picture has two others of other classes"
    if several is not None and not takes(named.model, several[0][:1]):
        several, where = None, f"{where}; no mosaics, since it takes one size"
    return Case(named.name, named.model, pixels, target, None, several, None, f"{n} {where}", counts, seed)


def of_labels(labels: Path, names: tuple[str, ...] | None, files: list[Path], root: Path) -> dict[Path, int]:
    """Returns the class of each of `files` in the folder `root` that a line of `labels` names, with its folder or without.

    Raises:
        ValueError: a line of another form, no such class, or a name that several pictures have.
    """
    known, classes, used = labelled(labels, names), dict[Path, int](), set[str]()
    for path in files:
        inside = path.relative_to(root).as_posix()
        key = next((name for name in (inside, path.name) if name in known), None)
        if key is None:
            continue
        if key in used:
            raise ValueError(f"{labels}: {key!r} is the name of several pictures; write its folder, as in {inside!r}")
        classes[path] = known[key]
        used.add(key)
    if unused := len(known) - len(used):
        print(f"fidelity: {unused} lines of {labels} are of pictures that are not there", file=sys.stderr)
    return classes


ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")


def labelled(path: Path, names: tuple[str, ...] | None) -> dict[str, int]:
    """Returns the class of each picture by its name: a line is "n01/cat.jpg 281", or "n01/cat.jpg tabby", also with a comma
    between, or a tab, before which the name may have blanks.

    Raises:
        ValueError: a line of another form, or no such class.
    """
    classes = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        parts = re.split(r"\t\s*" if "\t" in line else r"\s*,\s*|\s+", line.strip(), maxsplit=1)  # after a tab, any name
        if len(parts) != 2:
            raise ValueError(f"{path}, line {number}: expected the name of a picture and its class, got {line!r}")
        try:
            classes[parts[0]] = int(parts[1]) if parts[1].isdigit() else class_index(parts[1], names)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return classes


def of_two(pixels: Tensor, target: Tensor, seed: int = SEED, count: int | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Mosaics of photographs [N, 3, h, w], `count` of them (default: one for each): one and its mirror image, and two others of
    other classes; None where there are no two others, or `count` is 0."""
    order = torch.Generator().manual_seed(seed)
    tiles, shown, chosen = [], [], []
    for k in range(len(pixels) if count is None else count):
        i = k % len(pixels)
        others = [j for j in torch.randperm(len(pixels), generator=order).tolist() if target[j] != target[i]][:2]
        if len(others) < 2:
            continue
        four = torch.stack([pixels[i], pixels[i].flip(2), *pixels[others]])
        shuffled = torch.randperm(4, generator=order)
        tiles.append(four[shuffled])
        shown.append(shuffled < 2)
        chosen.append(i)
    return (mosaic(torch.stack(tiles)), target[chosen], torch.stack(shown)) if tiles else None


def read(named: NamedModel, path: Path) -> Tensor:
    """The pixels of a picture; errors name it."""
    try:
        return named.preprocessing(path).pixels
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def takes(model: nn.Module, x: Tensor) -> bool:
    """Whether the model, and an explainer of it, run on pictures of this size."""
    try:
        with torch.no_grad():
            model(x)
        sp_fx.transform(model)
    except (RuntimeError, ValueError, AssertionError, sp_fx.CaptureError):
        return False
    return True


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """Raises ValueError where the model's output is not [B, classes]."""
    with torch.no_grad():
        scores = [model(part) for part in x.split(32)]
    if not isinstance(scores[0], Tensor) or scores[0].dim() != 2:
        got = list(scores[0].shape) if isinstance(scores[0], Tensor) else type(scores[0]).__name__
        raise ValueError(f"expected a network that returns scores [B, classes], got {got}: wrap it in one that does")
    return torch.cat(scores).argmax(1)


def mosaic(tiles: Tensor) -> Tensor:
    """Returns tiles [M, 4, 3, h, w] as pictures [M, 3, 2h, 2w], row by row."""
    upper, lower = torch.cat([tiles[:, 0], tiles[:, 1]], 3), torch.cat([tiles[:, 2], tiles[:, 3]], 3)
    return torch.cat([upper, lower], 2)
