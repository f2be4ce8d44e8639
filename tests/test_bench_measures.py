"""The measures of bench/ against counts by hand."""

import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
pytestmark = pytest.mark.skipif(not BENCH.exists(), reason="the benches are not beside these tests")
sys.path.insert(0, str(BENCH))


def test_mass_and_pointing_by_hand():
    from measures import mass_inside, pointing

    x = torch.tensor([[[[1.0, 2.0]], [[3.0, 1.0]]]])  # [1, 2 channels, 1, 2]
    maps = torch.tensor([[[[1.0, 1.0]], [[-0.5, 3.0]]]])
    # relevances: 1 - 1.5 = -0.5, which does not count, and 2 + 3 = 5
    assert mass_inside(x, maps, torch.tensor([[[True, False]]])).item() == 0
    assert mass_inside(x, maps, torch.tensor([[[False, True]]])).item() == 1
    assert (
        pointing(x, maps, torch.tensor([[[False, True]]])).item()
        and not pointing(x, maps, torch.tensor([[[True, False]]])).item()
    )
    assert mass_inside(x, maps * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1), torch.tensor([[[True, False]]])).item() == 1
    assert mass_inside(x, -x, torch.ones(1, 1, 2, dtype=torch.bool)).isnan().all()  # nothing is positive: no share


def test_intervals():
    from measures import paired_interval, ratio_interval, share_interval

    draws = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3
    found = paired_interval(draws)
    half = 1.96 * draws.std().item() / 400**0.5
    # Bootstrap and normal interval agree to the bootstrap's own noise at 10,000 draws and the sample's skewness.
    assert abs(found["low"] - (draws.mean().item() - half)) < 0.1 * half
    assert abs(found["high"] - (draws.mean().item() + half)) < 0.1 * half
    assert found == paired_interval(draws)
    with pytest.raises(ValueError, match="at least 10 finite differences, got 2 of 3"):
        paired_interval(torch.tensor([1.0, 2.0, float("nan")]))
    # A ratio of means: 3 to 1 on every pair, and one that varies, by the delta method.
    base = torch.rand(400, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 1
    assert ratio_interval(3 * base, base) == pytest.approx({"ratio": 3, "ratio_low": 3, "ratio_high": 3})
    found = ratio_interval(base + draws, base)
    ratio = ((base + draws).mean() / base.mean()).item()
    half = 1.96 * (base + draws - ratio * base).std().item() / base.mean().item() / 400**0.5
    assert abs(found["ratio_low"] - (ratio - half)) < 0.1 * half and abs(found["ratio_high"] - (ratio + half)) < 0.1 * half
    # Wilson's interval for 160 of 200, from its closed form by hand.
    found = share_interval(torch.arange(200) < 160)
    assert found["share"] == pytest.approx(0.8) and found["low"] == pytest.approx(0.7391, abs=1e-4)
    assert found["high"] == pytest.approx(0.8496, abs=1e-4)
