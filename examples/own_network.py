"""A network of one's own to try the commands with, where none is at hand: `python examples/own_network.py --out mine`

A ResNet-18 is trained for about a minute to tell five patterns apart, and DIR gets what someone who has fine-tuned a network has:
`mine.pth`, its state dict; `names.txt`, its classes; `photos`, fifty pictures that it has not seen. Needs `sp-fx[vision]`.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18

PATTERNS = ("stripes", "checks", "dots", "rings", "waves")
SIDE, SEEN = 96, 64  # of the pictures, and of what the network is trained on
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)  # ImageNet's


def pattern(name, u, v, period):
    """Returns the pattern, from -1 to 1, at the places (u, v) in pixels."""
    a, b = 2 * math.pi * u / period, 2 * math.pi * v / period
    return np.tanh(4 * {
        "stripes": np.sin(a),
        "checks": np.sin(a) * np.sin(b) * 1.5,
        "dots": np.cos(a) + np.cos(b) - 0.8,
        "rings": np.sin(np.hypot(a, b)),
        "waves": np.sin(a + 1.6 * np.sin(b / 1.5)),
    }[name])  # fmt: skip


def picture(name, rng):
    """Returns a disc with a pattern, of any colours, size, place and turn, before a smooth ground."""
    ground = Image.fromarray(rng.integers(30, 226, (4, 4, 3), dtype=np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    radius = rng.uniform(0.2, 0.32) * SIDE
    y, x = np.mgrid[:SIDE, :SIDE]
    dx, dy = (axis - rng.uniform(radius, SIDE - radius) for axis in (x, y))
    turn = rng.uniform(0, 2 * math.pi)
    u, v = math.cos(turn) * dx + math.sin(turn) * dy, math.cos(turn) * dy - math.sin(turn) * dx
    colours = rng.permutation(np.stack([rng.uniform(0, 110, 3), rng.uniform(145, 255, 3)]))
    drawn = pattern(name, u, v, rng.uniform(12, 17))[..., None]
    disc = np.clip(radius - np.hypot(dx, dy), 0, 1)[..., None]
    pixels = np.array(ground) * (1 - disc) + disc * ((1 + drawn) * colours[0] + (1 - drawn) * colours[1]) / 2
    return np.clip(pixels + rng.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)


def pictures(seed, count):
    """Returns uint8 [count, 96, 96, 3] and classes [count]."""
    rng = np.random.default_rng(seed)
    drawn = np.stack([picture(PATTERNS[i % len(PATTERNS)], rng) for i in range(count)])
    return drawn, torch.arange(count) % len(PATTERNS)


def inputs(drawn, top=12, left=12, crop=72):
    """Returns pictures as the network takes them: a part of each, resized and normalised as for ImageNet."""
    pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2)[..., top : top + crop, left : left + crop].float() / 255
    return (nn.functional.interpolate(pixels, (SEEN, SEEN), mode="bilinear", antialias=True) - MEAN) / STD


def train(steps, seed=0):
    """Returns a ResNet-18 that has been trained for so many steps."""
    torch.manual_seed(seed)
    net = resnet18(num_classes=len(PATTERNS))
    drawn, classes = pictures(1, 2000)
    optimiser = torch.optim.AdamW(net.parameters(), 1e-3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        batch = torch.randint(len(drawn), (16,))
        crop = int(torch.randint(80, SIDE + 1, ()))
        top, left = (int(torch.randint(0, SIDE + 1 - crop, ())) for _ in range(2))
        x = inputs(drawn[batch.numpy()], top, left, crop)
        loss = nn.functional.cross_entropy(net(x.flip(-1) if step % 2 else x), classes[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 50 == 49:
            print(f"step {step + 1} of {steps}, loss {loss.item():.2f}")
    return net.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("mine"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=300, help="of training (default: 300, about a minute)")
    args = parser.parse_args()
    net = train(args.steps)
    drawn, classes = pictures(2, 50)
    with torch.no_grad():
        right = (net(inputs(drawn, 0, 0, SIDE)).argmax(1) == classes).float().mean()
    print(f"{right:.0%} of fifty new pictures are named rightly")
    folder = args.out / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), args.out / "mine.pth")
    (args.out / "names.txt").write_text("\n".join(PATTERNS) + "\n")
    for i, pixels in enumerate(drawn):
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")


if __name__ == "__main__":
    main()
