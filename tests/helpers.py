"""What several tests need: seeded weights, the golden networks, the plain gradient, a model whose calls share modules."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from nets import NETS  # noqa: E402


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and running statistic drawn from a seed: fresh networks have zero heads and 1e-6 layer scales, which
    would make any comparison pass."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5)
            else:
                p.copy_(torch.rand(p.shape, generator=g) + (0.5 if name.endswith("weight") else -0.5))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=g) * 0.1)
            elif name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=g) + 0.5)
    return model.eval()


def golden(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    data = load_file(GOLDEN / f"{name}.safetensors")
    model = NETS[name][0]()
    model.load_state_dict({k.removeprefix("weights."): v for k, v in data.items() if k.startswith("weights.")})
    return model.eval(), data


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def gradient(model: nn.Module, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(model(x), x, u)[0]


class Shared(nn.Module):
    """One in-place ReLU module for three calls, a functional one, a method, a dropout, and a BatchNorm in train mode."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        x = self.act(self.conv(x))
        x = F.relu(self.conv(x), inplace=True) + self.act(self.conv(x))
        return self.head(self.body(x).relu().mean((2, 3)))
