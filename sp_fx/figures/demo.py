"""`sp-fx demo`: what the library is for, offline, on the networks and scenes that ship with it, or with `--real` on a network and
photographs that other packages carry."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import zoo
from ..build import transform
from ..gates.rules import Rules
from ..models.carried import installed
from ..models.named import load_model
from ..models.weights import weights_hash
from ..version import __version__
from .drawing import CHANGE, PART, SLOPE, Cell, picture, product, reading, save, signed_map, table
from .records import rules_record

SEED = 7  # of the scenes; training drew others
STEPS = 10  # of the counterfactual
PHOTOGRAPHS = ("chelsea.png", "coffee.png", "rocket.jpg")  # in the public domain

T = TypeVar("T")


def run_demo(out: Path, scenes: int = 3, format: str = "png") -> Path:
    """Explain `scenes` scenes by every network of the zoo: print predictions and timings, write `demo.png` into `out`, return its
    path.

    `format` is another that matplotlib writes, such as pdf.
    """
    pixels, labels, _ = zoo.draw(SEED, scenes)
    rows = [row for name in zoo.NAMES for row in explain_scenes(name, pixels, labels)]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"demo.{format}"
    hashes = {name: weights_hash(zoo.load(name)) for name in zoo.NAMES}
    versions = {"sp_fx": __version__, "torch": torch.__version__}
    figure = table(rows, note=reading([SLOPE, CHANGE]))
    save(figure, path, {"rules": rules_record(Rules()), "seed": SEED, "weights_sha256": hashes, "versions": versions})
    return path


def run_real(out: Path, format: str = "png") -> Path:
    """Explain scikit-image's photographs of a cat, a coffee cup and a rocket by EfficientNet-Lite0: print predictions and
    timings, write `demo_real.png` into `out`, return its path.

    Raises:
        ModuleNotFoundError: the extra `models` is not installed.
    """
    net = load_model("efficientnet_lite0")
    pictures = installed("skimage") / "data"
    x = torch.stack([net.preprocessing(pictures / name).pixels for name in PHOTOGRAPHS])
    explainer = transform(net.model)
    explainer.pullback(x)  # the first call also pays for what torch sets up once
    before = probabilities(net.model, x)
    predicted = before.argmax(1)
    gradient, gradient_s = timed(lambda: class_gradient(net.model, x))
    pullback, pullback_s = timed(lambda: explainer.pullback(x, predicted))
    change, change_s = timed(lambda: explainer.ascend(x, predicted, bounds=(-1.0, 1.0)))
    print(
        f"{net.name}, {len(x)} photographs: plain gradient {1e3 * gradient_s:.0f} ms, soft pullback {1e3 * pullback_s:.0f} ms, "
        f"ascent of 5 steps {1e3 * change_s:.0f} ms"
    )
    rows = []
    for i, (name, kind) in enumerate(zip(PHOTOGRAPHS, predicted.tolist())):
        label = f"{net.labels[kind] if net.labels else f'class {kind}'}, {before[i, kind]:.2f}"
        print(f"  {name}: {label}")
        rows.append(
            [
                picture(x[i], label),
                signed_map(gradient[i], "plain gradient", SLOPE),
                product(x[i], gradient[i], title="plain gradient, times the input"),
                signed_map(pullback[i], "soft pullback", SLOPE),
                product(x[i], pullback[i], title="soft pullback, times the input"),
                signed_map(change[i], "pullback ascent, 5 steps", CHANGE),
            ]
        )
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"demo_real.{format}"
    versions = {"sp_fx": __version__, "torch": torch.__version__}
    figure = table(rows, note=reading([SLOPE, PART, CHANGE]))
    save(figure, path, {**net.provenance(), "rules": rules_record(Rules()), "versions": versions})
    return path


def explain_scenes(name: str, pixels: Tensor, labels: Tensor) -> list[list[Cell]]:
    """Explain scenes [B, 3, 96, 96] by the network `name`: print what it sees and the seconds, return a row of cells a scene."""
    network = zoo.load(name)
    explainer = transform(network)
    explainer.pullback(pixels)  # the first call also pays for what torch sets up once
    before = probabilities(network, pixels)
    predicted = before.argmax(1)
    aim = (predicted + 1) % len(zoo.KINDS)  # towards the next kind in the list: "what would make it that?"

    gradient, gradient_s = timed(lambda: class_gradient(network, pixels))
    pullback, pullback_s = timed(lambda: explainer.pullback(pixels, predicted))
    ascent, ascent_s = timed(lambda: explainer.ascend(pixels, predicted, bounds=(-1.0, 1.0)))
    change, change_s = timed(lambda: explainer.ascend(pixels, aim, steps=STEPS, bounds=(-1.0, 1.0)))
    after = probabilities(network, pixels + change)
    print(
        f"{name}, {len(pixels)} scenes: plain gradient {1e3 * gradient_s:.0f} ms, soft pullback {1e3 * pullback_s:.0f} ms, "
        f"ascent of 5 steps {1e3 * ascent_s:.0f} ms, counterfactual of {STEPS} steps {1e3 * change_s:.0f} ms"
    )
    rows = []
    for i, (kind, other) in enumerate(zip(predicted.tolist(), aim.tolist())):
        print(
            f"  {zoo.KINDS[labels[i]]}, seen as {zoo.KINDS[kind]} ({before[i, kind]:.3f}); towards {zoo.KINDS[other]}: "
            f"{before[i, other]:.3f} before, {after[i, other]:.3f} after {STEPS} steps"
        )
        rows.append(
            [
                picture(pixels[i], f"{name} sees\n{zoo.KINDS[kind]} {before[i, kind]:.2f}"),
                signed_map(gradient[i], "plain gradient", SLOPE),
                signed_map(pullback[i], "soft pullback", SLOPE),
                signed_map(ascent[i], "pullback ascent, 5 steps", CHANGE),
                picture(pixels[i] + change[i], f"counterfactual, {STEPS} steps\n{zoo.KINDS[other]} {after[i, other]:.2f}"),
            ]
        )
    return rows


def probabilities(network: nn.Module, pixels: Tensor) -> Tensor:
    """Returns the class probabilities, [B, classes]."""
    with torch.no_grad():
        return network(pixels).softmax(1)


def class_gradient(network: nn.Module, pixels: Tensor) -> Tensor:
    """Returns the gradient of the predicted class's score, [B, C, H, W], which the soft pullback is compared with."""
    x = pixels.detach().requires_grad_()
    return torch.autograd.grad(network(x).amax(1).sum(), x)[0]


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """Returns what `run` returns, and the seconds it took."""
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started
