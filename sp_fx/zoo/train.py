"""Train a network of the zoo: `python -m sp_fx.zoo.train residual_cnn`.

Each batch is used twice. The first pass also gives, at no cost, the gradient with respect to the pictures; the second takes the
pictures moved by a random length along it, towards a worse answer. A network that is robust to this has gradients that look
like objects, which an explanation by gradients needs. Noise, turns, zooms and swapped colours do the rest. The transformer
starts with lessons from the packaged `residual_cnn`, which fade out by half time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .lessons import Lesson
from .networks import NETWORKS
from .scenes import draw
from .store import WEIGHTS, load, save

TEST_SEED, TEST_SCENES = 20_000, 2_000
BATCH = 64
# Epochs, and the greatest learning rate.
RECIPES = {"residual_cnn": (18, 3e-3), "pyramid_transformer": (11, 2e-3)}


def cached(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Scenes as uint8 [N, 3, 96, 96] and labels int64 [N]: a quarter of the memory, and no grain is lost."""
    pixels, labels = torch.empty(count, 3, 96, 96, dtype=torch.uint8), torch.empty(count, dtype=torch.int64)
    for start in range(0, count, 500):
        part = draw(seed, min(500, count - start), start=start)
        pixels[start : start + 500] = ((part.pixels + 1) * 127.5).round()
        labels[start : start + 500] = part.labels
    return pixels, labels


def augment(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """uint8 [B, 3, 96, 96] to float32 in about [-1, 1]: turned, zoomed, moved, recoloured, noisy."""
    count = len(pixels)

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=rng)

    x = pixels.float() / 127.5 - 1
    colours = torch.rand(count, 3, generator=rng).argsort(1)
    x = x[torch.arange(count)[:, None], colours]
    angle, zoom = between(-0.25, 0.25), between(-0.2, 0.2).exp()
    flip = torch.where(between(0, 1) < 0.5, -1.0, 1.0)
    rows = zoom * angle.cos(), zoom * angle.sin()
    matrix = torch.stack([rows[0] * flip, -rows[1], between(-0.15, 0.15), rows[1] * flip, rows[0], between(-0.15, 0.15)], 1)
    grid = F.affine_grid(matrix.view(-1, 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    x = x * between(0.7, 1.1).view(-1, 1, 1, 1) + between(-0.15, 0.15).view(-1, 1, 1, 1)
    return x + between(0, 0.25).view(-1, 1, 1, 1) * torch.randn(x.shape, generator=rng)


def accuracy(network: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Share of uint8 pictures [N, 3, 96, 96] whose largest logit is their label's; float32, eval mode."""
    network.eval()
    with torch.no_grad():
        hits = [network(x.float() / 127.5 - 1).argmax(1) == y for x, y in zip(pixels.split(100), labels.split(100))]
    return torch.cat(hits).float().mean().item()


def train(
    name: str, seed: int, epochs: int, scenes: int, rate: float, push: float, report: Callable[[str], None] = print
) -> nn.Module:
    """Train `name` on `scenes` scenes of `seed`; `push` is the greatest L2 length of the second pass's move.

    `report` takes lines of text. Returns the network in eval mode.
    """
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    network = NETWORKS[name]().to(memory_format=torch.channels_last)
    start = time.perf_counter()
    pixels, labels = cached(seed, scenes)
    report(f"{scenes} scenes in {time.perf_counter() - start:.0f} s")
    # Scales, shifts and biases are not weights to shrink.
    weights = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, rate)
    steps = 2 * (scenes // BATCH) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.15)

    lesson = Lesson(network, load("residual_cnn")) if name == "pyramid_transformer" else None

    def step(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x)
            copying = teach * lesson.loss(x) if lesson else 0.0
        loss = F.cross_entropy(logits.float(), y, label_smoothing=0.1)
        optimiser.zero_grad()
        (loss + copying).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 2.0)
        optimiser.step()
        schedule.step()
        assert x.grad is not None
        return loss.detach(), x.grad

    start = time.perf_counter()
    for epoch in range(epochs):
        network.train()
        losses = []
        # Shapes first: over the first half the push grows from nothing, and the lessons fade to it.
        reach, teach = push * min(1.0, 2 * epoch / epochs), max(0.0, 1 - 2 * epoch / epochs)
        if lesson and not teach:
            lesson.end()
            lesson = None
        for chosen in torch.randperm(scenes, generator=rng).split(BATCH)[: scenes // BATCH]:
            x, y = augment(pixels[chosen], rng), labels[chosen]
            clean, uphill = step(x, y)
            lengths = reach * torch.rand(len(x), 1, 1, 1, generator=rng)
            pushed, _ = step(x + lengths * F.normalize(uphill.flatten(1)).view_as(x), y)
            losses.append(torch.stack([clean, pushed]))
        spent = time.perf_counter() - start
        clean, pushed = torch.stack(losses).mean(0).tolist()
        report(
            f"epoch {epoch + 1}/{epochs}: loss {clean:.3f}, pushed {pushed:.3f}; "
            f"{2 * (epoch + 1) * len(losses) / spent:.2f} steps/s, {spent:.0f} s"
        )
    return network.to(memory_format=torch.contiguous_format).eval()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sp_fx.zoo.train", description="Train a network of the zoo.")
    parser.add_argument("name", choices=NETWORKS)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="directory for the weights and their manifest")
    parser.add_argument("--epochs", type=int, help="passes over the scenes; the network's recipe unless given")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--rate", type=float, help="greatest learning rate; the network's recipe unless given")
    parser.add_argument("--push", type=float, default=6.0, help="greatest L2 length of the adversarial move")
    options = parser.parse_args()
    if options.seed == TEST_SEED:
        parser.error(f"seed {TEST_SEED} draws the test scenes")
    epochs, rate = options.epochs or RECIPES[options.name][0], options.rate or RECIPES[options.name][1]
    torch.set_num_threads(options.threads)
    # On a CPU, plain matrix products outrun the fused attention in bfloat16.
    with sdpa_kernel(SDPBackend.MATH):
        network = train(options.name, options.seed, epochs, options.scenes, rate, options.push)
    score = accuracy(network, *cached(TEST_SEED, TEST_SCENES))
    path = save(options.name, network, options.out, seed=options.seed, accuracy=round(score, 4))
    print(f"accuracy {score:.4f} on {TEST_SCENES} unseen scenes; wrote {path}")


if __name__ == "__main__":
    main()
