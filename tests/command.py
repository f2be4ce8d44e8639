"""What tests of the command share: a folder of pictures and weights, and calls on what is in it."""

import json

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
