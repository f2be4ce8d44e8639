"""Lessons: a network that is slow to learn shapes by itself first copies, stage by stage, one that knows them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The last module of each stage. Stage by stage, both networks have maps of the same size and width.
STAGES = {
    "residual_cnn": ("blocks.1", "blocks.3", "blocks.5"),
    "pyramid_transformer": ("stages.3", "stages.7", "stages.11"),
}


class Lesson:
    """The distance of a pupil's stages to a teacher's, at every pixel with the channels at mean 0 and standard deviation 1."""

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
        targets = (F.layer_norm(shown.float(), shown.shape[-1:]) for shown in self.shown)
        distances = [F.mse_loss(copied.float(), target) for copied, target in zip(self.copied, targets, strict=True)]
        self.copied.clear()
        self.shown.clear()
        return torch.stack(distances).sum()

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _copy(self, _: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        self.copied.append(output)

    def _show(self, _: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
        self.shown.append(output.permute(0, 2, 3, 1))
