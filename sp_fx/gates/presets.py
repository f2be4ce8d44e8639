"""The settings of the paper's tables, by name: rules and the steps of ascents.

For example, of `sp_fx.PRESETS["paper_resnet50"]` as `preset`: `explainer = sp_fx.transform(model, rules=preset.rules)`, and then
`explainer.ascend(x, bounds=(-1.0, 1.0), **preset.ascent)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from .rules import Rules


@dataclass(frozen=True)
class Preset:
    """Published settings: `rules` for `transform`, and `steps` of L2 length `step_size` for inputs in [-1, 1] of
    3 x 224 x 224; `source` says where they stand."""

    rules: Rules
    steps: int
    step_size: float
    source: str

    @property
    def ascent(self) -> dict[str, Any]:
        """The arguments of `Explainer.ascend`."""
        return {"steps": self.steps, "step_size": self.step_size}


CODE = "the paper's published code, the later ablations of"
PRESETS = MappingProxyType(
    {
        "paper": Preset(Rules.paper(), 5, 20.0, "arXiv:2507.22832"),
        "paper_resnet50": Preset(replace(Rules.paper(), relu=0.5, max_pool=0.5), 2, 5.0, f"{CODE} ResNet-50"),
        "paper_pvt_v2_b1": Preset(Rules.paper(), 5, 40.0, f"{CODE} PVT-v2-b1"),
    }
)
