"""Published settings by name."""

import pytest
import torch
from torch import nn

import sp_fx
from helpers import fill, relative


@pytest.mark.parametrize("name, relu, max_pool, steps, alpha", [
    ("paper", 0.6, 0.3, 5, 20), ("paper_resnet50", 0.5, 0.5, 2, 5), ("paper_pvt_v2_b1", 0.6, 0.3, 5, 40),
])  # fmt: skip
def test_presets_are_what_was_published(name, relu, max_pool, steps, alpha):
    preset = sp_fx.PRESETS[name]
    assert (preset.rules.relu, preset.rules.max_pool, preset.rules.gelu) == (relu, max_pool, 1.0)
    assert preset.rules.scale == "absolute" and preset.rules.leaky_relu is None and preset.rules.attention == 1.0
    assert (preset.steps, preset.step_size) == (steps, alpha) and preset.source
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    explainer = sp_fx.transform(fill(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))), rules=preset.rules)
    assert relative(explainer.ascend(x, 1, **preset.ascent), explainer.ascend(x, 1, steps=steps, step_size=alpha)) == 0


def test_presets_stay_as_they_are():
    with pytest.raises(TypeError):
        sp_fx.PRESETS["mine"] = sp_fx.PRESETS["paper"]
