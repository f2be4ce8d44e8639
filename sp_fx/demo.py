"""`sp-fx demo`: what the library is for, offline, on the networks and scenes that ship with it."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn

from . import zoo
from .explainer import transform
from .plot import robust_limit, show_map, show_picture

SEED = 7  # of the scenes; training drew others
COLUMNS = ("scene", "plain gradient", "soft pullback", "pullback ascent", "counterfactual")


def run_demo(out: Path, scenes: int = 3) -> Path:
    """Explain `scenes` scenes by every network of the zoo: print what is found, write `demo.png` into `out`, return its path."""
    from matplotlib.figure import Figure

    pixels, labels, _ = zoo.draw(SEED, scenes)
    figure = Figure(figsize=(2.2 * len(COLUMNS), 2.35 * scenes * len(zoo.NAMES)), layout="constrained", dpi=120)
    axes = figure.subplots(scenes * len(zoo.NAMES), len(COLUMNS), squeeze=False)
    for block, name in enumerate(zoo.NAMES):
        model = zoo.load(name)
        explainer = transform(model)
        probabilities = explainer(pixels).detach().softmax(1)
        # Towards the next kind in the list: the question "what would make it that?"
        wanted = (probabilities.argmax(1) + 1) % len(zoo.KINDS)
        started = time.perf_counter()
        maps = explainer.pullback(pixels)
        once = time.perf_counter() - started
        ascent = explainer.ascend(pixels, bounds=(-1.0, 1.0))
        changed = explainer.ascend(pixels, wanted, steps=10, bounds=(-1.0, 1.0))
        after = explainer(pixels + changed).detach().softmax(1)
        gradient = class_gradient(model, pixels)
        print(f"{name}: one pullback of {scenes} scenes takes {1e3 * once:.0f} ms")
        for i in range(scenes):
            top, aim = int(probabilities[i].argmax()), int(wanted[i])
            print(
                f"  a {zoo.KINDS[labels[i]]}, seen as {zoo.KINDS[top]} ({probabilities[i, top]:.2f}); towards {zoo.KINDS[aim]}: "
                f"{probabilities[i, aim]:.3f} before, {after[i, aim]:.3f} after 10 steps"
            )
            row = axes[block * scenes + i]
            show_picture(row[0], pixels[i], f"{name}\n{zoo.KINDS[top]} {probabilities[i, top]:.2f}")
            for axis, map in zip(row[1:4], (gradient[i], maps[i], ascent[i])):
                show_map(axis, map, "", robust_limit(map))
            show_picture(row[4], pixels[i] + changed[i], f"{zoo.KINDS[aim]} {after[i, aim]:.2f}")
            if block == i == 0:
                for axis, title in zip(row[1:4], COLUMNS[1:4]):
                    axis.set_title(title, fontsize=8)
                row[4].set_title(f"counterfactual:\n{row[4].get_title()}", fontsize=8)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "demo.png")
    return out / "demo.png"


def class_gradient(model: nn.Module, pixels: Tensor) -> Tensor:
    """What the soft pullback is compared with: the gradient of the predicted class's score, [B, C, H, W]."""
    x = pixels.detach().requires_grad_()
    return torch.autograd.grad(model(x).amax(1).sum(), x)[0]
