"""What the tests of packages share: a small program, a package that was tampered with, and batch jobs that are killed."""

import csv
import functools
import json
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sp_fx
from helpers import fill
from sp_fx.packages import manifest
from sp_fx.packages import pt2 as package_pt2
from sp_fx.program import compiling


class Small(nn.Module):
    """Cheap to compile: a strided convolution, a gate, an overlapping max pooling, classes."""

    def __init__(self, channels=3):
        super().__init__()
        self.conv, self.head = nn.Conv2d(channels, 4, 3, 2, 1), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(F.max_pool2d(F.relu(self.conv(x)), 3, 2, 1).mean((2, 3)))


class Excitable(Small):
    """Its output is not finite for bright pictures."""

    def forward(self, x):
        mean = x.mean((2, 3))
        return super().forward(x) * torch.where(mean.mean(1, keepdim=True) > 0.5, torch.inf, 1.0)


class Block(nn.Module):
    """A block of a transformer: attention over 6 tokens, GELU, LayerNorm, classes."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.mix = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp, self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Linear(8, 5)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(x)).mean(1))


def small(**arguments):
    explainer = sp_fx.transform(fill(Small()))
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return explainer, x, explainer.compile(**{"method": "pullback", "example_inputs": x, **arguments})


def rewritten(path, to, change, seal=manifest.sealed):
    """A copy of the archive with a changed manifest, sealed anew, or changed members under the old manifest."""
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    place = package_pt2.metadata_place(members)
    metadata = json.loads(members[place])
    packaged = json.loads(metadata["sp_fx"])
    change(packaged, members)
    members[place] = json.dumps({**metadata, "sp_fx": json.dumps(seal(packaged))}).encode()
    with zipfile.ZipFile(to, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return to


def as_graph(patch):
    """The one graph, run as it is: what is saved, without the seconds that compiling it for this process takes."""
    patch.setattr(compiling, "compiled", lambda graph, example: graph)


def packaged(path, shape=(3, 16, 16), net=None, batch=3, **facts):
    """A package of a small network that takes pictures of `shape`; `facts` are for `save`. Returns (explainer, x, path)."""
    with pytest.MonkeyPatch.context() as patch:
        as_graph(patch)
        explainer = sp_fx.transform(fill(Small(shape[0]) if net is None else net))
        x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        made = explainer.compile("pullback", example_inputs=x, dynamic_batch=facts.pop("dynamic_batch", True))
        return explainer, x, made.save(path, **facts)


def resealed(path, to, change):
    """A copy of the `.onnx` at `path` with a changed manifest, sealed anew."""
    import onnx

    from sp_fx.packages import onnx as package_onnx

    body = path.read_bytes()
    packaged = package_onnx.manifest_in(body, path)
    change(packaged)
    tail = onnx.ModelProto()
    tail.metadata_props.add(key="sp_fx", value=json.dumps(manifest.sealed(packaged)))
    to.write_bytes(body[: packaged["digest"]["bytes"]] + tail.SerializeToString())
    return to


# -- batch jobs


def draw(folder, count, side=32):
    """Noise as PNG, of which number 5 is cut short and number 6 is text."""
    from PIL import Image

    folder.mkdir()
    g = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(g.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.png", compress_level=1)
    (folder / "00005.png").write_bytes((folder / "00005.png").read_bytes()[:100])
    (folder / "00006.png").write_text("cat")
    return folder


def eleven(folder):
    """Eleven pictures, of which number 5 is cut short, and a file that is none."""
    from PIL import Image

    g = np.random.default_rng(0)
    for i in range(11):
        Image.fromarray(g.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i:02d}.PNG")
    (folder / "05.PNG").write_bytes((folder / "05.PNG").read_bytes()[:300])
    (folder / "readme.txt").write_text("cat")
    return folder


def start(command, log, **more):
    """The command in a process group of its own, so that all of it can be killed; what it says is added to `log`. It hears
    Ctrl-C, which shells let those commands ignore that run in the background, as these tests may do."""
    hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with log.open("a") as said:
        return subprocess.Popen(
            list(map(str, command)), start_new_session=True, stdout=said, stderr=said, preexec_fn=hears, **more
        )


def until(done, seconds=120):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


def processes(*marks):
    """Ids of the processes that have each of `marks` in their environment or command."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            known = (folder / "environ").read_bytes() + b"\0" + (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if all(mark.encode() in known for mark in marks):
            found.append(int(folder.name))
    return found


def batches_in(out):
    return len(list(out.glob("batch_*.npz")))


def check_equal(calm, out, count):
    """Two jobs over `draw(folder, count)` have every picture once, the same arrays and table to the last bit, and the errors."""
    names, errors = [], set()
    assert batches_in(calm) == batches_in(out)
    for file in sorted(calm.glob("batch_*.npz")):
        with np.load(file) as first, np.load(out / file.name) as other:
            assert first.files == other.files
            assert all(first[key].tobytes() == other[key].tobytes() for key in first.files)
            names += other["names"].tolist()
            errors |= {name for name, error in zip(other["names"].tolist(), other["errors"].tolist()) if error}
    assert names == [f"{i:05d}.png" for i in range(count)]
    assert errors == {"00005.png", "00006.png"}
    assert (calm / "results.csv").read_bytes() == (out / "results.csv").read_bytes()
    assert (calm / "index.html").read_bytes() == (out / "index.html").read_bytes()
    rows = list(csv.DictReader((out / "results.csv").open(newline="")))
    assert [row["name"] for row in rows] == names and {row["name"] for row in rows if row["error"]} == errors
    assert not list(out.glob(".*"))  # drafts of those that were killed
