"""What tests of the command share: folders of pictures, weights and networks of one's own, and calls on what is in them."""

import json
import os
import sys

import numpy as np
import torch
import torchvision
from PIL import Image

from helpers import fill
from sp_fx import zoo
from sp_fx.cli.commands import main


def write_inputs(folder):
    """Write seeded weights, drawn pictures and scenes, and a broken file into `folder`; return it."""
    torch.save(fill(torchvision.models.squeezenet1_1()).state_dict(), folder / "weights.pt")
    noise = np.random.default_rng(0).integers(0, 255, (120, 160, 4), dtype=np.uint8)
    Image.fromarray(noise[..., :3]).save(folder / "colour.png")
    Image.fromarray(noise[..., 0]).save(folder / "grey.png")
    Image.fromarray(noise).save(folder / "alpha.png")
    (folder / "other").mkdir()
    Image.fromarray(noise[::-1, :, :3].copy()).save(folder / "other" / "colour.png")
    scenes = zoo.draw(5, 10)
    for i, pixels in enumerate(scenes.pixels):
        Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(folder / f"scene_{i}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    return folder


def explain(here, out, *more, images=("colour.png",)):
    pictures = [str(here / name) for name in images]
    return main(["explain", *pictures, "--model", "squeezenet1_1", "--weights", str(here / "weights.pt"), "--input-size", "64",
                 "--out", str(out), *more])  # fmt: skip


SCENES = [f"scene_{i}.png" for i in range(10)]


def explain_scenes(here, out, *more, model="zoo/residual_cnn", images=SCENES):
    return main(["explain", *[str(here / name) for name in images], "--model", model, "--out", str(out), *more])


def record(out, name):
    return json.loads((out / f"{name}.json").read_text())


# -- networks of one's own


SOURCE = """
import collections, dataclasses
import torch
from torch import nn
import sp_fx
from beside_own import width

def fill(net):
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) / max(1, p[0].numel() if p.dim() > 1 else 3) ** 0.5
    return net.eval()

class Net(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, width, 5, 2), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU())
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return 5 * self.fc(self.body(x).mean((2, 3)))

def net(num_classes=4, channels=3):
    return fill(Net(channels, num_classes))

class Wrapped(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.net, self.make = net(), make

    def forward(self, x):
        return self.make(self.net(x))

@dataclasses.dataclass
class Said:
    logits: torch.Tensor
    more: str

Pair = collections.namedtuple("Pair", "logits aux")

def mapping(): return Wrapped(lambda y: {"logits": y, "features": y * 2})
def said(): return Wrapped(lambda y: Said(y, "hello"))
def single(): return Wrapped(lambda y: (y,))
def pair(): return Wrapped(lambda y: Pair(y, y * 2))
def probabilities(): return Wrapped(lambda y: y.softmax(1))
def sigmoid(num_classes=4): return nn.Sequential(net(num_classes), nn.Sigmoid())
class Dividing(Wrapped):
    def forward(self, x):  # of a picture of one colour 0 / 0
        spread = (x - x[..., :1, :1]).square().sum((1, 2, 3))[:, None]
        return self.net(x) * (spread / spread)
def dividing(): return Dividing(None)
def mapping_of_maps(): return Wrapped(lambda y: y[..., None, None].expand(-1, -1, 2, 2) * 1.0)
def broken_key(): return {}["nothing"]
def broken_value(): raise ValueError("five is too few")
def two_tensors(): return Wrapped(lambda y: (y, y * 2))
def one_axis(): return Wrapped(lambda y: y[:, 0])
def nan(): return Wrapped(lambda y: y * float("nan"))
def grey(): return net(channels=1)
def four_channels(): return net(channels=4)
def half(): return net().half()
def parallel(): return nn.DataParallel(net())
def frozen(): return net().requires_grad_(False)
def flat(): return fill(nn.Sequential(nn.Flatten(), nn.Linear(784, 4)))
def noisy(): print("building it"); return net()
def vit(): return torchvision_vit()
def normalised(): return sp_fx.pixel_space(net(), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
def named():
    it = sp_fx.models.Preprocessing(40, 32, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    return sp_fx.models.NamedModel("its name", normalised(), it, ("a", "b", "c", "d"), "its own")
def torchvision_vit():
    import torchvision
    return fill(torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=4))
"""
PICTURES = ["wide picture ä.png", "high.jpg"]


def write_own(folder):
    """Write two pictures, a folder of some, and a file of networks into `folder`; return it."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    for name, size in (("wide picture ä.png", (60, 41)), ("high.jpg", (37, 80))):
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / name, quality=95)
    (folder / "more" / "deep").mkdir(parents=True)
    (folder / "empty").mkdir()
    for name in ("a.png", "deep/b.webp", "deep/c [1].bmp"):
        Image.fromarray(noise).resize((40, 50)).save(folder / "more" / name, lossless=True)
    (folder / "own_nets.py").write_text(SOURCE)
    (folder / "beside_own.py").write_text("width = 6\n")
    return folder


def own():
    """The file of networks, as a test imports it."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    import own_nets

    return own_nets


def explained(out, *more, model, images=PICTURES, side=32):
    sized = ["--input-size", str(side)] if side else []
    return main(["explain", *images, "--model", model, "--out", str(out), *sized, *more])
