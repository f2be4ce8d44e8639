"""Lessons: a network that is slow to find shapes by itself first copies, stage by stage, one that has found them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The last module of each stage; both networks have stages of one size and width.
STAGES = {
    "residual_cnn": ("blocks.1", "blocks.3", "blocks.5"),
    "pyramid_transformer": ("stages.3", "stages.7", "stages.11"),
}


class Lesson:
    """How far a pupil's stages are from a teacher's, each place's channels taken to zero mean and unit spread."""

    def __init__(self, pupil: nn.Module, teacher: nn.Module) -> None:
        self.teacher = teacher.requires_grad_(False).to(memory_format=torch.channels_last)
        self.copied: list[Tensor] = []
        self.shown: list[Tensor] = []
        self._hooks = [
            *(pupil.get_submodule(name).register_forward_hook(self._copy) for name in STAGES["pyramid_transformer"]),
            *(teacher.get_submodule(name).register_forward_hook(self._show) for name in STAGES["residual_cnn"]),
        ]

    def loss(self, x: Tensor) -> Tensor:
        """Mean squared differences, summed over stages; call it with the pictures [B, 3, 96, 96] the pupil just saw."""
        with torch.no_grad():
            self.teacher(x)
        aims = (F.layer_norm(shown.float(), shown.shape[-1:]) for shown in self.shown)
        apart = [F.mse_loss(copied.float(), aim) for copied, aim in zip(self.copied, aims, strict=True)]
        self.copied.clear()
        self.shown.clear()
        return torch.stack(apart).sum()

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _copy(self, _: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        self.copied.append(output)

    def _show(self, _: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        self.shown.append(output.permute(0, 2, 3, 1))
