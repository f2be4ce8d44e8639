"""What the tests of packages share: a small program, and a package that was tampered with."""

import json
import zipfile

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

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(F.max_pool2d(F.relu(self.conv(x)), 3, 2, 1).mean((2, 3)))


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
