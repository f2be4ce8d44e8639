"""The two small networks: plain torch, [B, 3, 96, 96] float32 in [-1, 1] to [B, 10] logits.

Both run at any size whose sides are multiples of 32, and `torch.fx.symbolic_trace` follows them in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import KINDS


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions round a skip; one in-place ReLU serves both gates."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.skip = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.relu(y + self.skip(x))


class ResidualCNN(nn.Module):
    """Stem with an overlapping padded max pooling, three stages of residual blocks, mean over pixels, logits."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96), depths: tuple[int, ...] = (2, 2, 2)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 5, 2, 2, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        blocks, width_in = [], widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for i in range(depth):
                blocks.append(ResidualBlock(width_in, width, 2 if stage and i == 0 else 1))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width_in, len(KINDS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class PatchEmbedding(nn.Module):
    """Patches: [B, H, W, C] to [B, H / stride, W / stride, D], normalised over channels."""

    def __init__(self, width_in: int, width: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, kernel, stride, padding)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class ReducedAttention(nn.Module):
    """Attention with a query at every pixel, keys and values at cells of `reduction` x `reduction`; [B, H, W, D] to the same."""

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        # Cells do not overlap, so a kernel as wide as the stride, and no padding.
        self.reduce: nn.Module = nn.Identity() if reduction == 1 else PatchEmbedding(width, width, reduction, reduction, 0)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        cells = self.reduce(x)
        mixed = F.scaled_dot_product_attention(
            self._heads(self.query(x)), self._heads(self.key(cells)), self._heads(self.value(cells))
        )
        return self.out(mixed.transpose(1, 2).reshape(x.shape))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, H, W, D] to [B, heads, H * W, D / heads]."""
        return x.flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """A wide hidden layer that sees its neighbours through a depthwise 3x3 convolution; [B, H, W, D] to the same."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.wide = nn.Linear(width, hidden)
        # Its zero padding is the only position code.
        self.neighbours = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.gelu = nn.GELU()
        self.narrow = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        near = self.neighbours(self.wide(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.narrow(self.gelu(near))


class PyramidBlock(nn.Module):
    """Attention, then feed-forward, each after a LayerNorm and round a skip; [B, H, W, D] to the same."""

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = ReducedAttention(width, heads, reduction)
        self.norm2 = nn.LayerNorm(width)
        self.feed = FeedForward(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class PyramidTransformer(nn.Module):
    """Three stages at 1/4, 1/8 and 1/16 of the picture, overlapping patches between them, mean over pixels, logits."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96), depths: tuple[int, ...] = (2, 2, 2)) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        width_in = 3
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            patches = (7, 4, 3) if stage == 0 else (3, 2, 1)
            stages.append(PatchEmbedding(width_in, width, *patches))
            stages += [PyramidBlock(width, width // 32, (4, 2, 1)[stage]) for _ in range(depth)]
            stages.append(nn.LayerNorm(width))
            width_in = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(width_in, len(KINDS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x.permute(0, 2, 3, 1)).mean((1, 2)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual_cnn": ResidualCNN,
    "pyramid_transformer": PyramidTransformer,
}
